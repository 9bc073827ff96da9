"""Reads a sentence-transformers or plain transformers folder as sentence-transformers 6 does. No torch here.

What a file says and this workbench does not understand is refused by its key, so that no vector is silently another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from compress.common.errors import UserError, nearest
from compress.common.inputs import checked, checked_by, inside, read_json, read_object
from compress.models.text.spec import EmbedderSpec, HeadModule, Pooling, Similarity, WeightedLayers

PACKAGE = "sentence_transformers."
"""The package of the modules that are read; classes of a repository's own are remote code."""
TRANSFORMER, WEIGHTED_LAYERS = "Transformer", "WeightedLayerPooling"
STATIC = "StaticEmbedding"
"""The module of a static table; see `compress.models.text.static`."""
ROUTERS = ("Router", "Asym")
"""The module that has modules of its own, by its name and its older one; see `compress.models.text.router`."""
SETTINGS_FILES = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names that the Transformer module's settings have had, in the order in which sentence-transformers looks for them."""
PROMPTS_FILE = "config_sentence_transformers.json"
LEGACY_POOLINGS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED,
    "pooling_mode_lasttoken": Pooling.LAST,
}
"""Keys of `Pooling` before sentence-transformers 5.2, in the order in which their results are concatenated."""


Width = Annotated[int, Field(ge=1, le=10**9)]


class _File(BaseModel):
    """Keys of a settings file whose types are checked; all others are judged by the code that reads the file."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Entry(_File):
    """An entry of `modules.json`."""

    name: str | int | None = None
    type: str
    path: str


class _SettingsFile(_File):
    """The settings of the Transformer module; `null` is no setting."""

    max_seq_length: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    do_lower_case: bool | None = None
    processor_kwargs: dict[str, Any] | None = None
    config_kwargs: dict[str, Any] | None = None
    model_kwargs: dict[str, Any] | None = None
    modality_config: dict[str, Any] | None = None


class _PoolingFile(_File):
    """The settings of a Pooling module."""

    word_embedding_dimension: Width | None = None
    embedding_dimension: Width | None = None
    pooling_mode: str | list[str] | None = None
    include_prompt: bool = True


class _DenseFile(_File):
    """The settings of a Dense module."""

    in_features: Width
    out_features: Width
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False


class _WeightedLayersFile(_File):
    """The settings of a WeightedLayerPooling module, with sentence-transformers' defaults."""

    layer_start: Annotated[int, Field(ge=0)] = 4
    num_hidden_layers: Annotated[int, Field(ge=0)] = 12


class _LayerNormFile(_File):
    """The settings of a LayerNorm module."""

    dimension: Width


class _PromptsFile(_File):
    """What the model's own settings say of prompts, of the vectors' width and of how they are compared."""

    prompts: dict[str, str | None] | None = None
    default_prompt_name: str | None = None
    truncate_dim: Width | None = None
    similarity_fn_name: Similarity | None = None


_ENTRIES = TypeAdapter(list[_Entry])


@dataclass(frozen=True)
class Module:
    """An entry of `modules.json`."""

    kind: str
    """Name of its class, without the package."""
    folder: Path
    """Where its own files are."""


