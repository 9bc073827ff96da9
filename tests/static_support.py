"""Static tables in the folders of sentence-transformers and of model2vec, and what these libraries say the vectors are."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

TEXTS = [
    "", "a", "the parcel never came", "rain by the evening " * 90, "日本語の文章です。 emoji 🙂", "[CLS] who [PAD] wrote it", "one two three",
]  # fmt: skip
WIDTH = 24


def uncut(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer that neither cuts nor pads."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    return own


def table(tokenizer: Tokenizer, *, rows: int | None = None, dtype: str = "float32") -> np.ndarray:
    """Random vectors for a tokenizer's tokens."""
    return np.random.default_rng(0).standard_normal((rows or tokenizer.get_vocab_size(), WIDTH)).astype(dtype)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def model2vec_folder(folder: Path, tokenizer: Tokenizer, tensors: dict[str, np.ndarray], **config: object) -> Path:
    """Write a folder as model2vec's `save_pretrained` does, without the `modules.json` that it adds for sentence-transformers."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "model2vec", "architectures": ["StaticModel"], **config})
    return folder


def shared_tensors(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The tensors of a model whose vocabulary model2vec has quantized: tokens share 40 vectors and have factors."""
    tokens, random = tokenizer.get_vocab_size(), np.random.default_rng(1)
    mapping = random.integers(0, 40, tokens).astype(np.int32)
    return {
        "embeddings": table(tokenizer, rows=40),
        "mapping": mapping,
        "weights": random.uniform(0.2, 3, tokens).astype(np.float32),
    }


def static_embedding_folder(
    folder: Path, tokenizer: Tokenizer, tensors: dict[str, np.ndarray], *after: str, place: str = "", **settings: object
) -> Path:
    """Write a folder with StaticEmbedding in the given place and modules without settings after it."""
    (folder / place).mkdir(parents=True)
    tokenizer.save(str(folder / place / "tokenizer.json"))
    save_file(tensors, folder / place / "model.safetensors")
    modules = [(place, "StaticEmbedding"), *((f"{number}_{kind}", kind) for number, kind in enumerate(after, start=1))]
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", entries)
    for path, _ in modules[1:]:
        write_json(folder / path / "config.json", {})
    if settings:
        write_json(folder / "config_sentence_transformers.json", settings)
    return folder


def as_model2vec(
    tokenizer: Tokenizer, tensors: dict[str, np.ndarray], texts: list[str], normalize: bool, max_length: int | None = 512
) -> np.ndarray:
    """What `StaticModel.encode` of model2vec 0.10 gives, stated plainly, in float64."""
    plain = uncut(tokenizer)
    unknown = plain.token_to_id("[UNK]")
    median = int(statistics.median([len(token) for token in plain.get_vocab()]))
    vectors = []
    for text in texts:
        cut = text if max_length is None else text[: max_length * median]
        ids = plain.encode(cut, add_special_tokens=False).ids[:max_length]
        ids = [number for number in ids if number != unknown]
        rows = tensors["embeddings"].astype(np.float64)
        found = [
            rows[tensors["mapping"][number] if "mapping" in tensors else number]
            * (float(tensors["weights"][number]) if "weights" in tensors else 1.0)
            for number in ids
        ]
        mean = np.mean(found, axis=0) if found else np.zeros(rows.shape[1])
        vectors.append(mean / (np.linalg.norm(mean) + 1e-32) if normalize else mean)
    return np.array(vectors)
