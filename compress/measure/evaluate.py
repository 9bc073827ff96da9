"""Accuracy only: any model or run on any tasks, alone or against another model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from compress.measure.vectors.codec import VectorFormat
from compress.measure.vectors.index import VectorFormatRow
from compress.models.folder import ModelFolder
from compress.models.source import find
from compress.runtimes.loading import open_source, runtime_of
from compress.runtimes.remote import Client, RemoteEmbedder, is_url

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore
    from compress.measure.accuracy.tasks import Task


class Evaluation(BaseModel):
    """What a model scored.

    `tasks` hold the model's scores as `variant`, and the other model's scores as `baseline` (its own when there is no other).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    against: str | None
    tasks: tuple[TaskRow, ...]
    overall: Interval | None
    vector_formats: tuple[VectorFormatRow, ...] = ()
    """Retrieval scores with the model's vectors stored in fewer bytes."""
    lengths: dict[str, tuple[Bucket, ...]] = {}
    """The model's scores on retrieval tasks, by the length of the documents."""
    mteb: dict[str, dict[str, object]]
    """The model's results in mteb's own format, by task."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How `evaluate` scores models."""

    data: Path | str | None = None
    """Folder with the tasks' data; None: the data comes from the hub."""
    runtime: str | None = None
    """Runtime of the model, as for `compress.load`; the model it is compared with runs in its own."""
    device: str | None = None
    """Device of both models, as for `compress.load`."""
    dtype: str | None = None
    """Compute dtype of both models, as for `compress.load`."""
    stream: bool = False
    """Whether both models are read block by block."""
    batch_tokens: int | None = None
    """Padded tokens that a batch may hold; None: what suits the device."""
    prompts: Mapping[str, str] | None = None
    """Prompts that replace the models' own of the same name."""
    margin: float = 0.01
    """Accepted loss, as a share of the other model's score."""
    vector_formats: Sequence[str] = ()
    """Ways of storing the model's vectors to score on the retrieval tasks, as `VectorFormat.parse` reads them."""
    calibration: Path | None = None
    """Texts that ranges and axes of the vector formats are fitted on; None: the embedded calibration texts."""
    lengths: bool = False
    """Whether the scores of retrieval tasks are split by the length of the documents."""
    key_variable: str | None = None
    """Environment variable with the API key of servers."""
    timeout: float = 60.0
    """Seconds for a request to a server."""


ScoreElsewhere = Callable[[str, str | None, Sequence[str]], "Iterator[TaskScore]"]
"""Scores a model, given by its name and runtime, on tasks, given by theirs, somewhere else; in the order of the tasks."""


def evaluate(
    model: str,
    tasks: Sequence[str],
    options: EvaluationOptions | None = None,
    *,
    against: str | None = None,
    elsewhere: ScoreElsewhere | None = None,
    say: Callable[[str], None] = print,
) -> Evaluation:
    """Score a model on tasks; with `against`, compare it with another model in pairs.

    Args:
        model: any name that `compress.load` takes, or the address of a server, as `compress.runtimes.remote.Client` takes it.
        tasks: names of tasks, benchmarks or subsets; see `compress.measure.accuracy.tasks.find_tasks`.
        options: None: all defaults.
        against: another model, such as the one that a variant was made from.
        elsewhere: scores the tasks; None: they are scored here, one after the other.
        say: called with a line for each score.

    Raises:
        UserError: a model or a task is not there, or a model's weights are random.
    """
    options = options or EvaluationOptions()
    formats = [VectorFormat.parse(name) for name in options.vector_formats]
    texts = read_texts(options.calibration) if options.calibration else calibration_texts()
    names = [name for name in (against, model) if name is not None]
    sources = [_source(name, options) for name in names]
    _check_options(sources, options)

    from compress.measure.accuracy.paired import compare_scores
    from compress.measure.accuracy.tasks import find_tasks

    found = find_tasks(tasks, Path(options.data) if options.data else None)
    scores: list[dict[str, TaskScore]] = []
    stored: list[VectorFormatRow] = []
    for name, source in zip(names, sources, strict=True):
        own = source is sources[-1]
        runtime = options.runtime if own else None
        if elsewhere is not None:
            scored_there = elsewhere(name, runtime, [task.name for task in found])
            scores.append(_told(source.name, scored_there, len(found), say))
            continue
        with scored_model(source, options, runtime) as scored:
            scores.append(_told(source.name, map(scored.score, found), len(found), say))
            if formats and own:
                stored = scored.vector_formats(formats, found, texts, options.margin)
            scored.embedder.close()
    theirs, ours = scores[0], scores[-1]
    compared = compare_scores(theirs, ours, options.margin)
    return Evaluation(
        model=sources[-1].name,
        against=sources[0].name if against else None,
        tasks=tuple(task_row(theirs[name], ours[name], compared.tasks[name], {}) for name in ours),
        overall=compared.overall if against else None,
        vector_formats=tuple(stored),
        lengths=_by_length(found, ours, sources[-1]) if options.lengths else {},
        mteb={name: score.mteb for name, score in ours.items()},
    )


