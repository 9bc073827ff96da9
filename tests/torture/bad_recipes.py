"""Recipes that are broken, hostile or mistaken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bad_support import QUICK, Case, Place


def cases() -> list[Case]:
    """All cases of this class."""
    found: list[Case] = []

    def add(kind: str, name: str, build: Callable[[Place], list[str]], needle: str = "", **more: Any) -> None:
        found.append(Case(kind, name, build, needle, **more))

    def recipe(name: str, text: str | bytes, needle: str = "r.yaml", verb: str = "plan", **more: Any) -> None:
        def build(place: Place) -> list[str]:
            place.recipe(text)
            return [verb, "r.yaml", "--model", str(place.base / "model"), "--runs", "../out"]

        add("recipe", name, build, needle, **more)

    recipe("empty", "", codes=(0, 2), needle="")
    recipe("list at the top", "- a\n- b\n", "mapping")
    recipe("scalar at the top", "42\n", "mapping")
    recipe("NUL bytes", b"seed: 1\0\n", "r.yaml")
    recipe("not UTF-8", b"description: \xff\xfe\n", "r.yaml")
    recipe("UTF-16", "seed: 1\n".encode("utf-16"), "r.yaml")
    recipe("unknown key", "stepps: []\n", "line 1")
    recipe("unicode look-alike key", "st\u0435ps: []\n", "line 1")
    recipe("duplicate key", "seed: 1\nseed: 2\n", "line 2")
    recipe("tab indentation", "steps:\n\t- method: rtn\n", "line 2")
    recipe("two documents", "seed: 1\n---\nseed: 2\n", "line")
    recipe("undefined alias", "steps: *nowhere\n", "line 1")
    recipe("recursive alias", "steps: &a [*a]\n", "line 1")
    recipe("recursive mapping", "evaluate: &a {prompts: *a}\n", "line 1")
    recipe("billion laughs, lists", _bomb(9) + "steps: *a8\n", "", seconds=20, megabytes=500)
    recipe("billion laughs, mappings", _bomb(9, mapping=True) + "steps: []\n", "", seconds=20, megabytes=500)
    recipe("nesting 2,000 deep", "steps: " + "[" * 2000 + "]" * 2000 + "\n", "r.yaml")
    recipe("nesting 100,000 deep", "steps: " + "[" * 100000 + "]" * 100000 + "\n", "r.yaml")
    recipe("block nesting 3,000 deep", "".join("-" + " " for _ in range(3000)) + "x\n", "r.yaml")
    recipe("python object", "description: !!python/object/apply:os.system ['touch ../../PWNED']\n", "line 1")
    recipe("python name", "seed: !!python/name:os.system ''\n", "line 1")
    recipe("unknown tag", "seed: !foo 1\n", "line 1", codes=(0, 2))
    recipe("tagged mapping", "steps: !foo [{method: !bar rtn}]\n", "", codes=(0, 2))
    recipe("binary tag", "description: !!binary aGk=\n", "line 1")
    recipe("set tag", "steps: !!set {a, b}\n", "line 1")
    recipe("timestamp", "description: 2020-01-01\n", "line 1")
    recipe("list as key", "? [a, b]\n: 1\n", "r.yaml")
    recipe("null as key", "~: 1\n", "line 1")
    recipe("number as key", "1: 1\n", "line 1")
    recipe("steps a string", "steps: rtn\n", "line 1")
    recipe("steps a mapping", "steps: {method: rtn}\n", "line 1")
    recipe("step null", "steps: [null]\n", "line 1")
    recipe("step a number", "steps:\n- 1\n", "line 2")
    recipe("method null", "steps: [{method: null}]\n", "line 1")
    recipe("method a list", "steps: [{method: [rtn]}]\n", "line 1")
    recipe("method a path", "steps: [{method: ../../etc}]\n", "line 1")
    recipe("method __init__", "steps: [{method: __init__}]\n", "line 1")
    recipe("bits a string", "steps:\n- method: rtn\n  bits: '4'\n", "line 3")
    recipe("bits infinite", "steps:\n- method: rtn\n  bits: .inf\n", "line 3")
    recipe("bits nan", "steps:\n- method: rtn\n  bits: .nan\n", "line 3")
    recipe("bits negative", "steps:\n- method: rtn\n  bits: -4\n", "line 3")
    recipe("bits 10^400", f"steps:\n- method: rtn\n  bits: {10**400}\n", "line 3")
    recipe("bits 10^5000", f"steps:\n- method: rtn\n  bits: 1{'0' * 5000}\n", "line 3")
    recipe("bits true", "steps:\n- method: rtn\n  bits: true\n", "line 3")
    recipe("group_size 0", "steps:\n- method: rtn\n  group_size: 0\n", "line 3")
    recipe("group_size negative", "steps:\n- method: gptq\n  group_size: -64\n", "line 3")
    recipe("group_size huge", f"steps:\n- method: rtn\n  group_size: {10**18}\n", "", codes=(0, 2))
    recipe("depth keep nan", "steps:\n- method: depth\n  keep: .nan\n", "line 3")
    recipe("depth keep 0", "steps:\n- method: depth\n  keep: 0.0\n", "line 3")
    recipe("width nan", "steps:\n- method: width\n  channels: .nan\n", "line 3")
    recipe("sparsity nan", "steps:\n- method: sparsegpt\n  sparsity: .nan\n", "line 3")
    recipe("sparsity 1.5", "steps:\n- method: magnitude\n  sparsity: 1.5\n", "line 3")
    recipe("margin nan", "evaluate:\n  margin: .nan\n", "line 2")
    recipe("gate nan", "gates:\n  retained: .nan\n", "line 2")
    recipe("gate speedup nan", "gates:\n  speedup: .nan\n", "line 2")
    recipe("gate size_ratio inf", "gates:\n  size_ratio: .inf\n", "line 2", codes=(0, 2))
    recipe("gate cosine nan", "gates:\n  cosine_mean: .nan\n", "line 2")
    recipe("damping nan", "steps:\n- method: gptq\n  damping: .nan\n", "line 3")
    recipe("learning rate nan", "steps:\n- method: distill\n  texts: texts.txt\n  learning_rate: .nan\n", "line 4")
    recipe("objective nan", "steps:\n- method: distill\n  texts: texts.txt\n  objectives: {cosine: .nan}\n", "line 4")
    recipe("objective inf", "steps:\n- method: distill\n  texts: texts.txt\n  objectives: {cosine: .inf}\n", "line 4")
    recipe("distill steps 10^15", f"steps:\n- method: distill\n  texts: texts.txt\n  steps: {10**15}\n", "", codes=(0, 2))
    recipe("weight decay nan", "steps:\n- method: distill\n  texts: texts.txt\n  weight_decay: .nan\n", "line 4")
    recipe("seed negative", QUICK + "seed: -1\n", "line 4", verb="run")
    recipe("seed 2^70", QUICK + f"seed: {2**70}\n", "line 4", verb="run", codes=(0, 2))
    recipe(
        "seed negative, measured", "steps: [{method: rtn}]\nseed: -1\nmeasure: {what: [speed], count: 8}\n", "line 2", verb="run"
    )
    recipe(
        "count 10^12", "steps: [{method: rtn}]\nmeasure: {what: [speed], count: 1000000000000}\n", "count", verb="run", seconds=20
    )
    recipe("calibration count 10^12", "steps: [{method: gptq}]\ncalibration: {count: 1000000000000}\n", "count", verb="run")
    recipe("calibration from /dev/zero", "steps: [{method: gptq}]\ncalibration: {texts: /dev/zero}\n", "", verb="run", seconds=20)
    recipe("calibration from a folder", "steps: [{method: gptq}]\ncalibration: {texts: /etc}\n", "/etc", verb="run")
    recipe("calibration from /etc/shadow", "steps: [{method: gptq}]\ncalibration: {texts: /etc/shadow}\n", "", verb="run")
    recipe("distill texts missing", "steps: [{method: distill, texts: nowhere.jsonl}]\n", "nowhere.jsonl", verb="run")
    recipe("distill texts /dev/zero", "steps: [{method: distill, texts: /dev/zero}]\n", "", verb="run", seconds=15)
    recipe("fidelity of 8 texts", QUICK.replace("what: []", "what: [fidelity], count: 8"), "count", verb="run", codes=(0, 2))
    recipe("override a broken pattern", "steps:\n- method: rtn\n  overrides: {'[': {bits: 8}}\n", "'['")
    recipe(
        "override of 40 stars", "steps:\n- method: rtn\n  overrides: {'" + "*a" * 40 + "': {bits: 8}}\n", "matches none", seconds=15
    )
    recipe("export unknown", "export: [zip]\n", "line 1")
    recipe("task a path", QUICK.replace("tasks: []", "tasks: [../../x]"), "../../x", verb="run")
    recipe("task empty", QUICK.replace("tasks: []", "tasks: ['']"), "", verb="run")
    recipe("task a number", "evaluate: {tasks: [5]}\n", "line 1")
    recipe("runtime unknown", "runtime: tensorrt\n", "line 1")
    recipe("name a path upwards", QUICK + "name: ../../../PWNED\n", "line 4", verb="run")
    recipe("name absolute", QUICK + "name: /tmp/PWNED\n", "line 4", verb="run")
    recipe("name with NUL", QUICK + 'name: "a\\0b"\n', "line 4", verb="run")
    recipe("name of 400 letters", QUICK + f"name: {'n' * 400}\n", "line 4", verb="run")
    recipe("name empty", QUICK + 'name: ""\n', "line 4", verb="run", codes=(0, 2))
    recipe("name with a newline", QUICK + 'name: "a\\nb"\n', "line 4", verb="run", codes=(0, 2))
    recipe("name with a surrogate", QUICK + 'name: "a\\ud800b"\n', "r.yaml", verb="run")
    recipe("description of 20 MB", "description: " + "d" * 20_000_000 + "\n", "", codes=(0, 2))
    recipe("20,000 steps", "steps:\n" + "- method: rtn\n" * 20_000, "", codes=(0, 2), seconds=60)
    recipe("20,000 faults", "steps:\n" + "- method: rtm\n" * 20_000, "line 2", seconds=60)
    recipe("threads 10^9", QUICK.replace("what: []", "what: [speed], count: 8, threads: 1000000000"), "threads", verb="run")
    recipe(
        "batch_tokens 10^18",
        QUICK.replace("what: []", f"what: [speed], count: 8, rounds: 1, requests: 10, batch_tokens: {10**18}"),
        "",
        verb="run",
        codes=(0,),
        seconds=120,
    )
    for name, path in {"missing": "no.yaml", "a folder": ".", "/dev/null": "/dev/null", "a loop": "loop.yaml"}.items():

        def build(place: Place, path: str = path) -> list[str]:
            (place.cwd / "loop.yaml").symlink_to("loop.yaml")
            return ["plan", path]

        add("recipe", f"file {name}", build, path if name != "/dev/null" else "", codes=(0, 2) if name == "/dev/null" else (2,))

    def dev_zero(place: Place) -> list[str]:
        return ["plan", "/dev/zero"]

    add("recipe", "file /dev/zero", dev_zero, "/dev/zero", seconds=15, megabytes=500)
    return found


def _bomb(levels: int, width: int = 9, mapping: bool = False) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]" if not mapping else "a0: &a0 {x: 1}"]
    for level in range(1, levels):
        inside = ", ".join(f"*a{level - 1}" if not mapping else f"k{n}: *a{level - 1}" for n in range(width))
        lines.append(f"a{level}: &a{level} " + (f"[{inside}]" if not mapping else f"{{{inside}}}"))
    return "\n".join(lines) + "\n"
