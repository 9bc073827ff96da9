"""Networks from transformers: loaded whole from a checkpoint, or built empty to be filled from a variant's file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from compress.common.errors import UserError
from compress.models.files.headers import weight_files
from compress.models.files.weights import Weights
from compress.models.network.nv_embed import NVEmbedNetwork, is_nv_embed, read_nv_config


def _quietly() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_config(folder: Path) -> Any:
    """Read a transformers config from a folder, never from a hub, never running code that came with it.

    Raises:
        UserError: there is none, or its architecture is not one of transformers' own.
    """
    path = folder / "config.json"
    if is_nv_embed(folder):
        return read_nv_config(folder)[0]
    if not path.exists():
        raise UserError(f"{folder}: no config.json", "a model's folder holds config.json, tokenizer files and safetensors weights")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        import json

        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type", "missing")
        raise UserError(f"{path}: model_type {kind!r} is not an architecture that this version runs") from error
    if config.is_encoder_decoder:
        raise UserError(f"{path}: {config.model_type} is an encoder-decoder; embedders are encoders or decoders")
    return config


def load_network(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the base model (no language-model head) of a checkpoint, every floating-point tensor in `dtype`.

    Raises:
        UserError: a tensor that the network needs is not in the checkpoint; nothing is filled in at random.
    """
    _quietly()
    if is_nv_embed(folder):
        model = empty_network(folder)
        Weights(weight_files(folder), model, exact=True).fill(model, dtype=dtype)
        return model
    config = read_config(folder)
    # use_cache: an embedder reads each text once, so a decoder's key/value cache would only cost memory.
    config.use_cache = False
    model, report = AutoModel.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"{folder}: the checkpoint lacks {len(missing)} tensors of its own network, such as {missing[0]!r}")
    return _without_pooler(model)


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


def empty_network(folder: Path, folded: bool = False) -> nn.Module:
    """Build the network of `folder`'s config, to be run and not trained: real buffers, parameters that have no memory yet.

    `folded`: NV-Embed's head in its folded form.
    """
    _quietly()
    with _parameters_on_meta():
        if is_nv_embed(folder):
            return NVEmbedNetwork(*read_nv_config(folder), folded=folded).eval()
        config = read_config(folder)
        config.use_cache = False
        model: nn.Module = AutoModel.from_config(config)
    return _without_pooler(model.eval())  # a new network is one to be trained, with dropout at work
