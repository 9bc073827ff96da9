"""WeightedLayerPooling: loaded, streamed, compressed, in graphs and exports, next to sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_layouts
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from tests_support import compress_to, network_of

import compress
from compress.common.errors import UserError
from compress.export import export
from compress.methods.distill.trainable import trainable
from compress.methods.prune.depth import Depth
from compress.methods.prune.width import Width
from compress.methods.quantize.gptq import GPTQ
from compress.models.folder import ModelFolder
from compress.models.network.pooling import head_of, vectors_of
from compress.models.network.walk import Streamed
from compress.models.opened import empty_model, weights_of
from compress.runtimes.loading import open_source
from compress.runtimes.lower import lower
from compress.runtimes.streamed import StreamedEmbedder
from compress.runtimes.torch_embedder import TorchEmbedder

TEXTS = ["", "a", "The parcel never came.", "rain by the evening " * 40, "日本語の文章です。"]
BLOCKS, WIDTH = tiny_layouts.BLOCKS, tiny_layouts.WIDTH
NAME = "1_WeightedLayerPooling"


def weighted(folder: Path, *, start: int = 1, all_layers: bool = True, **settings: Any) -> Path:
    """A model whose tokens are a weighted mean of the blocks' outputs, with weights that differ."""
    config: dict[str, Any] = {"layer_start": start, "num_hidden_layers": BLOCKS, "word_embedding_dimension": WIDTH, **settings}
    modules = json.loads((folder / "modules.json").read_text())
    entry = {"idx": 1, "name": "layers", "path": NAME, "type": "sentence_transformers.models.WeightedLayerPooling"}
    tiny_layouts.write_json(folder / "modules.json", [modules[0], entry, *modules[1:]])
    tiny_layouts.write_json(folder / NAME / "config.json", config)
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(BLOCKS + 1 - start, generator=generator) + 0.5
    save_file({"layer_weights": weights}, folder / NAME / "model.safetensors", metadata={"format": "pt"})
    if all_layers:
        tiny_layouts.edit_json(folder / "config.json", output_hidden_states=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT with such a mean, then a Dense module and unit norm."""
    tiny_layouts.LAYOUTS["labse_dense_tanh"](tmp_path / "model")
    return weighted(tmp_path / "model")


def reference(folder: Path) -> np.ndarray:
    """The vectors of sentence-transformers."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return np.stack([np.asarray(model.encode([text])[0], dtype=np.float32) for text in TEXTS])


def encoded(folder: Path, **how: Any) -> np.ndarray:
    """Our vectors."""
    return compress.load(folder, device="cpu", **how).encode(TEXTS)


@pytest.mark.parametrize("start", [0, 2, BLOCKS])
@pytest.mark.parametrize("layout", ["bert_mean", "qwen3_last", "modernbert_mean", "distilbert_mean"])
def test_the_mean_is_that_of_sentence_transformers(tmp_path: Path, layout: str, start: int) -> None:
    """Also where a final norm comes after the last block, whose output is taken after it."""
    tiny_layouts.LAYOUTS[layout](tmp_path / "model")
    plain = encoded(tmp_path / "model")
    expected = reference(weighted(tmp_path / "model", start=start))
    np.testing.assert_allclose(encoded(tmp_path / "model"), expected, atol=1e-5)
    np.testing.assert_allclose(encoded(tmp_path / "model", stream=True), expected, atol=1e-5)
    assert (np.abs(expected - plain).max() > 1e-2) == (start < BLOCKS)


def test_a_network_that_keeps_its_blocks_outputs_to_itself(tmp_path: Path) -> None:
    """sentence-transformers then pools the last block's output."""
    tiny_layouts.LAYOUTS["bert_mean"](tmp_path / "model")
    plain = encoded(tmp_path / "model")
    folder = weighted(tmp_path / "model", all_layers=False)
    np.testing.assert_allclose(reference(folder), plain, atol=1e-6)
    for stream in (False, True):
        np.testing.assert_allclose(encoded(folder, stream=stream), plain, atol=1e-6)


def test_the_settings_may_ask_for_the_blocks_outputs(tmp_path: Path) -> None:
    tiny_layouts.LAYOUTS["bert_mean"](tmp_path / "model")
    folder = weighted(tmp_path / "model", all_layers=False)
    tiny_layouts.edit_json(folder / "sentence_bert_config.json", config_args={"output_hidden_states": True})
    np.testing.assert_allclose(encoded(folder), reference(folder), atol=1e-5)
    compress_to(folder, tmp_path / "variant")
    export(tmp_path / "variant", "sentence-transformers", tmp_path / "export", licence="mit", check=False)
    np.testing.assert_allclose(reference(tmp_path / "export"), encoded(tmp_path / "variant"), atol=1e-5)


def test_hidden_states_and_their_sums_on_disk(folder: Path) -> None:
    """What a walk keeps in files is what it keeps in memory."""
    source = ModelFolder("it", folder)
    network = empty_model(source)
    parts = Streamed(network, weights_of(source, network), lambda module: module.float())
    inner = TorchEmbedder(source, network, torch.device("cpu"), torch.float32)
    made = StreamedEmbedder(inner, parts, hidden_bytes=0).encode(TEXTS)
    np.testing.assert_array_equal(made, encoded(folder, stream=True))


@pytest.mark.parametrize(
    "runtimes", [(), pytest.param(("onnxruntime", "openvino"), marks=pytest.mark.slow)], ids=["torch", "graphs"]
)
def test_variants_in_every_runtime_and_in_exports(folder: Path, tmp_path: Path, runtimes: tuple[str, ...]) -> None:
    variant = tmp_path / "variant"
    compress_to(folder, variant, GPTQ(bits=8), max_tokens=64)
    own = encoded(variant)
    cosines = (own * encoded(folder)).sum(axis=1)
    assert cosines.min() > 0.999
    np.testing.assert_array_equal(encoded(variant, stream=True), own)
    for runtime in runtimes:
        lower(ModelFolder("it", variant), runtime)
        np.testing.assert_allclose(encoded(variant, runtime=runtime), own, atol=1e-4)
    export(variant, "sentence-transformers", tmp_path / "export", licence="mit", check=False)
    expected = reference(tmp_path / "export")
    np.testing.assert_allclose(encoded(tmp_path / "export"), expected, atol=1e-5)
    np.testing.assert_allclose(expected, own, atol=5e-3)  # weights in half precision


def test_an_unquantized_variant_exports_exactly(folder: Path, tmp_path: Path) -> None:
    compress_to(folder, tmp_path / "narrow", Width(channels=0.5), max_tokens=64)
    export(tmp_path / "narrow", "sentence-transformers", tmp_path / "export", licence="mit", check=False)
    np.testing.assert_allclose(reference(tmp_path / "export"), encoded(tmp_path / "narrow"), atol=1e-5)


@pytest.mark.parametrize("layout", ["transformers", "gguf"])
def test_layouts_that_pool_one_blocks_output_refuse(tmp_path: Path, layout: str) -> None:
    tiny_layouts.LAYOUTS["bert_mean"](tmp_path / "model")
    compress_to(weighted(tmp_path / "model"), tmp_path / "variant")
    with pytest.raises(UserError, match="cannot be written as"):
        export(tmp_path / "variant", layout, tmp_path / "export", licence="mit", check=False)


@pytest.mark.parametrize("step", [Depth(keep=0.5), Depth(drop=(1,)), Depth(drop=(1,), what="mlp")])
def test_depth_refuses_by_name(folder: Path, tmp_path: Path, step: Depth) -> None:
    with pytest.raises(ValueError, match="WeightedLayerPooling averages the outputs of several blocks"):
        step.estimate(ModelFolder("it", folder).shape)
    with pytest.raises(UserError, match=r"steps.0 \(depth\): WeightedLayerPooling"):
        compress_to(folder, tmp_path / "variant", step)


def test_the_layer_weights_learn(folder: Path, tmp_path: Path) -> None:
    compress_to(folder, tmp_path / "variant")
    network = network_of(tmp_path / "variant", torch.float32)
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    with trainable(network):
        vectors_of(network, ids, torch.ones_like(ids), torch.ones_like(ids))[:, 0].sum().backward()
        layers = head_of(network).layers
        assert layers is not None
        assert layers.layer_weights.grad is not None
        assert layers.layer_weights.grad.abs().max() > 0


def test_half_precision_keeps_the_layer_weights(folder: Path) -> None:
    embedder = open_source(ModelFolder("it", folder), device="cpu", dtype="bfloat16")
    cosines = (embedder.encode(TEXTS) * encoded(folder)).sum(axis=1)
    assert cosines.min() > 0.995


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_start": BLOCKS + 1}, f"layer_start {BLOCKS + 1} leaves none of {BLOCKS} blocks"),
        ({"layer_start": -1}, "layer_start: input should be greater than or equal to 0, got -1"),
        ({"num_hidden_layers": BLOCKS + 2}, f"num_hidden_layers is {BLOCKS + 2}, and the network has {BLOCKS} blocks"),
        ({"layer_end": 2}, "key 'layer_end' is not known"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    tiny_layouts.edit_json(folder / NAME / "config.json", **settings)
    with pytest.raises(UserError, match=message):
        compress.load(folder, device="cpu")


def test_it_stands_before_the_pooling(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    for order, message in (((0, 2, 1, 3, 4), "stands after Pooling"), ((0, 1, 1, 2, 3, 4), "is listed twice")):
        listed = [modules[index] | {"name": str(place)} for place, index in enumerate(order)]
        tiny_layouts.write_json(folder / "modules.json", listed)
        with pytest.raises(UserError, match=message):
            compress.load(folder, device="cpu")
