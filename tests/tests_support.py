"""What several tests need: where to look for what is not in the project, what the command line refuses, methods applied in memory."""

from __future__ import annotations

import shlex
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn

import compress
from compress.calibration.texts import CalibrationSource
from compress.cli import app
from compress.common.journal import Journal
from compress.data.texts import calibration_texts
from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.network.segments import segments_of
from compress.models.network.walk import Resident
from compress.models.opened import empty_model, weights_of
from compress.models.source import find
from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import TextTokenizer
from compress.pipeline.apply import make_variant
from compress.pipeline.stage import BuildOptions

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).parent / "models" / "golden"
TEXTS = ["the parcel never came", "rain by the evening, they said", "who wrote it", "x", ""]


def refusal(line: str) -> Exception | None:
    """Return why the command line refuses a `compress ...`, or None if it accepts it; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    if words[0] == "--help":
        return None
    while isinstance(group.commands.get(words[0]), typer.core.TyperGroup) and len(words) > 1:  # `compress task check`
        group, words = group.commands[words[0]], words[1:]
    try:
        group.commands[words[0]].make_context(words[0], words[1:])
    except Exception as error:
        return error
    return None


def golden_weights(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The golden checkpoint's weights, which follow from the seed, key by key."""
    made = {}
    for key, shape in shapes.items():
        r = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape)
        if "norm" in key:
            r = 1 + 0.2 * r if key.endswith("weight") else 0.1 * r
        elif key.endswith("bias"):
            r = 0.1 * r
        else:
            r = 0.5 * r if "embed_tokens" in key or key.endswith("latents") else r * 1.5 / np.sqrt(shape[1])
        made[key] = r.astype(np.float32)
    return made


def apply_in_memory(network: nn.Module, *steps: Method) -> dict[str, QuantizedLayer]:
    """Apply steps to a network that is in memory, in place."""
    quantized: dict[str, QuantizedLayer] = {}
    for segment in segments_of(network):
        parts = Resident(network).load(segment)
        for step in steps:
            quantized |= step.apply(parts)
        for path, module in parts.items():
            network.set_submodule(path, module)
    return quantized


def folder_of(path: Path) -> ModelFolder:
    """A model's folder, read anew: what a test has changed in it is seen."""
    return ModelFolder("tiny", path)


def text_side(path: Path) -> tuple[EmbedderSpec, TextTokenizer]:
    """How a model takes texts, and its tokenizer."""
    folder = folder_of(path)
    return folder.spec, folder.tokenizer


def compress_to(folder: Path, target: Path, *steps: Method, count: int = 24, max_tokens: int = 120) -> None:
    """Write the variant of a model's folder, calibrated on some of the embedded texts."""
    texts = CalibrationSource(calibration_texts()[:count], None, max_tokens)
    journal = Journal(target.with_name(f"{target.name}-journal"))
    options = BuildOptions("0", lambda _: None, calibration=texts)
    make_variant(find(str(folder)), folder_of(folder).shape, steps, target, journal, options)


def network_of(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The network of a variant, with its weights."""
    network = empty_model(folder_of(folder))
    weights_of(folder_of(folder), network).fill(network, dtype=dtype)
    return network


def encoded(folder: Path, texts: list[str] = TEXTS, **how: object) -> np.ndarray:
    """The vectors of texts by a model's folder."""
    return compress.load(str(folder), device="cpu", **how).encode(texts)  # type: ignore[arg-type]


def half_exact(folder: Path) -> Path:
    """A copy of a model whose weights float16 holds exactly, so that storing a variant rounds nothing."""
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.half().float() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def by_words(folder: Path) -> Path:
    """A copy of a tiny BERT that hardly mixes its tokens, so that the mean of a text says its words.

    The vectors of random blocks lie so close together that a rounding, or another CPU, changes who is nearest to whom.
    """
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(("output.dense.weight", "position_embeddings.weight", "token_type_embeddings.weight")):
                tensors[name] = tensor * 0.01
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def estimated_shapes(folder: Path, *steps: Method) -> dict[str, tuple[int, ...]]:
    """The tensors that a variant should have, by the steps' estimates."""
    shape = folder_of(folder).shape
    for step in steps:
        shape = step.estimate(shape).after
    return {name: info.shape for name, info in shape.tensors.items()}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors that a variant has."""
    return {name: info.shape for name, info in folder_of(folder).headers.items()}


def same_names(a: dict[str, tuple[int, ...]], b: dict[str, tuple[int, ...]]) -> bool:
    """Whether the tensors are the same, but for what stands before a network's names in a checkpoint."""
    return sorted((name.removeprefix("model."), shape) for name, shape in a.items()) == sorted(b.items())


def call_here(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process, which has imported what it needs; return its exit code and what it printed."""
    from compress import cli

    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compress", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capfd.readouterr()
