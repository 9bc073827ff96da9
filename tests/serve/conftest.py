"""One server with tiny models for all tests that do not end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serve_support import PROMPTS, Server, serving

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.fixture(scope="session")
def prompted(make_model: Callable[..., Path]) -> Path:
    """A tiny BERT with prompts by name, and a card that names its licence."""
    folder = make_model("bert", prompts=PROMPTS)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="session")
def served(prompted: Path, nv_embed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with `tiny`, the BERT, and `nv`, the golden NV-Embed checkpoint."""
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, f"tiny={prompted}", f"nv={nv_embed}", "--dimensions", "16", "--read-timeout", "3") as server:
        yield server
