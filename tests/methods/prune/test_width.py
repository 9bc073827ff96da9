"""Width pruning: heads and channels that go, and the layers that read the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
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
from compress.models.files.variant import BlockSizes, VariantInfo
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


BLOCKS = {"*.0": {"channels": 0.5}, "*.1": {"heads": 0.5}}


@pytest.mark.parametrize("kind", ["bert", "mistral", "nv_embed"])
def test_blocks_have_widths_of_their_own(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    shape = folder_of(folder).shape
    anatomy, width = shape.anatomy, shape.head_width
    for path in folder.glob(
        "*.safetensors"
    ):  # every other channel of block 0 does nothing, nor does the second half of block 1's heads
        weights = load_file(path)
        for name, weight in weights.items():
            if name.endswith(f".0.{anatomy.down}.weight") and "latent" not in name:
                weight[:, ::2] = 0
            if name.endswith(f".1.{anatomy.output}.weight") and "latent" not in name:
                weight[:, weight.shape[1] // 2 :] = 0
        save_file(weights, path, metadata={"format": "pt"})
    step = Width(overrides=BLOCKS, criterion="activation", refit=False)
    target = tmp_path / "run" / "variant"
    compress_to(folder, target, step)
    np.testing.assert_allclose(encoded(target), encoded(folder), atol=1e-5)
    np.testing.assert_array_equal(encoded(target), encoded(target, stream=True))
    assert same_names(estimated_shapes(folder, step), stored_shapes(target))
    first, second, *_ = blocks_of(network_of(target))[1]
    channels, heads = first.get_submodule(anatomy.down).in_features, second.get_submodule(anatomy.output).in_features
    assert 2 * channels == second.get_submodule(anatomy.down).in_features
    assert 2 * heads == first.get_submodule(anatomy.output).in_features
    assert {one.block: (one.channels, one.heads) for one in folder_of(target).compressed.blocks}[1] == (
        2 * channels,
        heads // width,
    )
    layout = "nv-embed" if kind == "nv_embed" else "sentence-transformers"
    with pytest.raises(UserError, match="it has blocks of different widths"):
        export(tmp_path / "run", layout, tmp_path / "out")


def test_blocks_that_end_alike_are_an_ordinary_smaller_model(bert: Path, tmp_path: Path) -> None:
    steps = [Width(overrides={f"*.{block}": {"channels": 0.5}}, heads=heads) for block, heads in ((0, 0.5), (1, 1.0))]
    compress_to(bert, tmp_path / "variant", *steps)
    folder = folder_of(tmp_path / "variant")
    assert (folder.config["intermediate_size"], folder.compressed.heads, folder.compressed.blocks) == (40, 2, ())
    assert same_names(estimated_shapes(bert, *steps), stored_shapes(tmp_path / "variant"))
    assert folder.compressed.weights == "float16 0.5 of heads 0.5/1 of channels 0.5/1 of channels"


def test_sizes_that_a_block_cannot_have_are_refused(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant", Width(overrides=BLOCKS))
    info = VariantInfo.read(tmp_path / "variant")
    for wrong, words in (
        (BlockSizes(block=7), "variant.json: block 7, and config.json has 2 blocks"),
        (BlockSizes(block=1, heads=4, key_heads=3), "its attention cannot have 4 heads, and 3 of keys and values"),
        (BlockSizes(block=1, channels=10**6), "its network needs"),
    ):
        info.model_copy(update={"blocks": (wrong,)}).write(tmp_path / "variant")
        with pytest.raises(UserError, match=words):
            network_of(tmp_path / "variant")


def test_overrides_of_width_are_read_as_they_were_written(bert: Path) -> None:
    shape = folder_of(bert).shape
    with pytest.raises(ValueError, match=r"overrides '\*\.9' matches none of the model's 2 blocks, such as 'encoder\.layer\.0'"):
        Width(channels=0.5, overrides={"*.9": {"heads": 0.5}}).estimate(shape)
    with pytest.raises(ValidationError, match="sets nothing"):
        Width(channels=0.5, overrides={"*.0": {}})
    with pytest.raises(ValidationError, match="keeps everything"):
        Width(overrides={"*.0": {"heads": 1.0}})
    step = Width(channels=0.5, overrides={"*.0": {"heads": 0.5}})
    again = Width.model_validate_json(step.model_dump_json())
    assert again.estimate(shape).after.tensors == step.estimate(shape).after.tensors
    assert step.shares_of("encoder.layer.0") == {"channels": 0.5, "heads": 0.5}
    assert step.estimate(shape).note.startswith("40 channels and 2 to 4 heads kept in each block")


def test_width_after_quantizing_is_refused(bert: Path) -> None:
    with pytest.raises(ValueError, match="is quantized by an earlier step; put width before it"):
        Width(channels=0.5).estimate(RTN().estimate(folder_of(bert).shape).after)
