"""Applies a recipe's steps to a model, segment by segment from its files to the variant's, so that it is never in memory whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.loading import Source
from compress.methods.base import Method
from compress.models.shape import ModelShape
from compress.models.spec import transformer_folder
from compress.models.variant import QuantizedLayer, VariantInfo
from compress.record import Journal

if TYPE_CHECKING:
    import torch

    from compress.models.segments import Parts, Segment


def make_variant(
    source: Source,
    shape: ModelShape,
    steps: Sequence[Method],
    fingerprint: str,
    target: Path,
    journal: Journal,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Write the variant of a model.

    Every segment is kept as it is done; a call that follows one that was killed goes on behind the last of them.

    Args:
        source: the model.
        shape: its shape.
        steps: the methods, in the order of their application.
        fingerprint: of the model's files.
        target: the variant's folder; it appears when it is whole.
        journal: keeps what is known of the segments that are done.
        say: told each step once it has seen all segments.

    Returns:
        For each step its `config`, the `seconds` it took and a `note` on what it did.

    Raises:
        UserError: a weight is not finite, or does not fit float16.
    """
    from compress.models.segments import segments_of
    from compress.models.shards import join_shards, shard, write_tensors
    from compress.runtimes.torch_runtime import empty_model, read_text_side, weights_of
    from compress.walk import Streamed, walk

    network = empty_model(source.folder)
    count = len(segments_of(network))
    folder = target.with_name(f"{target.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)

    def visit(index: int, segment: Segment, parts: Parts) -> None:
        quantized: dict[str, QuantizedLayer] = {}
        seconds = []
        for number, step in enumerate(steps):
            start = time.perf_counter()
            try:
                quantized |= step.apply(parts)
            except ValueError as error:
                raise UserError(f"steps.{number} ({step.method}): {error}") from error
            seconds.append(time.perf_counter() - start)
        write_tensors(shard(folder, index, count), _stored(parts, quantized, source.name))
        described = {name: layer.model_dump(mode="json") for name, layer in quantized.items()}
        journal.put(_entry(index), {"segment": segment.name, "quantized": described, "seconds": seconds})

    first = next((index for index in range(count) if not journal.has(_entry(index))), count)
    if first < count:
        walk(Streamed(network, weights_of(source.folder, network)), visit, start=first)
    entries = [journal.get(_entry(index)) for index in range(count)]
    join_shards(folder, count)

    done = []
    for number, step in enumerate(steps):
        estimate = step.estimate(shape)
        note, shape = estimate.note, estimate.after
        done.append(
            {"config": step.model_dump(mode="json"), "seconds": sum(entry["seconds"][number] for entry in entries), "note": note}
        )
        say(f"{step.method}: {note} ({done[-1]['seconds']:.1f} s)")
    spec, tokenizer = read_text_side(source.folder)
    info = VariantInfo(
        base=source.name,
        base_fingerprint=fingerprint,
        licence=source.licence(),
        max_length=tokenizer.max_length,
        spec=spec,
        pretrained=not source.is_random,
        folded=any(step.method == "fold" for step in steps),
        quantized={name: QuantizedLayer(**layer) for entry in entries for name, layer in entry["quantized"].items()},
        steps=[step["config"] for step in done],
    )
    shutil.copy(transformer_folder(source.folder) / "config.json", folder / "config.json")
    tokenizer.save(folder / "tokenizer.json")
    info.write(folder)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    return done


def _entry(index: int) -> str:
    return f"segment {index}"


def _stored(parts: Mapping[str, Any], quantized: Mapping[str, QuantizedLayer], name: str) -> dict[str, torch.Tensor]:
    """Return a segment's tensors as a variant keeps them: half precision, except integers and the scales of quantized layers."""
    import torch

    tensors = {f"{path}.{key}": tensor for path, part in parts.items() for key, tensor in part.state_dict().items()}
    scales = {f"{layer}.{part}" for layer in quantized for part in ("weight_scale", "input_scale")}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and key not in scales:
            tensors[key] = tensor.to(torch.float16)
            if not torch.isfinite(tensors[key]).all():
                raise UserError(f"{name}: {key} is not finite in float16; the variant was not written")
    return tensors
