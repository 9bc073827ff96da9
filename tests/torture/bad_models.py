"""Models' folders, and names of random models, that are broken or hostile."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_support import QUICK, Case, Place, edited, tensors_of, write_tensors


def cases() -> list[Case]:
    """All cases of this class."""
    found: list[Case] = []

    def add(kind: str, name: str, build: Callable[[Place], list[str]], needle: str = "", **more: Any) -> None:
        found.append(Case(kind, name, build, needle, **more))

    def model(name: str, change: Callable[[Path, Place], Any], needle: str = "", verb: str = "encode", **more: Any) -> None:
        def build(place: Place) -> list[str]:
            folder = place.model()
            change(folder, place)
            if verb == "encode":
                return place.encode("model")
            place.recipe(QUICK)
            return [verb, "r.yaml", "--model", "model", "--runs", "../out"]

        add("model", name, build, needle, **more)

    def config(name: str, needle: str = "config.json", **changes: Any) -> None:
        more = {key: changes.pop(key) for key in ("codes", "seconds", "verb") if key in changes}
        model(f"config: {name}", lambda folder, _: edited(folder / "config.json", **changes), needle, **more)

    def raw(file: str, name: str, content: bytes, needle: str | None = None, **more: Any) -> None:
        def change(folder: Path, place: Place) -> None:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)

        model(f"{file}: {name}", change, file if needle is None else needle, **more)

    add("model", "missing folder", lambda place: place.encode("nowhere"), "nowhere")
    add("model", "a file", lambda place: place.encode("texts.txt"), "texts.txt")
    add("model", "empty name", lambda place: place.encode(""), "model ''")
    add("model", "NUL in the name", lambda place: place.encode("random:nano,x=\\0"), "")
    add("model", "name of 5,000 letters", lambda place: place.encode("m" * 5000), "")
    model("empty folder", lambda folder, _: (shutil.rmtree(folder), folder.mkdir()), "model")
    model("no config.json", lambda folder, _: (folder / "config.json").unlink(), "config.json")
    for name, content in {
        "empty": b"", "a list": b"[]", "null": b"null", "a string": b'"x"', "broken": b'{"model_type": ', "not UTF-8": b"\xff\xfe{}",
        "100,000 deep": b"[" * 100000, "NUL": b"\0\0", "{}": b"{}",
    }.items():  # fmt: skip
        raw("config.json", name, content)
    config("layers 10^9", num_hidden_layers=10**9, seconds=20)
    config("layers -1", num_hidden_layers=-1)
    config("layers 0", num_hidden_layers=0)
    config("layers a string", num_hidden_layers="two")
    config("layers null", num_hidden_layers=None)
    config("layers 1.5", num_hidden_layers=1.5)
    config("layers 3, files have 2", num_hidden_layers=3, needle="model")
    config("layers 1, files have 2", num_hidden_layers=1, codes=(0, 2), needle="")
    config("hidden size 0", hidden_size=0)
    config("hidden size -64", hidden_size=-64)
    config("hidden size 10^9", hidden_size=10**9, seconds=20)
    config("hidden size 128, files have 64", hidden_size=128, needle="model")
    config("vocabulary 10^12", vocab_size=10**12, seconds=20)
    config("vocabulary 10, files have more", vocab_size=10, needle="model")
    config("heads 0", num_attention_heads=0)
    config("heads 7", num_attention_heads=7)
    config("positions 10^12", max_position_embeddings=10**12, seconds=20)
    config("activation unknown", hidden_act="evil")
    config("activation a list", hidden_act=["gelu"])
    config("model_type unknown", model_type="evil")
    config("model_type a list", model_type=["bert"])
    config("model_type empty", model_type="")
    config("encoder-decoder", model_type="t5")
    config("norm eps nan", layer_norm_eps=float("nan"), codes=(0, 2), needle="")
    config("dtype unknown", torch_dtype="evil", codes=(0, 2), needle="")
    config("quantized by another", quantization_config={"quant_method": "gptq", "bits": 4}, codes=(2,), needle="")
    config("quantized by nobody", quantization_config={"quant_method": "evil"}, codes=(2,), needle="")
    config("architectures a number", architectures=5, codes=(0, 2), needle="")

    def remote(folder: Path, place: Place) -> None:
        (folder / "evil.py").write_text("open('../../PWNED', 'w')\nclass Evil: pass\n")
        names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.Evil")
        edited(folder / "config.json", model_type="evil", auto_map=names)
        edited(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")

    model("remote code", remote, "model_type 'evil'")

    def remote_tokenizer(folder: Path, place: Place) -> None:
        (folder / "evil.py").write_text("open('../../PWNED', 'w')\nclass Evil: pass\n")
        edited(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")

    model("remote tokenizer", remote_tokenizer, "", codes=(0, 2))

    def weights(
        name: str,
        change: Callable[[dict[str, Any], bytes], tuple[Any, bytes] | tuple[Any, bytes, int]],
        needle: str = "model.safetensors",
        **more: Any,
    ) -> None:
        def apply(folder: Path, place: Place) -> None:
            header, data = tensors_of(folder / "model.safetensors")
            write_tensors(folder / "model.safetensors", *change(header, data))

        model(f"weights: {name}", apply, needle, **more)

    for name, content in {
        "empty": b"", "four bytes": b"abcd", "length 2^63": struct.pack("<Q", 2**63) + b"{}", "length 10^11": struct.pack("<Q", 10**11) + b"{}",
        "length 2^64-1": b"\xff" * 8 + b"{}", "length 0": struct.pack("<Q", 0), "a pickle": b"\x80\x04cos\nsystem\n(S'touch ../../PWNED'\ntR.",
        "a zip": b"PK\x03\x04" + b"\0" * 100, "not JSON": struct.pack("<Q", 4) + b"xxxx", "a list": struct.pack("<Q", 2) + b"[]",
        "no tensors": struct.pack("<Q", 2) + b"{}", "header not UTF-8": struct.pack("<Q", 4) + b'{"\xff"', "header 100,000 deep": struct.pack("<Q", 100000) + b"[" * 100000,
    }.items():  # fmt: skip
        raw("model.safetensors", name, content)

    def first(header: dict[str, Any]) -> str:
        return next(name for name in sorted(header) if name != "__metadata__")

    def entry(**changes: Any) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
        def change(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
            header[first(header)] = {key: value for key, value in (header[first(header)] | changes).items() if value != "gone"}
            return header, data

        return change

    weights("a byte short", lambda header, data: (header, data[:-1]))
    weights("half of it", lambda header, data: (header, data[: len(data) // 2]))
    weights("a byte more", lambda header, data: (header, data + b"x"))
    weights("200 MB of spaces", lambda header, data: (json.dumps(header).encode() + b" " * 200_000_000, data))
    weights("dtype gone", entry(dtype="gone"))
    weights("dtype unknown", entry(dtype="F7"))
    weights("dtype a number", entry(dtype=5))
    weights("shape gone", entry(shape="gone"))
    weights("shape negative", entry(shape=[-1, -64]))
    weights("shape huge", entry(shape=[10**12, 10**12]))
    weights("shape a string", entry(shape="ab"))
    weights("shape of floats", entry(shape=[2.0, 2.0]))
    weights("offsets gone", entry(data_offsets="gone"))
    weights("offsets negative", entry(data_offsets=[-4, 0]))
    weights("offsets reversed", entry(data_offsets=[100, 0]))
    weights("offsets behind the end", entry(data_offsets=[10**12, 10**12 + 4]))
    weights("offsets of three", entry(data_offsets=[0, 1, 2]))
    weights("entry null", lambda header, data: (header | {first(header): None}, data))

    def overlapping(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        names = [name for name in header if name != "__metadata__"]
        by_size: dict[int, str] = {}
        for name in names:
            size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            if size in by_size:
                header[name]["data_offsets"] = header[by_size[size]]["data_offsets"]
                break
            by_size[size] = name
        return header, data

    weights("overlapping, sizes right", overlapping)
    weights("a tensor missing", lambda header, data: drop(header, data, first(header)), "model")
    weights("all tensors missing", lambda header, data: ({}, b""), "model")

    def extra(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        return header | {"evil": {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}}, data + b"\0" * 4

    weights("a tensor more", extra, "", codes=(0, 2))

    def of_type(dtype: str) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
        def change(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
            name = next(name for name, info in header.items() if name != "__metadata__" and len(info["shape"]) == 2)
            header[name]["dtype"] = dtype
            return header, data

        return change

    weights("a weight I16", of_type("I16"), "model")
    weights("a shape turned", lambda header, data: turned(header, data), "model")
    weights("NaN", lambda header, data: (header, b"\xff" * len(data)), "", codes=(2,))
    model(
        "weights: NaN, compressed",
        lambda folder, _: write_tensors(
            folder / "model.safetensors",
            tensors_of(folder / "model.safetensors")[0],
            b"\xff" * len(tensors_of(folder / "model.safetensors")[1]),
        ),
        "not finite",
        verb="run",
    )

    def only_pickle(folder: Path, place: Place) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ../../PWNED'\ntR.")

    model("only a pickle", only_pickle, "pytorch_model.bin")
    model(
        "weights: a folder",
        lambda folder, _: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").mkdir()),
        "model.safetensors",
    )
    model(
        "weights: a loop",
        lambda folder, _: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("model.safetensors")),
        "model.safetensors",
    )
    model(
        "weights: a FIFO",
        lambda folder, _: ((folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")),
        "model.safetensors",
        seconds=15,
    )
    model(
        "weights: /dev/zero",
        lambda folder, _: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("/dev/zero")),
        "model.safetensors",
        seconds=15,
    )
    model(
        "config a loop",
        lambda folder, _: ((folder / "config.json").unlink(), (folder / "config.json").symlink_to("config.json")),
        "config.json",
    )
    model(
        "config a FIFO",
        lambda folder, _: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
        "config.json",
        seconds=15,
    )
    model("config a folder", lambda folder, _: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()), "config.json")

    def index(target: str) -> Callable[[Path, Place], None]:
        def change(folder: Path, place: Place) -> None:
            header, _ = tensors_of(folder / "model.safetensors")
            shutil.move(folder / "model.safetensors", place.cwd / "elsewhere.safetensors")
            where = target if target != "ABSOLUTE" else str(place.cwd / "elsewhere.safetensors")
            places = {name: where for name in header if name != "__metadata__"}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

        return change

    model("index: upwards", index("../elsewhere.safetensors"), "model")
    model("index: absolute", index("ABSOLUTE"), "model")

    def index_beside(folder: Path, place: Place) -> None:
        index("../elsewhere.safetensors")(folder, place)
        write_tensors(folder / "model-00001-of-00001.safetensors", *tensors_of(place.cwd / "elsewhere.safetensors"))

    model("index: upwards, a whole shard beside", index_beside, "model", codes=(2,))

    def index_missing(folder: Path, place: Place) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        header, _ = tensors_of(folder / "model-00001-of-00002.safetensors")
        places = {name: "model-00002-of-00002.safetensors" for name in header if name != "__metadata__"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    model("index: a shard missing", index_missing, "model")
    raw("model.safetensors.index.json", "broken", b"{", "", codes=(0, 2))

    for name, content in {
        "empty": b"",
        "{}": b"{}",
        "broken": b'{"model": ',
        "null": b"null",
        "100,000 deep": b"[" * 100000,
    }.items():
        raw("tokenizer.json", name, content, "tokenizer")
    model(
        "tokenizer missing",
        lambda folder, _: [path.unlink() for path in folder.glob("*") if "token" in path.name or path.name == "vocab.txt"],
        "tokenizer",
    )

    def high_ids(folder: Path, place: Place) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] = {
            token: number if number < 1000 else number + 10**8 for token, number in content["model"]["vocab"].items()
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))

    model("tokenizer: ids behind the table", high_ids, "tokenizer")

    def slow_regex(folder: Path, place: Place) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (place.cwd / "texts.txt").write_text("a" * 40 + "!\n")

    model("tokenizer: a slow pattern", slow_regex, "", seconds=20, codes=(0, 2))

    def tokenizer_config(name: str, needle: str = "", codes: tuple[int, ...] = (0, 2), **changes: Any) -> None:
        model(
            f"tokenizer_config: {name}", lambda folder, _: edited(folder / "tokenizer_config.json", **changes), needle, codes=codes
        )

    tokenizer_config("length -5", model_max_length=-5, needle="length", codes=(2,))
    tokenizer_config("length a string", model_max_length="x", codes=(2,))
    tokenizer_config("length 10^30", model_max_length=10**30)
    tokenizer_config("class unknown", tokenizer_class="Evil")
    tokenizer_config("added tokens wrong", added_tokens_decoder={"x": 5}, codes=(2,))
    raw("tokenizer_config.json", "broken", b"{", "tokenizer")

    for name, content in {
        "broken": b"[", "a mapping": b"{}", "null": b"null", "entries of numbers": b"[1, 2]", "no type": b'[{"path": ""}]',
        "no path": b'[{"type": "sentence_transformers.models.Transformer"}]', "type a number": b'[{"type": 5, "path": ""}]',
        "os.system": b'[{"type": "os.system", "path": "touch ../../PWNED"}]', "path upwards": b'[{"type": "x.Transformer", "path": "../../.."}]',
        "path absolute": b'[{"type": "x.Transformer", "path": "/etc"}]', "path null": b'[{"type": "x.Transformer", "path": null}]',
        "pooling upwards": b'[{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../.."}]',
        "pooling missing": b'[{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "nowhere"}]',
    }.items():  # fmt: skip
        raw("modules.json", name, content, "", codes=(0, 2) if name in ("a mapping",) else (2,))

    def outside(folder: Path, place: Place) -> None:
        shutil.move(folder, place.cwd / "real")
        folder.mkdir()
        (folder / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": "../real"}]))

    model("modules.json: a whole model outside", outside, "modules.json")
    raw("1_Pooling/config.json", "broken", b"{")
    raw("1_Pooling/config.json", "a list", b"[]")
    raw("1_Pooling/config.json", "unknown", b'{"pooling_mode": "evil"}')
    raw("1_Pooling/config.json", "max", b'{"pooling_mode_max_tokens": true}', "", codes=(0,))
    for name, value in {"-1": -1, "0": 0, "a string": "x", "10^12": 10**12, "1.5": 1.5, "a list": [1]}.items():
        needle = "sentence_bert_config.json"
        raw(
            "sentence_bert_config.json",
            f"length {name}",
            json.dumps({"max_seq_length": value, "do_lower_case": False}).encode(),
            needle,
            codes=(2,) if name not in ("10^12", "0") else (0, 2),
        )
    raw("sentence_bert_config.json", "a list", b"[]")
    prompts = "config_sentence_transformers.json"
    raw(prompts, "prompts a list", b'{"prompts": ["x"]}')
    raw(prompts, "prompt a number", b'{"prompts": {"query": 5}}')
    raw(prompts, "default unknown", b'{"prompts": {}, "default_prompt_name": "x"}')
    raw(prompts, "default a list", b'{"prompts": {}, "default_prompt_name": ["x"]}')
    raw("README.md", "not UTF-8", b"---\nlicense: \xff\n---\n", "README.md", verb="run", codes=(0, 2))

    def named(name: str, text: str, needle: str = "", **more: Any) -> None:
        add(
            "model",
            f"random: {name}",
            lambda place: ["plan", place.recipe(QUICK), "--model", text.replace("MODEL", str(place.base / "model"))],
            needle,
            **more,
        )

    named("nothing", "random:")
    named("of random", "random:random:nano")
    named("no value", "random:nano,x", "field=value")
    named("no field", "random:nano,=3", "field=value")
    named("unknown field", "random:nano,evil=3", "evil")
    named("layers 10^9", "random:nano,num_hidden_layers=1000000000", "", seconds=20)
    named("layers -1", "random:nano,num_hidden_layers=-1", "num_hidden_layers")
    named("layers a word", "random:nano,num_hidden_layers=many", "num_hidden_layers")
    named("layers 1e9", "random:nano,num_hidden_layers=1e9", "num_hidden_layers")
    named("width 0", "random:MODEL,hidden_size=0", "hidden_size")
    named("width 10^12", "random:MODEL,hidden_size=1000000000000", "", seconds=20)
    named("heads 0", "random:nano,num_attention_heads=0", "num_attention_heads")
    named("deep literal", "random:nano,num_hidden_layers=" + "(" * 5000, "num_hidden_layers")
    named("power literal", "random:nano,num_hidden_layers=9**9**9", "num_hidden_layers")
    named("hub name", "random:no/such", "no/such")

    def random_upwards(place: Place) -> list[str]:
        folder = place.model()
        (place.cwd / "loot").mkdir()
        (place.cwd / "loot" / "x.txt").write_text("loot")
        (folder / "modules.json").write_text(
            json.dumps(
                [
                    {"type": "x.Transformer", "path": ""},
                    {"type": "x.Pooling", "path": "1_Pooling"},
                    {"type": "x.Normalize", "path": "../loot"},
                ]
            )
        )
        return ["encode", "random:model", "texts.txt", "-o", "../out/v.npy"]

    add("model", "random: modules.json upwards is copied", random_upwards, "modules.json", never=("cache/random/loot",))
    return found


def drop(header: dict[str, Any], data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    start, stop = header.pop(name)["data_offsets"]
    for info in header.values():
        if "data_offsets" in info and info["data_offsets"][0] >= stop:
            info["data_offsets"] = [offset - (stop - start) for offset in info["data_offsets"]]
    return header, data[:start] + data[stop:]


def turned(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    name = next(
        name
        for name, info in header.items()
        if name != "__metadata__" and len(info["shape"]) == 2 and info["shape"][0] != info["shape"][1]
    )
    header[name]["shape"].reverse()
    return header, data
