"""Folders in the layouts of public embedders: the vectors of sentence-transformers, whole and streamed, or a refusal by name.

`tiny_layouts.py` makes the folders, with random weights. Only some of them are tried here, the rest by `make test-models`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_layouts
import torch
from sentence_transformers import SentenceTransformer

import compress
from compress.common.errors import UserError

TEXTS = [
    "",
    "a",
    "The parcel never came.",
    "rain by the evening " * 40,
    "日本語の文章です。 emoji 🙂",
    "Who wrote IT ΣΑΣ? [CLS] <s>",
    "one two three four five six seven eight nine ten eleven twelve",
]
REFUSED = {
    "bert_adapter": "a LoRA adapter lies next to the weights",
    "bert_no_pooling_file": "1_Pooling/config.json: missing",
    "bert_no_pooling_module": "no Pooling module",
    "bert_pickle": "holds only pickled weights",
    "bert_quantized_checkpoint": "quantized by another library",
    "bert_remote_code": "the network is remote code",
    "bert_remote_code_same_names": "the network is remote code",
    "chat_template_st6": "texts go through the chat template",
    "cross_encoder_plain": "is a classifier or a reranker",
    "cross_encoder_st6": "is a classifier or a reranker",
    "llama_remote_type": "the network is remote code",
    "multi_vector_st6": "module 'MultiVectorMask' is not supported",
    "normalize_by_remote_module": "is code of the repository's own",
    "qwen2_remote_code": "the network is remote code",
    "router_st": "module 'Router' is not supported",
    "static_st": "module 'StaticEmbedding' is not supported",
    "weighted_layers_st": "module 'WeightedLayerPooling' is not supported",
}
"""Layouts that are refused when they are loaded, and what the error says."""
TOO_LONG = ("bert_length_beyond", "xlm_roberta_no_length")
"""Layouts whose settings allow more tokens than the network has positions for; sentence-transformers fails on such texts."""
NO_EMPTY_TEXT = ("gpt2_weighted",)
"""Layouts whose tokenizer adds nothing to an empty text, on which sentence-transformers fails."""
NOT_STREAMED = {
    "albert_mean": "all 4 blocks share one set of weights",
    "nomic_bert_mean": "does not fit its network",
}
"""Layouts that load and cannot yet be read block by block."""
QUICK = (
    "bert_cased_lowercased", "bert_cls_prompts", "bert_consolidated", "bert_default_prompt", "bert_legacy_names", "bert_mean",
    "bert_plain", "bert_processor_kwargs", "bert_sharded", "bert_subfolder", "bert_truncate_dim", "bert_truncation_left",
    "bert_two_weight_files", "bert_vocab_txt", "distilbert_mean", "embedding_gemma2_text", "gemma3_no_dense", "gpt2_weighted", "labse_dense_tanh", "modernbert_mean", "mpnet_mean",
    "normalize_twice", "pooling_max", "pooling_new_keys_two", "pooling_weighted", "prompt_left_out_cls", "prompt_left_out_last",
    "prompt_left_out_mean", "qwen3_last", "qwen3_plain_causal", "roberta_mean", "stella_dense_up", "t5_dense", *TOO_LONG, *REFUSED,
)  # fmt: skip
LAYOUTS = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.models])
    for name in tiny_layouts.LAYOUTS
    # Whose own tokenizer is not installed, whose weights are no numbers, and what transformers itself cannot load.
    if name not in ("xlm_roberta_sentencepiece_only", "bert_nan", "nomic_bert_hub_config")
]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A layout's folder."""
    failed = tiny_layouts.make(tmp_path, [request.param])
    assert not failed, failed
    return tmp_path / request.param


def reference(folder: Path, texts: list[str], prompt: str | None = None) -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    # One at a time: padding to the left, as some models have it, is not what is compared here.
    return np.stack([np.asarray(model.encode([text], prompt=prompt), dtype=np.float32)[0] for text in texts])


@pytest.mark.parametrize("folder", LAYOUTS, indirect=True)
def test_vectors_are_those_of_sentence_transformers(folder: Path) -> None:
    name = folder.name
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            compress.load(folder, device="cpu")
        return
    texts = TEXTS if name not in TOO_LONG else [text for text in TEXTS if len(text) < 100]
    texts = texts if name not in NO_EMPTY_TEXT else [text for text in texts if text]
    expected = reference(folder, texts)
    embedder = compress.load(folder, device="cpu")
    assert embedder.dimension == expected.shape[1]
    np.testing.assert_allclose(embedder.encode(texts), expected, atol=1e-5 * np.abs(expected).max())
    if name in TOO_LONG:
        with pytest.raises(ValueError, match=r"texts\[3\] has \d+ tokens; .* has positions for 128"):
            embedder.encode(TEXTS)
    if name in NOT_STREAMED:
        with pytest.raises(UserError, match=NOT_STREAMED[name]):
            compress.load(folder, device="cpu", stream=True).encode(texts)
    else:
        streamed = compress.load(folder, device="cpu", stream=True).encode(texts)
        np.testing.assert_allclose(streamed, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "folder", ["prompt_left_out_mean", "prompt_left_out_cls", "prompt_left_out_last", "bert_cls_prompts"], indirect=True
)
def test_prompts_are_pooled_as_the_folder_says(folder: Path) -> None:
    expected = reference(folder, TEXTS[1:3], "search for this: ")
    made = compress.load(folder, device="cpu").encode(TEXTS[1:3], "search for this: ")
    np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())
