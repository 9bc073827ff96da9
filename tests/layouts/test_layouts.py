"""Folders in the layouts of public embedders: the vectors of sentence-transformers, whole and streamed, or a refusal by name.

`tiny_layouts.py` makes the folders, with random weights. Only some of them are tried here, the rest by `make test-models`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tiny_layouts
from matrix import CELLS, TEXTS, TOO_LONG, Layout, cells, expected, reference, save

import compress
from compress.common.errors import UserError

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
}
"""Layouts that are refused when they are loaded, and what the error says."""
NOT_STREAMED = {
    "albert_mean": "all 4 blocks share one set of weights",
}
"""Layouts that load and cannot yet be read block by block."""
QUICK = (
    "bert_cased_lowercased", "bert_cls_prompts", "bert_consolidated", "bert_default_prompt", "bert_legacy_names", "bert_mean",
    "bert_plain", "bert_processor_kwargs", "bert_sharded", "bert_subfolder", "bert_truncate_dim", "bert_truncation_left",
    "bert_two_weight_files", "bert_vocab_txt", "distilbert_mean", "embedding_gemma2_text", "gemma3_no_dense", "gpt2_weighted",
    "labse_dense_tanh", "modernbert_mean", "mpnet_mean", "nomic_bert_hub_config", "normalize_twice", "pooling_max",
    "pooling_new_keys_two", "pooling_weighted", "prompt_left_out_cls", "prompt_left_out_last", "prompt_left_out_mean", "qwen3_last",
    "qwen3_plain_causal", "roberta_mean", "router_st", "static_st", "stella_dense_up", "t5_dense", "weighted_layers_st",
    *TOO_LONG, *REFUSED,
)  # fmt: skip
MADE = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.models])
    for name in tiny_layouts.LAYOUTS
    if name != "xlm_roberta_sentencepiece_only" or importlib.util.find_spec("sentencepiece")  # which writes its tokenizer
]
LAYOUTS = [layout for layout in MADE if layout.values != ("bert_nan",)]  # whose weights are no numbers


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A layout's folder."""
    failed = tiny_layouts.make(tmp_path, [request.param])
    assert not failed, failed
    return tmp_path / request.param


@pytest.mark.parametrize("folder", LAYOUTS, indirect=True)
def test_vectors_are_those_of_sentence_transformers(folder: Path) -> None:
    name = folder.name
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            compress.load(folder, device="cpu")
        return
    layout = Layout(folder, folder.parent)
    texts, theirs = layout.texts, expected(layout)
    embedder = compress.load(folder, device="cpu")
    assert embedder.dimension == theirs.shape[1]
    np.testing.assert_allclose(embedder.encode(texts), theirs, atol=1e-5 * np.abs(theirs).max())
    if name in TOO_LONG:
        with pytest.raises(ValueError, match=r"texts\[3\] has \d+ tokens; .* has positions for 128"):
            embedder.encode(TEXTS)
    if name in NOT_STREAMED:
        with pytest.raises(UserError, match=NOT_STREAMED[name]):
            compress.load(folder, device="cpu", stream=True).encode(texts)
    else:
        streamed = compress.load(folder, device="cpu", stream=True).encode(texts)
        np.testing.assert_allclose(streamed, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "folder", ["prompt_left_out_mean", "prompt_left_out_cls", "prompt_left_out_last", "bert_cls_prompts"], indirect=True
)
def test_prompts_are_pooled_as_the_folder_says(folder: Path) -> None:
    theirs = reference(folder, TEXTS[1:3], "search for this: ")
    made = compress.load(folder, device="cpu").encode(TEXTS[1:3], "search for this: ")
    np.testing.assert_allclose(made, theirs, atol=1e-5 * np.abs(theirs).max())


WHOLE_ROWS: dict[str, list[pytest.MarkDecorator]] = {"static_st": [], "bert_mean": [pytest.mark.slow]}
"""Layouts of which `make test` or `make test-slow` fills the whole row; `make test-models` fills all."""


@pytest.mark.parametrize(
    "folder",
    [pytest.param(*layout.values, marks=WHOLE_ROWS.get(str(layout.values[0]), [pytest.mark.models])) for layout in MADE],
    indirect=True,
)
def test_every_cell_meets_its_bar_or_is_refused(folder: Path) -> None:
    row = cells(folder)
    save(folder.name, row)
    missed = {column: cell.value for column, cell in row.items() if not cell.good}
    assert not missed
    assert set(row) in ({"load"}, set(CELLS))
