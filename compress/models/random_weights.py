"""Checkpoints with random weights, to measure a model's memory and speed without downloading it. Their vectors are meaningless.

`random:nvidia/NV-Embed-v2` is that model at full size; `random:nvidia/NV-Embed-v2,num_hidden_layers=8` overrides fields of its
config. A checkpoint is written once, under the cache root.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import math
import re
import shutil
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.common.cache import cache_root
from compress.common.errors import UserError, nearest
from compress.common.files import naming, sync_folder, sync_tree, write_text_atomic
from compress.common.inputs import own_file, read_json, read_object
from compress.common.locks import LOCK, locked
from compress.data.texts import suite_texts
from compress.models.files.config import check_config
from compress.models.files.headers import TensorInfo
from compress.models.folder import RANDOM_FILE, ModelFolder
from compress.models.shape import ModelShape, known_config
from compress.models.text.sentence_transformers import TRANSFORMER

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIX = "random:"
# Weights that write into the residual stream, as the common architectures name them.
_RESIDUAL = re.compile(r"(?:o_proj|down_proj|output\.dense|attn\.Wo|mlp\.Wo|to_out|net\.2)\.weight$")
# Weights that are look-up tables, not linear layers.
_TABLE = re.compile(r"(?:embed\w*|wte|wpe)\.weight$|latents$")
_CONFIGS = ("", "text_config", "latent_attention_config")
STAND_IN_VOCABULARY = 8_000


@dataclass(frozen=True)
class RandomSpec:
    """The content of a name `random:MODEL[,field=value...]`."""

    model: str
    """Name of the model whose shape is used."""
    overrides: Mapping[str, Any]
    """Values that replace fields of the model's config, by field name."""

    @classmethod
    def parse(cls, text: str) -> RandomSpec:
        """Parse a name.

        Raises:
            UserError: an override is not of the form `field=value`.
        """
        model, *settings = text.removeprefix(PREFIX).split(",")
        if model.startswith(PREFIX):
            raise UserError(f"model {text!r}: random weights of {model!r}, which are random already", f"example: {PREFIX}minilm")
        overrides = {}
        for setting in settings:
            field, sign, value = setting.partition("=")
            if not field or not sign:
                raise UserError(f"model {text!r}: {setting!r} is not field=value", f"example: {PREFIX}{model},num_hidden_layers=8")
            try:
                overrides[field.strip()] = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):  # of a literal that is nested thousands of levels deep
                overrides[field.strip()] = value
        return cls(model, overrides)

    @property
    def name(self) -> str:
        """The model's name in results."""
        return PREFIX + ",".join([self.model, *(f"{field}={value}" for field, value in self.overrides.items())])


def random_config(spec: RandomSpec, folder: ModelFolder | None) -> dict[str, Any]:
    """Return the config with the overrides applied, read from `folder` or, if that is None, from this package's listing.

    Raises:
        UserError: the config has no such field, or this package does not list the model.
    """
    config = known_config(spec.model) if folder is None else copy.deepcopy(folder.config)
    if config is None:
        raise UserError(f"model {spec.name!r}: {spec.model!r} is neither a folder nor a model whose shape is listed")
    sections = [section for section in (config.get(name) if name else config for name in reversed(_CONFIGS)) if section]
    for field, value in spec.overrides.items():
        holders = [section for section in sections if field in section]
        if not holders:
            fields = sorted({name for section in sections for name in section})
            raise UserError(f"model {spec.name!r}: its config has no field {field!r}", nearest(field, fields))
        for section in holders:
            section[field] = value
        if field == "hidden_size" and "latent_attention_config" in config:
            config["latent_attention_config"] |= {"hidden_dim": value, "latent_dim": value}
    if spec.overrides:
        check_config(config, f"model {spec.name[:200]!r}")
    return config


def random_shape(spec: RandomSpec, folder: ModelFolder | None) -> ModelShape:
    """Return the shape that a random checkpoint would have, without writing one."""
    import tempfile

    from compress.models.network.build import empty_network

    config = random_config(spec, folder)
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        one_piece_tokenizer(Path(temporary))
        tensors = empty_network(ModelFolder(spec.name, Path(temporary))).state_dict()
    return ModelShape(spec.name, {name: TensorInfo("BF16", tuple(tensor.shape)) for name, tensor in tensors.items()}, config)


