"""Width pruning: heads and channels that go, and the layers that read the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import (
    TEXTS,
    compress_to,
    encoded,
    estimated_shapes,
    folder_of,
    half_exact,
    network_of,
    same_names,
    stored_shapes,
)

from compress.common.errors import UserError
from compress.data.texts import suite_texts
from compress.export import export
from compress.methods.prune.width import Width
from compress.methods.quantize.rtn import RTN
from compress.models.folder import ModelFolder
from compress.models.network.build import load_network
from compress.models.network.segments import blocks_of
from compress.runtimes.torch_runtime import open_checkpoint

KINDS = ["bert", "mistral", "qwen3", "modernbert", "gemma3_text", "nv_embed"]


@pytest.mark.parametrize("kind", ["bert", "mistral", "qwen3", "nv_embed"])
def test_a_head_pruned_attention_is_the_dense_one_with_those_heads_zeroed(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    step = Width(heads=0.5, criterion="magnitude", refit=False)
    compress_to(folder, tmp_path / "variant", step)
    shape = folder_of(folder).shape
    anatomy, width = shape.anatomy, shape.head_width
    network, narrow = load_network(folder_of(folder), torch.float32), network_of(tmp_path / "variant", torch.float32)
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
    whole = open_checkpoint(ModelFolder("whole", folder), device="cpu")
    whole.model = network.eval()
    np.testing.assert_allclose(encoded(tmp_path / "variant"), whole.encode(TEXTS), atol=2e-6)
    assert same_names(estimated_shapes(folder, step), stored_shapes(tmp_path / "variant"))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_do_nothing_go_and_nothing_changes(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    anatomy = folder_of(folder).shape.anatomy
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for name in weights:
            if name.endswith(f".{anatomy.down}.weight") and "latent" not in name and "attention." not in name:
                weights[name][:, ::2] = 0
            save_file(weights, path, metadata={"format": "pt"})
    for number, step in enumerate((Width(channels=0.5), Width(channels=0.5, criterion="activation", refit=False))):
        target = tmp_path / str(number) / "variant"
        compress_to(folder, target, step)
        np.testing.assert_allclose(encoded(target), encoded(folder), atol=2e-3 if step.refit else 1e-5)
        assert same_names(estimated_shapes(folder, step), stored_shapes(target))
        np.testing.assert_array_equal(encoded(target), encoded(target, stream=True))


@pytest.mark.slow
def test_the_refit_takes_back_most_of_what_width_loses(minilm: Path, tmp_path: Path) -> None:
    losses, texts = {}, list(suite_texts()[:64])
    for refit in (True, False):
        target = tmp_path / str(refit) / "variant"
        step = Width(heads=0.75, channels=0.75, criterion="activation", refit=refit)
        compress_to(minilm, target, step, count=160, max_tokens=64)
        losses[refit] = 1 - float((encoded(target, texts) * encoded(minilm, texts)).sum(axis=1).mean())
    assert losses[True] < losses[False] * 2 / 3


def test_bert_without_heads_runs_here_and_is_not_exported(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "run" / "variant", Width(heads=0.5))
    with pytest.raises(UserError, match="it has 2 heads a block, which a bert config cannot say"):
        export(tmp_path / "run", "sentence-transformers", tmp_path / "out")


def test_width_after_quantizing_is_refused(bert: Path) -> None:
    with pytest.raises(ValueError, match="is quantized by an earlier step; put width before it"):
        Width(channels=0.5).estimate(RTN().estimate(folder_of(bert).shape).after)
