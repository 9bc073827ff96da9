"""The order of the batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from compress.methods.distill.batches import batch_order, batches_from


def test_batches_hold_every_text_once_and_go_on_anywhere() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, size=257)
    order = batch_order(lengths, 8, seed=1, epoch=0)
    assert sorted(np.concatenate(order).tolist()) == sorted(set(np.concatenate(order).tolist()))
    assert len(order) == 32
    assert not np.array_equal(np.concatenate(order), np.concatenate(batch_order(lengths, 8, seed=1, epoch=1)))
    schedule = SimpleNamespace(batch=8, seed=1)
    whole = batches_from(lengths, schedule, 0)  # type: ignore[arg-type]
    every = [next(whole) for _ in range(80)]
    later = batches_from(lengths, schedule, 50)  # type: ignore[arg-type]
    assert all(np.array_equal(a, next(later)) for a in every[50:])
    with pytest.raises(ValueError, match="do not fill a batch"):
        next(batches_from(lengths[:7], schedule, 0))  # type: ignore[arg-type]
