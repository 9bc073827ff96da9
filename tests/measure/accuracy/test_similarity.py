"""Vectors are compared as the model's own settings say, in scores and in exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import folder_of

from compress.common.errors import UserError
from compress.export.loader_files import sentence_transformers_files
from compress.measure.accuracy.score import MtebEncoder
from compress.models.text.spec import EmbedderSpec


class Given:
    """An embedder of which only the spec is asked."""

    name = "given"

    def __init__(self, similarity: str) -> None:
        self.spec = EmbedderSpec(similarity=similarity)  # type: ignore[arg-type]


A = np.array([[3.0, 4.0], [1.0, 0.0]], dtype=np.float32)
B = np.array([[6.0, 8.0], [0.0, 2.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("similarity", "each", "pairs"),
    [
        ("cosine", [[1.0, 0.8], [0.6, 0.0]], [1.0, 0.0]),
        ("dot", [[50.0, 8.0], [6.0, 0.0]], [50.0, 0.0]),
        ("euclidean", [[-5.0, -(13**0.5)], [-(89**0.5), -(5**0.5)]], [-5.0, -(5**0.5)]),
        ("manhattan", [[-7.0, -5.0], [-13.0, -3.0]], [-7.0, -3.0]),
    ],
)
def test_the_model_s_own_similarity_scores(similarity: str, each: list[list[float]], pairs: list[float]) -> None:
    encoder = MtebEncoder(Given(similarity))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.as_tensor(encoder.similarity(A, B)).float(), torch.tensor(each), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.as_tensor(encoder.similarity_pairwise(A, B)).float(), torch.tensor(pairs), atol=1e-5, rtol=1e-5
    )


def test_it_is_read_from_the_settings_and_written_into_exports(bert: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(bert)
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {}, "similarity_fn_name": "dot"}))
    spec = folder_of(folder).spec
    assert spec.similarity == "dot"

    class Info:
        """What the files of an export are made from."""

        max_length = 48

    info = Info()
    info.spec = spec  # type: ignore[attr-defined]
    written = sentence_transformers_files(info, 48)  # type: ignore[arg-type]
    assert written["config_sentence_transformers.json"]["similarity_fn_name"] == "dot"

    settings.write_text(json.dumps({"prompts": {}, "similarity_fn_name": "angular"}))
    with pytest.raises(UserError, match=r"config_sentence_transformers\.json: similarity_fn_name: .*got 'angular'"):
        _ = folder_of(folder).spec
    settings.write_text(json.dumps({"prompts": {}, "similarity_fn_name": None}))
    assert folder_of(folder).spec.similarity == "cosine"
