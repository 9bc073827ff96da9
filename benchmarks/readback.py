"""Do other libraries read what `compress export` writes? Their hidden states against ours, on the same variant.

    python benchmarks/readback.py
    python benchmarks/readback.py --environments FOLDER --readers auto-gptq

Each reader has an environment of its own, made once. A small Mistral with random weights and causal attention is compressed in
several ways, exported and run by the reader and by our torch runtime; printed is the lowest cosine over all tokens (for
sentence-transformers over texts). Exit code 1 where one is below 0.9999, or where a reader fails. Activations are left in floating
point on both sides: readers round them by ranges of their own. GPTQModel has kernels for half precision alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environments import add_environments_option, python_of
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from compress.common.journal import Journal
from compress.export import export
from compress.layers.scheme import ActivationScheme
from compress.methods.base import Method
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN, LayerOverride
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.opened import empty_model, weights_of
from compress.models.source import find
from compress.pipeline.apply import make_variant
from compress.pipeline.stage import BuildOptions
from compress.runtimes.loading import load
from compress.runtimes.torch_runtime import prepare

LOWEST = 0.9999
VOCABULARY = 600

WEIGHTS_ALONE = {
    "int4 g64": RTN(bits=4, group_size=64, activations="none"),
    "int4 g64 zeros": RTN(bits=4, group_size=64, symmetric=False, activations="none"),
    "int3 g32": RTN(bits=3, group_size=32, activations="none"),
    "int3 g32 zeros": RTN(bits=3, group_size=32, symmetric=False, activations="none"),
    "int8": RTN(bits=8, activations="none"),
    "int8 g128 zeros": RTN(bits=8, group_size=128, symmetric=False, activations="none"),
}
COMPRESSED = {
    **WEIGHTS_ALONE,
    "int4 and int8": RTN(bits=4, group_size=64, activations="none", overrides={"*.down_proj": LayerOverride(bits=8)}),
    "int8 activations int8": RTN(bits=8),
    "fp8 activations fp8": FP8(),
    "mxfp4": RTN(format="mxfp4", activations="none"),
    "nvfp4": RTN(format="nvfp4", activations="none"),
}


@dataclass(frozen=True)
class Reader:
    """Another library that loads exports."""

    name: str
    environment: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]
    """Packages whose versions are shown."""
    format: str
    program: str
    """Defines `read(folder, case, ids, texts)`, which returns hidden states or vectors."""
    cases: Mapping[str, Method]
    texts: bool = False
    """Whether it returns vectors of texts."""
    variables: dict[str, str] = field(default_factory=dict)


AUTO_GPTQ = """
from auto_gptq import AutoGPTQForCausalLM

def read(folder, case, ids, texts):
    options = {"disable_exllama": True, "disable_exllamav2": True}
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", torch_dtype=torch.float32, **options)
    return model.model.model(input_ids=ids).last_hidden_state
"""

GPTQMODEL = """
from transformers import AutoModel, GPTQConfig

def read(folder, case, ids, texts):
    # Of its kernels for CPUs `torch_fused` takes 4 bits and, in 7.6, leaves zeros out; its own choice computes in bfloat16.
    bits = int(case[3])
    config = GPTQConfig(bits=bits, backend="torch_fused" if bits == 4 and "zeros" not in case else "torch")
    model = AutoModel.from_pretrained(folder, dtype=torch.float16, quantization_config=config, device_map="cpu")
    return model(input_ids=ids).last_hidden_state
"""

COMPRESSED_TENSORS = """
from transformers import AutoModel, CompressedTensorsConfig

def read(folder, case, ids, texts):
    # transformers 5.23 does not load compressed-tensors' own zeros without `dequantize`.
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "zeros" in case else {}
    model = AutoModel.from_pretrained(folder, **options)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False  # of activations; weights are whole numbers already
    return model(input_ids=ids).last_hidden_state
"""

SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer
from transformers import CompressedTensorsConfig

def read(folder, case, ids, texts):
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return torch.from_numpy(SentenceTransformer(folder, device="cpu", model_kwargs=options).encode(texts))
"""

