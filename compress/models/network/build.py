"""Builds networks: loaded from a checkpoint, or empty, to be filled with weights segment by segment."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from torch import nn

from compress.common.errors import UserError, first_line
from compress.common.lazy import attribute
from compress.models.architectures import AUTO_CLASSES
from compress.models.files.conversion import in_network
from compress.models.files.headers import StoredTensor
from compress.models.files.weights import UNUSED, Weights
from compress.models.folder import ModelFolder
from compress.models.network.pooling import attach_head, head_of
from compress.models.network.segments import HEAD
from compress.models.network.tied import name_tables_once, stored_once

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_BUILDING = threading.RLock()


def _alone(build: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let one thread at a time build: transformers and `_parameters_on_meta` change classes and defaults of torch meanwhile."""

    @functools.wraps(build)
    def locked(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        with _BUILDING:
            return build(*arguments, **named)

    return locked


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


@_alone
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
        network, report = auto_class(folder).from_pretrained(
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
            f"{folder.transformer}: the checkpoint lacks {len(missing)} tensors of the network that its config.json describes, "
            f"such as {missing[0]!r}"
        )
    unused = sorted(key for key in report["unexpected_keys"] if not UNUSED.search(key))
    if unused:
        raise UserError(
            f"{folder.transformer}: the checkpoint has {len(unused)} tensors that its network has not, such as {unused[0]!r}"
        )
    return _with_head(_as_it_runs(network), folder, dtype)


def _with_head(network: nn.Module, folder: ModelFolder, dtype: torch.dtype) -> nn.Module:
    """Give a network of transformers the head of a checkpoint, with its weights, and return the network."""
    attach_head(network, folder.spec)
    stored_once(folder.tensors, network)  # or else one of two tables with different values would be left out without a word
    head = nn.ModuleDict({HEAD: head_of(network)})
    mine = {name: tensor for name, tensor in folder.tensors.items() if name.startswith(f"{HEAD}.")}
    Weights(mine, head, exact=True).fill(head, dtype=dtype)
    return network


@_alone
def stored_in_network(folder: ModelFolder, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return a folder's stored tensors by their names in its network; see `compress.models.files.conversion.in_network`."""
    with _parameters_on_meta():
        return in_network(tensors, _as_it_runs(auto_class(folder).from_config(_uncached(folder))))


@_alone
def sharing_network(network: nn.Module, folder: ModelFolder, dtype: torch.dtype) -> nn.Module:
    """Return a network of transformers that shares all modules with another one, except for its head.

    Args:
        network: the other one, loaded from the Transformer module that `folder` has too.
        folder: the checkpoint of the head.
        dtype: dtype of the head's tensors.
    """
    made = copy.copy(network)
    made._modules = dict(network._modules)  # the copy's own table, in which its head is another
    return _with_head(made, folder, dtype)


def auto_class(folder: ModelFolder) -> Any:
    """Return the class of transformers that builds a folder's network."""
    return getattr(transformers, AUTO_CLASSES.get(str(folder.config.get("model_type")), "AutoModel"))


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


def _as_it_runs(model: nn.Module) -> nn.Module:
    """Leave a network of transformers what embedding needs: no pooler, each table under one name, layers that can be replaced."""
    name_tables_once(_without_pooler(model))
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith(("T5DenseActDense", "T5DenseGatedActDense")):
            model.set_submodule(name, T5FeedForward(module))
    return model


class T5FeedForward(nn.Module):
    """The MLP of T5 and, with a gate, of T5 1.1.

    transformers' own casts what enters `wo` to the dtype of `wo.weight`. Packed layers have no such attribute, and that of a layer
    of integers is not what it multiplies in.
    """

    def __init__(self, original: nn.Module) -> None:
        """Take the layers of transformers' module, under their names."""
        super().__init__()
        for name, layer in original.named_children():
            self.add_module(name, layer)
        self.gated = hasattr(original, "wi_1")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map [..., width] to [..., width]."""
        layers: Any = self
        first = layers.wi_0 if self.gated else layers.wi
        risen = layers.act(first(hidden_states))
        if self.gated:
            risen = risen * layers.wi_1(hidden_states)
        fallen: torch.Tensor = layers.wo(layers.dropout(risen))
        return fallen


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules with parameters on the meta device, which take no memory, but with real buffers.

    `torch.device("meta")` would also put buffers on the meta device that no checkpoint holds (rotary frequencies, position ids).
    Modules that other threads make meanwhile are left alone.
    """
    register, mine = nn.Module.register_parameter, threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == mine:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@_alone
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
            network = auto_class(folder).from_config(config)
        attach_head(network, folder.spec)
    return _as_it_runs(network.eval())  # a new network is one to be trained, with dropout at work
