"""The protocol, spoken to a real process on loopback."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from serve_support import PROMPTS, Server, serving
from tests_support import GOLDEN, SHARED, TEXTS, compress_to, folder_of

import compress
from compress.methods.quantize.rtn import RTN

INSTRUCTED = re.compile(r"Instruct: (.*)\nQuery: ")
GIVEN = [text for text in TEXTS if text] + ["parcel " * 100, "🙂 日本語"]


def vectors_of(answer: Any) -> np.ndarray:
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    assert {entry["object"] for entry in answer["data"]} == {"embedding"}
    rows = [entry["embedding"] for entry in answer["data"]]
    if isinstance(rows[0], str):
        rows = [np.frombuffer(base64.b64decode(row, validate=True), dtype="<f4") for row in rows]
    return np.array(rows, dtype=np.float32)


@pytest.fixture(scope="module")
def tiny(prompted: Path) -> Any:
    return compress.load(str(prompted), device="cpu")


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_vectors_are_those_of_encode(served: Server, tiny: Any, encoding: dict[str, str]) -> None:
    status, answer = served.embed(GIVEN, user="somebody", **encoding)
    assert status == 200
    assert isinstance(answer["data"][0]["embedding"], str) == (encoding == {"encoding_format": "base64"})
    np.testing.assert_allclose(vectors_of(answer), tiny.encode(GIVEN), atol=1e-6)
    tokens = sum(map(len, tiny.tokenizer(GIVEN)))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer["model"] == "tiny"
    one = served.embed(GIVEN[0])[1]
    np.testing.assert_allclose(vectors_of(one), tiny.encode(GIVEN[:1]), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"model": "tiny@query"}, PROMPTS["query"]),
        ({"model": "tiny@title"}, PROMPTS["title"]),
        ({"input_type": "query"}, PROMPTS["query"]),
        ({"input_type": "document"}, PROMPTS["document"]),
        ({"prompt": "anything: "}, "anything: "),
        ({"prompt": ""}, ""),
        ({}, ""),
    ],
)
def test_prompts_by_name(served: Server, tiny: Any, fields: dict[str, str], prompt: str) -> None:
    status, answer = served.embed(GIVEN[:2], **{"model": "tiny", **fields})
    assert status == 200
    np.testing.assert_allclose(vectors_of(answer), tiny.encode(GIVEN[:2], prompt), atol=1e-6)


@pytest.mark.parametrize("name", ["queries", "passages"])
def test_an_instruction_is_put_before_texts_and_not_pooled(served: Server, nv_embed: Path, name: str) -> None:
    told = json.loads((GOLDEN / "texts.json").read_text())
    fields = {"instruction": INSTRUCTED.fullmatch(told["instruction"])[1]} if name == "queries" else {}
    status, answer = served.embed(told[name], model="nv", **fields)
    assert status == 200
    embedder = compress.load(str(nv_embed), device="cpu")
    np.testing.assert_allclose(vectors_of(answer), embedder.encode(told[name], told["instruction"] if fields else ""), atol=1e-6)
    without = vectors_of(served.embed(told[name], model="nv")[1])
    assert (np.abs(vectors_of(answer) - without).max() > 1e-3) == bool(fields)


@pytest.mark.skipif(
    not (SHARED / "reference").is_dir(), reason="the original tokenizer is not beside this checkout (../shared/reference)"
)
@pytest.mark.slow
def test_an_instruction_gives_the_golden_vectors_of_nv_embed(nv_embed: Path, tmp_path: Path) -> None:
    """With the original tokenizer, what the original code gave for these texts."""
    folder = shutil.copytree(nv_embed, tmp_path / "original")
    shutil.copy(SHARED / "reference" / "nv-embed-v2" / "tokenizer.json", folder / "tokenizer.json")
    told, golden = json.loads((GOLDEN / "texts.json").read_text()), load_file(GOLDEN / "golden.safetensors")
    instruction = INSTRUCTED.fullmatch(told["instruction"])[1]
    with serving(tmp_path, f"nv={folder}") as server:
        for name, texts, fields in (
            ("queries", "queries", {"instruction": instruction}),
            ("edge_instructed", "edge", {"instruction": instruction}),
            ("passages", "passages", {}),
        ):
            status, answer = server.embed([text or " " for text in told[texts]], model="nv", **fields)
            assert status == 200
            kept = [index for index, text in enumerate(told[texts]) if text]  # an empty text is refused, as the protocol asks
            np.testing.assert_allclose(vectors_of(answer)[kept], golden[f"{name}.embeddings"][kept], atol=1e-6)


def test_own_token_ids_give_the_golden_vectors(served: Server) -> None:
    """The ids are the original tokenizer's, so these are the numbers of the original code, through HTTP."""
    golden = load_file(GOLDEN / "golden.safetensors")
    rows = [ids[mask == 1] for ids, mask in zip(golden["passages.input_ids"], golden["passages.attention_mask"], strict=True)]
    status, answer = served.embed([row.tolist() for row in rows], model="nv", tokenizer="nv")
    assert status == 200
    np.testing.assert_allclose(vectors_of(answer), golden["passages.embeddings"], atol=1e-6)


