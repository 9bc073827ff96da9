"""The shape of a model: what tensors it has, which are linear layers of its blocks, what running it costs. No torch here.

Plans are made from this alone, so that a model of any size is planned without loading or even having its weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from compress.common.errors import UserError
from compress.models.architectures import BLOCK, Anatomy, anatomy_of, is_block_linear, is_head_linear, place_in_block
from compress.models.files.headers import TensorInfo, read_headers
from compress.models.folder import read_json, transformer_folder

HALF_BYTES = 2
_TABLE = re.compile(r"(?:embed\w*|wte|wpe)\.weight$")


def with_backbone(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a `config.json` with other settings of the transformer, which lie in `text_config` where there is one."""
    if config.get("text_config"):
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


def own_key(config: Mapping[str, Any], key: str) -> str:
    """Return the name that an architecture gives a setting in its `config.json`: `n_layer` for `num_hidden_layers` of a GPT-2.

    The names come from transformers, which is imported only here: configs with the usual names never need it.
    """
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    return str(CONFIG_MAPPING[kind].attribute_map.get(key, key)) if kind in CONFIG_MAPPING else key


@dataclass(frozen=True)
class ModelShape:
    """Tensors by name, and the few numbers of the config that costs depend on."""

    name: str
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    left: tuple[int, ...] | None = None
    """Which blocks of the published model are left; None: all."""
    packed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of weights that a plan's steps have put into integers: their own shapes, by the name of the layer."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Which block of the published model each block is, from 0."""
        return tuple(range(self.blocks)) if self.left is None else self.left

    @cached_property
    def parameters(self) -> int:
        """Number of parameters (floating-point tensors; index buffers are not counted)."""
        return sum(info.parameters for info in self.tensors.values() if info.dtype.startswith(("F", "BF")))

    @cached_property
    def half_bytes(self) -> int:
        """Bytes of the half-precision baseline."""
        return self.parameters * HALF_BYTES

    @property
    def packed_parameters(self) -> int:
        """Number of weights that a plan's steps have put into integers."""
        return sum(math.prod(shape) for shape in self.packed.values())

    @property
    def bytes(self) -> int:
        """Bytes of the tensors as they are."""
        return sum(info.bytes for info in self.tensors.values())

    def as_stored(self) -> ModelShape:
        """Return this shape as a variant stores it: floating point in half precision, what quantized layers have as it is."""
        own = {name.rpartition(".")[0] for name in self.tensors if name.endswith(".weight_scale")}
        tensors = {
            name: info
            if info.dtype.startswith(("I", "U")) or (name.rpartition(".")[0] in own and not name.endswith(".bias"))
            else TensorInfo("F16", info.shape, info.density)
            for name, info in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    @cached_property
    def block_linears(self) -> dict[str, TensorInfo]:
        """Weights of the linear layers inside blocks that are not quantized, by the name of the layer (without `.weight`)."""
        found = {
            name.removesuffix(".weight"): info for name, info in self.tensors.items() if is_block_linear(name, len(info.shape))
        }
        return {name: info for name, info in found.items() if f"{name}.weight_scale" not in self.tensors}

    @cached_property
    def head_linears(self) -> dict[str, TensorInfo]:
        """Weights of the linear layers of NV-Embed's folded head, by the name of the layer."""
        return {name.removesuffix(".weight"): info for name, info in self.tensors.items() if is_head_linear(name)}

    @property
    def token_table(self) -> str | None:
        """Name of the module with the token embedding table: of the tables outside of blocks the one with the most rows."""
        tables = {
            name.removesuffix(".weight"): info.shape[0]
            for name, info in self.tensors.items()
            if _TABLE.search(name) and len(info.shape) == 2 and not BLOCK.search(name)
        }
        return max(tables, key=tables.__getitem__) if tables else None

    @property
    def largest_segment_bytes(self) -> int:
        """Bytes of the largest stretch in memory at once when the model is streamed: a block, the embeddings or the head."""
        sizes: dict[str, int] = {}
        for name, info in self.tensors.items():
            block = BLOCK.search(name)
            # Outside of blocks embeddings, norm and head are segments of their own; their first names tell them apart.
            segment = block.group(0) if block else name.partition(".")[0]
            sizes[segment] = sizes.get(segment, 0) + info.parameters * HALF_BYTES
        return max(sizes.values())

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self._required("hidden_size"))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self._required("num_hidden_layers"))

    @property
    def _backbone(self) -> Mapping[str, Any]:
        nested: Mapping[str, Any] = self.config.get("text_config") or self.config
        return nested

    def _required(self, key: str) -> Any:
        """Return a setting of the transformer's config, under the architecture's own name where it has one (`dim`, `n_embd`).

        Raises:
            UserError: the config has it under no name.
        """
        found = self._backbone.get(key)
        if found is None:
            found = self._backbone.get(own_key(self._backbone, key))
        if found is None:
            raise UserError(f"{self.name}: config.json lacks {key!r}", "is this the config of a transformers model?")
        return found

    @property
    def anatomy(self) -> Anatomy:
        """Which of a block's layers do what.

        Raises:
            ValueError: the blocks are laid out like none of those that are known.
        """
        places = (place_in_block(name) for name in self.tensors)
        try:
            return anatomy_of(place[1] for place in places if place is not None)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return int(self._backbone.get("head_dim") or self.hidden_size // int(self._required("num_attention_heads")))

    def setting(self, key: str) -> Any:
        """Return a setting of the transformer's config, None where it has none."""
        return self._backbone.get(key)

    def flops_per_token(self, length: int) -> float:
        """Return floating-point operations per token at a text length in tokens: products of the linear layers and of attention."""
        plain = sum(info.parameters for info in self.block_linears.values())
        packed = sum(math.prod(shape) for name, shape in self.packed.items() if is_block_linear(f"{name}.weight", len(shape)))
        return 2 * (plain + packed) + 4 * length * self._attended()

    def _attended(self) -> int:
        """Return the width of all blocks' heads together; of architectures that are not known, the hidden size for each block."""
        try:
            output = f".{self.anatomy.output}.weight"
        except ValueError:
            return self.hidden_size * self.blocks
        shapes = {name: self.packed.get(name.removesuffix(".weight"), info.shape) for name, info in self.tensors.items()}
        return sum(shape[1] for name, shape in shapes.items() if name.endswith(output) and len(shape) == 2)

    def activation_bytes(self, batch_tokens: int, bytes_each: int = 4) -> int:
        """Return an upper estimate of the activations alive at once while a batch runs.

        The widest moment is the MLP: the residual, its normalised copy, and three arrays of the widest layer (input, activation
        and the product's output); attention runs in tiles and holds four arrays of the hidden size.
        """
        widest = max((max(info.shape) for info in self.block_linears.values()), default=self.hidden_size)
        return batch_tokens * (2 * self.hidden_size + max(3 * widest, 4 * self.hidden_size)) * bytes_each


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Return the names that any of the shell-style patterns matches."""
    patterns = list(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def check_patterns(names: Iterable[str], patterns: Iterable[str]) -> None:
    """See that every pattern is good for something.

    Raises:
        ValueError: a pattern matches none of the names, most likely a typing error.
    """
    names = list(names)
    for pattern in patterns:
        if not matching(names, [pattern]):
            example = f", such as {names[0]!r}" if names else ""
            raise ValueError(f"pattern {pattern!r} matches none of the model's {len(names)} linear layers{example}")


def read_shape(name: str, folder: Path) -> ModelShape:
    """Read a shape from a model's folder: its config and its safetensors headers."""
    inner = transformer_folder(folder)
    return ModelShape(name, _without_task_head(read_headers(inner)), read_json(inner / "config.json"))


def known_shape(name: str) -> ModelShape | None:
    """Return the shape of a model whose tensors the project lists, without any file of the model; None if it is not listed."""
    listing = _listing(name)
    if listing is None:
        return None
    tensors = {key: TensorInfo(dtype, tuple(shape)) for key, (dtype, shape) in listing["tensors"].items()}
    return ModelShape(name, tensors, listing["config"])


def known_config(name: str) -> dict[str, Any] | None:
    """Return the config of a model whose tensors the project lists; None if it is not listed."""
    listing = _listing(name)
    return None if listing is None else listing["config"]


def _listing(name: str) -> dict[str, Any] | None:
    resource = resources.files("compress.data") / "shapes" / f"{name.replace('/', '--')}.json"
    if not resource.is_file():
        return None
    listing: dict[str, Any] = json.loads(resource.read_text(encoding="utf-8"))
    return listing


def _without_task_head(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Drop what no embedder uses and none of our loaders keeps: BERT's pooler, the heads of language models."""
    return {name: info for name, info in tensors.items() if not re.search(r"(?:^|\.)pooler\.|^(?:lm_head|cls)\.", name)}
