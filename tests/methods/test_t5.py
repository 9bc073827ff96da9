"""T5's encoder: one token table under two names, and a position bias that the first block makes for all others."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tests_support import TEXTS, compress_to, encoded, estimated_shapes, folder_of, half_exact, same_names, stored_shapes
from transformers import AutoConfig

from compress.calibration.sensitivity import Survey
from compress.calibration.texts import calibration_batches
from compress.common.errors import UserError
from compress.data.texts import calibration_texts
from compress.export import export
from compress.methods.base import Method
from compress.methods.prune.depth import Depth
from compress.methods.prune.wanda import Wanda
from compress.methods.prune.width import Width
from compress.methods.quantize.awq import AWQ
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.methods.quantize.smoothquant import SmoothQuant
from compress.models.network.build import load_network
from compress.models.network.pooling import backbone_of
from compress.models.network.walk import Carry, Resident, walk
from compress.models.opened import open_model
from compress.runtimes.lower import lower

CPU = torch.device("cpu")
TABLE = "shared.weight"


def reference(folder: Path) -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return np.stack([np.asarray(model.encode(text), dtype=np.float32) for text in TEXTS])


def same(made: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(made, expected, atol=tolerance * np.abs(expected).max())


@pytest.fixture
def t5(make_model, copy_of) -> Path:
    """A tiny T5 whose weights float16 holds."""
    return half_exact(copy_of(make_model("t5")))


def test_vectors_are_the_reference_s_loaded_and_streamed(t5: Path) -> None:
    expected = reference(t5)
    same(encoded(t5), expected)
    same(encoded(t5, stream=True), expected)


def test_the_encoder_of_a_whole_t5_is_taken(t5: Path) -> None:
    """As sentence-t5 and flan-t5 lie on the hub: with a decoder, a language model's head, and the table under both names."""
    config = AutoConfig.from_pretrained(t5)
    config.is_encoder_decoder = True
    whole = transformers.T5ForConditionalGeneration(config)
    whole.save_pretrained(t5)
    tensors = load_file(t5 / "model.safetensors")
    save_file(
        tensors | {"encoder.embed_tokens.weight": tensors[TABLE].clone()}, t5 / "model.safetensors", metadata={"format": "pt"}
    )
    expected = reference(t5)
    same(encoded(t5), expected)
    same(encoded(t5, stream=True), expected)
    shape = folder_of(t5).shape
    assert shape.token_table == "shared"
    assert not any(name.startswith(("decoder.", "encoder.embed_tokens")) for name in shape.tensors)
    tensors[TABLE][5] += 1
    save_file(tensors | {"encoder.embed_tokens.weight": load_file(t5 / "model.safetensors")[TABLE]}, t5 / "model.safetensors")
    for how in ({}, {"stream": True}):
        with pytest.raises(UserError, match=r"shared.weight and encoder.embed_tokens.weight should be one table, and differ"):
            encoded(t5, **how)


