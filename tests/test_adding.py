"""`docs/adding.md`: its snippets run, and a method of another package is found, planned, applied and recorded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import compress.export
from compress.common.errors import UserError
from compress.common.lazy import attribute
from compress.methods import METHODS
from compress.models.architectures import BLOCK_LAYOUTS, Anatomy, anatomy_of
from compress.models.files.variant import VariantInfo
from compress.runtimes.contract import RUNTIMES, Runtime, pick_runtime

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"^## (.+?)\n|^```python\n(.+?)^```", (ROOT / "docs" / "adding.md").read_text(), re.M | re.S)


def snippet(title: str) -> str:
    """Return the Python of a section of the page."""
    start = next(index for index, (heading, _) in enumerate(SNIPPETS) if heading == title)
    return SNIPPETS[start + 1][1]


def made_by(title: str) -> dict[str, object]:
    names: dict[str, object] = {"__name__": "snippet"}
    exec(snippet(title), names)
    return names


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with an installed package whose entry point adds the page's method."""
    site = tmp_path / "site"
    (site / "toy_methods").mkdir(parents=True)
    (site / "toy_methods" / "__init__.py").touch()
    (site / "toy_methods" / "clip.py").write_text(snippet("A method"))
    described = site / "toy_methods-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-methods\nVersion: 1.0\n")
    points = ["[compress.methods]", "clip = toy_methods.clip:Clip", "rtn = toy_methods.clip:Clip"]
    (described / "entry_points.txt").write_text("\n".join(points) + "\n")
    return site


def command(site: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    where = {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    line = [sys.executable, "-m", "compress.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, **where, **settings})


def test_a_method_of_another_package_runs(package: Path, bert: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(f"model: {bert}\nsteps:\n  - method: clip\n    deviations: 1.5\n  - method: rtn\n    bits: 8\n")
    planned = command(package, "plan", str(recipe))
    assert planned.returncode == 0, planned.stderr
    assert "linear layers at 1.5 standard deviations" in planned.stdout
    done = command(package, "run", str(recipe), "--compress-only", "--output", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    (variant,) = (tmp_path / "runs").glob("*/variant")
    info = VariantInfo.read(variant)
    assert [step["method"] for step in info.steps] == ["clip", "rtn"]
    assert info.weights == "int8"  # this project's rtn: the package's entry point of that name replaces nothing
    before = load_file(bert / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    stored = load_file(variant / "model.safetensors")
    largest = 127 * float(stored["encoder.layer.0.output.dense.weight_scale"].max())
    assert largest == pytest.approx(1.5 * float(before.std()), rel=1e-2)
    assert largest < float(before.abs().max())


def test_a_mistake_in_another_package_s_method_is_named_like_any(package: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("steps:\n  - method: clip\n    deviation: 1.5\n  - method: clipp\n")
    refused = command(package, "plan", str(recipe))
    assert refused.returncode == 2
    assert "unknown key 'deviation'; did you mean 'deviations'?" in refused.stderr
    assert "unknown method 'clipp'; did you mean 'clip'?" in refused.stderr
    without = command(tmp_path, "plan", str(recipe))
    assert "unknown method 'clip'" in without.stderr
    assert '"clip"' in command(package, "schema").stdout


def test_an_architecture_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    nomic = made_by("An architecture")["NOMIC"]
    assert isinstance(nomic, Anatomy)
    layers = [*nomic.attention, nomic.output, *nomic.up, nomic.down]
    with pytest.raises(ValueError, match="is unknown; known layouts"):
        anatomy_of(f"{layer}.weight" for layer in layers)
    monkeypatch.setitem(BLOCK_LAYOUTS, "Nomic BERT", nomic)
    assert anatomy_of(f"{layer}.weight" for layer in layers) is nomic


def test_a_runtime_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = made_by("A runtime")["TENSORRT"]
    assert isinstance(runtime, Runtime)
    assert callable(attribute(str(runtime.linear)))
    with pytest.raises(UserError, match="runtime 'tensorrt' is not known"):
        pick_runtime("tensorrt", {})
    monkeypatch.setitem(RUNTIMES, "tensorrt", runtime)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"tensorrt is not installed: pip install 'compress-embedders\[tensorrt\]'"):
        pick_runtime("tensorrt", {})


def test_an_export_format_is_a_row(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests_support import compress_to

    (tmp_path / "toy_format.py").write_text(snippet("An export format"))
    monkeypatch.syspath_prepend(tmp_path)
    compress_to(bert, tmp_path / "run" / "variant")
    with pytest.raises(UserError, match="export format 'plain' is not known"):
        compress.export.export(tmp_path / "run", "plain", tmp_path / "out", check=False)
    monkeypatch.setitem(compress.export.FORMATS, "plain", "toy_format:write")  # type: ignore[arg-type]
    out = compress.export.export(tmp_path / "run", "plain", tmp_path / "out", check=False)
    assert {"plain.json", "model.safetensors", "README.md", "example.py"} <= {path.name for path in out.iterdir()}


def test_the_page_s_metric_runs() -> None:
    assert callable(made_by("A metric")["centroid_cosine"])


def test_the_page_names_files_and_tables_that_are_there() -> None:
    page = (ROOT / "docs" / "adding.md").read_text()
    for place in set(re.findall(r"`(compress/[\w/]+\.py|compress/[\w/]+/)`", page)) - {"compress/methods/clip.py"}:
        assert (ROOT / place).exists(), place
    assert "clip" not in METHODS  # the page's example is an example still
