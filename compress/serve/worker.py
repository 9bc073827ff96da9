"""A computing process: opens one model, then maps token ids from standard input to vectors on standard output.

Started by `compress.serve.instance`. It ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from compress.common.failures import in_our_words
from compress.data.texts import calibration_texts
from compress.models.embedder import BatchedEmbedder, Embedder, TextEmbedder, Vectors
from compress.models.folder import ModelFolder
from compress.models.text.tokens import Ids, batches_by_tokens
from compress.runtimes.loading import open_source, runtime_of
from compress.runtimes.routed import RoutedEmbedder
from compress.serve import frames

# Runtimes make kernels for each new length and batch; these are made before the first request.
WARM_STEP, WARM_LENGTH, WARM_SECONDS = 8, 512, 20.0


class Computing:
    """The embedders of one model."""

    def __init__(self, config: dict[str, Any]) -> None:
        """Open the model.

        Args:
            config: `name` and `path` of its folder; `runtime`, `device`, `dtype` and `threads` as for `compress.load`.

        Raises:
            UserError: it cannot be opened.
        """
        self.folder = ModelFolder(config["name"], Path(config["path"]))
        how = {"device": config["device"], "dtype": config["dtype"]}
        opened = open_source(self.folder, runtime=config["runtime"], threads=config["threads"], **how)
        self.ways: list[TextEmbedder] = [_text_embedder(one) for one in _ways(self.folder, opened)]
        """The embedder of each of the model's ways; one, where the model has no Router."""
        first = self.folder if self.folder.routes is None else self.folder.along(self.folder.routes.ways[0])
        self.runtime = runtime_of(first, config["runtime"], **how)

    def embed(self, rows: Sequence[Ids], way: int, pool_from: int) -> Vectors:
        """Embed texts, float32 [texts, dimension]; `rows`: the ids of each, int64 [length]."""
        embedder = self.ways[way]
        return embedder.embed(rows, embedder.batch_tokens, pool_from, False)

    def padded(self, lengths: Sequence[int], way: int) -> int:
        """Return how many tokens, padding counted, texts of these lengths take."""
        embedder = self.ways[way]
        if not isinstance(embedder, BatchedEmbedder):
            return sum(lengths)
        return sum(len(batch) * lengths[batch[0]] for batch in batches_by_tokens(lengths, embedder.batch_tokens))

    def warm_up(self) -> float:
        """Run what requests will run, so that the first is as fast as the tenth; return the tokens a second of full batches."""
        speed = 1.0
        for way, embedder in enumerate(self.ways):
            started = time.perf_counter()
            for lengths in _warm_batches(embedder):
                begun = time.perf_counter()
                self.embed(_rows(embedder, lengths), way, 0)
                speed = sum(lengths) / max(time.perf_counter() - begun, 1e-6)
                if time.perf_counter() - started > WARM_SECONDS:
                    break
        return speed


def _ways(folder: ModelFolder, opened: Embedder) -> list[Embedder]:
    if folder.routes is None:
        return [opened]
    assert isinstance(opened, RoutedEmbedder), "a model with routes is opened along each of them"
    task_of = {folder.routes.modules(task): task for task in folder.routes.tasks}
    return [opened.route(task_of[way]) for way in folder.routes.ways]


def _text_embedder(opened: Embedder) -> TextEmbedder:
    assert isinstance(opened, TextEmbedder), "every runtime's embedder takes token ids"
    return opened


def _warm_batches(embedder: TextEmbedder) -> Iterator[list[int]]:
    """Yield the lengths of the texts of batches: single texts first, a few full batches last."""
    longest = min(embedder.tokenizer.max_length, embedder.tokenizer.positions or WARM_LENGTH, WARM_LENGTH)
    budget = embedder.batch_tokens
    for length in range(WARM_STEP, longest + 1, WARM_STEP):
        yield [length]
    for length in (16, 32, 64, 128, longest):
        if length <= longest:
            yield [length] * (4 * max(1, budget // length))


def _rows(embedder: TextEmbedder, lengths: Sequence[int]) -> list[Ids]:
    """Return texts of these lengths, as ids of a real text."""
    ids = embedder.tokenizer([calibration_texts()[0]])[0]
    return [np.resize(ids if len(ids) else np.zeros(1, dtype=np.int64), length) for length in lengths]


def serve(computing: Computing, source: IO[bytes], target: IO[bytes]) -> None:
    """Answer messages until there are none.

    A message has `id`, `way` and `pool_from`, and `lengths`, the number of tokens of each text; its body is their ids, int32. The
    answer has the same `id`, `seconds` and `padded`; its body is the vectors, float32 [texts, dimension]. Where the network fails,
    it has `error` instead.
    """
    while (message := frames.read(source)) is not None:
        head, body = message
        lengths: list[int] = head["lengths"]
        ids = np.frombuffer(body, dtype=np.int32).astype(np.int64)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        begun = time.perf_counter()
        try:
            vectors = computing.embed(rows, head["way"], head["pool_from"])
        except Exception as error:  # whatever a runtime raises: the server answers for it, and goes on
            said = type(error).__name__
            print(f"computing {len(rows)} texts failed: {said}: {error}", file=sys.stderr, flush=True)
            _send(target, {"id": head["id"], "error": said})
            continue
        seconds = time.perf_counter() - begun
        padded = computing.padded(lengths, head["way"])
        answer = {"id": head["id"], "seconds": seconds, "padded": padded}
        _send(target, answer, np.ascontiguousarray(vectors, dtype=np.float32).tobytes())


def _send(target: IO[bytes], head: dict[str, Any], body: bytes = b"") -> None:
    target.write(frames.packed(head, body))
    target.flush()


def main() -> None:
    """Open the model that the first argument describes, say that it is ready, and answer."""
    config: dict[str, Any] = json.loads(sys.argv[1])
    # A signal to the whole group, as systemd sends it, is for the server, which finishes what this process computes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What libraries print goes to standard error: standard output is for messages alone.
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        computing = Computing(config)
        speed = computing.warm_up()
    except Exception as error:
        known = in_our_words(error)
        if known is None:
            raise
        _send(target, {"refused": known.message, "hint": known.hint})
        return
    first = computing.ways[0]
    described = {
        "runtime": computing.runtime,
        "threads": getattr(first, "threads", None),
        "dtype": str(getattr(first, "dtype", "") or "").removeprefix("torch.") or None,
        "batch_tokens": first.batch_tokens,
        "dimension": first.dimension,
        "speed": speed,
    }
    _send(target, {"ready": described})
    serve(computing, sys.stdin.buffer, target)


if __name__ == "__main__":
    main()
