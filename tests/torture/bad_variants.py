"""Variants that are broken, and exports that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_support import Case, Place, edited, tensors_of, write_tensors


def cases() -> list[Case]:
    """All cases of this class."""
    found: list[Case] = []

    def add(kind: str, name: str, build: Callable[[Place], list[str]], needle: str = "", **more: Any) -> None:
        found.append(Case(kind, name, build, needle, **more))

    def exported(
        name: str, arguments: list[str], change: Callable[[Path, Place], Any] = lambda *_: None, needle: str = "", **more: Any
    ) -> None:
        def build(place: Place) -> list[str]:
            change(place.variant(), place)
            return ["export", "variant", *arguments]

        add("variant", f"export: {name}", build, needle, **more)

    lic = ["--licence", "mit", "--no-check"]
    exported("format unknown", ["--format", "zip", "-o", "../out/e", *lic], needle="zip")
    exported("no licence, nobody to ask", ["--format", "onnx", "-o", "../out/e"], needle="--licence")
    exported("onto a file", ["--format", "onnx", "-o", "texts.txt", *lic], needle="texts.txt")
    exported("onto a folder with files", ["--format", "onnx", "-o", "variant", *lic], needle="variant")
    exported("into /proc", ["--format", "onnx", "-o", "/proc/e", *lic], needle="/proc")
    exported("under a file", ["--format", "onnx", "-o", "texts.txt/e", *lic], needle="texts.txt")
    exported(
        "python a folder",
        ["--format", "sentence-transformers", "-o", "../out/e", "--licence", "mit", "--python", "/tmp"],
        needle="/tmp",
    )
    exported(
        "python missing",
        ["--format", "sentence-transformers", "-o", "../out/e", "--licence", "mit", "--python", "nowhere/python"],
        needle="nowhere",
    )
    exported(
        "python with shell words",
        ["--format", "sentence-transformers", "-o", "../out/e", "--licence", "mit", "--python", "x; touch ../../PWNED"],
        needle="touch",
    )
    exported(
        "tokenizer a link outwards",
        ["--format", "onnx", "-o", "../out/e", *lic],
        lambda folder, place: (
            (folder / "tokenizer.json").rename(place.cwd / "t.json"),
            (folder / "tokenizer.json").symlink_to("../t.json"),
        ),
        codes=(0, 2),
    )
    exported(
        "no such run", ["--format", "onnx", "-o", "../out/e", *lic], lambda folder, place: shutil.rmtree(folder), needle="variant"
    )
    exported(
        "a user's .e.partial folder",
        ["--format", "onnx", "-o", "../out/e", *lic],
        lambda folder, place: ((place.out / ".e.partial").mkdir(), (place.out / ".e.partial" / "mine.txt").write_text("mine")),
        codes=(0,),
        kept=("../out/.e.partial/mine.txt",),
    )
    # ---- variants

    def described(name: str, needle: str = "variant.json", codes: tuple[int, ...] = (2,), **changes: Any) -> None:
        def build(place: Place) -> list[str]:
            edited(place.variant() / "variant.json", **changes)
            return place.encode("variant")

        add("variant", f"variant.json: {name}", build, needle, codes=codes)

    described("format 2", format=2)
    described("unknown key", evil=1)
    described("runtime unknown", runtime="evil", needle="evil")
    described("runtime a path", runtime="../../evil", needle="evil")
    described("dtype unknown", dtype="float7", needle="float7")
    described("length 0", max_length=0)
    described("length a string", max_length="x")
    described("heads 0", heads=0)
    described("heads 7", heads=7, needle="variant")
    described("dropped block 99", dropped=[[99, "mlp"]], needle="variant")
    described("dropped sublayer unknown", dropped=[[0, "evil"]])
    described("spec null", spec=None)
    described("spec empty", spec={})
    described("nothing quantized, the files are", quantized={}, needle="variant")
    described("steps a mapping", steps={})
    described("base a path upwards", base="../../etc", needle="", codes=(0,))

    def layer(name: str, needle: str = "variant", **changes: Any) -> None:
        def build(place: Place) -> list[str]:
            path = place.variant() / "variant.json"
            content = json.loads(path.read_text())
            first = next(iter(content["quantized"]))
            content["quantized"][first] |= changes
            path.write_text(json.dumps(content))
            return place.encode("variant")

        add("variant", f"layer: {name}", build, needle)

    layer("bits 4 where the file has 8", bits=4)
    layer("bits 5", bits=5)
    layer("bits null", bits=None)
    layer("group 0", group_size=0)
    layer("group 7", group_size=7)
    layer("group 10^18", group_size=10**18)
    layer("asymmetric without zero points", symmetric=False)
    layer("activations unknown", activations="evil")
    layer("static activations without a range", activations="static")
    layer("an input factor that is not there", input_factor=True)
    layer("numbers unknown", numbers="evil")

    def renamed(place: Place) -> list[str]:
        path = place.variant() / "variant.json"
        content = json.loads(path.read_text())
        content["quantized"]["evil.layer"] = content["quantized"].pop(next(iter(content["quantized"])))
        path.write_text(json.dumps(content))
        return place.encode("variant")

    add("variant", "layer: of no such name", renamed, "variant")

    def tensors(
        name: str, change: Callable[[dict[str, Any], bytes, str], tuple[dict[str, Any], bytes]], needle: str = "variant"
    ) -> None:
        def build(place: Place) -> list[str]:
            path = place.variant() / "model.safetensors"
            header, data = tensors_of(path)
            scale = next(name for name in sorted(header) if "scale" in name)
            write_tensors(path, *change(header, data, scale))
            return place.encode("variant")

        add("variant", f"tensors: {name}", build, needle)

    def with_bytes(header: dict[str, Any], data: bytes, name: str, value: bytes) -> tuple[dict[str, Any], bytes]:
        start, stop = header[name]["data_offsets"]
        size = stop - start
        return header, data[:start] + (value * size)[:size] + data[stop:]

    tensors("scales missing", lambda header, data, scale: ({key: value for key, value in header.items() if key != scale}, data))
    tensors("scales NaN", lambda header, data, scale: with_bytes(header, data, scale, b"\xff"), "")
    tensors("scales called I32", lambda header, data, scale: (header | {scale: header[scale] | {"dtype": "I32"}}, data))
    tensors(
        "scales of one more dimension",
        lambda header, data, scale: (header | {scale: header[scale] | {"shape": [1, 1, *header[scale]["shape"]]}}, data),
    )
    tensors("half of the file", lambda header, data, scale: (header, data[: len(data) // 2]))

    def lacking(file: str) -> Callable[[Place], list[str]]:
        def build(place: Place) -> list[str]:
            (place.variant() / file).unlink()
            return place.encode("variant")

        return build

    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        add("variant", f"without {file}", lacking(file), "variant")

    def linked(file: str, target: str) -> Callable[[Place], list[str]]:
        def build(place: Place) -> list[str]:
            path = place.variant() / file
            path.unlink()
            path.symlink_to(target)
            return place.encode("variant")

        return build

    add("variant", "variant.json a loop", linked("variant.json", "variant.json"), "variant")
    add("variant", "variant.json from /dev/zero", linked("variant.json", "/dev/zero"), "variant", seconds=15)
    add("variant", "weights from /dev/zero", linked("model.safetensors", "/dev/zero"), "variant", seconds=15)

    def graph(name: str, change: Callable[[bytes], bytes], needle: str = "onnxruntime.onnx") -> None:
        def build(place: Place) -> list[str]:
            folder = place.variant()
            edited(folder / "variant.json", runtime="onnxruntime")
            (folder / "onnxruntime.onnx").write_bytes(change((place.base / "onnxruntime.onnx").read_bytes()))
            return place.encode("variant")

        add("variant", f"graph: {name}", build, needle)

    graph("empty", lambda content: b"")
    graph("half of it", lambda content: content[: len(content) // 2])
    graph("of text", lambda content: b"evil" * 1000)
    graph("of zeros", lambda content: bytes(10_000))
    return found