@pytest.mark.parametrize(
    "steps",
    [
        (RTN(activations="dynamic_per_token"), Embeddings(bits=8)),
        (Embeddings(bits=4), GPTQ(bits=4, group_size=16)),
        (AWQ(bits=4, group_size=16),),
        (SmoothQuant(activations="static_per_tensor"),),
        (Width(channels=0.5), Wanda(sparsity=0.5)),
    ],
    ids=["rtn", "gptq", "awq", "smoothquant", "width, wanda"],
)
def test_variants_store_the_table_once_and_are_read_by_sentence_transformers(
    t5: Path, tmp_path: Path, steps: tuple[Method, ...]
) -> None:
    compress_to(t5, tmp_path / "variant", *steps)
    made = encoded(tmp_path / "variant")
    np.testing.assert_array_equal(encoded(tmp_path / "variant", stream=True), made)
    names = [name for name in folder_of(tmp_path / "variant").headers if "embed" in name or "shared" in name]
    assert TABLE in names
    assert all(name.startswith("shared.") for name in names)
    if isinstance(steps[0], RTN):
        assert same_names(estimated_shapes(t5, *steps), stored_shapes(tmp_path / "variant"))
    expected = encoded(t5)
    cosines = (made * expected).sum(axis=1) / np.linalg.norm(made, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > (0.999 if isinstance(steps[0], RTN) else 0.8)
    if not any(layer.activations != "none" for layer in folder_of(tmp_path / "variant").compressed.quantized.values()):
        export(tmp_path / "variant", "sentence-transformers", tmp_path / "out", check=False)
        # Exports hold half precision, so integers' values are rounded once more.
        same(reference(tmp_path / "out"), made, 1e-5 if isinstance(steps[0], Width) else 2e-3)


@pytest.mark.slow  # its blocks' bias goes the way of other networks' masks into a graph
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_graphs_compute_the_same(t5: Path, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    compress_to(t5, tmp_path / "variant")
    lower(folder_of(tmp_path / "variant"), runtime)
    same(encoded(tmp_path / "variant", runtime=runtime), encoded(tmp_path / "variant", runtime="torch"), 1e-4)


def test_depth_keeps_the_block_that_makes_the_bias(t5: Path, tmp_path: Path) -> None:
    step = Depth(keep=0.34, criterion="pooled")
    assert "block 0 stays" in step.estimate(folder_of(t5).shape).note
    compress_to(t5, tmp_path / "variant", step)
    info = folder_of(tmp_path / "variant").compressed
    assert info.layers == (0,)
    assert json.loads((tmp_path / "variant/config.json").read_text())["num_layers"] == 1
    compress_to(t5, tmp_path / "middle", Depth(drop=(1,)))
    export(tmp_path / "middle", "sentence-transformers", tmp_path / "out", check=False)
    same(reference(tmp_path / "out"), encoded(tmp_path / "middle"))


def test_a_survey_hands_the_bias_past_a_block_that_is_left_out(t5: Path, tmp_path: Path) -> None:
    compress_to(t5, tmp_path / "variant", Depth(drop=(1,)))
    model = open_model(folder_of(t5))
    texts = calibration_batches(model.tokenizer, calibration_texts()[:6], (), pool_prompt=True, max_tokens=24)
    shallow = open_model(folder_of(tmp_path / "variant"))
    (left,) = Survey(model, lambda: texts, CPU, torch.float32).vectors([frozenset([(1, "block")])])
    (expected,) = Survey(shallow, lambda: texts, CPU, torch.float32).vectors([frozenset()])
    torch.testing.assert_close(left, expected)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Depth(drop=(0,)), "only it has layer.0.SelfAttention.relative_attention_bias, which the others need"),
        (Depth(drop=(1,), what="attention"), "attention makes the position bias and hands it on"),
        (Depth(keep=0.1), "leaves none of 3 blocks"),
        (Width(heads=0.5), "the position bias has a column for each head, and all blocks share it"),
    ],
)
def test_what_depends_on_the_bias_is_refused(t5: Path, tmp_path: Path, step: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step.estimate(folder_of(t5).shape)
    with pytest.raises(UserError, match=message):
        compress_to(t5, tmp_path / "variant", step)


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_continued_walk_has_the_bias_of_the_block_that_was_compressed(t5: Path, tmp_path: Path, stop_at: int) -> None:
    batches = [(np.arange(4, 12).reshape(2, 4) + number, np.array([[1, 1, 1, 1], [1, 1, 0, 0]])) for number in range(2)]

    def walked(carry: Carry, until: int | None) -> None:
        def visit(index: int, _: object, parts: dict[str, torch.nn.Module]) -> None:
            if index == until:
                raise Stopped
            for module in parts.values():  # as a method would: from here on the texts run through what it made
                for parameter in module.parameters():
                    parameter.data = parameter.data * 1.5

        walk(Resident(load_network(folder_of(t5), torch.float32)), visit, carry)

    whole, first = Carry(batches, CPU), Carry(batches, CPU, tmp_path / "state")
    walked(whole, None)
    with pytest.raises(Stopped):
        walked(first, stop_at)
    second = Carry(batches, CPU, tmp_path / "state")
    walked(second, None)
    for index in range(2):
        assert torch.equal(second.hidden(index), whole.hidden(index))


def test_the_form_of_a_block_s_answer_is_found_once(t5: Path) -> None:
    network, calls = load_network(folder_of(t5), torch.float32), Counter[str]()
    backbone_of(network).register_forward_pre_hook(lambda *_: calls.update(["forward"]))
    batch = (np.ones((1, 3), dtype=np.int64), np.ones((1, 3), dtype=np.int64))
    walk(Resident(network), lambda *_: None, Carry([batch], CPU))
    tried = calls["forward"]
    walk(Resident(network), lambda *_: None, Carry([batch] * 5, CPU))
    assert calls["forward"] == tried + 5
