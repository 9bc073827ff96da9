"""Nearest neighbours by the teacher's vectors."""

from __future__ import annotations

import numpy as np
import pytest

from compress.methods.distill import mining
from compress.methods.distill.batches import with_neighbours
from compress.methods.distill.mining import neighbours


def test_neighbours_are_the_nearest_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, -2)
    expected = np.argsort(-similarities, axis=1)[:, :3]
    np.testing.assert_array_equal(neighbours(made, 3), expected)
    monkeypatch.setattr(mining, "ROWS", 7)
    np.testing.assert_array_equal(neighbours(made, 3), expected)
    monkeypatch.setattr(mining, "STRETCH", 25)
    own = neighbours(made, 3)
    assert (own[:25] < 25).all()
    assert (own[25:] >= 25).all()
    batch = with_neighbours(np.array([3, 9, 20, 30]), expected)
    assert set(batch) == {3, *expected[3]}
    with pytest.raises(ValueError, match="no 3 neighbours"):
        neighbours(made[:3], 3)