@dataclass(frozen=True)
class TransformerSettings:
    """What the settings file of the Transformer module says."""

    max_length: int | None = None
    lowercase: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for transformers' tokenizer."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for transformers' config."""


def read_modules(folder: Path) -> tuple[Module, ...]:
    """Return the modules that a folder's `modules.json` lists, in order; none where there is no such file.

    Raises:
        UserError: a class is not one of sentence-transformers' own, or this workbench does not know it.
    """
    path = folder / "modules.json"
    if not path.exists():
        return ()
    modules = []
    entries: list[_Entry] = checked_by(read_json(path), _ENTRIES, str(path))
    names = [entry.name for entry in entries if entry.name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:  # sentence-transformers keeps modules by name, and would run the last one alone
        raise UserError(f"{path}: two modules have the name {twice!r}", "give each its own name, such as its place in the list")
    for number, entry in enumerate(entries):
        modules.append(Module(kind_of(path, entry.type), inside(folder, entry.path, f"{path}: {number}.path")))
    return tuple(modules)


def kind_of(path: Path, name: str) -> str:
    """Return the kind of a module, given the full name of its class and the file that names it.

    Raises:
        UserError: the class is not one of sentence-transformers' own, or this workbench does not know it.
    """
    kind = name.rpartition(".")[2]
    if not name.startswith(PACKAGE):
        raise UserError(
            f"{path}: module {name!r} is code of the repository's own, which is never run", "use a model without remote code"
        )
    known = [TRANSFORMER, STATIC, *ROUTERS, *MODULES]
    if kind not in known:
        raise UserError(f"{path}: module {kind!r} is not supported", nearest(kind, known))
    return kind


def transformer_of(folder: Path, modules: Sequence[Module]) -> Path:
    """Return where the network's own files are: the folder of the Transformer or the static table; else the model's own."""
    return next((module.folder for module in modules if module.kind in (TRANSFORMER, STATIC)), folder)


def read_settings(transformer: Path) -> TransformerSettings:
    """Read the settings of the Transformer module.

    Raises:
        UserError: a key is not known, or asks for what this workbench does not do.
    """
    path = next((transformer / name for name in SETTINGS_FILES if (transformer / name).exists()), None)
    if path is None:
        return TransformerSettings()
    settings = read_object(path)
    for old, new in (("tokenizer_args", "processor_kwargs"), ("config_args", "config_kwargs"), ("model_args", "model_kwargs")):
        if old in settings:
            settings[new] = settings.pop(old)
    checked(settings, _SettingsFile, str(path))
    found = TransformerSettings(
        max_length=settings.pop("max_seq_length", None),
        lowercase=bool(settings.pop("do_lower_case", False)),
        tokenizer=_arguments(settings.pop("processor_kwargs", None)),
        config=_arguments(settings.pop("config_kwargs", None)),
    )
    for key, value in settings.items():
        _check_setting(path, key, value)
    return found


def _arguments(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (given or {}).items() if key != "trust_remote_code"}


# Of the network's loading: none of these changes what it computes, except for its precision, which the caller chooses here.
_HARMLESS_MODEL_KEYS = {
    "torch_dtype",
    "dtype",
    "attn_implementation",
    "add_pooling_layer",
    "low_cpu_mem_usage",
    "trust_remote_code",
}
_ONLY: Mapping[str, Any] = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
_EMPTY = ("processing_kwargs", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path")


def _check_setting(path: Path, key: str, value: Any) -> None:
    """See that a setting asks for nothing that this workbench does not do.

    Raises:
        UserError: it does, or its key is not known.
    """
    if key in _ONLY:
        if value != _ONLY[key]:
            raise UserError(f"{path}: {key} {value!r} is not that of an embedder, which has {_ONLY[key]!r}")
    elif key in _EMPTY:
        if value:
            raise UserError(f"{path}: {key} is not supported; it is {value!r}")
    elif key == "modality_config":
        if "message" in value:
            raise UserError(
                f"{path}: modality_config.message: texts go through the chat template, which this workbench does not apply",
                "save the model without it, if it was trained on plain texts",
            )
        if value.get("text", {}).get("method_output_name") != "last_hidden_state":
            raise UserError(f"{path}: modality_config.text must give last_hidden_state; it is {value.get('text')!r}")
    elif key == "model_kwargs":
        for inner in value or {}:
            if inner not in _HARMLESS_MODEL_KEYS:
                raise UserError(f"{path}: model_kwargs.{inner} is not supported")
    elif key != "unpad_inputs":  # which changes nothing but the speed
        known = ["max_seq_length", "do_lower_case", "processor_kwargs", "config_kwargs", *_ONLY, *_EMPTY]
        raise UserError(f"{path}: key {key!r} is not known", nearest(key, known))


def read_spec(
    folder: Path, modules: Sequence[Module], settings: TransformerSettings, config: Mapping[str, Any], truncation_side: str
) -> EmbedderSpec:
    """Read the spec of a sentence-transformers or plain transformers folder.

    Args:
        folder: the model's.
        modules: what `read_modules` found.
        settings: what `read_settings` found.
        config: the network's `config.json`.
        truncation_side: the end at which the tokenizer cuts.

    Raises:
        UserError: a module or a key that this workbench does not know or cannot run.
    """
    found: dict[str, Any] = {"max_length": settings.max_length, "truncation_side": truncation_side}
    if not modules:
        found["pooling"] = _default_pooling(config)
    elif not any(module.kind == "Pooling" for module in modules):
        raise UserError(f"{folder / 'modules.json'}: no Pooling module: it gives a vector for each token, not one for the text")
    after: list[HeadModule] = []
    for module in modules:
        if module.kind == TRANSFORMER:
            continue
        if module.kind == WEIGHTED_LAYERS:
            _check_weighted_layers(folder / "modules.json", found)
        read = MODULES[module.kind](module.folder)
        if isinstance(read, HeadModule):
            after.append(read)
        else:
            if "pooling" in read and after:
                raise UserError(f"{folder / 'modules.json'}: {after[-1].kind} stands before Pooling; it is supported after it only")
            found |= read
    if not gives_all_layers(settings, config):
        found.pop("layers", None)  # WeightedLayerPooling then passes on what it is given, the last block's output
    left, normalize = without_last_normalize(after)
    return EmbedderSpec(**found, modules=left, normalize=normalize, **read_prompts(folder / PROMPTS_FILE))


def without_last_normalize(after: Sequence[HeadModule]) -> tuple[tuple[HeadModule, ...], bool]:
    """Return modules without the normalisation at their end, and whether there is one."""
    left = list(after)
    while left and left[-1].kind == "Normalize":
        left.pop()
    return tuple(left), len(left) < len(after)


def gives_all_layers(settings: TransformerSettings, config: Mapping[str, Any]) -> bool:
    """Whether a Transformer module passes on the outputs of all blocks; `config`: the network's `config.json`."""
    return bool({**config, **settings.config}.get("output_hidden_states"))


