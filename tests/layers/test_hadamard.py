"""Hadamard matrices and rotations against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester_of_scipy

from compress.layers.hadamard import Rotation, hadamard, paley


def test_known_matrices() -> None:
    np.testing.assert_array_equal(hadamard(8), sylvester_of_scipy(8))
    # Paley's of order 4, from the squares modulo 3: 1 is one, 2 is none.
    expected = [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]
    np.testing.assert_array_equal(paley(4), expected)


@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, 36, 48, 60, 84, 384, 640, 896, 1024])
def test_rows_are_orthogonal(order: int) -> None:
    made = hadamard(order)
    assert made is not None
    assert set(made.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(made @ made.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 50, 92, 172])
def test_other_orders_have_none(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("width", [48, 128, 384, 50])
def test_a_rotation_is_its_matrix(width: int) -> None:
    rotation = Rotation(width, 7)
    matrix = rotation.rows(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
    rows = torch.randn(2, 3, width, dtype=torch.float64)
    torch.testing.assert_close(rotation.rows(rows), rows @ matrix)
    torch.testing.assert_close(rotation.columns(rows[0].t()), matrix.t() @ rows[0].t())
    if rotation.is_hadamard:  # diag(s) H / sqrt(n)
        known = hadamard(width)
        assert known is not None
        scaled = matrix * width**0.5 * known
        torch.testing.assert_close(scaled, scaled[:, :1].sign().expand(width, width), atol=1e-12, rtol=0)
    assert not torch.equal(matrix, Rotation(width, 8).rows(torch.eye(width, dtype=torch.float64)))
    assert rotation.rows(rows.half()).dtype == torch.float32


def test_an_outlier_is_spread_over_all_channels() -> None:
    row = torch.zeros(384)
    row[17] = 384**0.5
    torch.testing.assert_close(Rotation(384, 0).rows(row).abs(), torch.ones(384))
