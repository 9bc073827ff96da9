"""Rotations: orthogonal matrices that mix all channels. A randomized Hadamard matrix where the size has one, else a random one."""

from __future__ import annotations

import math
from functools import cache, reduce

import torch

LARGEST_FACTOR = 64
"""Powers of two are multiplied as Kronecker products of matrices up to this size: a row of n channels then costs n times the sum
of the sizes."""
ROWS = 4_096
"""Rows that are rotated at a time, which bounds the copies in float64."""


class Rotation:
    """An orthogonal matrix R, [width, width], that a seed determines.

    `R = diag(s) H / sqrt(width)` with random signs s and a Hadamard matrix H, the randomized Hadamard matrix of QuIP# (Tseng et al.
    2024, arXiv 2402.04396) and QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 3). An outlier in one channel becomes one of
    the same small size in all. Sizes without a known H get the Q of a Gaussian matrix's QR, uniform over the orthogonal group.
    """

    def __init__(self, width: int, seed: int) -> None:
        """`width`: number of channels; `seed`: of the signs or of the Gaussian matrix."""
        generator = torch.Generator().manual_seed(seed)
        factors = hadamard_factors(width)
        self.width = width
        self.is_hadamard = factors is not None
        self._signs = torch.ones(width, dtype=torch.float64)
        if factors is not None:
            self._signs -= 2 * torch.randint(0, 2, (width,), generator=generator)
            self._factors = [factor / math.sqrt(len(factor)) for factor in factors]
        else:
            q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
            self._factors = [q * r.diagonal().sign()]  # or else Q's distribution would depend on the algorithm

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `rows @ R` for float [..., width], computed in float64, in float32 or the rows' own wider dtype."""
        flat = rows.reshape(-1, self.width)
        made = flat.new_empty(flat.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
        for start in range(0, len(flat), ROWS):
            made[start : start + ROWS] = self._multiplied(flat[start : start + ROWS].double())
        return made.view(rows.shape)

    def columns(self, columns: torch.Tensor) -> torch.Tensor:
        """Return `R^T @ columns` for float [width, n]; see `rows`."""
        return self.rows(columns.t()).t().contiguous()

    def _multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply by the signs, then by one Kronecker factor after another: a fast Hadamard transform with wide steps."""
        device = rows.device
        rows, left = rows * self._signs.to(device), 1
        for factor in self._factors:
            size = len(factor)
            parts = rows.view(len(rows) * left, size, -1)
            rows, left = (factor.to(device).t() @ parts).view(len(rows), self.width), left * size
        return rows


def hadamard(order: int) -> torch.Tensor | None:
    """Return a Hadamard matrix of an order, float64 [order, order], H H^T = order I; None where none is known here."""
    factors = hadamard_factors(order)
    return None if factors is None else reduce(torch.kron, factors)


def hadamard_factors(order: int) -> list[torch.Tensor] | None:
    """Return matrices whose Kronecker product is a Hadamard matrix: one of Paley's, then Sylvester's. None: none is known."""
    powers = order & -order
    while powers:
        first = paley(order // powers)
        if first is not None:
            sizes = [LARGEST_FACTOR] * (int(math.log2(powers)) // int(math.log2(LARGEST_FACTOR)))
            sizes += [rest] if (rest := powers // math.prod(sizes)) > 1 else []
            return [first, *map(sylvester, sizes)]
        powers //= 2
    return None


def sylvester(order: int) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix of a power of two: [[H, H], [H, -H]], again and again."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return reduce(torch.kron, [two] * int(math.log2(order)), torch.ones(1, 1, dtype=torch.float64))


@cache
def paley(order: int) -> torch.Tensor | None:
    """Return a Hadamard matrix of order 1, or one that Paley (1933) made of the squares modulo a prime q; None for other orders.

    Order q + 1 with q = 3 mod 4 (12, 20, 24, 44), and 2 (q + 1) with q = 1 mod 4 (28, 36, 60).
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):  # order - 1 = 3 mod 4: C is skew-symmetric, and C C^T = q I, so I + C is a Hadamard matrix
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1, -1.0)
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_conference(q, 1.0), two) + torch.kron(torch.eye(q + 1, dtype=torch.float64), other)
    return None


def _conference(q: int, corner: float) -> torch.Tensor:
    """Return C = [[0, 1], [corner, Q]] with Q_ij = 1 where i - j is a square modulo q, -1 where it is none, 0 for i = j."""
    squares = {number * number % q for number in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, q)], dtype=torch.float64)
    places = torch.arange(q)
    made = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0] = 1.0, corner
    made[1:, 1:] = character[(places[:, None] - places[None]) % q]
    return made


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