def _check_weighted_layers(path: Path, before: Mapping[str, Any]) -> None:
    """See that a WeightedLayerPooling stands where it does something; `before`: what the modules before it say.

    Raises:
        UserError: it does not.
    """
    if "pooling" in before:
        raise UserError(f"{path}: {WEIGHTED_LAYERS} stands after Pooling; it is supported before it only")
    if "layers" in before:
        raise UserError(f"{path}: {WEIGHTED_LAYERS} is listed twice")


def _default_pooling(config: Mapping[str, Any]) -> Pooling:
    """Return the pooling of a plain folder: a causal language model's last token, otherwise the mean."""
    architectures = config.get("architectures") or [""]
    causal = str(architectures[0]).endswith("ForCausalLM") and config.get("is_causal", True)
    return Pooling.LAST if causal else Pooling.MEAN


def _read_config(folder: Path, kind: str, keys: type[_File]) -> tuple[Path, dict[str, Any]]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: missing, although modules.json names a {kind} module there", "download the model again")
    config = read_object(path)
    checked(config, keys, str(path))
    return path, config


def _read_pooling(folder: Path) -> dict[str, Any]:
    path, config = _read_config(folder, "Pooling", _PoolingFile)
    for key in LEGACY_POOLINGS:
        if not isinstance(config.get(key, False), bool):
            raise UserError(f"{path}: {key}: must be true or false, got {config[key]!r}")
    width = config.pop("word_embedding_dimension", None)
    width = config.pop("embedding_dimension", width)
    legacy = [mode for key, mode in LEGACY_POOLINGS.items() if config.pop(key, False)]
    modes = config.pop("pooling_mode", None) or legacy or [Pooling.MEAN]
    modes = [modes] if isinstance(modes, str) else list(modes)
    pool_prompt = bool(config.pop("include_prompt", True))
    for mode in modes:
        if mode not in list(Pooling):
            raise UserError(f"{path}: pooling {mode!r} is not supported", nearest(str(mode), list(Pooling)))
    if config:
        raise UserError(f"{path}: key {next(iter(config))!r} is not known", nearest(next(iter(config)), list(LEGACY_POOLINGS)))
    pooling = Pooling(modes[0]) if len(modes) == 1 else tuple(Pooling(mode) for mode in modes)
    return {"pooling": pooling, "pool_prompt": pool_prompt, "token_width": width}


