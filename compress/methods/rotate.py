"""Rotation: the residual stream and the values of each head are rotated, which changes no vector and makes rounding easier."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method
from compress.models.architectures import AFTER_POOLING, HEAD_PREFIX, Anatomy, is_in_block, one_module_later, place_in_block
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

UNROTATE = "unrotate.weight"
DOUBLE_BYTES = 8
# Weights of a block that are neither linear layers nor the norms before them, and do not see how the stream is rotated: norms of
# queries and keys, and biases by position.
_INSIDE_ATTENTION = re.compile(r"(?:^|\.)(?:[qk]_norm|relative_attention_bias)\.weight$")


class Rotate(Method):
    """Rotate the residual stream, and the values of each attention head, by Hadamard matrices with random signs.

    QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 4, stages 1a and the part of 1b that is merged into weights) and
    SpinQuant without its training (Liu et al. 2024, arXiv 2405.16406). The weights of the norms move into the linear layers behind
    them; every matrix that reads or writes the stream is multiplied by the rotation; after pooling, one more Dense module rotates
    back. NV-Embed's head takes tokens that are not rotated, so each is rotated back before it. Exact up to rounding. Put it before
    the steps that quantize: an outlier in one channel is then spread over all of them.
    """

    family: ClassVar[str] = "as it was"
    method: Literal["rotate"] = "rotate"
    float32: ClassVar[bool] = True
    stream: bool = True
    """Whether the residual stream is rotated. This needs decoders with an RMSNorm before attention and MLP (Mistral, Llama, Qwen,
    the first Gemma) or T5's encoder; others are refused."""
    heads: bool = True
    """Whether the values of each attention head are rotated, by the same matrix in all heads: in the layer that makes them, and
    back in the attention's output projection."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the random signs."""

    @model_validator(mode="after")
    def _rotates_something(self) -> Self:
        if not (self.stream or self.heads):
            raise ValueError("rotates nothing; leave `stream` or `heads` out")
        return self

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Give the model what rotates back after its final norm.

        Raises:
            ValueError: a norm subtracts means, the embeddings are more than a table, or the head averages several blocks' outputs.
        """
        if not self.stream:
            return self, model
        from compress.methods.residual_stream import check_stream, with_unrotation

        check_stream(model)
        return self, with_unrotation(model, self.seed, bench.folder)

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Rotate what a segment reads from the stream and writes into it. The matrices follow from the seed and the widths.

        Raises:
            ValueError: a weight is NaN or infinite, or was pruned, and would be filled.
        """
        from compress.methods.residual_stream import rotate_block, rotate_final_norm, rotate_table

        for path, part in parts.items():
            if is_in_block(path):
                rotate_block(path, part, self.seed, stream=self.stream, heads=self.heads)
        if self.stream and not any(map(is_in_block, parts)):
            rotate_table(parts, self.seed)
            rotate_final_norm(parts)
        return {}

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: one more matrix, which rotates back, unless a Dense module takes it up.

        Raises:
            ValueError: the layout of the blocks is not known, or is not one whose stream can be rotated; layers or the token table
                are quantized or pruned already; one layer makes queries, keys and values.
        """
        anatomy = shape.anatomy
        self._check_weights(shape, anatomy)
        if self.stream:
            _check_layout(shape, anatomy)
        if self.heads and len(anatomy.attention) == 1:
            raise ValueError(f"{shape.name}: {anatomy.attention[0]} makes queries, keys and values in one; set `heads: false`")
        tensors, back = dict(shape.as_stored().tensors), "nothing to rotate back"
        if self.stream:
            tensors, back = _with_unrotation(shape, tensors)
        what = " and ".join([*(["residual stream"] if self.stream else []), *(["values of each head"] if self.heads else [])])
        largest = max(info.parameters for info in shape.block_linears.values())
        return Estimate(
            after=replace(shape, tensors=tensors),
            memory_bytes=2 * DOUBLE_BYTES * largest,
            bytes_touched=2 * shape.half_bytes,
            flops=2.0 * 2 * 64 * shape.parameters,  # two steps of a fast transform, each with matrices of 64
            note=f"{what} rotated, exact up to rounding; {back}",
        )

    def _check_weights(self, shape: ModelShape, anatomy: Anatomy) -> None:
        """See that what is rotated is as it was trained.

        Raises:
            ValueError: it is quantized or pruned.
        """
        rotated = {shape.token_table, *_linears(anatomy)} if self.stream else {anatomy.attention[-1], anatomy.output}
        for name, info in shape.tensors.items():
            at = place_in_block(name)
            layer, _, kind = name.rpartition(".") if at is None else at[1].rpartition(".")
            if layer in rotated and kind == "weight_scale":
                raise ValueError(f"{shape.name}: {layer} is quantized by an earlier step; put rotate before it")
            if layer in rotated and (kind == "weight_mask" or info.density < 1):
                raise ValueError(f"{shape.name}: {layer} is pruned by an earlier step, and would be filled; put rotate before it")


def _linears(anatomy: Anatomy) -> tuple[str, ...]:
    return (*anatomy.attention, anatomy.output, *anatomy.up, anatomy.down)


def _check_layout(shape: ModelShape, anatomy: Anatomy) -> None:
    """See that the residual stream of these blocks can be rotated.

    Raises:
        ValueError: it cannot; says why not.
    """
    refused = f"{shape.name}: the residual stream cannot be rotated, because"
    hint = "; `stream: false` rotates the values of the heads alone" if len(anatomy.attention) > 1 else ""
    if not anatomy.norms:
        raise ValueError(f"{refused} {anatomy.refused['stream']}{hint}")
    known = {f"{layer}.{kind}" for layer in _linears(anatomy) for kind in ("weight", "bias")}
    known |= {f"{norm}.weight" for norm in anatomy.norms.values()}
    blocks: dict[int, set[str]] = {}
    for name in shape.tensors:
        at = place_in_block(name)
        if at is not None:
            blocks.setdefault(at[0], set()).add(at[1])
    for number, names in blocks.items():
        for sublayer, writer in (("attention", anatomy.output), ("mlp", anatomy.down)):
            norm = anatomy.norms[sublayer]  # type: ignore[index]
            if f"{writer}.weight" in names and f"{norm}.weight" not in names:
                raise ValueError(f"{refused} block {number} has no {norm} before its {sublayer}{hint}")
        for name in sorted(names - known):
            if not _INSIDE_ATTENTION.search(name):
                raise ValueError(f"{refused} it is not known what {name} of block {number} does to it{hint}")


def _with_unrotation(shape: ModelShape, tensors: dict[str, TensorInfo]) -> tuple[dict[str, TensorInfo], str]:
    """Add the matrix that rotates back; return the tensors, and a note.

    Raises:
        ValueError: the stream of an NV-Embed is rotated already.
    """
    width = shape.output_width
    if any(name.startswith(HEAD_PREFIX) for name in tensors):
        if UNROTATE in tensors:
            raise ValueError(f"{shape.name}: its residual stream is rotated already; leave the second rotate out")
        return {**tensors, UNROTATE: TensorInfo("F16", (width, width))}, f"{width} x {width} weights rotate each token back"
    first = tensors.get(f"{AFTER_POOLING}0.linear.weight")
    if first is not None and first.shape[1] % width == 0:
        return tensors, "the first Dense module rotates back"
    moved = {one_module_later(name): info for name, info in tensors.items()}
    moved[f"{AFTER_POOLING}0.linear.weight"] = TensorInfo("F16", (width, width))
    return moved, f"a Dense module of {width} x {width} rotates each vector back"
