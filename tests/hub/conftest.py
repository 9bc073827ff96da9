"""A hub on loopback with nothing on it, and a machine with an empty cache that knows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Client, as_published, stand_in
from standin import StandIn


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[StandIn, Client]]:
    with stand_in(tmp_path) as pair:
        yield pair


@pytest.fixture
def hub(started: tuple[StandIn, Client]) -> StandIn:
    """A hub with nothing on it."""
    return started[0]


@pytest.fixture
def client(started: tuple[StandIn, Client]) -> Client:
    """A machine with an empty cache that knows this hub."""
    return started[1]


@pytest.fixture
def tiny(bert: Path, tmp_path: Path) -> Path:
    """A tiny embedder as it would lie on the hub."""
    return as_published(bert, tmp_path / "tiny")
