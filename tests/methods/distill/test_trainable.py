"""Networks made trainable: pruned weights, frozen integers, low-rank updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distill_support import stored
from tests_support import TEXTS, compress_to, folder_of

import compress
from compress.common.errors import UserError
from compress.data.texts import suite_texts
from compress.layers.quantized_linear import QuantizedLinear
from compress.methods.distill.checkpoints import read_curve
from compress.methods.distill.method import Distill
from compress.methods.distill.trainable import trainable
from compress.methods.prune.sparsegpt import SparseGPT
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN
from compress.models.architectures import is_block_linear
from compress.models.files.variant import VariantInfo
from compress.models.network.build import load_network
from compress.models.opened import empty_model, weights_of


def test_pruned_weights_stay_zero_and_the_others_learn(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=60, batch=16, every=30, learning_rate=1e-3, precision="no")
    compress_to(bert, tmp_path / "pruned", SparseGPT(pattern="2:4"))
    compress_to(bert, tmp_path / "healed", SparseGPT(pattern="2:4"), heal)
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "healed")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if is_block_linear(name, weight.dim()):
            assert torch.equal(weight == 0, after[name] == 0), name
            assert not torch.equal(weight, after[name]), name
    info = VariantInfo.read(tmp_path / "healed")
    assert [step["method"] for step in info.steps] == ["sparsegpt", "distill"]
    judged = list(suite_texts()[400:480])
    whole = compress.load(str(bert), device="cpu").encode(judged)
    cosines = [
        float((compress.load(str(tmp_path / name), device="cpu").encode(judged) * whole).sum(axis=1).mean())
        for name in ("pruned", "healed")
    ]
    assert cosines[1] > cosines[0]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("pruned", "healed")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_integers_stay_and_what_is_around_them_learns(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, every=3, learning_rate=3e-3, precision="no")
    quantize = RTN(bits=4, group_size=16, activations="none")
    compress_to(bert, tmp_path / "rtn", quantize)
    compress_to(bert, tmp_path / "healed", quantize, heal)
    before, after = stored(tmp_path / "rtn"), stored(tmp_path / "healed")
    info = VariantInfo.read(tmp_path / "healed")
    assert info.quantized == VariantInfo.read(tmp_path / "rtn").quantized
    for name, tensor in before.items():
        if name.rpartition(".")[0] in info.quantized and not name.endswith("bias"):
            assert torch.equal(tensor, after[name]), name
        elif not name.endswith("key.bias"):  # norms, tables and the integers' biases; the keys' softmax does not see
            assert not torch.equal(tensor, after[name]), name
    np.testing.assert_array_equal(
        *(compress.load(str(tmp_path / "healed"), device="cpu", stream=stream).encode(TEXTS) for stream in (False, True))
    )


def test_gradients_pass_integers_as_they_pass_their_values(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "v", RTN(bits=4, group_size=16, activations="none"))
    network = empty_model(folder_of(tmp_path / "v"))
    weights_of(folder_of(tmp_path / "v"), network).fill(network, dtype=torch.float32)
    dense = load_network(folder_of(bert), torch.float32)
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = module.dequantized()
    ids = torch.randint(5, 500, (3, 7))
    gradients = []
    with trainable(network):
        for model in (network, dense):
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.square().mean().backward()
            gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-2)  # the rest of the variant is in half precision
    assert any(isinstance(module, QuantizedLinear) for module in network.modules())


def test_numbers_that_cannot_be_trained_around_are_refused(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, precision="no")
    with pytest.raises(UserError, match=r"steps.1 \(distill\): .* is stored as fp8"):
        compress_to(bert, tmp_path / "v", FP8(), heal)


def test_a_low_rank_change_is_added_up_and_leaves_zeros_and_the_rest_alone(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, lora=2, steps=12, batch=16, every=6, learning_rate=3e-3, precision="no")
    compress_to(bert, tmp_path / "pruned", SparseGPT(pattern="2:4"))
    compress_to(bert, tmp_path / "healed", SparseGPT(pattern="2:4"), heal)
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "healed")
    for name, weight in before.items():
        if is_block_linear(name, weight.dim()):
            assert torch.equal(weight == 0, after[name] == 0), name
            assert not torch.equal(weight, after[name]), name
        else:
            assert torch.equal(weight, after[name]), name
    cosines = [curve_look["cosine"] for curve_look in read_curve(tmp_path / "healed-journal" / "step-0")]
    assert cosines == sorted(cosines)


def test_a_low_rank_change_has_its_rank(bert: Path) -> None:
    network = load_network(folder_of(bert), torch.float32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with trainable(network, 3):
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) < 0.3 * sum(tensor.numel() for tensor in before.values())
        for parameter in trained:
            parameter.data.normal_()
    assert before.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        change = tensor - before[name]
        assert torch.linalg.matrix_rank(change) == 3 if is_block_linear(name, tensor.dim()) else not change.any(), name


def test_a_low_rank_change_of_integers_is_refused(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, lora=2, steps=6, batch=16, precision="no")
    with pytest.raises(UserError, match=r"steps.1 \(distill\): every linear layer is in integers"):
        compress_to(bert, tmp_path / "v", RTN(), heal)
