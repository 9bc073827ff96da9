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
from functools import cache
from pathlib import Path

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
        self.check_network()
        return done

    def compress(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the command line; it must not end in a traceback."""
        done = self.python("-m", "compress.cli", *arguments, **variables)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def find(self, *models: str, **variables: str) -> list[tuple[str, str]]:
        """Find models in a process of its own; of each `name`, `path` of what was found, or message and hint of the refusal."""
        process = finder()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([models, self.variables(**variables)]) + "\n")
        process.stdin.flush()
        answers = json.loads(process.stdout.readline())
        assert answers is not None, "a traceback instead of an answer; see standard error"
        self.check_network()
        return [tuple(answer) for answer in answers]

    def check_network(self) -> None:
        """See that nothing but loopback was asked for."""
        left = self.home / "network.txt"
        assert not left.exists(), f"asked for {left.read_text()}"


@cache
def finder() -> subprocess.Popen[str]:
    """Start the process that finds models; it ends when its input does."""
    environment = Client("http://localhost:9", Path.cwd()).variables()
    command = [sys.executable, str(Path(__file__).with_name("finder.py"))]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def stand_in(folder: Path) -> Iterator[tuple[StandIn, Client]]:
    """Start a hub with nothing on it, and a machine with an empty cache that knows it."""
    for name in ("uploaded", "home"):
        (folder / name).mkdir()
    with StandIn(folder / "uploaded") as server:
        yield server, Client(server.endpoint, folder / "home")
    assert server.faults == []


def as_published(model: Path, folder: Path) -> Path:
    """Copy a model as it would lie on the hub: with a card, and with files that nobody should download."""
    shutil.copytree(model, folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n\n# tiny\n")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    (folder / "modeling.py").write_text("raise SystemExit('code of the hub was run')")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder
