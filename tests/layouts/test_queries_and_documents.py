"""Queries and documents: prompts by task, and Routers, next to sentence-transformers' `encode_query` and `encode_document`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny_layouts
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from tests_support import call_here, compress_to
from tokenizers import Tokenizer
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.common.errors import UserError
from compress.measure.accuracy.score import MtebEncoder
from compress.measure.doctor.diagnose import Options, diagnose
from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.models import hub
from compress.models.convert import convert
from compress.models.folder import ModelFolder
from compress.models.source import find_shape
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe_file import read_recipe
from compress.pipeline.run import run
from compress.runtimes.lower import lower
from compress.runtimes.routed import RoutedEmbedder
from compress.runtimes.stored_vectors import Mapped, StoredEmbedder, VectorStore

TEXTS = ["", "The parcel never came.", "rain by the evening " * 40, "日本語の文章です。"]
WIDTH = tiny_layouts.WIDTH
PROMPTS = {"query": "query: ", "passage": "passage: "}


def bert(folder: Path, **settings: Any) -> Path:
    """A tiny BERT without pooling, from which modules are made."""
    tiny_layouts.bert(folder, tiny_layouts.wordpiece(folder), **settings)
    return folder


def dense(seed: int, width: int = WIDTH) -> Any:
    """A Dense module with weights of its own."""
    torch.manual_seed(seed)
    return st.Dense(WIDTH, width, activation_function=torch.nn.Tanh())


def reference(folder: Path, method: str, texts: list[str] = TEXTS, **how: Any) -> np.ndarray:
    """The vectors that one of sentence-transformers' ways to encode gives."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return np.stack([np.asarray(getattr(model, method)([text], **how)[0], dtype=np.float32) for text in texts])


WAYS = {"encode": None, "encode_query": "query", "encode_document": "document"}


def check(folder: Path, ways: dict[str, str | None] = WAYS) -> None:
    """See that vectors are those of sentence-transformers, loaded and streamed, for each task."""
    for embedder in (compress.load(folder, device="cpu"), compress.load(folder, device="cpu", stream=True)):
        for method, task in ways.items():
            expected = reference(folder, method)
            np.testing.assert_allclose(
                embedder.encode(TEXTS, task=task), expected, atol=1e-5 * np.abs(expected).max(), err_msg=method
            )


# ------------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        (PROMPTS, None),
        (PROMPTS, "passage"),
        ({"query": "query: ", "document": "document: ", "corpus": "corpus: "}, "query"),
        ({"corpus": "corpus: "}, None),
        ({}, None),
    ],
)
def test_a_task_chooses_the_prompt_as_sentence_transformers_does(
    tmp_path: Path, prompts: dict[str, str], default: str | None
) -> None:
    bert(tmp_path)
    tiny_layouts.wrap(tmp_path, "mean", prompts=prompts, default=default)
    check(tmp_path)


def test_a_prompt_that_is_named_comes_before_the_tasks(tmp_path: Path) -> None:
    bert(tmp_path)
    tiny_layouts.wrap(tmp_path, "mean", prompts=PROMPTS)
    embedder = compress.load(tmp_path, device="cpu")
    np.testing.assert_array_equal(embedder.encode(TEXTS, "other: ", task="query"), embedder.encode(TEXTS, "other: "))
    assert np.abs(embedder.encode(TEXTS, task="query") - embedder.encode(TEXTS)).max() > 1e-2


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_embedder_takes_a_task_and_refuses_what_is_none(tmp_path: Path, graph: bool) -> None:
    folder = bert(tmp_path / "model")
    tiny_layouts.wrap(folder, "mean", prompts=PROMPTS)
    compress_to(folder, tmp_path / "variant")
    runtime = "onnxruntime" if graph else "torch"
    if graph:
        lower(ModelFolder("variant", tmp_path / "variant"), runtime)
    whole = compress.load(folder, device="cpu")
    stored = StoredEmbedder(whole, lambda: whole, VectorStore(tmp_path / "store"))
    made = [
        whole,
        compress.load(folder, device="cpu", stream=True),
        compress.load(tmp_path / "variant", runtime=runtime),
        stored,
        Mapped(stored, lambda vectors: vectors),
    ]
    expected = whole.encode(TEXTS, "query: ")
    for embedder in made:
        np.testing.assert_allclose(embedder.encode(TEXTS, task="query"), expected, atol=2e-3)
        with pytest.raises(ValueError, match="task 'passage' is not known") as error:
            embedder.encode(TEXTS, task="passage")
        assert error.value.hint == "known: query, document"


