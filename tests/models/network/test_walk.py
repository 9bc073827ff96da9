"""One walk over the segments: streamed as resident, continued as uninterrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import compress_to, folder_of
from torch import nn
from transformers import AutoConfig, AutoModel

import compress
from compress.common.errors import UserError
from compress.methods.quantize.rtn import RTN
from compress.models.network.build import load_network
from compress.models.network.segments import Kind, Parts, Segment, segments_of
from compress.models.network.walk import Carry, Resident, Streamed, walk
from compress.models.opened import empty_model, weights_of
from compress.pipeline import stage
from compress.pipeline.recipe_file import parse_recipe
from compress.runtimes.streamed import StreamedEmbedder

KINDS = ["bert", "roberta", "modernbert", "mistral", "llama", "qwen2", "qwen3", "gemma3_text"]
# Equal lengths and unequal ones: a batch with padding has a mask, one without may have none and rely on `is_causal`.
TEXTS = ["a parcel came late", "the parcel came late", "", "why " * 30, "日本語 and more", "one more text about the weather"] * 4
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "spilled"),
    [
        *((kind, False) for kind in KINDS),
        *(pytest.param(kind, True, marks=[] if kind in ("bert", "gemma3_text") else [pytest.mark.slow]) for kind in KINDS),
    ],
)
def test_streamed_vectors_are_the_resident_ones_bit_for_bit(make_model, cache: Path, kind: str, spilled: bool) -> None:
    folder = str(make_model(kind))
    resident, streamed = compress.load(folder, device="cpu"), compress.load(folder, device="cpu", stream=True)
    assert isinstance(streamed, StreamedEmbedder)
    streamed._hidden_bytes = 0 if spilled else 10**9
    for batch_tokens in (1, 200):
        np.testing.assert_array_equal(
            streamed.encode(TEXTS, batch_tokens=batch_tokens), resident.encode(TEXTS, batch_tokens=batch_tokens)
        )
    assert list(cache.iterdir()) == []  # what was spilled is gone


@pytest.mark.parametrize("kind", ["bert", "mistral"])
@pytest.mark.parametrize("scheme", ["none", "dynamic_per_token"])
def test_variants_stream_too(make_model, tmp_path: Path, kind: str, scheme: str) -> None:
    compress_to(make_model(kind), tmp_path / "variant", RTN(activations=scheme))
    resident, streamed = (compress.load(str(tmp_path / "variant"), device="cpu", stream=stream) for stream in (False, True))
    np.testing.assert_array_equal(streamed.encode(TEXTS), resident.encode(TEXTS))


def test_a_model_stored_under_a_task_s_head_streams(make_model, copy_of) -> None:
    """Names with a prefix, a head that is not ours, and a layer norm's old names."""
    from safetensors.torch import load_file, save_file

    folder = copy_of(make_model("bert"))
    expected = compress.load(str(folder), device="cpu").encode(TEXTS)
    tensors = load_file(folder / "model.safetensors")
    legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in legacy.items():
            name = name.replace(new, old)
        renamed[f"bert.{name}"] = tensor
    save_file({**renamed, "cls.predictions.bias": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(compress.load(str(folder), device="cpu", stream=True).encode(TEXTS), expected)


def test_segments_of_an_encoder_and_a_decoder(make_model) -> None:
    bert, mistral = (segments_of(load_network(folder_of(make_model(kind)), torch.float32)) for kind in ("bert", "mistral"))
    assert [(segment.kind, segment.paths) for segment in bert] == [
        (Kind.EMBEDDINGS, ("embeddings",)),
        (Kind.BLOCK, ("encoder.layer.0",)),
        (Kind.BLOCK, ("encoder.layer.1",)),
    ]
    assert [(segment.kind, segment.paths) for segment in mistral] == [
        (Kind.EMBEDDINGS, ("embed_tokens",)),
        (Kind.BLOCK, ("layers.0",)),
        (Kind.BLOCK, ("layers.1",)),
        (Kind.NORM, ("norm",)),
    ]


def test_what_is_no_list_of_blocks_is_refused() -> None:
    config = AutoConfig.for_model(
        "albert", vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, embedding_size=8
    )
    with pytest.raises(UserError, match="AlbertModel cannot be walked block by block"):
        segments_of(AutoModel.from_config(config))


def test_a_network_that_does_more_than_its_blocks_and_norm_is_refused(make_model) -> None:
    network = load_network(folder_of(make_model("mistral")), torch.float32)

    class Doubling(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * hidden

    right, network.norm = network.norm, nn.Sequential(network.norm, Doubling())
    carry = Carry([(np.ones((1, 3), dtype=np.int64), np.ones((1, 3), dtype=np.int64))], CPU)
    walk(Resident(network), lambda *_: None, carry)  # all of it is the norm's doing
    network.norm = right
    hook = network.register_forward_hook(lambda _, __, output: type(output)(last_hidden_state=2 * output.last_hidden_state))
    with pytest.raises(UserError, match="does more than run its blocks and a norm"):
        walk(Resident(network), lambda *_: None, Carry(carry.batches, CPU))
    hook.remove()


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_a_walk_that_was_stopped_goes_on_where_it_was(make_model, tmp_path: Path, stop_at: int) -> None:
    folder = make_model("mistral")
    network = empty_model(folder_of(folder))
    batches = [(np.arange(4, 12).reshape(2, 4) + number, np.array([[1, 1, 1, 1], [1, 1, 0, 0]])) for number in range(3)]
    seen: list[int] = []

    def visit(index: int, _: Segment, parts: Parts) -> None:
        if index == stop_at and not again:
            raise Stopped
        seen.append(index)
        for module in parts.values():  # as a method would: from here on the texts run through what it made
            for parameter in module.parameters():
                parameter.data = parameter.data * 1.5

    def source() -> Streamed:
        return Streamed(network, weights_of(folder_of(folder), network))

    again = True
    whole = Carry(batches, CPU)
    walk(source(), visit, whole)
    again, first = False, Carry(batches, CPU, tmp_path / "state")
    with pytest.raises(Stopped):
        walk(source(), visit, first)
    seen.clear()
    again, second = True, Carry(batches, CPU, tmp_path / "state")
    walk(source(), visit, second)
    assert seen == list(range(stop_at, 4))
    for index in range(3):
        assert torch.equal(second.hidden(index), whole.hidden(index))


def dying(after: int, die: Callable[[], None]) -> Callable[..., None]:
    """What writes shards, and after some of them leaves half a file and dies."""
    write, written = stage.write_tensors, []

    def write_and_die(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if len(written) == after:
            path.with_name(f".{path.name}.0123456789ab.writing").write_bytes(b"half a file")
            die()
        write(path, tensors)
        written.append(path)

    return write_and_die


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {own!r}]
from pathlib import Path
from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline import stage
from test_walk import dying
from tests_support import compress_to
stage.write_tensors = dying({after}, lambda: os.kill(os.getpid(), signal.SIGKILL))
compress_to(Path({folder!r}), Path({target!r}), *parse_recipe({{'steps': {steps!r}}}).steps)
"""


def kill(folder: Path, target: Path, after: int, steps: list[dict[str, object]]) -> None:
    """Write a variant in another process, which is killed after some segments."""
    tests = Path(__file__).parents[2]
    script = KILLED.format(
        tests=str(tests), own=str(Path(__file__).parent), folder=str(folder), target=str(target), after=after, steps=steps
    )
    result = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ})
    assert result.returncode == -signal.SIGKILL


def stop(folder: Path, target: Path, after: int, steps: list[dict[str, object]]) -> None:
    """Write a variant in this process until an exception ends it after some segments."""

    def die() -> None:
        raise Stopped

    made = parse_recipe({"steps": steps}).steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "write_tensors", dying(after, die))
        with pytest.raises(Stopped):
            compress_to(folder, target, *made)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def segments_kept(folder: Path) -> Iterator[str]:
    return (path.name for path in sorted((folder / "variant-journal").glob("segment-*")))


KILLED_STEPS: dict[str, list[dict[str, object]]] = {
    "rtn": [{"method": "rtn"}],
    "gptq": [{"method": "gptq", "group_size": 16}],
    "gptq against drift": [{"method": "gptq", "group_size": 16, "drift": 1.0}],
    "autoround": [{"method": "autoround", "group_size": 16, "steps": 3}],
    "sparsegpt and gptq": [{"method": "sparsegpt", "pattern": "2:4"}, {"method": "gptq", "group_size": 16}],
    "depth and width": [{"method": "depth", "keep": 0.5}, {"method": "width", "heads": 0.5, "channels": 0.5}],
}


@pytest.mark.parametrize(
    ("end", "steps"),
    [
        *(pytest.param(stop, steps, id=f"stopped-{name}") for name, steps in KILLED_STEPS.items()),
        *(
            pytest.param(kill, steps, id=f"killed-{name}", marks=[] if name == "gptq" else [pytest.mark.slow])
            for name, steps in KILLED_STEPS.items()
        ),
    ],
)
def test_a_variant_whose_writing_was_killed_is_continued(
    make_model, tmp_path: Path, end: Callable[..., None], steps: list[dict[str, object]]
) -> None:
    folder, made = make_model("mistral"), parse_recipe({"steps": steps}).steps
    compress_to(folder, tmp_path / "whole" / "variant", *made)
    killed = tmp_path / "killed"
    after = random.randrange(1, 4 if steps[0]["method"] != "depth" else 3)  # there a block is gone
    end(folder, killed / "variant", after, steps)
    assert len(list(segments_kept(killed))) == after
    assert not (killed / "variant").exists()
    times = {path: path.stat().st_mtime_ns for path in (killed / "variant.partial").glob("model-*")}
    assert len(times) == after
    journal = {path: path.stat().st_mtime_ns for path in (killed / "variant-journal").glob("segment-*")}
    compress_to(folder, killed / "variant", *made)
    assert files_of(killed / "variant") == files_of(tmp_path / "whole" / "variant")
    assert {path: path.stat().st_mtime_ns for path in journal} == journal  # done once, not again


def test_a_large_variant_stays_in_shards(make_model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make_model("mistral")
    compress_to(folder, tmp_path / "one" / "variant", RTN())
    join = stage.join_shards
    monkeypatch.setattr(stage, "join_shards", lambda folder, count: join(folder, count, single_file_bytes=1000))
    compress_to(folder, tmp_path / "many" / "variant", RTN())
    names = [path.name for path in sorted((tmp_path / "many" / "variant").glob("model*"))]
    assert names == [f"model-0000{index}-of-00004.safetensors" for index in range(1, 5)] + ["model.safetensors.index.json"]
    one, many = (compress.load(str(tmp_path / name / "variant"), device="cpu").encode(TEXTS) for name in ("one", "many"))
    np.testing.assert_array_equal(one, many)
