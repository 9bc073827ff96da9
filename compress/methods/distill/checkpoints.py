"""The checkpoints of a training and its curve, from which a killed training goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from compress.common.files import replacing, write_text_atomic

CURVE_FILE, STATE = "curve.jsonl", "state"
# Parameters that are split among processes are put together in the first one's memory.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return a training's curve up to its last checkpoint; empty before the first one."""
    path = folder / CURVE_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Checkpoints:
    """The checkpoints of a training, always whole, even if the parameters are split among processes."""

    def __init__(self, run: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, main: bool) -> None:
        """`folder`: where they are kept; it is made if missing. `main`: whether this process is the one that writes them."""
        folder.mkdir(parents=True, exist_ok=True)
        self._run, self._optimizer, self._folder, self._main = run, optimizer, folder, main

    def resume(self) -> list[dict[str, float]]:
        """Load the last checkpoint, if there is one, and return the curve up to it."""
        curve = read_curve(self._folder)
        if not curve:
            return []
        kept = torch.load(self._path(int(curve[-1]["step"])), weights_only=True, map_location="cpu")
        set_state_dict(self._run, self._optimizer, model_state_dict=kept["run"], optim_state_dict=kept["optimizer"], options=WHOLE)
        return curve

    def keep(self, curve: Sequence[Mapping[str, float]]) -> None:
        """Write a checkpoint, then the curve that names it, then delete the checkpoint before: a kill in between loses nothing."""
        run, optimizer = get_state_dict(self._run, self._optimizer, options=WHOLE)
        if not self._main:
            return
        path = self._path(int(curve[-1]["step"]))
        with replacing(path) as temporary:
            torch.save({"run": run, "optimizer": optimizer}, temporary)
        write_text_atomic(self._folder / CURVE_FILE, "".join(json.dumps(look) + "\n" for look in curve))
        for other in self._folder.glob(f"{STATE}-*"):
            if other != path:
                other.unlink()

    def _path(self, step: int) -> Path:
        return self._folder / f"{STATE}-{step}.pt"