def test_the_command_takes_a_task(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = bert(tmp_path / "model")
    tiny_layouts.wrap(folder, "mean", prompts=PROMPTS)
    (tmp_path / "texts.txt").write_text("a\nThe parcel never came.\n")
    arguments = ["encode", str(folder), str(tmp_path / "texts.txt"), "--to", str(tmp_path / "v.npy"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--task", "query"], catch_exceptions=False)
    assert done.exit_code == 0
    expected = compress.load(folder, device="cpu").encode(["a", "The parcel never came."], "query: ")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)
    code, _, said = call_here(capfd, *arguments, "--task", "q")
    assert (code, said) == (2, "error: task 'q' is not known\nknown: query, document\n")


# ------------------------------------------------------------------------------------------------------------------- Routers


def two_networks(source: Path) -> list[Any]:
    """A network for each side, which only share what comes after them; a default route and prompts by task."""
    other = bert(source.with_name("other"), num_hidden_layers=2)
    sides = {
        "query": [st.Transformer(str(other), max_seq_length=32), st.Pooling(WIDTH, "cls")],
        "document": [st.Transformer(str(source), max_seq_length=64), st.Pooling(WIDTH, "mean")],
    }
    return [st.Router(sides, default_route="document"), st.Normalize()]


def one_network(source: Path) -> list[Any]:
    """One network in both routes, with a Dense module for each; the first route by default."""
    transformer, pooling = st.Transformer(str(source)), st.Pooling(WIDTH, "mean")
    return [st.Router({"query": [transformer, pooling, dense(1)], "document": [transformer, pooling, dense(2)]})]


def after_network(source: Path) -> list[Any]:
    """A Router after what both sides share, the documents' side with nothing more to do than a LayerNorm."""
    router = st.Router({"query": [dense(3), dense(4)], "document": [st.LayerNorm(WIDTH)]}, default_route="query")
    return [st.Transformer(str(source)), st.Pooling(WIDTH, "mean"), router, st.Normalize()]


def static_queries(source: Path) -> list[Any]:
    """A static table for queries, which have to be fast, and a network for documents."""
    torch.manual_seed(9)
    table = st.StaticEmbedding(Tokenizer.from_file(str(source / "tokenizer.json")), embedding_dim=WIDTH)
    sides = {"query": [table], "document": [st.Transformer(str(source)), st.Pooling(WIDTH, "mean")]}
    return [st.Router(sides, default_route="document"), st.Normalize()]


def two_routers(source: Path) -> list[Any]:
    """One Router before the pooling that is shared, and one after it."""
    first = st.Router({"query": [st.Transformer(str(source))], "document": [st.Transformer(str(source), max_seq_length=8)]})
    return [first, st.Pooling(WIDTH, "mean"), st.Router({"query": [dense(5)], "document": [dense(6)]})]


def mapped(source: Path) -> list[Any]:
    """Routes of other names than the tasks'."""
    transformer, pooling = st.Transformer(str(source)), st.Pooling(WIDTH, "mean")
    sides = {"short": [transformer, pooling, dense(7)], "long": [transformer, pooling, dense(8)], "image": [transformer, pooling]}
    mappings = {("query", "text"): "short", ("document", None): "long", (None, ("text", "image")): "image", (None, "text"): "long"}
    return [st.Router(sides, route_mappings=mappings)]


def saved(tmp_path: Path, make: Callable[[Path], list[Any]], **settings: Any) -> Path:
    """The folder of a model with these modules."""
    made = SentenceTransformer(modules=make(bert(tmp_path / "source")), device="cpu", **settings)
    made.save(str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.mark.parametrize("make", [two_networks, one_network, after_network, static_queries, two_routers, mapped])
def test_texts_go_the_way_of_their_task(tmp_path: Path, make: Callable[[Path], list[Any]]) -> None:
    folder = saved(tmp_path, make, prompts={"query": "search: ", "document": "found: "}, default_prompt_name="document")
    check(folder)
    embedder = compress.load(folder, device="cpu")
    assert np.abs(embedder.encode(TEXTS, "", task="query") - embedder.encode(TEXTS, "", task="document")).max() > 1e-2


def test_routes_share_the_network_that_both_run(tmp_path: Path) -> None:
    embedder = compress.load(saved(tmp_path, one_network), device="cpu")
    assert isinstance(embedder, RoutedEmbedder)
    one, other = (dict(embedder.route(task).model.named_parameters()) for task in ("query", "document"))
    assert {name for name in one if one[name] is not other[name]} == {
        "text_head.after.0.linear.weight",
        "text_head.after.0.linear.bias",
    }


def test_an_asym_of_earlier_versions(tmp_path: Path) -> None:
    folder = saved(tmp_path, after_network)
    listed = json.loads((folder / "modules.json").read_text())
    place = folder / listed[2]["path"]
    listed[2]["type"] = "sentence_transformers.models.Asym"
    tiny_layouts.write_json(folder / "modules.json", listed)
    config = json.loads((place / "router_config.json").read_text())
    config["types"] = {name: f"sentence_transformers.models.{kind.rpartition('.')[2]}" for name, kind in config["types"].items()}
    config["structure"] = {"QRY": config["structure"]["query"], "DOC": config["structure"]["document"]}
    config["parameters"] = {"allow_empty_key": True}
    tiny_layouts.write_json(place / "config.json", config)
    (place / "router_config.json").unlink()
    check(folder, {"encode": None})
    embedder = compress.load(folder, device="cpu")
    for task in ("QRY", "DOC"):
        expected = reference(folder, "encode", task=task)
        np.testing.assert_allclose(embedder.encode(TEXTS, task=task), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no route for task 'query'"):
        embedder.encode(TEXTS, task="query")


def test_without_a_default_route_a_task_is_needed(tmp_path: Path) -> None:
    def make(source: Path) -> list[Any]:
        sides = {side: [st.Transformer(str(source)), st.Pooling(WIDTH, "mean")] for side in ("query", "document")}
        return [st.Router(sides, allow_empty_key=False)]

    folder = saved(tmp_path, make)
    check(folder, {"encode_query": "query", "encode_document": "document"})
    with pytest.raises(ValueError, match="Could not determine route"):
        reference(folder, "encode")
    with pytest.raises(ValueError, match="no default route, so texts need a task"):
        compress.load(folder, device="cpu").encode(TEXTS)


def test_measuring_sends_queries_and_documents_their_ways(tmp_path: Path) -> None:
    from mteb.types import PromptType

    folder = saved(tmp_path, one_network)
    encoder = MtebEncoder(compress.load(folder, device="cpu"))
    encoder.get_prompt_name = lambda *_: None  # type: ignore[method-assign]  # the model has no prompts
    for role, method in ((PromptType.query, "encode_query"), (PromptType.document, "encode_document"), (None, "encode")):
        made = encoder.encode([{"text": TEXTS}], task_metadata=None, hf_split="", hf_subset="", prompt_type=role)
        np.testing.assert_allclose(made, reference(folder, method), atol=1e-5)


def test_what_takes_one_list_of_modules_says_what_to_do_with_a_router(tmp_path: Path) -> None:
    folder = saved(tmp_path, after_network)
    attempts: list[Callable[[], Any]] = [
        lambda: run("recipes/int8.yaml", model=str(folder), output=tmp_path / "runs", compress_only=True),
        lambda: make_plan(read_recipe(Path("recipes/int8.yaml")), find_shape(str(folder)), tmp_path / "runs"),
        lambda: evaluate(str(folder), ["mini"], EvaluationOptions(device="cpu")),
        lambda: diagnose(str(folder), Options(device="cpu")),
        lambda: ModelFolder("it", folder).spec,
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match="a Router sends texts through other modules for each task") as error:
            attempt()
        assert "[*list(model)[:2], *model[2].sub_modules['query'], *list(model)[3:]]" in error.value.hint
    # What the hint says gives that route's model.
    model = SentenceTransformer(str(folder), device="cpu")
    parts = [*list(model)[:2], *model[2].sub_modules["query"], *list(model)[3:]]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "route"))
    made = compress.load(tmp_path / "route", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(made, reference(folder, "encode_query"), atol=1e-5)


def test_the_weights_of_routes_are_looked_for_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a model in the hub's cache would need the network, and pickles would stay in the routes' folders."""

    def asked(*_: Any, **__: Any) -> list[str]:
        raise AssertionError("nothing is missing, so the hub need not be asked")

    folder = saved(tmp_path, one_network)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", asked)
    hub._refuse_pickles(hub.HubName("owner/name"), folder)
    tensors = load_file(folder / "query_2_Dense" / "model.safetensors")
    torch.save(tensors, folder / "query_2_Dense" / "pytorch_model.bin")
    (folder / "query_2_Dense" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds only pickled weights"):
        compress.load(folder, device="cpu")
    convert(str(folder), tmp_path / "converted")
    check(tmp_path / "converted")


def _remote(config: dict[str, Any]) -> None:
    config["types"][next(iter(config["types"]))] = "custom_st.Transformer"


def _outside(config: dict[str, Any]) -> None:
    config["types"]["../elsewhere"] = "sentence_transformers.models.Dense"


def _missing(config: dict[str, Any]) -> None:
    config["structure"]["query"].append("query_9_Dense")


def _headless(config: dict[str, Any]) -> None:
    config["structure"]["query"].pop(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remote, "module 'custom_st.Transformer' is code of the repository's own"),
        (_outside, "types: '../elsewhere' is not a folder in the Router's own"),
        (_missing, "structure.query: 'query_9_Dense' is not one of types"),
        (_headless, "a route is Pooling, Dense; it has to begin with its only Transformer"),
        (lambda config: config.update(structure={}), "structure: no route"),
        (lambda config: config.update(types=[]), "types is not a table"),
        (lambda config: config.update(other=1), "key 'other' is not known"),
        (lambda config: config["parameters"].update(default_route="q"), "parameters.default_route: 'q' is not a route"),
        (lambda config: config["parameters"].update(route_mappings={"query": "document"}), "route_mappings: 'query' is no pair"),
        (lambda config: config["parameters"].update(temperature=1), "parameters: key 'temperature' is not known"),
    ],
)
def test_a_router_that_is_not_understood_is_refused_by_key(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = saved(tmp_path, one_network)
    config = json.loads((folder / "router_config.json").read_text())
    change(config)
    tiny_layouts.write_json(folder / "router_config.json", config)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        compress.load(folder, device="cpu")
