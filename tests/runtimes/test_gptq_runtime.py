"""The gptq runtime: GPTQModel's kernels where it is installed, else a stand-in with the interface that the runtime uses.

Cards alone run it. Here the part that takes a device is given the CPU, on which GPTQModel's backend `torch` computes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import compress_to, folder_of
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

import compress
from compress.common.errors import UserError
from compress.layers.grid import dequantize
from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.layers.torch_packing import unpack
from compress.methods.quantize.rtn import RTN
from compress.runtimes import contract, gptq_runtime
from compress.runtimes.contract import AUTO, GPTQ, pick_runtime
from compress.runtimes.gptq_runtime import GptqLinear, open_on

TEXTS = ["a parcel", "the parcel never came, and nobody knew why", "x"]
CPU = torch.device("cpu")
LAYER = {"layers.0.mlp.up_proj": QuantizedLayer(bits=4, group_size=32)}


class StandInLinear(nn.Module):
    """What the kernels of GPTQModel have in common: its constructor, its buffers, and zeros that are one too small until converted."""

    factor = 1.0

    def __init__(
        self, bits: int, group_size: int, desc_act: bool, sym: bool, in_features: int, out_features: int, bias: bool = False,
        pack_dtype: torch.dtype = torch.int32, register_buffers: bool = False, dtype: torch.dtype = torch.float16, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert register_buffers
        assert not desc_act
        self.bits, self.size = bits, in_features if group_size == -1 else group_size
        groups = in_features // self.size
        self.register_buffer("qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=dtype))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.zero, self.ready = 0, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.ready, "used before post_init"
        inputs, outputs = len(self.g_idx), self.scales.shape[1]
        integers = unpack(self.qweight.t().contiguous().view(torch.uint8), self.bits, inputs)
        zeros = unpack(self.qzeros.view(torch.uint8), self.bits, outputs).t() + self.zero
        weight = dequantize(integers, self.scales.t().float(), zeros, self.size, torch.float32) * self.factor
        y = x.float() @ weight.t()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def stand_in() -> dict[str, ModuleType]:
    def select(*, backend: str, format: str, quant_method: str, pack: bool, device_map: dict, **kind: Any) -> type[nn.Module]:
        assert (format, quant_method, pack, device_map) == ("gptq", "gptq", False, {"": CPU})
        if backend == "auto":
            raise NotImplementedError("no kernel of the card takes this")
        return StandInLinear

    def convert(model: nn.Module, bits: int, kernel: type, checkpoint_format: str, meta: Any) -> tuple[nn.Module, bool]:
        assert checkpoint_format == "gptq"
        for module in model.modules():
            if isinstance(module, StandInLinear):
                module.zero = 1
        return model, True

    def post_init(model: nn.Module, use_act_order: bool) -> nn.Module:
        for module in model.modules():
            if isinstance(module, StandInLinear):
                module.ready = True
        return model

    names = ("gptqmodel", "gptqmodel.utils", "gptqmodel.utils.importer", "gptqmodel.utils.model")
    modules = {name: ModuleType(name) for name in names}
    modules["gptqmodel.utils.importer"].hf_select_quant_linear_v2 = select  # type: ignore[attr-defined]
    modules["gptqmodel.utils.model"].hf_convert_gptq_v1_to_v2_format = convert  # type: ignore[attr-defined]
    modules["gptqmodel.utils.model"].hf_gptqmodel_post_init = post_init  # type: ignore[attr-defined]
    return modules


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernels are GPTQModel's own."""
    if importlib.util.find_spec("gptqmodel") is not None:
        return True
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    return False


@pytest.fixture(scope="session")
def wide(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT, with biases, whose widths are multiples of 32."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=66, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 32, True), (4, 32, False), (8, None, True), (3, 32, True), (2, 32, False)]
)
def test_the_vectors_are_the_variant_s(
    wide: Path, kernels: bool, tmp_path: Path, bits: int, group_size: int | None, symmetric: bool
) -> None:
    compress_to(wide, tmp_path / "variant", RTN(bits=bits, group_size=group_size, symmetric=symmetric, activations="none"))
    embedder = open_on(folder_of(tmp_path / "variant"), CPU, torch.float16, "padded", ("torch",) if kernels else ("auto", "torch"))
    assert sum(embedder.kernels.values()) == 12
    assert sum(isinstance(module, GptqLinear) for module in embedder.model.modules()) == 12
    ours, theirs = embedder.encode(TEXTS), compress.load(tmp_path / "variant", device="cpu").encode(TEXTS)
    cosine = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.9995


