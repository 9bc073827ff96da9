"""Reads weights from safetensors files, one part of a network at a time. A tensor is memory-mapped only while it is in use."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from compress.common.errors import UserError
from compress.layers.bitmask import decode
from compress.models.files.config import FLOATING
from compress.models.files.conversion import in_network
from compress.models.files.headers import MASK, StoredTensor
from compress.models.network.tied import stored_once

UNUSED = re.compile(
    r"(?:^|\.)(?:pooler|lm_head|cls|vocab_transform|vocab_layer_norm|vocab_projector|generator_predictions|generator_lm_head)\."
    r"|(?:^|\.)(?:position_ids|token_type_ids|rotary_emb\.inv_freq|masked_bias|attn\.bias)$|^(?:head|decoder)\.|^predictions\."
)
"""Tensors of checkpoints that no embedder uses: heads of language models, poolers, buffers that newer libraries make themselves."""


_NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES_FOR: dict[torch.dtype, tuple[str, ...]] = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), FLOATING),
    torch.int64: ("I64", "I32", "I16", "I8", "U8"),
}
"""Stored dtypes whose values a tensor of a network takes as they are, where that is more than its own. Integers in the place of
floating-point numbers would be other numbers, and so would packed integers of another width."""


class Weights:
    """The tensors of a checkpoint, by their names in the network."""

    def __init__(self, tensors: Mapping[str, StoredTensor], network: nn.Module, *, exact: bool) -> None:
        """Match the files' tensors with the network's, by names and shapes alone; no tensor is read.

        Args:
            tensors: those of one checkpoint, by the names that they have there.
            network: its parameters need no values.
            exact: whether these are the names that the network uses. Otherwise they are renamed as transformers renames them, and
                tensors that no embedder uses are passed over: a language model's head, a pooler, position ids.

        Raises:
            UserError: a tensor is missing, unexpected (if `exact`) or of another shape.
        """
        self._wanted = network.state_dict(keep_vars=True)
        found = dict(tensors) if exact else stored_once(in_network(tensors, network), network)
        self._masks = {name: found.pop(name + MASK) for name in self._wanted if name + MASK in found}
        missing = sorted(self._wanted.keys() - found.keys())
        extra = sorted(name for name in found.keys() - self._wanted.keys() if exact or not UNUSED.search(name))
        if missing or extra:
            folder = next(iter(tensors.values())).path.parent if tensors else "the checkpoint"
            raise UserError(
                f"{folder}: does not fit its network: {len(missing) + len(extra)} tensors differ, "
                f"such as {(missing or extra)[0]!r} ({'missing' if missing else 'not wanted'})"
            )
        self._stored = {name: found[name] for name in self._wanted}
        for name, tensor in self._wanted.items():
            stored = found[name]
            shape = stored.info.shape
            if name in self._masks:
                if len(shape) != 1:
                    raise UserError(
                        f"{stored.path}: {stored.name} has a bitmask and shape {list(shape)}; its values must be a vector"
                    )
            elif shape != tuple(tensor.shape):
                raise UserError(f"{stored.path}: {stored.name} has shape {list(shape)}, its network needs {list(tensor.shape)}")

    def check_numbers(self) -> None:
        """See that each tensor is stored as the kind of numbers that its network takes: a variant's files are, whole.

        Raises:
            UserError: one is not.
        """
        for name, tensor in self._wanted.items():
            stored = self._stored[name]
            if stored.info.dtype not in DTYPES_FOR.get(tensor.dtype, (_NAMES.get(tensor.dtype),)):
                raise UserError(f"{stored.path}: {stored.name} is {stored.info.dtype}, its network needs {tensor.dtype}")

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes in which the floating-point tensors are stored."""
        names = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
        stored = {tensor.info.dtype for tensor in self._stored.values()}
        return {names[dtype] for dtype in stored if dtype in names}

    def renamed(self, rename: Callable[[str], str | None]) -> Weights:
        """Return the same weights under other names.

        Args:
            rename: returns a tensor's new name, or None to leave the tensor out.
        """
        made = copy.copy(self)
        names = {name: new for name in self._wanted if (new := rename(name)) is not None}
        made._wanted = {new: self._wanted[name] for name, new in names.items()}
        made._stored = {new: self._stored[name] for name, new in names.items()}
        made._masks = {new: self._masks[name] for name, new in names.items() if name in self._masks}
        return made

    def extended(self, tensors: Mapping[str, StoredTensor], network: nn.Module) -> Weights:
        """Return the same weights and further ones, for a network that has got further modules.

        Args:
            tensors: the further ones, by their names in the network; one that is there already takes its place.
            network: the network with all its modules.
        """
        made = copy.copy(self)
        made._wanted = network.state_dict(keep_vars=True)
        made._stored = {**self._stored, **tensors}
        left = made._wanted.keys() ^ made._stored.keys()
        assert not left, f"tensors without a place or a value: {sorted(left)[:3]}"
        return made

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors, with their names, in the dtype in which they are stored.

        A tensor is memory-mapped from its file for as long as it is referenced.

        Raises:
            UserError: the bitmask of a sparse matrix does not fit its values.
        """
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self._stored[name].path, []).append(name)
        for path, inside in by_path.items():
            with safe_open(path, framework="pt") as file:
                for name in inside:
                    tensor = _read(file, self._stored[name])
                    yield name, tensor if name not in self._masks else self._dense(name, tensor)

    def _dense(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return a matrix that is stored as nonzero values and a bitmask."""
        mask = self._masks[name]
        with safe_open(mask.path, framework="pt") as file:
            bits = file.get_tensor(mask.name)
        try:
            return decode(bits, values, self._wanted[name].shape[1])
        except ValueError as error:
            raise UserError(f"{mask.path}: {name}: {error}", "compress the model again") from error

    def fill(self, module: nn.Module, prefix: str = "", dtype: torch.dtype | None = None) -> None:
        """Give a module's parameters and buffers their stored values.

        Args:
            module: the module to fill.
            prefix: the module's name in the network; empty for the network itself.
            dtype: dtype to convert parameters to; None keeps the stored one.
        """
        start = f"{prefix}." if prefix else ""
        for name, tensor in self.read(name for name in self._wanted if name.startswith(start)):
            owner, _, attribute = name.removeprefix(start).rpartition(".")
            if isinstance(self._wanted[name], nn.Parameter):
                tensor = nn.Parameter(tensor.to(dtype or tensor.dtype), requires_grad=False)
            setattr(module.get_submodule(owner), attribute, tensor)
        left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        assert not left, f"still without values: {left[:3]}"


def _read(file: Any, stored: StoredTensor) -> torch.Tensor:
    """Read a tensor, or its rows, from an open file."""
    view = file.get_slice(stored.name)
    shape, rows = stored.info.shape, stored.first_row
    if tuple(view.get_shape()) == shape:
        whole: torch.Tensor = file.get_tensor(stored.name)
        return whole
    part: torch.Tensor = view[rows : rows + shape[0]]
    return part
