"""The commands; no logic. An error that a user can fix ends in two clean lines and exit code 2, never in a traceback."""

from __future__ import annotations

if __name__ == "__main__":  # `python -m compress.cli`: ready for signals before anything else is imported
    from compress.common.entry import main as _start

    _start()

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.common.cache import KINDS as CACHE_KINDS
from compress.common.errors import UserError, nearest
from compress.common.files import check_target, write_text_atomic
from compress.common.words import LOCAL_RAY, accepting
from compress.export import FORMATS as EXPORT_FORMATS
from compress.measure.accuracy.own_task import TYPES as TASK_TYPES
from compress.measure.accuracy.own_task import write_example
from compress.reports import FORMATS as COMPARE_FORMATS
from compress.runtimes.contract import RUNTIMES

app = typer.Typer(
    help="Make text embedders smaller and faster, and measure what that costs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


ALIGN_MAPS = ("auto", "rotation", "linear")
RUNS_BEFORE = {"--output": "--runs"}
TO_BEFORE = {"--output": "--to"}
EVALUATE_BEFORE = {**TO_BEFORE, "--outputs": "--vector-formats"}

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file, such as recipes/int8.yaml.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Built-in name, folder or hub name; overrides the recipe."),
]
DeviceOption = Annotated[str | None, typer.Option(metavar="D", help="cpu or cuda; defaults to the GPU if there is one.")]
RuntimeOption = Annotated[
    str | None,
    typer.Option(metavar="R", help=f"{', '.join(RUNTIMES)} or auto; defaults to the runtime that the variant was made for."),
]
RunsArgument = Annotated[list[Path], typer.Argument(metavar="[FOLDER ...]", help="Runs, or folders of runs; defaults to results.")]
RESULTS = [Path("results")]
RunsOption = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder in which runs are kept.")]
DataOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder with the tasks' data; defaults to downloading it from the hub.")
]
DtypeOption = Annotated[str | None, typer.Option(metavar="T", help="float32, float16 or bfloat16.")]
StreamOption = Annotated[bool, typer.Option("--stream", help="Read the model block by block, so that it need not fit in memory.")]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Work in workers of Ray: auto, HOST:PORT or ray://HOST:PORT; without one, on this machine.",
    ),
]
WorkersOption = Annotated[int, typer.Option(metavar="N", help="With --ray: number of workers.")]
WorkerCpusOption = Annotated[int, typer.Option("--worker-cpus", metavar="N", help="With --ray: cores of each worker.")]
WorkerGpusOption = Annotated[float, typer.Option("--worker-gpus", metavar="N", help="With --ray: GPUs of each worker.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, folder, run or hub name.")]


@app.command(cls=accepting(RUNS_BEFORE))
def run(
    recipe: RecipeArgument,
    model: ModelOption = None,
    data: DataOption = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Task names, mini, or ./FOLDERS; overrides the recipe.")] = None,
    texts: Annotated[str | None, typer.Option(metavar="FILE", help="Texts to measure on; overrides the recipe.")] = None,
    runs: RunsOption = Path("results"),
    device: DeviceOption = None,
    compress_only: Annotated[bool, typer.Option("--compress-only", help="Make the variant, measure nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an earlier run of the same name and start over.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another process that works at the same run.")] = False,
) -> None:
    """Compress a model by a recipe and measure what that costs. A run that was stopped continues."""
    from compress.pipeline.recipe_file import read_recipe

    checked = read_recipe(recipe)  # before anything heavy is imported
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else None
    from compress.common.ranks import Place
    from compress.pipeline.run import run as run_recipe
    from compress.reports.terminal import print_record

    record = run_recipe(
        checked,
        model=model,
        data=data,
        tasks=names,
        texts=texts,
        output=runs,
        device=device,
        fresh=fresh,
        compress_only=compress_only,
        wait=wait,
    )
    place = Place.own()
    if place is None or place.rank == 0:
        print_record(record)
        print(f"record: {runs / record.run}")
    if not all(gate.kept for gate in record.gates):
        raise typer.Exit(1)


