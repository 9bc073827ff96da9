"""Corpora: memory and rate of `compress encode`, and what is left of it after kills, here and with workers of Ray.

    python benchmarks/corpus.py texts --source FILE --count 2000000 --to FOLDER/texts.jsonl
    python benchmarks/corpus.py memory --model MODEL --texts FOLDER/texts.jsonl
    python benchmarks/corpus.py rate --model nano --texts FOLDER/texts.jsonl --count 40000 --rounds 3
    python benchmarks/corpus.py kills --model MODEL --texts FOLDER/texts.jsonl --kills 20
    python benchmarks/corpus.py ray-kills --model MODEL --texts FOLDER/texts.jsonl
    python benchmarks/corpus.py ray-rate --model minilm --texts FOLDER/texts.jsonl --parts 24

`texts` makes short texts: 3 to 12 words in a row of a random text of the source, by a seed, with ids. `memory` prints the peak of
the anonymous memory in each tenth of a run. `rate` embeds the same texts in memory and through files in turn, in new processes.
`kills` ends a run at random moments with SIGKILL, starts it again, and compares all bytes with those of an uninterrupted run.
`ray-kills` does so to workers, then to whole runs. `ray-rate` compares one and two workers of one core each in turn.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import pyarrow
from pyarrow import parquet

import compress
from compress.data.corpus import open_corpus
from compress.data.rows import Columns
from compress.data.texts import iterate_texts
from compress.models.source import find
from compress.runtimes.encoding import EncodeOptions
from compress.scale.corpora import CorpusOptions, encode_corpus
from compress.scale.encoder import Describe, Encoding, Texts, make_encoder
from compress.scale.units import RayOptions, working

COLUMNS = Columns("text", "id")


def make_texts(options: argparse.Namespace) -> None:
    pool = [words for text in iterate_texts(options.source) if len(words := text.split()) >= 3]
    choose = random.Random(options.seed)
    with options.to.open("w", encoding="utf-8") as file:
        for number in range(options.count):
            words = pool[choose.randrange(len(pool))]
            first = choose.randrange(len(words) - 2)
            text = " ".join(words[first : first + choose.randint(3, 12)])
            file.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")


def anonymous(process: psutil.Process) -> int:
    """Return the anonymous resident bytes of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in status else 0


def command(options: argparse.Namespace, to: Path, *more: str) -> list[str]:
    words = [
        "encode",
        options.model,
        str(options.texts),
        "--to",
        f"{to}/",
        "--id-column",
        "id",
        "--part-texts",
        str(options.part_texts),
    ]
    return [sys.executable, "-m", "compress.cli", *words, *more]


def parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def measure_memory(options: argparse.Namespace, folder: Path) -> None:
    whole = sum(1 for _ in open_corpus(str(options.texts), COLUMNS).blocks(options.part_texts))
    start = time.perf_counter()
    running = psutil.Popen(command(options, folder / "out"), stderr=subprocess.DEVNULL)
    peaks = [0] * 10
    while running.poll() is None:
        done = len(parts_in(folder / "out"))
        if done:
            tenth = min(9, 10 * done // whole)
            peaks[tenth] = max(peaks[tenth], anonymous(running))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    rows = sum(parquet.read_metadata(path).num_rows for path in parts_in(folder / "out"))
    print(f"{rows:,} vectors in {seconds:.0f} s, start included; {whole} parts")
    print("peak anonymous MB by tenth:", " ".join(f"{peak / 1e6:.0f}" for peak in peaks))
    print(f"largest less smallest: {(max(peaks) - min(peaks)) / 1e6:.0f} MB")


def measure_rate(options: argparse.Namespace, folder: Path) -> None:
    """Texts a second in memory and through files, each in a process of its own; opening the model counts for neither.

    In one process the threads that the first way leaves behind would slow the second.
    """
    some = folder / "some.jsonl"
    with options.texts.open(encoding="utf-8") as file:
        some.write_text("".join(islice(file, options.count)), encoding="utf-8")
    ways = {"memory": in_memory, "files": through_files}
    ratios = []
    for number in range(options.rounds):
        seconds = {}
        for way in sorted(ways, reverse=number % 2 == 0):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                seconds[way] = process.submit(ways[way], options, some, folder / f"out-{number}").result()
        ratios.append(seconds["memory"] / seconds["files"])
        rates = ", ".join(f"{way} {options.count / taken:,.0f} texts/s" for way, taken in sorted(seconds.items()))
        print(f"round {number + 1}: {rates}; files at {100 * ratios[-1]:.1f} % of memory", flush=True)
    print(f"median: {100 * median(ratios):.1f} %")


def in_memory(options: argparse.Namespace, texts: Path, _: Path) -> float:
    """Return the seconds of embedding a list."""
    listed = [json.loads(line)["text"] for line in texts.open(encoding="utf-8")]
    embedder = compress.load(options.model, device="cpu")
    start = time.perf_counter()
    embedder.encode(listed, progress=False)
    return time.perf_counter() - start


def through_files(options: argparse.Namespace, texts: Path, to: Path) -> float:
    """Return the seconds of a whole run, less those of opening its model."""
    how = Encoding(options.model, EncodeOptions(device="cpu"))
    with ThreadPoolExecutor(1) as thread:  # as a run opens it; threads that torch leaves in this one would slow the run
        thread.submit(make_encoder, how).result()  # the modules
        start = time.perf_counter()
        thread.submit(make_encoder, how).result()
    opening = time.perf_counter() - start
    start = time.perf_counter()
    encode_corpus(options.model, str(texts), to, CorpusOptions(EncodeOptions(device="cpu"), COLUMNS, part_texts=options.part_texts))
    return time.perf_counter() - start - opening


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_ids(folder: Path, options: argparse.Namespace) -> str:
    """Say whether each id of the corpus is there once."""
    ids = np.concatenate([parquet.read_table(path, columns=["id"])["id"].to_numpy() for path in parts_in(folder)])
    wanted = sum(1 for _ in options.texts.open("rb"))
    whole = len(ids) == wanted and np.array_equal(np.sort(ids), np.arange(wanted))
    return f"{len(ids):,} ids, each of {wanted:,} once: {whole}"


def measure_kills(options: argparse.Namespace, folder: Path) -> None:
    choose = random.Random(options.seed)
    start = time.perf_counter()
    subprocess.run(command(options, folder / "whole"), check=True, capture_output=True)
    print(f"uninterrupted: {time.perf_counter() - start:.0f} s, {len(parts_in(folder / 'whole'))} parts")
    killed, left = 0, []
    while killed < options.kills:
        running = subprocess.Popen(command(options, folder / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(choose.uniform(0.0, options.longest))
        if running.poll() is None:
            running.kill()
            killed += 1
            running.wait()
            left.append(len(parts_in(folder / "killed")))
        else:  # it was whole before its kill: the next one begins anew
            assert contents(folder / "killed") == contents(folder / "whole")
            shutil.rmtree(folder / "killed")
    print(f"{killed} kills; whole parts after each: {left}")
    subprocess.run(command(options, folder / "killed"), check=True, capture_output=True)
    print(f"byte-identical: {contents(folder / 'killed') == contents(folder / 'whole')}; {check_ids(folder / 'killed', options)}")


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    """Return the processes of a driver's workers."""
    found = []
    for process in driver.children(recursive=True):
        try:
            if any("ray::RayWorker" in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def measure_ray_kills(options: argparse.Namespace, folder: Path) -> None:
    choose = random.Random(options.seed)
    subprocess.run(command(options, folder / "whole"), check=True, capture_output=True)
    there = folder / "ray"
    with_ray = command(options, there, "--ray", "--workers", "2")
    for workers_killed in (3, 2):  # and then the driver
        running = psutil.Popen(with_ray, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for kind in ["worker"] * workers_killed + ["driver"]:
            wait_for(there, len(parts_in(there)) + 1, running)
            time.sleep(choose.uniform(0.0, 0.5))
            victim = running if kind == "driver" else choose.choice(workers_of(running))
            victim.kill()
            print(f"killed a {kind} after {len(parts_in(there))} parts", flush=True)
        running.wait()
    start = time.perf_counter()
    subprocess.run(with_ray, check=True, capture_output=True)
    print(f"the last run took {time.perf_counter() - start:.0f} s; {check_ids(there, options)}")
    same = contents(there) == contents(folder / "whole")
    print(f"byte-identical: {same}; largest difference of a vector: {difference(there, folder / 'whole')}")


def wait_for(folder: Path, count: int, running: psutil.Process) -> None:
    while len(parts_in(folder)) < count:
        if running.poll() is not None:
            raise SystemExit(f"the run ended with {running.returncode} after {len(parts_in(folder))} parts; give it more texts")
        time.sleep(0.02)


def difference(a: Path, b: Path) -> float:
    """Return the largest difference of two folders' vectors, sorted by id."""
    tables = [pyarrow.concat_tables(parquet.read_table(path) for path in parts_in(folder)).sort_by("id") for folder in (a, b)]
    values = [table["vector"].combine_chunks().flatten().to_numpy() for table in tables]
    return float(np.abs(values[0] - values[1]).max())


def measure_ray_rate(options: argparse.Namespace, folder: Path) -> None:
    """Texts a second of one worker and of two, once all of them have their model."""
    lines = options.texts.open(encoding="utf-8").readlines()[: options.parts * options.part_texts]
    texts = [json.loads(line)["text"] for line in lines]
    units = [texts[start : start + options.part_texts] for start in range(0, len(texts), options.part_texts)]
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(options.rounds):
        for workers in (1, 2) if number % 2 == 0 else (2, 1):
            rates[workers].append(one_ray_rate(options, units, workers))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"two workers give {median(ratios):.2f}x one ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def one_ray_rate(options: argparse.Namespace, units: list[list[str]], workers: int) -> float:
    how = Encoding(str(find(options.model).path), EncodeOptions(device="cpu"), threads=1)
    begun = time.perf_counter()
    with working(partial(make_encoder, how), RayOptions(workers=workers)) as mapped:
        (facts,) = mapped([Describe([])])
        started = time.perf_counter()
        first = 2 * workers  # by then every worker has loaded its model
        deque(mapped(Texts(unit, facts) for unit in units[:first]), maxlen=0)
        warm = time.perf_counter()
        deque(mapped(Texts(unit, facts) for unit in units[first:]), maxlen=0)
        done = time.perf_counter()
        own = cpu_seconds(psutil.Process(), workers_of(psutil.Process()))
    rate = sum(map(len, units[first:])) / (done - warm)
    print(
        f"{workers} workers: {rate:,.1f} texts/s; {started - begun:.1f} s to start Ray and open the first model; in "
        f"{done - begun:.0f} s Ray's own processes took {own:.1f} s of CPU",
        flush=True,
    )
    return rate


def cpu_seconds(driver: psutil.Process, workers: list[psutil.Process]) -> float:
    """Return the CPU seconds of everything that Ray started but the workers that were used."""
    used = {worker.pid for worker in workers}
    times = [process.cpu_times() for process in driver.children(recursive=True) if process.pid not in used]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["texts", *MEASURED])
    parser.add_argument("--source", type=Path, help="of `texts`: texts to cut short texts from")
    parser.add_argument("--to", type=Path, help="of `texts`: the file of the texts")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--count", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part-texts", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=4.0, help="of `kills`: seconds that a run is let be at most")
    parser.add_argument("--parts", type=int, default=24, help="of `ray-rate`: number of parts")
    options = parser.parse_args()
    if options.what == "texts":
        make_texts(options)
        return
    folder = Path(tempfile.mkdtemp(prefix="corpus-"))
    try:
        MEASURED[options.what](options, folder)
    finally:
        shutil.rmtree(folder)


MEASURED = {
    "memory": measure_memory,
    "rate": measure_rate,
    "kills": measure_kills,
    "ray-kills": measure_ray_kills,
    "ray-rate": measure_ray_rate,
}

if __name__ == "__main__":
    main()
