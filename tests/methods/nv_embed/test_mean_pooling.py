"""NV-Embed without its head."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tests_support import TEXTS, compress_to, estimated_shapes, folder_of, stored_shapes
from torch.nn import functional as F

import compress
from compress.export import export
from compress.methods.nv_embed.mean_pooling import MeanPooling
from compress.methods.quantize.rtn import RTN
from compress.models.folder import ModelFolder
from compress.runtimes.torch_runtime import open_checkpoint


def test_without_its_head_nv_embed_is_a_mistral_that_looks_both_ways(nv_embed: Path, tmp_path: Path) -> None:
    compress_to(nv_embed, tmp_path / "v", MeanPooling(), RTN(bits=8, activations="none"))
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    network = open_checkpoint(ModelFolder("whole", nv_embed), device="cpu")
    prompt = next(text for text in network.spec.prompts.values() if text)
    compress_to(nv_embed, tmp_path / "plain" / "v", MeanPooling())
    assert estimated_shapes(nv_embed, MeanPooling()) == stored_shapes(tmp_path / "plain" / "v")
    made = compress.load(str(tmp_path / "plain" / "v"), device="cpu").encode(TEXTS[:3], prompt=prompt)
    length = len(network.tokenizer([prompt])[0]) - 1  # with the token that begins a text, without the one that ends it
    for text, vector in zip(TEXTS[:3], made, strict=True):
        ids = torch.from_numpy(network.tokenizer([prompt + text])[0])[None]
        hidden = network.hidden(ids, torch.ones_like(ids))[0, length:]
        np.testing.assert_allclose(vector, F.normalize(hidden.mean(dim=0), dim=0).detach().numpy(), atol=2e-3)
    export(tmp_path / "plain" / "v", "sentence-transformers", tmp_path / "out", check=False)
    elsewhere = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": torch.float32})
    np.testing.assert_allclose(elsewhere.encode(TEXTS[:3], prompt=prompt), made, atol=1e-5)


def test_a_model_without_the_head_is_refused(bert: Path) -> None:
    with pytest.raises(ValueError, match="no latent-attention head"):
        MeanPooling().estimate(folder_of(bert).shape)