def test_merged_products_run_as_one(wide: Path, kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card query, key and value are one layer before the kernels come."""
    compress_to(wide, tmp_path / "variant", RTN(bits=4, group_size=32, activations="none"))
    prepare = gptq_runtime.prepare
    monkeypatch.setattr(gptq_runtime, "prepare", lambda model, dtype, device: prepare(model, dtype, device, merged=True))
    embedder = open_on(folder_of(tmp_path / "variant"), CPU, torch.float16, "padded", ("torch",))
    assert sum(embedder.kernels.values()) == 8
    theirs = compress.load(tmp_path / "variant", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(embedder.encode(TEXTS), theirs, atol=2e-2 * float(np.abs(theirs).max()))


def test_a_kernel_that_multiplies_something_else_is_refused(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    compress_to(wide, tmp_path / "variant", RTN(bits=4, group_size=32, activations="none"))
    monkeypatch.setattr(StandInLinear, "factor", 1.05)
    with pytest.raises(UserError, match=r"the kernel StandInLinear of GPTQModel does not multiply the stored weight .*5\.\de-02"):
        open_on(folder_of(tmp_path / "variant"), CPU, torch.float16, "padded")
    monkeypatch.setattr(gptq_runtime, "RUN", 256)
    with pytest.raises(UserError, match=r"encoder.layer.0.attention.self.query: has 64 inputs and 64 outputs.*multiples of 256"):
        open_on(folder_of(tmp_path / "variant"), CPU, torch.float16, "padded")
    monkeypatch.undo()


def test_what_no_kernel_takes_is_refused(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    compress_to(wide, tmp_path / "variant", RTN(bits=4, group_size=32, activations="none"))
    with pytest.raises(UserError, match=r"no kernel of GPTQModel takes it .auto: no kernel of the card takes this"):
        open_on(folder_of(tmp_path / "variant"), CPU, torch.float16, "padded", ("auto",))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def set_to(value: bool) -> None:
        monkeypatch.setattr(contract.Runtime, "is_installed", property(lambda self: value or self.name != GPTQ))

    return set_to


def test_it_is_refused_without_a_card_or_the_extra(wide: Path, tmp_path: Path, installed: Callable[[bool], None]) -> None:
    compress_to(wide, tmp_path / "variant", RTN(bits=4, group_size=32, activations="none"))
    variant = str(tmp_path / "variant")
    installed(True)
    with pytest.raises(UserError, match="gptq runs on a CUDA card, not on cpu") as refused:
        compress.load(variant, runtime=GPTQ, device="cpu")
    assert "torch" in refused.value.hint
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"device 'cuda': this torch .* sees no GPU"):
            compress.load(variant, runtime=GPTQ)
    installed(False)
    with pytest.raises(UserError, match=r"gptq is not installed: pip install 'compress-embedders\[gptq\]'"):
        compress.load(variant, runtime=GPTQ)
    with pytest.raises(UserError, match="gptq executes variants, and this is a checkpoint") as refused:
        compress.load(str(wide), runtime=GPTQ)
    assert "recipes/int4-gptq.yaml" in refused.value.hint


def test_it_takes_weights_alone_in_half_precision_and_is_never_taken_unasked(installed: Callable[[bool], None]) -> None:
    installed(True)
    assert pick_runtime(GPTQ, LAYER, device="cuda:1", dtype="bfloat16") == GPTQ
    assert pick_runtime(AUTO, LAYER, device="cuda") == "torch"
    with pytest.raises(UserError, match="gptq does not compute in float32"):
        pick_runtime(GPTQ, LAYER, device="cuda", dtype="float32")
    rounding = QuantizedLayer(bits=8, activations=ActivationScheme.DYNAMIC_PER_TOKEN)
    with pytest.raises(UserError, match="gptq does not execute int8 weights with activations dynamic_per_token"):
        pick_runtime(GPTQ, {"layer": rounding}, device="cuda")
    with pytest.raises(UserError, match="gptq does not execute int5 weights"):
        pick_runtime(GPTQ, {"layer": QuantizedLayer(bits=5)}, device="cuda")
