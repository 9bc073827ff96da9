"""Names and shapes of a checkpoint's tensors in the network that transformers builds, where the two differ.

Checkpoints of task heads, of old libraries and of remote code (nomic-embed-text, jina-embeddings-v3, gte) keep other names than
transformers' own network, and fused projections. transformers lists how they are renamed and split (its `conversion_mapping`), and
applies the list to a model that it loads whole. Here the list is applied to the headers, so that a network can be read one block at
a time, and planned for without being read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from compress.common.errors import UserError
from compress.models.files.headers import StoredTensor


def in_network(tensors: Mapping[str, StoredTensor], network: nn.Module) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by their names in its network; one that is split there becomes several ranges of its rows.

    Args:
        tensors: the tensors by their names in the files.
        network: the network; its parameters need no values.

    Raises:
        UserError: the network holds a tensor in a form that is not a range of rows of a stored one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(network)  # type: ignore[arg-type]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, wanted = getattr(network, "base_model_prefix", ""), network.state_dict(keep_vars=True)
    found = {}
    for stored, tensor in tensors.items():
        name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
        if name not in wanted and stored in wanted:  # the network's own name, which a renaming happens to match
            name, pattern = stored, None
        if pattern is None:
            found[name.removeprefix(f"{prefix}.") if prefix and name not in wanted else name] = tensor
            continue
        targets = _targets(stored, name, of_pattern[pattern])
        rows = tensor.info.shape[0] // len(targets)
        for number, target in enumerate(targets):
            found[target] = rows_of(tensor, number * rows, rows)
    return found


def _targets(stored: str, name: str, converter: object) -> list[str]:
    """Return the names of the equal parts that a fused tensor is cut into; `name`: that of the first.

    Raises:
        UserError: it is changed in another way.
    """
    operations, targets = converter.operations, converter.target_patterns  # type: ignore[attr-defined]
    kinds = [type(operation).__name__ for operation in operations]
    if kinds != ["Chunk"] or operations[0].dim != 0:
        raise UserError(f"tensor {stored!r}: transformers changes it by {' and '.join(kinds)}, which is not read block by block")
    return [name.replace(targets[0], target) for target in targets]


def rows_of(tensor: StoredTensor, first: int, count: int) -> StoredTensor:
    """Return a range of a stored tensor's rows, which is a range of its bytes."""
    info = tensor.info
    part = replace(info, shape=(count, *info.shape[1:]))
    offset = None if info.offset is None else info.offset + first * part.bytes // max(count, 1)
    return replace(tensor, info=replace(part, offset=offset), first_row=tensor.first_row + first)
