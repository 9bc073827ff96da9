"""`compress doctor`: planted faults are found and named, endpoints are asked as their protocols say, exit codes."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import compress_to, folder_of

import compress
from compress.cli import main
from compress.common.errors import UserError
from compress.measure.doctor.answers import agreement, values_fit
from compress.measure.doctor.causes import CauseName
from compress.measure.doctor.changes import Change, Cut, LocalSide, changed
from compress.measure.doctor.diagnose import Diagnosis, Options, diagnose
from compress.measure.doctor.report import describe
from compress.measure.doctor.texts import probe_texts
from compress.methods.quantize.rtn import RTN
from compress.models.embedder import BatchedEmbedder, Vectors
from compress.models.text.spec import Pooling

PROMPTS = {"query": "query: ", "passage": "passage: "}
Copy = Callable[[Path], Path]


@pytest.fixture
def faulty(tmp_path: Path) -> Copy:
    """Copy a folder to where a fault can be planted."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "faulty"))

    return copy


@pytest.fixture(scope="module")
def prompted(make_model: Callable[..., Path]) -> Path:
    """A BERT that puts `query: ` before every text."""
    folder = make_model("bert", prompts=PROMPTS)
    edit(folder / "config_sentence_transformers.json", default_prompt_name="query")
    return folder


def opened(model: Path | str) -> BatchedEmbedder:
    embedder = compress.load(str(model), device="cpu")
    assert isinstance(embedder, BatchedEmbedder)
    return embedder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ask(model: Path | str, reference: Path | str | None, **options: Any) -> Diagnosis:
    return diagnose(str(model), Options(reference=None if reference is None else str(reference), **options))


def only_cause(found: Diagnosis) -> CauseName:
    assert not found.same
    assert len(found.causes) == 1, found.causes
    return found.causes[0].name


def test_the_texts_are_twenty_of_many_kinds() -> None:
    texts = probe_texts()
    assert len(texts) == len({probe.kind for probe in texts}) == len({probe.text for probe in texts}) == 20
    assert [len(probe.text.split()) for probe in texts if probe.long] == [400, 1800]
    assert all(len(probe.text) < 200 for probe in texts if not probe.long)


def test_a_dropped_prompt_is_found(prompted: Path, faulty: Copy) -> None:
    folder = faulty(prompted)
    (folder / "config_sentence_transformers.json").unlink()
    found = ask(folder, prompted)
    assert only_cause(found) is CauseName.PROMPT
    assert "the model puts no prompt before texts; the reference puts 'query: '" in found.causes[0].words
    assert found.causes[0].lowest_cosine == pytest.approx(1, abs=1e-5)


def test_another_pooling_is_found(make_model: Callable[..., Path], bert: Path) -> None:
    found = ask(make_model("bert", pooling="cls"), bert)
    assert only_cause(found) is CauseName.POOLING
    assert found.causes[0].words == "the model pools by cls; the reference pools by mean"


def test_truncation_on_the_left_is_found(bert: Path) -> None:
    embedder = opened(bert)
    with serving(Served(embedder, change=Change(cut=Cut("left", 48)))) as address:
        found = ask(address, bert)
    assert only_cause(found) is CauseName.TRUNCATION
    assert found.causes[0].words.startswith("the model cuts texts on the left and keeps the last 48 tokens; the reference cuts")
    assert {"long", "very long"} <= {row.kind for row in found.texts if (row.cosine or 0) < 0.99}


def test_truncation_at_half_the_length_is_found(bert: Path, faulty: Copy) -> None:
    folder = faulty(bert)
    edit(folder / "sentence_bert_config.json", max_seq_length=24)
    found = ask(folder, bert)
    assert only_cause(found) is CauseName.TRUNCATION
    assert "keeps the first 24 tokens" in found.causes[0].words


def test_truncation_at_any_length_is_found(bert: Path, faulty: Copy) -> None:
    folder = faulty(bert)
    edit(folder / "sentence_bert_config.json", max_seq_length=37)
    with serving(Served(opened(folder))) as address:
        found = ask(address, bert)
    assert only_cause(found) is CauseName.TRUNCATION
    assert "keeps the first 37 tokens" in found.causes[0].words


def test_a_longer_input_than_the_reference_reads_is_not_called_other_weights(bert: Path, faulty: Copy) -> None:
    folder = faulty(bert)
    edit(folder / "sentence_bert_config.json", max_seq_length=30)
    with serving(Served(opened(bert))) as address:
        found = ask(address, folder)
    assert only_cause(found) is CauseName.TRUNCATION
    assert "only long texts differ" in found.causes[0].words


