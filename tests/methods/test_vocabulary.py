"""Vocabulary pruning: texts that need no dropped token keep their vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests_support import TEXTS, compress_to, estimated_shapes, folder_of, half_exact, same_names, stored_shapes

import compress
from compress.methods.vocabulary import Vocabulary
from compress.models.files.variant import VariantInfo


@pytest.mark.parametrize("kind", ["bert", "nv_embed"])
def test_texts_that_need_no_dropped_token_keep_their_vectors(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    compress_to(folder, tmp_path / "v", Vocabulary(texts=str(tmp_path / "texts.txt")))
    whole, small = (compress.load(str(path), device="cpu") for path in (folder, tmp_path / "v"))
    np.testing.assert_allclose(small.encode(TEXTS), whole.encode(TEXTS), atol=1e-6)
    unseen = ["a quite different sentence about umbrellas", "☂ 雨"]
    assert np.isfinite(small.encode(unseen)).all()
    info, config = VariantInfo.read(tmp_path / "v"), json.loads((tmp_path / "v" / "config.json").read_text())
    kept = info.steps[0]["tokens"]
    table = folder_of(tmp_path / "v").shape.token_table
    assert stored_shapes(tmp_path / "v")[f"{table}.weight"][0] == kept == (config.get("text_config") or config)["vocab_size"]
    assert kept < stored_rows(folder)
    step = Vocabulary(texts=str(tmp_path / "texts.txt"), tokens=kept)
    assert same_names(estimated_shapes(folder, step), stored_shapes(tmp_path / "v"))


def stored_rows(folder: Path) -> int:
    shape = folder_of(folder).shape
    return shape.tensors[f"{shape.token_table}.weight"].shape[0]
