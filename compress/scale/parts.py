"""Where the vectors of a corpus are kept: Parquet parts in a folder, or one array. A part is there whole or not at all.

Parts are written in their order. Each says where the next one starts in the corpus, so that a run goes on behind the last one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.common.files import naming, remove_abandoned_files, replacing, sync_folder, write_json
from compress.common.inputs import checked, parse_json, read_as
from compress.data.corpus import Block, Reject
from compress.data.rows import Id
from compress.scale.encoder import DTYPES, INT8_SHIFT, Facts, Store, Stored

REJECTS = "_rejects.jsonl"
"""What became no vector. Its name starts with a mark that readers of a folder of Parquet files pass over."""
STATE, VECTORS, IDS = "state.json", "vectors.npy", "ids.jsonl"
WORKING = ".partial"
"""How the name of the folder ends in which an array is written."""
PREFIX = "compress."
"""What the keys of a part's metadata start with."""


class Done(BaseModel):
    """What is written of a corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: int = 0
    next: tuple[int, int] = (0, 0)
    """Where the next part starts: a `Position`."""
    texts: int = 0
    """Vectors."""
    rejected: int = 0

    def after(self, block: Block, stored: Stored) -> Done:
        """Return what is written once a block is."""
        rejected = len(block.rejects) + len(stored.rejected)
        texts = self.texts + len(block.texts) - len(stored.rejected)
        return Done(parts=self.parts + 1, next=block.next, texts=texts, rejected=self.rejected + rejected)


class _ArrayState(BaseModel):
    """What is written of an array, and how long its files are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    done: Done
    ids_bytes: int


@dataclass(frozen=True)
class Layout:
    """What all parts have in common."""

    store: Store
    integers: bool
    """Whether ids are integers."""
    facts: Facts
    about: Mapping[str, str]
    """The model and how its vectors were made, for whoever reads the parts."""

    @property
    def width(self) -> int:
        """Numbers of a stored vector."""
        return (self.facts.dimension + 7) // 8 if self.store == "binary" else self.facts.dimension

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of a stored vector."""
        return np.dtype(DTYPES[self.store])

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of a part; an int8 code stands for `scale * code + offset`, a bit for a value above `threshold`."""
        facts = self.facts
        said = {**self.about, "dimension": str(facts.dimension), "vector_format": self.store, "similarity": facts.similarity}
        said["prompt"] = facts.prompt
        if facts.low is not None and facts.step is not None:
            offset = (facts.low + np.float32(INT8_SHIFT) * facts.step).astype(np.float32)
            said |= {"scale": json.dumps(facts.step.tolist()), "offset": json.dumps(offset.tolist())}
        if facts.threshold is not None:
            said["threshold"] = json.dumps(facts.threshold.tolist())
        return {f"{PREFIX}{key}": value for key, value in said.items()}


class Sink(Protocol):
    """Where parts are written."""

    def resume(self) -> Done:
        """Return what is written, and remove what is not whole."""
        ...

    def write(self, block: Block, stored: Stored) -> None:
        """Write the next part."""
        ...

    def finish(self) -> Done:
        """Give everything its place; return what is written."""
        ...


def part_name(number: int) -> str:
    """Return the name of a part's file."""
    return f"part-{number:05d}.parquet"


def kept_ids(block: Block, stored: Stored) -> list[Id]:
    """Return the ids of a block's vectors."""
    return [id for index, id in enumerate(block.ids) if index not in stored.rejected] if stored.rejected else block.ids


def rejects_of(block: Block, stored: Stored) -> list[Reject]:
    """Return what a block has no vectors of, in the order of the corpus."""
    late = [((index, 1), Reject(block.ids[index], block.place(index), reason)) for index, reason in stored.rejected.items()]
    return [reject for _, reject in sorted([((before, 0), reject) for before, reject in block.rejects] + late, key=lambda r: r[0])]


