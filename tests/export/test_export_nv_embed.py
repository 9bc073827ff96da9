"""NV-Embed's own layout: what is written is a model to start from, with the variant's vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests_support import folder_of

import compress
from compress.common.errors import UserError
from compress.export import export
from compress.methods.base import Method
from compress.methods.nv_embed.fold import Fold
from compress.methods.prune.depth import Depth
from compress.methods.prune.magnitude import Magnitude
from compress.methods.quantize.rtn import RTN
from compress.models.source import find

TEXTS = ["the parcel never came", "rain by the evening", "", "of the many words " * 40]


@pytest.mark.parametrize(
    ("step", "check"),
    [
        (Depth(drop=(1,)), False),
        (Magnitude(sparsity=0.5), False),
        pytest.param(Depth(drop=(1,)), True, marks=pytest.mark.slow),  # in a process of its own, which takes seconds
    ],
    ids=["depth", "magnitude", "depth, read back"],
)
def test_a_checkpoint_has_the_variant_s_vectors(nv_embed: Path, make_variant, tmp_path: Path, step: Method, check: bool) -> None:
    run = make_variant(nv_embed, step)
    said: list[str] = []
    out = export(run, "nv-embed", tmp_path / "out", said.append, check=check)
    assert said[-1].startswith("Read back with " if check else "Not read back")
    assert not find(str(out)).is_variant
    prompt = "Instruct: Retrieve semantically similar text\nQuery: "
    expected = compress.load(str(run), device="cpu").encode(TEXTS, prompt)
    found = compress.load(str(out), device="cpu", dtype="float32")
    np.testing.assert_allclose(found.encode(TEXTS, prompt), expected, atol=1e-5)
    assert folder_of(out).headers.keys() <= folder_of(nv_embed).headers.keys()
    assert "compress.load" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("steps", "words"),
    [((Fold(),), "a folded head"), ((RTN(),), "are quantized"), ((Depth(drop=(0,), what="mlp"),), "a sublayer")],
)
def test_what_the_published_keys_cannot_say_is_refused(
    nv_embed: Path, make_variant, tmp_path: Path, steps: tuple[Method, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        export(make_variant(nv_embed, *steps), "nv-embed", tmp_path / "out")


def test_other_models_are_refused(bert: Path, make_variant, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an NV-Embed"):
        export(make_variant(bert, Magnitude(sparsity=0.5)), "nv-embed", tmp_path / "out")