@app.command(cls=accepting(RUNS_BEFORE))
def plan(recipe: RecipeArgument, model: ModelOption = None, runs: RunsOption = Path("results")) -> None:
    """Show what a recipe would do to a model: sizes, memory, time, and what does not fit. Loads no weights."""
    from compress.models.source import find_shape
    from compress.pipeline.plan import describe, make_plan
    from compress.pipeline.recipe_file import read_recipe

    checked = read_recipe(recipe)
    print(describe(make_plan(checked, find_shape(model or checked.model, to_compress=True), runs)))


ChoicesOption = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Choices to consider, such as int8,int4,int3; defaults to all that the runtime executes."),
]
PerOption = Annotated[str, typer.Option(metavar="P", help="group: layers with one input get one choice; layer: each its own.")]
ForwardOption = Annotated[
    bool, typer.Option("--forward", help="Run each choice through the rest of the model, instead of taking derivatives.")
]
CountOption = Annotated[int, typer.Option(metavar="N", help="Texts to calibrate on.")]
ScoredOption = Annotated[int, typer.Option(metavar="N", help="Other texts to compare vectors on.")]
SearchTextsOption = Annotated[str, typer.Option("--texts", metavar="FILE", help="Texts, as a recipe's calibration.texts.")]


@app.command()
def sensitivity(
    model: ModelArgument,
    choices: ChoicesOption = None,
    per: PerOption = "group",
    forward: ForwardOption = False,
    texts: SearchTextsOption = "embedded",
    count: CountOption = 384,
    scored: ScoredOption = 64,
    runtime: Annotated[str, typer.Option(metavar="R", help="Runtime whose choices are scored.")] = "torch",
    device: DeviceOption = None,
    show: Annotated[str, typer.Option(metavar="A,B", help="Choices to show a map of; defaults to one.")] = "",
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw all maps into this file.")] = None,
    to: Annotated[
        Path | None, typer.Option("--to", "-o", metavar="FILE", help="Also write the record, FILE.sensitivity.json.")
    ] = None,
) -> None:
    """Score what each choice for each group of layers does to a model's vectors. Needs no labels; a killed one continues."""
    from compress.measure.sensitivity import SUFFIX
    from compress.reports.heat_map import print_heat_map
    from compress.reports.heat_map import svg as drawn
    from compress.search.options import sensitivity_options
    from compress.search.sensitivity import sensitivity as score_model

    if to is not None and not to.name.endswith(SUFFIX):
        raise UserError(f"{to}: the file of a sensitivity ends with {SUFFIX}", f"-o {to.with_suffix('')}{SUFFIX}")
    for target in filter(None, (svg, to)):
        check_target(target)
    options = sensitivity_options(
        choices=choices, per=per, forward=forward, texts=texts, count=count, scored=scored, runtime=runtime, device=device
    )
    found = score_model(model, options, partial(print, file=sys.stderr, flush=True))
    if to is not None:
        found.write(to)
    if svg is not None:
        write_text_atomic(svg, drawn(found))
    print_heat_map(found, [name.strip() for name in show.split(",")])


