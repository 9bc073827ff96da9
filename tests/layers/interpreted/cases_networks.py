"""Whole networks with merged products and fused layers, in Triton's interpreter; `tests/layers/test_kernels.py` runs this file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import apply_in_memory
from torch import nn
from transformers import AutoConfig, AutoModel

from compress.layers.fused import FusedGatedMLP, FusedNorm, fused_mlp, fused_norm
from compress.layers.kernels import rows
from compress.layers.merged import Part
from compress.layers.scheme import Numbers
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN
from compress.runtimes.merging import fuse, merge_products
from compress.runtimes.torch_runtime import open_checkpoint, prepare

CPU = torch.device("cpu")
SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXTS = ["a ship", "the rain in spring was long and cold", "no"]


def tiny(kind: str, blocks: int = 1) -> nn.Module:
    torch.manual_seed(0)
    more = {} if kind == "bert" else {"num_key_value_heads": 2, "head_dim": 8}
    more |= {"sliding_window": 16} if kind == "gemma3_text" else {}
    network = (
        AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, **more, num_hidden_layers=blocks, pad_token_id=0))
        .eval()
        .requires_grad_(False)
    )
    for name, parameter in network.named_parameters():
        if "norm" in name.lower():
            parameter.data.add_(torch.randn(parameter.shape) / 8)
    return network


def run(network: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ids = torch.randint(1, 50, (2, 4), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.to(torch.float32)


STEPS = {"float": [], "int8": [RTN()], "int8-weights": [RTN(activations="none")], "int4": [RTN(bits=4, activations="none", group_size=16)], "fp8": [FP8()]}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        *(("bert", "int8"), ("mistral", "fp8"), ("gemma3_text", "float")),
        *(pytest.param("bert", numbers, marks=pytest.mark.slow) for numbers in STEPS if numbers != "int8"),
        *(pytest.param("mistral", numbers, marks=pytest.mark.slow) for numbers in STEPS if numbers != "fp8"),
        pytest.param("qwen3", "int8", marks=pytest.mark.slow),
    ],
)
def test_a_fused_network_gives_what_the_separate_layers_give(kind: str, numbers: str) -> None:
    network, twin = tiny(kind), tiny(kind)
    for one in (network, twin):
        apply_in_memory(one, *STEPS[numbers])
    prepare(twin, torch.float32, CPU)
    prepare(network, torch.float32, CPU, merged=True)
    expected = run(twin)
    fused = [type(module).__name__ for module in network.modules() if isinstance(module, FusedNorm | FusedGatedMLP)]
    assert fused.count("FusedNorm") == {"bert": 3, "mistral": 3, "qwen3": 5, "gemma3_text": 7}[kind]
    assert fused.count("FusedGatedMLP") == (1 if kind in ("mistral", "qwen3") else 0)  # Gemma's is gelu, BERT's has no gate
    assert sum(isinstance(module, Part) for module in network.modules()) == (3 if kind == "bert" else 5)
    for _ in range(2):  # the second time norms round in their own pass
        torch.testing.assert_close(run(network), expected, rtol=1e-3, atol=2e-2 if numbers in ("int8", "fp8") else 1e-4)


@pytest.mark.parametrize(("step", "numbers"), [(RTN(), Numbers.INTEGER), (FP8(), Numbers.FLOAT8)])
def test_a_norm_is_asked_once_and_then_rounds_in_its_own_pass(step, numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny("mistral", blocks=2)
    apply_in_memory(network, step)
    prepare(network, torch.float32, CPU, merged=True)
    calls: list[int] = []
    quantize = rows.quantize
    monkeypatch.setattr(rows, "quantize", lambda x, n: calls.append(len(x)) or quantize(x, n))
    first = run(network)
    before = len(calls)
    second = run(network)
    # First two norms and the attention's output in each of two blocks; then the attention's output alone. The MLP's is fused.
    assert (before, len(calls) - before) == (6, 2)
    assert torch.equal(first, second)
    asked = [module.asked for module in network.modules() if isinstance(module, FusedNorm)]
    assert asked.count(numbers) == 4
    assert asked.count(None) == 1  # nothing multiplies what the last norm gives


def test_norms_of_unknown_arithmetic_stay() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 2 * self.weight

    class NormHalved(Halved):
        pass

    assert fused_norm(Halved()) is None
    assert fused_norm(NormHalved()) is None
    assert fused_norm(nn.Linear(4, 4)) is None
    assert fused_norm(nn.LayerNorm(8, elementwise_affine=False)) is None
    assert fused_norm(nn.LayerNorm(8, bias=False)) is not None


def test_a_norm_whose_kernel_computes_something_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.normalize

    def wrong(*given):
        y, rounded = right(*given)
        return y * 1.01, rounded

    monkeypatch.setattr(rows, "normalize", wrong)
    assert fused_norm(nn.LayerNorm(32)) is None

    def unfit(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(rows, "normalize", unfit)
    assert fused_norm(nn.LayerNorm(32)) is None


def test_mlps_of_unknown_arithmetic_stay() -> None:
    class Gated(nn.Module):
        factor = 1.0

        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor

    for act, factor, known in ((nn.SiLU(), 1.0, True), (nn.GELU(), 1.0, False), (nn.SiLU(), 2.0, False)):
        mlp = Gated(act)
        mlp.factor = factor
        assert fused_mlp(mlp, CPU, torch.float32) is None  # gate and up are two products still
        assert merge_products(mlp) == 1
        assert (fused_mlp(mlp, CPU, torch.float32) is not None) == known
    holder = nn.ModuleList([nn.LayerNorm(8)])
    assert fuse(holder, CPU, torch.float32) == 1


def test_an_opened_checkpoint_gives_the_same_vectors(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests_support import folder_of

    from compress.runtimes import torch_runtime

    expected = open_checkpoint(folder_of(bert), device="cpu").encode(TEXTS)
    separate = torch_runtime.prepare
    monkeypatch.setattr(torch_runtime, "prepare", lambda *given: separate(*given, merged=True))
    opened = open_checkpoint(folder_of(bert), device="cpu")
    assert any(isinstance(module, Part) for module in opened.model.modules())
    torch.testing.assert_close(torch.from_numpy(opened.encode(TEXTS)), torch.from_numpy(expected), rtol=0, atol=1e-5)
