"""Random checkpoints: shapes of real models, scales that stay sensible, and no word on accuracy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import folder_of

import compress
from compress.common.errors import UserError
from compress.models.files import shards
from compress.models.files.variant import VariantInfo
from compress.models.random_weights import RandomSpec, random_tensor
from compress.models.source import find, find_shape
from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline.run import run

TINY = (
    "random:nvidia/NV-Embed-v2,num_hidden_layers=12,hidden_size=64,intermediate_size=128,num_attention_heads=4,"
    "num_key_value_heads=2,vocab_size=2000,num_latents_value=16,num_cross_heads=2,cross_dim_head=32"
)


def test_it_has_the_shape_that_was_asked_for() -> None:
    source = find(TINY)
    assert source.is_random
    headers = folder_of(source.path).headers
    assert {info.dtype for info in headers.values()} == {"BF16"}
    assert headers["embedding_model.layers.11.mlp.down_proj.weight"].shape == (64, 128)
    assert headers["latent_attention_model.latents"].shape == (16, 64)
    assert find_shape(TINY).tensors == headers
    # The names of the published checkpoint, block for block.
    published = find_shape("nvidia/NV-Embed-v2").tensors
    assert set(headers) == {name for name in published if not any(f".{n}." in name for n in range(12, 32))}


def test_the_full_size_is_known_without_writing_it(cache: Path) -> None:
    assert find_shape("random:nvidia/NV-Embed-v2").parameters == 7_851_016_192
    assert list(cache.iterdir()) == []


def test_it_is_written_once_and_continued_where_it_was_killed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: path.read_bytes() for name, path in ((p.name, p) for p in find(TINY).path.iterdir())}
    monkeypatch.setenv("COMPRESS_CACHE", str(cache / "again"))
    write, count = shards.write_tensors, 0

    def write_some(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(shards, "write_tensors", write_some)
    with pytest.raises(KeyboardInterrupt):
        find(TINY)
    folder = find(TINY).path
    assert count == 5 + 15 - 4 + 1  # of the 15 segments 4 were there; one more writes them as one file
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    find(TINY)
    assert count == 17


@pytest.mark.parametrize("layers", [2, 24])
def test_activations_keep_their_scale_through_any_depth(layers: int) -> None:
    embedder = compress.load(TINY.replace("=12", f"={layers}"), device="cpu")
    ids = torch.arange(10, 42).unsqueeze(0)
    with torch.inference_mode():
        states = embedder.model.embedding_model(ids, torch.ones_like(ids), output_hidden_states=True).hidden_states
    stds = [float(state.std()) for state in states[:-1]]
    assert 0.8 < stds[0] < 1.2
    assert stds[0] < stds[-1] < 2
    vectors = embedder.encode(["one text", "another, rather longer, text", ""])
    assert np.isfinite(vectors).all()
    assert (vectors @ vectors.T)[0, 1] < 0.99


def test_tensors_follow_from_seed_and_name() -> None:
    one = random_tensor("layers.0.q_proj.weight", (64, 256), 4, 0)
    assert torch.equal(one, random_tensor("layers.0.q_proj.weight", (64, 256), 4, 0))
    assert not torch.equal(one, random_tensor("layers.1.q_proj.weight", (64, 256), 4, 0))
    assert not torch.equal(one, random_tensor("layers.0.q_proj.weight", (64, 256), 4, 1))
    assert abs(float(one.float().std()) * 16 - 1) < 0.05
    residual = random_tensor("layers.0.o_proj.weight", (64, 256), 8, 0)
    assert abs(float(residual.float().std()) * 16 * 4 - 1) < 0.05
    assert random_tensor("norm.weight", (3,), 4, 0).tolist() == [1, 1, 1]
    assert random_tensor("dense.bias", (3,), 4, 0).tolist() == [0, 0, 0]


def test_any_model_s_folder_can_be_drawn_anew(make_model) -> None:
    folder = make_model("bert", pooling="cls", prompts={"query": "find: "})
    embedder = compress.load(f"random:{folder},num_hidden_layers=3", device="cpu")
    original = compress.load(str(folder), device="cpu")
    assert embedder.spec == original.spec
    assert len(embedder.model.encoder.layer) == 3
    assert embedder.encode(["one text"]).shape == original.encode(["one text"]).shape


@pytest.mark.parametrize("what", [[], pytest.param(["fidelity", "speed"], marks=pytest.mark.slow)], ids=["sizes", "speed"])
def test_a_run_measures_sizes_and_speed_and_says_nothing_of_accuracy(tmp_path: Path, what: list[str]) -> None:
    recipe = parse_recipe(
        {
            "name": "r",
            "steps": [{"method": "rtn"}],
            "measure": {"what": what, "count": 8, "rounds": 1, "requests": 10},
            "gates": {"retained": 0.9, "size_ratio": 1.0},
        }
    )
    said: list[str] = []
    record = run(recipe, model=TINY, output=tmp_path, device="cpu", say=said.append)
    assert record.run.startswith("r-random-NV-Embed-v2-")
    assert record.model.weights == "random"
    assert (record.tasks, record.retained, record.fidelity) == ((), None, None)
    assert (record.rows[-1].speed is not None) == ("speed" in what)
    assert record.verdict == "accuracy not measured; passes size_ratio; not judged: retained"
    assert any("random weights" in line for line in said)
    variant = tmp_path / record.run / "variant"
    assert not VariantInfo.read(variant).pretrained
    assert find(str(variant)).is_random


def test_accuracy_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accuracy cannot be measured on random weights"):
        run(parse_recipe({"name": "r"}), model=TINY, output=tmp_path, device="cpu", tasks=["mini"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("random:nvidia/NV-Embed-v2,num_hiden_layers=2", "has no field 'num_hiden_layers'"),
        ("random:nvidia/NV-Embed-v2,num_hidden_layers", "'num_hidden_layers' is not field=value"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find(name)


def test_a_disk_without_room_is_said_before_anything_is_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"0\.00 GB free"):
        find(TINY)
    assert list(cache.rglob("*.safetensors")) == []


def test_overrides_are_read_as_yaml_would() -> None:
    spec = RandomSpec.parse("random:m,num_hidden_layers=2,hidden_act=gelu,rms_norm_eps=1e-6")
    assert spec.overrides == {"num_hidden_layers": 2, "hidden_act": "gelu", "rms_norm_eps": 1e-6}
    assert json.dumps(dict(spec.overrides))


def test_a_module_s_folder_is_inside_the_model_s(bert: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(bert, tmp_path / "own"))
    (tmp_path / "loot").mkdir()
    (tmp_path / "loot" / "config.json").write_text("{}")
    modules = json.loads((own / "modules.json").read_text())
    modules[1]["path"] = "../loot"
    (own / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"modules\.json: 1\.path"):
        find(f"random:{own},num_hidden_layers=1")
