"""The checkpoints of a training and its curve, from which a killed training goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from compress.common.errors import UserError, first_line
from compress.common.files import replacing, write_text_atomic
from compress.common.inputs import check_file, checked_by, parse_json, read_text

CURVE_FILE, STATE = "curve.jsonl", "state"
# Parameters that are split among processes are put together in the first one's memory.
_LOOK = TypeAdapter(dict[str, float])
"""A line of a curve: step, loss, how well the held-out texts are met, seconds."""
ANEW = "run with --fresh to train anew"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return a training's curve up to its last checkpoint; empty before the first one.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / CURVE_FILE
    if not path.exists():
        return []
    lines = enumerate(read_text(path).splitlines(), start=1)
    places = [(f"{path}, line {number}", line) for number, line in lines]
    return [checked_by(parse_json(line, place), _LOOK, place, ANEW) for place, line in places]


class Checkpoints:
    """The checkpoints of a training, always whole, even if the parameters are split among processes."""

    def __init__(self, run: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, main: bool, processes: int = 1) -> None:
        """Keep the checkpoints of a training.

        Args:
            run: what is trained.
            optimizer: its optimizer.
            folder: where they are kept; it is made if missing. All processes read it.
            main: whether this process is the one that writes them.
            processes: number of processes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._run, self._optimizer, self._folder, self._main, self._processes = run, optimizer, folder, main, processes

    def resume(self, say: Callable[[str], None] = lambda _: None) -> list[dict[str, float]]:
        """Load the last checkpoint, if there is one, and return the curve up to it.

        Args:
            say: called with a line where another number of processes goes on: the steps are the same but for rounding.

        Raises:
            UserError: it is damaged.
        """
        curve = self._curve()
        if not curve:
            return []
        path = self._path(int(curve[-1].get("step", 0)))
        check_file(path)
        try:
            kept = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises errors of its zip reader, of its unpickler and of the file system
            raise UserError(f"{path}: the checkpoint cannot be read ({first_line(error)})", ANEW) from error
        before = int(kept.get("processes", self._processes))
        if before != self._processes:
            said = f"up to step {int(curve[-1]['step']):,} the number of processes was {before}, now it is {self._processes}"
            say(f"{said}: the same training, except for rounding")
        set_state_dict(self._run, self._optimizer, model_state_dict=kept["run"], optim_state_dict=kept["optimizer"], options=WHOLE)
        return curve

    def keep(self, curve: Sequence[Mapping[str, float]]) -> None:
        """Write a checkpoint, then the curve that names it, then delete the checkpoint before: a kill in between loses nothing."""
        run, optimizer = get_state_dict(self._run, self._optimizer, options=WHOLE)
        if not self._main:
            return
        path = self._path(int(curve[-1]["step"]))
        with replacing(path) as temporary:
            torch.save({"run": run, "optimizer": optimizer, "processes": self._processes}, temporary)
        write_text_atomic(self._folder / CURVE_FILE, "".join(json.dumps(look) + "\n" for look in curve))
        for other in self._folder.glob(f"{STATE}-*"):
            if other != path:
                other.unlink()

    def _curve(self) -> list[dict[str, float]]:
        """Return the curve as the first process reads it: another machine may still see an older file."""
        curves = [read_curve(self._folder) if self._main else []]
        if self._processes > 1:
            torch.distributed.broadcast_object_list(curves, src=0)
        return curves[0]

    def _path(self, step: int) -> Path:
        return self._folder / f"{STATE}-{step}.pt"
