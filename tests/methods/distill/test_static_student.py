"""A static table as a student: its tokens, vectors and factors by hand, and a training that goes on where it was killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests_support import compress_to, folder_of
from tokenizers import Tokenizer

import compress
from compress.common.errors import UserError
from compress.data.texts import suite_texts
from compress.export.static_table import write_model2vec, write_sentence_transformers
from compress.methods.distill import method as distill_method
from compress.methods.distill.checkpoints import Checkpoints
from compress.methods.distill.method import Distill
from compress.methods.distill.static_student import StaticStudent
from compress.methods.distill.static_table import (
    counted,
    frequent_words,
    principal_axes,
    reduced,
    sif_factors,
    strings_of,
    with_words,
)
from compress.methods.distill.trainable import trainable
from compress.methods.quantize.embeddings import Embeddings
from compress.models.files.variant import VariantInfo
from compress.models.network.build import load_network
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline.run import run
from compress.runtimes.lower import lower

SMALL = {"architecture": "static", "width": 16}


def step_on(texts: Path, **changes: object) -> Distill:
    """A short distillation of a static table."""
    student = StaticStudent(**SMALL | changes.pop("student", {}))  # type: ignore[arg-type, operator]
    short = {"held_out": 40, "steps": 60, "batch": 16, "every": 20, "learning_rate": 5e-3, "precision": "no"}
    return Distill(texts=str(texts), student=student, **short | changes)  # type: ignore[arg-type]


def words_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_sif_factors_by_hand() -> None:
    # Of 1,000 tokens: 999 times the first, once the second, never the third.
    np.testing.assert_allclose(sif_factors(np.array([999, 1, 0]), 1e-3), [1e-3 / 1.0, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(sif_factors(np.zeros(3, dtype=np.int64), 1e-3), np.ones(3))


def test_axes_keep_the_cosines_that_their_number_can_keep() -> None:
    generator = np.random.default_rng(0)
    # In a plane of six dimensions, far from the origin: centred, one axis would do and all cosines would be other ones.
    plane = np.linalg.qr(generator.standard_normal((6, 2)))[0]
    vectors = ((generator.standard_normal((50, 2)) * [0.1, 1] + [3, 0]) @ plane.T).astype(np.float32)
    axes = principal_axes(vectors, 2)
    assert axes.shape == (6, 2)
    np.testing.assert_allclose(axes.T @ axes, np.eye(2), atol=1e-6)
    made, whole = reduced(vectors, axes), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(made @ made.T, whole @ whole.T, atol=1e-5)
    assert np.square(made[:, 0]).sum() > np.square(made[:, 1]).sum()
    np.testing.assert_allclose(axes, principal_axes(7 * vectors, 2), atol=1e-6)  # lengths do not count
    np.testing.assert_array_equal(principal_axes(vectors, 6), np.eye(6))
    with pytest.raises(ValueError, match=r"`student.width` is 7, and the teacher's vectors have 6 dimensions"):
        principal_axes(vectors, 7)


def test_words_become_tokens_that_are_not_split(pieces: Tokenizer) -> None:
    definition = json.loads(pieces.to_str())
    texts = ["Zyxwv zyxwv, uvw!", "zyxwv uvw qqqq 1234 1234"]
    words = frequent_words(definition, texts, 5)
    assert words == ["zyxwv", "uvw"]  # the most frequent first; no numbers, and none that occurs once
    assert frequent_words(definition, texts, 1) == ["zyxwv"]
    more = with_words(definition, words)
    tokenizer = Tokenizer.from_str(json.dumps(more))
    size = pieces.get_vocab_size()
    assert tokenizer.encode("Zyxwv uvw", add_special_tokens=False).ids == [size, size + 1]
    assert strings_of(tokenizer)[size:] == words
    before, after = (one.encode("the parcel never came", add_special_tokens=False).ids for one in (pieces, tokenizer))
    assert before == after
    counts = counted(more, texts)
    assert counts[size : size + 2].tolist() == [3, 2]
    assert counts.sum() == sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    assert "##" not in "".join(strings_of(tokenizer))


def test_tokens_begin_as_the_teacher_s_vectors_and_end_closer_to_it(bert: Path, texts: Path, tmp_path: Path) -> None:
    still = step_on(texts, steps=1, every=1, learning_rate=1e-9, student={"width": 48})
    compress_to(bert, tmp_path / "still", still)
    compress_to(bert, tmp_path / "taught", step_on(texts, steps=200, every=100, student={"width": 48}))
    teacher, student = compress.load(str(bert), device="cpu"), compress.load(str(tmp_path / "still"))
    # Of one token the factor has no effect, and a table as wide as the teacher lies in its space.
    known = Tokenizer.from_file(str(tmp_path / "still" / "tokenizer.json"))
    whole = [text for text in ("the", "is", "of", "in") if len(known.encode(text).ids) == 1]
    assert whole
    np.testing.assert_allclose(student.encode(whole), teacher.encode(whole), atol=2e-3)
    judged = list(suite_texts()[400:500])
    whole = teacher.encode(judged)
    fits = []
    for name in ("still", "taught"):
        vectors = compress.load(str(tmp_path / name)).encode(judged)
        fits.append(float((vectors * whole).sum(axis=1).mean()))
    assert fits[1] > fits[0] + 0.02


def test_a_training_begins_at_the_batch_that_is_named(bert: Path, texts: Path, tmp_path: Path) -> None:
    """As the later rounds of a recipe do, which go on in the texts where the one before ended."""
    made = {}
    for name, first in (("start", 0), ("later", 3), ("again", 3)):
        compress_to(bert, tmp_path / name, step_on(texts, steps=2, every=2, first_batch=first))
        made[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert made["later"] == made["again"] != made["start"]


@pytest.mark.parametrize("mapped", [True, False])
def test_tokens_that_the_texts_lack_learn_through_the_map(bert: Path, texts: Path, tmp_path: Path, mapped: bool) -> None:
    still = step_on(texts, steps=1, every=1, learning_rate=1e-12, student={"map": mapped})
    compress_to(bert, tmp_path / "still", still)
    compress_to(bert, tmp_path / "taught", step_on(texts, student={"map": mapped}))
    before, after = (
        load_file(tmp_path / name / "model.safetensors")["embeddings.word_embeddings.weight"] for name in ("still", "taught")
    )
    definition = json.loads((tmp_path / "still" / "tokenizer.json").read_text())
    absent = counted(definition, words_of(texts)) == 0
    absent[definition["model"]["vocab"]["[UNK]"]] = False  # without a vector, it has nothing to map
    moved = (before != after).any(dim=1).numpy()
    assert absent.sum() > 20
    assert moved[absent].all() if mapped else not moved[absent].any()
    assert moved[~absent].sum() > 100


def test_the_map_is_merged_into_the_rows_that_it_gave(bert: Path, texts: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "v", step_on(texts, steps=1, every=1))
    network = load_network(folder_of(tmp_path / "v"), torch.float32)
    ids = torch.tensor([[7, 9, 7, 300], [9, 8, 0, 300]])
    plain = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    with trainable(network, mapped=True):
        torch.testing.assert_close(network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state, plain)
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert {name.rpartition(".")[2] for name in trained} == {"weight", "change", "token_weights"}
        for parameter in trained.values():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        moved = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    after = network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(after, moved)
    assert not torch.allclose(after, plain, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(name.endswith("change") for name in network.state_dict())


def test_a_killed_training_gives_the_table_of_one_that_was_not(
    bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_on(texts, matryoshka=(8,), student={"words": 20, "min_count": 1})
    compress_to(bert, tmp_path / "whole", step)
    keep = Checkpoints.keep

    def killed(self: Checkpoints, curve: list[dict[str, float]]) -> None:
        keep(self, curve)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_to(bert, tmp_path / "killed", step)
    monkeypatch.setattr(distill_method, "TARGETS", "targets-again.npy")  # nothing else of a run differs
    compress_to(bert, tmp_path / "killed", step)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    planned, made = step.estimate(folder_of(bert).shape).after, folder_of(tmp_path / "whole").shape
    assert planned.tensors.keys() == made.tensors.keys()
    assert made.bytes <= planned.bytes  # tokens that do not occur are dropped


def test_a_recipe_ends_in_a_table_that_runs_without_torch(bert: Path, texts: Path, tmp_path: Path) -> None:
    steps = [
        {"method": "distill", "texts": str(texts), "held_out": 40, "steps": 2, "batch": 16, "every": 2, "student": SMALL},
        {"method": "embeddings", "bits": 8},
    ]
    recipe = parse_recipe({"name": "table", "runtime": "numpy", "steps": steps, "measure": {"what": []}, "evaluate": {"tasks": []}})
    assert make_plan(recipe, folder_of(bert).shape, tmp_path).runtime == "numpy"
    record = run(recipe, model=str(bert), output=tmp_path / "results", device="cpu")
    variant = tmp_path / "results" / record.run / "variant"
    info = VariantInfo.read(variant)
    assert (info.runtime, info.spec.normalize) == ("numpy", True)
    assert folder_of(variant).is_static
    assert folder_of(variant).dimension == 16
    odd, same = ["rain by the evening 🙂", "the parcel", ""], ["rain by the evening", "the parcel", ""]
    ours = compress.load(str(variant)).encode(odd)
    np.testing.assert_allclose(ours, compress.load(str(variant)).encode(same), atol=1e-6)  # the unknown token adds nothing
    lower(folder_of(variant), "onnxruntime")
    np.testing.assert_allclose(compress.load(str(variant), runtime="onnxruntime").encode(odd), ours, atol=2e-6)
    for number, write in enumerate((write_model2vec, write_sentence_transformers)):
        (tmp_path / str(number)).mkdir()
        write(folder_of(variant), tmp_path / str(number))
        np.testing.assert_allclose(compress.load(str(tmp_path / str(number))).encode(odd), ours, atol=1e-6)
    with pytest.raises(UserError, match="which has no blocks"):
        make_plan(parse_recipe({"steps": [steps[0], {"method": "rtn"}]}), folder_of(bert).shape, tmp_path)


def test_what_does_not_fit_is_refused(bert: Path, nv_embed: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`student.words` needs a WordPiece tokenizer, and the teacher's is BPE"):
        compress_to(nv_embed, tmp_path / "words", step_on(texts, student={"words": 10}))
    with pytest.raises(UserError, match=r"`student.width` is 64, and the teacher's vectors have 48 dimensions"):
        compress_to(bert, tmp_path / "wide", step_on(texts, student={"width": 64}))
    with pytest.raises(UserError, match=r"student\.static\.word: unknown key 'word'; did you mean 'words'"):
        parse_recipe({"steps": [{"method": "distill", "texts": str(texts), "student": {**SMALL, "word": 3}}]})
    with pytest.raises(UserError, match=r"student\.new\.architecture: 'statik' is not allowed here; did you mean 'static'"):
        parse_recipe({"steps": [{"method": "distill", "texts": str(texts), "student": {"architecture": "statik"}}]})
    with pytest.raises(ValueError, match="a static table has no blocks; leave out `hidden`, `lora`, `sharded` and `depth`"):
        step_on(texts, sharded=True).estimate(folder_of(bert).shape)
    with pytest.raises(ValueError, match="`matryoshka: 16` has no effect"):
        step_on(texts, matryoshka=(16,)).estimate(folder_of(bert).shape)


def test_integers_of_a_table_are_trained(bert: Path, texts: Path, tmp_path: Path) -> None:
    first, few = step_on(texts, student={"width": 48}), Embeddings(bits=2, group_size=8)
    heal = first.model_copy(update={"student": None, "integers": "trained", "steps": 60})
    compress_to(bert, tmp_path / "rounded", first, few)
    compress_to(bert, tmp_path / "healed", first, few, heal)
    judged = list(suite_texts()[400:500])
    whole = compress.load(str(bert), device="cpu").encode(judged)
    fits = [
        float((compress.load(str(tmp_path / name)).encode(judged) * whole).sum(axis=1).mean()) for name in ("rounded", "healed")
    ]
    assert fits[1] > fits[0]
    assert VariantInfo.read(tmp_path / "healed").quantized
