"""The shape of a model: its tensors, which of them are linear layers of blocks, and what running it costs. No torch here.

`compress plan` needs only this, so it can plan for a model of any size without loading its weights or even having them.
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
from typing import Any

from compress.common.errors import UserError
from compress.models.architectures import BLOCK, ENCODERS, Anatomy, anatomy_of, is_block_linear, is_head_linear, place_in_block
from compress.models.files.headers import BARE_BYTES, TensorInfo

HALF_BYTES = 2
_TABLE = re.compile(r"(?:embed\w*|wte|wpe|shared)\.weight$")


_PROJECTION = re.compile(r"^(?:model\.)?embedding_projection\.weight$")


def with_backbone(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a copy of a `config.json` with settings of the transformer changed, in `text_config` if it has one.

    A setting that the architecture has under a name of its own is changed there.
    """
    if config.get("text_config"):
        return {**config, "text_config": with_backbone(config["text_config"], **changes)}
    return {**config, **{key if key in config else own_key(config, key): value for key, value in changes.items()}}


def own_key(config: Mapping[str, Any], key: str) -> str:
    """Return the name that an architecture gives a setting in its `config.json`: `n_layer` for `num_hidden_layers` of a GPT-2.

    The names come from transformers, which is imported only here: configs with the usual names never need it.
    """
    from transformers import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    return str(CONFIG_MAPPING[kind].attribute_map.get(key, key)) if kind in CONFIG_MAPPING else key


