"""Clients that people use, against a real process, offline: their vectors are those of `encode`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_support import PROMPTS, Server, serving

import compress

INSTALL = "pip install -c constraints.txt 'compress-embedders[clients]'"
TEXTS = ["the parcel never came", "rain by the evening", "x", "🙂 日本語", "word " * 100]


def client_package(name: str) -> Any:
    return pytest.importorskip(name, reason=f"a client is not installed: {INSTALL}")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("no_proxy", "*"),
        ("NO_PROXY", "*"),
        ("OPENAI_API_KEY", "unused"),
        ("LITELLM_LOCAL_MODEL_COST_MAP", "True"),
    ):
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def expected(prompted: Path) -> np.ndarray:
    return np.asarray(compress.load(str(prompted), device="cpu").encode(TEXTS))


def base(server: Server) -> str:
    return f"{server.address}/v1"


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_openai(served: Server, expected: np.ndarray, encoding: str | None) -> None:
    openai = client_package("openai")
    chosen = {} if encoding is None else {"encoding_format": encoding}
    with openai.OpenAI(base_url=base(served), api_key="unused") as client:
        answer = client.embeddings.create(model="tiny", input=TEXTS, **chosen)
        assert [model.id for model in client.models.list()] == ["tiny", "nv"]
        assert client.models.retrieve("tiny").dimension == 48
        with pytest.raises(openai.BadRequestError, match="item 0 is an empty string"):
            client.embeddings.create(model="tiny", input="")
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.embeddings.create(model="text-embedding-3-small", input="a")
    rows = [entry.embedding for entry in answer.data]
    if encoding == "base64":
        assert all(isinstance(row, str) for row in rows)
        import base64

        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows]
    np.testing.assert_allclose(np.array(rows), expected, atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(TEXTS)


def test_openai_asynchronously_with_many_requests_at_a_time(served: Server, expected: np.ndarray) -> None:
    openai = client_package("openai")

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=base(served), api_key="unused") as client:
            return await asyncio.gather(*(client.embeddings.create(model="tiny", input=text) for text in TEXTS * 20))

    answers = asyncio.run(ask())
    np.testing.assert_allclose(np.array([answer.data[0].embedding for answer in answers]), np.tile(expected, (20, 1)), atol=1e-6)


def test_openai_with_what_is_ours(served: Server, prompted: Path) -> None:
    openai = client_package("openai")
    with openai.OpenAI(base_url=base(served), api_key="unused") as client:
        named = client.embeddings.create(model="tiny@query", input=TEXTS)
        typed = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"input_type": "query"})
    wanted = compress.load(str(prompted), device="cpu").encode(TEXTS, PROMPTS["query"])
    for answer in (named, typed):
        np.testing.assert_allclose(np.array([entry.embedding for entry in answer.data]), wanted, atol=1e-6)


@pytest.fixture(scope="module")
def crowded(prompted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("crowded"), f"tiny={prompted}", "--max-waiting", "300") as server:
        yield server


@pytest.mark.slow
def test_openai_comes_again_after_429(crowded: Server, expected: np.ndarray) -> None:
    openai = client_package("openai")
    together = threading.Barrier(12)
    with openai.OpenAI(base_url=base(crowded), api_key="unused", max_retries=10) as client, ThreadPoolExecutor(12) as threads:

        def ask(_: int) -> Any:
            together.wait(30)
            return client.embeddings.create(model="tiny", input=TEXTS)

        answers: list[Any] = []
        for _ in range(10):  # a fast machine may bear a round
            answers += threads.map(ask, range(12))
            if any(line["status"] == 429 for line in crowded.lines()):
                break
    for answer in answers:
        np.testing.assert_allclose(np.array([entry.embedding for entry in answer.data]), expected, atol=1e-6)
    assert any(line["status"] == 429 for line in crowded.lines())


def test_langchain_openai(served: Server, expected: np.ndarray) -> None:
    package = client_package("langchain_openai")
    pytest.importorskip("tiktoken")
    told = {"model": "tiny", "base_url": base(served), "api_key": "unused"}
    embeddings = package.OpenAIEmbeddings(check_embedding_ctx_length=False, **told)
    np.testing.assert_allclose(np.array(embeddings.embed_documents(TEXTS)), expected, atol=1e-6)
    np.testing.assert_allclose(np.array(embeddings.embed_query(TEXTS[0])), expected[0], atol=1e-6)


def test_token_ids_of_langchain_are_refused_with_the_setting_to_change(served: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default sends tiktoken's ids. tiktoken downloads its vocabulary, so a stand-in makes ids here."""
    package = client_package("langchain_openai")
    tiktoken = client_package("tiktoken")
    openai = client_package("openai")

    class Encoding:
        def encode(self, text: str, **_: object) -> list[int]:
            return [1000 + ord(letter) for letter in text]

        encode_ordinary = encode

    for name in ("encoding_for_model", "get_encoding"):
        monkeypatch.setattr(tiktoken, name, lambda *_: Encoding())
    embeddings = package.OpenAIEmbeddings(model="tiny", base_url=base(served), api_key="unused")
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        embeddings.embed_documents(TEXTS)


def test_llama_index(served: Server, expected: np.ndarray) -> None:
    client_package("llama_index.embeddings.openai_like")
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(model_name="tiny", api_base=base(served), api_key="unused", embed_batch_size=2)
    np.testing.assert_allclose(np.array(embedding.get_text_embedding_batch(TEXTS)), expected, atol=1e-6)
    np.testing.assert_allclose(np.array(embedding.get_query_embedding(TEXTS[0])), expected[0], atol=1e-6)


def test_litellm(served: Server, expected: np.ndarray) -> None:
    litellm = client_package("litellm")
    answer = litellm.embedding(model="openai/tiny", input=TEXTS, api_base=base(served), api_key="unused", encoding_format="float")
    np.testing.assert_allclose(np.array([entry["embedding"] for entry in answer.data]), expected, atol=1e-6)


@pytest.mark.slow
def test_schemathesis_finds_no_answer_of_500(served: Server, tmp_path: Path) -> None:
    """Two minutes of requests made from the server's own description."""
    client_package("schemathesis")
    import subprocess
    import sys

    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json", "--max-time", "120"]
    command += ["--checks", "not_a_server_error", "--max-examples", "100000", "--no-color", "--max-failures", "1", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    answered = [line["status"] for line in served.lines() if "status" in line]
    assert len(answered) > 1000
    assert max(answered) < 500
