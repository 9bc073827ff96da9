"""Texts, prompts, and a teacher that is asked once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests_support import TEXTS

import compress
from compress.common.errors import UserError
from compress.data.texts import read_texts
from compress.measure.accuracy.tasks import evaluated_texts, find_tasks
from compress.methods.distill.batches import tokenized
from compress.methods.distill.data import Lessons, Teacher, different, lessons
from compress.methods.distill.method import Distill
from compress.models.source import find


def test_a_teacher_is_asked_once_and_another_one_anew(bert: Path, copy_of, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.methods.distill import data

    opened: list[str] = []
    real = data.open_source

    def counting(source, **how: object):
        opened.append(source.name)
        return real(source, **how)

    monkeypatch.setattr(data, "open_source", counting)
    taught = Lessons(TEXTS[:3], ["", "", "a: "], ["", "", "a: "])
    first = Teacher(find(str(bert)), "cpu").vectors(taught)
    np.testing.assert_array_equal(Teacher(find(str(bert)), "cpu").vectors(taught), first)
    assert len(opened) == 1
    changed = copy_of(bert)
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(bytes(content))
    Teacher(find(str(changed)), "cpu").vectors(taught)
    assert len(opened) == 2


def test_prompts_go_before_their_share_of_the_texts(texts: Path, nv_embed: Path) -> None:
    read = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    taught = lessons(read, 200, ["p: ", "q: "], 0.5, same_prompts=False, seed=0)
    assert 60 < sum(prompt != "" for prompt in taught.prompts) < 140
    assert {"", "p: ", "q: "} == set(taught.prompts)
    assert set(taught.teacher_prompts) == {""}
    embedder = compress.load(str(nv_embed), device="cpu")
    prompt = next(text for text in embedder.spec.prompts.values() if text)
    rows = tokenized(embedder.tokenizer, ["a text", "a text"], ["", prompt], embedder.spec, 10_000)  # type: ignore[arg-type]
    _, mask, pooled = rows.batch(np.array([0, 1]))
    length = embedder.tokenizer.prompt_length(prompt)
    assert pooled[1, :length].sum() == 0
    assert pooled.sum(dim=1).tolist()[1] == int(mask[1].sum()) - length
    with pytest.raises(ValueError, match="400 different texts, 500 are needed"):
        lessons(read, 500, (), 0, same_prompts=True, seed=0)


def test_texts_that_are_evaluated_on_are_not_trained_on(texts: Path) -> None:
    tasks = find_tasks(["MiniSTS", "MiniRetrieval"], None)
    evaluated = evaluated_texts(tasks)
    judged = next(iter(tasks[0].mteb.dataset["test"]["sentence1"]))
    texts.write_text(
        "\n".join(json.dumps({"text": text}) for text in (judged, f"  {judged.upper()} ", "another one", "another one"))
    )
    assert different(str(texts), evaluated) == (["another one"], 2)
    assert len(different(str(texts), frozenset())[0]) == 3


def test_texts_come_from_a_dataset_too(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"said": text, "n": 1}) + "\n" for text in TEXTS[:3]))
    assert read_texts(f"hub:{folder}:said") == TEXTS[:3]
    assert different(f"hub:{folder}:said:train", frozenset(["x"]))[0] == TEXTS[:3]
    assert Distill(texts=f"hub:{folder}:said").reads == ()
    with pytest.raises(UserError, match="no column 'sad'"):
        read_texts(f"hub:{folder}:sad")
    with pytest.raises(UserError, match="does not hold one string a row"):
        read_texts(f"hub:{folder}:n")
    with pytest.raises(UserError, match="OWNER/NAME:COLUMN"):
        read_texts(f"hub:{folder}")
    with pytest.raises(UserError, match="cannot be loaded"):
        read_texts(f"hub:{tmp_path / 'nowhere'}:said")
