"""Variants on disk: what is opened is what was saved, in the memory it was saved in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import apply_in_memory, compress_to, folder_of

import compress
from compress.common.errors import UserError
from compress.layers.quantized_linear import QuantizedLinear
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VariantInfo
from compress.models.network.build import load_network
from compress.runtimes import torch_embedder
from compress.runtimes.torch_embedder import TorchEmbedder
from compress.runtimes.torch_runtime import check_device, prepare

SCHEMES = ["none", "dynamic_per_tensor", "dynamic_per_token"]


@pytest.mark.parametrize("kind", ["bert", "mistral"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_opened_variant_is_the_one_that_was_saved(make_model, mixed_texts, tmp_path: Path, kind: str, scheme: str) -> None:
    folder = make_model(kind, prompts={"query": "find: "})
    compress_to(folder, tmp_path / "variant", RTN(activations=scheme))
    network = load_network(folder_of(folder), torch.float32)
    apply_in_memory(network, RTN(activations=scheme))
    # What the file holds, in memory: floating tensors rounded to half precision, scales as they were.
    for module in network.modules():
        if not hasattr(module, "weight_scale"):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half().float()
        elif module.bias is not None:
            module.bias = module.bias.half().float()
    cpu = torch.device("cpu")
    in_memory = TorchEmbedder(folder_of(folder), prepare(network, torch.float32, cpu), cpu, torch.float32)
    opened = compress.load(str(tmp_path / "variant"), device="cpu")
    assert opened.spec == folder_of(folder).spec
    texts = mixed_texts[:40]
    np.testing.assert_allclose(opened.encode(texts), in_memory.encode(texts), atol=2e-6)
    baseline = compress.load(str(folder), device="cpu").encode(texts)
    cosine = (opened.encode(texts) * baseline).sum(axis=1)
    assert 0.98 < cosine.min() < cosine.max() < 1 - 1e-7


def test_no_steps_give_the_model_in_half_precision(bert: Path, mixed_texts: list[str], tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant")
    opened, baseline = (
        compress.load(str(folder), device="cpu").encode(mixed_texts[:20]) for folder in (tmp_path / "variant", bert)
    )
    np.testing.assert_allclose(opened, baseline, atol=2e-3)
    assert {info.dtype for info in folder_of(tmp_path / "variant").headers.values()} == {"F16"}


@pytest.mark.parametrize("kind", ["bert", "mistral"])
@pytest.mark.parametrize("step", [RTN(), RTN(activations="none")], ids=["w8a8", "w8"])
def test_the_estimate_is_the_size_of_the_file(make_model, tmp_path: Path, kind: str, step: RTN) -> None:
    folder = make_model(kind)
    compress_to(folder, tmp_path / "variant", step)
    stored = sum(info.bytes for info in folder_of(tmp_path / "variant").headers.values())
    assert step.estimate(folder_of(folder).shape).after.bytes == stored


def test_integers_are_stored_as_integers(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant", RTN())
    tensors = load_file(tmp_path / "variant" / "model.safetensors")
    assert tensors["encoder.layer.0.output.dense.weight"].dtype == torch.int8
    assert tensors["encoder.layer.0.output.dense.weight_scale"].dtype == torch.float32
    assert tensors["embeddings.word_embeddings.weight"].dtype == torch.float16
    info = VariantInfo.read(tmp_path / "variant")
    assert (info.weights, info.activations) == ("int8", "dynamic_per_token")


def test_a_weight_too_large_for_half_precision_is_refused(bert: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(bert)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.weight"][0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"embeddings\.LayerNorm\.weight is not finite in float16"):
        compress_to(folder, tmp_path / "variant")
    assert not (tmp_path / "variant").exists()


def test_a_variant_that_does_not_fit_its_network_is_refused(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant", RTN())
    path = tmp_path / "variant" / "variant.json"
    info = json.loads(path.read_text())
    del info["quantized"]["encoder.layer.0.output.dense"]
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"does not fit its network: 1 tensors differ.*weight_scale"):
        compress.load(str(tmp_path / "variant"), device="cpu")
    path.write_text(json.dumps(info | {"format": 2}))
    with pytest.raises(UserError, match=r"variant\.json: format"):
        compress.load(str(tmp_path / "variant"), device="cpu")


def test_an_apple_gpu_takes_floating_point_and_integer_weights_alone(bert: Path, tmp_path: Path) -> None:
    apple = torch.device("mps")
    for name, step in {"int8": RTN(), "fp8": FP8(), "weights": RTN(activations="none")}.items():
        compress_to(bert, tmp_path / name, step)
    for name in ("int8", "fp8"):
        with pytest.raises(UserError, match=rf"device 'mps' has no product of {name} with activations .*layer .*attention"):
            check_device(folder_of(tmp_path / name), apple)
    check_device(folder_of(tmp_path / "weights"), apple)
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="sees no Apple GPU"):
            compress.load(str(bert), device="mps")


def test_a_card_without_fp8_products_says_so(bert: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    compress_to(bert, tmp_path / "fp8", FP8())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    check_device(folder_of(tmp_path / "fp8"), torch.device("cuda:7"))
    assert "A100 (compute capability 8.0) has no FP8 products" in capsys.readouterr().err
    check_device(folder_of(tmp_path / "fp8"), torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_a_device_that_is_not_there_is_refused(bert: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="sees no GPU"):
        compress.load(str(bert), device="cuda")


MEMORY = """
import json, sys
from compress.runtimes.loading import load, preload
from compress.common.memory import PeakAnonymous, anonymous_bytes, release_free_pages
from compress.data.texts import mixed_texts
texts = mixed_texts(200, 0)
preload(sys.argv[1])
release_free_pages()
before = anonymous_bytes()
embedder = load(sys.argv[1], device="cpu")
release_free_pages()
loaded = anonymous_bytes() - before
with PeakAnonymous() as peak:
    embedder.encode(texts)
