"""Pickled weights to safetensors: the one place that reads a pickle, with PyTorch's reader of tensors, in a process of its own.

`convert` imports no torch. The process that it starts runs this module (`python -m compress.models.convert`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.common.children import tied
from compress.common.errors import UserError
from compress.common.files import new_folder, write_json
from compress.common.inputs import read_json
from compress.models.files.headers import read_header
from compress.models.hub import HubName, check_links, download, snapshot_of
from compress.models.text.router import every_module
from compress.models.text.sentence_transformers import read_modules

if TYPE_CHECKING:
    import torch

INDEX = "pytorch_model.bin.index.json"
SINGLE = {"pytorch_model.bin": "model.safetensors", "adapter_model.bin": "adapter_model.safetensors"}
"""Files of pickled weights, and what each becomes."""
# What can run code when it is opened, and weights of other frameworks: never copied.
LEFT_OUT = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".h5", ".msgpack", ".ot", ".joblib"}


def convert(model: str, target: Path) -> list[Path]:
    """Write a copy of a model's folder with safetensors in the place of its pickled weights.

    Args:
        model: a folder, or `owner/name[@revision]` of the hub.
        target: the folder to be written; it appears when it is whole.

    Returns:
        The safetensors files that were written, in `target`.

    Raises:
        UserError: the model is nowhere or has no pickled weights, a file holds anything but tensors, is broken or is refused by
            `torch.load(weights_only=True)`, or the target is there already.
    """
    source = _source(model)
    weights = [job for place in _places(source) for job in _pickles(place)]
    if not weights:
        raise UserError(f"{source}: no {' or '.join(SINGLE)}", "a folder with safetensors needs no conversion")
    with new_folder(target) as folder:
        for path in _others(source):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # of a link what it points to
        _in_a_process({pickle: folder / written.relative_to(source) for pickle, written in weights})
        for place in _places(source):
            _write_index(place, folder / place.relative_to(source))
    return [target / written.relative_to(source) for _, written in weights]


def _source(model: str) -> Path:
    if Path(model).is_dir():
        folder = snapshot_of(Path(model))
        check_links(folder)
        return folder
    on_hub = HubName.parse(model)
    if on_hub is None:
        raise UserError(f"model {model!r}: not a folder or a hub name (owner/name)")
    return download(on_hub, pickles=True)


def _places(source: Path) -> list[Path]:
    """Return where weights can be: the folder itself and its modules' own."""
    return sorted({source, *(module.folder for module in every_module(read_modules(source)))})


