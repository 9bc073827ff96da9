"""The gptq runtime: a variant's integer weights in GPTQModel's kernels (Marlin: Frantar et al. 2024, arXiv 2408.11743), on a card.

The kernels are given the tensors of our GPTQ export, made from the variant while it is opened. So there is nothing to export first,
and the integers are the variant's own. All else is the torch runtime: network, packed batches, graphs of single texts, head.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from compress.common.errors import UserError, first_line
from compress.layers.gptq_layout import RUN, gptq_tensors
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import QuantizedLayer
from compress.models.folder import ModelFolder
from compress.models.opened import empty_model, weights_of
from compress.runtimes.contract import Batching
from compress.runtimes.torch_embedder import TorchEmbedder
from compress.runtimes.torch_runtime import pick_device, pick_dtype, prepare, use_threads

LAYOUT = "gptq"
TRIAL_ROWS = 5
BACKENDS = ("auto", "torch")
"""Kernels by GPTQModel's names: the fastest of the device, and for layers whose sizes that one does not take its plain one."""
AGREEMENT = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 5e-3}
"""Largest difference of a kernel's product from that of the stored values, relative to its length, by compute dtype."""


class GptqLinear(nn.Module):
    """A linear layer in a kernel of GPTQModel."""

    input_factor: torch.Tensor | None

    def __init__(self, layer: QuantizedLinear, kernel: nn.Module) -> None:
        """Take the layer, of which the factor of its input is kept, and the kernel that has its weight and bias."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kernel = kernel
        self.register_buffer("input_factor", layer.input_factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        if self.input_factor is not None:
            x = x / self.input_factor.to(x.dtype)
        y: torch.Tensor = self.kernel(x)
        return y


class GptqEmbedder(TorchEmbedder):
    """An embedder whose quantized layers run in GPTQModel's kernels."""

    kernels: dict[str, int]
    """Number of layers by the name of the kernel's class, such as `MarlinLinear`."""


def open_variant(
    folder: ModelFolder,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    batching: Batching = "auto",
) -> GptqEmbedder:
    """Open a variant.

    Args:
        folder: the variant's folder.
        dtype: float16 (the default) or bfloat16.
        threads: number of CPU threads.
        device: a CUDA card; None: the current one.
        batching: see `TorchEmbedder`.

    Raises:
        UserError: there is no card, a layer has sizes that the layout has not, or a kernel gives other products than the weights.
    """
    if threads is not None:
        use_threads(threads)
    target = pick_device(device or "cuda")
    return open_on(folder, target, pick_dtype(dtype, target), batching)


def open_on(
    folder: ModelFolder, device: torch.device, dtype: torch.dtype, batching: Batching, backends: tuple[str, ...] = BACKENDS
) -> GptqEmbedder:
    """Open a variant on a device; see `open_variant`. On a CPU, GPTQModel's backend `torch` computes in float16."""
    model = empty_model(folder)
    weights_of(folder, model).fill(model)
    model = prepare(model, dtype, device)
    kernels = use_kernels(folder.name, model, dtype, backends)
    embedder = GptqEmbedder(folder, model, device, dtype, batching)
    embedder.kernels = kernels
    return embedder


@torch.no_grad()
def use_kernels(name: str, model: nn.Module, dtype: torch.dtype, backends: tuple[str, ...]) -> dict[str, int]:
    """Replace the integer layers of a network that is ready to run, in place; return how many each kernel got.

    Raises:
        UserError: see `open_variant`.
    """
    from gptqmodel.utils.model import hf_gptqmodel_post_init

    # The first layer of each kind is kept to try its kernel with; the stored weights of the others go.
    firsts: dict[tuple[type, QuantizedLayer], tuple[str, GptqLinear, QuantizedLinear]] = {}
    counted: Counter[str] = Counter()
    for path in [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear)]:
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantizedLinear)
        place = f"model {name!r}: {path}"
        made = GptqLinear(layer, _kernel(place, layer, dtype, backends))
        model.set_submodule(path, made.eval())
        counted[type(made.kernel).__name__] += 1
        firsts.setdefault((type(made.kernel), layer.layer), (place, made, layer))
    hf_gptqmodel_post_init(model, use_act_order=False)
    for place, made, layer in firsts.values():
        _try(place, made, layer, dtype)
    return dict(counted)


def _kernel(place: str, layer: QuantizedLinear, dtype: torch.dtype, backends: tuple[str, ...]) -> nn.Module:
    """Return a kernel with a layer's weight, in the first of the backends that takes it; still to be prepared by `post_init`."""
    from gptqmodel.utils.importer import hf_select_quant_linear_v2
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format

    kind, device = layer.layer, layer.weight_scale.device
    if layer.in_features % RUN or layer.out_features % RUN or (kind.group_size and layer.in_features % kind.group_size):
        raise UserError(
            f"{place}: has {layer.in_features} inputs and {layer.out_features} outputs; the runtime gptq takes multiples of {RUN}, "
            f"and whole groups",
            "runtime: torch",
        )
    shared = {"bits": kind.bits, "group_size": kind.group_size or -1, "desc_act": False, "sym": kind.symmetric}
    reasons = []
    for backend in backends:
        try:
            chosen = hf_select_quant_linear_v2(
                **shared, format=LAYOUT, quant_method=LAYOUT, dtype=dtype, pack=False, device_map={"": device}, backend=backend
            )
            kernel = chosen(
                **shared, in_features=layer.in_features, out_features=layer.out_features, bias=layer.bias is not None,
                pack_dtype=torch.int32, register_buffers=True, dtype=dtype,
            )  # fmt: skip
        except (
            ValueError,
            NotImplementedError,
            ImportError,
            RuntimeError,
        ) as error:  # another kernel may take it
            reasons.append(f"{backend}: {first_line(error)}")
            continue
        tensors = gptq_tensors(layer) | ({} if layer.bias is None else {"bias": layer.bias})
        kernel = kernel.to(device)
        kernel.load_state_dict(tensors)
        held = nn.ModuleList([kernel])
        hf_convert_gptq_v1_to_v2_format(held, kind.bits, chosen, LAYOUT, None)
        return held[0]
    raise UserError(f"{place}: no kernel of GPTQModel takes it ({'; '.join(reasons)})", "runtime: torch")


def _try(place: str, made: GptqLinear, layer: QuantizedLinear, dtype: torch.dtype) -> None:
    """Check that a kernel multiplies the stored weight.

    Raises:
        UserError: it does not.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((TRIAL_ROWS, layer.in_features), generator=draw).to(layer.weight_scale.device, dtype)
    expected = x.float() @ layer.values().t()
    if layer.bias is not None:
        expected += layer.bias.float()
    apart = float((made(x).float() - expected).norm() / expected.norm())
    if not apart <= AGREEMENT[dtype]:
        kernel = type(made.kernel).__name__
        raise UserError(
            f"{place}: the kernel {kernel} of GPTQModel does not multiply the stored weight (relative difference {apart:.1e})",
            "runtime: torch",
        )
