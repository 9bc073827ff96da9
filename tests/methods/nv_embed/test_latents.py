"""Fewer latents and heads in the folded head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import compress_to, encoded, estimated_shapes, folder_of, network_of, stored_shapes

import compress
from compress.data.texts import calibration_texts
from compress.methods.nv_embed.fold import Fold
from compress.methods.nv_embed.latents import Latents
from compress.models.text.nv_embed import latent_settings


def test_the_latents_that_stay_are_those_with_most_attention(nv_embed: Path, tmp_path: Path) -> None:
    compress_to(nv_embed, tmp_path / "folded", Fold())
    compress_to(nv_embed, tmp_path / "few", Fold(), Latents(keep=0.25), max_tokens=1000)
    whole, few = (network_of(tmp_path / which, torch.float32).latent_attention_model for which in ("folded", "few"))
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
    assert estimated_shapes(nv_embed, Fold(), Latents(keep=0.25)) == stored_shapes(tmp_path / "few")
    assert np.isfinite(encoded(tmp_path / "few")).all()


def test_a_head_that_adds_nothing_goes_unnoticed(nv_embed: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(nv_embed)
    name = "latent_attention_model.cross_attend_blocks.0.fn.to_out.weight"
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            heads = latent_settings(folder_of(folder).config)["num_cross_heads"]
            weights[name].view(len(weights[name]), heads, -1)[:, : heads // 2] = 0
            save_file(weights, path, metadata={"format": "pt"})
    compress_to(folder, tmp_path / "v", Fold(), Latents(heads=0.5))
    assert estimated_shapes(nv_embed, Fold(), Latents(heads=0.5)) == stored_shapes(tmp_path / "v")
    np.testing.assert_allclose(encoded(tmp_path / "v"), encoded(folder), atol=2e-3)


def test_latents_of_a_model_without_a_folded_head_are_refused(bert: Path) -> None:
    with pytest.raises(ValueError, match="no folded latent-attention head"):
        Latents(keep=0.5).estimate(folder_of(bert).shape)
