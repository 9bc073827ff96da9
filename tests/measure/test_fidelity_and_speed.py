"""Known answers of fidelity; the measuring processes and their arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from compress.common.errors import UserError
from compress.common.memory import PeakAnonymous, anonymous_bytes
from compress.data.texts import measure_texts, read_texts
from compress.measure.speed.timing import Candidate, Speed, measure_speed, speed_ratio
from compress.measure.vectors.fidelity import cosines, fidelity, neighbours


def vectors(seed: int = 0, rows: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)


def test_identical_and_scaled_vectors_agree_wholly() -> None:
    agreement = fidelity(vectors(), 3 * vectors())
    assert agreement.cosine_min == pytest.approx(1, abs=1e-6)
    assert agreement.overlap_at_10 == 1


def test_cosine_known_answer() -> None:
    a = np.array([[1, 0], [1, 0], [1, 1]], dtype=np.float32)
    b = np.array([[0, 2], [-3, 0], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(cosines(a, b), [0, -1, 0.5**0.5], atol=1e-6)


def test_statistics_are_over_texts() -> None:
    other = vectors()
    other[7] = -other[7]
    agreement = fidelity(vectors(), other)
    assert agreement.cosine_min == pytest.approx(-1, abs=1e-6)
    assert agreement.cosine_mean == pytest.approx(1 - 2 / 60, abs=1e-6)
    assert agreement.cosine_p1 == pytest.approx(np.percentile(cosines(vectors(), other), 1))
    assert len(agreement.cosines) == 60
    assert agreement.cosines[0] == pytest.approx(-1, abs=1e-6)
    assert list(agreement.cosines) == sorted(agreement.cosines)


def test_neighbours_are_the_nearest_others() -> None:
    points = vectors(rows=30)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    for row, found in enumerate(neighbours(points, 10)):
        order = [other for other in np.argsort(-(unit @ unit[row])) if other != row]
        assert set(found) == set(order[:10])


def test_unrelated_vectors_share_neighbours_by_chance_alone() -> None:
    agreement = fidelity(vectors(0, 400), vectors(1, 400))
    assert agreement.overlap_at_10 < 0.06
    assert abs(agreement.cosine_mean) < 0.05


def test_of_vectors_of_two_widths_texts_are_compared_with_texts() -> None:
    turned = vectors() @ np.linalg.qr(vectors(1, 16).T)[0][:, :8].T  # 8 dimensions in 8 of 16
    wide = np.concatenate([turned, np.zeros((60, 8), dtype=np.float32)], axis=1)
    agreement = fidelity(vectors(), wide, [str(number) for number in range(60)])
    assert agreement.cosine_mean is agreement.cosine_p1 is agreement.cosine_min is None
    assert agreement.worst == ()
    assert agreement.overlap_at_10 == 1
    assert agreement.similarity_spearman == pytest.approx(1, abs=1e-6)
    assert agreement.in_short() == "vectors of another width; neighbour overlap@10 1.000"


def test_vectors_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="the same texts"):
        fidelity(vectors(), vectors()[:40])
    with pytest.raises(ValueError, match="at least 11"):
        fidelity(vectors()[:10], vectors()[:10])


def test_embedders_are_measured_in_processes_of_their_own(bert: Path) -> None:
    candidates = {dtype: Candidate({"model": str(bert), "dtype": dtype, "device": "cpu"}) for dtype in ("float32", "bfloat16")}
    texts = ["a parcel", "a somewhat longer text about a parcel", "short"] * 20
    cells = [(1, 16), (4, 16), (4, 40), (1, 48), (1, 49), (1, 2)]
    speeds = measure_speed(candidates, texts, rounds=3, requests=10, threads=1, cells=cells)
    assert list(speeds) == ["float32", "bfloat16"]
    for speed in speeds.values():
        assert len(speed.seconds) == 3
        assert speed.threads == 1
        assert speed.texts_per_second == pytest.approx(60 / sorted(speed.seconds)[1])
        assert 2 < speed.tokens_per_second / speed.texts_per_second < 48
        assert 0 < speed.latency_p50_ms <= speed.latency_p99_ms
        # Longer texts than the model takes (48), and such as are nothing but special tokens, are left out.
        assert [(cell.batch, cell.length) for cell in speed.cells] == cells[:4]
        assert all(cell.seconds > 0 for cell in speed.cells)
        assert speed.loaded_bytes is None or speed.peak_bytes >= speed.loaded_bytes - 1_000_000


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-model"):
        measure_speed({"a": Candidate({"model": str(tmp_path / "no-such-model")})}, ["a"], rounds=1, requests=10)


def test_ratios_are_of_rounds_so_that_drift_cancels() -> None:
    def speed(*seconds: float) -> Speed:
        return Speed(
            texts_per_second=1, tokens_per_second=1, seconds=seconds, latency_p50_ms=1, latency_p99_ms=1, threads=1,
            loaded_bytes=None, peak_bytes=None, gpu_peak_bytes=None,
        )  # fmt: skip

    assert speed_ratio(speed(1, 10, 100), speed(2, 20, 200)) == 2
    assert speed_ratio(speed(1, 1, 1), speed(3, 2, 100)) == 3


@pytest.mark.skipif(anonymous_bytes() is None, reason="the kernel does not tell anonymous memory")
def test_the_peak_sees_memory_that_is_gone_again() -> None:
    before = anonymous_bytes()
    with PeakAnonymous() as peak:
        held = np.ones(30_000_000)  # 240 MB
        held += 1
        del held
    assert peak.bytes - before > 200e6


def test_texts_are_read_from_json_lines_and_plain_files(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "t.txt") == ["one", "two"]
    drawn = measure_texts(str(tmp_path / "t.jsonl"), 10, seed=0)
    assert len(set(drawn)) == 10
    assert drawn == measure_texts(str(tmp_path / "t.jsonl"), 10, seed=0) != measure_texts(str(tmp_path / "t.jsonl"), 10, seed=1)
    with pytest.raises(UserError, match="has 20 texts, 21 are needed"):
        measure_texts(str(tmp_path / "t.jsonl"), 21, seed=0)
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match="'text' is int"):
        read_texts(tmp_path / "bad.jsonl")
