"""Results that are broken or hostile, and outputs that cannot be written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from bad_support import QUICK, Case, Place

MARKUP = "<!--<script>alert(1)</script>"


def cases() -> list[Case]:
    """All cases of this class."""
    found: list[Case] = []

    def add(name: str, build: Callable[[Place], list[str]], needle: str = "", **more: Any) -> None:
        found.append(Case("results", name, build, needle, **more))

    # ---- records: the sound run stays, the bad one is named

    def record(
        name: str, change: Callable[[dict[str, Any]], Any] | None = None, raw: bytes | None = None, needle: str = "bad", **more: Any
    ) -> None:
        def compared(place: Place) -> list[str]:
            place.results(change, raw)
            return ["compare", "results"]

        def page(place: Place) -> list[str]:
            place.results(change, raw)
            return ["dashboard", "results", "-o", "../out/page.html"]

        add(f"compare: {name}", compared, needle, codes=more.get("codes", (0, 2)))
        add(f"dashboard: {name}", page, needle, codes=more.get("codes", (0, 2)))

    def at(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
        def change(record: dict[str, Any]) -> None:
            for part in path[:-1]:
                record = record[part]
            record[path[-1]] = value

        return change

    for name, content in {
        "empty": b"", "{}": b"{}", "a list": b"[]", "null": b"null", "broken": b'{"run": ', "not UTF-8": b"\xff\xfe{}",
        "100,000 deep": b"[" * 100_000, "NUL": b"\0\0",
    }.items():  # fmt: skip
        record(name, raw=content)
    record("run a number", at("run", value=5))
    record("run a path", at("run", value="../../etc"), needle="", codes=(0,))
    record("run with markup", at("run", value=MARKUP), needle="", codes=(0,))
    record("created a number", at("created", value=5))
    record("scores null", at("scores", value=None))
    record("scores a word", at("scores", value="x"))
    record("model null", at("model", value=None))
    record("model's parameters negative", at("model", "parameters", value=-1), needle="")
    record("machine null", at("machine", value=None))
    record("seed NaN", at("seed", value=float("nan")))
    record("unknown key", at("evil", value=1))

    def hostile_names(place: Place) -> list[str]:
        place.results(at("run", value=MARKUP))
        return ["compare", "results", "--format", "markdown"]

    add("compare: markup in Markdown", hostile_names, codes=(0,))

    def a_fifo(place: Place) -> list[str]:
        place.results()
        (place.cwd / "results" / "bad" / "record.json").unlink()
        os.mkfifo(place.cwd / "results" / "bad" / "record.json")
        return ["compare", "results"]

    def a_device(place: Place) -> list[str]:
        place.results()
        (place.cwd / "results" / "bad" / "record.json").unlink()
        (place.cwd / "results" / "bad" / "record.json").symlink_to("/dev/zero")
        return ["compare", "results"]

    add("compare: a record that is a FIFO", a_fifo, "bad", codes=(0, 2), seconds=15)
    add("compare: a record that is /dev/zero", a_device, "bad", codes=(0, 2), seconds=15)
    add("compare: a folder that is not there", lambda place: ["compare", "nowhere"], "nowhere")
    add("compare: a folder without records", lambda place: ["compare", "."], ".")
    add("compare: format unknown", lambda place: (place.results(), ["compare", "results", "--format", "xls"])[1], "xls")

    # ---- outputs

    def output(name: str, build: Callable[[Place], list[str]], needle: str = "", **more: Any) -> None:
        add(f"output: {name}", build, needle, **more)

    def to(path: str) -> Callable[[Place], list[str]]:
        def build(place: Place) -> list[str]:
            place.results()
            (place.cwd / "full").mkdir()
            (place.cwd / "full" / "mine.txt").write_text("mine")
            return ["compare", "results", "--format", "svg", "-o", path]

        return build

    output("onto a folder", to("full"), "full")
    output("into a missing folder, which is made", to("nowhere/x.svg"), codes=(0,))
    output("under a file", to("texts.txt/x.svg"), "texts.txt")
    output("into /proc", to("/proc/x.svg"), "/proc")
    output("a name of 400 letters", to("n" * 400 + ".svg"), "nnn")
    output("with a NUL", to("a\0b.svg"), "")
    output("onto a device", to("/dev/null"), "", codes=(0,))

    def onto_a_link(place: Place) -> list[str]:
        place.results()
        (place.cwd / "real.svg").write_text("old")
        (place.cwd / "link.svg").symlink_to("real.svg")
        return ["compare", "results", "--format", "svg", "-o", "link.svg"]

    output("onto a link", onto_a_link, codes=(0,), kept=("link.svg",))

    for name, path, needle in (
        ("a missing folder", "nowhere/v.npy", "nowhere"),
        ("a folder", ".", "."),
        ("another suffix", "v.csv", ".csv"),
        ("/proc", "/proc/v.npy", "/proc"),
        ("the texts", "texts.txt", "texts.txt"),
    ):
        output(
            f"vectors to {name}", lambda place, path=path: ["encode", str(place.base / "model"), "texts.txt", "-o", path], needle
        )  # type: ignore[misc]

    def runs_at(name: str, runs: str, needle: str, recipe: str = QUICK, **more: Any) -> None:
        def build(place: Place) -> list[str]:
            (place.cwd / "file").write_text("mine")
            return ["run", place.recipe(recipe), "--model", str(place.base / "model"), "--runs", runs]

        output(f"runs {name}", build, needle, **more)

    runs_at("in a file", "file", "file")
    runs_at("under a file", "file/runs", "file")
    runs_at("in /proc", "/proc/runs", "/proc")
    runs_at("in a folder with a NUL", "a\0b", "")

    def a_users_folder(place: Place) -> list[str]:
        """The folder of the run is there, and it is the user's."""
        plan = ["run", place.recipe(QUICK), "--model", str(place.base / "model"), "--runs", "../out", "--fresh"]
        (place.out / "mine").mkdir()
        (place.out / "mine" / "record.json").write_text(json.dumps({"mine": 1}))
        return plan

    output("--fresh next to a user's folder", a_users_folder, codes=(0,))
    return found
