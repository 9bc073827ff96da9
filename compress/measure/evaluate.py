"""Accuracy alone: any model or run on any tasks, by itself or against another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.data.texts import calibration_texts, read_texts
from compress.measure.accuracy.lengths import Bucket
from compress.measure.accuracy.statistics import Interval
from compress.measure.record import TaskRow, task_row
from compress.measure.scored import Scored, baseline_key
from compress.measure.vectors.codec import OutputScheme
from compress.measure.vectors.index import OutputRow
from compress.models.folder import ModelFolder
from compress.models.source import find
from compress.runtimes.loading import open_source, runtime_of

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore
    from compress.measure.accuracy.tasks import Task


class Evaluation(BaseModel):
    """What a model scored; `tasks` hold it as `variant`, and as `baseline` what it is compared with (itself where with nothing)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    against: str | None
    tasks: tuple[TaskRow, ...]
    overall: Interval | None
    outputs: tuple[OutputRow, ...] = ()
    """What retrieval scores with the model's vectors stored in fewer bytes."""
    lengths: dict[str, tuple[Bucket, ...]] = {}
    """The model's scores on retrieval tasks, by the length of the documents."""
    mteb: dict[str, dict[str, object]]
    """The model's results in mteb's own format, by task."""


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    against: str | None = None,
    data: Path | str | None = None,
    runtime: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    stream: bool = False,
    batch_tokens: int | None = None,
    prompts: Mapping[str, str] | None = None,
    margin: float = 0.01,
    outputs: Sequence[str] = (),
    lengths: bool = False,
    calibration: Path | None = None,
    say: Callable[[str], None] = print,
) -> Evaluation:
    """Score a model on tasks, and with `against` compare it with another in pairs.

    Args:
        model: any name that `compress.load` takes.
        tasks: names of tasks, benchmarks or subsets; see `compress.measure.accuracy.tasks.find_tasks`.
        against: another model, such as the one that a variant was made from.
        data: a folder with the tasks' data; None: the hub.
        runtime: of `model`, as for `compress.load`; so are `device`, `dtype` and `stream`.
        device: where both run.
        dtype: of the arithmetic.
        stream: read the models block by block.
        batch_tokens: padded tokens a batch may hold; by default what suits the device.
        prompts: go before the models' own of the same name.
        margin: loss that is accepted, as a share of the other's score.
        outputs: ways of storing the model's vectors to score on the retrieval tasks, as `OutputScheme.parse` reads them.
        lengths: split the scores of retrieval tasks by the length of the documents.
        calibration: texts that ranges and axes of these are found on; None: the embedded ones.
        say: told each score, a line.

    Raises:
        UserError: a model or a task is not there, or a model's weights are random.
    """
    from compress.measure.accuracy.paired import compare
    from compress.measure.accuracy.tasks import find_tasks
    from compress.runtimes.torch_runtime import pick_device

    schemes = [OutputScheme.parse(name) for name in outputs]
    texts = read_texts(calibration) if calibration else calibration_texts()
    sources = [find(name) for name in (against, model) if name is not None]
    for source in sources:
        if source.is_random:
            raise UserError(f"model {source.name!r}: accuracy cannot be measured on random weights")
    found = find_tasks(tasks, Path(data) if data else None)
    place = str(pick_device(device))

    def scored(source: ModelFolder) -> Scored:
        wanted = runtime if source is sources[-1] else None
        opened = partial(open_source, source, runtime=wanted, device=place, dtype=dtype, stream=stream)
        chosen = runtime_of(source, wanted, device=place, dtype=dtype)
        key = baseline_key(source.fingerprint, dtype, place, batch_tokens, chosen)
        return Scored(source, opened, key, batch_tokens=batch_tokens, prompts=prompts)

    scores: list[dict[str, TaskScore]] = []
    stored: list[OutputRow] = []
    for source in sources:
        one = scored(source)
        scores.append({})
        for number, task in enumerate(found, start=1):
            score = scores[-1][task.name] = one.score(task)
            say(f"{source.name} {number}/{len(found)} {task.name}: {score.metric} {100 * score.score:.2f} ({score.seconds:.0f} s)")
        if schemes and source is sources[-1]:
            stored = one.outputs(schemes, found, texts, margin)
        one.embedder.close()
    theirs, ours = scores[0], scores[-1]
    compared = compare(theirs, ours, margin)
    return Evaluation(
        model=sources[-1].name,
        against=sources[0].name if against else None,
        tasks=tuple(task_row(theirs[name], ours[name], compared.tasks[name], {}) for name in ours),
        overall=compared.overall if against else None,
        outputs=tuple(stored),
        lengths=_by_length(found, ours, sources[-1]) if lengths else {},
        mteb={name: score.mteb for name, score in ours.items()},
    )


def _by_length(tasks: Sequence[Task], scores: Mapping[str, TaskScore], source: ModelFolder) -> dict[str, tuple[Bucket, ...]]:
    from compress.measure.accuracy.lengths import by_length

    tokenizer = source.tokenizer
    searched = (task for task in tasks if task.mteb.metadata.type == "Retrieval" and scores[task.name].examples.parts)
    return {task.name: tuple(by_length(task, scores[task.name], tokenizer)) for task in searched}