def test_a_causal_mask_in_a_bidirectional_model_is_found(make_model: Callable[..., Path], faulty: Copy) -> None:
    good = make_model("mistral")
    edit(good / "config.json", is_causal=False)
    folder = faulty(good)
    edit(folder / "config.json", is_causal=True)
    found = ask(folder, good)
    assert (found.model.attention, found.reference.attention) == ("causal", "bidirectional")
    assert only_cause(found) is CauseName.ATTENTION
    assert found.causes[0].words.startswith("the model has a causal mask; the reference lets tokens see")
    back = ask(good, folder)
    assert only_cause(back) is CauseName.ATTENTION
    assert back.causes[0].words.startswith("the model lets tokens see")


def test_another_checkpoint_is_found(bert: Path, faulty: Copy) -> None:
    folder = faulty(bert)
    torch.manual_seed(7)
    weights = load_file(folder / "model.safetensors")
    save_file({k: 0.2 * torch.randn_like(v) if v.dim() == 2 else v for k, v in weights.items()}, folder / "model.safetensors")
    found = ask(folder, bert)
    assert only_cause(found) is CauseName.WEIGHTS
    assert "another checkpoint: " in found.causes[0].words
    assert "differs by up to" in found.causes[0].words


def test_another_checkpoint_behind_an_endpoint_is_found_by_elimination(bert: Path, make_model: Callable[..., Path]) -> None:
    other = opened(make_model("roberta"))
    with serving(Served(other)) as address:
        assert only_cause(ask(address, bert)) is CauseName.WEIGHTS


def test_a_head_with_weights_and_texts_without_tokens_are_no_obstacle(nv_embed: Path) -> None:
    """NV-Embed's architecture: its pooling cannot be another, and an empty text without special tokens has no token."""
    embedder = opened(nv_embed)
    with serving(Served(embedder, prompt="passage: ")) as address:
        found = ask(address, nv_embed)
        assert only_cause(found) is CauseName.PROMPT
        assert "the model puts 'passage: ' before texts and pools it" in found.causes[0].words
    served = Served(embedder, change=Change(specials=False))
    served.refuses_empty = True
    with serving(served) as address:
        assert ask(address, nv_embed).causes[0].name is CauseName.SPECIALS