@dataclass(frozen=True)
class ModelShape:
    """A model's tensors and its config, from which costs are computed."""

    name: str
    """The model's name in messages."""
    tensors: Mapping[str, TensorInfo]
    """The model's tensors by name."""
    config: Mapping[str, Any]
    """The content of the model's `config.json`."""
    left: tuple[int, ...] | None = None
    """The remaining blocks, by their number in the published model; None if all remain."""
    packed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Unpacked shapes of the weights that steps of the plan have quantized to integers, by layer name."""
    vector_width: int | None = None
    """Width of the model's vectors; None where only tensors and config are known."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The number that each block has in the published model, from 0."""
        return tuple(range(self.blocks)) if self.left is None else self.left

    @cached_property
    def parameters(self) -> int:
        """Number of parameters (floating-point tensors; index buffers are not counted)."""
        return sum(info.parameters for info in self.tensors.values() if info.dtype.startswith(("F", "BF")))

    @cached_property
    def half_bytes(self) -> int:
        """Size of the half-precision baseline in bytes."""
        return self.parameters * HALF_BYTES

    @property
    def packed_parameters(self) -> int:
        """Number of weights that steps of the plan have quantized to integers."""
        return sum(math.prod(shape) for shape in self.packed.values())

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes, each in its own dtype."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        """Most bytes of a file with these tensors.

        It holds for several files too: offsets are shorter in them, by more than another header takes.
        """
        return BARE_BYTES + self.bytes_in_file(("",))

    def bytes_in_file(self, starts: tuple[str, ...]) -> int:
        """Return the most bytes that the tensors whose names begin with one of `starts` add to a file."""
        return sum(info.file_bytes(name) for name, info in self.tensors.items() if name.startswith(starts))

    def as_stored(self) -> ModelShape:
        """Return this shape as a variant stores it: tensors of quantized layers unchanged, other floating-point ones in float16."""
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
        """Weights of the linear layers inside blocks that are not yet quantized, by layer name (without `.weight`)."""
        found = {
            name.removesuffix(".weight"): info for name, info in self.tensors.items() if is_block_linear(name, len(info.shape))
        }
        return {name: info for name, info in found.items() if f"{name}.weight_scale" not in self.tensors}

    @cached_property
    def head_linears(self) -> dict[str, TensorInfo]:
        """Weights of the linear layers of NV-Embed's folded head, by layer name (without `.weight`)."""
        return {name.removesuffix(".weight"): info for name, info in self.tensors.items() if is_head_linear(name)}

    @property
    def token_table(self) -> str | None:
        """Name of the module with the token embedding table, which is the table outside the blocks with the most rows."""
        tables = {
            name.removesuffix(".weight"): info.shape[0]
            for name, info in self.tensors.items()
            if _TABLE.search(name) and len(info.shape) == 2 and not BLOCK.search(name)
        }
        return max(tables, key=tables.__getitem__) if tables else None

    @property
    def largest_segment_bytes(self) -> int:
        """Half-precision bytes of the largest segment: a block, the embeddings or the head. Streaming holds one at a time."""
        sizes: dict[str, int] = {}
        for name, info in self.tensors.items():
            block = BLOCK.search(name)
            # Outside the blocks, the first part of the name separates embeddings, norm and head.
            segment = block.group(0) if block else name.partition(".")[0]
            sizes[segment] = sizes.get(segment, 0) + info.parameters * HALF_BYTES
        return max(sizes.values())

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self._required("hidden_size"))

    @property
    def output_width(self) -> int:
        """Width of the hidden states that leave the network: the residual stream's, or that of a projection after it."""
        rows = [info.shape[0] for name, info in self.tensors.items() if _PROJECTION.search(name)]
        return rows[0] if rows else self.hidden_size

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
        """The roles of a block's layers.

        Raises:
            ValueError: the layout of the blocks is unknown.
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
        """Return a setting of the transformer's config, or None if the config does not have it."""
        return self._backbone.get(key)

    def flops_per_token(self, length: int) -> float:
        """Return the floating-point operations per token in the blocks: matrix products of linear layers and of attention.

        Args:
            length: length of the texts in tokens.
        """
        # Two operations per weight. In attention, two products (scores, mixing) of two operations per token of the text and unit
        # of the heads' joint width.
        plain = sum(info.parameters for info in self.block_linears.values())
        packed = sum(math.prod(shape) for name, shape in self.packed.items() if is_block_linear(f"{name}.weight", len(shape)))
        return 2 * (plain + packed) + 4 * length * self._attended()

    def _attended(self) -> int:
        """Return the sum over blocks of the heads' joint width; an unknown architecture counts its hidden size for each block."""
        try:
            output = f".{self.anatomy.output}.weight"
        except ValueError:
            return self.hidden_size * self.blocks
        shapes = {name: self.packed.get(name.removesuffix(".weight"), info.shape) for name, info in self.tensors.items()}
        return sum(shape[1] for name, shape in shapes.items() if name.endswith(output) and len(shape) == 2)

    def activation_bytes(self, batch_tokens: int, bytes_each: int = 4) -> int:
        """Return an upper estimate, in bytes, of the activations that are alive at once while a batch runs.

        The peak is in the MLP or in attention. Both hold the residual and its normalised copy; the MLP adds three arrays of the
        widest layer (input, activation, output), attention, which runs in tiles, four arrays of the hidden size.

        Args:
            batch_tokens: padded tokens in the batch.
            bytes_each: bytes per value.
        """
        widest = max((max(info.shape) for info in self.block_linears.values()), default=self.hidden_size)
        return batch_tokens * (2 * self.hidden_size + max(3 * widest, 4 * self.hidden_size)) * bytes_each


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Return the names that match at least one of the shell-style patterns."""
    patterns = list(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def check_patterns(names: Iterable[str], patterns: Iterable[str]) -> None:
    """Check that every pattern matches at least one name.

    Raises:
        ValueError: a pattern matches none of the names; it is probably misspelled.
    """
    names = list(names)
    for pattern in patterns:
        if not matching(names, [pattern]):
            example = f", such as {names[0]!r}" if names else ""
            raise ValueError(f"pattern {pattern!r} matches none of the model's {len(names)} linear layers{example}")


def known_shape(name: str) -> ModelShape | None:
    """Return a model's shape from the listing in this package, without any file of the model; None if it is not listed."""
    listing = _listing(name)
    if listing is None:
        return None
    tensors = {key: TensorInfo(dtype, tuple(shape)) for key, (dtype, shape) in listing["tensors"].items()}
    return ModelShape(name, tensors, listing["config"])


def known_config(name: str) -> dict[str, Any] | None:
    """Return a model's config from the listing in this package; None if it is not listed."""
    listing = _listing(name)
    return None if listing is None else listing["config"]


def _listing(name: str) -> dict[str, Any] | None:
    resource = resources.files("compress.data") / "shapes" / f"{name.replace('/', '--')}.json"
    if not resource.is_file():
        return None
    listing: dict[str, Any] = json.loads(resource.read_text(encoding="utf-8"))
    return listing


def without_task_head(tensors: Mapping[str, TensorInfo], kind: object = None) -> dict[str, TensorInfo]:
    """Return the tensors that an embedder uses: all but BERT's pooler and language-model heads, which the loaders drop too.

    `kind`: the `model_type`; of an encoder-decoder only the encoder is used, and its token table once.
    """
    unused = r"(?:^|\.)pooler\.|^(?:lm_head|cls)\."
    if kind in ENCODERS:
        unused += r"|^decoder\." + (r"|^encoder\.embed_tokens\." if "shared.weight" in tensors else "")
    return {name: info for name, info in tensors.items() if not re.search(unused, name)}
