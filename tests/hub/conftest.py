"""A hub on loopback, and processes that know no other and start with an empty cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from standin import StandIn

ROOT = Path(__file__).parents[2]


@dataclass
class Client:
    """A machine that uses the hub: its cache, its environment, and the network that it asked for beyond loopback."""

    endpoint: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        """Where the hub's client keeps models."""
        return self.home / "hub"

    def variables(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and not name.startswith("HF_")}
        own = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "COMPRESS_CACHE": str(self.home / "compress"),
            "NETWORK_LOG": str(self.home / "network.txt"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "guard"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        return kept | own | self.environment | more

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python with this machine's environment."""
        environment = self.variables(**variables)
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=self.home, capture_output=True, text=True, check=False, timeout=300
        )
        left = self.home / "network.txt"
        assert not left.exists(), f"asked for {left.read_text()}"
        return done

    def compress(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command line; it must not end in a traceback."""
        done = self.python("-m", "compress.cli", *arguments, **variables)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def find(self, *models: str, **variables: str) -> list[tuple[str, str]]:
        """Find models in a process of its own; of each `name`, `path` of what was found, or message and hint of the refusal."""
        done = self.python("-c", FIND, *models, **variables)
        assert done.returncode == 0, done.stderr
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


FIND = """
import json, sys
from compress.common.errors import UserError
from compress.models.source import find
for model in sys.argv[1:]:
    try:
        found = find(model)
        print(json.dumps([found.name, str(found.path)]))
    except UserError as error:
        print(json.dumps([error.message, error.hint]))
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""


@contextmanager
def stand_in(folder: Path) -> Iterator[tuple[StandIn, Client]]:
    """Start a hub with nothing on it, and a machine with an empty cache that knows it."""
    for name in ("uploaded", "home"):
        (folder / name).mkdir()
    with StandIn(folder / "uploaded") as server:
        yield server, Client(server.endpoint, folder / "home")
    assert server.faults == []


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


def as_published(model: Path, folder: Path) -> Path:
    """Copy a model as it would lie on the hub: with a card, and with files that nobody should download."""
    shutil.copytree(model, folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# tiny\n")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    (folder / "modeling.py").write_text("raise SystemExit('code of the hub was run')")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def tiny(bert: Path, tmp_path: Path) -> Path:
    """A tiny embedder as it would lie on the hub."""
    return as_published(bert, tmp_path / "tiny")