def test_two_faults_at_once_are_found(prompted: Path, faulty: Copy) -> None:
    folder = faulty(prompted)
    (folder / "config_sentence_transformers.json").unlink()
    edit(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    edit(folder / "sentence_bert_config.json", max_seq_length=24)
    found = ask(folder, prompted)
    assert [cause.name for cause in found.causes] == [CauseName.PROMPT, CauseName.POOLING, CauseName.TRUNCATION] or {
        cause.name for cause in found.causes
    } == {CauseName.PROMPT, CauseName.POOLING}  # the first token barely sees what is cut
    assert not found.same


def test_a_missing_normalisation_is_found(make_model: Callable[..., Path], bert: Path) -> None:
    found = ask(make_model("bert", normalize=False), bert)
    assert only_cause(found) is CauseName.NORM
    assert found.causes[0].words == "the model does not normalise; the reference gives vectors of unit length"


def test_prompts_that_only_their_names_ask_for_are_compared(make_model: Callable[..., Path], bert: Path) -> None:
    named = make_model("bert", prompts=PROMPTS)
    found = ask(bert, named)
    assert only_cause(found) is CauseName.PROMPT
    assert found.lowest == pytest.approx(1, abs=1e-6)
    assert "'query': the model has none, the reference has 'query: '" in found.causes[0].words
    asked = ask(bert, named, prompt="query")
    assert only_cause(asked) is CauseName.PROMPT
    assert asked.lowest < 0.999


def test_half_precision_is_named_as_such(make_model: Callable[..., Path]) -> None:
    folder = make_model("mistral")
    found = ask(folder, folder, dtype="bfloat16", at_least=0.999995)
    assert only_cause(found) is CauseName.PRECISION
    assert found.model.dtype == "bfloat16"
    assert ask(folder, folder).same


def test_a_variant_is_compared_with_what_it_was_made_from(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant", RTN(bits=8))
    found = ask(tmp_path / "variant", bert)
    assert found.same
    assert found.at_least == 0.95
    assert found.model.weights == "int8"
    # The fixture's variants name no fingerprint: they may as well be of another checkpoint.
    strict = ask(tmp_path / "variant", bert, at_least=0.999999)
    assert only_cause(strict) is CauseName.WEIGHTS
    edit(tmp_path / "variant" / "variant.json", base_fingerprint=folder_of(bert).fingerprint)
    strict = ask(tmp_path / "variant", bert, at_least=0.999999)
    assert only_cause(strict) is CauseName.COMPRESSION
    assert "the model is a variant (int8)" in strict.causes[0].words


def test_other_widths_are_not_comparable(bert: Path) -> None:
    with pytest.raises(UserError, match=r"nano: 128 dimensions|dimensions.*these are not comparable"):
        ask("nano", bert)


def test_vectors_that_were_cut_are_said_to_be(bert: Path) -> None:
    embedder = opened(bert)
    with serving(Served(embedder, width=16)) as address, pytest.raises(UserError, match="not comparable") as caught:
        ask(address, bert)
    assert "other" in caught.value.hint or "was cut" in caught.value.hint


def test_changes_leave_the_embedder_as_it_was(bert: Path) -> None:
    embedder = opened(bert)
    texts = [probe.text for probe in probe_texts()]
    before = embedder.encode(texts)
    everything = Change("query: ", "a", Pooling.CLS, True, False, False, True, Cut("left", 20))
    with changed(embedder, everything):
        inside = embedder.encode(texts)
    assert agreement(inside, before).min() < 0.9
    np.testing.assert_array_equal(embedder.encode(texts), before)


def test_zero_vectors_and_missing_ones() -> None:
    rows = np.array([[0, 0], [1, 0], [np.nan, np.nan], [3, 4]], dtype=np.float32)
    others = np.array([[0, 0], [0, 0], [1, 0], [6, 8]], dtype=np.float32)
    np.testing.assert_allclose(agreement(rows, others), [1, 0, np.nan, 1])
    values = np.array([[0.1, 0.2]], dtype=np.float32)
    assert values_fit(values) == "float32"
    assert values_fit(values.astype(np.float16).astype(np.float32)) == "float16"
    assert values_fit(torch.tensor([[0.1, 3e38]]).bfloat16().float().numpy()) == "bfloat16"


class Served:
    """A model behind HTTP, and what is wrong with it."""

    def __init__(
        self,
        embedder: BatchedEmbedder,
        *,
        change: Change = Change(),  # noqa: B008  frozen
        prompt: str = "",
        key: str | None = None,
        width: int | None = None,
        protocols: tuple[str, ...] = ("openai", "tei"),
    ) -> None:
        self.embedder = embedder
        self.change = change
        self.prompt = prompt
        self.key = key
        self.width = width
        self.protocols = protocols
        self.binary = False
        self.refuses_empty = False
        self.models = ["tiny"]

    def embed(self, texts: list[str]) -> Vectors:
        with changed(self.embedder, self.change):
            return self.embedder.encode([self.prompt + text for text in texts])[:, : self.width]

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models" and "openai" in self.protocols:
            return 200, {"data": [{"id": name} for name in self.models]}
        if path == "/moved/embed":
            return 307, {}
        if path == "/v1/embeddings" and "openai" in self.protocols:
            if body is None or "input" not in body or body.get("model") not in self.models:
                return 400, {"error": "no input or no such model"}
            return self._vectors(body["input"], openai=True)
        if path == "/embed" and "tei" in self.protocols:
            if body is None or "inputs" not in body:
                return 422, {"error": "no inputs"}
            assert body["truncate"] is True
            return self._vectors(body["inputs"], openai=False)
        return 404, {"error": "not found"}

    def _vectors(self, texts: list[str], openai: bool) -> tuple[int, Any]:
        if self.refuses_empty and not all(texts):
            return 422, {"error": "inputs cannot be empty"}
        rows = self.embed(texts)
        if not openai:
            return 200, rows.tolist()
        entries: list[Any] = (
            [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows] if self.binary else rows.tolist()
        )
        return 200, {"data": [{"index": index, "embedding": entry} for index, entry in enumerate(entries)]}


@contextmanager
def serving(served: Served) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _reply(self, body: dict[str, Any] | None) -> None:
            wrong_key = served.key is not None and self.headers["Authorization"] != f"Bearer {served.key}"
            code, content = (401, {"error": "no such key"}) if wrong_key else served.answer(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(code)
            if code == 307:
                self.send_header("Location", "/embed")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("no_proxy", "*")
            yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def served(bert: Path) -> Served:
    return Served(opened(bert))


@pytest.mark.parametrize("path", ["", "/v1", "/v1/embeddings", "/embed", "/v1/embeddings#tiny"])
def test_endpoints_of_either_protocol_give_the_same_vectors(served: Served, bert: Path, path: str) -> None:
    with serving(served) as address:
        found = ask(address + path, bert)
    assert found.same
    assert ("text-embeddings-inference" in found.model.kind) == (path == "/embed")


def test_an_endpoint_is_found_where_only_one_protocol_is_spoken(served: Served, bert: Path) -> None:
    served.protocols = ("tei",)
    with serving(served) as address:
        assert "text-embeddings-inference" in ask(address, bert).model.kind
    served.protocols = ()
    with serving(served) as address, pytest.raises(UserError, match="embeds at neither"):
        ask(address, bert)


def test_vectors_in_base64_are_read_and_refused_texts_left_out(served: Served, bert: Path) -> None:
    served.binary = served.refuses_empty = True
    with serving(served) as address:
        found = ask(address, bert)
    assert found.same
    empty = found.texts[0]
    assert (empty.kind, empty.cosine) == ("empty", None)
    assert "the model refuses it: HTTP 422" in empty.note


def test_a_server_that_adds_a_prompt_is_found(served: Served, bert: Path) -> None:
    served.prompt = "query: "
    with serving(served) as address:
        found = ask(address, bert)
        assert only_cause(found) is CauseName.PROMPT
        assert "the model puts 'query: ' before texts; the reference puts no prompt" in found.causes[0].words
        # Two servers: prompts are all that can be changed.
        served_plainly = Served(served.embedder)
        with serving(served_plainly) as plain:
            assert only_cause(ask(address, plain)) is CauseName.PROMPT


def test_the_key_comes_from_the_environment(served: Served, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served.key = "secret"
    with serving(served) as address:
        with pytest.raises(UserError, match="401"):
            ask(address, bert)
        with pytest.raises(UserError, match="'DOCTOR_KEY' is not set"):
            ask(address, bert, key_variable="DOCTOR_KEY")
        monkeypatch.setenv("DOCTOR_KEY", "secret")
        assert ask(address, bert, key_variable="DOCTOR_KEY").same


def test_what_no_endpoint_should_do_ends_in_words(served: Served, bert: Path) -> None:
    served.models = ["a", "b"]
    with serving(served) as address:
        with pytest.raises(UserError, match="has 2 models: a, b"):
            ask(address, bert)
        with pytest.raises(UserError, match="redirects"):
            ask(f"{address}/moved/embed", bert)
        with pytest.raises(UserError, match="what it should be is not known"):
            ask(f"{address}/embed", None)
    with pytest.raises(UserError, match="cannot be asked"):
        ask(f"{address}/embed", bert, timeout=2)


def test_the_command_prints_and_its_exit_code_says(
    bert: Path, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["compress", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert run(bert, "--reference", bert, "--to", tmp_path / "found.json") == 0
    assert "these are the same vectors" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["causes"] == []
    assert run(make_model("bert", pooling="cls"), "--reference", bert) == 1
    printed = capsys.readouterr().out
    assert "pooling: the model pools by cls" in printed
    assert "NOT the same" in printed
    assert run("nano", "--reference", bert) == 2
    assert run(tmp_path / "nowhere", "--reference", bert) == 2


class TestSentenceTransformers:
    """The library itself, in a process of its own."""

    @pytest.fixture(autouse=True)
    def _needs_it(self) -> None:
        pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

    def test_it_is_the_reference_where_none_is_named(self, prompted: Path) -> None:
        found = ask(prompted, None)
        assert found.same
        assert found.reference.kind.startswith("sentence-transformers ")
        assert found.reference.pooling == "mean"
        assert found.reference.default_prompt == "query: "
        assert found.reference.max_length == 48
        assert "cut on the right" in describe(found)

    @pytest.mark.slow
    def test_truncation_on_the_left_in_a_folder_is_found(self, bert: Path, faulty: Copy) -> None:
        folder = faulty(bert)
        edit(folder / "tokenizer_config.json", truncation_side="left")
        found = ask(f"sentence-transformers:{folder}", bert)
        assert only_cause(found) is CauseName.TRUNCATION
        assert "on the left" in found.causes[0].words
        assert found.model.truncation_side == "left"


def test_an_interpreter_without_the_library_is_said(bert: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'sentence-transformers is not installed' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match="is not installed") as caught:
        ask(bert, None, python=python)
    assert "--python" in caught.value.hint
    with pytest.raises(UserError, match="is no Python"):
        ask(bert, None, python=tmp_path / "none")


@pytest.mark.slow
def test_exports_of_graphs_are_opened(bert: Path, tmp_path: Path) -> None:
    from compress.export import export

    variant, folder = tmp_path / "variant", tmp_path / "onnx"
    compress_to(bert, variant, RTN(bits=8, activations="none"))
    export(variant, "onnx", folder, licence="mit", check=False)
    found = ask(folder, variant, at_least=0.9999)
    assert found.same
    assert found.model.kind == "export, onnxruntime"
    (folder / "model.onnx").unlink()
    with pytest.raises(UserError, match="no graph next to it"):
        ask(folder, variant)


def test_local_sides_say_what_their_files_say(prompted: Path) -> None:
    from compress.models.source import find

    embedder = opened(prompted)
    facts = LocalSide(embedder, find(str(prompted)), "folder, torch").facts()
    assert facts.prompts == PROMPTS
    assert (facts.pooling, facts.max_length, facts.truncation_side) == ("mean", 48, "right")
    assert (facts.attention, facts.dtype) == ("bidirectional", "float32")
