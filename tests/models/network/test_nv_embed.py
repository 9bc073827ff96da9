"""NV-Embed against outputs of the original code, with the head as published and folded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests_support import GOLDEN, SHARED, apply_in_memory, folder_of

import compress
from compress.common.errors import UserError
from compress.measure.verify import describe, verify
from compress.methods.nv_embed.fold import Fold
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VariantInfo
from compress.models.network.build import load_network
from compress.models.network.nv_embed import NVEmbedNetwork, fold, mean_of_rows
from compress.models.network.segments import State, begin, run_block, segments_of
from compress.models.shape import known_shape
from compress.models.text.nv_embed import PREFIX, instruction_prompts
from compress.pipeline.recipe import steps_for
from compress.pipeline.recipe_file import parse_recipe, read_recipe
from compress.pipeline.run import run

SETS = ["queries", "passages", "truncated", "edge_instructed"]


@pytest.fixture(scope="module")
def checkpoint(nv_embed: Path) -> Path:
    return nv_embed


@pytest.fixture(scope="module", params=["published", "folded"])
def network(request: pytest.FixtureRequest, checkpoint: Path) -> NVEmbedNetwork:
    loaded = load_network(folder_of(checkpoint), torch.float32)
    assert isinstance(loaded, NVEmbedNetwork)
    if request.param == "folded":
        apply_in_memory(loaded, Fold())
    return loaded.eval()


@pytest.mark.parametrize("name", SETS)
def test_the_original_s_embeddings(network: NVEmbedNetwork, name: str) -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    inputs = [torch.from_numpy(golden[f"{name}.{part}"]) for part in ("input_ids", "attention_mask", "pool_mask")]
    with torch.inference_mode():
        ours = network(*inputs).numpy()
    assert np.abs(ours - golden[f"{name}.embeddings"]).max() <= 1e-6


def test_the_original_s_hidden_states(network: NVEmbedNetwork, checkpoint: Path) -> None:
    """To 1e-6, or where this CPU's kernels add in another order, to what float32 rounding moved the original's own numbers."""
    golden = load_file(GOLDEN / "golden.safetensors")
    ids, mask = (torch.from_numpy(golden[f"passages.{part}"]) for part in ("input_ids", "attention_mask"))
    exact = load_network(folder_of(checkpoint), torch.float64)
    with torch.inference_mode():
        ours, precise = (
            model.embedding_model(input_ids=ids, attention_mask=mask).last_hidden_state[mask == 1].numpy()
            for model in (network, exact)
        )
    theirs = golden["passages.last_hidden_state"][mask.numpy() == 1]
    rounding = np.abs(theirs - precise).max()
    assert rounding <= 1e-5
    assert np.abs(ours - theirs).max() <= max(1e-6, rounding)


def test_no_block_is_causal(network: NVEmbedNetwork) -> None:
    """A later token changes the first token's hidden state already in the first block's output, with and without padding."""
    ids = torch.tensor([[1, 50, 60, 70]])
    other = torch.tensor([[1, 50, 60, 99]])
    for mask in (torch.ones(1, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1]])):
        with torch.inference_mode():
            first, second = (
                network.embedding_model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
                for tokens in (ids, other)
            )
        assert torch.equal(first[0][:, 0], second[0][:, 0])
        for block in range(1, len(first)):
            assert (first[block][:, 0] - second[block][:, 0]).abs().max() > 1e-4


def test_prompts_padding_and_batches(checkpoint: Path) -> None:
    embedder = compress.load(str(checkpoint), device="cpu")
    texts = ["parcel", "42 is the answer", "日本語", "\nnewline first", "", "🙂 a longer one about a parcel that came late"] * 3
    prefix = PREFIX.format(instruction="Find the parcel")
    for prompt in ("", prefix):
        alone = np.concatenate([embedder.encode([text], prompt) for text in texts])
        for batch_tokens in (1, 60, 10_000):
            np.testing.assert_allclose(embedder.encode(texts, prompt, batch_tokens=batch_tokens), alone, atol=1e-5)
    assert np.abs(np.linalg.norm(alone, axis=1) - 1).max() < 1e-5
    assert np.abs(embedder.encode(texts, "") - alone).max() > 1e-2


def test_a_prompt_that_fills_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "short")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    with pytest.raises(ValueError, match="leave nothing of 8"):
        compress.load(str(folder), device="cpu").encode(["a"], PREFIX.format(instruction="a rather long instruction it is"))


def test_missing_and_extra_tensors_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    shard = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    dropped = sorted(tensors)[-1]
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, shard)
    with pytest.raises(UserError, match="1 tensors differ"):
        compress.load(str(folder), device="cpu")


def test_the_fold_keeps_the_function_in_half_precision_too(checkpoint: Path) -> None:
    head = load_network(folder_of(checkpoint), torch.float64).latent_attention_model
    folded = fold(head)
    hidden = torch.randn(9, 64, dtype=torch.float64)
    mean = mean_of_rows(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2]), 3)
    with torch.inference_mode():
        expected = head(hidden, mean)  # before anything is cast: folding shares the head's norms and feed-forward part
        torch.testing.assert_close(folded(hidden, mean), expected, rtol=1e-5, atol=1e-6)
        rounded = folded.to(torch.bfloat16)(hidden.bfloat16(), mean)
        assert lowest_cosine(rounded, expected) > 0.999


def lowest_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double()).min())


def test_the_fold_of_the_real_shape_saves_what_was_derived() -> None:
    shape = known_shape("nvidia/NV-Embed-v2")
    assert shape is not None
    after = Fold().estimate(shape).after
    assert shape.parameters - after.parameters == 538_984_448 - 2 * 4096 * 8 * 512 - 2 * 4096
    both = RTN().estimate(after).after
    assert both.bytes < 7.8e9
    with pytest.raises(ValueError, match="no latent-attention head"):
        Fold().estimate(after)


@pytest.mark.parametrize(
    "steps",
    [
        [{"method": "fold"}, {"method": "rtn"}],
        *(pytest.param(steps, marks=pytest.mark.slow) for steps in ([], [{"method": "fold"}], [{"method": "rtn"}])),
    ],
)
def test_recipes_run_on_it_from_end_to_end(checkpoint: Path, tmp_path: Path, steps: list[dict[str, str]]) -> None:
    measure = {"count": 16, "what": ["fidelity"]}
    evaluate = {"tasks": ["MiniSTS"]}
    recipe = parse_recipe({"name": "r", "fold": False, "steps": steps, "measure": measure, "evaluate": evaluate})
    record = run(recipe, model=str(checkpoint), output=tmp_path, device="cpu")
    lossy = {"method": "rtn"} in steps
    assert record.fidelity is not None
    assert (record.fidelity.cosine_min or 0) > (0.95 if lossy else 0.9999)
    stored = sum(info.bytes for info in folder_of(tmp_path / record.run / "variant").shape.tensors.values())
    shape = folder_of(checkpoint).shape
    for step in recipe.steps:
        shape = step.estimate(shape).after
    assert stored == shape.as_stored().bytes


def test_recipes_start_from_the_fold_unless_told_not_to(checkpoint: Path, tmp_path: Path) -> None:
    recipe = read_recipe(Path(__file__).parents[3] / "recipes" / "int8.yaml")
    record = run(recipe, model=str(checkpoint), output=tmp_path, device="cpu", compress_only=True)
    assert [step.config["method"] for step in record.steps] == ["fold", "rtn"]
    assert VariantInfo.read(tmp_path / record.run / "variant").folded
    shape = folder_of(checkpoint).shape
    assert [step.method for step in steps_for(recipe.model_copy(update={"fold": False}), shape)] == ["rtn"]
    lossless = read_recipe(Path(__file__).parents[3] / "recipes" / "lossless.yaml")
    assert [step.method for step in steps_for(lossless, shape)] == ["fold"]


@pytest.mark.parametrize("steps", [None, [], [{"method": "rtn"}]], ids=["published", "folded", "folded, int8"])
def test_streamed_is_resident_bit_for_bit(checkpoint: Path, tmp_path: Path, steps: list[dict[str, str]] | None) -> None:
    """Prompts, unequal lengths, and a batch of equal ones: without padding there is no mask, and only the argument says causal."""
    folder = checkpoint
    if steps is not None:
        record = run(parse_recipe({"name": "r", "steps": steps}), model=str(checkpoint), output=tmp_path, compress_only=True)
        folder = tmp_path / record.run
    resident, streamed = (compress.load(str(folder), device="cpu", stream=stream) for stream in (False, True))
    texts = ["parcel", "42 is the answer", "日本語", "", "a longer one about a parcel that came late"] * 2
    for prompt in ("", PREFIX.format(instruction="Find the parcel")):
        for batch in (texts, ["parcel"] * 3):
            np.testing.assert_array_equal(streamed.encode(batch, prompt), resident.encode(batch, prompt))


def test_a_block_that_is_called_alone_is_not_causal(checkpoint: Path) -> None:
    network = load_network(folder_of(checkpoint), torch.float32)
    segments, outputs = segments_of(network), []
    for ids in ([[1, 50, 60, 70]], [[1, 50, 60, 99]]):
        with torch.inference_mode():
            hidden, arguments = begin(network, segments, {}, torch.tensor(ids), torch.ones(1, 4, dtype=torch.long))
            outputs.append(run_block(network.embedding_model.layers[0], 0, State(hidden, {}), arguments).hidden)
    assert (outputs[0][:, 0] - outputs[1][:, 0]).abs().max() > 1e-4


def test_the_card_s_example_is_run_and_the_difference_said(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(str(checkpoint), device="cpu")
    assert not found.passed
    assert "these are NOT the card's scores" in describe(found)
    embedder = compress.load(str(checkpoint), device="cpu")
    queries = embedder.encode(found.acceptance.queries, found.acceptance.prompt)
    passages = embedder.encode(found.acceptance.passages, "")
    np.testing.assert_allclose(found.scores, 100 * queries @ passages.T, atol=1e-3)
    right = found.model_copy(update={"scores": ((87.40, 0.50), (0.92, 86.08))})
    assert right.passed
    assert "these are the card's scores" in describe(right)
    assert not found.model_copy(update={"scores": ((87.42693, 0.46284), (0.96526, 86.09722))}).passed


def test_the_card_s_example_is_for_its_own_kind_of_model(bert: Path) -> None:
    with pytest.raises(UserError, match="no card example is known for model_type 'bert'"):
        verify(str(bert), device="cpu")


@pytest.mark.parametrize(("key", "value", "said"), [("mask_type", "c", "mask_type 'c'"), ("padding_side", "left", "'left'")])
def test_configs_that_ask_for_something_else_are_refused(checkpoint: Path, tmp_path: Path, key: str, value: str, said: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        compress.load(str(folder), device="cpu")


def test_a_config_without_eos_or_instruction_masking_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | {"add_eos": False, "is_mask_instruction": False}
    (folder / "config.json").write_text(json.dumps(config))
    spec = compress.load(str(folder), device="cpu").spec
    assert (spec.suffix, spec.pool_prompt) == ("", True)


def test_lossless_is_for_models_with_a_latent_head(bert: Path, tmp_path: Path) -> None:
    recipe = read_recipe(Path(__file__).parents[3] / "recipes" / "lossless.yaml")
    with pytest.raises(UserError, match=r"steps\.0: .* has no latent-attention head to fold"):
        run(recipe, model=str(bert), output=tmp_path, device="cpu")


def test_instructions_of_the_tasks() -> None:
    prompts = instruction_prompts()
    assert prompts["SciFact-query"] == (
        "Instruct: Given a scientific claim, retrieve documents that support or refute the claim\nQuery: "
    )
    assert prompts["SciFact-document"] == ""
    assert prompts["STSBenchmark"] == "Instruct: Retrieve semantically similar text\nQuery: "


@pytest.mark.skipif(
    not (SHARED / "reference").is_dir(), reason="the original tokenizer is not beside this checkout (../shared/reference)"
)
@pytest.mark.parametrize("name", SETS)
def test_tokens_and_masks_of_the_original(checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.copy(SHARED / "reference" / "nv-embed-v2" / "tokenizer.json", folder / "tokenizer.json")
    if name == "truncated":
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    embedder = compress.load(str(folder), device="cpu")
    texts = json.loads((GOLDEN / "texts.json").read_text())
    golden = load_file(GOLDEN / "golden.safetensors")
    prompt = texts["instruction"] if name in ("queries", "edge_instructed") else ""
    chosen = texts[{"queries": "queries", "edge_instructed": "edge"}.get(name, "passages")]
    rows = embedder.tokenizer([prompt + text for text in chosen])
    pool_from = embedder.tokenizer.prompt_length(prompt) if prompt else 0
    for row, tokens in enumerate(rows):
        assert tokens.tolist() == golden[f"{name}.input_ids"][row][golden[f"{name}.attention_mask"][row] == 1].tolist()
        pooled = [int(position >= pool_from) for position in range(len(tokens))]
        assert pooled == golden[f"{name}.pool_mask"][row][: len(tokens)].tolist()
    assert np.abs(embedder.encode(chosen, prompt) - golden[f"{name}.embeddings"]).max() <= 1e-6
