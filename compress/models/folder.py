"""A model's folder. Each of its files is read once; all other code gets this object, never a path to read again.

No torch here. transformers is imported only when a tokenizer or config is read through it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.common.errors import UserError
from compress.common.inputs import read_json
from compress.common.lazy import attribute
from compress.models.architectures import OWN_ARCHITECTURES, OwnArchitecture
from compress.models.files.headers import TensorInfo, fingerprint, read_header, weight_files
from compress.models.files.variant import VARIANT_FILE, VariantInfo
from compress.models.shape import ModelShape, without_task_head
from compress.models.text.spec import EmbedderSpec, Module, read_modules, read_spec, transformer_of
from compress.models.text.tokens import TextTokenizer, open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RANDOM_FILE = "random.json"
"""The file that marks a checkpoint with random weights."""
LONGEST = 2**31 - 1


@dataclass(frozen=True)
class ModelFolder:
    """The folder of a model, a variant or an export."""

    name: str
    """The model's name in records and messages."""
    path: Path
    """The path of the folder."""

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
        """The modules that `modules.json` lists, in order; empty if there is no such file."""
        return read_modules(self.path)

    @cached_property
    def transformer(self) -> Path:
        """The path of the network's own files: the Transformer module's folder in `modules.json`, else the folder itself."""
        return transformer_of(self.path, self.modules)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The network's `config.json`.

        Raises:
            UserError: the file is missing, or is not JSON.
        """
        path = self.transformer / "config.json"
        if not path.exists():
            raise UserError(
                f"{self.transformer}: no config.json", "a model's folder holds config.json, tokenizer files and safetensors weights"
            )
        config: dict[str, Any] = read_json(path)
        return config

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
            return attribute(own.config)(self.transformer)
        from transformers import AutoConfig

        path, kind = self.transformer / "config.json", self.config.get("model_type", "missing")
        try:
            config = AutoConfig.from_pretrained(self.transformer, local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: model_type {kind!r} is not an architecture that this version runs") from error
        if config.is_encoder_decoder:
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
    def headers(self) -> dict[str, TensorInfo]:
        """The tensors that the headers of the weight files list, by stored name. No tensor is read."""
        return {name: info for path in self.weight_files for name, info in read_header(path).items()}

    @property
    def has_exact_weights(self) -> bool:
        """Whether the weight files hold exactly the network's tensors, under the network's names."""
        return self.is_variant or self.own_architecture is not None

    @cached_property
    def shape(self) -> ModelShape:
        """The model's tensors and config, from which costs are computed."""
        return ModelShape(self.name, without_task_head(self.headers), self.config)

    @property
    def dimension(self) -> int:
        """Width of the model's vectors."""
        return self.shape.hidden_size

    @cached_property
    def spec(self) -> EmbedderSpec:
        """How the model takes texts and pools tokens.

        Raises:
            UserError: a module, pooling mode or setting is not supported.
        """
        if self.variant is not None:
            return self.variant.spec
        own = self.own_architecture
        return read_spec(self.path, self.modules) if own is None else attribute(own.spec)(self.transformer)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer, which truncates texts to the model's maximum length.

        The maximum comes from the folder's settings. Without one it is the smaller of the tokenizer's limit and the network's
        number of positions, as in sentence-transformers.

        Raises:
            UserError: there is no tokenizer, or it has no Rust implementation.
        """
        if self.variant is not None:
            return TextTokenizer(open_tokenizer(self.path), self.variant.max_length, self.spec)
        if self.own_architecture is not None:
            # The original code loads tokenizer.json directly too; transformers is not needed for it.
            return TextTokenizer(open_tokenizer(self.transformer), self.spec.max_length or LONGEST, self.spec)
        backend, longest = self._transformers_tokenizer()
        positions = getattr(self.network_config, "max_position_embeddings", None) or LONGEST
        return TextTokenizer(backend, self.spec.max_length or min(longest, positions, LONGEST), self.spec)

    def _transformers_tokenizer(self) -> tuple[Tokenizer, int]:
        """Return the tokenizer as transformers sets it up, and its `model_max_length`."""
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.transformer, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.transformer}: no tokenizer that transformers can load ({reason})") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(f"{self.transformer}: {type(tokenizer).__name__} has no Rust tokenizer (tokenizer.json)")
        return backend, int(tokenizer.model_max_length)

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
        found = re.search(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", card.read_text(encoding="utf-8"), re.M | re.S)
        return found.group(1).strip("\"'") if found else None