def _read_weighted_layers(folder: Path) -> dict[str, Any]:
    path, config = _read_config(folder, WEIGHTED_LAYERS, _WeightedLayersFile)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        config.pop(key, None)  # its result is as wide as the blocks' outputs
    start, blocks = config.pop("layer_start", 4), config.pop("num_hidden_layers", 12)
    if start > blocks:
        raise UserError(f"{path}: layer_start {start} leaves none of {blocks} blocks")
    if config:
        known = ["embedding_dimension", "layer_start", "num_hidden_layers"]
        raise UserError(f"{path}: key {next(iter(config))!r} is not known", nearest(next(iter(config)), known))
    return {"layers": WeightedLayers(start=start, blocks=blocks)}


def _read_dense(folder: Path) -> HeadModule:
    path, config = _read_config(folder, "Dense", _DenseFile)
    for key in ("module_input_name", "module_output_name"):
        if config.pop(key, None) not in (None, "sentence_embedding"):
            raise UserError(f"{path}: {key} must be sentence_embedding: Dense is supported after Pooling only")
    made = HeadModule(
        kind="Dense",
        inputs=config.pop("in_features"),
        width=config.pop("out_features"),
        bias=config.pop("bias", True),
        activation=config.pop("activation_function", "torch.nn.modules.activation.Tanh"),
        residual=config.pop("use_residual", False),
    )
    if not made.activation.startswith("torch.nn."):
        raise UserError(f"{path}: activation_function {made.activation!r} is not one of torch.nn's")
    if config:
        raise UserError(f"{path}: key {next(iter(config))!r} is not known")
    return made


def _read_layer_norm(folder: Path) -> HeadModule:
    _, config = _read_config(folder, "LayerNorm", _LayerNormFile)
    return HeadModule(kind="LayerNorm", width=config["dimension"])


def _read_normalize(folder: Path) -> HeadModule:
    return HeadModule(kind="Normalize")


def _read_dropout(folder: Path) -> dict[str, Any]:
    return {}  # it does nothing outside of training


MODULES: Mapping[str, Callable[[Path], HeadModule | dict[str, Any]]] = {
    WEIGHTED_LAYERS: _read_weighted_layers,
    "Pooling": _read_pooling,
    "Dense": _read_dense,
    "LayerNorm": _read_layer_norm,
    "Normalize": _read_normalize,
    "Dropout": _read_dropout,
}
"""Modules that a model may have after its Transformer: from the module's folder to a `HeadModule`, or to fields of the spec."""


def read_prompts(path: Path) -> dict[str, Any]:
    """Return what the model's own settings say of prompts and of the vectors' width."""
    if not path.exists():
        return {}
    config = read_object(path)
    checked(config, _PromptsFile, str(path))
    kind = config.pop("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise UserError(f"{path}: model_type {kind!r} is no embedder with one vector for a text")
    prompts = config.pop("prompts", None) or {}
    found: dict[str, Any] = {"prompts": {name: text for name, text in prompts.items() if text}}
    default = config.pop("default_prompt_name", None)
    if default is not None:
        if default not in prompts:
            raise UserError(f"{path}: default_prompt_name {default!r} is not among the prompts", nearest(str(default), prompts))
        found["default_prompt"] = prompts[default] or ""
    found["dimensions"] = config.pop("truncate_dim", None)
    found["similarity"] = config.pop("similarity_fn_name", None) or "cosine"
    config.pop("__version__", None)
    if config:
        known = ["prompts", "default_prompt_name", "truncate_dim", "similarity_fn_name"]
        raise UserError(f"{path}: key {next(iter(config))!r} is not known", nearest(next(iter(config)), known))
    return found