SENTENCE_TRANSFORMERS_GPTQ = """
from sentence_transformers import SentenceTransformer
from transformers import GPTQConfig

def read(folder, case, ids, texts):
    options = {"dtype": torch.float16, "quantization_config": GPTQConfig(bits=int(case[3]), backend="torch")}
    return torch.from_numpy(SentenceTransformer(folder, device="cpu", model_kwargs=options).encode(texts))
"""

# What each reader's program is put into.
AROUND = """
import json, sys, traceback
from importlib.metadata import version
import torch
from safetensors.torch import save_file

torch.set_grad_enabled(False)
job = json.loads(open(sys.argv[1], encoding="utf-8").read())
{program}
ids, found, failed = torch.tensor(job["ids"]), {{}}, {{}}
for case, folder in job["folders"].items():
    try:
        found[case] = read(folder, case, ids, job["texts"]).float().contiguous()
    except Exception as error:
        traceback.print_exc()
        failed[case] = f"{{type(error).__name__}}: {{error}}"
save_file(found, job["output"] + ".safetensors")
answer = {{"failed": failed, "versions": {{package: version(package) for package in job["packages"]}}}}
open(job["output"] + ".json", "w", encoding="utf-8").write(json.dumps(answer))
"""

OF_GPTQMODEL = ("gptqmodel==7.6.*", "optimum==2.3.*", "numpy==2.2.6", "sentence-transformers>=6,<7")
OF_COMPRESSED = ("compressed-tensors==0.20.*", "transformers==5.23.*", "accelerate", "sentence-transformers>=6,<7")
READERS = [
    Reader(
        "auto-gptq",
        "auto-gptq",
        ("auto-gptq==0.7.1", "transformers==4.57.6", "peft==0.17.1", "accelerate==1.12.*", "datasets<4.5"),
        ("auto-gptq", "transformers"),
        "gptq",
        AUTO_GPTQ,
        WEIGHTS_ALONE,
    ),
    Reader(
        "transformers, optimum, gptqmodel",
        "gptqmodel",
        OF_GPTQMODEL,
        ("gptqmodel", "optimum", "transformers"),
        "gptq",
        GPTQMODEL,
        WEIGHTS_ALONE,
        variables={"GPTQMODEL_CPU_WORKERS": "2"},
    ),
    Reader(
        "sentence-transformers, gptqmodel",
        "gptqmodel",
        OF_GPTQMODEL,
        ("sentence-transformers", "gptqmodel"),
        "gptq",
        SENTENCE_TRANSFORMERS_GPTQ,
        {"int4 g64": WEIGHTS_ALONE["int4 g64"]},
        texts=True,
        variables={"GPTQMODEL_CPU_WORKERS": "2"},
    ),
    Reader(
        "transformers, compressed-tensors",
        "compressed-tensors",
        OF_COMPRESSED,
        ("compressed-tensors", "transformers"),
        "compressed-tensors",
        COMPRESSED_TENSORS,
        COMPRESSED,
    ),
    Reader(
        "sentence-transformers, compressed-tensors",
        "compressed-tensors",
        OF_COMPRESSED,
        ("sentence-transformers", "compressed-tensors"),
        "compressed-tensors",
        SENTENCE_TRANSFORMERS,
        {name: COMPRESSED[name] for name in ("int4 g64", "int4 g64 zeros", "mxfp4", "nvfp4")},
        texts=True,
    ),
]


