"""Finds what runs as one in a network that was opened: linear layers with the same input, and norms and MLPs that fuse."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import nn

from compress.layers.fused import FusedNorm, fused_mlp, fused_norm
from compress.layers.kernels.choice import row_kernels
from compress.layers.merged import Part, can_merge, merge
from compress.models.architectures import BLOCK_LAYOUTS


@functools.cache
def sibling_names() -> tuple[tuple[str, ...], ...]:
    """Return the names of the layers that have the same input, relative to the module that holds them: see `BLOCK_LAYOUTS`."""
    sets = {layers for layout in BLOCK_LAYOUTS.values() for layers in (layout.attention, layout.up) if len(layers) > 1}
    return tuple(sorted({tuple(layer.rpartition(".")[2] for layer in layers) for layers in sets}))


def merge_products(model: nn.Module) -> int:
    """Merge query, key and value, and gate and up, in place; return the number of merged products.

    Layers of other kinds or number formats than the first stay as they are. The layers are those of a network on its device, whose
    weights are not packed yet.
    """
    count = 0
    for holder in list(model.modules()):
        for names in sibling_names():
            children = dict(holder.named_children())
            if not set(names) <= set(children) or _projects_positions(holder):
                continue
            alike = [name for name in names if can_merge(children[names[0]], children[name])]
            if len(alike) < 2:
                continue
            for name, part in zip(alike, merge([children[name] for name in alike]), strict=True):
                setattr(holder, name, part)
            count += 1
    return count


def _projects_positions(attention: nn.Module) -> bool:
    """Whether an attention projects relative positions too, without its value (DeBERTa): products would be wasted."""
    return "rel_embeddings" in inspect.signature(attention.forward).parameters


def fuse(model: nn.Module, device: torch.device, dtype: torch.dtype) -> int:
    """Replace norms and gated MLPs by fused ones, in place, where there are kernels for the device; return how many were replaced.

    The network is ready to run on `device`, in `dtype`.
    """
    if row_kernels(device.type) is None:
        return 0
    count = 0
    for path in [path for path, module in model.named_modules() if path and not isinstance(module, FusedNorm | Part)]:
        module = model.get_submodule(path)
        fused = fused_norm(module) or fused_mlp(module, device, dtype)
        if fused is not None:
            model.set_submodule(path, fused.eval())
            count += 1
    return count