print(json.dumps({"loaded": loaded, "peak": peak.bytes - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell anonymous memory")
def test_a_loaded_variant_takes_no_more_than_its_file_and_activations(minilm: Path, tmp_path: Path) -> None:
    from compress.pipeline.plan import make_plan
    from compress.pipeline.recipe_file import parse_recipe

    compress_to(minilm, tmp_path / "variant", RTN())
    stored = (tmp_path / "variant" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "variant")]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert measured["loaded"] <= stored
    plan = make_plan(parse_recipe({"steps": [{"method": "rtn"}]}), folder_of(minilm).shape, tmp_path)
    assert measured["peak"] <= plan.run_memory_bytes


def test_unpacking_once_is_asked_for_and_changes_no_vector(
    bert: Path, mixed_texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress_to(bert, tmp_path / "variant", RTN(bits=4, group_size=16, activations="none"))
    embedder = compress.load(tmp_path / "variant", device="cpu")
    assert isinstance(embedder, TorchEmbedder)
    expected = embedder.encode(mixed_texts[:40])
    layers = [module for module in embedder.model.modules() if isinstance(module, QuantizedLinear)]
    assert all(layer.weight is not None for layer in layers)  # four bits stay four bits until somebody asks
    with monkeypatch.context() as patch:
        patch.setattr(torch_embedder, "available_memory_bytes", lambda: 1)
        with pytest.raises(UserError, match=r"takes .* of memory unpacked, 0.0 MB are free") as refused:
            embedder.unpack()
        assert "packed" in refused.value.hint
    assert all(layer.weight is not None for layer in layers)
    embedder.unpack()
    monkeypatch.setattr(QuantizedLinear, "dequantized", lambda *_: pytest.fail("unpacked in a call"))
    assert np.array_equal(embedder.encode(mixed_texts[:40]), expected)
    plain = compress.load(str(bert), device="cpu")
    assert isinstance(plain, TorchEmbedder)
    with pytest.raises(UserError, match="there is nothing to unpack"):
        plain.unpack()
