"""New students: tensors as planned, token embeddings from the teacher, a tokenizer from the texts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_support import SMALL
from safetensors.torch import load_file
from tests_support import TEXTS, compress_to, folder_of
from tokenizers import Tokenizer

import compress
from compress.common.journal import Journal
from compress.data.texts import suite_texts
from compress.methods.distill.method import Distill
from compress.methods.distill.student import Student, initial_weights, spelled, table_from
from compress.models.files.variant import VariantInfo
from compress.models.network.build import empty_network
from compress.models.opened import weights_of
from compress.models.source import find
from compress.pipeline.apply import make_variant
from compress.pipeline.stage import BuildOptions


@pytest.mark.parametrize("architecture", ["nv-embed", "mistral", "bert"])
def test_a_new_student_has_the_tensors_that_were_planned_and_learns_with_all_of_them(
    bert: Path, texts: Path, tmp_path: Path, architecture: str
) -> None:
    student = Student(architecture=architecture, **SMALL | ({"kv_heads": 1} if architecture != "bert" else {}))  # type: ignore[arg-type]
    read = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    student.write(tmp_path / "new", read)
    made = initial_weights(tmp_path / "new", None, seed=0)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == student.tensors()
    step = Distill(texts=str(texts), held_out=40, student=student, steps=6, batch=16, every=3, learning_rate=5e-3, precision="no")
    compress_to(bert, tmp_path / "v", step)
    shape = step.estimate(folder_of(bert).shape).after
    info = VariantInfo.read(tmp_path / "v")
    assert info.spec.normalize
    assert shape.parameters == folder_of(tmp_path / "v").shape.parameters
    trained = empty_network(folder_of(tmp_path / "v"))
    weights_of(folder_of(tmp_path / "v"), trained).fill(trained, dtype=torch.float32)
    before = initial_weights(tmp_path / "new", lambda strings: compress.load(str(bert), device="cpu").encode(strings, ""), seed=0)
    unused = {"embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight"}  # rows that no text reaches
    for name, tensor in trained.state_dict().items():
        if name.endswith("key.bias"):  # adds the same to all of a query's scores, which softmax does not see
            continue
        changed = (tensor - before[name]).abs()
        assert changed.max() > 1e-3, name  # half precision alone would move it less
        if name not in unused and tensor.dim() == 1:
            assert (changed > 0).float().mean() > 0.5, name
    assert np.isfinite(compress.load(str(tmp_path / "v"), device="cpu").encode(TEXTS)).all()


def test_tokens_begin_as_the_teacher_s_vectors_of_their_strings(minilm: Path, tmp_path: Path) -> None:
    student = Student(**SMALL | {"width": 384, "heads": 6})  # type: ignore[arg-type]
    student.write(tmp_path, list(suite_texts()))
    teacher = compress.load("minilm", device="cpu")
    made = initial_weights(tmp_path, lambda strings: teacher.encode(strings), seed=0)["embedding_model.embed_tokens.weight"].numpy()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = teacher.encode(["water"])[0]
    number = tokenizer.token_to_id("▁water")
    assert number is not None
    assert spelled(tokenizer)[number] == "water"
    centre = teacher.encode(spelled(tokenizer)).mean(axis=0)
    cosine = made[number] @ (expected - centre) / np.linalg.norm(made[number]) / np.linalg.norm(expected - centre)
    assert cosine == pytest.approx(1, abs=1e-4)


def test_a_table_keeps_what_its_width_can_hold() -> None:
    generator = np.random.default_rng(0)
    low = (generator.standard_normal((100, 3)) @ generator.standard_normal((3, 20))).astype(np.float32)
    table = table_from(low, 3)
    exact = (low - low.mean(axis=0)) @ (low - low.mean(axis=0)).T
    scale = np.trace(exact) / np.trace(table @ table.T)
    np.testing.assert_allclose(scale * (table @ table.T), exact, atol=1e-2)
    assert table_from(low, 30).shape == (100, 30)


def test_a_new_student_s_tokenizer_never_sees_what_is_evaluated(bert: Path, texts: Path, tmp_path: Path) -> None:
    word = "zyxwvutsrq"
    with texts.open("a") as file:
        file.writelines(json.dumps({"text": f"{word} {word} {number}"}) + "\n" for number in range(300))
    step = Distill(texts=str(texts), held_out=40, student=Student(**SMALL), steps=2, batch=16, every=2, precision="no")  # type: ignore[arg-type]
    evaluated = frozenset(f"{word} {word} {number}" for number in range(300))
    for name, left_out in (("seen", frozenset[str]()), ("unseen", evaluated)):
        journal = Journal(tmp_path / f"{name}-journal")
        made = make_variant(
            find(str(bert)),
            folder_of(bert).shape,
            [step],
            tmp_path / name,
            journal,
            BuildOptions("0", lambda _: None, evaluated=partial(frozenset, left_out)),
        )
        assert made[0]["found"]["left_out"] == len(left_out)
        assert [look["step"] for look in made[0]["found"]["curve"]] == [2]
        known = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")).get_vocab()
        assert (f"▁{word}" in known) == (name == "seen")


def test_tokens_may_begin_at_random(bert: Path, texts: Path, tmp_path: Path) -> None:
    tables = []
    for number, tokens in enumerate(("teacher", "random")):
        student = Student(**SMALL | {"tokens": tokens})  # type: ignore[arg-type]
        step = Distill(
            texts=str(texts), held_out=40, student=student, steps=1, batch=16, every=1, learning_rate=1e-9, precision="no"
        )
        compress_to(bert, tmp_path / str(number), step)
        tables.append(load_file(tmp_path / str(number) / "model.safetensors")["embedding_model.embed_tokens.weight"].float())
    expected = initial_weights(tmp_path / "1", None, seed=0)["embedding_model.embed_tokens.weight"]
    torch.testing.assert_close(tables[1], expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(tables[0], tables[1], atol=1e-2)
