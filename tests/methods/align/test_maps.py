"""Maps between two models' vectors: what is known is found again, and the better map is taken."""

from __future__ import annotations

import numpy as np
import pytest

from compress.measure.vectors.codec import unit
from compress.measure.vectors.fidelity import cosines
from compress.methods.align.maps import fitted, held_out, linear, rotation


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def turn(rows: int, columns: int) -> np.ndarray:
    """A matrix with orthonormal rows or columns."""
    wide = max(rows, columns)
    return np.linalg.qr(drawn(wide, wide, seed=1))[0][:rows, :columns]


@pytest.mark.parametrize("to", [24, 40])
def test_a_rotation_with_a_scale_and_a_shift_is_found(to: int) -> None:
    vectors = drawn(300, 24) + 3  # around a mean that is longer than the rest
    target = 0.5 * vectors @ turn(24, to) + drawn(to, seed=2)
    found = rotation(vectors[:200], target[:200])
    assert cosines(found(vectors[200:]), target[200:]).min() > 1 - 1e-6
    np.testing.assert_allclose(found(vectors[200:]), target[200:], atol=1e-4)
    np.testing.assert_allclose(found.matrix @ found.matrix.T, 0.25 * np.eye(24), atol=1e-5)


def test_a_rotation_out_of_a_wider_space_keeps_what_the_other_model_has() -> None:
    narrow = drawn(300, 24)
    wide = narrow @ turn(24, 40)
    assert cosines(rotation(wide[:200], narrow[:200])(wide[200:]), narrow[200:]).min() > 1 - 1e-6


def test_a_linear_map_is_found() -> None:
    vectors, matrix = drawn(300, 24), drawn(24, 32, seed=3)
    target = vectors @ matrix + 1
    found = linear(vectors[:200], target[:200], 1e-9)
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-4)
    np.testing.assert_allclose(found.shift, 1, atol=1e-4)


def test_the_better_map_on_held_out_texts_is_taken() -> None:
    vectors = drawn(400, 24)
    rotated, stretched = vectors @ turn(24, 24), vectors @ drawn(24, 24, seed=3)
    noise = 0.3 * drawn(400, 24, seed=4)

    def taken(target: np.ndarray, fit: int) -> str:
        return fitted("auto", (vectors[:fit], vectors[200:]), (target[:fit], target[200:]))[0].name

    assert taken(stretched, 200) == "linear"
    assert taken(rotated + noise, 40) == "rotation"  # few texts: a free matrix learns their noise


def test_only_the_map_that_is_asked_for_is_fitted() -> None:
    vectors = drawn(200, 8)
    for name in ("rotation", "linear"):
        chosen, judged = fitted(name, (vectors[:100], vectors[100:]), (vectors[:100], vectors[100:]))  # type: ignore[arg-type]
        assert chosen.name == name
        assert list(judged) == [name]


def test_held_out_texts_are_compared_by_cosine_and_by_neighbours() -> None:
    target = drawn(120, 16)
    same = held_out(target, target)
    assert (same.cosine_mean, same.overlap_at_10) == (pytest.approx(1, abs=1e-6), 1)
    other = held_out(drawn(120, 16, seed=9), target)
    assert abs(other.cosine_mean) < 0.1
    assert other.overlap_at_10 < 0.2
    # By hand, for the first text: its ten nearest others to either vector.
    near = unit(target) + 0.6 * unit(drawn(120, 16, seed=9))
    index = unit(target)
    shared = [
        len(
            set(np.argsort(-np.where(np.arange(120) == row, -9, index @ one))[:10])
            & set(np.argsort(-np.where(np.arange(120) == row, -9, index @ other))[:10])
        )
        / 10
        for row, (one, other) in enumerate(zip(index, unit(near), strict=True))
    ]
    assert held_out(near, target).overlap_at_10 == pytest.approx(np.mean(shared))
