"""The choice for every group with the least loss within bounds: a multiple-choice knapsack, solved exactly.

Each group takes one of its choices; costs in bytes and milliseconds add up and have bounds. What a choice costs may depend on
another group's: layers of a narrow block are smaller, and those of a block that is left out take none. It is an integer programme
in 0 and 1, which HiGHS solves by branch and bound (Huangfu and Hall 2018, Math. Prog. Comp. 10; scipy.optimize.milp) to a gap of
1e-9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

GAP = 1e-9
"""Relative gap to the optimum at which the solver stops."""


@dataclass(frozen=True)
class Item:
    """One choice of one group."""

    group: str
    choice: str
    loss: float
    costs: Mapping[str, float]
    """What it takes of each bounded quantity, such as `bytes` and `ms`."""
    given: tuple[str, frozenset[str]] | None = None
    """Another group and choices of it: the item is there only if one of these is taken. Two sets of these choices among a group's
    items are the same or share none. None: it is always there."""

    def taken(self, chosen: Mapping[str, str]) -> bool:
        """Whether a solution has it."""
        there = self.given is None or chosen.get(self.given[0]) in self.given[1]
        return there and chosen.get(self.group) == self.choice


@dataclass(frozen=True)
class Problem:
    """Groups with their choices."""

    items: Sequence[Item]
    """Every choice of every group."""
    costs: Sequence[str] = ("bytes",)
    """The quantities that have bounds."""


def solve(
    problem: Problem,
    bounds: Mapping[str, float],
    *,
    least: str | None = None,
    unlike: Sequence[tuple[Mapping[str, str], int]] = (),
) -> dict[str, str] | None:
    """Return the choice of each group with the least loss within bounds; None if nothing keeps them.

    Args:
        problem: the choices.
        bounds: the most of each cost; `loss` bounds the sum of the losses.
        least: the cost to minimise in place of the loss.
        unlike: solutions that the result has to differ from, each in at least so many groups.

    Raises:
        RuntimeError: the solver failed.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    items = problem.items
    rows, low, high = _one_each(items)
    for name, most in bounds.items():
        rows.append(np.array([item.loss if name == "loss" else item.costs[name] for item in items]) / (abs(most) or 1.0))
        low.append(-np.inf)
        high.append(1.0 if most > 0 else most)
    for solution, groups in unlike:
        rows.append(np.array([1.0 if solution.get(item.group) == item.choice else 0.0 for item in items]))
        low.append(-np.inf)
        high.append(len(solution) - groups)
    wanted = np.array([item.loss if least is None else item.costs[least] for item in items])
    scale = float(np.abs(wanted).max()) or 1.0
    # Of two solutions that are equally good, the one whose items come first: the same on every machine.
    order = np.arange(len(items)) * (GAP * 1e-3 / max(len(items), 1))
    found = milp(
        wanted / scale + order,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.status == 2:  # infeasible
        return None
    if found.x is None:
        raise RuntimeError(f"the solver stopped: {found.message}")
    return {item.group: item.choice for item, taken in zip(items, found.x, strict=True) if taken > 0.5}


def _one_each(items: Sequence[Item]) -> tuple[list[np.ndarray], list[float], list[float]]:
    """Return the rows that say that each group takes one of the items that are there, and their sums.

    Of a group whose items depend on another's choice, so many are taken as of the choices that they are given.
    """
    rows, sums = list[np.ndarray](), list[float]()
    for group, given in dict.fromkeys((item.group, item.given) for item in items):
        row = np.array([float((item.group, item.given) == (group, given)) for item in items])
        if given is not None:
            row -= np.array([float(item.group == given[0] and item.choice in given[1]) for item in items])
        rows.append(row)
        sums.append(float(given is None))
    return rows, sums, list(sums)


def total(problem: Problem, chosen: Mapping[str, str], cost: str) -> float:
    """Return the sum of a cost, or of `loss`, over a solution."""
    return sum(item.loss if cost == "loss" else item.costs[cost] for item in problem.items if item.taken(chosen))


@dataclass(frozen=True)
class Point:
    """A solution on the front."""

    chosen: Mapping[str, str]
    loss: float
    costs: Mapping[str, float]


def front(problem: Problem, along: str, bounds: Mapping[str, float], points: int = 12) -> list[Point]:
    """Return the best solutions for bounds on one cost between the least and the most that there is, smallest first.

    Args:
        problem: the choices.
        along: the cost whose bound changes.
        bounds: bounds on other costs.
        points: number of bounds; solutions that are the same are left out.
    """
    smallest = solve(problem, bounds, least=along)
    best = solve(problem, bounds)
    if smallest is None or best is None:
        return []
    ends = total(problem, smallest, along), total(problem, best, along)
    found: list[Point] = []
    for most in np.geomspace(max(ends[0], 1e-12), max(ends[1], 1e-12), points):
        chosen = solve(problem, {**bounds, along: float(most) * (1 + 1e-9)})
        if chosen is not None and not any(point.chosen == chosen for point in found):
            costs = {cost: total(problem, chosen, cost) for cost in problem.costs}
            found.append(Point(chosen, total(problem, chosen, "loss"), costs))
    return found
