"""A network's `config.json`: the types of its keys, and whether the weights next to it are those it describes. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from compress.common.errors import UserError
from compress.common.inputs import checked, read_object
from compress.models.architectures import BLOCK
from compress.models.files.headers import StoredTensor, TensorInfo

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
MOST_BLOCKS = 10_000
"""Bound on blocks. Networks that share weights between blocks have fewer in their files than in their config."""
Size = Annotated[int, Field(ge=1, le=10**9)] | None
FLOATING = ("F16", "BF16", "F32", "F64")
OTHER_LIBRARIES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
"""Files in which GPTQ, AWQ, bitsandbytes and ModelOpt say how they have quantized the weights next to them."""


class _Sizes(BaseModel):
    """Keys of a config, and of its `text_config`, whose types are checked; transformers judges all others."""

    model_config = ConfigDict(extra="allow", strict=True)

    num_hidden_layers: Annotated[int, Field(ge=0, le=MOST_BLOCKS)] | None = None
    num_layers: Annotated[int, Field(ge=0, le=MOST_BLOCKS)] | None = None
    n_layer: Annotated[int, Field(ge=0, le=MOST_BLOCKS)] | None = None
    n_layers: Annotated[int, Field(ge=0, le=MOST_BLOCKS)] | None = None
    hidden_size: Size = None
    vocab_size: Size = None
    num_attention_heads: Size = None
    num_key_value_heads: Size = None
    max_position_embeddings: Size = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None
    pad_token_id: Annotated[int, Field(ge=-1)] | None = None


class _ConfigFile(_Sizes):
    """A network's `config.json`."""

    model_type: Annotated[str, Field(min_length=1)] | None = None
    text_config: _Sizes | None = None


def read_config(transformer: Path) -> dict[str, Any]:
    """Read the `config.json` of a network's folder.

    Raises:
        UserError: it is missing or no JSON object, a key is of a wrong type, or another library has quantized the weights.
    """
    path = transformer / CONFIG_FILE
    if not path.exists() and not path.is_symlink():
        raise UserError(
            f"{transformer}: no config.json", "a model's folder holds config.json, tokenizer files and safetensors weights"
        )
    config = read_object(path)
    check_config(config, str(path))
    for section, keys in (("", config), ("text_config.", config.get("text_config") or {})):
        for key in ("quantization_config", "compression_config"):
            if keys.get(key):
                method = keys[key].get("quant_method", "unknown")
                raise _quantized(f"{path}: {section}{key}", f"quantized by another library ({method})")
    found = next((name for name in OTHER_LIBRARIES if (transformer / name).exists()), None)
    if found is not None:
        raise _quantized(f"{transformer / found}", "the weights next to it are quantized by another library")
    return config


def check_config(config: Mapping[str, Any], place: str) -> None:
    """See that the keys of a config are of the right types and of sizes that a network can have; `place` names it in errors.

    Raises:
        UserError: one is not.
    """
    checked(config, _ConfigFile, place)


def _quantized(place: str, what: str) -> UserError:
    return UserError(f"{place}: {what}", "start from the model that it was made from")


def check_floating(tensors: Mapping[str, StoredTensor], buffers: Any) -> None:
    """See that a checkpoint's weights are floating-point numbers; integers and FP8 mean something only with their scales.

    Args:
        tensors: those of the checkpoint, by name.
        buffers: a pattern of tensors that are no weights, such as position ids.

    Raises:
        UserError: a weight is not.
    """
    for name, tensor in tensors.items():
        if tensor.info.dtype not in FLOATING and not buffers.search(name):
            raise _quantized(f"{tensor.path}: {name}", f"is {tensor.info.dtype}, and weights are {', '.join(FLOATING)}")


def check_blocks(place: Path, blocks: int, tensors: Mapping[str, TensorInfo]) -> None:
    """See that the weights have the blocks that the config says, before a network of so many is built.

    Args:
        place: path of the config.
        blocks: what the config says.
        tensors: those of the checkpoint, by name.

    Raises:
        UserError: no stack of blocks in the files has that many.
    """
    stacks: dict[str, set[int]] = {}
    for name in tensors:
        block = BLOCK.search(name)
        if block is not None:
            stacks.setdefault(name[: block.start(1)], set()).add(int(block.group(1)))
    counts = sorted({len(numbers) for numbers in stacks.values()})
    if counts and blocks not in counts:
        raise UserError(
            f"{place}: num_hidden_layers is {blocks}, and the weights next to it have {' or '.join(map(str, counts))} blocks",
            "the config and the weights are of different models, or one of them was edited",
        )


def check_rows(place: Path, key: str, wanted: Any, rows: int | None) -> None:
    """See that a table of the files has a row for each of the config's tokens or positions.

    Args:
        place: path of the config.
        key: the config's key.
        wanted: its value.
        rows: rows of the table; None where there is none.

    Raises:
        UserError: the config asks for more.
    """
    if isinstance(wanted, int) and rows is not None and wanted > rows:
        raise UserError(
            f"{place}: {key} is {wanted:,}, and the table in the weights next to it has {rows:,} rows",
            "the config and the weights are of different models, or one of them was edited",
        )
