"""The residual stream of a network with an RMSNorm before each sublayer: who reads it, who writes it, and how it is rotated.

A stream h becomes h R with an orthogonal R. RMSNorm(h R) = RMSNorm(h) R, once the norm's weight g has moved into the layers behind
it: `W diag(g) R` reads from the rotated stream what `W` read behind the norm. What a layer `W` adds to the stream, `R^T W` adds to
the rotated one. (Ashkboos et al. 2024: SliceGPT, arXiv 2401.15024, section 3; QuaRot, arXiv 2404.00456, section 4.) Products are
computed in float64 and rounded to float32 once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.layers.hadamard import Rotation
from compress.methods.linear_layers import zeros_of
from compress.models.architectures import AFTER_POOLING, one_module_later
from compress.models.files.headers import tensors_in
from compress.models.files.shards import write_tensors
from compress.models.network.pooling import TokenPooling, attach_head, head_of
from compress.models.network.segments import FINAL, Kind, Parts, module_in, segments_of, token_table
from compress.models.network.surgery import block_anatomy, head_width
from compress.models.opened import OpenModel
from compress.models.text.spec import HeadModule, Pooling

TENSORS = "unrotation.safetensors"
# Rows on which norms are probed, and the size of their values, next to which a norm's epsilon vanishes.
PROBE_ROWS, PROBE_SIZE = 4, 1e3


def check_stream(model: OpenModel) -> None:
    """See that everything around the blocks, and every kind of norm, goes with a rotation.

    Raises:
        ValueError: the embeddings are more than one table, there is not one final norm, a norm is no RMSNorm, or the head averages
            the outputs of several blocks, of which only the last has passed the final norm.
    """
    if model.spec.layers is not None:
        raise ValueError(
            "the head averages the outputs of several blocks, which one matrix cannot rotate back; set `stream: false`"
        )
    network = model.network
    segments = segments_of(network)
    for segment in segments:
        parts = {path: network.get_submodule(path) for path in segment.paths}
        if segment.kind is Kind.EMBEDDINGS:
            table = token_table(parts)
            others = [f"{path}.{name}" for path, part in parts.items() for name in part.state_dict()]
            if others != [f"{table}.weight"]:
                other = next((name for name in others if name != f"{table}.weight"), "no table")
                raise ValueError(f"the embeddings have more than a token table ({other}); set `stream: false`")
    finals = [path for segment in segments if segment.kind is Kind.NORM for path in segment.paths]
    if len(finals) != 1 or list(network.get_submodule(finals[0]).state_dict()) != ["weight"]:
        raise ValueError(f"there is not one final norm ({', '.join(finals) or 'none'}); set `stream: false`")
    blocks = [network.get_submodule(path) for segment in segments if segment.kind is Kind.BLOCK for path in segment.paths]
    norms = {finals[0]: network.get_submodule(finals[0])}
    norms |= {name: block.get_submodule(name) for block in blocks for name in _norms(block).values()}
    for name, norm in norms.items():
        try:
            unit_of(norm)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; set `stream: false`") from error


def _norms(block: nn.Module) -> dict[str, str]:
    """Return the names of a block's norms, by sublayer; one that was dropped has none."""
    names = dict(block.named_modules())
    return {sublayer: norm for sublayer, norm in block_anatomy(block).norms.items() if hasattr(names.get(norm), "weight")}


@torch.no_grad()
def unit_of(norm: Any) -> float:
    """Return the weight at which an RMSNorm multiplies channels by one: 1, or 0 where it multiplies by 1 + weight as Gemma's does.

    Raises:
        ValueError: it is not an RMSNorm: it does something else than divide by the root mean square, such as subtract a mean.
    """
    (width,) = norm.weight.shape
    generator = torch.Generator().manual_seed(0)
    rows = PROBE_SIZE * (1 + torch.randn(PROBE_ROWS, width, generator=generator))
    expected = rows / rows.square().mean(dim=1, keepdim=True).sqrt()
    probed = copy.deepcopy(norm).to_empty(device="cpu").float()
    for unit in (1.0, 0.0):
        probed.weight.data.fill_(unit)
        if torch.allclose(probed(rows), expected, rtol=1e-4, atol=1e-4):
            return unit
    raise ValueError(f"{type(norm).__name__} is not an RMSNorm, so a rotation would change what it gives")


def take_gain(norm: Any) -> torch.Tensor:
    """Return what an RMSNorm multiplies channels by, float64 [width], and make it multiply by one."""
    unit = unit_of(norm)
    gain: torch.Tensor = norm.weight.data.double() + (1 - unit)
    norm.weight.data = torch.full_like(norm.weight.data, unit, dtype=torch.float32)
    return gain


def rotate_block(path: str, block: nn.Module, seed: int, *, stream: bool, heads: bool) -> None:
    """Rotate what a block reads from the residual stream and writes into it, and the values of its heads.

    Raises:
        ValueError: a weight is NaN or infinite, or was pruned.
    """
    anatomy, layers = block_anatomy(block), dict(block.named_modules())
    has = {"attention": hasattr(layers.get(anatomy.output), "weight"), "mlp": hasattr(layers.get(anatomy.down), "weight")}
    readers = {"attention": anatomy.attention, "mlp": anatomy.up}
    writers = {"attention": anatomy.output, "mlp": anatomy.down}
    for sublayer in (name for name, there in has.items() if there):
        read, written = [layers[name] for name in readers[sublayer]], layers[writers[sublayer]]
        values = heads and sublayer == "attention"
        for name in (
            (*readers[sublayer], writers[sublayer]) if stream else (anatomy.attention[-1], anatomy.output) if values else ()
        ):
            _check(f"{path}.{name}", layers[name])
        if stream:
            rotate_stream(layers[anatomy.norms[sublayer]], read, written, seed)  # type: ignore[index]
        if values:
            rotate_values(read[-1], written, Rotation(head_width(block, anatomy), seed))


