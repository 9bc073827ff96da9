"""What exports share: finding the variant, refusing, files for text and people, the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from tests_support import compress_to, text_side
from transformers import AutoTokenizer

from compress import cli
from compress.common.errors import UserError
from compress.export import FORMATS, export, writer
from compress.layers.quantized_linear import stored_zeros
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VariantInfo
from compress.models.text.sentence_transformers import read_modules, read_settings, read_spec
from compress.pipeline.recipe import Recipe

INTEGERS, VALUES = ["compressed-tensors", "gptq"], ["transformers", "sentence-transformers"]
"""Layouts of a torch checkpoint; NV-Embed's own and graphs have tests of their own."""
FOUR = RTN(bits=4, group_size=16, activations="none")


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_format_can_be_imported() -> None:
    assert all(callable(writer(format)) for format in FORMATS)


def test_every_format_is_named_where_users_look() -> None:
    """`variant`, which a recipe may keep, is no format of the command's."""
    (kept, _) = get_args(Recipe.model_fields["export"].annotation)
    assert sorted(get_args(kept)) == sorted(["variant", *FORMATS])
    (option,) = get_type_hints(cli.export, include_extras=True)["format"].__metadata__
    assert sorted(option.help.partition(";")[0].split(", ")) == sorted(FORMATS)


def test_what_is_no_export_is_refused(bert: Path, make_variant, tmp_path: Path) -> None:
    run = make_variant(bert, FOUR)
    with pytest.raises(UserError) as unknown:
        export(run, "gtpq", tmp_path / "out")
    assert "gtpq" in unknown.value.message
    assert "gptq" in unknown.value.hint
    with pytest.raises(UserError, match="holds no variant"):
        export(bert, "gptq", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="already exists"):
        export(run, "compressed-tensors", tmp_path / "out")


@pytest.mark.parametrize("format", INTEGERS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_factor": True}, "input divided"),
        ({"numbers": "nf4", "bits": 4, "group_size": 64}, "are nf4 numbers"),
        ({"numbers": "llm-int8", "bits": 8, "group_size": None}, "are llm-int8 numbers"),
    ],
)
def test_layers_that_no_layout_holds_are_named(
    bert: Path, make_variant, tmp_path: Path, format: str, changes: dict[str, object], words: str
) -> None:
    run = make_variant(bert, FOUR)
    name = "encoder.layer.1.output.dense"
    described = json.loads((run / "variant" / "variant.json").read_text())
    described["quantized"][name] |= changes
    (run / "variant" / "variant.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=words) as refused:
        export(run, format, tmp_path / "out")
    assert refused.value.message.startswith(f"{name}: cannot be written as {format}")
    assert refused.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing half written is left


@pytest.mark.parametrize("format", INTEGERS + VALUES)
def test_nv_embed_and_models_of_other_numbers_are_refused(
    bert: Path, nv_embed: Path, make_variant, tmp_path: Path, format: str
) -> None:
    if format in INTEGERS:
        with pytest.raises(UserError, match="no linear layer is quantized"):
            export(make_variant(bert, Embeddings(bits=8)), format, tmp_path / "out")
    compress_to(nv_embed, tmp_path / "nv" / "variant", Embeddings(bits=8))
    with pytest.raises(UserError, match="head cannot be stored") as refused:
        export(tmp_path / "nv", format, tmp_path / "out")
    assert "mean_pooling" in str(refused.value.hint)


def test_tables_are_written_in_half_precision(bert: Path, make_variant, filled, tmp_path: Path) -> None:
    run = make_variant(bert, FOUR, Embeddings(bits=8))
    said: list[str] = []
    out = export(run, "compressed-tensors", tmp_path / "out", said.append, check=False)
    tensors = load_file(out / "model.safetensors")
    table = filled(run).embeddings.word_embeddings
    zero = stored_zeros(None, table.layer, table.weight_scale)
    integers = table.weight.view(torch.uint8).bitwise_xor(0x80)
    exact = (integers.float() - zero.float()) * table.weight_scale.view(600, -1)
    assert torch.equal(tensors["embeddings.word_embeddings.weight"], exact.half())
    assert "embeddings.word_embeddings.weight_scale" not in tensors
    assert any(line.startswith("embeddings.word_embeddings") and "half precision" in line for line in said)
    assert said[0] in (out / "README.md").read_text()


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_texts_are_taken_as_the_variant_takes_them(make_model, make_variant, tmp_path: Path, pooling: str) -> None:
    model = make_model("bert", pooling, normalize=pooling == "cls", prompts={"query": "find: "}, include_prompt=pooling == "mean")
    change(model / "config_sentence_transformers.json", default_prompt_name="query")
    run = make_variant(model, FOUR)
    out = export(run, "compressed-tensors", tmp_path / "out", check=False)
    spec, tokenizer = text_side(run / "variant")
    assert read_spec(out, read_modules(out), read_settings(out), {}, "right") == spec
    read = AutoTokenizer.from_pretrained(out)
    texts = ["find: a short text", "of the many words " * 40]
    batch = read(texts, padding=True, truncation=True, max_length=tokenizer.max_length)
    for ids, mask, own in zip(batch["input_ids"], batch["attention_mask"], tokenizer(texts), strict=True):
        assert [token for token, kept in zip(ids, mask, strict=True) if kept] == own.tolist()
    assert read.pad_token == "[PAD]"


def test_the_card_names_the_licence(bert: Path, make_variant, tmp_path: Path) -> None:
    run = make_variant(bert, FOUR)
    info = VariantInfo.read(run / "variant")
    info.model_copy(update={"licence": "cc-by-nc-4.0", "base": "owner/name"}).write(run / "variant")
    card = (export(run, "compressed-tensors", tmp_path / "out", check=False) / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc-by-nc-4.0"\n')
    assert "base_model: owner/name\n" in card
    assert "weights int4-g16" in card


def test_the_command(decoder: Path, make_variant, tmp_path: Path, monkeypatch, capsys) -> None:
    run = make_variant(decoder, RTN(bits=4, group_size=32, activations="none"))
    monkeypatch.setattr(sys, "argv", ["compress", "export", str(run), "--format", "gptq", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--licence mit" in capsys.readouterr().err  # nobody is there to be asked, and no file names one
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--licence", "mit", "--no-check"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "quantize_config.json").exists()