@app.command()
def search(
    model: ModelArgument,
    max_size: Annotated[str | None, typer.Option("--max-size", metavar="S", help="Most bytes of the weights: 12MB, 3GB.")] = None,
    min_speedup: Annotated[
        float | None, typer.Option("--min-speedup", metavar="X", help="Least throughput over the model's in float32.")
    ] = None,
    min_kept: Annotated[
        float | None,
        typer.Option("--min-kept", metavar="P", help="Least percent of the mean score, by the lower end of its interval."),
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Tasks that the recipe is scored on.")] = "mini",
    data: DataOption = None,
    choices: ChoicesOption = None,
    per: PerOption = "layer",
    table: Annotated[bool, typer.Option("--table/--fixed-table", help="Search the token table, or store it in int8.")] = True,
    trials: Annotated[int, typer.Option(metavar="N", help="Random assignments on which sums of scores are tested.")] = 12,
    texts: SearchTextsOption = "embedded",
    count: CountOption = 384,
    scored: ScoredOption = 64,
    runtime: Annotated[str, typer.Option(metavar="R", help="Runtime that is to execute the variant.")] = "torch",
    device: DeviceOption = None,
    to: Annotated[Path, typer.Option("--to", "-o", metavar="FILE", help="The recipe to write.")] = Path("searched.yaml"),
) -> None:
    """Find a recipe that keeps bounds on size, speed and accuracy. A search that was killed continues."""
    from compress.search.budget import Bounds, SearchOptions, write_found
    from compress.search.budget import search as search_model
    from compress.search.options import names_in, sensitivity_options, size_of

    check_target(to)
    options = sensitivity_options(
        choices=choices, per=per, forward=False, texts=texts, count=count, scored=scored, runtime=runtime, device=device
    )
    bounds = Bounds(None if max_size is None else size_of(max_size), min_speedup, min_kept)
    how = SearchOptions(
        scoring=options,
        trials=trials,
        tasks=names_in(tasks) or (),
        data=None if data is None else str(data),
        name=to.stem,
        table=table,
    )
    found = search_model(model, bounds, how, partial(print, file=sys.stderr, flush=True))
    write_found(found, to)
    print(f"{to}: {found.recipe.description}")
    print(f"compress run {to} makes and measures it")


@app.command(cls=accepting({}))
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep file: recipes, models, values of keys, rounds.")],
    runs: RunsOption = Path("results"),
    show: Annotated[bool, typer.Option("--show", help="Only show what would be run.")] = False,
    workers: Annotated[int, typer.Option(metavar="N", help="Runs at a time, each in a process of its own.")] = 1,
    ray: RayOption = None,
    worker_cpus: WorkerCpusOption = 1,
    worker_gpus: WorkerGpusOption = 0.0,
    device: DeviceOption = None,
) -> None:
    """Run recipes with many values, drop the worst round by round, and name the best. A sweep that was stopped continues."""
    from compress.search.sweep_file import read_sweep

    plan = read_sweep(file)  # before anything heavy is imported
    from compress.search.sweep import SweepOptions, describe
    from compress.search.sweep import sweep as run_sweep
    from compress.search.sweep_table import print_sweep

    if show:
        print("\n".join(describe(plan)))
        return
    by = _ray(ray, workers if ray is not None else 1, worker_cpus, worker_gpus)
    found = run_sweep(plan, SweepOptions(runs, device, workers, by), partial(print, file=sys.stderr, flush=True))
    print_sweep(found)
    print(f"records: {runs}; compress dashboard {runs} shows them")
    if found.code:
        raise typer.Exit(found.code)