def _check(name: str, layer: Any) -> None:
    """See that a layer's weights can be rotated.

    Raises:
        ValueError: they cannot.
    """
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is a {type(layer).__name__}, not an nn.Linear, and cannot be rotated")
    if not torch.isfinite(layer.weight).all():
        raise ValueError(f"{name}.weight holds NaN or infinity")
    if zeros_of(layer.weight) is not None:
        raise ValueError(f"{name} was pruned, and a rotation would fill its zeros; put rotate before the pruning")


def rotate_stream(norm: Any, readers: Iterable[Any], writer: Any, seed: int) -> None:
    """Rotate what one sublayer reads from the residual stream and writes into it."""
    rotation = Rotation(len(norm.weight), seed)
    gain = take_gain(norm)
    for reader in readers:  # W diag(g) R
        reader.weight.data = rotation.rows(reader.weight.data.double() * gain).float()
    writer.weight.data = rotation.columns(writer.weight.data)  # R^T W
    if writer.bias is not None:
        writer.bias.data = rotation.rows(writer.bias.data)
    for reader in readers:
        if reader.bias is not None:
            reader.bias.data = reader.bias.data.float()


def rotate_values(value: Any, output: Any, rotation: Rotation) -> None:
    """Rotate the values of all heads by one matrix R_h, and the output projection back (QuaRot, section 4, stage 1b).

    Attention mixes the values of tokens and not their channels, so R_h passes through it. Key/value heads that several query heads
    share need the same matrix for all.
    """
    width = rotation.width
    by_head = value.weight.data.unflatten(0, (-1, width))  # [key/value heads, width, in]
    value.weight.data = rotation.rows(by_head.transpose(1, 2)).transpose(1, 2).flatten(0, 1).contiguous()
    if value.bias is not None:
        value.bias.data = rotation.rows(value.bias.data.view(-1, width)).flatten()
    output.weight.data = rotation.rows(output.weight.data.unflatten(1, (-1, width))).flatten(1)
    if output.bias is not None:
        output.bias.data = output.bias.data.float()


def rotate_table(parts: Parts, seed: int) -> None:
    """Rotate the rows of the token table, if the segment has it: they are what enters the stream."""
    name = token_table(parts)
    if name is not None:
        table: Any = module_in(parts, name)
        table.weight.data = Rotation(table.embedding_dim, seed).rows(table.weight.data)


def rotate_final_norm(parts: Parts) -> None:
    """Make the final norm multiply by one, if the segment is that norm: `with_unrotation` has read its weight."""
    for path, part in parts.items():
        if path.rpartition(".")[2] in FINAL:
            take_gain(part)


def with_unrotation(model: OpenModel, seed: int, folder: Path) -> OpenModel:
    """Give a model what takes its rotated hidden states back: `x -> x R^T diag(g)`, with the final norm's weight g.

    A pooling that adds tokens up commutes with that, so it comes after pooling, once per text: in the first Dense module, or in one
    of its own. Before a pooling that does not (NV-Embed's, the largest of each channel) each token is taken back.

    Args:
        model: the model, not yet rotated.
        seed: of the rotation.
        folder: for a file with the matrix.
    """
    (path,) = (path for segment in segments_of(model.network) if segment.kind is Kind.NORM for path in segment.paths)
    norm: Any = copy.deepcopy(model.network.get_submodule(path))
    ((_, weight),) = model.weights.read([f"{path}.weight"])
    norm.weight = nn.Parameter(weight.clone(), requires_grad=False)
    gain = take_gain(norm)
    back = Rotation(len(gain), seed).rows(gain.diag())  # [out, in] of the layer: diag(g) R
    spec, weights = model.spec, model.weights
    if not isinstance(head_of(model.network).pooling, TokenPooling) or Pooling.MAX in spec.poolings:
        spec, name = spec.model_copy(update={"rotated": True}), "unrotate.weight"
    else:
        name, back = f"{AFTER_POOLING}0.linear.weight", torch.block_diag(*[back] * len(spec.poolings))  # type: ignore[no-untyped-call]
        if spec.modules and spec.modules[0].kind == "Dense" and not spec.modules[0].residual:
            ((_, dense),) = weights.read([name])
            back = dense.double() @ back
        else:
            own = HeadModule(kind="Dense", inputs=len(back), width=len(back), bias=False)
            spec, weights = spec.model_copy(update={"modules": (own, *spec.modules)}), weights.renamed(one_module_later)
    with torch.device("meta"):
        network = attach_head(model.network, spec)
    name = next(found for found in network.state_dict() if found.endswith(name))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS, {name: back.float()})
    return replace(model, network=network, spec=spec, weights=weights.extended(tensors_in(folder / TENSORS), network))
