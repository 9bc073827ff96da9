"""Models of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def model_of(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda kind: request.getfixturevalue(kind) if kind in ("bert", "nv_embed") else make_model(kind)
