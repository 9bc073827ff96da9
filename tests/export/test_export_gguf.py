"""GGUF files, read by the package of llama.cpp's authors: values, names and order; and tokenizers by what llama.cpp does with them."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import SHARED
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compress.common.errors import UserError
from compress.data.texts import suite_texts
from compress.export import export
from compress.export.gguf_vocabulary import GGUFVocabulary, read_vocabulary
from compress.layers.compressed import CompressedLinear
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.methods.base import Method
from compress.methods.prune.depth import Depth
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")

TEXTS = ["", "a", "The Parcel never came.", "Ünïcödé ñ, naïve", "日本語 and English", "🙂 1 2 345", "x" * 70, *suite_texts()[:20]]


def contents(out: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, object]]:
    """Return tensors as the values that they stand for, their kinds, and the header."""
    reader = gguf.GGUFReader(out / "model.gguf")
    values = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return values, kinds, {name: field.contents() for name, field in reader.fields.items()}


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of a rotated projection in llama.cpp's order: row j of a head's first half beside row j of its second."""
    rows = weight.unflatten(0, (heads, -1))
    half = rows.shape[1] // 2
    return torch.stack([rows[:, :half], rows[:, half:]], dim=2).reshape(weight.shape)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "kind"),
    [(4, 32, True, "Q4_0"), (4, 64, False, "Q4_1"), (3, 32, False, "Q4_1"), (2, None, True, "Q4_1"), (8, None, True, "Q8_0")],
)
def test_blocks_stand_for_the_variant_s_values(
    decoder: Path, make_variant, filled, tmp_path: Path, bits: int, group_size: int | None, symmetric: bool, kind: str
) -> None:
    step = RTN(
        bits=bits, group_size=group_size, symmetric=symmetric, activations="none", skip=("*.down_proj",) if bits == 2 else ()
    )
    run = make_variant(decoder, step, Embeddings(bits=8))
    values, kinds, header = contents(export(run, "gguf", tmp_path / "out", check=False))
    network = filled(run)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    compared = 0
    for name, module in network.named_modules():
        if not isinstance(module, CompressedLinear):
            continue
        _, block, inner = name.split(".", 2)
        found = f"blk.{block}.{names[inner]}.weight"
        expected = module.values()
        if inner.endswith(("q_proj", "k_proj")):
            expected = neighbours(expected, 4 if inner.endswith("q_proj") else 2)
        spacing = expected.abs().amax().item() / 2 ** (bits - 1)  # scales and least values are rounded to half precision
        np.testing.assert_allclose(values[found], expected.numpy(), rtol=1e-3, atol=5e-3 * spacing)
        assert kinds[found] == kind
        compared += 1
    assert compared == (12 if bits == 2 else 14)
    table = network.embed_tokens
    assert isinstance(table, QuantizedEmbedding)
    np.testing.assert_allclose(values["token_embd.weight"], table(torch.arange(600)).numpy(), rtol=1e-3)
    assert kinds["token_embd.weight"] == "Q8_0"
    np.testing.assert_array_equal(values["output_norm.weight"], network.norm.weight.float().numpy())
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    wanted = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 5e4, "llama.attention.causal": True, "llama.pooling_type": 1,
    }  # fmt: skip
    assert header.items() >= wanted.items()


def test_mxfp4_is_copied(decoder: Path, make_variant, filled, tmp_path: Path) -> None:
    run = make_variant(decoder, RTN(format="mxfp4", activations="none"))
    values, kinds, _ = contents(export(run, "gguf", tmp_path / "out", check=False))
    network = filled(run)
    for found, weight in {
        "blk.0.attn_q.weight": neighbours(network.layers[0].self_attn.q_proj.values(), 4),
        "blk.1.attn_v.weight": network.layers[1].self_attn.v_proj.values(),
        "blk.1.ffn_down.weight": network.layers[1].mlp.down_proj.values(),
    }.items():
        np.testing.assert_array_equal(values[found], weight.numpy())
        assert kinds[found] == "MXFP4"


def test_a_bert_with_a_block_less(minilm: Path, make_variant, filled, tmp_path: Path) -> None:
    run = make_variant(minilm, Depth(drop=(2, 3, 4)))
    values, kinds, header = contents(export(run, "gguf", tmp_path / "out", check=False))
    network = filled(run)
    last = network.encoder.layer[2]
    for found, tensor in {
        "token_embd.weight": network.embeddings.word_embeddings.weight,
        "position_embd.weight": network.embeddings.position_embeddings.weight,
        "token_types.weight": network.embeddings.token_type_embeddings.weight,
        "blk.2.attn_k.weight": last.attention.self.key.weight,
        "blk.2.attn_output.bias": last.attention.output.dense.bias,
        "blk.2.attn_output_norm.weight": last.attention.output.LayerNorm.weight,
        "blk.2.ffn_down.weight": last.output.dense.weight,
        "blk.2.layer_output_norm.bias": last.output.LayerNorm.bias,
    }.items():
        np.testing.assert_array_equal(values[found], tensor.float().detach().numpy())
    assert "blk.3.attn_k.weight" not in values
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_up.bias"], kinds["position_embd.weight"]) == ("F16", "F32", "F32")
    wanted = {"bert.block_count": 3, "bert.attention.causal": False, "bert.pooling_type": 1, "bert.context_length": 512}
    assert header.items() >= wanted.items()