def random_checkpoint(spec: RandomSpec, folder: ModelFolder | None, seed: int = 0) -> Path:
    """Write a checkpoint with random bfloat16 weights and return its path. An existing one is reused, an interrupted one continued.

    Matrices are drawn from N(0, 1 / inputs). Those that write into the residual stream are also divided by sqrt(2 x blocks), as in
    GPT-2 (Radford et al. 2019, section 2.3), so that activations keep their scale at any depth. Tables are drawn from N(0, 1).
    Norm weights are one, biases zero. Each tensor is determined by the seed and its name.

    Args:
        spec: the model and its overrides.
        folder: the model's files, for its config and tokenizer; None for a model that this package lists. That one gets a stand-in
            tokenizer (BPE, trained on the embedded suite), which makes about as many tokens per text, but other ids.
        seed: seed of the weights.

    Raises:
        UserError: see `random_config`; or the disk is full.
    """
    config = random_config(spec, folder)
    digest = hashlib.sha256(json.dumps([config, seed], sort_keys=True).encode()).hexdigest()[:8]
    target = cache_root() / "random" / f"{spec.model.rstrip('/').rpartition('/')[2]}-{digest}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}{LOCK}"), str(target), wait=True, say=_say):
        if not target.exists():  # another process may have written it in the meantime
            _write_checkpoint(spec, folder, config, target, seed)
    return target


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write_checkpoint(spec: RandomSpec, folder: ModelFolder | None, config: dict[str, Any], target: Path, seed: int) -> None:
    """Write a random checkpoint under a temporary name, segment by segment, and rename it."""
    from compress.models.files.shards import join_shards, shard, write_tensors
    from compress.models.network.build import empty_network
    from compress.models.network.segments import segments_of

    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    write_text_atomic(partial / "config.json", json.dumps(config, indent=1) + "\n")
    _copy_text_files(folder, partial, config)
    network = empty_network(ModelFolder(spec.name, partial))
    segments = segments_of(network)
    state = network.state_dict()
    needed = 2 * sum(tensor.numel() for tensor in state.values())
    written = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    free = shutil.disk_usage(partial).free
    if needed - written > free:
        raise UserError(f"model {spec.name!r}: {needed / 1e9:,.2f} GB to write, {free / 1e9:,.2f} GB free in {partial}")
    _say(f"writing random weights, {needed / 1e9:,.2f} GB, to {target}")
    blocks = _blocks(network)
    for index, segment in enumerate(segments):
        path = shard(partial, index, len(segments))
        if not path.exists():
            names = [name for name in state if segment.owns(name)]
            write_tensors(path, {name: random_tensor(name, tuple(state[name].shape), blocks, seed) for name in names})
    join_shards(partial, len(segments))
    mark = {"of": spec.model, "overrides": spec.overrides, "seed": seed}
    write_text_atomic(partial / RANDOM_FILE, json.dumps(mark) + "\n")
    with naming(target):
        sync_tree(partial)
        partial.rename(target)
        sync_folder(target.parent)


def _blocks(network: nn.Module) -> int:
    from compress.models.network.pooling import backbone_of

    return int(backbone_of(network).config.num_hidden_layers)  # type: ignore[union-attr, arg-type]


def is_residual(name: str) -> bool:
    """Whether a tensor is the weight of a layer that writes into the residual stream."""
    return _RESIDUAL.search(name) is not None


def random_std(name: str, shape: tuple[int, ...], blocks: int) -> float | None:
    """Return the standard deviation of a tensor; None for norms (ones) and biases (zeros)."""
    if len(shape) < 2:
        return None
    std = 1.0 if _TABLE.search(name) else 1 / math.sqrt(shape[-1])
    return std / math.sqrt(2 * blocks) if is_residual(name) else std


def random_tensor(name: str, shape: tuple[int, ...], blocks: int, seed: int) -> torch.Tensor:
    """Draw one tensor in bfloat16; see `random_checkpoint`."""
    import torch

    std = random_std(name, shape, blocks)
    if std is None:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)


def _copy_text_files(folder: ModelFolder | None, target: Path, config: Mapping[str, Any]) -> None:
    """Copy tokenizer, pooling and prompts from the model's folder to a random checkpoint, or write a stand-in tokenizer."""
    if folder is None:
        backbone = config.get("text_config") or config
        _stand_in_tokenizer(int(backbone["vocab_size"]), target / "tokenizer.json")
        # The class that takes tokenizer.json as it stands, whatever the architecture's own is. RoBERTa's positions begin at 2.
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if "max_position_embeddings" in backbone:
            settings["model_max_length"] = int(backbone["max_position_embeddings"]) - 2
        (target / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return
    for path in folder.transformer.iterdir():
        if path.suffix in (".json", ".txt", ".model") and path.name != "config.json" and "safetensors" not in path.name:
            shutil.copyfile(own_file(folder.path, path), target / path.name)
    modules = folder.path / "modules.json"
    if not modules.exists():
        return
    entries = read_json(modules)
    for entry, module in zip(entries, folder.modules, strict=True):  # whose paths were seen to stay inside of the folder
        if module.kind == TRANSFORMER:
            entry["path"] = ""
        elif entry["path"] and module.folder.is_dir():
            _copy_module(folder.path, module.folder, target / entry["path"], config)
    (target / "modules.json").write_text(json.dumps(entries), encoding="utf-8")
    prompts = folder.path / "config_sentence_transformers.json"
    if prompts.exists():
        shutil.copyfile(own_file(folder.path, prompts), target / prompts.name)


def _copy_module(model: Path, folder: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy a module's settings and weights; Pooling is told the width of the network that the overrides have made."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file():
            shutil.copyfile(own_file(model, path), target / path.name)
    settings = target / "config.json"
    if not settings.exists():
        return
    content = read_object(settings)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        if key in content and "hidden_size" in config and any(name.startswith("pooling_mode") for name in content):
            content[key] = config["hidden_size"]
    settings.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _stand_in_tokenizer(vocabulary: int, path: Path) -> None:
    """Write a BPE tokenizer that is set up like Mistral's and trained on the embedded suite."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    size = min(vocabulary, STAND_IN_VOCABULARY)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, max_token_length=16, show_progress=False)
    tokenizer.train_from_iterator(suite_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))


def one_piece_tokenizer(folder: Path) -> None:
    """Write the smallest tokenizer there is, for a folder whose network alone is asked for."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n', encoding="utf-8")
