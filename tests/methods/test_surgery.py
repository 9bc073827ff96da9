"""Depth, width, vocabulary and head: what is left is the same model without what went, and elsewhere an ordinary smaller one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tests_support import compress_to
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

import compress
from compress.common.errors import UserError
from compress.data.texts import calibration_texts, suite_texts
from compress.export import export
from compress.methods.base import Method
from compress.methods.nv_embed.fold import Fold
from compress.methods.nv_embed.latents import Latents
from compress.methods.nv_embed.mean_pooling import MeanPooling
from compress.methods.prune.depth import Depth
from compress.methods.prune.groups import by_error, damped, refitted
from compress.methods.prune.width import Width
from compress.methods.quantize.rtn import RTN
from compress.methods.vocabulary import Vocabulary
from compress.models.files.headers import read_headers
from compress.models.files.variant import VariantInfo
from compress.models.network.build import load_network
from compress.models.network.nv_embed import read_nv_config
from compress.models.network.segments import blocks_of
from compress.models.network.surgery import without
from compress.models.shape import read_shape
from compress.pipeline.recipe_file import parse_recipe
from compress.runtimes.lower import lower
from compress.runtimes.torch_runtime import open_checkpoint

TEXTS = ["the parcel never came", "rain by the evening, they said", "who wrote it", "x", ""]
KINDS = ["bert", "mistral", "qwen3", "modernbert", "gemma3_text", "nv_embed"]


@pytest.fixture
def model_of(request: pytest.FixtureRequest, make_model: Callable[..., Path]) -> Callable[[str], Path]:
    return lambda kind: request.getfixturevalue(kind) if kind in ("bert", "nv_embed") else make_model(kind)


def encoded(folder: Path, texts: list[str] = TEXTS, **how: object) -> np.ndarray:
    return compress.load(str(folder), device="cpu", **how).encode(texts)  # type: ignore[arg-type]


def half_exact(folder: Path) -> Path:
    """A copy of a model whose weights float16 holds exactly, so that storing a variant rounds nothing."""
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.half().float() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def estimated(folder: Path, *steps: Method) -> dict[str, tuple[int, ...]]:
    shape = read_shape("tiny", folder)
    for step in steps:
        shape = step.estimate(shape).after
    return {name: info.shape for name, info in shape.tensors.items()}


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_headers(folder).items()}


def same_names(a: dict[str, tuple[int, ...]], b: dict[str, tuple[int, ...]]) -> bool:
    """Whether the tensors are the same, but for what stands before a network's names in a checkpoint."""
    return sorted((name.removeprefix("model."), shape) for name, shape in a.items()) == sorted(b.items())


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_blocks_are_as_if_they_passed_their_input_on(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    first = read_shape("tiny", folder).layers[0]
    gone = (first + 1,)  # ModernBERT's first block has no norm of its own, and no other can stand in for it
    step = Depth(drop=gone)
    compress_to(folder, tmp_path / "variant", step)
    whole = open_checkpoint(folder, "whole", device="cpu")
    for number in gone:
        blocks_of(whole.model)[1][number].forward = lambda hidden_states, *_, **__: hidden_states  # type: ignore[method-assign]
    np.testing.assert_allclose(encoded(tmp_path / "variant"), whole.encode(TEXTS), atol=1e-6)
    info = VariantInfo.read(tmp_path / "variant")
    assert info.layers == tuple(number for number in read_shape("tiny", folder).layers if number not in gone)
    assert info.steps[0]["drop"] == list(gone)
    assert same_names(estimated(folder, step), stored(tmp_path / "variant"))
    np.testing.assert_array_equal(encoded(tmp_path / "variant"), encoded(tmp_path / "variant", stream=True))


@pytest.mark.parametrize("what", ["attention", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_sublayer_adds_nothing(model_of, copy_of, tmp_path: Path, kind: str, what: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    step = Depth(what=what, drop=(1,))  # type: ignore[arg-type]
    compress_to(folder, tmp_path / "variant", step)
    whole = open_checkpoint(folder, "whole", device="cpu")
    anatomy = read_shape("tiny", folder).anatomy
    block = blocks_of(whole.model)[1][1]
    silenced = block.get_submodule(anatomy.output if what == "attention" else anatomy.falling)
    silenced.forward = lambda given: given.new_zeros(*given.shape[:-1], whole.dimension)  # type: ignore[method-assign]
    np.testing.assert_allclose(encoded(tmp_path / "variant"), whole.encode(TEXTS), atol=1e-6)
    assert VariantInfo.read(tmp_path / "variant").dropped == ((1, what),)
    assert same_names(estimated(folder, step), stored(tmp_path / "variant"))
    with pytest.raises(UserError, match=r"without a sublayer|has no home"):
        export(tmp_path / "variant", "sentence-transformers", tmp_path / "out")


@pytest.mark.parametrize("criterion", ["greedy", "pooled", "influence", "angular"])
def test_each_criterion_finds_the_block_that_does_nothing(make_model, tmp_path: Path, criterion: str) -> None:
    folder = make_model("modernbert")  # four blocks, the first of which has to stay
    idle = 2
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if f"layers.{idle}." in name and name.endswith(("attn.Wo.weight", "mlp.Wo.weight")):
            weights[name] = tensor * 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    compress_to(folder, tmp_path / "variant", Depth(keep=0.75, criterion=criterion))  # type: ignore[arg-type]
    assert VariantInfo.read(tmp_path / "variant").layers == (0, 1, 3)
    assert (encoded(tmp_path / "variant") * encoded(folder)).sum(axis=1).min() > 0.999
    types = json.loads((tmp_path / "variant" / "config.json").read_text())["layer_types"]
    assert types == ["sliding_attention", "full_attention", "full_attention"]


def test_greedy_looks_at_the_rest_anew(make_model, tmp_path: Path) -> None:
    """Leaving out what `greedy` chose costs no more than any other pair that contains its first choice."""
    folder = make_model("modernbert")
    compress_to(folder, tmp_path / "greedy", Depth(keep=0.5))
    kept = VariantInfo.read(tmp_path / "greedy").layers
    assert kept is not None
    chosen = tuple(number for number in range(4) if number not in kept)
    compress_to(folder, tmp_path / "one", Depth(keep=0.75))
    (first,) = {0, 1, 2, 3} - set(VariantInfo.read(tmp_path / "one").layers or ())
    assert first in chosen
    texts = list(calibration_texts()[:24])
    whole, losses = encoded(folder, texts), {}
    for other in {1, 2, 3} - {first}:
        pair = tuple(sorted((first, other)))
        compress_to(folder, tmp_path / f"{other}" / "v", Depth(drop=pair))
        losses[pair] = 1 - float((encoded(tmp_path / f"{other}" / "v", texts) * whole).sum(axis=1).mean())
    assert min(losses, key=losses.__getitem__) == chosen


@pytest.mark.parametrize("kind", ["bert", "mistral", "qwen3", "nv_embed"])
def test_a_head_pruned_attention_is_the_dense_one_with_those_heads_zeroed(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    step = Width(heads=0.5, criterion="magnitude", refit=False)
    compress_to(folder, tmp_path / "variant", step)
    shape = read_shape("tiny", folder)
    anatomy, width = shape.anatomy, shape.head_width
    network, narrow = load_network(folder, torch.float32), load_variant(tmp_path / "variant")
    for block, small in zip(blocks_of(network)[1], blocks_of(narrow)[1], strict=True):
        query, value = (block.get_submodule(anatomy.attention[index]) for index in (0, 2))
        output = block.get_submodule(anatomy.output)
        kept = small.get_submodule(anatomy.attention[2]).weight
        groups = value.weight.shape[0] // width
        assert kept.shape[0] == groups // 2 * width
        shared = query.weight.shape[0] // value.weight.shape[0]
        for group in range(groups):
            own = value.weight[group * width : (group + 1) * width]
            if not any(torch.equal(own, kept[at * width : (at + 1) * width]) for at in range(groups // 2)):
                output.weight.data[:, group * shared * width : (group + 1) * shared * width] = 0
    whole = open_checkpoint(folder, "whole", device="cpu")
    whole.model = network.eval()
    np.testing.assert_allclose(encoded(tmp_path / "variant"), whole.encode(TEXTS), atol=2e-6)
    assert same_names(estimated(folder, step), stored(tmp_path / "variant"))


def load_variant(folder: Path) -> nn.Module:
    from compress.models.opened import empty_model, weights_of

    network = empty_model(folder)
    weights_of(folder, network).fill(network, dtype=torch.float32)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_do_nothing_go_and_nothing_changes(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    anatomy = read_shape("tiny", folder).anatomy
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if name.endswith(f".{anatomy.falling}.weight") and "latent" not in name and "attention." not in name:
                weights[name][:, ::2] = 0
            save_file(weights, path, metadata={"format": "pt"})
    for number, step in enumerate((Width(channels=0.5), Width(channels=0.5, criterion="activation", refit=False))):
        target = tmp_path / str(number) / "variant"
        compress_to(folder, target, step)
        np.testing.assert_allclose(encoded(target), encoded(folder), atol=2e-3 if step.refit else 1e-5)
        assert same_names(estimated(folder, step), stored(target))
        np.testing.assert_array_equal(encoded(target), encoded(target, stream=True))


def correlated(width: int = 64, out: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [out, width], inputs [2000, width] that hang together, and their second moment."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 16, generator=generator) @ torch.randn(16, width, generator=generator)
    inputs += 0.3 * torch.randn(2000, width, generator=generator)
    return torch.randn(out, width, generator=generator), inputs, inputs.t() @ inputs / len(inputs)


def test_the_refit_is_least_squares() -> None:
    weight, inputs, moment = correlated()
    kept = torch.arange(0, 64, 2)
    expected = torch.linalg.lstsq(inputs[:, kept].double(), (inputs @ weight.t()).double()).solution.t().float()
    made = refitted(weight, damped(moment, 1e-9), moment, kept)
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 8])
def test_the_choice_by_error_is_close_to_the_best_there_is(size: int) -> None:
    """One group of few goes: the best is found by trying each; and of many, it beats choosing by size and by activation."""
    weight, inputs, moment = correlated(width=16)
    groups = torch.arange(16).view(-1, size)
    covariance = damped(moment, 1e-6)

    def error(left: torch.Tensor) -> float:
        kept = groups[left].flatten()
        made = refitted(weight, covariance, moment, kept)
        return float((inputs @ weight.t() - inputs[:, kept] @ made.t()).square().mean())

    every = [torch.tensor([one for one in range(len(groups)) if one != gone]) for gone in range(len(groups))]
    best = min(every, key=error)
    assert torch.equal(by_error(weight, covariance, groups, len(groups) - 1), best)


def test_the_refit_takes_back_most_of_what_width_loses(minilm: Path, tmp_path: Path) -> None:
    losses, texts = {}, list(suite_texts()[:64])
    for refit in (True, False):
        target = tmp_path / str(refit) / "variant"
        step = Width(heads=0.75, channels=0.75, criterion="activation", refit=refit)
        compress_to(minilm, target, step, count=160, max_tokens=64)
        losses[refit] = 1 - float((encoded(target, texts) * encoded(minilm, texts)).sum(axis=1).mean())
    assert losses[True] < losses[False] * 2 / 3


def test_dropping_nothing_changes_nothing(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "plain" / "v")
    compress_to(bert, tmp_path / "kept" / "v", Depth(keep=1.0), Width(channels=0.99, heads=0.99))
    plain, kept = (load_file(tmp_path / which / "v" / "model.safetensors") for which in ("plain", "kept"))
    assert plain.keys() == kept.keys()
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    np.testing.assert_array_equal(encoded(tmp_path / "plain" / "v"), encoded(tmp_path / "kept" / "v"))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Depth(keep=0.1), "leaves none of 2 blocks"),
        (Depth(drop=(0, 1)), "leaves none of 2 blocks"),
        (Depth(drop=(5,)), "names block 5; tiny has 0, 1"),
        (Width(heads=0.1), "leaves none of 4 heads"),
        (Latents(keep=0.5), "no folded latent-attention head"),
        (MeanPooling(), "no latent-attention head"),
    ],
)
def test_what_leaves_nothing_is_refused(bert: Path, step: Method, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        step.estimate(read_shape("tiny", bert))


def test_keys_that_contradict_each_other_are_refused() -> None:
    for wrong in ({}, {"keep": 0.5, "drop": (1,)}, {"drop": (1, 1)}, {"keep": 0.5, "criterion": "angular", "what": "mlp"}):
        with pytest.raises(ValidationError):
            Depth(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="keeps everything"):
        Width()
    with pytest.raises(UserError, match=r"steps: .*steps.1 \(depth\) changes the model as a whole; put it before rtn"):
        parse_recipe({"steps": [{"method": "rtn"}, {"method": "depth", "keep": 0.5}]})


def test_the_first_block_of_modernbert_stays(make_model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers\.0 has other tensors than"):
        compress_to(make_model("modernbert"), tmp_path / "variant", Depth(drop=(0,)))


@pytest.mark.parametrize("kind", ["bert", "mistral", "qwen3", "modernbert"])
def test_elsewhere_it_is_an_ordinary_smaller_model(model_of, tmp_path: Path, kind: str) -> None:
    folder = model_of(kind)
    steps: list[Method] = [Depth(drop=(1,)), Width(channels=0.5, heads=0.5 if kind in ("mistral", "qwen3") else 1.0)]
    compress_to(folder, tmp_path / "run" / "variant", *steps)
    export(tmp_path / "run", "sentence-transformers", tmp_path / "out", check=False)
    network, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    assert not report["unexpected_keys"]
    assert len(blocks_of(network)[1]) == len(read_shape("tiny", folder).layers) - 1
    elsewhere = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": torch.float32}).encode(TEXTS)
    np.testing.assert_allclose(elsewhere, encoded(tmp_path / "run" / "variant"), atol=1e-5)
    # And a workbench that is given the folder knows no more of it than that.
    np.testing.assert_allclose(encoded(tmp_path / "out"), elsewhere, atol=1e-5)


def test_bert_without_heads_runs_here_and_is_not_exported(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "run" / "variant", Width(heads=0.5))
    with pytest.raises(UserError, match="it has 2 heads a block, which a bert config cannot say"):
        export(tmp_path / "run", "sentence-transformers", tmp_path / "out")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_a_narrow_and_shallow_model_runs_without_torch(model_of, tmp_path: Path, kind: str, runtime: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    target = tmp_path / "variant"
    compress_to(
        model_of(kind), target, Depth(what="mlp", drop=(0,)), Width(channels=0.5, heads=0.5), RTN(bits=8, activations="none")
    )
    lower(target, runtime)
    np.testing.assert_allclose(encoded(target, runtime=runtime), encoded(target), atol=1e-4)


def test_the_latents_that_stay_are_those_with_most_attention(nv_embed: Path, tmp_path: Path) -> None:
    compress_to(nv_embed, tmp_path / "folded", Fold())
    compress_to(nv_embed, tmp_path / "few", Fold(), Latents(keep=0.25), max_tokens=1000)
    whole, few = (load_variant(tmp_path / which).latent_attention_model for which in ("folded", "few"))
    embedder = compress.load(str(tmp_path / "folded"), device="cpu")
    attention: list[torch.Tensor] = []
    embedder.model.latent_attention_model.values.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda _, given: attention.append(given[0])
    )
    prompts = list(dict.fromkeys(embedder.spec.prompts.values()))
    for index, text in enumerate(calibration_texts()[:24]):
        embedder.encode([text], prompt=prompts[index % len(prompts)])
    rows = torch.arange(whole.heads * whole.scores.out_features // whole.heads).view(whole.heads, -1)
    mass = torch.cat(attention).mean(dim=0)
    best = torch.cat([one[mass[one].argsort(descending=True)[: len(one) // 4].sort().values] for one in rows])
    assert torch.equal(few.scores.weight, whole.scores.weight[best])
    assert torch.equal(few.values.weight, whole.values.weight[:, best])
    assert estimated(nv_embed, Fold(), Latents(keep=0.25)) == stored(tmp_path / "few")
    assert np.isfinite(encoded(tmp_path / "few")).all()


def test_a_head_that_adds_nothing_goes_unnoticed(nv_embed: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(nv_embed)
    name = "latent_attention_model.cross_attend_blocks.0.fn.to_out.weight"
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            heads = read_nv_config(folder)[1]["num_cross_heads"]
            weights[name].view(len(weights[name]), heads, -1)[:, : heads // 2] = 0
            save_file(weights, path, metadata={"format": "pt"})
    compress_to(folder, tmp_path / "v", Fold(), Latents(heads=0.5))
    assert estimated(nv_embed, Fold(), Latents(heads=0.5)) == stored(tmp_path / "v")
    np.testing.assert_allclose(encoded(tmp_path / "v"), encoded(folder), atol=2e-3)


def test_without_its_head_nv_embed_is_a_mistral_that_looks_both_ways(nv_embed: Path, tmp_path: Path) -> None:
    compress_to(nv_embed, tmp_path / "v", MeanPooling(), RTN(bits=8, activations="none"))
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    network = open_checkpoint(nv_embed, "whole", device="cpu")
    prompt = next(text for text in network.spec.prompts.values() if text)
    compress_to(nv_embed, tmp_path / "plain" / "v", MeanPooling())
    assert estimated(nv_embed, MeanPooling()) == stored(tmp_path / "plain" / "v")
    made = compress.load(str(tmp_path / "plain" / "v"), device="cpu").encode(TEXTS[:3], prompt=prompt)
    length = len(network.tokenizer([prompt])[0]) - 1  # with the token that begins a text, without the one that ends it
    for text, vector in zip(TEXTS[:3], made, strict=True):
        ids = torch.from_numpy(network.tokenizer([prompt + text])[0])[None]
        hidden = network.hidden(ids, torch.ones_like(ids))[0, length:]
        np.testing.assert_allclose(vector, F.normalize(hidden.mean(dim=0), dim=0).detach().numpy(), atol=2e-3)
    export(tmp_path / "plain" / "v", "sentence-transformers", tmp_path / "out", check=False)
    elsewhere = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": torch.float32})
    np.testing.assert_allclose(elsewhere.encode(TEXTS[:3], prompt=prompt), made, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "nv_embed"])
def test_texts_that_need_no_dropped_token_keep_their_vectors(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    compress_to(folder, tmp_path / "v", Vocabulary(texts=str(tmp_path / "texts.txt")))
    whole, small = (compress.load(str(path), device="cpu") for path in (folder, tmp_path / "v"))
    np.testing.assert_allclose(small.encode(TEXTS), whole.encode(TEXTS), atol=1e-6)
    unseen = ["a quite different sentence about umbrellas", "☂ 雨"]
    assert np.isfinite(small.encode(unseen)).all()
    info, config = VariantInfo.read(tmp_path / "v"), json.loads((tmp_path / "v" / "config.json").read_text())
    kept = info.steps[0]["tokens"]
    table = read_shape("v", tmp_path / "v").token_table
    assert stored(tmp_path / "v")[f"{table}.weight"][0] == kept == (config.get("text_config") or config)["vocab_size"]
    assert kept < stored_rows(folder)
    step = Vocabulary(texts=str(tmp_path / "texts.txt"), tokens=kept)
    assert same_names(estimated(folder, step), stored(tmp_path / "v"))


def stored_rows(folder: Path) -> int:
    shape = read_shape("tiny", folder)
    return shape.tensors[f"{shape.token_table}.weight"].shape[0]


def test_a_block_runs_without_a_sublayer_only_for_a_while(bert: Path) -> None:
    block = blocks_of(load_network(bert, torch.float32))[1][0]
    before = [name for name, _ in block.named_modules()]
    with without(block, ["mlp", "attention"]):
        assert "intermediate.dense" not in dict(block.named_modules())
    assert [name for name, _ in block.named_modules()] == before


def test_width_after_quantizing_is_refused(bert: Path) -> None:
    with pytest.raises(ValueError, match="is quantized by an earlier step; put width before it"):
        Width(channels=0.5).estimate(RTN().estimate(read_shape("tiny", bert)).after)
