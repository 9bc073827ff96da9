"""Cuts a variant to its first blocks, where its training has made it good at that depth (`depth: any` of `distill`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from compress.common.errors import UserError
from compress.common.files import write_text_atomic
from compress.common.inputs import own_file
from compress.models.architectures import place_in_block
from compress.models.files.config import CONFIG_FILE, TOKENIZER_FILE
from compress.models.files.shards import join_shards, shard, write_tensors
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.opened import empty_model, weights_of
from compress.models.shape import with_backbone


def cut(source: ModelFolder, depth: int, folder: Path) -> ModelFolder:
    """Write a variant that ends after its first blocks into an empty folder; every tensor is copied as it is stored.

    The vectors are those that the training compared at that depth: the final norm and the head follow block `depth`.

    Args:
        source: the variant.
        depth: how many blocks are kept.
        folder: an empty folder.

    Returns:
        The variant in `folder`. It has no graph: one that was made for a graph runtime is lowered when it is opened.

    Raises:
        UserError: the source is not a variant, or was not trained to be cut to this depth.
    """
    info = source.compressed
    if not info.depths:
        raise UserError(
            f"{source.name}: was not trained to be cut, so that its vectors after {depth} blocks mean nothing",
            "`depth: any` in the distill step trains such a model: recipes/distill-elastic.yaml",
        )
    if depth not in info.depths:
        depths = ", ".join(map(str, info.depths))
        raise UserError(f"{source.name}: was not trained to be cut to depth {depth}", f"one of {depths}")
    for number, tensors in enumerate(_parts(source, depth)):
        write_tensors(shard(folder, number, depth + 1), tensors)
    join_shards(folder, depth + 1)
    (folder / TOKENIZER_FILE).write_bytes(own_file(source.path, source.path / TOKENIZER_FILE).read_bytes())
    config = json.dumps(_config(source, depth), indent=2, ensure_ascii=False)
    write_text_atomic(folder / CONFIG_FILE, config + "\n")
    described(info, depth).write(folder)
    made = ModelFolder(f"{source.name} at depth {depth}", folder)
    weights_of(made, empty_model(made))  # raises if the tensors are not those of such a network
    return made


def described(info: VariantInfo, depth: int) -> VariantInfo:
    """Return the description of a variant that ends after its first blocks: as if a step `depth` had dropped the others."""
    layers = info.layers or tuple(range(max(info.depths)))
    gone = layers[depth:]
    # What `aligned_to` says was measured on the whole variant.
    dropping: dict[str, Any] = {"method": "depth", "what": "blocks", "keep": None, "drop": list(gone), "criterion": "greedy"}
    return info.model_copy(
        update={
            "layers": layers[:depth],
            "aligned_to": None,
            "dropped": tuple((number, what) for number, what in info.dropped if number < depth),
            "blocks": tuple(sizes for sizes in info.blocks if sizes.block < depth),
            "quantized": {name: layer for name, layer in info.quantized.items() if _stays(f"{name}.", depth)},
            "depths": tuple(other for other in info.depths if other <= depth),
            "steps": [*info.steps, dropping] if gone else info.steps,
        }
    )


def _stays(name: str, depth: int) -> bool:
    """Whether a tensor is in one of the first blocks, or outside the blocks."""
    at = place_in_block(name)
    return at is None or at[0] < depth


def _config(source: ModelFolder, depth: int) -> dict[str, Any]:
    """Return the `config.json` of the first blocks alone."""
    types = source.shape.setting("layer_types")
    return with_backbone(source.config, num_hidden_layers=depth, **({} if types is None else {"layer_types": list(types[:depth])}))


def _parts(source: ModelFolder, depth: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors outside the blocks, then those of each block that stays, as they are stored."""
    for number in (None, *range(depth)):
        tensors: dict[str, torch.Tensor] = {}
        for name, stored in source.tensors.items():
            at = place_in_block(name)
            if (None if at is None else at[0]) == number:
                with safe_open(stored.path, framework="pt") as file:
                    tensors[name] = file.get_tensor(stored.name)
        yield tensors