def _pickles(place: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the pickles of a folder that are converted, and what each becomes; none where its weights are safetensors."""
    if (place / INDEX).exists() and not (place / "model.safetensors.index.json").exists():
        for name in sorted(set(_weight_map(place).values())):
            if not (place / name).is_file():
                raise UserError(f"{place / INDEX}: names {name}, which is not there")
            yield place / name, place / _shard(name)
    for name, written in SINGLE.items():
        if (place / name).is_file() and not (place / written).exists() and not (place / INDEX).exists():
            yield place / name, place / written


def _weight_map(place: Path) -> dict[str, str]:
    index = read_json(place / INDEX)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(re.fullmatch(r"[\w.-]+\.bin", str(name)) for name in found.values()):
        raise UserError(f"{place / INDEX}: no weight_map from tensors to .bin files of the same folder")
    return found


def _shard(name: str) -> str:
    return re.sub(r"^pytorch_model", "model", name).removesuffix(".bin") + ".safetensors"


def _others(source: Path) -> Iterator[Path]:
    """Yield the files that are copied: all but pickles, code, other frameworks' weights, and what is hidden."""
    for path in sorted(source.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if path.is_file() and not hidden and path.suffix not in LEFT_OUT and path.name != INDEX:
            yield path


def _write_index(place: Path, target: Path) -> None:
    """Write the index of shards, and see that they hold the tensors that the pickles' index names."""
    if not (place / INDEX).exists() or (target / "model.safetensors.index.json").exists():
        return
    places = {name: _shard(file) for name, file in _weight_map(place).items()}
    headers = {file: read_header(target / file) for file in sorted(set(places.values()))}
    there = {(name, file) for file, header in headers.items() for name in header}
    wrong = sorted(there ^ set(places.items()))
    if wrong:
        raise UserError(f"{place / INDEX}: does not say the same as the files about {wrong[0][0]} in {wrong[0][1]}")
    total = sum(info.bytes for header in headers.values() for info in header.values())
    write_json(target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _in_a_process(files: Mapping[Path, Path]) -> None:
    """Convert pickles in a process of its own, which ends with it whatever is in them."""
    names = [str(name) for pair in files.items() for name in pair]
    done = subprocess.run(
        tied([sys.executable, "-m", "compress.models.convert", *names]), capture_output=True, text=True, check=False
    )
    said = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not said.startswith("{"):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{', '.join(names[::2])}: reading ended with exit code {done.returncode} ({last})")
    for name, refused in json.loads(said).items():
        if refused is not None:
            raise UserError(f"{name}: {refused}", "nothing of it was run; ask its author for safetensors")


def write_safetensors(pickle: Path, written: Path) -> str | None:
    """Read a pickle of tensors and write them, as they are, as safetensors.

    Tensors that share memory are written each in full, under every name: a reader finds what it found before.

    Returns:
        Why it was refused, in one line; None where it was not, and what was written was read back the same.
    """
    import pickle as pickles
    import zipfile

    import torch
    from safetensors.torch import save_file

    try:
        # Mapped where the format allows it, so that memory holds one copy.
        found = torch.load(pickle, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(pickle))
    except pickles.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            return f"refused, because it holds more than tensors: {named[1]}"
        why = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        return f"refused by torch.load(weights_only=True): {why[1] if why else _first_sentence(str(error))}"
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        return f"not a whole file of torch.save ({_first_sentence(str(error)) or type(error).__name__})"
    refused = _not_tensors(found)
    if refused:
        return refused
    tensors = _apart(found)
    save_file(tensors, written, metadata={"format": "pt"})
    return _differs(tensors, written)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)])\. |\n", text.strip())[0]


def _not_tensors(found: Any) -> str | None:
    """Say what in an unpickled object is not a named tensor that safetensors can hold; None where nothing is."""
    import torch

    if not isinstance(found, Mapping):
        return f"holds {type(found).__name__} in the place of named tensors"
    if not found:
        return "holds no tensor"
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            return f"holds more than named tensors: {name!r} is {type(value).__name__}"
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            return f"{name!r} is a tensor that safetensors cannot hold ({value.layout}, {value.dtype})"
    return None


def _apart(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give each tensor memory of its own: all but the first that lies in the same storage are copied."""
    seen: set[int] = set()
    tensors = {}
    for name, value in found.items():
        storage = value.untyped_storage().data_ptr()
        plain = value.detach().contiguous()
        tensors[name] = plain.clone() if storage in seen and plain.data_ptr() == value.data_ptr() else plain
        seen.add(storage)
    return tensors


def _differs(tensors: Mapping[str, torch.Tensor], written: Path) -> str | None:
    """Say which tensor came back different from what was written, to the bit; None where none did."""
    import torch
    from safetensors import safe_open

    with safe_open(written, framework="pt") as file:
        if set(file.keys()) != set(tensors):
            return "written as safetensors with other names"
        for name, value in tensors.items():
            read = file.get_tensor(name)
            same = read.dtype == value.dtype and read.shape == value.shape
            if not same or not torch.equal(read.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)):
                return f"{name!r} came back different from what was written"
    return None


def main(names: Sequence[str]) -> None:
    """Convert files, named in pairs, until one is refused; print a JSON object from each to why it was refused, or null."""
    said: dict[str, str | None] = {}
    for pickle, written in zip(names[::2], names[1::2], strict=True):
        Path(written).parent.mkdir(parents=True, exist_ok=True)
        said[pickle] = write_safetensors(Path(pickle), Path(written))
        if said[pickle] is not None:
            break
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:])