def test_token_ids_need_a_word_about_their_tokenizer(served: Server, tiny: Any) -> None:
    ids = [row.tolist() for row in tiny.tokenizer(GIVEN[:3])]
    status, answer = served.embed(ids)
    assert status == 400
    assert "check_embedding_ctx_length=False" in answer["error"]["message"]
    status, answer = served.embed(ids, tokenizer="tiny")
    assert status == 200
    np.testing.assert_allclose(vectors_of(answer), tiny.encode(GIVEN[:3]), atol=1e-6)
    status, answer = served.embed(ids[0], tokenizer="tiny")
    np.testing.assert_allclose(vectors_of(answer), tiny.encode(GIVEN[:1]), atol=1e-6)
    assert served.embed(ids, tokenizer="cl100k_base")[0] == 400
    assert served.embed([[1] * 49], tokenizer="tiny")[0] == 400
    assert served.embed([[600]], tokenizer="tiny")[0] == 400
    assert served.embed(ids, tokenizer="tiny", input_type="query")[0] == 400


def test_fewer_dimensions_where_the_operator_says_so(served: Server, tiny: Any) -> None:
    part = tiny.encode(GIVEN)[:, :16]
    status, answer = served.embed(GIVEN, dimensions=16)
    assert status == 200
    np.testing.assert_allclose(vectors_of(answer), part / np.linalg.norm(part, axis=1, keepdims=True), atol=1e-6)
    assert served.embed(GIVEN, dimensions=48)[0] == 200
    status, answer = served.embed(GIVEN, dimensions=24)
    assert (status, answer["error"]["param"]) == (400, "dimensions")
    assert "16, 48 dimensions" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b"", None, "EOF"),
        (b'{"model": "tiny"', None, "EOF"),
        (b"[1]", None, "object"),
        (b'{"model": "tiny", "input": "\xff"}', None, "unicode"),
        (b'{"model": "tiny", "input": "\\ud800"}', None, "hex escape"),
        (b'{"model": "tiny", "input": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, "recursion"),
        (b'{"model": "tiny", "input": [1' + b"0" * 5000 + b"]}", None, "number"),
        ({"model": "tiny"}, "input", "must provide 'input'"),
        ({"input": "a"}, "model", "must provide 'model'"),
        ({"model": 3, "input": "a"}, "model", "string"),
        ({"model": "tiny", "input": "a", "inputs": "b"}, "inputs", "did you mean 'input'?"),
        ({"model": "tiny", "input": ""}, "input", "item 0 is an empty string"),
        ({"model": "tiny", "input": []}, "input", "must not be empty"),
        ({"model": "tiny", "input": ["a", ""]}, "input", "item 1 is an empty string"),
        ({"model": "tiny", "input": ["a", 1]}, "input", "item 1 is not a string"),
        ({"model": "tiny", "input": [[]]}, "input", "item 0 is an empty list"),
        ({"model": "tiny", "input": [[1], "a"]}, "input", "item 1"),
        ({"model": "tiny", "input": [True]}, "input", "place 0"),
        ({"model": "tiny", "input": [1.5]}, "input", "place 0"),
        ({"model": "tiny", "input": [-1]}, "input", "out of range"),
        ({"model": "tiny", "input": [10**30]}, "input", "out of range"),
        ({"model": "tiny", "input": {"a": "b"}}, "input", "must be a string"),
        ({"model": "tiny", "input": None}, "input", "must be a string"),
        ({"model": "tiny", "input": ["a"] * 2049}, "input", "2,049 items"),
        ({"model": "tiny", "input": "a", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"model": "tiny", "input": "a", "dimensions": 0}, "dimensions", "greater than"),
        ({"model": "tiny", "input": "a", "dimensions": 10**40}, "dimensions", "not 1000"),
        ({"model": "tiny", "input": "a", "input_type": "quary"}, "input_type", "did you mean 'query'?"),
        ({"model": "tiny@quary", "input": "a"}, "input_type", "did you mean 'query'?"),
        ({"model": "tiny", "input": "a", "instruction": "find"}, "instruction", "takes no instructions"),
        ({"model": "tiny@query", "input": "a", "prompt": "p"}, "prompt", "exclude each other"),
        ({"model": "tiny", "input": "a", "tokenizer": "tiny"}, "tokenizer", "input holds texts"),
        ({"model": "nv", "input": "a", "prompt": "p " * 5000}, "input", "leave nothing"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(served: Server, body: Any, param: str | None, said: str) -> None:
    status, answer, headers = served.ask("/v1/embeddings", body)
    assert status == 400
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]
    assert headers["x-request-id"].startswith("req-")


def test_what_is_not_there(served: Server) -> None:
    status, answer = served.embed("a", model="tinny")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
    assert "did you mean 'tiny'?" in answer["error"]["message"]
    assert served.ask("/v1/nothing")[0] == 404
    assert served.ask("/v1/models/tinny")[0] == 404
    assert served.ask("/v1/embeddings")[0] == 405
    assert served.ask("/v1/nothing")[1]["error"]["type"] == "invalid_request_error"


def test_models_are_described(served: Server, prompted: Path) -> None:
    status, answer, _ = served.ask("/v1/models")
    assert status == 200
    tiny, nv = answer["data"]
    assert (tiny["id"], tiny["object"], tiny["dimension"], tiny["max_input_tokens"]) == ("tiny", "model", 48, 48)
    assert tiny["prompts"] == PROMPTS
    assert tiny["licence"] == "mit"
    assert tiny["fingerprint"] == folder_of(prompted).fingerprint
    assert tiny["kept"] is None
    assert nv["instruction_template"] == "Instruct: {instruction}\nQuery: "
    assert served.ask("/v1/models/nv")[1] == nv
    assert served.ask("/v1/embeddings", {"model": "tiny", "input": "a"})[2]["x-model-fingerprint"] == tiny["fingerprint"]


def test_the_log_and_the_metrics_hold_no_text(served: Server) -> None:
    secret = "unforgettable-words"
    assert served.embed([secret, "b"], input_type="query")[0] == 200
    assert served.embed(secret, model=secret)[0] == 404
    assert served.embed(secret, **{secret: 1})[0] == 400
    assert served.ask(f"/{secret}")[0] == 404
    status, metrics, _ = served.ask("/metrics")
    assert status == 200
    answered = next(line for line in reversed(served.lines()) if line.get("prompt") == "query" and line.get("items") == 2)
    assert (answered["model"], answered["status"], answered["path"]) == ("tiny", 200, "/v1/embeddings")
    assert answered["tokens"] > 2
    assert answered["total_ms"] >= answered["compute_ms"] > 0
    everything = served.log.read_text() + metrics + "\n".join(served.said)
    assert secret not in everything
    for name in ("requests_total", "tokens_total", "batch_fill_sum", "queue_seconds_sum", "compute_seconds_sum", "waiting_tokens"):
        assert f"compress_{name}{{" in metrics
    assert 'compress_requests_total{model="tiny",path="/v1/embeddings",status="200"}' in metrics
    assert 'compress_ready_processes{model="tiny"} 1.0' in metrics


def test_alive_ready_and_described(served: Server) -> None:
    assert served.ask("/health")[:2] == (200, {"status": "alive"})
    assert served.ask("/ready")[1] == {"ready": True, "stopping": False, "models": {"tiny": True, "nv": True}}
    page = served.ask("/docs")[1]
    parts = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(parts) >= 2
    for part in parts:  # nothing comes from elsewhere, and what is named is there
        assert part.startswith("/"), part
        assert served.ask(part)[0] == 200
    described = served.ask("/openapi.json")[1]
    fields = described["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert fields["additionalProperties"] is False
    assert set(fields["required"]) == {"input", "model"}


@pytest.mark.slow
def test_a_quantized_variant_gives_what_encode_gives(prompted: Path, tmp_path: Path) -> None:
    """No further from `encode` than `encode` is from itself with other batches, and its cosines are 1 but for rounding."""
    variant = tmp_path / "run" / "variant"
    variant.parent.mkdir()
    compress_to(prompted, variant, RTN(activations="dynamic_per_token"))
    embedder = compress.load(str(variant), device="cpu")
    texts = [f"text {number} " + "word " * (number % 40) for number in range(80)]
    whole, alone = embedder.encode(texts), embedder.encode(texts, batch_tokens=1)
    with serving(tmp_path, f"int8={variant.parent}") as server:
        status, answer = server.embed(texts, model="int8", encoding_format="base64")
        (described,) = server.ask("/v1/models")[1]["data"]
    assert status == 200
    vectors = vectors_of(answer)
    assert (vectors * whole).sum(axis=1).min() >= 0.9999
    assert np.abs(vectors - whole).max() <= max(np.abs(whole - alone).max(), 1e-6)
    assert (described["weights"], described["activations"], described["licence"]) == ("int8", "dynamic_per_token", "mit")
