"""Distillation: objectives with known answers, a loop that goes on where it was killed, students that learn, a teacher asked once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tests_support import compress_to
from tokenizers import Tokenizer
from torch import nn

import compress
from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.data.texts import read_texts, suite_texts
from compress.layers.grid import find_grid
from compress.layers.quantized_linear import QuantizedLinear
from compress.measure.accuracy.tasks import evaluated_texts, find_tasks
from compress.methods.distill import method, mining, objectives
from compress.methods.distill.data import Lessons, Teacher, different, lessons
from compress.methods.distill.hidden import HiddenStates, followed
from compress.methods.distill.method import Distill
from compress.methods.distill.mining import neighbours
from compress.methods.distill.objectives import OBJECTIVES, hidden, matryoshka
from compress.methods.distill.rounding import Rounded
from compress.methods.distill.student import Student, initial_weights, spelled, table_from
from compress.methods.distill.trainable import trainable
from compress.methods.distill.training import (
    Schedule,
    TokenTexts,
    batch_order,
    batches_from,
    rate,
    read_curve,
    tokenized,
    train,
    with_neighbours,
)
from compress.methods.prune.depth import Depth
from compress.methods.prune.magnitude import Magnitude
from compress.methods.prune.sparsegpt import SparseGPT
from compress.methods.quantize.awq import AWQ
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.models.architectures import is_block_linear
from compress.models.files.variant import VariantInfo
from compress.models.network.build import empty_network, load_network
from compress.models.network.segments import blocks_of
from compress.models.opened import empty_model, weights_of
from compress.models.shape import read_shape
from compress.models.source import find, find_shape
from compress.models.text.spec import EmbedderSpec
from compress.pipeline.apply import make_variant, stages_of
from compress.pipeline.plan import describe, make_plan
from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline.stage import BuildOptions

TEXTS = ["the parcel never came", "rain by the evening", "who wrote it", "x", ""]
SMALL = {"width": 16, "blocks": 2, "heads": 2, "mlp": 32, "latents": 4, "latent_heads": 2, "vocabulary": 600, "max_length": 64}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in suite_texts()[:400]))
    return path


def vectors(seed: int, width: int = 12) -> torch.Tensor:
    return torch.randn(9, width, generator=torch.Generator().manual_seed(seed))


def test_the_recipe_knows_the_objectives_that_there_are() -> None:
    assert tuple(OBJECTIVES) == method.OBJECTIVES


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_least_where_student_and_teacher_agree(name: str) -> None:
    teacher, other = vectors(0), vectors(1)
    assert float(OBJECTIVES[name](teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(OBJECTIVES[name](other, teacher)) > 1e-3
    student = other.clone().requires_grad_()
    OBJECTIVES[name](student, teacher).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", ["similarity", "ranking_kl", "margin"])
def test_what_compares_similarities_does_not_see_a_rotation_or_a_width(name: str) -> None:
    teacher = vectors(0)
    turn = torch.linalg.qr(torch.randn(20, 12, generator=torch.Generator().manual_seed(3))).Q
    assert float(OBJECTIVES[name](teacher @ turn.t(), teacher)) == pytest.approx(0, abs=1e-5)
    assert float(objectives.cosine(teacher @ turn.t()[:, :12], teacher)) > 0.1


def test_objectives_have_the_values_that_their_formulas_give() -> None:
    student, teacher = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 2]])
    assert float(objectives.cosine(student, teacher)) == pytest.approx(1 / 3)
    assert float(objectives.mse(student, teacher)) == pytest.approx((0 + 2 + 1) / 3)
    assert float(objectives.similarity(student, teacher)) == pytest.approx(2 / 6)  # one pair of three differs by 1, both ways
    soft = torch.tensor([[20.0, 0], [20, 0], [0, 0]]).softmax(dim=1)
    expected = (soft * (soft / 0.5).log()).nan_to_num().sum(dim=1).mean()
    assert float(objectives.ranking_kl(student, teacher)) == pytest.approx(float(expected), rel=1e-4)
    assert float(objectives.margin(student, teacher)) == pytest.approx((0 + 1 + 0 + 1 + 0 + 0) / 6)


def test_matryoshka_asks_at_every_width() -> None:
    student, teacher = vectors(0), vectors(1)
    expected = np.mean([float(objectives.cosine(student[:, :width], teacher[:, :width])) for width in (12, 4, 8)])
    assert float(matryoshka(objectives.cosine, [4, 8])(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_hidden_states_of_padding_are_not_compared() -> None:
    teacher = torch.randn(2, 5, 8)
    student, mask = teacher.clone(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    student[0, 3:] = 100
    assert float(hidden([student], [teacher], mask)) == 0
    assert float(hidden([torch.zeros_like(teacher)], [teacher], mask)) == pytest.approx(1)


def test_each_block_follows_the_last_one_before_its_next() -> None:
    assert followed((0, 4, 5), 6) == {0: 3, 1: 4, 2: 5}
    assert followed((0, 1, 2), 3) == {0: 0, 1: 1, 2: 2}
    assert followed((1, 2), 6) == {0: 1, 1: 5}


def test_hidden_states_are_the_blocks_own(bert: Path) -> None:
    whole, student = (load_network(bert, torch.float32) for _ in range(2))
    ids, mask = torch.randint(5, 500, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    asked = HiddenStates(student, whole, {0: 0, 1: 1}, 2.0)
    with asked.watching():
        student(input_ids=ids, attention_mask=mask)
    assert float(asked.loss(ids, mask).detach()) == pytest.approx(0, abs=1e-10)
    before = [len(block._forward_hooks) for network in (whole, student) for block in blocks_of(network)[1]]
    assert before == [0, 0, 0, 0]
    shifted = HiddenStates(student, whole, {0: 1}, 2.0)
    with shifted.watching():
        student(input_ids=ids, attention_mask=mask)
    states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = 2 * (states[1] - states[2]).square().mean() / states[2].square().mean()
    assert float(shifted.loss(ids, mask).detach()) == pytest.approx(float(expected), rel=1e-4)
    shifted.loss(ids, mask).backward()
    assert all(parameter.grad is None for parameter in whole.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


def test_neighbours_are_the_nearest_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    unit = made / np.linalg.norm(made, axis=1, keepdims=True)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, -2)
    expected = np.argsort(-similarities, axis=1)[:, :3]
    np.testing.assert_array_equal(neighbours(made, 3), expected)
    monkeypatch.setattr(mining, "ROWS", 7)
    np.testing.assert_array_equal(neighbours(made, 3), expected)
    monkeypatch.setattr(mining, "STRETCH", 25)
    own = neighbours(made, 3)
    assert (own[:25] < 25).all()
    assert (own[25:] >= 25).all()
    batch = with_neighbours(np.array([3, 9, 20, 30]), expected)
    assert set(batch) == {3, *expected[3]}
    with pytest.raises(ValueError, match="no 3 neighbours"):
        neighbours(made[:3], 3)


def test_batches_hold_every_text_once_and_go_on_anywhere() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, size=257)
    order = batch_order(lengths, 8, seed=1, epoch=0)
    assert sorted(np.concatenate(order).tolist()) == sorted(set(np.concatenate(order).tolist()))
    assert len(order) == 32
    assert not np.array_equal(np.concatenate(order), np.concatenate(batch_order(lengths, 8, seed=1, epoch=1)))
    schedule = SimpleNamespace(batch=8, seed=1)
    whole = batches_from(lengths, schedule, 0)  # type: ignore[arg-type]
    every = [next(whole) for _ in range(80)]
    later = batches_from(lengths, schedule, 50)  # type: ignore[arg-type]
    assert all(np.array_equal(a, next(later)) for a in every[50:])
    with pytest.raises(ValueError, match="do not fill a batch"):
        next(batches_from(lengths[:7], schedule, 0))  # type: ignore[arg-type]


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = SimpleNamespace(steps=100, warmup=0.1)
    rates = [rate(schedule, step) for step in range(100)]  # type: ignore[arg-type]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


class Bag(nn.Module):
    """A network of nothing but a table."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(50, width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def problem(width: int = 8) -> tuple[TokenTexts, Callable[[np.ndarray], np.ndarray], tuple[TokenTexts, np.ndarray]]:
    """Random texts, and the vectors that a bag of another seed gives them."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 50, size=generator.integers(1, 9)) for _ in range(400)]
    teacher = Bag(7, width).table.weight.detach().numpy()
    made = np.stack([teacher[row].mean(axis=0) for row in rows]).astype(np.float32)
    held = TokenTexts(rows[:80], [0] * 80)
    return TokenTexts(rows[80:], [0] * 320), lambda chosen: made[80:][chosen], (held, made[:80])


SCHEDULE = Schedule(
    steps=400, batch=32, learning_rate=0.03, warmup=0.05, weight_decay=0.0, precision="no", accumulate=1, every=100, patience=None, seed=0
)  # fmt: skip
SPEC = EmbedderSpec()


def test_a_student_that_can_be_the_teacher_becomes_it(tmp_path: Path) -> None:
    taught, targets, held = problem()
    student, long = Bag(1), replace(SCHEDULE, steps=2000, every=500)
    train(student, SPEC, taught, targets, held, {"mse": (1.0, objectives.mse)}, long, tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    assert [look["loss"] for look in curve] == sorted((look["loss"] for look in curve), reverse=True)
    assert curve[-1]["cosine"] > 0.999
    torch.testing.assert_close(student.table.weight.detach(), Bag(7).table.weight.detach(), atol=0.05, rtol=0)


def test_a_narrower_student_learns_through_a_map(tmp_path: Path) -> None:
    taught, targets, held = problem(width=12)
    train(Bag(1), SPEC, taught, targets, held, {"cosine": (1.0, objectives.cosine)}, SCHEDULE, tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    assert curve[0]["cosine"] < curve[-1]["cosine"]
    assert 0.7 < curve[-1]["cosine"] < 0.9999  # 8 of 12 dimensions


def test_a_narrower_student_without_a_map_is_judged_by_its_similarities(tmp_path: Path) -> None:
    taught, targets, held = problem(width=12)
    train(Bag(1), SPEC, taught, targets, held, {"similarity": (1.0, objectives.similarity)}, SCHEDULE, tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    assert "cosine" not in curve[0]
    assert 0.5 < curve[0]["correlation"] < curve[-1]["correlation"] < 1


def test_a_killed_training_gives_the_curve_of_one_that_was_not(tmp_path: Path) -> None:
    taught, targets, held = problem()
    schedule = replace(SCHEDULE, steps=60, every=20, accumulate=2)
    asked = {"cosine": (1.0, objectives.cosine), "similarity": (2.0, objectives.similarity)}
    whole = Bag(1)
    train(whole, SPEC, taught, targets, held, asked, schedule, tmp_path / "whole")
    expected = read_curve(tmp_path / "whole")

    class Killed(Exception):
        pass

    def die(_: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(Bag(1), SPEC, taught, targets, held, asked, schedule, tmp_path / "killed", say=die)
    assert [path.name for path in (tmp_path / "killed").glob("state-*")] == ["state-20.pt"]
    again = Bag(1)
    train(again, SPEC, taught, targets, held, asked, schedule, tmp_path / "killed")
    curve = read_curve(tmp_path / "killed")
    for key in ("step", "loss", "cosine"):
        assert [look[key] for look in curve] == [look[key] for look in expected]
    assert torch.equal(again.table.weight, whole.table.weight)


def test_training_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    taught, targets, held = problem()
    still = replace(SCHEDULE, learning_rate=1e-12, every=10, patience=3)
    said: list[str] = []
    train(Bag(1), SPEC, taught, targets, held, {"mse": (1.0, objectives.mse)}, still, tmp_path / "t", say=said.append)
    assert len(said) == len(read_curve(tmp_path / "t")) <= 5
    assert said[-1].endswith("no better for 3 looks, stopped")


@pytest.mark.parametrize("architecture", ["nv-embed", "mistral", "bert"])
def test_a_new_student_has_the_tensors_that_were_planned_and_learns_with_all_of_them(
    bert: Path, texts: Path, tmp_path: Path, architecture: str
) -> None:
    student = Student(architecture=architecture, **SMALL | ({"kv_heads": 1} if architecture != "bert" else {}))  # type: ignore[arg-type]
    read = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    student.write(tmp_path / "new", read)
    made = initial_weights(tmp_path / "new", None, seed=0)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == student.tensors()
    step = Distill(texts=str(texts), held_out=40, student=student, steps=6, batch=16, every=3, learning_rate=5e-3, precision="no")
    compress_to(bert, tmp_path / "v", step)
    shape = step.estimate(read_shape("tiny", bert)).after
    info = VariantInfo.read(tmp_path / "v")
    assert info.spec.normalize
    assert shape.parameters == read_shape("v", tmp_path / "v").parameters
    trained = empty_network(tmp_path / "v")
    weights_of(tmp_path / "v", trained).fill(trained, dtype=torch.float32)
    before = initial_weights(tmp_path / "new", lambda strings: compress.load(str(bert), device="cpu").encode(strings, ""), seed=0)
    unused = {"embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight"}  # rows that no text reaches
    for name, tensor in trained.state_dict().items():
        if name.endswith("key.bias"):  # adds the same to all of a query's scores, which softmax does not see
            continue
        changed = (tensor - before[name]).abs()
        assert changed.max() > 1e-3, name  # half precision alone would move it less
        if name not in unused and tensor.dim() == 1:
            assert (changed > 0).float().mean() > 0.5, name
    assert np.isfinite(compress.load(str(tmp_path / "v"), device="cpu").encode(TEXTS)).all()


def test_tokens_begin_as_the_teacher_s_vectors_of_their_strings(minilm: Path, tmp_path: Path) -> None:
    student = Student(**SMALL | {"width": 384, "heads": 6})  # type: ignore[arg-type]
    student.write(tmp_path, list(suite_texts()))
    teacher = compress.load("minilm", device="cpu")
    made = initial_weights(tmp_path, lambda strings: teacher.encode(strings), seed=0)["embedding_model.embed_tokens.weight"].numpy()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = teacher.encode(["water"])[0]
    number = tokenizer.token_to_id("▁water")
    assert number is not None
    assert spelled(tokenizer)[number] == "water"
    centre = teacher.encode(spelled(tokenizer)).mean(axis=0)
    cosine = made[number] @ (expected - centre) / np.linalg.norm(made[number]) / np.linalg.norm(expected - centre)
    assert cosine == pytest.approx(1, abs=1e-4)


def test_a_table_keeps_what_its_width_can_hold() -> None:
    generator = np.random.default_rng(0)
    low = (generator.standard_normal((100, 3)) @ generator.standard_normal((3, 20))).astype(np.float32)
    table = table_from(low, 3)
    exact = (low - low.mean(axis=0)) @ (low - low.mean(axis=0)).T
    scale = np.trace(exact) / np.trace(table @ table.T)
    np.testing.assert_allclose(scale * (table @ table.T), exact, atol=1e-2)
    assert table_from(low, 30).shape == (100, 30)


def test_a_pruned_model_is_healed_and_quantized_in_one_recipe(minilm: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(
        texts=str(texts),
        held_out=100,
        steps=30,
        batch=16,
        every=15,
        learning_rate=3e-4,
        max_tokens=64,
        hidden=0.1,
        hard_negatives=1,
    )
    compress_to(minilm, tmp_path / "pruned", Depth(drop=(1, 2, 3)))
    compress_to(minilm, tmp_path / "healed", Depth(drop=(1, 2, 3)), heal, RTN())
    judged = list(suite_texts()[400:500])
    whole = compress.load("minilm", device="cpu").encode(judged)
    cosines = {
        name: float((compress.load(str(tmp_path / name), device="cpu").encode(judged) * whole).sum(axis=1).mean())
        for name in ("pruned", "healed")
    }
    assert cosines["healed"] > cosines["pruned"] + 0.05
    info = VariantInfo.read(tmp_path / "healed")
    assert info.layers == (0, 4, 5)
    assert info.quantized


def test_a_teacher_is_asked_once_and_another_one_anew(bert: Path, copy_of, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.methods.distill import data

    opened: list[str] = []
    real = data.open_source

    def counting(source, **how: object):
        opened.append(source.name)
        return real(source, **how)

    monkeypatch.setattr(data, "open_source", counting)
    taught = Lessons(TEXTS[:3], ["", "", "a: "], ["", "", "a: "])
    first = Teacher(find(str(bert)), "cpu").vectors(taught)
    np.testing.assert_array_equal(Teacher(find(str(bert)), "cpu").vectors(taught), first)
    assert len(opened) == 1
    changed = copy_of(bert)
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(bytes(content))
    Teacher(find(str(changed)), "cpu").vectors(taught)
    assert len(opened) == 2


def test_prompts_go_before_their_share_of_the_texts(texts: Path, nv_embed: Path) -> None:
    read = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    taught = lessons(read, 200, ["p: ", "q: "], 0.5, same_prompts=False, seed=0)
    assert 60 < sum(prompt != "" for prompt in taught.prompts) < 140
    assert {"", "p: ", "q: "} == set(taught.prompts)
    assert set(taught.teacher_prompts) == {""}
    embedder = compress.load(str(nv_embed), device="cpu")
    prompt = next(text for text in embedder.spec.prompts.values() if text)
    rows = tokenized(embedder.tokenizer, ["a text", "a text"], ["", prompt], embedder.spec, 10_000)  # type: ignore[arg-type]
    _, mask, pooled = rows.batch(np.array([0, 1]))
    length = embedder.tokenizer.prompt_length(prompt)
    assert pooled[1, :length].sum() == 0
    assert pooled.sum(dim=1).tolist()[1] == int(mask[1].sum()) - length
    with pytest.raises(ValueError, match="400 different texts, 500 are wanted"):
        lessons(read, 500, (), 0, same_prompts=True, seed=0)


def test_texts_that_are_evaluated_on_are_not_trained_on(texts: Path) -> None:
    tasks = find_tasks(["MiniSTS", "MiniRetrieval"], None)
    evaluated = evaluated_texts(tasks)
    judged = next(iter(tasks[0].mteb.dataset["test"]["sentence1"]))
    texts.write_text(
        "\n".join(json.dumps({"text": text}) for text in (judged, f"  {judged.upper()} ", "another one", "another one"))
    )
    assert different(str(texts), evaluated) == (["another one"], 2)
    assert len(different(str(texts), frozenset())[0]) == 3


def test_wrong_keys_are_named(texts: Path) -> None:
    with pytest.raises(UserError, match="objective 'cosin' is not known"):
        parse_recipe({"steps": [{"method": "distill", "texts": str(texts), "objectives": {"cosin": 1.0}}]})
    with pytest.raises(ValidationError, match="leaves less than a batch"):
        Distill(texts=str(texts), count=1000, held_out=1000)
    with pytest.raises(ValidationError, match="have to divide"):
        Student(width=384, heads=7)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    network = empty_model(folder)
    weights_of(folder, network).fill(network)
    return network.state_dict()


def test_pruned_weights_stay_zero_and_the_others_learn(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=60, batch=16, every=30, learning_rate=1e-3, precision="no")
    compress_to(bert, tmp_path / "pruned", SparseGPT(pattern="2:4"))
    compress_to(bert, tmp_path / "healed", SparseGPT(pattern="2:4"), heal)
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "healed")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if is_block_linear(name, weight.dim()):
            assert torch.equal(weight == 0, after[name] == 0), name
            assert not torch.equal(weight, after[name]), name
    info = VariantInfo.read(tmp_path / "healed")
    assert [step["method"] for step in info.steps] == ["sparsegpt", "distill"]
    judged = list(suite_texts()[400:480])
    whole = compress.load(str(bert), device="cpu").encode(judged)
    cosines = [
        float((compress.load(str(tmp_path / name), device="cpu").encode(judged) * whole).sum(axis=1).mean())
        for name in ("pruned", "healed")
    ]
    assert cosines[1] > cosines[0]
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("pruned", "healed")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_a_run_of_two_walks_goes_on_where_a_variant_was_written_and_not_noted(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=2, batch=16, every=2, precision="no")
    compress_to(bert, tmp_path / "v", Magnitude(sparsity=0.5), heal)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "v-journal").rglob("*.safetensors")}
    vectors = compress.load(str(tmp_path / "v"), device="cpu").encode(TEXTS)
    # Killed behind the renaming of the first walk's variant, and of the second's, before either was noted.
    (tmp_path / "v-journal" / "stage-0" / "done.json").unlink()
    compress_to(bert, tmp_path / "v", Magnitude(sparsity=0.5), heal)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "v-journal").rglob("*.safetensors")} == before
    np.testing.assert_array_equal(compress.load(str(tmp_path / "v"), device="cpu").encode(TEXTS), vectors)


def test_integers_stay_and_what_is_around_them_learns(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, every=3, learning_rate=3e-3, precision="no")
    quantize = RTN(bits=4, group_size=16, activations="none")
    compress_to(bert, tmp_path / "rtn", quantize)
    compress_to(bert, tmp_path / "healed", quantize, heal)
    before, after = stored(tmp_path / "rtn"), stored(tmp_path / "healed")
    info = VariantInfo.read(tmp_path / "healed")
    assert info.quantized == VariantInfo.read(tmp_path / "rtn").quantized
    for name, tensor in before.items():
        if name.rpartition(".")[0] in info.quantized and not name.endswith("bias"):
            assert torch.equal(tensor, after[name]), name
        elif not name.endswith("key.bias"):  # norms, tables and the integers' biases; the keys' softmax does not see
            assert not torch.equal(tensor, after[name]), name
    np.testing.assert_array_equal(
        *(compress.load(str(tmp_path / "healed"), device="cpu", stream=stream).encode(TEXTS) for stream in (False, True))
    )


@pytest.mark.parametrize("table", [False, True])
def test_integers_learn_and_are_what_was_trained(bert: Path, texts: Path, tmp_path: Path, table: bool) -> None:
    heal = Distill(
        texts=str(texts), held_out=60, steps=40, batch=16, every=20, learning_rate=5e-3, precision="no", integers="trained"
    )
    steps = [
        RTN(bits=3, group_size=16, symmetric=False, activations="none"),
        *([Embeddings(bits=4, group_size=16)] if table else []),
    ]
    compress_to(bert, tmp_path / "rtn", *steps)
    compress_to(bert, tmp_path / "healed", *steps, heal)
    before, after = stored(tmp_path / "rtn"), stored(tmp_path / "healed")
    info = VariantInfo.read(tmp_path / "healed")
    assert info.quantized == VariantInfo.read(tmp_path / "rtn").quantized
    for name in info.quantized:
        assert not torch.equal(before[f"{name}.weight_scale"], after[f"{name}.weight_scale"]), name
        if f"{name}.weight_zero" in before:
            assert torch.equal(before[f"{name}.weight_zero"], after[f"{name}.weight_zero"]), name
    changed = [name for name in info.quantized if not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])]
    assert len(changed) > len(info.quantized) / 2
    read = lessons(different(str(texts), frozenset())[0], None, (), 0, same_prompts=True, seed=0).texts[:60]
    whole = compress.load(str(bert), device="cpu").encode(read)
    cosines = [
        float((compress.load(str(tmp_path / name), device="cpu").encode(read) * whole).sum(axis=1).mean())
        for name in ("rtn", "healed")
    ]
    assert cosines[1] > cosines[0]
    # What was judged while training is what was stored, but for half precision around the integers.
    judged = read_curve(tmp_path / "healed-journal" / "step-0")[-1]["cosine"]
    assert cosines[1] == pytest.approx(judged, abs=0.05 * (1 - judged))


def test_rounding_is_the_grid_s_and_gradients_stop_where_it_ends() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 20)
    grid = find_grid(weight, 3, 8, symmetric=False)
    rounded = Rounded(grid, 20)
    wide = (2 * weight).requires_grad_()
    values = rounded(wide)
    torch.testing.assert_close(values.detach(), grid.values(grid.round(wide.detach())))
    values.sum().backward()
    group = grid.group_of(20)
    inside = (wide.detach() / grid.scale[:, group] + grid.zero[:, group]).sub(3.5).abs() <= 3.5
    torch.testing.assert_close(wide.grad, inside.float())
    # A scale's gradient is what moves its values: the integers at the ends, the rounding's error between.
    steps = (wide.detach() / grid.scale[:, group]).round().clamp(-grid.zero[:, group], 7 - grid.zero[:, group])
    asked = torch.where(inside, steps - wide.detach() / grid.scale[:, group], steps) * grid.scale[:, group]
    expected = torch.stack([asked[:, group == number].sum(dim=1) for number in range(3)], dim=1)
    torch.testing.assert_close(rounded.gain.grad.view(6, 3), expected, atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]


def test_integers_are_not_trained_where_there_are_none(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, precision="no", integers="trained")
    with pytest.raises(UserError, match="no layer is in integers that could be trained"):
        compress_to(bert, tmp_path / "v", heal)
    with pytest.raises(UserError, match=r"query is given its input divided by factors.*keep_factors"):
        compress_to(bert, tmp_path / "w", AWQ(keep_factors=True), heal)


def test_gradients_pass_integers_as_they_pass_their_values(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "v", RTN(bits=4, group_size=16, activations="none"))
    network = empty_model(tmp_path / "v")
    weights_of(tmp_path / "v", network).fill(network, dtype=torch.float32)
    dense = load_network(bert, torch.float32)
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = module.dequantized()
    ids = torch.randint(5, 500, (3, 7))
    gradients = []
    with trainable(network):
        for model in (network, dense):
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.square().mean().backward()
            gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-2)  # the rest of the variant is in half precision
    assert any(isinstance(module, QuantizedLinear) for module in network.modules())


def test_numbers_that_cannot_be_trained_around_are_refused(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, precision="no")
    with pytest.raises(UserError, match=r"steps.1 \(distill\): .* is stored as fp8"):
        compress_to(bert, tmp_path / "v", FP8(), heal)


def test_only_what_may_comes_after_single_layers(texts: Path) -> None:
    distill = {"method": "distill", "texts": str(texts)}
    steps = parse_recipe({"steps": [{"method": "depth", "keep": 0.5}, {"method": "rtn"}, distill, {"method": "gptq"}]}).steps
    assert [[step.method for step in stage] for stage in stages_of(steps)] == [["depth", "rtn"], ["distill", "gptq"]]
    with pytest.raises(UserError, match="put it before rtn"):
        parse_recipe({"steps": [{"method": "rtn"}, {"method": "depth", "keep": 0.5}]})


def test_a_low_rank_change_is_added_up_and_leaves_zeros_and_the_rest_alone(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, lora=2, steps=12, batch=16, every=6, learning_rate=1e-2, precision="no")
    compress_to(bert, tmp_path / "pruned", SparseGPT(pattern="2:4"))
    compress_to(bert, tmp_path / "healed", SparseGPT(pattern="2:4"), heal)
    before, after = stored(tmp_path / "pruned"), stored(tmp_path / "healed")
    for name, weight in before.items():
        if is_block_linear(name, weight.dim()):
            assert torch.equal(weight == 0, after[name] == 0), name
            assert not torch.equal(weight, after[name]), name
        else:
            assert torch.equal(weight, after[name]), name
    cosines = [curve_look["cosine"] for curve_look in read_curve(tmp_path / "healed-journal" / "step-0")]
    assert cosines == sorted(cosines)


def test_a_low_rank_change_has_its_rank(bert: Path) -> None:
    network = load_network(bert, torch.float32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with trainable(network, 3):
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) < 0.3 * sum(tensor.numel() for tensor in before.values())
        for parameter in trained:
            parameter.data.normal_()
    assert before.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        change = tensor - before[name]
        assert torch.linalg.matrix_rank(change) == 3 if is_block_linear(name, tensor.dim()) else not change.any(), name


def test_a_low_rank_change_of_integers_is_refused(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, lora=2, steps=6, batch=16, precision="no")
    with pytest.raises(UserError, match=r"steps.1 \(distill\): every linear layer is in integers"):
        compress_to(bert, tmp_path / "v", RTN(), heal)


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_learn_what_one_does(bert: Path, texts: Path, tmp_path: Path, sharded: bool) -> None:
    alone = Distill(texts=str(texts), held_out=40, steps=6, batch=16, every=3, learning_rate=1e-3, precision="no", processes=1)
    together = alone.model_copy(update={"processes": 2, "sharded": sharded})
    compress_to(bert, tmp_path / "one", Depth(drop=(1,)), alone)
    compress_to(bert, tmp_path / "two", Depth(drop=(1,)), together)
    one, two = (read_curve(tmp_path / f"{name}-journal" / "step-1") for name in ("one", "two"))
    assert [look["step"] for look in two] == [3, 6]
    for key in ("loss", "cosine"):
        assert [look[key] for look in two] == pytest.approx([look[key] for look in one], rel=1e-3)
    first, second = stored(tmp_path / "one"), stored(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-3, rtol=0)


def test_a_process_that_fails_says_why(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, precision="no", processes=2, sharded=True)
    with pytest.raises(UserError, match=r"steps.1 \(distill\): process \d of 2: .* is pruned, which cannot be kept in parts"):
        compress_to(bert, tmp_path / "v", SparseGPT(pattern="2:4"), heal)


def test_texts_come_from_a_dataset_too(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"said": text, "n": 1}) + "\n" for text in TEXTS[:3]))
    assert read_texts(f"hub:{folder}:said") == TEXTS[:3]
    assert different(f"hub:{folder}:said:train", frozenset(["x"]))[0] == TEXTS[:3]
    assert Distill(texts=f"hub:{folder}:said").reads == ()
    with pytest.raises(UserError, match="no column 'sad'"):
        read_texts(f"hub:{folder}:sad")
    with pytest.raises(UserError, match="does not hold one string a row"):
        read_texts(f"hub:{folder}:n")
    with pytest.raises(UserError, match="OWNER/NAME:COLUMN"):
        read_texts(f"hub:{folder}")
    with pytest.raises(UserError, match="cannot be loaded"):
        read_texts(f"hub:{tmp_path / 'nowhere'}:said")


def test_a_new_student_s_tokenizer_never_sees_what_is_evaluated(bert: Path, texts: Path, tmp_path: Path) -> None:
    word = "zyxwvutsrq"
    with texts.open("a") as file:
        file.writelines(json.dumps({"text": f"{word} {word} {number}"}) + "\n" for number in range(300))
    step = Distill(texts=str(texts), held_out=40, student=Student(**SMALL), steps=2, batch=16, every=2, precision="no")  # type: ignore[arg-type]
    evaluated = frozenset(f"{word} {word} {number}" for number in range(300))
    for name, left_out in (("seen", frozenset[str]()), ("unseen", evaluated)):
        journal = Journal(tmp_path / f"{name}-journal")
        made = make_variant(
            find(str(bert)),
            read_shape("t", bert),
            [step],
            tmp_path / name,
            journal,
            BuildOptions("0", lambda _: None, evaluated=partial(frozenset, left_out)),
        )
        assert made[0]["found"]["left_out"] == len(left_out)
        assert [look["step"] for look in made[0]["found"]["curve"]] == [2]
        known = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")).get_vocab()
        assert (f"▁{word}" in known) == (name == "seen")


def test_a_plan_says_what_each_of_several_gpus_would_take() -> None:
    recipe = parse_recipe(
        {"steps": [{"method": "distill", "texts": "texts.txt", "steps": 1000, "batch": 64, "learning_rate": 1e-4}]}
    )
    shape = find_shape("nvidia/NV-Embed-v2")
    step = recipe.steps[0]
    assert isinstance(step, Distill)
    whole = step.estimate(shape)
    sharded, low = (step.model_copy(update=change).estimate(shape) for change in ({"sharded": True}, {"lora": 16}))
    assert whole.gpus[8][0] > 16 * shape.parameters  # weights, gradients and two moments, on each
    assert 16 * shape.parameters / 8 < sharded.gpus[8][0] < 0.2 * whole.gpus[8][0]
    assert sharded.gpus[1] == whole.gpus[1]
    assert 4 * shape.parameters < low.gpus[1][0] < 0.5 * whole.gpus[1][0]
    assert 0.25 < whole.gpus[4][1] / whole.gpus[1][1] < 0.5  # the teacher is not shared
    assert "8: " in describe(make_plan(recipe, shape, Path.cwd()))


def test_a_plan_counts_weights_in_integers_as_what_they_stand_for() -> None:
    shape = find_shape("nvidia/NV-Embed-v2")
    rounded = Embeddings(bits=4, group_size=64).estimate(GPTQ(bits=3, group_size=64).estimate(shape).after).after
    assert rounded.flops_per_token(64) == pytest.approx(shape.flops_per_token(64), rel=1e-9)
    learned, frozen = (
        Distill(texts="texts.txt", steps=100, batch=64, learning_rate=1e-4, integers=integers) for integers in ("trained", "frozen")
    )
    plain = learned.model_copy(update={"integers": "frozen"}).estimate(shape)
    assert learned.estimate(rounded).gpus[1] == pytest.approx(plain.gpus[1], rel=0.03)  # scales are counted beside
    assert frozen.estimate(rounded).gpus[1][0] < 0.5 * plain.gpus[1][0]
    assert frozen.estimate(rounded).gpus[1][1] == pytest.approx(plain.gpus[1][1], rel=0.03)


def test_tokens_may_begin_at_random(bert: Path, texts: Path, tmp_path: Path) -> None:
    tables = []
    for number, tokens in enumerate(("teacher", "random")):
        student = Student(**SMALL | {"tokens": tokens})  # type: ignore[arg-type]
        step = Distill(
            texts=str(texts), held_out=40, student=student, steps=1, batch=16, every=1, learning_rate=1e-9, precision="no"
        )
        compress_to(bert, tmp_path / str(number), step)
        tables.append(load_file(tmp_path / str(number) / "model.safetensors")["embedding_model.embed_tokens.weight"].float())
    expected = initial_weights(tmp_path / "1", None, seed=0)["embedding_model.embed_tokens.weight"]
    torch.testing.assert_close(tables[1], expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(tables[0], tables[1], atol=1e-2)