def _source(name: str, options: EvaluationOptions) -> ModelFolder | RemoteEmbedder:
    """Find a model, or ask a server.

    Raises:
        UserError: it is not there, or its weights are random.
    """
    if is_url(name):
        return RemoteEmbedder(Client(name, options.key_variable, options.timeout))
    source = find(name)
    if source.is_random:
        raise UserError(f"model {source.name!r}: accuracy cannot be measured on random weights")
    return source


def _check_options(sources: Sequence[ModelFolder | RemoteEmbedder], options: EvaluationOptions) -> None:
    """See that a server is asked for nothing that only a model here can do.

    Raises:
        UserError: it is.
    """
    if not isinstance(sources[-1], RemoteEmbedder):
        return
    refused = {"--runtime": options.runtime, "--lengths": options.lengths}
    if all(isinstance(source, RemoteEmbedder) for source in sources):
        refused |= {"--device": options.device, "--dtype": options.dtype, "--stream": options.stream}
    for option, value in refused.items():
        if value:
            raise UserError(f"{option}: a server decides that itself, and {sources[-1].name!r} is one", f"leave out {option}")


@contextmanager
def scored_model(source: ModelFolder | RemoteEmbedder, options: EvaluationOptions, runtime: str | None) -> Iterator[Scored]:
    """Give a model as tasks see it. Its vectors and scores are kept in the cache; those of a server, which may change, are not."""
    if isinstance(source, RemoteEmbedder):
        with tempfile.TemporaryDirectory(prefix="compress-") as folder:
            yield Scored(source, lambda: source, Path(folder), prompts=options.prompts)
        return
    yield _cached(source, options, runtime)


def _cached(source: ModelFolder, options: EvaluationOptions, runtime: str | None) -> Scored:
    from compress.runtimes.torch_runtime import pick_device

    device, dtype = str(pick_device(options.device)), options.dtype
    opened = partial(open_source, source, runtime=runtime, device=device, dtype=dtype, stream=options.stream)
    chosen = runtime_of(source, runtime, device=device, dtype=dtype)
    key = baseline_key(source.fingerprint, dtype, device, options.batch_tokens, chosen)
    return Scored(source, opened, key, batch_tokens=options.batch_tokens, prompts=options.prompts)


def _told(name: str, made: Iterable[TaskScore], count: int, say: Callable[[str], None]) -> dict[str, TaskScore]:
    """Say a model's scores as they are made, and return them by task."""
    scores = {}
    for number, score in enumerate(made, start=1):
        scores[score.task] = score
        say(f"{name} {number}/{count} {score.task}: {score.metric} {100 * score.score:.2f} ({score.seconds:.0f} s)")
    return scores


def named_model(name: str, runtime: str | None, options: EvaluationOptions) -> Scored:
    """Return a model of this machine as tasks see it.

    Args:
        name: as for `compress.load`.
        runtime: its runtime; that of the options is ignored.
        options: how it is opened and scored.

    Raises:
        UserError: it is not there, or its weights are random.
    """
    source = _source(name, options)
    assert isinstance(source, ModelFolder), "servers are scored where the evaluation runs"
    return _cached(source, options, runtime)


def _by_length(
    tasks: Sequence[Task], scores: Mapping[str, TaskScore], source: ModelFolder | RemoteEmbedder
) -> dict[str, tuple[Bucket, ...]]:
    from compress.measure.accuracy.lengths import by_length

    assert isinstance(source, ModelFolder), "refused of a server"
    tokenizer = source.tokenizer
    searched = (task for task in tasks if task.mteb.metadata.type == "Retrieval" and scores[task.name].examples.parts)
    return {task.name: tuple(by_length(task, scores[task.name], tokenizer)) for task in searched}