@app.command(cls=accepting(TO_BEFORE))
def encode(
    model: ModelArgument,
    texts: Annotated[
        str,
        typer.Argument(
            metavar="TEXTS",
            help="Texts, one per line, or the `text` of .jsonl, .json, .csv, .tsv, .parquet. A corpus: also a folder, a quoted "
            "pattern, hub:OWNER/NAME[:COLUMN[:SPLIT]], .gz, .zst.",
        ),
    ],
    to: Annotated[
        str, typer.Option("--to", "-o", metavar="FILE", help="File for the vectors: float32, .npy. FOLDER/: Parquet parts.")
    ],
    prompt: Annotated[str | None, typer.Option(metavar="P", help="Prompt that is put before every text.")] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="T", help="query or document: takes the model's prompt of that name, and the route of its Router."),
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="C", help="Column or key of the texts; defaults to text.")] = None,
    id_column: Annotated[
        str | None, typer.Option("--id-column", metavar="C", help="Column or key of the ids; defaults to numbers from 0.")
    ] = None,
    vector_format: Annotated[
        str | None, typer.Option("--vector-format", metavar="F", help="float32, float16, int8 or binary; defaults to float32.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts that int8 and binary are fitted on; defaults to embedded ones.")
    ] = None,
    part_texts: Annotated[
        int | None, typer.Option("--part-texts", metavar="N", help="Texts of a part; defaults to 32,768.")
    ] = None,
    no_truncation: Annotated[
        bool, typer.Option("--no-truncation", help="Reject texts that are longer than the model takes, instead of cutting them.")
    ] = False,
    ray: RayOption = None,
    workers: WorkersOption = 1,
    worker_cpus: WorkerCpusOption = 1,
    worker_gpus: WorkerGpusOption = 0.0,
    runtime: RuntimeOption = None,
    device: DeviceOption = None,
    stream: StreamOption = False,
) -> None:
    """Embed texts. Vectors are written as they are made; a corpus that was stopped continues."""
    from compress.data.corpus import is_corpus
    from compress.runtimes.encoding import EncodeOptions, encode_file

    how = EncodeOptions(prompt=prompt, task=task, runtime=runtime, device=device, stream=stream)
    asked: dict[str, Any] = {
        "column": column,
        "id_column": id_column,
        "vector_format": vector_format,
        "calibration": calibration,
        "part_texts": part_texts,
        "truncate": False if no_truncation else None,
    }
    if ray is not None or any(value is not None for value in asked.values()) or is_corpus(texts, to):
        _encode_corpus(model, texts, Path(to), how, asked, _ray(ray, workers, worker_cpus, worker_gpus))
        return
    target = Path(to)
    check_target(target, make_folders=False)
    if target.suffix.lower() not in (".npy", ""):
        raise UserError(f"{to}: vectors are written as .npy, not as {target.suffix}", f"-o {target.with_suffix('.npy')}")
    count, dimension = encode_file(model, Path(texts), target, how)
    if not count:
        print(f"{texts}: holds no texts", file=sys.stderr)
    print(f"{to}: {count} vectors of {dimension} dimensions")


def _ray(address: str | None, workers: int, cpus: int, gpus: float) -> Any:
    """Return who embeds or scores: None for this process."""
    from compress.scale.units import RayOptions

    if address is None:
        if (workers, cpus, gpus) != (1, 1, 0.0):
            raise UserError("--workers, --worker-cpus and --worker-gpus are for workers of Ray", "add --ray")
        return None
    return RayOptions(None if address == LOCAL_RAY else address, workers, cpus, gpus)


def _encode_corpus(model: str, texts: str, target: Path, how: Any, asked: Mapping[str, Any], ray: Any) -> None:
    """Embed a corpus and say what became of it."""
    from compress.data.rows import Columns
    from compress.scale.corpora import CorpusOptions, encode_corpus
    from compress.scale.encoder import check_store

    given = {name: value for name, value in asked.items() if value is not None}
    columns = Columns(given.pop("column", "text"), given.pop("id_column", None))
    store = check_store(given.pop("vector_format", "float32"))
    if target.suffix.lower() != ".npy" and target.suffix and not target.is_dir():
        raise UserError(f"{target}: vectors are written as .npy, or into a folder", f"-o {target.with_suffix('')}/")
    told = partial(print, file=sys.stderr, flush=True)
    made = encode_corpus(model, texts, target, CorpusOptions(how, columns, store, **given), ray=ray, say=told)
    if not made.texts:
        print(f"{texts}: holds no texts", file=sys.stderr)
    print(f"{target}: {made.texts} vectors of {made.dimension} dimensions, {store}, {made.parts} parts")
    if made.rejected:
        where = target.with_suffix(".rejects.jsonl") if target.suffix.lower() == ".npy" else target / "_rejects.jsonl"
        print(f"{where}: {made.rejected} texts have no vector", file=sys.stderr)


