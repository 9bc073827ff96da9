"""Wrote the files of this folder, with version 0.1.0 of the project (commit 875e612), on one machine, once.

Do not run it again to replace them: their worth is that an earlier version wrote them, and a later one reads them. Its imports are
those of version 0.1.0. Later formats get a folder of their own next to this one, with a script of their own.

What it wrote, from `recipes/` and `texts/`:
- `model/`: a random BERT of three blocks in a sentence-transformers folder;
- `variants/`: variants of it and of a small random NV-Embed, each with other keys of `variant.json`;
- `runs/`: the folder of a finished run, its variant included;
- `killed/`: what two killed runs of `recipes/killed.yaml` left, one while it made its variant, one while it measured;
- `vectors.safetensors`: float32 [texts, dimension] of `texts/embedded.json`, by variant, runtime and prompt;
- `recipes/everything.json`: what the recipe of that name said to this version, defaults included.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from compress.models.nv_embed import EOS, PREFIX
from compress.recipe import Recipe, parse_recipe, read_recipe
from compress.texts import suite_texts
from pydantic import BaseModel
from safetensors.numpy import save_file
from tests_support import folder_of
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import compress
from compress.models import shards
from compress.models.network import empty_network

HERE = Path(__file__).parent
WIDTH = 32
PROMPTS = {"query": "query: ", "passage": "passage: "}
TEXTS = [
    "",
    "A parcel came late.",
    "the parcel that came late was opened at once, and nobody could say who had sent it or why " * 4,
    "日本語の文章です。 中文",
    "Ünïcödé, 1 2 3?!",
    "line one\nline two",
]

ONE_BLOCK = {"method": "depth", "drop": [1, 2]}
INT4 = [
    ONE_BLOCK,
    {"method": "gptq", "bits": 4, "group_size": 16, "symmetric": False, "overrides": {"*.output.dense": {"bits": 8}}},
    {"method": "embeddings", "bits": 8},
]
PRUNED = [
    {"method": "depth", "drop": [1]},
    {"method": "depth", "what": "mlp", "drop": [2]},
    {"method": "width", "heads": 0.5, "channels": 0.5},
    {"method": "sparsegpt", "sparsity": 0.6},
    {"method": "embeddings", "bits": 4, "group_size": 16},
]
MIXED = [
    ONE_BLOCK,
    {"method": "smoothquant", "activations": "static_per_tensor", "alpha": 0.5, "skip": ["*.attention.*"]},
    {"method": "fp8"},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "int4": {"steps": INT4, "runtime": "onnxruntime", "dtype": "float32"},
    "pruned": {"steps": PRUNED},
    "mixed": {"steps": MIXED},
    "nv-embed": {"steps": [{"method": "rtn"}, {"method": "embeddings", "bits": 8}]},
}
"""What is set of the recipe that makes each variant."""

KILLED_WHILE_MAKING = """
import os, signal
import compress
from compress.models import shards
write, written = shards.write_tensors, []
def write_and_die(path, tensors):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tensors)
    written.append(path)
shards.write_tensors = write_and_die
compress.run("recipes/killed.yaml", model="model", output={output!r}, device="cpu")
"""
KILLED_WHILE_MEASURING = """
import os, signal
import compress
def die(line):
    if line.startswith("variant 1/1"):
        os.kill(os.getpid(), signal.SIGKILL)
compress.run("recipes/killed.yaml", model="model", output={output!r}, device="cpu", say=die)
"""


def main() -> None:
    """Write everything; nothing where a file of it is there."""
    if compress.__version__ != "0.1.0" or (HERE / "model").exists():
        sys.exit("these files are there, or this is not the version that wrote them; see the first lines of this script")
    os.chdir(HERE)  # so that paths in recipes and records are relative
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["COMPRESS_CACHE"] = str(scratch / "cache")
        (HERE / "texts" / "embedded.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        make_bert(HERE / "model")
        make_nv_embed(scratch / "nv-embed")
        for name, recipe in VARIANTS.items():
            make_variant(name, recipe, "model" if name != "nv-embed" else str(scratch / "nv-embed"), scratch / "runs")
        make_run(scratch / "measured")
        keep_killed("making", KILLED_WHILE_MAKING, scratch / "making")
        keep_killed("measuring", KILLED_WHILE_MEASURING, scratch / "measuring")
    make_expected()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COMPRESS_CACHE"] = folder
        save_file(make_vectors(Path(folder)), HERE / "vectors.safetensors")


def make_bert(folder: Path) -> None:
    """Write the random BERT: weights in float16, a WordPiece tokenizer of 300 pieces, two prompts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=300, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    AutoModel.from_config(config, add_pooling_layer=False).to(torch.float16).save_pretrained(folder)
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    wordpiece.train_from_iterator(suite_texts(), trainer)
    wordpiece.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=wordpiece, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=32
    ).save_pretrained(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
        for index, (path, module) in enumerate(modules)
    ]
    (folder / "1_Pooling").mkdir()
    for name, content in {
        "modules.json": entries,
        "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 28, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": "passage"},
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA random BERT, to test that old files are read.\n")