def write_model(folder: Path) -> None:
    """Write the model, with a tokenizer of whole words."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral", vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, sliding_window=None,
        initializer_range=0.1, pad_token_id=0, rope_theta=5e4,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def write_variant(model: Path, folder: Path, step: Method) -> None:
    """Write a variant into `folder/variant`."""
    folder.mkdir()
    shape, options = ModelFolder("small", model).shape, BuildOptions("0", lambda _: None)
    make_variant(find(str(model)), shape, [step], folder / "variant", Journal(folder / "journal"), options)


def hidden_states(variant: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return our torch runtime's hidden states in float32, activations not quantized: [texts, length, width]."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(variant, folder, dirs_exist_ok=True)
        info = VariantInfo.read(variant)
        alone = {name: layer.model_copy(update={"activations": ActivationScheme.NONE}) for name, layer in info.quantized.items()}
        info.model_copy(update={"quantized": alone}).write(Path(folder))
        network = empty_model(ModelFolder("", Path(folder)))
        weights_of(ModelFolder("", Path(folder)), network).fill(network)
        prepare(network, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            found: torch.Tensor = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return found.clone()


def lowest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the lowest cosine between vectors; NaN where one is not finite."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min())


def run_reader(reader: Reader, python: Path, job: dict[str, Any], work: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Run a reader on its exports; return its description, whose `failed` holds errors by case, and its results by case."""
    program, description = work / "reader.py", work / "job.json"
    program.write_text(AROUND.format(program=reader.program), encoding="utf-8")
    description.write_text(json.dumps(job), encoding="utf-8")
    log = work / "reader.log"
    with log.open("w") as file:
        done = subprocess.run(
            [str(python), str(program), str(description)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **reader.variables, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
            check=False,
        )
    answer = Path(job["output"] + ".json")
    if not answer.exists():
        print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
        reason = f"ended with {done.returncode}"
        return {"failed": dict.fromkeys(reader.cases, reason), "versions": {}}, {}
    return json.loads(answer.read_text(encoding="utf-8")), load_file(job["output"] + ".safetensors")


def read_back(reader: Reader, python: Path, work: Path, ids: torch.Tensor, texts: Sequence[str]) -> list[tuple[str, float | str]]:
    """Return, by case, the lowest cosine or what failed; the exports are kept in `work`."""
    place = work / reader.name.replace(", ", "-")
    place.mkdir()
    folders = {case: str(export(work / case, reader.format, place / case.replace(" ", "-"))) for case in reader.cases}
    job = {
        "folders": folders,
        "ids": ids.tolist(),
        "texts": list(texts),
        "packages": reader.packages,
        "output": str(place / "found"),
    }
    answer, found = run_reader(reader, python, job, place)
    versions = " ".join(f"{package} {version}" for package, version in answer["versions"].items())
    rows: list[tuple[str, float | str]] = []
    for case in reader.cases:
        if case in answer["failed"]:
            rows.append((case, answer["failed"][case]))
        else:
            own = (
                torch.from_numpy(np.asarray(load(str(work / case), device="cpu").encode(texts)))
                if reader.texts
                else hidden_states(work / case / "variant", ids)
            )
            rows.append((case, lowest_cosine(found[case], own)))
    print(f"\n{reader.name}: {versions}")
    for case, result in rows:
        shown = f"{result:.7f}" if isinstance(result, float) else f"failed: {result}"
        print(f"    {reader.format:20}{case:24}{shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_environments_option(parser)
    parser.add_argument("--readers", default="", help="parts of the names of the readers to run, separated by commas")
    arguments = parser.parse_args()
    # auto-gptq is built from source where it has no wheel: without CUDA kernels, and with the torch that is there.
    os.environ |= {"BUILD_CUDA_EXT": "0", "PIP_NO_BUILD_ISOLATION": "0"}
    chosen = [name.strip() for name in arguments.readers.split(",") if name.strip()]
    readers = [reader for reader in READERS if not chosen or any(name in reader.name for name in chosen)]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (4, 24), generator=draw)
    texts = [" ".join(f"w{number}" for number in row[: 3 + 6 * index]) for index, row in enumerate(ids.tolist())]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_model(work / "model")
        for case, step in {case: step for reader in readers for case, step in reader.cases.items()}.items():
            write_variant(work / "model", work / case, step)
        for reader in readers:
            python = python_of(reader.environment, reader.requirements, arguments.environments)
            rows += read_back(reader, python, work, ids, texts)
    if not all(isinstance(result, float) and result >= LOWEST for _, result in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