task_app = typer.Typer(help="Tasks of your own: a folder with texts and a task.yaml.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(task_app, name="task")


@task_app.command("init")
def task_init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    type: Annotated[str, typer.Option("--type", metavar="T", help=f"{', '.join(TASK_TYPES)}.")],
) -> None:
    """Write a small task of a type, to be filled with your own texts."""
    for path in write_example(folder, type):
        print(path)
    print(f"compress task check {folder} says whether it is right")


@task_app.command("check")
def task_check(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with a task.yaml.")]) -> None:
    """Say what is wrong with a task of your own, by file and line, or what is in it."""
    from compress.measure.accuracy.own_check import check_own

    print(check_own(folder))


@app.command(cls=accepting(EVALUATE_BEFORE))
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Built-in name, folder, run, hub name, or a server's address.")],
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Names of tasks or benchmarks, mini, lite, or ./FOLDERS.")] = "mini",
    against: Annotated[str | None, typer.Option(metavar="OTHER", help="Another model to compare with, in pairs.")] = None,
    data: DataOption = None,
    margin: Annotated[float, typer.Option(metavar="SHARE", help="Accepted loss, as a share of the other model's score.")] = 0.01,
    vector_formats: Annotated[
        str, typer.Option(metavar="A,B", help="Also score vectors stored as these: int8, pca-192, binary+rescore, ...")
    ] = "",
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts that vector formats are fitted on.")] = None,
    lengths: Annotated[bool, typer.Option("--lengths", help="Split retrieval scores by document length.")] = False,
    to: Annotated[Path | None, typer.Option("--to", "-o", metavar="FOLDER", help="Folder for results in mteb's format.")] = None,
    key: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the API key of a server.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds for each request to a server.")] = 60.0,
    runtime: RuntimeOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    stream: StreamOption = False,
    ray: RayOption = None,
    workers: WorkersOption = 1,
    worker_cpus: WorkerCpusOption = 1,
    worker_gpus: WorkerGpusOption = 0.0,
) -> None:
    """Score a model on tasks, alone or against another model. With --against, a regression exits with code 1."""
    from compress.measure.evaluate import EvaluationOptions
    from compress.measure.evaluate import evaluate as evaluate_model
    from compress.reports.terminal import print_evaluation

    if to is not None:
        check_target(to / "results.json")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    told = partial(print, file=sys.stderr, flush=True)
    options = EvaluationOptions(
        data=data,
        runtime=runtime,
        device=device,
        dtype=dtype,
        stream=stream,
        margin=margin,
        vector_formats=[name.strip() for name in vector_formats.split(",") if name.strip()],
        calibration=calibration,
        lengths=lengths,
        key_variable=key,
        timeout=timeout,
    )
    by = _ray(ray, workers, worker_cpus, worker_gpus)
    if by is None:
        found = evaluate_model(model, names, options, against=against, say=told)
    else:
        from compress.scale.tasks import evaluate_many

        found = evaluate_many(model, names, options, ray=by, against=against, say=told)
    if to is not None:
        for task, result in found.mteb.items():
            write_text_atomic(to / f"{task}.json", json.dumps(result, indent=1) + "\n")
    print_evaluation(found)
    if found.overall is not None and found.overall.verdict == "regressed":
        raise typer.Exit(1)