def make_nv_embed(folder: Path) -> None:
    """Write the random NV-Embed, in the form in which the model is published."""
    text = {
        "model_type": "bidir_mistral", "vocab_size": 280, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    latent = {
        "model_type": "latent_attention", "num_latents_value": 8, "num_cross_heads": 2, "cross_dim_head": WIDTH,
        "hidden_dim": WIDTH, "latent_dim": WIDTH, "output_normalize": True,
    }  # fmt: skip
    config = {
        "model_type": "nvembed", "hidden_size": WIDTH, "add_eos": True, "is_mask_instruction": True, "mask_type": "b",
        "padding_side": "right", "text_config": text, "latent_attention_config": latent,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", EOS)]
    tokenizer.train_from_iterator(suite_texts(), trainers.BpeTrainer(vocab_size=280, special_tokens=special, max_token_length=8))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = np.random.default_rng(7)
    weights = {}
    for name, tensor in empty_network(folder_of(folder)).state_dict().items():
        values = generator.standard_normal(tuple(tensor.shape))
        if "norm" in name:
            values = 1 + 0.2 * values if name.endswith("weight") else 0.1 * values
        elif not name.endswith("latents") and "embed_tokens" not in name:
            values = values * 1.5 / np.sqrt(tensor.shape[-1])
        weights[name] = values.astype(np.float16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_variant(name: str, recipe: dict[str, Any], model: str, output: Path) -> None:
    """Keep the variant that a recipe makes, without its record; of `pruned` in several files, as large variants are kept."""
    calibration = {"texts": "texts/calibration.txt", "count": 8, "max_tokens": 24}
    made = parse_recipe({"name": name, "calibration": calibration, **recipe})
    limit = 1_000 if name == "pruned" else shards.SINGLE_FILE_BYTES
    with patch.object(shards, "join_shards", partial(shards.join_shards, single_file_bytes=limit)):
        record = compress.run(made, model=model, output=output, device="cpu", compress_only=True)
    shutil.copytree(output / record.run / "variant", HERE / "variants" / name)


def make_run(output: Path) -> None:
    """Keep a run of the command line as it leaves it."""
    command = [sys.executable, "-m", "compress.cli", "run", "recipes/measured.yaml"]
    done = subprocess.run([*command, "--model", "model", "--output", str(output), "--device", "cpu"], check=False)
    assert done.returncode == 1, "a gate of the recipe is one that cannot be kept"
    shutil.copytree(output, HERE / "runs", ignore=shutil.ignore_patterns("mteb"))  # results in the format of another package


def keep_killed(name: str, script: str, output: Path) -> None:
    """Keep what a run leaves behind that is killed: the hidden folder, here under a name that is not hidden."""
    done = subprocess.run([sys.executable, "-c", script.format(output=str(output))], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = output.iterdir()
    shutil.copytree(left, HERE / "killed" / name)


def make_expected() -> None:
    """Write what this version reads in the recipe that has every key."""
    everything = read_recipe("recipes/everything.yaml")
    check_all_keys_are_set(everything)
    text = json.dumps(everything.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (HERE / "recipes" / "everything.json").write_text(text + "\n", encoding="utf-8")


def check_all_keys_are_set(recipe: Recipe) -> None:
    """See that the recipe leaves no key of any section or method out, and uses every method."""
    from compress.methods import METHODS, method_class

    sections = [recipe, *(value for value in dict(recipe).values() if isinstance(value, BaseModel))]
    for section in sections:
        assert set(type(section).model_fields) == section.model_fields_set, type(section).__name__
    for method in METHODS:
        used = {key for step in recipe.steps if step.method == method for key in step.model_fields_set}
        left = set(method_class(method).model_fields) - used
        assert not left, (method, left)


def make_vectors(scratch: Path) -> dict[str, np.ndarray]:
    """Embed the texts with every variant, in every runtime that executes it here, with a prompt and with the default."""
    (run,) = (HERE / "runs").iterdir()
    folders = {"model": HERE / "model", "run": run, **{name: HERE / "variants" / name for name in VARIANTS}}
    made = {}
    for name, folder in folders.items():
        copied = shutil.copytree(folder, scratch / name)
        for runtime in ["torch", "onnxruntime", "openvino"] if name == "int4" else ["torch"]:
            embedder = compress.load(str(copied), runtime=runtime, device="cpu")
            prompt = PREFIX.format(instruction="Find the parcel") if name == "nv-embed" else PROMPTS["query"]
            made[f"{name}/{runtime}/default"] = embedder.encode(TEXTS)
            made[f"{name}/{runtime}/prompt"] = embedder.encode(TEXTS, prompt)
    shutil.copy(scratch / "int4" / "openvino.onnx", HERE / "variants" / "int4")  # where OpenVINO's first use of it leaves the graph
    return made


if __name__ == "__main__":
    main()
