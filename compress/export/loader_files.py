"""Files that loaders need in addition to weights: the tokenizer, sentence-transformers' modules."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compress.common.files import write_json
from compress.common.inputs import read_json
from compress.export.base import Exportable
from compress.models.files.variant import VariantInfo
from compress.models.text.spec import Pooling

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
    shutil.copy(opened.folder.path / "tokenizer.json", folder / "tokenizer.json")
    settings = tokenizer_config(read_json(folder / "tokenizer.json"), config, opened.info.max_length)
    write_json(folder / "tokenizer_config.json", settings)


def write_modules(opened: Exportable, folder: Path) -> None:
    """Write the files of sentence-transformers: modules, pooling, prompts, maximum length."""
    width = opened.network.config.hidden_size  # type: ignore[union-attr]
    for name, content in sentence_transformers_files(opened.info, int(width)).items():  # type: ignore[arg-type]
        write_json(folder / name, content)
    if opened.info.spec.normalize:
        (folder / "2_Normalize").mkdir()


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
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if spec.normalize else [])
    prompts = dict(spec.prompts)
    default = next((name for name, text in prompts.items() if text == spec.default_prompt), None) if spec.default_prompt else None
    if spec.default_prompt and default is None:
        default = "default"
        prompts[default] = spec.default_prompt
    return {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"{MODULES}.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": info.max_length, "do_lower_case": spec.lowercase},
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": spec.pooling is Pooling.CLS,
            "pooling_mode_mean_tokens": spec.pooling is Pooling.MEAN,
            "pooling_mode_lasttoken": spec.pooling is Pooling.LAST,
            "include_prompt": spec.pool_prompt,
        },
        "config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": default, "similarity_fn_name": "cosine"},
    }
