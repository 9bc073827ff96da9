"""Makes the variant of an assignment, and measures what it really does to texts that nothing has learned from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.calibration.texts import CalibrationSource
from compress.common.journal import Journal
from compress.common.memory import available_memory_bytes
from compress.measure.vectors.fidelity import cosines
from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.models.source import DTYPE_BYTES
from compress.runtimes.contract import GRAPH_RUNTIMES, TORCH
from compress.search.assemble import Chosen, steps_of
from compress.search.choices import Choice
from compress.search.groups import Group

if TYPE_CHECKING:
    from compress.models.embedder import Vectors

SHARE_OF_MEMORY = 0.5
"""Share of the free memory up to which a model is loaded whole."""


@dataclass(frozen=True)
class Maker:
    """Makes variants of one model."""

    source: ModelFolder
    shape: ModelShape
    """Shape of the model after `exact`."""
    choices: Mapping[Group, Sequence[Choice]]
    calibration: CalibrationSource
    texts: Sequence[str]
    """Texts to compare vectors on."""
    folder: Path
    """Where variants are made and results are kept."""
    exact: Sequence[Method] = ()
    runtime: str = TORCH
    device: str = "cpu"
    say: Callable[[str], None] = print

    @cached_property
    def journal(self) -> Journal:
        """Keeps what was measured."""
        return Journal(self.folder)

    def steps(self, chosen: Chosen) -> tuple[Method, ...]:
        """Return the steps of an assignment, the exact ones first."""
        return (*self.exact, *steps_of(chosen, self.choices, self.shape))

    def key(self, chosen: Chosen) -> str:
        """Return a name for an assignment."""
        return hashlib.sha256(json.dumps(sorted(chosen.items())).encode()).hexdigest()[:12]

    def variant(self, chosen: Chosen) -> Path:
        """Return the folder of an assignment's variant, made if it is not there; a killed call continues at the block."""
        from compress.pipeline.apply import make_variant
        from compress.pipeline.stage import BuildOptions

        own = self.folder / f"variant-{self.key(chosen)}"
        target = own / "variant"
        if (own / "whole").exists():
            return target
        own.mkdir(parents=True, exist_ok=True)
        options = BuildOptions(
            fingerprint=self.source.fingerprint,
            say=lambda _: None,
            calibration=self.calibration,
            device=self.device,
            runtime=self.runtime,
        )
        make_variant(self.source, self.source.shape_to_compress, self.steps(chosen), target, Journal(own / "journal"), options)
        if self.runtime in GRAPH_RUNTIMES:
            from compress.runtimes.lower import lower

            lower(ModelFolder(own.name, target), self.runtime)
        (own / "whole").touch()
        return target

    def forget(self, chosen: Chosen) -> None:
        """Remove an assignment's variant; what was measured of it stays."""
        shutil.rmtree(self.folder / f"variant-{self.key(chosen)}", ignore_errors=True)

    def loss(self, chosen: Chosen, keep: bool = False) -> float:
        """Return the measured loss of an assignment, 1 - mean cosine on the held-out texts; `keep`: whether its variant stays."""
        found = self.journal.once(f"loss {self.key(chosen)}", lambda: {"loss": self._measured(chosen)})["loss"]
        if not keep:
            self.forget(chosen)
        return float(found)

    def _measured(self, chosen: Chosen) -> float:
        made = self.encoded(ModelFolder("variant", self.variant(chosen)))
        return 1 - float(cosines(made, self._originals).mean())

    @cached_property
    def _originals(self) -> Vectors:
        path = self.folder / "originals.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            from compress.common.files import save_array

            save_array(path, self.encoded(self.source))
        found: Vectors = np.load(path)
        return found

    def encoded(self, folder: ModelFolder) -> Vectors:
        """Return the vectors of the held-out texts by a model's folder; a model that does not fit is read block by block."""
        from compress.runtimes.loading import open_source

        needed = folder.shape.bytes if folder.is_variant else folder.shape.parameters * DTYPE_BYTES["float32"]
        stream = needed > SHARE_OF_MEMORY * available_memory_bytes()
        device = self.device if not folder.is_variant or self.runtime == TORCH else None
        embedder = open_source(folder, device=device, stream=stream, dtype=None if folder.is_variant else "float32")
        return embedder.encode(list(self.texts))