def words_of(text: str) -> list[str]:
    """Cut a text as llama.cpp does for BERT: lower case without accents; punctuation and ideographs stand alone."""
    cut = []
    for sign in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(sign)
        if kind == "Mn" or (kind.startswith("C") and not sign.isspace()):
            continue
        alone = kind.startswith("P") or (sign.isascii() and kind.startswith("S")) or 0x4E00 <= ord(sign) <= 0x9FFF
        cut.append(f" {sign} " if alone else sign)
    return "".join(cut).split()


def longest_pieces(found: GGUFVocabulary, text: str) -> list[int]:
    """Split words into the longest tokens, as llama.cpp's tokenizer for BERT does; words carry the mark of a beginning."""
    ids = {token: index for index, token in reversed(list(enumerate(found.tokens)))}
    made = [found.special["bos"]]
    for word in words_of(text):
        marked, pieces, start = f"▁{word}", [], 0
        while start < len(marked):
            end = next((end for end in range(len(marked), start, -1) if marked[start:end] in ids), None)
            if end is None:
                pieces = [found.special["unk"]]
                break
            pieces.append(ids[marked[start:end]])
            start = end
        made += pieces
    return [*made, found.special["sep"]]


def test_wordpiece(minilm: Path) -> None:
    found = read_vocabulary(minilm / "tokenizer.json", 30522)
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for text in TEXTS:
        assert longest_pieces(found, text) == tokenizer.encode(text).ids, text


def best_merges(found: GGUFVocabulary, text: str) -> list[int]:
    """Merge the neighbours whose token has the highest score, leftmost first, as llama.cpp's tokenizer for Llama does."""
    assert found.scores is not None
    ids = {token: index for index, token in enumerate(found.tokens) if found.types[index] == "NORMAL"}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(-found.scores[ids[a + b]], place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    made = [found.special["bos"]] * found.starts
    for part in parts:
        made += [ids[part]] if part in ids else [found.tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return [*made, found.special["eos"]] if found.ends else made


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As NV-Embed's without its head: merges, bytes for what is unknown, a token before the text and one behind."""
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=[*special, *octets], max_token_length=9)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # only while it is trained, so that no token spans words
    tokenizer.train_from_iterator(suite_texts(), trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    path = tmp_path_factory.mktemp("llama") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_merges(llama_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_file(str(llama_tokenizer))
    size = tokenizer.get_vocab_size() + 5
    found = read_vocabulary(llama_tokenizer, size)
    assert len(found.tokens) == len(found.types) == size
    assert found.types[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert found.types[-5:] == ["UNUSED"] * 5
    for text in TEXTS:
        assert best_merges(found, text) == tokenizer.encode(text).ids, text


def test_merges_of_nv_embed() -> None:
    path = SHARED / "reference" / "nv-embed-v2" / "tokenizer.json"
    if not path.exists():
        pytest.skip("no tokenizer of NV-Embed-v2 beside this checkout (../shared/reference)")
    tokenizer = Tokenizer.from_file(str(path))
    found = read_vocabulary(path, 32000)
    for text in TEXTS[1:]:
        assert best_merges(found, text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("normalizer", {"type": "NFKC"}, "normalises or splits texts"),
        ("pre_tokenizer", {"type": "Punctuation", "behavior": "Isolated"}, "normalises or splits texts"),
        ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}, "ByteLevel"),
    ],
)
def test_a_tokenizer_that_does_otherwise_is_refused(llama_tokenizer: Path, tmp_path: Path, key: str, value, words: str) -> None:
    changed = tmp_path / "tokenizer.json"
    changed.write_text(json.dumps(json.loads(llama_tokenizer.read_text()) | {key: value}))
    with pytest.raises(UserError, match=words):
        read_vocabulary(changed, 2000)


def test_a_tokenizer_without_bytes_is_refused(nv_embed: Path) -> None:
    found = json.loads((nv_embed / "tokenizer.json").read_text())
    found["model"]["byte_fallback"] = True
    (nv_embed.parent / "without-bytes.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="lacks tokens for single bytes"):
        read_vocabulary(nv_embed.parent / "without-bytes.json", 2000)


def test_a_cased_bert_is_refused(minilm: Path, tmp_path: Path) -> None:
    found = json.loads((minilm / "tokenizer.json").read_text())
    found["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="uncased"):
        read_vocabulary(tmp_path / "tokenizer.json", 30522)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (FP8(), "fp8 numbers"),
        (RTN(format="nvfp4", activations="none"), "nvfp4 numbers"),
        (RTN(bits=8, symmetric=False, group_size=32, activations="none"), "8 bits and are asymmetric"),
        (RTN(bits=4, group_size=16, activations="none"), "16 inputs per group"),
    ],
)
def test_what_it_cannot_hold_is_refused(decoder: Path, make_variant, tmp_path: Path, step: Method, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        export(make_variant(decoder, step), "gguf", tmp_path / "out")
    assert refused.value.message.startswith("layers.")


def test_a_table_that_it_cannot_hold_is_refused(decoder: Path, make_variant, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^embed_tokens: .*16 inputs per group"):
        export(make_variant(decoder, Embeddings(bits=4, group_size=16)), "gguf", tmp_path / "out")


def test_other_architectures_are_refused(make_model, make_variant, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this kind of roberta model"):
        export(make_variant(make_model("roberta"), Embeddings(bits=8)), "gguf", tmp_path / "out")
