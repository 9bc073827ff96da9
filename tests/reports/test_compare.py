"""Runs side by side: what may stand together, which no other beats, and every format's own reader."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compress import cli
from compress.common.errors import UserError
from compress.reports.compare import Line, compare_runs, optimal
from compress.reports.dashboard.payload import payload
from compress.reports.formats import as_csv, as_json, as_markdown, as_svg, as_table

RESULTS = Path(__file__).parents[2] / "results"
RUN = RESULTS / "int8-openvino-minilm-4cafb257"
GUIDE = RESULTS.parent / "docs" / "choosing.md"


def copy(folder: Path, name: str, **changes: object) -> Path:
    """A run with another name and other values at the paths (`machine.cores`) that are given."""
    record = json.loads((RUN / "record.json").read_text())
    record["run"] = name
    for path, value in changes.items():
        *above, last = path.split("__")
        place = record
        for key in above:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[int(last) if isinstance(place, list) else last] = value
    (folder / name).mkdir(parents=True)
    (folder / name / "record.json").write_text(json.dumps(record))
    return folder / name


def line(name: str, kept: float | None, size: int, speed: float | None) -> Line:
    return Line(
        run=name, recipe=name, weights="int8", activations="none", runtime="torch", bytes=size, size=1.0, kept=kept, low=None, high=None,
        verdict=None, regressed=(), cosine=None, overlap=None, speedup=speed, texts_per_second=None, latency_ms=None, peak_bytes=None,
    )  # fmt: skip


def best(*lines: Line) -> set[str]:
    return {one.run for one in optimal(lines) if one.optimal}


def test_what_no_other_beats_is_marked() -> None:
    assert best(line("a", 0.99, 10, 2.0), line("b", 0.98, 10, 2.0)) == {"a"}
    assert best(line("a", 0.99, 10, 2.0), line("b", 0.98, 9, 2.0), line("c", 0.97, 11, 3.0)) == {"a", "b", "c"}
    assert best(line("a", 0.99, 10, 2.0), line("twin", 0.99, 10, 2.0)) == {"a", "twin"}
    assert best(line("a", 0.99, 10, 1.94), line("hardly faster", 0.9, 10, 1.95)) == {"a"}
    assert best(line("a", 0.99, 10, 0.0), line("as slow", 0.98, 10, 0.0)) == {"a"}  # a record may say anything
    # A run that was not timed beats none that was; one that was may beat it.
    assert best(line("a", 0.99, 10, 2.0), line("untimed", 1.0, 5, None)) == {"a", "untimed"}
    assert best(line("a", 0.99, 10, 2.0), line("untimed", 0.98, 11, None)) == {"a"}
    assert best(line("a", 0.99, 10, 2.0), line("unscored", None, 1, 9.0)) == {"a"}


@pytest.mark.parametrize(
    "change",
    [
        {"machine__cores": 64},
        {"machine__gpu": "an accelerator"},
        {"versions__torch": "1.0"},
        {"model__fingerprint": "another"},
        {"tasks__0__data": "another"},
        {"tasks__0__prompts": {"text": "find: "}},
        {"measured_on": "8 texts"},
    ],
)
def test_runs_of_other_machines_versions_models_or_data_stand_apart(tmp_path: Path, change: dict[str, object]) -> None:
    copy(tmp_path, "a")
    copy(tmp_path, "b", retained=0.5)
    copy(tmp_path, "c", **change)
    groups = compare_runs([tmp_path]).groups
    assert [[one.run for one in group.lines] for group in groups] == [["a", "b"], ["c"]]


def test_values_are_the_record_s(tmp_path: Path) -> None:
    record = json.loads((RUN / "record.json").read_text())
    (one,) = compare_runs([RUN]).groups[0].lines
    variant = record["rows"][-1]
    assert one.kept == record["retained"]
    assert one.bytes == variant["size_bytes"]
    assert one.speedup == variant["speedup"]["float32"]
    assert one.peak_bytes == variant["speed"]["peak_bytes"]
    baseline = sum(task["baseline"] for task in record["tasks"]) / len(record["tasks"])
    assert one.low == pytest.approx(1 + record["overall"]["low"] / baseline)
    assert one.low < one.kept < one.high  # type: ignore[operator]


def test_what_cannot_be_read_is_listed_and_the_rest_shown(tmp_path: Path) -> None:
    copy(tmp_path, "whole")
    copy(tmp_path, "odd", seed="none")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "record.json").write_text('{"run": ')
    found = compare_runs([tmp_path, tmp_path / "nowhere"])
    assert [one.run for one in found.groups[0].lines] == ["whole"]
    assert {Path(place).name for place in found.broken} == {"odd", "half", "nowhere"}
    assert "seed" in found.broken[str(tmp_path / "odd")]
    for text in (as_table(found), as_markdown(found)):
        assert "nowhere: no such folder" in text
    with pytest.raises(UserError, match="nothing to compare"):
        compare_runs([tmp_path / "nowhere"])


def test_a_table_is_plain_text_where_colours_are_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter and many CI systems set it
    copy(tmp_path, "run")
    assert "\x1b" not in as_table(compare_runs([tmp_path]))


def test_every_format_holds_every_run(tmp_path: Path) -> None:
    for number in range(3):
        copy(tmp_path, f"run-{number}", retained=0.9 + number / 100)
    found = compare_runs([tmp_path])
    rows = list(csv.DictReader(as_csv(found).splitlines()))
    assert [row["run"] for row in rows] == ["run-2", "run-1", "run-0"]
    assert [row["optimal"] for row in rows] == ["True", "False", "False"]
    assert json.loads(as_json(found))["groups"][0]["lines"][0]["run"] == "run-2"
    table = [line for line in as_markdown(found).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| * | int8-openvino |")
    printed = as_table(found)
    assert "…" not in printed
    assert sum(one.lstrip().startswith("*   int8-openvino") for one in printed.splitlines()) == 1


def test_a_plot_has_a_point_for_each_run_and_names_those_that_no_other_beats(tmp_path: Path) -> None:
    copy(tmp_path, "slow", retained=0.5, recipe__name="slow & <odd>", **{"rows__-1__speedup": {}})
    with pytest.raises(UserError, match="nothing to plot"):
        as_svg(compare_runs([tmp_path]))
    copy(tmp_path, "best", retained=0.9, recipe__name="best")
    copy(tmp_path, "twin", retained=0.9, recipe__name="twin")
    copy(tmp_path, "alone", machine__cores=64)
    drawn = ElementTree.fromstring(as_svg(compare_runs([tmp_path])))
    svg = "{http://www.w3.org/2000/svg}"
    speed, size = drawn.findall(f"{svg}g")
    shown = [[point.find(f"{svg}title").text.partition(":")[0] for point in panel.iter(f"{svg}circle")] for panel in (speed, size)]
    assert [sorted(names) for names in shown] == [["best", "twin"], ["best", "slow & <odd>", "twin"]]
    names = [text.text for text in size.iter(f"{svg}text") if text.get("fill") is None]
    assert {"best", "twin"} <= set(names)
    assert "slow & <odd>" not in names
    heights = {point.find(f"{svg}title").text.partition(":")[0]: float(point.get("cy")) for point in size.iter(f"{svg}circle")}
    assert heights["best"] < heights["slow & <odd>"]  # more is higher up


def test_the_records_of_the_project_can_be_compared() -> None:
    listed = (RESULTS / "README.md").read_text()
    # Those that are kept here or listed: whoever works here may have runs of their own beside them.
    git = subprocess.run(
        ["git", "ls-files", "results/*/record.json"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    kept = {Path(path).parent.name for path in git.stdout.splitlines()}
    found = compare_runs([path for path in sorted(RESULTS.iterdir()) if path.name in kept or f"| {path.name} |" in listed])
    assert not found.broken
    assert len(found.groups[0].lines) > 40
    assert "…" not in as_table(found)
    assert listed == as_markdown(found), "compress compare results --format markdown -o results/README.md"
    assert (RESULTS / "plot.svg").read_text() == as_svg(found), "compress compare results --format svg -o results/plot.svg"


def test_the_guide_quotes_the_records() -> None:
    """Rows of docs/choosing.md that name one recipe and an interval say what a record of that recipe on MiniLM says."""
    known: dict[str, list[tuple[str, ...]]] = {}
    for one in compare_runs([RESULTS]).groups[0].lines:
        kept, low, high = (f"{100 * float(share or 0):.2f}" for share in (one.kept, one.low, one.high))
        known.setdefault(one.recipe, []).append((f"{kept} %", f"{low} to {high}", f"{one.bytes / 1e6:.1f} MB"))
    rows = re.findall(r"^\| .* \| (`.*) \| ([\d.]+ %) \| ([\d.]+ to [\d.]+) \| ([\d.]+ MB) \|", GUIDE.read_text(), re.M)
    assert len(rows) >= 7
    for named, *values in rows:
        recipe = re.findall(r"`([\w-]+)`", named)[0]
        assert tuple(values) in {value for name, found in known.items() if name.startswith(recipe) for value in found}, named


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    copy(tmp_path, "a")
    for arguments in (["--format", "csv", "-o", str(tmp_path / "out.csv")], ["--format", "markdwn"]):
        monkeypatch.setattr(sys, "argv", ["compress", "compare", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == (2 if "markdwn" in arguments else 0)
    assert (tmp_path / "out.csv").read_text().count("\n") == 2
    assert "did you mean 'markdown'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record | {"rows": []},
        lambda record: record | {"recipe": {}},
        lambda record: record | {"retained": float("nan")},
        lambda record: record | {"model": record["model"] | {"parameters": 0}},
        lambda record: record | {"steps": [step | {"config": {}} for step in record["steps"]]},
        lambda record: record | {"tasks": [task | {"baseline": 0.0} for task in record["tasks"]]},
        lambda record: b"\xff\xfe",
    ],
)
def test_one_bad_record_does_not_take_down_the_others(tmp_path: Path, damage: Any) -> None:
    copy(tmp_path, "good")
    bad = copy(tmp_path, "bad")
    made = damage(json.loads((bad / "record.json").read_text()))
    (bad / "record.json").write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
    found = compare_runs([tmp_path])
    assert [line.run for group in found.groups for line in group.lines] == ["good"]
    assert list(found.broken) == [str(bad)]
    assert str(bad) in as_table(found)
    payload([tmp_path])


EVIL = "<!--<script>|[red]\n`x`*[/nonesuch]\x00"


def test_names_are_shown_as_they_are_in_every_format(tmp_path: Path) -> None:
    for name, kept in (("a", 0.5), ("b", 0.6)):
        copy(tmp_path, name, recipe__name=EVIL, retained=kept, model__name=EVIL)
    found = compare_runs([tmp_path])
    rows = [row for row in as_markdown(found).splitlines() if row.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<" not in as_markdown(found).replace("&lt;", "")
    ElementTree.fromstring(as_svg(found))
    assert "[red]" in as_table(found)
