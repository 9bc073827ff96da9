"""A variant as a graph for a runtime alone: token ids in, vectors out; the tokenizer and an example that runs it lie beside.

Needs neither torch nor transformers nor this package: onnxruntime or openvino, tokenizers, numpy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import UserError
from compress.export.checkpoint import write_json
from compress.export.text import card
from compress.loading import Source, open_source
from compress.measure.fidelity import cosines
from compress.models.checkpoint import weight_files, write_text_atomic
from compress.models.variant import INDEX_FILE, VariantInfo
from compress.runtimes.contract import INPUTS, RuntimeName, graph_file, pick_runtime
from compress.texts import suite_texts

if TYPE_CHECKING:
    from compress.export import Say

SETTINGS_FILE = "embedder.json"
READ_BACK_TEXTS, READ_BACK_COSINE = 20, 0.9999

EXAMPLE = """\
import json
import numpy as np
{imports}
from tokenizers import Tokenizer

folder = "."  # where this file lies
settings = json.load(open(folder + "/embedder.json"))
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_padding()
{opening}

def embed(texts, prompt=""):
    prepare = str.lower if settings["lowercase"] else str
    rows = tokenizer.encode_batch([prepare(prompt + text) + settings["suffix"] for text in texts])
    ids, mask = (np.array([getattr(row, key) for row in rows]) for key in ("ids", "attention_mask"))
    inputs = [ids, mask]
    if not settings["pool_prompt"]:  # the prompt is read, and does not enter the mean
        alone = tokenizer.encode(prepare(prompt), add_special_tokens=settings["prompt_specials"])
        pooled = mask.copy()
        pooled[:, : sum(alone.attention_mask) - (alone.special_tokens_mask or [0])[-1]] = 0
        inputs.append(pooled)
    {running}

vectors = embed(["any", "texts"], settings["default_prompt"])
"""
IN_ONNXRUNTIME = {
    "imports": "import onnxruntime",
    "opening": """\
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay in float32
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])""",
    "running": 'return session.run(None, dict(zip(settings["inputs"], inputs)))[0]',
}
IN_OPENVINO = {
    "imports": "import openvino",
    "opening": """\
exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # as it was stored, and no more rounding
compiled = openvino.Core().compile_model(folder + "/model.xml", "CPU", exact)""",
    "running": "return compiled(inputs)[0]",
}


def write_onnx(source: Source, folder: Path, say: Say) -> None:
    """Write a variant into an empty folder as ONNX, its weights in the safetensors files that the graph refers to.

    Raises:
        UserError: onnxruntime does not execute the variant's numbers, or gives other vectors than the variant.
    """
    graph = _lowered(source, folder, RuntimeName.ONNXRUNTIME)
    graph.rename(folder / "model.onnx")
    _finish(source, folder, RuntimeName.ONNXRUNTIME, IN_ONNXRUNTIME, "onnxruntime tokenizers numpy", say)


def write_openvino(source: Source, folder: Path, say: Say) -> None:
    """Write a variant into an empty folder as OpenVINO's intermediate representation.

    Raises:
        UserError: openvino is not installed, does not execute the variant's numbers, or gives other vectors than the variant.
    """
    graph = _lowered(source, folder, RuntimeName.OPENVINO)
    import openvino

    # Weights stay in the numbers that they are stored in.
    openvino.save_model(openvino.Core().read_model(graph), folder / "model.xml", compress_to_fp16=False)
    for path in (graph, *weight_files(folder), folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    _finish(source, folder, RuntimeName.OPENVINO, IN_OPENVINO, "openvino tokenizers numpy", say)


def _lowered(source: Source, folder: Path, runtime: RuntimeName) -> Path:
    """Copy a variant and write its graph for a runtime beside its weights."""
    from compress.runtimes.lower import lower

    pick_runtime(runtime, VariantInfo.read(source.folder).quantized)
    for path in (*weight_files(source.folder), *(source.folder / name for name in ("config.json", "variant.json", INDEX_FILE))):
        if path.exists():
            shutil.copy(path, folder / path.name)
    lower(folder, runtime)
    for name in ("config.json", "variant.json"):
        (folder / name).unlink()
    return graph_file(folder, runtime)


def _finish(source: Source, folder: Path, runtime: RuntimeName, words: dict[str, str], packages: str, say: Say) -> None:
    """Write what lies beside a graph, and see that the example gives the variant's vectors."""
    info = VariantInfo.read(source.folder)
    info.tokenizer(source.folder).save(folder / "tokenizer.json")  # with its longest input, which it cuts itself
    embedder = open_source(source, runtime=runtime, device="cpu")
    spec = info.spec
    settings = {
        "dimension": embedder.dimension,
        "max_length": info.max_length,
        "prompts": spec.prompts,
        "default_prompt": spec.default_prompt,
        "pool_prompt": spec.pool_prompt,
        "prompt_specials": spec.prompt_specials,
        "lowercase": spec.lowercase,
        "suffix": spec.suffix,
        "normalized": spec.normalize,
        "inputs": list(INPUTS[:2] if spec.pool_prompt else INPUTS),
    }
    write_json(folder / SETTINGS_FILE, settings)
    example = EXAMPLE.format(**words)
    loading = f"`pip install {packages}` is all that it needs:\n\n```python\n{example}```\n"
    write_text_atomic(folder / "README.md", card(info, loading, (), library=str(runtime)))
    texts = list(suite_texts()[:READ_BACK_TEXTS])
    prompt = next(iter(spec.prompts.values()), spec.default_prompt)
    worst = float(cosines(embedder.encode(texts, prompt), read_back(folder, example, texts, prompt)).min())
    if worst < READ_BACK_COSINE:
        raise UserError(f"{source.name}: {runtime} alone gives other vectors: lowest cosine {worst:.6f} on {len(texts)} texts")
    say(f"read back by {runtime} alone: lowest cosine {worst:.7f} on {len(texts)} texts")


def read_back(folder: Path, example: str, texts: list[str], prompt: str) -> np.ndarray:
    """Run the card's example in a process that knows nothing of this package, and return its vectors of other texts.

    Raises:
        UserError: it failed.
    """
    with tempfile.TemporaryDirectory() as work:
        script = Path(work) / "example.py"
        out = Path(work) / "vectors.npy"
        given = f"\nnp.save({str(out)!r}, embed({texts!r}, {prompt!r}))\nimport sys\nassert 'compress' not in sys.modules\n"
        script.write_text(example + given, encoding="utf-8")
        # -I: neither this folder nor the user's settings are looked into for modules.
        done = subprocess.run([sys.executable, "-I", str(script)], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"{folder}: the example of the card failed", (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            )
        vectors: np.ndarray = np.load(out)
    return vectors
