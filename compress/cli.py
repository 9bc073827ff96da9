"""The verbs of the command line; no logic. What a user can mend ends in clean lines and exit code 2, never in a traceback."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from compress.common.errors import UserError
from compress.common.files import write_text_atomic

app = typer.Typer(
    help="Makes text embedders smaller and faster, and measures what that cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/int8.yaml.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="A built-in name, a folder or a hub name; overrides the recipe's."),
]
DeviceOption = Annotated[str | None, typer.Option(metavar="D", help="cpu or cuda; by default the GPU where there is one.")]
RuntimeOption = Annotated[
    str | None,
    typer.Option(metavar="R", help="torch, onnxruntime, openvino or auto; by default what the variant was made for."),
]
RunsArgument = Annotated[list[Path], typer.Argument(metavar="[FOLDER ...]", help="Runs, or folders of runs; by default results.")]
RESULTS = [Path("results")]
OutputOption = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of the runs.")]


@app.command()
def run(
    recipe: RecipeArgument,
    model: ModelOption = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Local data of the tasks; without it, the hub.")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="A,B", help="Task names, or mini; overrides the recipe's.")] = None,
    texts: Annotated[str | None, typer.Option(metavar="FILE", help="Texts to measure speed and fidelity on.")] = None,
    output: OutputOption = Path("results"),
    device: DeviceOption = None,
    compress_only: Annotated[bool, typer.Option("--compress-only", help="Make the variant and measure nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run of the same name.")] = False,
) -> None:
    """Compress a model by a recipe and measure what that cost. A run that was stopped is continued."""
    from compress.pipeline.recipe_file import read_recipe

    checked = read_recipe(recipe)  # before anything heavy is imported
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else None
    with stoppable():
        from compress.pipeline.run import run as run_recipe
        from compress.reports.terminal import print_record

        record = run_recipe(
            checked,
            model=model,
            data=data,
            tasks=names,
            texts=texts,
            output=output,
            device=device,
            fresh=fresh,
            compress_only=compress_only,
        )
    print_record(record)
    print(f"record: {output / record.run}")
    if not all(gate.kept for gate in record.gates):
        raise typer.Exit(1)


@app.command()
def plan(recipe: RecipeArgument, model: ModelOption = None, output: OutputOption = Path("results")) -> None:
    """Say what a recipe would do to a model: sizes, memory, time, and what does not fit. Loads no weight."""
    from compress.models.source import find_shape
    from compress.pipeline.plan import describe, make_plan
    from compress.pipeline.recipe_file import read_recipe

    checked = read_recipe(recipe)
    print(describe(make_plan(checked, find_shape(model or checked.model), output)))


@app.command()
def encode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A built-in name, a folder, a run or a hub name.")],
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help="Texts, one a line, or JSON lines with `text`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the vectors go: float32 .npy.")],
    prompt: Annotated[str | None, typer.Option(metavar="P", help="Put before every text.")] = None,
    runtime: RuntimeOption = None,
    device: DeviceOption = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read the model block by block; it need not fit in memory.")] = False,
) -> None:
    """Embed texts."""
    from compress.data.texts import read_texts

    lines = read_texts(texts)
    with stoppable():
        from compress.common.files import save_array
        from compress.runtimes.loading import load

        vectors = load(model, runtime=runtime, device=device, stream=stream).encode(lines, prompt)
        save_array(output, vectors)
    print(f"{output}: {vectors.shape[0]} vectors of {vectors.shape[1]} dimensions")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A built-in name, a folder, a run or a hub name.")],
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Task or benchmark names, mini, lite.")] = "mini",
    against: Annotated[str | None, typer.Option(metavar="OTHER", help="Another model, to be compared with in pairs.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Local data of the tasks; without it, the hub.")] = None,
    margin: Annotated[float, typer.Option(metavar="SHARE", help="Loss that is accepted, of the other's score.")] = 0.01,
    outputs: Annotated[str, typer.Option(metavar="A,B", help="Ways to store vectors: int8, pca-192, binary+rescore, ...")] = "",
    calibration: Annotated[Path | None, typer.Option(metavar="FILE", help="Texts that these are fitted on.")] = None,
    lengths: Annotated[bool, typer.Option("--lengths", help="Split retrieval scores by the documents' lengths.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="For the results in mteb's format.")
    ] = None,
    runtime: RuntimeOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(metavar="T", help="float32, float16 or bfloat16.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read the model block by block; it need not fit in memory.")] = False,
) -> None:
    """Score a model on tasks, alone or against another. With --against, a regression is exit code 1."""
    with stoppable():
        from compress.common.files import write_text_atomic
        from compress.measure.evaluate import evaluate as evaluate_model
        from compress.reports.terminal import print_evaluation

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        told = partial(print, file=sys.stderr, flush=True)
        found = evaluate_model(
            model,
            names,
            against=against,
            data=data,
            runtime=runtime,
            device=device,
            dtype=dtype,
            stream=stream,
            margin=margin,
            outputs=[name.strip() for name in outputs.split(",") if name.strip()],
            calibration=calibration,
            lengths=lengths,
            say=told,
        )
        if output is not None:
            for task, result in found.mteb.items():
                write_text_atomic(output / f"{task}.json", json.dumps(result, indent=1) + "\n")
    print_evaluation(found)
    if found.overall is not None and found.overall.verdict == "regressed":
        raise typer.Exit(1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a run or a hub name.")],
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(metavar="T", help="float32, float16 or bfloat16.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read the model block by block; it need not fit in memory.")] = False,
) -> None:
    """Run the example of a model's card and compare with the scores that the card prints; exit code 1 where they differ."""
    with stoppable():
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
    with stoppable():
        from compress.measure.doctor.diagnose import Options, diagnose
        from compress.measure.doctor.report import describe

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


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run that kept its variant, or of a variant.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="F",
            help="transformers, sentence-transformers, onnx, openvino, compressed-tensors, gptq, gguf, nv-embed.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to be written.")],
    licence: Annotated[
        str | None, typer.Option("--licence", metavar="L", help="Of the model, where its own files name none: mit, apache-2.0, ...")
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option("--python", metavar="FILE", help="Interpreter that has the library; by default this one."),
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Read it back with the library and compare vectors.")] = True,
) -> None:
    """Write a variant in the layout of another library, and let that read it back."""
    with stoppable():
        from compress.export import export as export_variant
        from compress.export import licence_of

        if licence is None and licence_of(run) is None:
            licence = _asked_licence(run)
        say = partial(print, file=sys.stderr, flush=True)
        written = export_variant(run, format, output, say, licence=licence, python=python, check=check)
    print(written)


