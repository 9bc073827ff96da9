"""Runs' scores in the layout of mteb's leaderboard: `results/MODEL/REVISION/TASK.json` and `model_meta.json`.

`mteb.ResultCache(FOLDER).load_results(include_remote=False)` reads it. Nothing is scored: the results are those that the run
kept in `mteb/ROLE/TASK.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from compress.common.errors import UserError, first_line
from compress.common.files import replacing, write_text_atomic
from compress.common.inputs import read_object
from compress.measure.record import Record
from compress.reports.compare import read_records
from compress.reports.dashboard.imported import MEGABYTE, META

Role = Literal["baseline", "variant"]
ROLES: tuple[Role, ...] = ("baseline", "variant")
RESULT_BYTES = 2**28
"""Largest file of a task's results; tasks with hundreds of subsets have some MB."""
SAME = 1e-5
"""Largest difference between a score and the record's, which mteb's files hold rounded to six digits."""


def write_leaderboard(places: Sequence[Path], to: Path) -> list[Path]:
    """Write the scores of runs, and of the models that they were made from, as mteb's results.

    Args:
        places: runs, or folders of runs.
        to: folder that gets `results/`; results of other models that are there stay.

    Returns:
        The folders of the models, `to/results/MODEL/REVISION`.

    Raises:
        UserError: a run cannot be read, has no scores, has no results in mteb's format, or other ones than its record says; or
            `to` has other scores of the same model.
    """
    records, broken = read_records(places)
    if broken:
        place, reason = next(iter(broken.items()))
        raise UserError(f"{place}: {reason}", "name runs alone")
    # All are read before the first is written, so that a run that is refused leaves nothing.
    found = [(folder, role, _results(folder, record, role)) for folder, record in records.items() for role in ROLES]
    made = []
    for folder, role, results in found:
        meta = _meta(records[folder], role)
        made.append(_write(to / "results" / meta.model_name_as_path() / str(meta.revision), meta, results, folder))
    return list(dict.fromkeys(made))


def _results(folder: Path, record: Record, role: Role) -> dict[str, Any]:
    """Read a run's results of one of its two models, by task, and see that they are those of its record.

    Raises:
        UserError: they are not, or there are none.
    """
    from mteb.results import TaskResult

    if not record.tasks:
        raise UserError(f"{folder}: was not scored on tasks", "compress run RECIPE --tasks mini")
    results = {}
    for row in record.tasks:
        path = folder / "mteb" / role / f"{row.task}.json"
        if not path.exists():
            raise UserError(
                f"{path}: is not there, and a record alone holds only the main score",
                "repeat the run (compress run --fresh), or give the folder that it wrote",
            )
        try:
            result = TaskResult.model_validate(read_object(path, RESULT_BYTES))
            score = float(result.get_score())
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: is no result of mteb's: {first_line(error)}") from error
        if result.task_name != row.task or abs(score - getattr(row, role)) > SAME:
            said = f"{result.task_name} {score:.6f}, and the record {row.task} {getattr(row, role):.6f}"
            raise UserError(f"{path}: says {said}", "repeat the run (compress run --fresh)")
        results[row.task] = result
    return results


def _meta(record: Record, role: Role) -> Any:
    """Return what mteb says of a model: what the record holds of it, and nothing that it does not (mteb's fields are empty then).

    mteb wants names of the form owner/name. A model of the hub has its own; the owner of others is `compress`. The revision is the
    hash in the name of the run, or the fingerprint of the model's files.
    """
    from mteb.models.model_meta import ModelMeta

    model = record.model
    known: dict[str, Any]
    if role == "variant":  # a variant may have other sizes than its model, and its record does not hold them
        name, _, revision = record.run.rpartition("-")
        known = {"name": f"compress/{name}", "revision": revision, "adapted_from": model.name}
        known["memory_usage_mb"] = record.row("variant").size_bytes / MEGABYTE
    else:
        name = model.name if model.name.count("/") == 1 and not Path(model.name).is_absolute() else ""
        known = {"name": name or f"compress/{Path(model.name).name}", "revision": model.fingerprint}
        known |= {"n_parameters": model.parameters, "embed_dim": model.dimension, "max_tokens": model.max_length}
    return ModelMeta.create_empty(known | {"license": _licence(model.licence)})


def _licence(licence: str | None) -> str | None:
    """Return a licence by mteb's name; None where mteb has no name for it."""
    from mteb.models.model_meta import Licenses

    return licence.lower() if licence is not None and licence.lower() in get_args(Licenses) else None


def _write(target: Path, meta: Any, results: dict[str, Any], run: Path) -> Path:
    """Write a model's folder.

    Raises:
        UserError: it has other scores of one of the tasks.
    """
    from mteb.results import TaskResult

    for task, result in results.items():
        path = target / f"{task}.json"
        if path.exists():
            there = float(TaskResult.from_disk(path).get_score())
            if abs(there - float(result.get_score())) > SAME:
                raise UserError(
                    f"{path}: has the score {there:.6f}, and {run} {result.get_score():.6f} for the same model",
                    "write them into different folders",
                )
    target.mkdir(parents=True, exist_ok=True)
    for task, result in results.items():
        with replacing(target / f"{task}.json") as temporary:
            result.to_disk(temporary)
    write_text_atomic(target / META, json.dumps(meta.to_dict(), indent=1, default=str) + "\n")
    return target
