"""Rotations: nothing changes, in any network whose residual stream can be rotated, and others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tests_support import TEXTS, compress_to, encoded, estimated_shapes, folder_of, same_names, stored_shapes
from torch import nn

from compress.calibration.texts import CalibrationSource
from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.data.texts import calibration_texts
from compress.export import export
from compress.methods.base import Bench
from compress.methods.nv_embed.fold import Fold
from compress.methods.prune.magnitude import Magnitude
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.rtn import RTN
from compress.methods.quantize.smoothquant import SmoothQuant
from compress.methods.residual_stream import unit_of
from compress.methods.rotate import Rotate
from compress.models.network.build import load_network
from compress.models.network.pooling import vectors_of
from compress.models.network.segments import blocks_of, segments_of
from compress.models.network.walk import Streamed
from compress.models.opened import open_model
from compress.models.text.tokens import pad_batch
from compress.pipeline.apply import make_variant
from compress.pipeline.stage import BuildOptions
from compress.runtimes.lower import lower

ROTATED = ["mistral", "qwen2", "qwen3", "llama", "gemma", "t5", "nv_embed"]
STREAM = "the residual stream cannot be rotated, because"


def bench(folder: Path) -> Bench:
    return Bench(lambda make: make(), folder, None, lambda _: None, frozenset, lambda _: None)  # type: ignore[arg-type]


def rotated(folder: Path, place: Path, step: Rotate) -> nn.Module:
    """The rotated network of a model in float32, before it is rounded to be stored."""
    step, model = step.prepare(open_model(folder_of(folder)), None, bench(place))  # type: ignore[arg-type]
    network = model.network
    source = Streamed(network, model.weights)
    for segment in segments_of(network):
        parts = source.load(segment)
        step.apply(parts)
        for path, module in parts.items():
            network.set_submodule(path, module)
    return network.float().eval()


@torch.no_grad()
def vectors(network: nn.Module, folder: Path) -> torch.Tensor:
    ids, mask = (torch.from_numpy(array) for array in pad_batch(folder_of(folder).tokenizer(TEXTS)))
    return vectors_of(network, ids, mask, mask)


def outliers(folder: Path) -> Path:
    """Give norms weights that differ, else they would commute with any rotation, and layers biases where they have some."""
    generator = torch.Generator().manual_seed(1)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dim() == 1 and "latent" not in name:
                tensors[name] = tensor + 0.5 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def model(model_of, copy_of) -> Callable[[str], Path]:
    return lambda kind: outliers(copy_of(model_of(kind)))


@pytest.mark.parametrize("kind", ROTATED)
@pytest.mark.parametrize("step", [Rotate(heads=False), Rotate(stream=False), Rotate()], ids=["stream", "heads", "both"])
def test_a_rotated_network_gives_the_same_vectors(model, tmp_path: Path, kind: str, step: Rotate) -> None:
    folder = model(kind)
    expected = vectors(load_network(folder_of(folder), torch.float32).eval(), folder)
    made = rotated(folder, tmp_path, step)
    torch.testing.assert_close(vectors(made, folder), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    anatomy = folder_of(folder).shape.anatomy
    value, output = anatomy.attention[-1], anatomy.output
    expected_changes = {f"{value}.weight", f"{output}.weight", *([f"{value}.bias"] if step.heads and kind == "qwen2" else [])}
    if step.stream:
        layers = (*anatomy.attention, *anatomy.up, anatomy.down, *anatomy.norms.values())
        expected_changes |= {f"{layer}.weight" for layer in layers}
    before = blocks_of(load_network(folder_of(folder), torch.float32))[1][0].state_dict()
    after = blocks_of(made)[1][0].state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == expected_changes


@pytest.mark.parametrize("kind", ["mistral", "nv_embed"])
def test_without_the_matrix_after_the_final_norm_the_vectors_are_others(model, tmp_path: Path, kind: str) -> None:
    folder = model(kind)
    made = rotated(folder, tmp_path, Rotate())
    expected = vectors(made, folder)
    (name,) = (name for name in made.state_dict() if name in ("unrotate.weight", "text_head.after.0.linear.weight"))
    made.get_parameter(name).data = torch.eye(len(made.get_parameter(name)))
    assert float(nn.functional.cosine_similarity(vectors(made, folder), expected).mean()) < 0.5


@pytest.mark.parametrize("kind", [pytest.param("mistral", marks=pytest.mark.slow), "gemma", "nv_embed"])
def test_a_rotated_variant_streams_exports_and_quantizes(model, tmp_path: Path, kind: str) -> None:
    folder = model(kind)
    expected = encoded(folder)
    compress_to(folder, tmp_path / "variant", Rotate())
    made = encoded(tmp_path / "variant")
    assert float((made * expected).sum(axis=1).min()) > 0.9999  # the rotated weights are rounded to float16 anew
    np.testing.assert_array_equal(made, encoded(tmp_path / "variant", stream=True))
    assert same_names(estimated_shapes(folder, Rotate()), stored_shapes(tmp_path / "variant"))
    assert folder_of(tmp_path / "variant").spec.rotated == (kind == "nv_embed")
    if kind == "nv_embed":
        for layout in ("sentence-transformers", "nv-embed"):
            with pytest.raises(UserError, match=r"cannot be (written|stored)"):
                export(tmp_path / "variant", layout, tmp_path / layout)
    else:
        export(tmp_path / "variant", "sentence-transformers", tmp_path / "out", check=False)
        elsewhere = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": torch.float32})
        np.testing.assert_allclose(elsewhere.encode(TEXTS), made, atol=1e-5)
    compress_to(folder, tmp_path / "int8", Rotate(), SmoothQuant(activations="static_per_tensor"))
    assert float((encoded(tmp_path / "int8") * expected).sum(axis=1).min()) > 0.98


@pytest.mark.parametrize("runtime", ["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_a_rotated_nv_embed_folds_and_runs_as_a_graph(model, tmp_path: Path, runtime: str) -> None:
    folder = model("nv_embed")
    compress_to(folder, tmp_path / "variant", Fold(), Rotate())
    if runtime != "torch":
        lower(folder_of(tmp_path / "variant"), runtime)
    made = encoded(tmp_path / "variant", runtime=runtime)
    np.testing.assert_allclose(made, encoded(tmp_path / "variant"), atol=1e-5)
    assert float((made * encoded(folder)).sum(axis=1).min()) > 0.9999
    with pytest.raises(ValueError, match="is rotated already"):
        Rotate().estimate(folder_of(tmp_path / "variant").shape)


def test_a_killed_walk_goes_on_to_the_same_variant(model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = model("mistral")
    steps = (Rotate(), SmoothQuant(activations="static_per_tensor"))
    compress_to(folder, tmp_path / "whole" / "variant", *steps)
    texts = CalibrationSource(calibration_texts()[:24], None, 120)
    journal, said = Journal(tmp_path / "journal"), []

    def make(say: Callable[[str], None]) -> None:
        options = BuildOptions("0", say, calibration=texts)
        make_variant(folder_of(folder), folder_of(folder).shape, steps, tmp_path / "variant", journal, options)

    with monkeypatch.context() as patch:
        patch.setattr(Rotate, "apply", _killed_at_the_third(Rotate.apply, said))
        with pytest.raises(KeyboardInterrupt):
            make(lambda _: None)
    assert len(said) == 3
    make(lambda _: None)
    whole, continued = (load_file(tmp_path / place / "model.safetensors") for place in ("whole/variant", "variant"))
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def _killed_at_the_third(apply: Callable[..., object], calls: list[str]) -> Callable[..., object]:
    def killed(*arguments: object) -> object:
        calls.append("")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return apply(*arguments)

    return killed


def test_a_dense_module_takes_the_rotation_back(model, tmp_path: Path) -> None:
    folder = model("mistral")
    entries = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*entries[:2], dense]))
    (folder / "2_Dense").mkdir()
    settings = {"in_features": 48, "out_features": 20, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    tensors = {"linear.weight": torch.randn(20, 48) / 7, "linear.bias": torch.randn(20)}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    expected = vectors(load_network(folder_of(folder), torch.float32).eval(), folder)
    made = rotated(folder, tmp_path, Rotate())
    torch.testing.assert_close(vectors(made, folder), expected, rtol=0, atol=1e-5)
    assert len(made.text_head.after) == 1
    compress_to(folder, tmp_path / "variant", Rotate())
    assert same_names(estimated_shapes(folder, Rotate()), stored_shapes(tmp_path / "variant"))


@pytest.mark.parametrize("kind", ["bert", "gemma3_text", "modernbert"])
def test_streams_that_do_not_commute_with_a_rotation_are_refused(model_of, tmp_path: Path, kind: str) -> None:
    folder = model_of(kind)
    with pytest.raises(ValueError, match=r"norms .*(subtract|weigh)"):
        Rotate().estimate(folder_of(folder).shape)
    if kind == "modernbert":
        return
    with pytest.raises(ValueError, match="`stream: false` rotates the values"):
        Rotate().estimate(folder_of(folder).shape)
    step = Rotate(stream=False)
    step.estimate(folder_of(folder).shape)
    expected = vectors(load_network(folder_of(folder), torch.float32).eval(), folder)
    torch.testing.assert_close(vectors(rotated(folder, tmp_path, step), folder), expected, rtol=0, atol=1e-5)


def test_blocks_with_more_or_fewer_norms_than_two_are_refused(model_of) -> None:
    shape = folder_of(model_of("mistral")).shape
    first = next(name for name in shape.tensors if name.endswith("post_attention_layernorm.weight"))
    parallel = {name: info for name, info in shape.tensors.items() if name != first}
    with pytest.raises(ValueError, match=f"{STREAM} block 0 has no post_attention_layernorm before its mlp"):
        Rotate().estimate(replace(shape, tensors=parallel))
    more = {**shape.tensors, first.replace("post_attention", "other"): shape.tensors[first]}
    with pytest.raises(ValueError, match=f"{STREAM} it is not known what other_layernorm.weight of block 0 does"):
        Rotate().estimate(replace(shape, tensors=more))


def test_what_was_rounded_or_pruned_before_is_refused(model_of) -> None:
    shape = folder_of(model_of("mistral")).shape
    for earlier, reason in ((RTN(), "quantized"), (Embeddings(), "quantized"), (Magnitude(sparsity=0.5), "pruned")):
        with pytest.raises(ValueError, match=f"is {reason} by an earlier step.*put rotate before it"):
            Rotate().estimate(earlier.estimate(shape).after)


def test_norms_are_told_apart_by_what_they_do() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    assert unit_of(MistralRMSNorm(48)) == 1
    assert unit_of(GemmaRMSNorm(48)) == 0
    with pytest.raises(ValueError, match="LayerNorm is not an RMSNorm"):
        unit_of(nn.LayerNorm(48, bias=False))


def test_a_step_that_rotates_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rotates nothing"):
        Rotate(stream=False, heads=False)