def _asked_licence(run: Path) -> str:
    """Ask for the licence that no file names; where nobody can answer, say how it is given."""
    why = "the files of its model name no licence, and what holds for the model holds for the export"
    if not sys.stdin.isatty():
        raise UserError(f"{run}: {why}", "name it: --licence mit; --licence unknown where it is not to be found out")
    answer: str = typer.prompt(f"{run}: {why}. Its licence")
    return answer


@app.command()
def compare(
    runs: RunsArgument = RESULTS,
    format: Annotated[str, typer.Option("--format", metavar="F", help="table, markdown, svg, csv or json.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Written there, not printed.")] = None,
) -> None:
    """Show runs side by side, those apart that are not comparable; no other run beats those that are marked."""
    from compress.reports.compare import compare as compare_runs
    from compress.reports.formats import written

    text = written(compare_runs(runs), format)
    if output is None:
        print(text, end="")
    else:
        write_text_atomic(output, text)


@app.command()
def dashboard(
    runs: RunsArgument = RESULTS,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    serve: Annotated[bool, typer.Option("--serve", help="Serve the page here and load it again when a record changes.")] = False,
    port: Annotated[int, typer.Option(metavar="N", help="Of --serve; 0: any that is free.")] = 8765,
) -> None:
    """Write one page with every run: charts, tables, whole records; it needs no network and no other file."""
    from compress.reports.dashboard import render
    from compress.reports.dashboard import serve as serve_page

    if serve:
        with suppress(KeyboardInterrupt):
            serve_page(runs, port, say=partial(print, file=sys.stderr, flush=True))
        return
    write_text_atomic(output, render(runs))
    print(output)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from compress.pipeline.recipe_file import schema as recipe_schema

    print(json.dumps(recipe_schema(), indent=1))


@contextmanager
def stoppable() -> Iterator[None]:
    """Answer Ctrl-C in our words; typer would end the process without any."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise UserError("stopped", "what a run had finished is kept; the same command continues it") from error


def main() -> None:
    """Run the command line."""
    try:
        app()
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