@app.command()
def align(
    new: Annotated[
        str, typer.Argument(metavar="NEW", help="Model that is to embed queries: built-in name, folder, run, hub name.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="OLD", help="Model that made the index.")],
    texts: Annotated[str, typer.Option(metavar="FILE", help="Texts like the queries to come, which both models embed.")],
    output: Annotated[Path, typer.Option("-o", metavar="FOLDER", help="Folder for the aligned model and the record.")],
    map: Annotated[str, typer.Option("--map", metavar="M", help="rotation, linear, or auto: the better one.")] = "auto",
    train: Annotated[float, typer.Option("--train", metavar="MINUTES", help="Also train the queries' model for so long.")] = 0.0,
    count: Annotated[int | None, typer.Option(metavar="N", help="Number of texts to use; defaults to all.")] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Retrieval tasks; defaults to the embedded one.")] = "MiniRetrieval",
    data: DataOption = None,
    min_kept: Annotated[float, typer.Option(metavar="PERCENT", help="Least share of OLD's scores to keep.")] = 97.0,
    runtime: Annotated[str | None, typer.Option(metavar="R", help="Runtime to make the aligned model for.")] = None,
    device: DeviceOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again what an earlier call was stopped at.")] = False,
) -> None:
    """Let a new model search an old model's index, and say whether the index may be kept. If not, the exit code is 1."""
    from compress.pipeline.align import AlignOptions
    from compress.pipeline.align import align as align_model
    from compress.reports.terminal import print_alignment

    if not 0 < min_kept <= 100:
        raise UserError(f"--min-kept {min_kept:g}: is a share in percent", "such as 97")
    if map not in ALIGN_MAPS:
        raise UserError(f"--map {map!r} is not known", nearest(map, ALIGN_MAPS))
    options = AlignOptions(
        texts=texts,
        map=map,  # type: ignore[arg-type]
        minutes=train,
        count=count,
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        data=data,
        min_kept=min_kept / 100,
        runtime=runtime,
        device=device,
        fresh=fresh,
    )
    record = align_model(new, to, output, options)
    print_alignment(record)
    print(f"record: {output}")
    assert record.alignment is not None
    if not record.alignment.keep_index:
        raise typer.Exit(1)


@app.command()
def verify(
    model: ModelArgument,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    stream: StreamOption = False,
) -> None:
    """Run the example from a model's card and compare the scores with the printed ones. Exits with code 1 if they differ."""
    from compress.measure.verify import describe
    from compress.measure.verify import verify as verify_model

    found = verify_model(model, device=device, dtype=dtype, stream=stream)
    print(describe(found))
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a run, an export, a hub name or an endpoint's address.")],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="R", help="As MODEL; by default sentence-transformers, or what a variant is made from."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="P", help="A prompt's name, or its text; by default each side's own.")
    ] = None,
    at_least: Annotated[float | None, typer.Option(metavar="C", help="Lowest cosine of vectors that are the same.")] = None,
    python: Annotated[Path | None, typer.Option(metavar="FILE", help="Interpreter that has sentence-transformers.")] = None,
    key: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the endpoints' API key.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds for each request to an endpoint.")] = 60.0,
    runtime: RuntimeOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(metavar="T", help="float32, float16 or bfloat16; by default float32.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read the model block by block; it need not fit in memory.")] = False,
    to: Annotated[Path | None, typer.Option("--to", "-o", metavar="FILE", help="The diagnosis as JSON.")] = None,
) -> None:
    """Compare a model's vectors with those it should give, and name the cause where they differ: exit code 1; 2: not comparable."""
    from compress.measure.doctor.diagnose import Options, diagnose
    from compress.measure.doctor.report import describe

    if to is not None:
        check_target(to)
    options = Options(
        reference=reference,
        prompt=prompt,
        python=python,
        key_variable=key,
        timeout=timeout,
        at_least=at_least,
        device=device,
        dtype=dtype,
        runtime=runtime,
        stream=stream,
        say=partial(print, file=sys.stderr, flush=True),
    )
    found = diagnose(model, options)
    if to is not None:
        write_text_atomic(to, found.model_dump_json(indent=1) + "\n")
    print(describe(found))
    if not found.same:
        raise typer.Exit(1)


