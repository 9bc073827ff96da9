"""Serve a model and search with it: `compress serve`, a corpus embedded over HTTP by OpenAI's client, an index in FAISS.

    pip install ".[serve]" faiss-cpu openai
    python examples/serve_and_search.py                                 # the built-in model and 199 notices, offline
    python examples/serve_and_search.py results/RUN "who repairs the lift?" notices.jsonl

Without the package `openai` the same requests are sent by Python's own urllib.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from compress.data.texts import SUITE, read_texts

NOTICES = SUITE / "MiniRetrieval" / "corpus.jsonl"
QUERY = "summer ban on all flames including stoves"


@contextmanager
def serving(model: str) -> Iterator[str]:
    """Run `compress serve` on a free port until the block ends, and give its address once it is ready."""
    command = [sys.executable, "-m", "compress.cli", "serve", f"model={model}", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said = []
    try:
        for line in server.stderr:  # "http://127.0.0.1:PORT/v1: opening model", then "...: ready"
            said.append(line)
            if line.rstrip().endswith(": ready"):
                break
        else:
            raise SystemExit(f"the server ended:\n{''.join(said)}")
        yield said[-1].rpartition(":")[0]
    finally:
        server.terminate()  # it finishes what it has taken
        server.wait(60)


def embed(address: str, name: str, texts: Sequence[str], at_once: int = 512) -> np.ndarray:
    """Ask a server for the vectors of texts, float32 [n, dimension]. `NAME@query` puts the model's prompt for queries first."""
    parts = [list(texts[start : start + at_once]) for start in range(0, len(texts), at_once)]
    try:
        from openai import OpenAI
    except ModuleNotFoundError:
        return np.array([vector for part in parts for vector in _plain(address, name, part)], np.float32)
    with OpenAI(base_url=address, api_key="unused") as client:
        answers = [client.embeddings.create(model=name, input=part) for part in parts]
    return np.array([entry.embedding for answer in answers for entry in answer.data], np.float32)


def _plain(address: str, name: str, texts: list[str]) -> list[list[float]]:
    body = json.dumps({"model": name, "input": texts}).encode()
    request = urllib.request.Request(f"{address}/embeddings", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return [entry["embedding"] for entry in json.load(answer)["data"]]


def search(model: str, query: str, texts: Sequence[str], top: int = 3) -> list[tuple[float, str]]:
    """Serve a model, index the texts, and return the nearest ones of a query with their similarities, the nearest first."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise SystemExit("FAISS is not installed: pip install faiss-cpu, or pip install '.[stores]'") from None

    with serving(model) as address:
        documents = embed(address, "model", texts)
        asked = embed(address, "model@query", [query])
    index = faiss.IndexFlatIP(documents.shape[1])  # inner products: of unit vectors, cosines
    index.add(documents)
    scores, rows = index.search(asked, top)
    return [(float(score), texts[row]) for score, row in zip(scores[0], rows[0], strict=True)]


if __name__ == "__main__":
    model, query, file = (*sys.argv[1:4], *("nano", QUERY, str(NOTICES))[len(sys.argv) - 1 :])
    print(query)
    for similarity, text in search(model, query, read_texts(file)):
        print(f"{similarity:.3f}  {text}")
