"""A server as an Embedder: `compress doctor http://...`, `compress evaluate http://...`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from serve_support import PROMPTS, Server

import compress
from compress.common.errors import BadTextError, UserError
from compress.measure.doctor.diagnose import Options, diagnose
from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.runtimes.remote import Client, HTTPStatus, RemoteEmbedder


@pytest.fixture
def remote(served: Server, monkeypatch: pytest.MonkeyPatch) -> RemoteEmbedder:
    monkeypatch.setenv("no_proxy", "*")
    return RemoteEmbedder(Client(f"{served.address}#tiny", None, 60))


def test_a_server_is_an_embedder(remote: RemoteEmbedder, prompted: Path, mixed_texts: list[str]) -> None:
    local = compress.load(str(prompted), device="cpu")
    texts = [text for text in mixed_texts[:150] if text]
    assert (remote.name, remote.dimension, remote.spec.prompts) == ("tiny", local.dimension, PROMPTS)
    for how in ({}, {"prompt": "any: "}, {"prompt": ""}, {"task": "query"}, {"task": "document"}):
        np.testing.assert_allclose(remote.encode(texts, **how), local.encode(texts, **how), atol=1e-6)
    assert remote.encode([]).shape == (0, 48)
    with pytest.raises(BadTextError, match="item 1 is an empty string"):
        remote.encode(["a", ""])


def test_evaluate_scores_a_server_as_it_scores_the_folder(served: Server, prompted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    found = evaluate(f"{served.address}#tiny", ["MiniSTS"], against=str(prompted), say=lambda _: None)
    (row,) = found.tasks
    assert row.variant == pytest.approx(row.baseline, abs=1e-6)
    assert found.model == "tiny"
    with pytest.raises(UserError, match="--runtime: a server decides that itself"):
        evaluate(f"{served.address}#tiny", ["MiniSTS"], EvaluationOptions(runtime="torch"))


def test_doctor_finds_the_same_vectors_and_another_prompt(served: Server, prompted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    found = diagnose(f"{served.address}#tiny", Options(reference=str(prompted), device="cpu"))
    assert found.same
    assert found.model.max_length == 48
    assert found.texts[0].note.startswith("the model refuses it: HTTP 400")
    assert not diagnose(f"{served.address}#tiny@query", Options(reference=str(prompted), device="cpu")).same


def test_a_busy_server_is_asked_again(remote: RemoteEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    client, slept = remote._client, []
    answered = client._request
    refusals = [HTTPStatus(429, "busy", "3"), HTTPStatus(503, "opening")]

    def request(url: str, body: object) -> object:
        if refusals:
            raise refusals.pop(0)
        return answered(url, body)

    monkeypatch.setattr(client, "_request", request)
    monkeypatch.setattr("compress.runtimes.remote.time.sleep", slept.append)
    assert remote.encode(["a"]).shape == (1, 48)
    assert slept == [3.0, 1.0]
