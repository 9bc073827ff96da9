"""Tables that a network has under two names: one module and one tensor, so that they are quantized and stored once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compress.common.errors import UserError
from compress.models.files.headers import StoredTensor


class SecondName(nn.Module):
    """Looks rows up in the table that the network has under another name. It holds no tensor."""

    def __init__(self, network: nn.Module, name: str) -> None:
        """`network`: the network; `name`: the table's name in it, under which its tensors are stored."""
        super().__init__()
        # Not registered as a submodule: its network would be inside itself. The table is looked up in each call, because the one
        # under that name may have been loaded or quantized since.
        self.__dict__["_network"] = network
        self.name = name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64 [...] to [..., width]."""
        rows: torch.Tensor = self._network.get_submodule(self.name)(ids)  # type: ignore[operator, union-attr]
        return rows


def name_tables_once(network: nn.Module) -> nn.Module:
    """Leave a network's tied embedding tables only the name that checkpoints store (T5: `shared`), and return the network."""
    # The class's own list: transformers unties what a checkpoint stores twice with different values, which `stored_once` refuses.
    tied = getattr(type(network), "_tied_weights_keys", None)
    tied = tied if isinstance(tied, Mapping) else {}
    for second, first in tied.items():
        path, table = second.rpartition(".")[0], first.rpartition(".")[0]
        modules = dict(network.named_modules(remove_duplicate=False))
        if path != table and isinstance(modules.get(path), nn.Embedding) and isinstance(modules.get(table), nn.Embedding):
            network.set_submodule(path, SecondName(network, table))
    return network


def stored_once(tensors: Mapping[str, StoredTensor], network: nn.Module) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors, those that it has under two names only under the network's.

    Raises:
        UserError: the two differ.
    """
    found = dict(tensors)
    for path, module in network.named_modules():
        second = found.pop(f"{path}.weight", None) if isinstance(module, SecondName) else None
        if second is None:
            continue
        assert isinstance(module, SecondName)
        first = found.setdefault(f"{module.name}.weight", second)
        if first is not second and first.read() != second.read():
            raise UserError(f"{first.path}: {first.name} and {second.name} should be one table, and differ")
    return found
