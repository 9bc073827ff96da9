"""The embedded reference model: small, an NV-Embed like any other, and good enough that a loss shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests_support import folder_of

import compress
from compress.measure.accuracy.score import score_task
from compress.measure.accuracy.tasks import find_tasks
from compress.methods.distill.student import Student
from compress.models.embedder import Embedder
from compress.models.source import find
from compress.models.text.nv_embed import MODEL_TYPE
from compress.models.text.tokens import open_tokenizer
from compress.pipeline.recipe_file import read_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "distill-nano.yaml"
PROMPT = "Instruct: Retrieve semantically similar text\nQuery: "


@pytest.fixture(scope="module")
def nano() -> Path:
    return find("nano").path


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return compress.load("nano", device="cpu")


def test_it_is_small(nano: Path) -> None:
    assert folder_of(nano).shape.parameters <= 12e6
    assert sum(path.stat().st_size for path in nano.iterdir()) <= 24e6


def test_it_is_what_its_recipe_makes(nano: Path) -> None:
    student = read_recipe(RECIPE).steps[0].student  # type: ignore[attr-defined]
    assert isinstance(student, Student)
    headers = folder_of(nano).headers
    assert {name: info.shape for name, info in headers.items()} == student.tensors()
    assert {info.dtype for info in headers.values()} == {"F16"}
    assert open_tokenizer(nano).get_vocab_size() == student.vocabulary


def test_it_is_an_nv_embed_whose_prompt_is_not_pooled(nano: Path, embedder: Embedder) -> None:
    assert folder_of(nano).config["model_type"] == MODEL_TYPE
    assert not find("nano").is_variant
    assert find("nano").licence == "apache-2.0"
    assert not embedder.spec.pool_prompt
    text = "the parcel never came"
    plain, prompted = embedder.encode([text]), embedder.encode([text], PROMPT)
    assert 0.9 < float((plain * prompted).sum()) < 1 - 1e-5  # attention sees it, and it was taught to change little


def test_texts_beside_it_change_no_vector(embedder: Embedder) -> None:
    texts = ["rain", "the parcel never came, and nobody could say where it had gone", "", "who wrote it " * 60]
    np.testing.assert_allclose(np.concatenate([embedder.encode([text]) for text in texts]), embedder.encode(texts), atol=1e-5)


@pytest.mark.slow
def test_its_scores_are_near_its_teacher_s_and_a_prompt_costs_little(embedder: Embedder, minilm: Path) -> None:
    teacher = compress.load(str(minilm), device="cpu")
    (task,) = find_tasks(["MiniSTS"], None)
    plain, prompted = (score_task(embedder, task, None, {"MiniSTS": prompt}).score for prompt in ("", PROMPT))
    assert plain > 0.8 * score_task(teacher, task).score
    assert prompted > 0.97 * plain
