"""A model's folder. Each of its files is read once; all other code gets this object, never a path to read again.

No torch here. transformers is imported only when a tokenizer or config is read through it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.common.errors import UserError, first_line
from compress.common.inputs import read_text
from compress.common.lazy import attribute
from compress.models.architectures import ENCODERS, OWN_ARCHITECTURES, OwnArchitecture, one_set_of_blocks
from compress.models.files.config import CONFIG_FILE, check_blocks, check_floating, check_rows, read_config
from compress.models.files.headers import StoredTensor, TensorInfo, fingerprint, stored_tensors, weight_files
from compress.models.files.variant import VARIANT_FILE, VariantInfo
from compress.models.remote_config import RENAMED_SETTINGS, own_settings
from compress.models.shape import ModelShape, without_task_head
from compress.models.text.router import Routes, read_routes
from compress.models.text.sentence_transformers import (
    WEIGHTED_LAYERS,
    Module,
    TransformerSettings,
    gives_all_layers,
    read_modules,
    read_settings,
    read_spec,
    transformer_of,
)
from compress.models.text.spec import EmbedderSpec
from compress.models.text.static import MODEL_TYPE as STATIC_TYPE
from compress.models.text.static import StaticFiles, read_static
from compress.models.text.tokens import TextTokenizer, check_tokenizer, open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RANDOM_FILE = "random.json"
"""The file that marks a checkpoint with random weights."""
LONGEST = 2**31 - 1
LEARNED_POSITIONS = re.compile(r"(?:^|\.)(?:position_embeddings|wpe)\.weight$")
FAIRSEQ_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "roberta-prelayernorm",
    "xmod",
    "data2vec-text",
)
NOT_WEIGHTS = re.compile(r"(?:^|\.)(?:position_ids|token_type_ids|num_batches_tracked|masked_bias|bias_mask|attn\.bias)$")
"""Buffers of checkpoints that are integers or truth values."""
NATIVE = ("nomic_bert", "jina_embeddings_v3", "gte")
"""Model types whose checkpoints name remote code, and which transformers 5 computes itself, from the same files. The files keep the
names that the remote code gives to tensors."""


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model, a variant or an export."""

    name: str
    """The model's name in records and messages."""
    path: Path
    """The path of the folder."""
    way: tuple[Module, ...] | None = None
    """The modules of one route of a Router, whose model this then is; None: those that `modules.json` lists."""

    @cached_property
    def variant(self) -> VariantInfo | None:
        """The content of `variant.json`; None if the folder is not a variant.

        Raises:
            UserError: this version does not read the file's format.
        """
        return VariantInfo.read(self.path) if (self.path / VARIANT_FILE).is_file() else None

    @property
    def is_variant(self) -> bool:
        """Whether the folder is a variant that this workbench wrote."""
        return self.variant is not None

    @cached_property
    def compressed(self) -> VariantInfo:
        """The content of `variant.json`, for code that needs a variant.

        Raises:
            UserError: the folder is not a variant.
        """
        if self.variant is None:
            raise UserError(f"{self.path}: holds no variant", "`compress run RECIPE` writes one; give the folder of that run")
        return self.variant

    @cached_property
    def is_random(self) -> bool:
        """Whether the weights are random, which makes the vectors meaningless."""
        return not self.variant.pretrained if self.variant else (self.path / RANDOM_FILE).exists()

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """The modules that `modules.json` lists, in order; empty if there is no such file.

        Raises:
            UserError: a Router is among them, so that there are several lists of modules; `routes` has them.
        """
        if self.way is not None:
            return self.way
        if self.routes is not None:
            raise self.routes.refusal()
        return self._listed

    @cached_property
    def _listed(self) -> tuple[Module, ...]:
        return read_modules(self.path)

    @cached_property
    def routes(self) -> Routes | None:
        """The modules for each task, of a model with a Router; None: all texts pass the same modules."""
        return None if self.way is not None else read_routes(self.path / "modules.json", self._listed)

    def along(self, way: tuple[Module, ...]) -> ModelFolder:
        """Return the model whose modules are those of one route; `way`: one of `routes.ways`."""
        return replace(self, way=way)

    @cached_property
    def transformer(self) -> Path:
        """The path of the network's own files: the Transformer module's folder in `modules.json`, else the folder itself."""
        return transformer_of(self.path, self.modules)

    @cached_property
    def static(self) -> StaticFiles | None:
        """The files of a static table in another library's layout; None for every other model and for variants.

        Raises:
            UserError: see `read_static`.
        """
        return None if self.is_variant else read_static(self.path, self.modules)

    @property
    def is_static(self) -> bool:
        """Whether the model is a static table, a variant of one included."""
        return bool(self.config.get("model_type") == STATIC_TYPE)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The network's `config.json`; for a static table the one that its variants have.

        Raises:
            UserError: see `read_config`; or the folder is not that of an embedder.
        """
        if self.static is not None:
            return self.static.config
        config = read_config(self.transformer)
        self._check_config(self.transformer / CONFIG_FILE, config)
        return own_settings(self.transformer / CONFIG_FILE, config)

    def _check_config(self, path: Path, config: Mapping[str, Any]) -> None:
        """See that the folder is that of an embedder, and whole.

        Raises:
            UserError: it is not.
        """
        if (self.transformer / "adapter_config.json").exists():
            raise UserError(
                f"{self.transformer}: a LoRA adapter lies next to the weights, which are those of its base model",
                "merge it first: peft's PeftModel.merge_and_unload() and save_pretrained()",
            )
        kind = str(config.get("model_type"))
        if "AutoModel" in (config.get("auto_map") or {}) and kind not in (*OWN_ARCHITECTURES, *NATIVE):
            own = f"transformers' own {kind}" if kind in _architectures() else f"anything: model_type {kind!r} is not known"
            raise UserError(
                f"{path}: auto_map: the network is remote code ({config['auto_map']['AutoModel']}), which is never run, "
                f"and may compute something else than {own}",
                "if transformers' own is meant, remove auto_map from config.json",
            )
        architecture = str((config.get("architectures") or [""])[0])
        if architecture.endswith("ForSequenceClassification"):
            raise UserError(f"{path}: architectures: {architecture} is a classifier or a reranker, not an embedder")

    @property
    def own_architecture(self) -> OwnArchitecture | None:
        """The model's entry in `OWN_ARCHITECTURES`; None if transformers provides its architecture."""
        return OWN_ARCHITECTURES.get(str(self.config.get("model_type")))

    @cached_property
    def network_config(self) -> Any:
        """The network's config as a transformers config object, read from local files without running code from the checkpoint.

        Raises:
            UserError: the architecture is unknown, or is an encoder-decoder.
        """
        own = self.own_architecture
        if own is not None:
            return attribute(own.config)(self.config)
        from transformers import AutoConfig

        path, kind = self.transformer / CONFIG_FILE, self.config.get("model_type", "missing")
        try:
            if kind in RENAMED_SETTINGS:  # which transformers would not recognise in the file
                return AutoConfig.for_model(**{**self.config, **self.settings.config})
            config = AutoConfig.from_pretrained(
                self.transformer, local_files_only=True, trust_remote_code=False, **self.settings.config
            )
        except UserError:  # of the settings, which are read here
            raise
        except (ValueError, KeyError) as error:
            if kind in _architectures():
                raise UserError(f"{path}: {first_line(error)}") from error
            raise UserError(f"{path}: model_type {kind!r} is not an architecture that this version runs") from error
        except Exception as error:  # of the types and values of its keys: whatever it is, transformers does not take them
            raise UserError(f"{path}: transformers does not take it: {first_line(error)}") from error
        if config.is_encoder_decoder and config.model_type not in ENCODERS:
            raise UserError(f"{path}: {config.model_type} is an encoder-decoder; embedders are encoders or decoders")
        return config

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The paths of the network's safetensors files.

        Raises:
            UserError: there are none. Pickles are never opened.
        """
        return tuple(weight_files(self.transformer))

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors of the network and of the modules after it, by the names that they have or will have in the network.

        Raises:
            UserError: weights of a checkpoint are not floating-point numbers.
        """
        if self.static is not None:
            return self._with_head(dict(self.static.tensors))
        found = stored_tensors(self.transformer)
        if self.is_variant:
            return found
        config = self.config  # before the tensors are judged: it says of quantized weights who has quantized them
        if config.get("model_type") in NATIVE:  # others' names are the network's, but for what stands before them
            found = attribute("compress.models.network.build:stored_in_network")(self, found)
        found = self._with_head(found)
        check_floating(found, NOT_WEIGHTS)
        return found

    def check_sizes(self) -> None:
        """See that the config asks for no more blocks, tokens and positions than the files have: else memory runs out first.

        Raises:
            UserError: it does.
        """
        if self.is_static:
            return  # tokens may share rows, and there are no blocks
        place, infos, shape = self.transformer / CONFIG_FILE, self.headers, self.shape
        sizes = self.config.get("text_config") or self.config
        if isinstance(sizes.get("num_hidden_layers"), int) and one_set_of_blocks(sizes) is None:
            check_blocks(place, sizes["num_hidden_layers"], infos)
        table = f"{shape.token_table}.weight"
        check_rows(place, "vocab_size", sizes.get("vocab_size"), infos[table].shape[0] if table in infos else None)
        rows = max((info.shape[0] for name, info in infos.items() if LEARNED_POSITIONS.search(name)), default=None)
        check_rows(place, "max_position_embeddings", sizes.get("max_position_embeddings"), rows)

    def _with_head(self, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Add the tensors of the modules that have some, each of which has a folder of its own."""
        averaging = [module.folder for module in self.modules if module.kind == WEIGHTED_LAYERS]
        if averaging and gives_all_layers(self.settings, self.config):
            found |= {f"text_head.layers.{name}": tensor for name, tensor in stored_tensors(averaging[0]).items()}
        weighted = [module for module in self.modules if module.kind in ("Dense", "LayerNorm", "Normalize")]
        for number, module in enumerate(weighted):
            if module.kind != "Normalize":
                found |= {f"text_head.after.{number}.{name}": tensor for name, tensor in stored_tensors(module.folder).items()}
        return found

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        """The tensors that these files list, by their stored names; no tensor is read."""
        return {name: tensor.info for name, tensor in self.tensors.items()}

    @property
    def has_exact_weights(self) -> bool:
        """Whether the weight files hold exactly the network's tensors, under the network's names."""
        return self.is_variant or self.own_architecture is not None

    @cached_property
    def shape(self) -> ModelShape:
        """The model's tensors and config, from which costs are computed."""
        return ModelShape(self.name, without_task_head(self.headers, self.config.get("model_type")), self.config)

    @property
    def dimension(self) -> int:
        """Width of the model's vectors."""
        return self.spec.dimension(self.shape.output_width)

    @property
    def shape_to_compress(self) -> ModelShape:
        """The model's shape with what steps check before a run begins.

        Raises:
            UserError: see `spec`.
        """
        return replace(self.shape, vector_width=self.dimension)

    @cached_property
    def spec(self) -> EmbedderSpec:
        """How the model takes texts and pools tokens.

        Raises:
            UserError: a module, pooling mode or setting is not supported.
        """
        if self.variant is not None:
            return self.variant.spec
        if self.static is not None:
            return self.static.spec
        own = self.own_architecture
        if own is not None:
            spec: EmbedderSpec = attribute(own.spec)(self.transformer)
            return spec
        found = read_spec(self.path, self.modules, self.settings, self.config, self._transformers_tokenizer[2])
        sizes = [*self.config.values(), *(self.config.get("text_config") or {}).values()]
        if found.token_width is not None and found.token_width not in sizes:
            raise UserError(
                f"{self.path}: its Pooling module has word_embedding_dimension {found.token_width}, "
                f"and config.json has hidden_size {self.shape.hidden_size}",
                "the two are of different models",
            )
        return found

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer, which truncates texts to the model's maximum length.

        The maximum comes from the folder's settings. Without one it is the smaller of the tokenizer's limit and the network's
        number of positions, as in sentence-transformers.

        Raises:
            UserError: there is no tokenizer, or it has no Rust implementation.
        """
        if self.variant is not None:
            backend = open_tokenizer(self.path)
            return TextTokenizer(backend, self.variant.max_length, self.spec, self.positions, self.token_rows)
        if self.static is not None:
            return TextTokenizer(self.static.tokenizer, self.spec.max_length or LONGEST, self.spec)
        if self.own_architecture is not None:
            # The original code loads tokenizer.json directly too; transformers is not needed for it.
            return TextTokenizer(open_tokenizer(self.transformer), self.spec.max_length or LONGEST, self.spec)
        backend, longest, _ = self._transformers_tokenizer
        positions = getattr(self.network_config, "max_position_embeddings", None) or LONGEST
        return TextTokenizer(
            backend, self.spec.max_length or min(longest, positions, LONGEST), self.spec, self.positions, self.token_rows
        )

    @property
    def token_rows(self) -> int | None:
        """Number of rows of the token table; None where it is not known by its name, or tokens may share rows."""
        if self.is_static:
            return None
        table = f"{self.shape.token_table}.weight"
        return self.shape.tensors[table].shape[0] if table in self.shape.tensors else None

    @property
    def positions(self) -> int | None:
        """Number of tokens that the network has learned positions for; None where positions are computed."""
        tables = [info.shape[0] for name, info in self.headers.items() if LEARNED_POSITIONS.search(name)]
        if not tables:
            return None
        # These count positions from the pad token's id on (fairseq's convention): its row and those before it are never used.
        unused = int(self.config.get("pad_token_id") or 0) + 1 if self.config.get("model_type") in FAIRSEQ_POSITIONS else 0
        return min(tables) - unused

    @cached_property
    def settings(self) -> TransformerSettings:
        """The settings of the Transformer module.

        Raises:
            UserError: a key is not known, or asks for what this workbench does not do.
        """
        return read_settings(self.transformer)

    @cached_property
    def _transformers_tokenizer(self) -> tuple[Tokenizer, int, str]:
        """The tokenizer as transformers sets it up, its `model_max_length`, and the end at which it cuts."""
        from tokenizers import Tokenizer, normalizers
        from transformers import AutoTokenizer

        check_tokenizer(self.transformer)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.transformer, local_files_only=True, trust_remote_code=False, **self.settings.tokenizer
            )
        except Exception as error:  # of its own, of JSON and of the Rust library: whatever it is, there is no tokenizer
            raise UserError(f"{self.transformer}: no tokenizer that transformers can load ({first_line(error)})") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(f"{self.transformer}: {type(tokenizer).__name__} has no Rust tokenizer (tokenizer.json)")
        if self.settings.lowercase and not _lowercases(backend):
            # As sentence-transformers does it: before the tokenizer's own normalizer, so that special tokens stay as they are.
            backend.normalizer = normalizers.Sequence(
                [normalizers.Lowercase(), *([backend.normalizer] if backend.normalizer else [])]
            )
        return backend, int(tokenizer.model_max_length), str(tokenizer.truncation_side)

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hex digits of a SHA-256 over the weights, configs and tokenizer."""
        return fingerprint(self.path, self.transformer)

    @cached_property
    def licence(self) -> str | None:
        """The licence from the variant, else from the front matter of the model card; None if neither names one."""
        if self.variant is not None:
            return self.variant.licence
        card = self.path / "README.md"
        if not card.exists():
            return None
        found = re.search(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", read_text(card), re.M | re.S)
        return found.group(1).strip("\"'") if found else None


def _architectures() -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING


def _lowercases(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's normalizer holds a `Lowercase`."""
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    return any(step.get("type") == "Lowercase" for step in normalizer.get("normalizers", [normalizer]))
