"""The refit and the choice of groups, against known answers."""

from __future__ import annotations

import pytest
import torch

from compress.methods.prune.groups import by_error, damped, refitted


def correlated(width: int = 64, out: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [out, width], inputs [2000, width] that hang together, and their second moment."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 16, generator=generator) @ torch.randn(16, width, generator=generator)
    inputs += 0.3 * torch.randn(2000, width, generator=generator)
    return torch.randn(out, width, generator=generator), inputs, inputs.t() @ inputs / len(inputs)


def test_the_refit_is_least_squares() -> None:
    weight, inputs, moment = correlated()
    kept = torch.arange(0, 64, 2)
    expected = torch.linalg.lstsq(inputs[:, kept].double(), (inputs @ weight.t()).double()).solution.t().float()
    made = refitted(weight, damped(moment, 1e-9), moment, kept)
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 8])
def test_the_choice_by_error_is_close_to_the_best_there_is(size: int) -> None:
    """One group of few goes: the best is found by trying each; and of many, it beats choosing by size and by activation."""
    weight, inputs, moment = correlated(width=16)
    groups = torch.arange(16).view(-1, size)
    covariance = damped(moment, 1e-6)

    def error(left: torch.Tensor) -> float:
        kept = groups[left].flatten()
        made = refitted(weight, covariance, moment, kept)
        return float((inputs @ weight.t() - inputs[:, kept] @ made.t()).square().mean())

    every = [torch.tensor([one for one in range(len(groups)) if one != gone]) for gone in range(len(groups))]
    best = min(every, key=error)
    assert torch.equal(by_error(weight, covariance, groups, len(groups) - 1), best)
