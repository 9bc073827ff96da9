"""Networks from transformers: loaded whole from a checkpoint, or built empty to be filled from a variant's file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from compress.common.errors import UserError
from compress.models.architectures import imported
from compress.models.files.weights import UNUSED, Weights
from compress.models.folder import ModelFolder
from compress.models.network.pooling import attach_head, head_of
from compress.models.network.segments import HEAD


def _quietly() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_network(folder: ModelFolder, dtype: torch.dtype) -> nn.Module:
    """Load the network of a checkpoint, without a language model's head, every floating-point tensor in `dtype`.

    Raises:
        UserError: a tensor that the network needs is not in the checkpoint; nothing is filled in at random.
    """
    _quietly()
    if folder.own_architecture is not None:
        model = empty_network(folder)
        Weights(folder.tensors, model, exact=True).fill(model, dtype=dtype)
        return model
    model, report = AutoModel.from_pretrained(
        folder.transformer,
        config=_uncached(folder),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"{folder.transformer}: the checkpoint lacks {len(missing)} tensors of its own network, such as {missing[0]!r}"
        )
    unused = sorted(key for key in report["unexpected_keys"] if not UNUSED.search(key))
    if unused:
        raise UserError(
            f"{folder.transformer}: the checkpoint holds {len(unused)} tensors that its network does not have, such as {unused[0]!r}"
        )
    attach_head(_without_pooler(model), folder.spec)
    head = nn.ModuleDict({HEAD: head_of(model)})
    mine = {name: tensor for name, tensor in folder.tensors.items() if name.startswith(f"{HEAD}.")}
    Weights(mine, head, exact=True).fill(head, dtype=dtype)
    return model


def _uncached(folder: ModelFolder) -> Any:
    """Return the network's config without a key/value cache, which costs memory and helps no embedder: it reads each text once."""
    config = copy.deepcopy(folder.network_config)
    config.use_cache = False
    return config


def _without_pooler(model: nn.Module) -> nn.Module:
    """Take away BERT's pooler: it feeds next-sentence prediction, not the embedding."""
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010  a plain assignment is typed as a module
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules built inside take no memory for parameters, while their buffers get real values.

    `torch.device("meta")` would leave buffers that no checkpoint holds (rotary frequencies, position ids) without values too.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def empty_network(folder: ModelFolder) -> nn.Module:
    """Build the network of a folder's config, to be run and not trained: real buffers, parameters that have no memory yet.

    Raises:
        UserError: its architecture is not one that this version runs.
    """
    _quietly()
    own = folder.own_architecture
    with _parameters_on_meta():
        if own is not None:
            network: nn.Module = imported(own.network)(folder)
            return network.eval()
        network = AutoModel.from_config(_uncached(folder))
        attach_head(network, folder.spec)
    return _without_pooler(network.eval())  # a new network is one to be trained, with dropout at work