@app.command(cls=accepting(TO_BEFORE))
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that kept its variant, or of a variant.")],
    to: Annotated[Path, typer.Option("--to", "-o", metavar="FOLDER", help="Folder for the export.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="F",
            help=f"{', '.join(EXPORT_FORMATS)}; with --depth it defaults to a variant.",
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option("--depth", metavar="N", help="Write only the first N blocks of a variant trained with `depth: any`."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", metavar="L", help="The model's licence, if its files name none: mit, apache-2.0, ..."),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option("--python", metavar="FILE", help="Python interpreter that has the library installed; defaults to this one."),
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Load the export with the library and compare vectors.")] = True,
    push: Annotated[str | None, typer.Option("--push", metavar="OWNER/NAME", help="Also upload the export to the hub.")] = None,
) -> None:
    """Write a variant in the layout of another library, and check that the library reads it."""
    from compress.export import VARIANT, licence_of
    from compress.export import export as export_variant
    from compress.export.push import check_push
    from compress.export.push import push as push_export

    if format is None and depth is None:
        raise UserError("export takes a --format", f"one of {', '.join(EXPORT_FORMATS)}")
    format = format or VARIANT
    if push is not None:
        if format == VARIANT:
            raise UserError("a variant has no card, with which exports are uploaded", "give a --format too")
        check_push(push)

    if licence is None and format != VARIANT and licence_of(run) is None:
        licence = _asked_licence(run)
    say = partial(print, file=sys.stderr, flush=True)
    written = export_variant(run, format, to, say, licence=licence, python=python, check=check, depth=depth)
    print(written)
    if push is not None:
        print(push_export(written, push))


def _asked_licence(run: Path) -> str:
    """Ask for the licence that no file names; without a terminal, say which option gives it."""
    why = "the model's files name no licence, and the export is under the model's licence"
    if not sys.stdin.isatty():
        raise UserError(f"{run}: {why}", "give it with --licence mit, or --licence unknown if it cannot be found out")
    answer: str = typer.prompt(f"{run}: {why}. Its licence")
    return answer


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a hub name.")],
    to: Annotated[Path, typer.Option("--to", "-o", metavar="FOLDER", help="The folder to write.")],
) -> None:
    """Convert a model's pickled weights to safetensors. A pickle that holds anything except tensors is refused."""
    from compress.models.convert import convert as convert_weights

    written = convert_weights(model, to)
    print("\n".join(map(str, written)))


@app.command(cls=accepting(TO_BEFORE))
def compare(
    runs: RunsArgument = RESULTS,
    format: Annotated[str, typer.Option("--format", metavar="F", help=f"{', '.join(COMPARE_FORMATS)}.")] = "table",
    to: Annotated[Path | None, typer.Option("--to", "-o", metavar="FILE", help="Write to this file instead of printing.")] = None,
) -> None:
    """Compare runs, one table per comparable set; * marks runs that no other run beats."""
    from compress.reports.compare import compare_runs
    from compress.reports.formats import written

    if to is not None:
        check_target(to)
    text = written(compare_runs(runs), format)
    if to is None:
        print(text, end="")
    else:
        write_text_atomic(to, text)


@app.command()
def leaderboard(
    to: Annotated[Path, typer.Option("--to", "-o", metavar="FOLDER", help="Folder that gets results/, as mteb's cache has it.")],
    runs: RunsArgument = RESULTS,
) -> None:
    """Write the scores of runs, and of the models that they were made from, in the layout of mteb's leaderboard."""
    from compress.reports.leaderboard import write_leaderboard

    for folder in write_leaderboard(runs, to):
        print(folder)


@app.command(cls=accepting(TO_BEFORE))
def dashboard(
    runs: RunsArgument = RESULTS,
    to: Annotated[Path, typer.Option("--to", "-o", metavar="FILE", help="File for the page.")] = Path("report.html"),
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page; it reloads when a record changes.")] = False,
    port: Annotated[int, typer.Option(metavar="N", help="Port for --serve; 0 picks a free one.")] = 8765,
    imports: Annotated[
        list[Path] | None,
        typer.Option("--import", metavar="FOLDER", help="Also show others' results, of mteb or HAKARI-Bench; may be repeated."),
    ] = None,
) -> None:
    """Write one page with every run: charts, tables and full records. It needs no network and no other file."""
    from compress.reports.dashboard import render
    from compress.reports.dashboard import serve as serve_page

    if serve:
        with suppress(KeyboardInterrupt):
            serve_page(runs, port, say=partial(print, file=sys.stderr, flush=True), imports=imports or ())
        return
    check_target(to)
    write_text_atomic(to, render(runs, imports=imports or ()))
    print(to)


@app.command()
def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL ...", help="Built-in names, folders, runs or hub names; NAME=MODEL names one.")
    ],
    host: Annotated[str, typer.Option(metavar="H", help="Address to listen on; one that others reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0 picks a free one.")] = 8080,
    key: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="Environment variable with the key that clients send.")
    ] = None,
    without_key: Annotated[bool, typer.Option("--without-key", help="Serve a public address to everybody.")] = False,
    prompt: Annotated[
        str | None, typer.Option(metavar="P", help="Prompt of requests that name none: query, document or a name of the model's.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--instruction-template", metavar="T", help="What a request's {instruction} becomes; defaults to the model's."
        ),
    ] = None,
    dimensions: Annotated[
        str, typer.Option(metavar="A,B", help="Leading dimensions that the models were trained for, which requests may ask for.")
    ] = "",
    runtime: RuntimeOption = None,
    device: Annotated[str | None, typer.Option(metavar="D", help="cpu, cuda, or several: cuda:0,cuda:1.")] = None,
    dtype: DtypeOption = None,
    instances: Annotated[
        int | None, typer.Option(metavar="N", help="Computing processes for each model; defaults to one for each device.")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="CPU threads of each process; defaults to all cores.")] = None,
    max_items: Annotated[int, typer.Option(metavar="N", help="Most inputs of a request.")] = 2048,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of a request.")] = 300_000,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="Largest body of a request.")] = 8 * 2**20,
    max_waiting: Annotated[int, typer.Option(metavar="N", help="Most tokens that wait for a model.")] = 2_000_000,
    max_wait: Annotated[float, typer.Option(metavar="S", help="Requests that would wait longer are answered with 429.")] = 10.0,
    read_timeout: Annotated[float, typer.Option(metavar="S", help="Longest time to send a request, or to take its answer.")] = 30.0,
) -> None:
    """Serve models over HTTP in OpenAI's protocol: /v1/embeddings. SIGTERM or Ctrl-C finishes what was taken, then ends."""
    from compress.serve.server import serve as serve_models
    from compress.serve.settings import Limits, RuntimeOptions, ServeOptions, whole_numbers

    devices = tuple(name.strip() for name in (device or "").split(",") if name.strip())
    opened = RuntimeOptions(runtime, devices, dtype, threads, max(1, len(devices)) if instances is None else instances)
    limits = Limits(
        items=max_items,
        tokens=max_tokens,
        body_bytes=max_body,
        waiting_tokens=max_waiting,
        wait_seconds=max_wait,
        read_seconds=read_timeout,
    )
    options = ServeOptions(
        host=host,
        port=port,
        key_variable=key,
        without_key=without_key,
        prompt=prompt,
        dimensions=whole_numbers(dimensions, "--dimensions"),
        template=template,
        limits=limits,
        opened=opened,
    )
    serve_models(models, options)


@app.command()
def cache(
    action: Annotated[str, typer.Argument(metavar="[list|check|empty]", help="What to do; defaults to list.")] = "list",
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="K", help=f"Empty only {', '.join(CACHE_KINDS)}; defaults to all.")
    ] = None,
) -> None:
    """List, check or empty the cache. A damaged entry is removed by check, and is made again when it is needed."""
    from compress.reports.cached import cache_report

    for line in cache_report(action, kind):
        print(line)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from compress.pipeline.recipe_file import schema as recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


def main() -> None:
    """Run the command line in a process that is not the command's alone; `compress.common.entry` is where the command starts."""
    from compress.common.entry import main as start

    start(own_process=False)
