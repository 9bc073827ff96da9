"""Files that loaders need in addition to weights: the tokenizer, sentence-transformers' modules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compress.common.files import write_json
from compress.common.inputs import own_file, read_object
from compress.export.base import Exportable, head_tensors
from compress.models.files.shards import write_tensors
from compress.models.files.variant import VariantInfo
from compress.models.text.sentence_transformers import LEGACY_POOLINGS, TRANSFORMER, WEIGHTED_LAYERS
from compress.models.text.spec import EmbedderSpec, HeadModule
from compress.models.text.tokens import TOKENIZER_BYTES

MODULES = "sentence_transformers.models"
# Usual names of special tokens, for tokenizers whose special tokens no file describes.
USUAL = {
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "pad_token": ("[PAD]", "<pad>", "<|endoftext|>", "</s>", "<eos>"),
}


def write_tokenizer(opened: Exportable, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    config = opened.folder.config
    shutil.copyfile(own_file(opened.folder.path, opened.folder.path / "tokenizer.json"), folder / "tokenizer.json")
    settings = tokenizer_config(read_object(folder / "tokenizer.json", TOKENIZER_BYTES), config, opened.info.max_length)
    settings["truncation_side"] = opened.info.spec.truncation_side
    write_json(folder / "tokenizer_config.json", settings)


def write_modules(opened: Exportable, folder: Path) -> None:
    """Write the files of sentence-transformers: modules, pooling, prompts, maximum length."""
    spec = opened.info.spec
    width = spec.token_width or opened.folder.shape.output_width
    for name, content in sentence_transformers_files(opened.info, width).items():
        write_json(folder / name, content)
    for path, kind in listed_modules(spec):
        (folder / path).mkdir(exist_ok=True)
        if kind == WEIGHTED_LAYERS:
            write_tensors(folder / path / "model.safetensors", head_tensors(opened, "layers"))
    for number, (path, kind) in enumerate(after_pooling(spec)[: len(spec.modules)]):
        if kind != "Normalize":
            write_tensors(folder / path / "model.safetensors", head_tensors(opened, f"after.{number}"))


def listed_modules(spec: EmbedderSpec) -> list[tuple[str, str]]:
    """Return the folder and the kind of each module in `modules.json`, in order."""
    kinds = [*([WEIGHTED_LAYERS] if spec.layers else []), "Pooling", *(module.kind for module in spec.modules)]
    if spec.normalize:
        kinds.append("Normalize")
    return [("", TRANSFORMER), *((f"{number}_{kind}", kind) for number, kind in enumerate(kinds, start=1))]


def after_pooling(spec: EmbedderSpec) -> list[tuple[str, str]]:
    """Return those of `listed_modules` that come after Pooling."""
    return listed_modules(spec)[3 if spec.layers else 2 :]


def tokenizer_config(tokenizer: dict[str, Any], config: dict[str, Any], max_length: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`: a class that uses `tokenizer.json` unchanged, and special tokens."""
    added = {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens", []) if entry.get("special")}
    named = {f"{kind}_token": config.get(f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    special = {key: added[number] for key, number in named.items() if number in added}
    for key, usual in USUAL.items():
        name = next((name for name in usual if name in added.values()), None)
        if key not in special and name is not None:
            special[key] = name
    if "pad_token" not in special and added:  # padding is masked, so any token will do
        special["pad_token"] = added.get(config.get("eos_token_id"), next(iter(added.values())))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **special,
    }


def sentence_transformers_files(info: VariantInfo, width: int) -> dict[str, Any]:
    """Return the files that sentence-transformers reads, by name; `width`: width of the token vectors."""
    spec = info.spec
    prompts = dict(spec.prompts)
    default = next((name for name, text in prompts.items() if text == spec.default_prompt), None) if spec.default_prompt else None
    if spec.default_prompt and default is None:
        default = "default"
        prompts[default] = spec.default_prompt
    return {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"{MODULES}.{kind}"}
            for index, (path, kind) in enumerate(listed_modules(spec))
        ],
        "sentence_bert_config.json": {"max_seq_length": info.max_length, "do_lower_case": spec.lowercase},
        **_weighted_layers(spec, width),
        f"{2 if spec.layers else 1}_Pooling/config.json": {
            "word_embedding_dimension": width,
            # Keys that every version reads, where they say it all: they have no order.
            **(
                {key: mode in spec.poolings for key, mode in LEGACY_POOLINGS.items()}
                if len(spec.poolings) == 1
                else {"pooling_mode": list(spec.poolings)}
            ),
            "include_prompt": spec.pool_prompt,
        },
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": default,
            "similarity_fn_name": spec.similarity,
            **({"truncate_dim": spec.dimensions} if spec.dimensions else {}),
        },
        **{
            f"{path}/config.json": _module_config(module)
            for module, (path, _) in zip(spec.modules, after_pooling(spec), strict=False)
            if module.kind != "Normalize"
        },
    }


def _weighted_layers(spec: EmbedderSpec, width: int) -> dict[str, Any]:
    """Return the settings of WeightedLayerPooling, by file; empty where only the last block's output is pooled."""
    if spec.layers is None:
        return {}
    settings = {"word_embedding_dimension": width, "layer_start": spec.layers.start, "num_hidden_layers": spec.layers.blocks}
    return {f"1_{WEIGHTED_LAYERS}/config.json": settings}


def _module_config(module: HeadModule) -> dict[str, Any]:
    """Return the settings of a module between pooling and the final vector."""
    if module.kind == "LayerNorm":
        return {"dimension": module.width}
    return {
        "in_features": module.inputs,
        "out_features": module.width,
        "bias": module.bias,
        "activation_function": module.activation,
        **({"use_residual": True} if module.residual else {}),
    }
