"""A static table through a recipe: planned, compressed, scored, recorded and exported; what has to do with blocks is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from static_support import model2vec_folder, shared_tensors, static_embedding_folder, table
from tests_support import folder_of
from tokenizers import Tokenizer

import compress
from compress.common.errors import UserError
from compress.measure.record import Record
from compress.methods import METHODS, method_class
from compress.pipeline.plan import describe, make_plan
from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline.run import run


@pytest.mark.parametrize("layout", ["StaticEmbedding", "model2vec"])
def test_a_recipe_from_end_to_end(pieces: Tokenizer, tmp_path: Path, layout: str) -> None:
    if layout == "model2vec":
        model = model2vec_folder(tmp_path / "tiny", pieces, shared_tensors(pieces), normalize=True)
    else:
        model = static_embedding_folder(
            tmp_path / "tiny", pieces, {"embedding.weight": table(pieces)}, "Normalize", truncate_dim=20
        )
    (tmp_path / "texts.txt").write_text("the parcel never came\nrain by the evening")
    recipe = parse_recipe(
        {
            "name": "static",
            "runtime": "auto",
            "steps": [{"method": "vocabulary", "texts": str(tmp_path / "texts.txt")}, {"method": "embeddings", "bits": 4}],
            "measure": {"what": ["fidelity"], "count": 24},
            "evaluate": {"tasks": ["MiniSTS", "MiniRetrieval"]},
        }
    )
    plan = make_plan(recipe, folder_of(model).shape, tmp_path)
    assert plan.runtime == "numpy"
    assert "fits      yes" in describe(plan)
    record = run(recipe, model=str(model), output=tmp_path / "results", device="cpu")
    assert record.model.architecture == "static"
    assert record.model.dimension == (24 if layout == "model2vec" else 20)
    assert [task.task for task in record.tasks] == ["MiniSTS", "MiniRetrieval"]
    (row,) = record.rows
    assert (row.runtime, row.weights, row.activations) == ("numpy", "int4", "none")
    assert record.fidelity is not None
    assert record.fidelity.cosine_mean is not None
    assert record == Record.read(tmp_path / "results" / record.run)
    variant = folder_of(tmp_path / "results" / record.run / "variant")
    # A plan knows no text, so it counts every token; the step that has run says how many were kept.
    kept = recipe.steps[0].model_copy(update={"tokens": record.steps[0].config["tokens"]})
    shape = recipe.steps[1].estimate(kept.estimate(folder_of(model).shape).after).after
    assert shape.bytes == variant.shape.bytes < plan.variant_bytes
    vectors = compress.load(str(tmp_path / "results" / record.run)).encode(["rain by the evening", ""])
    assert np.linalg.norm(vectors[0]) > 0.5
    assert not vectors[1].any()


@pytest.mark.slow
def test_speed_names_the_runtime_of_the_baseline(pieces: Tokenizer, tmp_path: Path) -> None:
    model = static_embedding_folder(tmp_path / "tiny", pieces, {"embedding.weight": table(pieces)}, "Normalize")
    measure = {"what": ["speed"], "count": 24, "rounds": 1, "requests": 10, "threads": 1}
    recipe = parse_recipe({"steps": [{"method": "embeddings"}], "measure": measure, "evaluate": {"tasks": []}})
    record = run(recipe, model=str(model), output=tmp_path / "results", device="cpu")
    assert [(row.role, row.runtime) for row in record.rows if row.compute == "float32"] == [
        ("baseline", "numpy"),
        ("variant", "torch"),
    ]


def test_steps_on_blocks_are_refused_by_plan_and_run(pieces: Tokenizer, tmp_path: Path) -> None:
    model = static_embedding_folder(tmp_path / "tiny", pieces, {"embedding.weight": table(pieces)})
    needs = {"depth": {"blocks": 1}, "vocabulary": {"texts": "x"}}
    refused = []
    for name in METHODS:
        if method_class(name).without_blocks:
            continue
        try:
            recipe = parse_recipe({"steps": [{"method": name, **needs.get(name, {})}]})
        except UserError:  # a step that says nothing of itself is none
            continue
        refused.append(name)
        with pytest.raises(UserError, match=rf"steps\.0 \({name}\): tiny is a static table, which has no blocks") as error:
            make_plan(recipe, folder_of(model).shape, tmp_path)
        assert error.value.hint == "these steps work on it: distill, vocabulary, embeddings, align"
    assert {"rtn", "gptq", "awq", "wanda", "fold"} <= set(refused)
    with pytest.raises(UserError, match="which has no blocks"):
        run(parse_recipe({"steps": [{"method": "gptq"}]}), model=str(model), output=tmp_path / "results", device="cpu")


def test_a_table_that_is_int8_already_is_not_compressed_again(pieces: Tokenizer, tmp_path: Path) -> None:
    folder = model2vec_folder(tmp_path / "tiny", pieces, {"embeddings": np.ones((pieces.get_vocab_size(), 8), dtype=np.int8)})
    with pytest.raises(UserError, match="its table is stored in integers already"):
        make_plan(parse_recipe({"steps": [{"method": "embeddings"}]}), folder_of(folder).shape, tmp_path)
