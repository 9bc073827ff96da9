"""Looking methods up by name: this package's own, and those that other packages add by an entry point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.common.errors import UserError
from compress.methods import METHODS, method_class, method_names
from compress.methods.base import FAMILIES
from compress.pipeline.recipe_file import parse_recipe, schema

TOY = """
from typing import ClassVar, Literal
from compress.methods.base import Estimate, Method

class Toy(Method):
    family: ClassVar[str] = "smaller"
    method: Literal["toy"] = "toy"
    strength: int = 1

    def estimate(self, shape):
        return Estimate(after=shape, memory_bytes=0, bytes_touched=0, note="toy")

    def apply(self, parts, inputs=None):
        return {}
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package with an entry point where Python finds it: `install(package, method, object, code)`."""

    def put(package: str, method: str, place: str, code: str = TOY) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{package}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[compress.methods]\n{method} = {place}\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, package, raising=False)

    return put


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_table_is_there_under_its_name_and_has_a_family(name: str) -> None:
    found = method_class(name)
    assert found.model_fields["method"].default == name
    assert found.family in FAMILIES


def test_names_are_the_table_s_where_no_package_adds_any() -> None:
    assert method_names()[: len(METHODS)] == tuple(METHODS)
    assert len(set(method_names())) == len(method_names())


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="unknown method 'gpqt'") as raised:
        method_class("gpqt")
    assert raised.value.hint == "did you mean 'gptq'?"


def test_a_method_of_another_package_is_found_listed_and_checked(install: Install) -> None:
    install("toypkg", "toy", "toypkg:Toy")
    assert method_names() == (*METHODS, "toy")
    assert "toypkg" not in sys.modules  # listing imports nothing
    assert method_class("toy").__module__ == "toypkg"
    assert parse_recipe({"steps": [{"method": "toy", "strength": 3}]}).steps[0].method == "toy"
    with pytest.raises(UserError, match="unknown key 'strenght'; did you mean 'strength'"):
        parse_recipe({"steps": [{"method": "toy", "strenght": 3}]})
    with pytest.raises(UserError, match="unknown method 'toi'; did you mean 'toy'"):
        parse_recipe({"steps": [{"method": "toi"}]})
    assert schema()["$defs"]["toy"]["properties"]["strength"]["type"] == "integer"


def test_a_package_does_not_replace_a_method_of_the_table(install: Install) -> None:
    install("toypkg", "rtn", "toypkg:Toy")
    assert method_class("rtn").__module__ == "compress.methods.quantize.rtn"
    assert method_names() == tuple(METHODS)


def test_one_name_in_two_packages_is_refused(install: Install) -> None:
    install("toypkg", "toy", "toypkg:Toy")
    install("othertoy", "toy", "othertoy:Toy")
    with pytest.raises(UserError, match="method 'toy' is in the packages othertoy and toypkg"):
        method_class("toy")


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [
        ("toypkg:Toy", "import nosuchmodule\n", "cannot be imported: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("toypkg:Toy", "raise RuntimeError('no GPU')\n", "cannot be imported: RuntimeError: no GPU"),
        ("toypkg:Other", TOY, "cannot be imported: AttributeError"),
        ("toypkg:Toy", "Toy = 3\n", "is not a subclass of compress.methods.base.Method"),
        ("toypkg:Toy", TOY.replace('"toy"', '"tou"'), "does not have `method: Literal['toy'] = 'toy'`"),
        ("toypkg:Toy", TOY.replace('"smaller"', "7"), "does not have a `family`, such as 'smaller', 'sparse'"),
        ("toypkg:Toy", TOY.replace('    family: ClassVar[str] = "smaller"\n', ""), "does not have a `family`"),
    ],
)
def test_a_broken_package_is_refused_by_name_when_its_method_is_asked_for(
    install: Install, place: str, code: str, words: str
) -> None:
    install("toypkg", "toy", place, code)
    assert "toy" in method_names()
    assert method_class("rtn")
    with pytest.raises(UserError) as raised:
        method_class("toy")
    assert f"method 'toy' of the package toypkg ({place}) {words}" in raised.value.message
    with pytest.raises(UserError, match="package toypkg"):
        parse_recipe({"steps": [{"method": "toy"}]})