class Rejects:
    """The file of what became no vector; each line says to which part it belongs. It is written before the part is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut(self, parts: int) -> None:
        """Remove the lines that belong to no written part.

        Raises:
            UserError: the file cannot be read or written.
        """
        if not self.path.exists():
            return
        with naming(self.path), self.path.open("r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["part"] >= parts:
                    break
                end += len(line)
            file.truncate(end)
        if not end:
            self.path.unlink()

    def add(self, part: int, rejects: list[Reject]) -> None:
        """Write the rejects of a part."""
        if rejects:
            lines = [json.dumps({"part": part, **reject._asdict()}, ensure_ascii=True) + "\n" for reject in rejects]
            with naming(self.path):
                append(self.path, "".join(lines).encode())


def append(path: Path, content: Any) -> None:
    """Write bytes at the end of a file, and sync it to the disk."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class ParquetParts:
    """Parts as Parquet files of a folder, with the columns `id` and `vector`."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._rejects = Rejects(folder / REJECTS)
        self._done = Done()

    def resume(self) -> Done:
        """Return what is written.

        Raises:
            UserError: a part is missing before others, or is not one of ours.
        """
        remove_abandoned_files(self._folder)
        written = sorted(path.name for path in self._folder.glob("part-*.parquet"))
        for number, name in enumerate(written):
            if name != part_name(number):
                raise UserError(
                    f"{self._folder / part_name(number)}: is missing, and {name} is there",
                    "delete the later parts to continue from here, or give another folder",
                )
        self._done = self._read(self._folder / written[-1]) if written else Done()
        self._rejects.cut(self._done.parts)
        return self._done

    def _read(self, path: Path) -> Done:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

        try:
            metadata = parquet.read_schema(path).metadata or {}
        except (ArrowException, OSError) as error:
            raise UserError(
                f"{path}: is damaged ({str(error).splitlines()[0]})", "delete it, then run the same command again"
            ) from error
        said = metadata.get(f"{PREFIX}part".encode())
        if said is None:
            raise UserError(f"{path}: was not written by `compress encode`", "give another folder")
        return checked(parse_json(said.decode(), str(path)), Done, str(path))

    def write(self, block: Block, stored: Stored) -> None:
        """Write the next part."""
        import pyarrow
        from pyarrow import parquet

        done, layout = self._done.after(block, stored), self._layout
        ids = pyarrow.array(kept_ids(block, stored), pyarrow.int64() if layout.integers else pyarrow.string())
        vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(stored.vectors.reshape(-1)), layout.width)
        table = pyarrow.table({"id": ids, "vector": vectors})
        table = table.replace_schema_metadata({**layout.metadata, f"{PREFIX}part": done.model_dump_json()})
        self._rejects.add(block.number, rejects_of(block, stored))
        with replacing(self._folder / part_name(block.number)) as temporary:
            # Floats do not get smaller, and packing them takes longer than writing them.
            parquet.write_table(
                table,
                temporary,
                compression={"id": "zstd"},
                use_dictionary=False,
                write_statistics=["id"],
                row_group_size=len(ids) or 1,
            )
        self._done = done

    def finish(self) -> Done:
        """Return what is written. A corpus without records has one part without rows."""
        if not self._done.parts:
            self.write(Block(0), Stored(np.empty((0, self._layout.width), self._layout.dtype), {}))
        return self._done


class NpyArray:
    """Vectors as one `.npy` file, written in a folder next to it. Ids are only kept where they are not the numbers of the rows."""

    def __init__(self, target: Path, layout: Layout, *, own_ids: bool) -> None:
        """Take the array's file; `own_ids`: whether the corpus has ids of its own."""
        self._target, self._layout, self._own_ids = target, layout, own_ids
        self._folder = working_folder(target)
        self._rejects = Rejects(self._folder / REJECTS)
        self._done = Done()

    def resume(self) -> Done:
        """Return what is written, and cut off what is not whole."""
        remove_abandoned_files(self._folder)
        state = self._folder / STATE
        kept = read_as(state, _ArrayState) if state.exists() else _ArrayState(done=Done(), ids_bytes=0)
        vectors, ids = self._folder / VECTORS, self._folder / IDS
        self._done = kept.done
        if state.exists() and not vectors.exists() and self._target.exists():  # stopped after the array got its name
            return self._done
        with naming(vectors):
            if not state.exists():
                vectors.write_bytes(self._header(0))
                ids.write_bytes(b"")
            for path, length in ((vectors, self._offset(kept.done.texts)), (ids, kept.ids_bytes)):
                if path.stat().st_size < length:
                    raise UserError(f"{path}: is shorter than {state} says", f"delete {self._folder} to start over")
                os.truncate(path, length)
        self._rejects.cut(kept.done.parts)
        return self._done

    def write(self, block: Block, stored: Stored) -> None:
        """Write the next part."""
        done = self._done.after(block, stored)
        vectors, ids = self._folder / VECTORS, self._folder / IDS
        self._rejects.add(block.number, rejects_of(block, stored))
        with naming(vectors):
            append(ids, "".join(f"{json.dumps(id)}\n" for id in kept_ids(block, stored)).encode())
            append(vectors, np.ascontiguousarray(stored.vectors).reshape(-1).view(np.uint8).data)
        state = _ArrayState(done=done, ids_bytes=ids.stat().st_size)
        write_json(self._folder / STATE, state.model_dump(mode="json"))
        self._done = done

    def finish(self) -> Done:
        """Write the number of rows into the array, and give the files their names; that of the vectors comes last."""
        vectors = self._folder / VECTORS
        if not vectors.exists():
            return self._done
        with naming(vectors):
            with vectors.open("r+b") as file:
                file.write(self._header(self._done.texts))
                file.flush()
                os.fsync(file.fileno())
            for name, wanted in ((IDS, self._own_ids or self._done.rejected > 0), (REJECTS, self._done.rejected > 0)):
                other = self._target.with_suffix(f".{name.removeprefix('_')}")
                if wanted:
                    with replacing(other) as temporary:
                        shutil.copyfile(self._folder / name, temporary)
                else:
                    other.unlink(missing_ok=True)
            about = {key.removeprefix(PREFIX): value for key, value in self._layout.metadata.items()}
            write_json(self._target.with_suffix(".encode.json"), {**about, **self._done.model_dump(include={"texts", "rejected"})})
            vectors.replace(self._target)
            sync_folder(self._target.parent)
        return self._done

    def _header(self, rows: int) -> bytes:
        """Return the header of the array; it has the same length for any number of rows."""
        from io import BytesIO

        made = BytesIO()
        shape = (rows, self._layout.width)
        described = np.lib.format.dtype_to_descr(self._layout.dtype)
        np.lib.format.write_array_header_1_0(made, {"descr": described, "fortran_order": False, "shape": shape})
        return made.getvalue()

    def _offset(self, rows: int) -> int:
        return len(self._header(0)) + rows * self._layout.width * self._layout.dtype.itemsize


def working_folder(target: Path) -> Path:
    """Return the folder in which an array is written."""
    return target.with_name(target.name + WORKING)


def facts_as_json(facts: Facts) -> dict[str, Any]:
    """Return facts as JSON holds them."""
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in asdict(facts).items()}


class StoredFacts(BaseModel):
    """Facts as a file says them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dimension: int
    prompt: str
    similarity: str
    low: list[float] | None
    step: list[float] | None
    threshold: list[float] | None

    @property
    def facts(self) -> Facts:
        """Return the facts."""
        arrays = (None if part is None else np.array(part, dtype=np.float32) for part in (self.low, self.step, self.threshold))
        return Facts(self.dimension, self.prompt, self.similarity, *arrays)
