"""Models that tests align to each other: copies of a tiny model whose vectors are turned, stretched or cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from compress.data.texts import calibration_texts, mixed_texts


def texts_file(folder: Path, count: int = 700) -> Path:
    """A file of texts, none of which is in the embedded suite's data as it stands."""
    path = folder / "texts.txt"
    made = [*calibration_texts(), *mixed_texts(count, 1)]
    path.write_text("\n".join(text.replace("\n", " ") for text in made[:count]), encoding="utf-8")
    return path


def with_dense(model: Path, target: Path, matrix: np.ndarray, *, normalize: bool = True, similarity: str | None = None) -> Path:
    """A copy of a model with a Dense module before its normalisation; matrix: [inputs, outputs]."""
    shutil.copytree(model, target)
    (target / "2_Dense").mkdir()
    save_file({"linear.weight": np.ascontiguousarray(matrix.T, dtype=np.float32)}, target / "2_Dense" / "model.safetensors")
    settings = {"in_features": matrix.shape[0], "out_features": matrix.shape[1], "bias": False}
    settings["activation_function"] = "torch.nn.modules.linear.Identity"
    (target / "2_Dense" / "config.json").write_text(json.dumps(settings))
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")] + (
        [("3_Normalize", "Normalize")] if normalize else []
    )
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    (target / "modules.json").write_text(json.dumps(entries))
    if similarity is not None:
        (target / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}, "similarity_fn_name": similarity}))
    return target


def turn(width: int, seed: int = 1) -> np.ndarray:
    """A rotation of a space, float64 [width, width]."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]
