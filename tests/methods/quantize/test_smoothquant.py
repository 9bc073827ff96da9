"""SmoothQuant's static scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import compress_to, folder_of, text_side

import compress
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme
from compress.methods.quantize.smoothquant import SmoothQuant
from compress.models.network.build import load_network


def test_a_static_scale_is_where_the_calibration_texts_end(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant", SmoothQuant(alpha=0.0, activations="static_per_tensor", range="minmax"))
    embedder = compress.load(str(tmp_path / "variant"), device="cpu")
    layers = {name: layer for name, layer in embedder.model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert {layer.scheme for layer in layers.values()} == {ActivationScheme.STATIC_PER_TENSOR}
    first = layers["encoder.layer.0.attention.self.query"]
    assert torch.equal(first.input_scale, layers["encoder.layer.0.attention.self.key"].input_scale)
    # Found again: the embeddings' largest output on the same texts.
    from compress.calibration.texts import CalibrationSource
    from compress.data.texts import calibration_texts

    spec, tokenizer = text_side(bert)
    batches = CalibrationSource(calibration_texts()[:24], None, 120).batches(tokenizer, spec).batches
    embeddings = load_network(folder_of(bert), torch.float32).embeddings
    with torch.inference_mode():
        largest = max(float(embeddings(torch.from_numpy(ids))[torch.from_numpy(mask) == 1].abs().max()) for ids, mask in batches)
    assert float(first.input_scale) == pytest.approx(largest / 127, rel=1e-5)
