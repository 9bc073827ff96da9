"""Builds networks: loaded from a checkpoint, or empty, to be filled with weights segment by segment."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from compress.common.errors import UserError, first_line
from compress.common.lazy import attribute
from compress.models.files.weights import UNUSED, Weights
from compress.models.folder import ModelFolder
from compress.models.network.pooling import attach_head, head_of
from compress.models.network.segments import HEAD


def _quietly() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _transformers(folder: ModelFolder) -> Iterator[None]:
    """Say of which folder a network is that transformers cannot build; its checks of configs raise errors of many kinds.

    Raises:
        UserError: it cannot.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the config or the weights are not what transformers takes
        raise UserError(f"{folder.transformer / 'config.json'}: transformers builds no network of it: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what an error says; of a table of tensors that do not fit, the first one."""
    text = str(error)
    mismatch = next((line for line in text.splitlines() if "MISMATCH" in line), None)
    return f"{type(error).__name__}: {first_line(error) if mismatch is None else ' '.join(mismatch.split())}"


def load_network(folder: ModelFolder, dtype: torch.dtype) -> nn.Module:
    """Load the network of a checkpoint, without a language-model head and with all floating-point tensors in `dtype`.

    Raises:
        UserError: the checkpoint lacks a tensor that the network needs. transformers would initialise it at random.
    """
    _quietly()
    if folder.own_architecture is not None:
        model = empty_network(folder)
        Weights(folder.tensors, model, exact=True).fill(model, dtype=dtype)
        return model
    network: nn.Module
    config = _uncached(folder)
    folder.check_sizes()
    with _transformers(folder):
        network, report = AutoModel.from_pretrained(
            folder.transformer,
            config=config,
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
            f"{folder.transformer}: the checkpoint has {len(unused)} tensors that its network has not, such as {unused[0]!r}"
        )
    attach_head(_without_pooler(network), folder.spec)
    head = nn.ModuleDict({HEAD: head_of(network)})
    mine = {name: tensor for name, tensor in folder.tensors.items() if name.startswith(f"{HEAD}.")}
    Weights(mine, head, exact=True).fill(head, dtype=dtype)
    return network


def _uncached(folder: ModelFolder) -> Any:
    """Return the network's config without a key/value cache. An embedder reads each text once, so a cache only costs memory."""
    config = copy.deepcopy(folder.network_config)
    config.use_cache = False
    return config


def _without_pooler(model: nn.Module) -> nn.Module:
    """Remove BERT's pooler: it feeds next-sentence prediction, not the embedding."""
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010  a plain assignment is typed as a module
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules with parameters on the meta device, which take no memory, but with real buffers.

    `torch.device("meta")` would also put buffers on the meta device that no checkpoint holds (rotary frequencies, position ids).
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
    """Build the network that a folder's config describes, in eval mode, with real buffers and its parameters on the meta device.

    Raises:
        UserError: this version does not run the architecture.
    """
    _quietly()
    own = folder.own_architecture
    with _parameters_on_meta():
        if own is not None:
            network: nn.Module = attribute(own.network)(folder)
            return network.eval()
        config = _uncached(folder)
        with _transformers(folder):
            network = AutoModel.from_config(config)
        attach_head(network, folder.spec)
    return _without_pooler(network.eval())  # a new network is one to be trained, with dropout at work
