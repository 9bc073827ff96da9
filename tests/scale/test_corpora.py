"""`compress encode` for corpora: parts of vectors, each text once, whenever the run was killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from operator import mul
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from scale_support import contents, read_parts, some_texts, static_model, write_lines
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.common.errors import BadTextError, NotFiniteError, UserError
from compress.common.words import with_address
from compress.data.corpus import is_corpus
from compress.data.rows import Columns
from compress.measure.vectors.codec import unit
from compress.models.embedder import Vectors
from compress.runtimes.encoding import EncodeOptions
from compress.scale import encoder
from compress.scale.corpora import CorpusOptions, duration, encode_corpus
from compress.scale.encoder import Describe, Encoding, Store, Texts, make_encoder
from compress.scale.units import RayOptions, map_units


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(static_model(tmp_path_factory.mktemp("static") / "static"))


def test_parts_hold_the_vectors_of_encode(model: str, tmp_path: Path) -> None:
    texts = some_texts(50)
    rows = "".join(json.dumps({"key": f"k{number}", "body": text}) + "\n" for number, text in enumerate(texts))
    (tmp_path / "t.jsonl").write_text(rows[:-1] + '\n{"key": "k50", "body": null}\n')
    options = CorpusOptions(EncodeOptions(prompt="who "), Columns("body", "key"), part_texts=20)
    made = encode_corpus(model, str(tmp_path / "t.jsonl"), tmp_path / "v", options)
    assert (made.texts, made.dimension, made.rejected, made.parts, made.continued) == (50, 24, 1, 3, 0)
    table = read_parts(tmp_path / "v")
    assert parquet.read_table(tmp_path / "v").equals(table)  # readers of a folder pass over the other files
    assert table["id"].to_pylist() == [f"k{number}" for number in range(50)]
    expected = compress.load(model).encode(texts, "who ")
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), dtype=np.float32), expected)
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[24]"
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["compress.dimension"] == "24"
    assert metadata["compress.prompt"] == "who "
    assert len(metadata["compress.fingerprint"]) == 16
    assert json.loads((tmp_path / "v" / "_rejects.jsonl").read_text()) == {
        "part": 2, "id": "k50", "place": "t.jsonl, line 51", "reason": "is null, not a string"
    }  # fmt: skip
    assert json.loads((tmp_path / "v" / "_encode.json").read_text())["done"] == {"texts": 50, "rejected": 1, "parts": 3}


@pytest.mark.parametrize("store", ["float16", "int8", "binary"])
def test_metadata_says_what_stored_numbers_mean(model: str, tmp_path: Path, store: Store) -> None:
    texts = some_texts(40)
    lines = write_lines(tmp_path / "t.txt", texts)
    calibration = Path(write_lines(tmp_path / "c.txt", some_texts(300)))
    options = CorpusOptions(store=store, part_texts=15, calibration=calibration)
    encode_corpus(model, lines, tmp_path / "v", options)
    table = read_parts(tmp_path / "v")
    assert table["id"].to_pylist() == list(range(40))
    said = {key.decode().removeprefix("compress."): value.decode() for key, value in table.schema.metadata.items()}
    stored = np.array(table["vector"].to_pylist())
    expected = compress.load(model).encode(texts)
    if store == "binary":
        assert str(table.schema.field("vector").type) == "fixed_size_list<element: uint8>[3]"
        np.testing.assert_array_equal(
            stored, np.packbits(unit(unit(expected)) > np.array(json.loads(said["threshold"]), np.float32), axis=1)
        )
    elif store == "int8":
        assert str(table.schema.field("vector").type) == "fixed_size_list<element: int8>[24]"
        decoded = stored * np.array(json.loads(said["scale"])) + np.array(json.loads(said["offset"]))
        assert np.median(np.abs(decoded - expected)) < 0.002
        assert np.abs(decoded - expected).max() < 0.1  # few values are clipped
    else:
        assert str(table.schema.field("vector").type) == "fixed_size_list<element: halffloat>[24]"
        np.testing.assert_array_equal(stored.astype(np.float16), expected.astype(np.float16))
    before = contents(tmp_path / "v")
    assert encode_corpus(model, lines, tmp_path / "v", options).continued == 3  # nothing is done twice
    assert contents(tmp_path / "v") == before


@pytest.mark.parametrize("store", ["float32", "binary"])
def test_an_array_is_that_of_numpy_save(model: str, tmp_path: Path, store: Store) -> None:
    lines = write_lines(tmp_path / "t.txt", some_texts(50))
    options = CorpusOptions(store=store, part_texts=20)
    encode_corpus(model, lines, tmp_path / "v.npy", options)
    encode_corpus(model, lines, tmp_path / "parts", options)
    expected = np.array(read_parts(tmp_path / "parts")["vector"].to_pylist(), dtype=encoder.DTYPES[store])
    np.save(tmp_path / "expected.npy", expected)
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    said = json.loads((tmp_path / "v.encode.json").read_text())
    assert (said["texts"], said["vector_format"]) == (50, store)
    names = {"t.txt", "v.npy", "v.encode.json", "parts", "expected.npy"}
    assert {path.name for path in tmp_path.iterdir()} == names  # ids are the numbers of the rows
    (tmp_path / "t.jsonl").write_text('{"id": 7, "text": "rain"}\n{"id": 8, "text": 1}\n')
    encode_corpus(model, str(tmp_path / "t.jsonl"), tmp_path / "w.npy", CorpusOptions(columns=Columns("text", "id"), store=store))
    assert (tmp_path / "w.ids.jsonl").read_text() == "7\n"
    assert json.loads((tmp_path / "w.rejects.jsonl").read_text())["id"] == 8


KILLED = """
import os, signal, sys
from pathlib import Path
from compress.scale.corpora import CorpusOptions, encode_corpus
left, sync = int(sys.argv[4]), os.fsync
def dying(descriptor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = dying
encode_corpus(sys.argv[1], sys.argv[2], Path(sys.argv[3]), CorpusOptions(part_texts=8))
"""


@pytest.mark.parametrize("name", ["v", "v.npy"])
def test_killed_runs_leave_the_bytes_of_one_that_was_not(model: str, tmp_path: Path, name: str) -> None:
    """Killed at the first sync to the disk, the second, ...: each run goes further than the one before."""
    (tmp_path / "t.txt").write_bytes(b"\xff\n".join(f"{text}\n".encode() for text in some_texts(30)))
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    command = [sys.executable, "-c", KILLED, model, str(tmp_path / "t.txt"), str(tmp_path / "killed" / name)]
    kills = 0
    for moment in (1, 3, 4, 5, 7, 200):
        done = subprocess.run([*command, str(moment)], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    assert kills >= 4
    encode_corpus(model, str(tmp_path / "t.txt"), tmp_path / "whole" / name, CorpusOptions(part_texts=8))
    ours, theirs = ((tmp_path / place / name if name == "v" else tmp_path / place) for place in ("killed", "whole"))
    assert contents(ours) == contents(theirs)
    assert len((tmp_path / "killed" / name / "part-00000.parquet" if name == "v" else ours / name).read_bytes()) > 500


def test_a_run_is_continued_only_by_the_same_command(model: str, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.txt", some_texts(30))
    (tmp_path / "other.txt").write_text("x\n")
    options = CorpusOptions(part_texts=8)
    encode_corpus(model, lines, tmp_path / "v", options)
    other = static_model(tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "model2vec", "normalize": false}')
    for what, arguments, changed in (
        ("model", (str(other), lines), options),
        ("texts of a part", (model, lines), CorpusOptions(part_texts=9)),
        ("prompt", (model, lines), CorpusOptions(EncodeOptions(prompt="it "), part_texts=8)),
        ("vector format", (model, lines), CorpusOptions(part_texts=8, store="float16")),
        (r"input: t\.txt .*, now other\.txt", (model, str(tmp_path / "other.txt")), options),
    ):
        with pytest.raises(UserError, match=f"was begun with another {what}"):
            encode_corpus(*arguments, tmp_path / "v", changed)
    (tmp_path / "v" / "part-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00001\.parquet: is missing, and part-00002\.parquet is there"):
        encode_corpus(model, lines, tmp_path / "v", options)
    (tmp_path / "v" / "part-00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "v" / "part-00002.parquet").unlink()
    (tmp_path / "v" / "part-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet: is damaged"):
        encode_corpus(model, lines, tmp_path / "v", options)


def test_a_target_that_is_taken_is_refused(model: str, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.txt", some_texts(3))
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds other files, such as mine\.txt"):
        encode_corpus(model, lines, tmp_path / "v")
    with pytest.raises(UserError, match="is in the folder of the texts"):
        encode_corpus(model, str(tmp_path), tmp_path / "w")


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "t.txt", some_texts(30))
    encode_corpus(model, lines, tmp_path / "whole", CorpusOptions(part_texts=8))
    written, write = 0, parquet.write_table

    def fills(table: object, path: Path, **how: object) -> None:
        nonlocal written
        written += 1
        write(table, path, **how)
        if written == 3:
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(parquet, "write_table", fills)
    with pytest.raises(UserError, match=r"part-00002\.parquet: the disk is full") as caught:
        encode_corpus(model, lines, tmp_path / "v", CorpusOptions(part_texts=8))
    assert "make room" in caught.value.hint
    assert sorted(contents(tmp_path / "v")) == ["_encode.json", "part-00000.parquet", "part-00001.parquet"]
    said: list[str] = []
    assert encode_corpus(model, lines, tmp_path / "v", CorpusOptions(part_texts=8), say=said.append).continued == 2
    assert contents(tmp_path / "v") == contents(tmp_path / "whole")
    assert said == [f"{lines}: 2 parts are written; continues behind them"]


def test_long_texts_are_rejected_where_nothing_is_cut(bert: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.txt", ["rain", "rain " * 100, "it"])
    options = CorpusOptions(EncodeOptions(device="cpu"), truncate=False)
    made = encode_corpus(str(bert), lines, tmp_path / "v", options)
    assert (made.texts, made.rejected) == (2, 1)
    reject = json.loads((tmp_path / "v" / "_rejects.jsonl").read_text())
    assert (reject["id"], reject["place"]) == (1, "t.txt, line 2")
    assert reject["reason"].endswith("tokens, the model takes 48")
    np.testing.assert_array_equal(read_parts(tmp_path / "v")["id"].to_pylist(), [0, 2])


def test_a_text_that_the_model_fails_at_is_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_encoder(Encoding(model, EncodeOptions()))
    real = worker._encode

    def failing(texts: list[str]) -> Vectors:
        if "bad" in texts:
            raise BadTextError("texts[0] has 99 tokens; the model has positions for 48")
        if "worse" in texts:
            raise NotFiniteError("a vector is not finite")
        return real(texts)

    monkeypatch.setattr(worker, "_encode", failing)
    facts = worker(Describe([]))
    stored = worker(Texts(["rain", "bad", "it", "the", "worse"], facts))
    assert stored.rejected == {
        1: "has 99 tokens; the model has positions for 48",
        4: "the model gives no finite vector",
    }
    np.testing.assert_array_equal(stored.vectors, real(["rain", "it", "the"]))
    with pytest.raises(UserError, match="fails at many texts"):
        worker(Texts(["bad"] * 200, facts))


def test_few_units_are_read_ahead() -> None:
    taken: list[int] = []

    def units() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number

    made = map_units(lambda: partial(mul, 2), units())
    assert next(made) == 0
    assert taken == [0, 1]
    assert list(made) == [2, 4, 6, 8, 10, 12, 14, 16, 18]


def test_the_command_tells_a_corpus_from_a_file_of_texts(model: str, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.txt", some_texts(3))
    assert is_corpus(lines, "v/")
    assert not is_corpus(lines, str(tmp_path))  # which is refused as the name of a file
    assert is_corpus(str(tmp_path), "v.npy")
    assert is_corpus("texts/*.txt", "v.npy")
    assert is_corpus("t.jsonl.zst", "v.npy")
    assert not is_corpus(lines, "v.npy")
    assert not is_corpus("hub:a/b:text", "v.npy")
    for words, expected in (
        (["--ray", "nano", "t.txt"], ["--ray", "local", "nano", "t.txt"]),
        (["nano", "--ray"], ["nano", "--ray", "local"]),
        (["--ray", "10.0.0.1:6379", "nano"], ["--ray", "10.0.0.1:6379", "nano"]),
        (["--ray", "auto", "--ray", "ray://h:1"], ["--ray", "auto", "--ray", "ray://h:1"]),
        (["--ray", "hub:a"], ["--ray", "local", "hub:a"]),
    ):
        assert with_address(words) == expected
    done = CliRunner().invoke(app, ["encode", model, lines, "-o", f"{tmp_path}/v/", "--vector-format", "float16"])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("v: 3 vectors of 24 dimensions, float16, 1 parts\n")
    for arguments, said in (
        (["-o", f"{tmp_path}/w/", "--vector-format", "int9"], "--vector-format int9: not known"),
        (["-o", f"{tmp_path}/w/", "--part-texts", "0"], "--part-texts 0: must be at least 1"),
        (["-o", f"{tmp_path}/w.csv", "--column", "text"], r"written as .npy, or into a folder"),
        (["-o", f"{tmp_path}/w/", "--workers", "2"], "are for workers of Ray"),
    ):
        refused = CliRunner().invoke(app, ["encode", model, lines, *arguments])
        assert isinstance(refused.exception, UserError)
        assert said in str(refused.exception)


def test_without_ray_the_extra_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    lines = write_lines(tmp_path / "t.txt", some_texts(3))
    with pytest.raises(UserError, match="Ray is not installed") as caught:
        encode_corpus(model, lines, tmp_path / "v", ray=RayOptions())
    assert "compress-embedders[ray]" in caught.value.hint


def test_durations_are_for_people() -> None:
    assert [duration(seconds) for seconds in (5, 300, 12_000)] == ["5 s", "5 min", "3 h 20 min"]
