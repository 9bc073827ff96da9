"""The pages of the recipes are what recipes and records say, and a number that changes in a record is noticed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import gallery
import pytest
from measured_records import StaleError

from compress.pipeline.recipe_file import parse_recipe
from compress.reports.compare import compare_runs
from compress.reports.formats import as_markdown

RUNS = ("int8-minilm-69839f2b", "slim-minilm-41d2ee33", "int8-openvino-minilm-4cafb257", "int8-nano-d25c973e")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Four records, and a list that names them."""
    for run in RUNS:
        (tmp_path / "results" / run).mkdir(parents=True)
        shutil.copy(gallery.RESULTS / run / "record.json", tmp_path / "results" / run)
    return listed(tmp_path / "results")


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Two recipes with records and one without."""
    (tmp_path / "recipes").mkdir()
    for name in ("int8", "slim", "distill-small"):
        shutil.copy(gallery.RECIPES / f"{name}.yaml", tmp_path / "recipes")
    return tmp_path / "recipes"


def listed(results: Path) -> Path:
    (results / "README.md").write_text(as_markdown(compare_runs([results])))
    return results


def change(results: Path, folder: str, **values: object) -> None:
    path = results / folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_gallery_is_what_recipes_and_records_say() -> None:
    files = gallery.gallery()
    assert list(gallery.faults(files)) == []
    assert {name for name in files if name.endswith(".md")} == {
        "index.md",
        *(f"{path.stem}.md" for path in gallery.RECIPES.glob("*.yaml")),
    }
    assert max(len(text) for name, text in files.items() if name.endswith(".svg")) < 30_000
    assert sum(map(len, files.values())) < 1_000_000


def test_a_number_that_changes_in_a_record_is_noticed_until_the_pages_are_written(
    results: Path, recipes: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pages"
    gallery.write(gallery.gallery(recipes, results), folder)
    assert list(gallery.faults(gallery.gallery(recipes, results), folder)) == []
    assert "| minilm | 100.00\u00a0% |" in (folder / "int8.md").read_text()

    change(results, RUNS[0], retained=0.9)
    files = gallery.gallery(recipes, results)
    wrong = [fault.partition(":")[0] for fault in gallery.faults(files, folder)]
    # Its own page and the list; and the pictures of both recipes, in which its point has moved.
    assert {"int8.md", "index.md", "int8-speed.svg", "int8-size.svg", "slim-speed.svg", "slim-size.svg"} == set(wrong)
    gallery.write(files, folder)
    assert "| minilm | 90.00\u00a0% |" in (folder / "int8.md").read_text()
    assert "90.00 %, 34.6 MB, 1.51x" in (folder / "index.md").read_text()
    assert list(gallery.faults(files, folder)) == []


def test_the_smallest_change_of_any_shown_number_is_noticed(results: Path, recipes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    gallery.write(gallery.gallery(recipes, results), folder)
    record = json.loads((results / RUNS[0] / "record.json").read_text())
    record["tasks"][2]["interval"]["low"] -= 1e-4
    change(results, RUNS[0], tasks=record["tasks"])
    assert list(gallery.faults(gallery.gallery(recipes, results), folder)) == ["int8.md: is not what recipes and records say"]


def test_vectors_of_another_width_have_no_cosine_on_the_page(results: Path, recipes: Path) -> None:
    near = json.loads((results / RUNS[0] / "record.json").read_text())["fidelity"]
    change(results, RUNS[0], fidelity=near | {key: None for key in near if key.startswith("cosine")} | {"cosines": []})
    page = gallery.gallery(recipes, results)["int8.md"]
    assert "they have another width; " in page
    assert page.count("mean cosine") == 1  # nano's


def test_pages_of_recipes_that_are_gone_are_removed(results: Path, recipes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    gallery.write(gallery.gallery(recipes, results), folder)
    (recipes / "slim.yaml").unlink()
    files = gallery.gallery(recipes, results)
    assert "slim.md: no recipe has it" in list(gallery.faults(files, folder))
    gallery.write(files, folder)
    assert not list(folder.glob("slim*"))


def test_a_recipe_without_a_record_says_so_and_has_no_picture(results: Path, recipes: Path) -> None:
    files = gallery.gallery(recipes, results)
    assert "**There is no record of this recipe**" in files["distill-small.md"]
    assert not [name for name in files if name.startswith("distill-small") and name.endswith(".svg")]
    assert re.search(r"^\| \[`distill-small`\]\(distill-small.md\) \| no record \| no record \|", files["index.md"], re.M)
    assert "no record" not in files["slim.md"]


def test_only_listed_records_count(results: Path, recipes: Path) -> None:
    before = gallery.gallery(recipes, results)
    shutil.copytree(results / RUNS[0], results / "my-own")
    change(results, "my-own", run="my-own", retained=0.5, created="2099-01-01T00:00:00+00:00")
    assert gallery.gallery(recipes, results) == before
    listed(results)
    assert "[my-own](../../results/my-own/record.json) of 2099-01-01" in gallery.gallery(recipes, results)["int8.md"]


def test_words_are_the_recipes_and_the_methods(results: Path, recipes: Path) -> None:
    path = recipes / "int8.yaml"
    text = path.read_text()
    path.write_text(re.sub(r"^not_when: .*$", "not_when: it has to be like `slim` or `int4-gptq`", text, flags=re.M))
    page = gallery.gallery(recipes, results)["int8.md"]
    assert "**Not when** it has to be like [`slim`](slim.md) or `int4-gptq`." in page  # only pages that there are have links
    assert "1. [`rtn`](../recipes.md#rtn): Round to nearest: each weight becomes the nearest value of its grid." in page
    path.write_text(re.sub(r"^take_when: .*\n", "", text, flags=re.M))
    with pytest.raises(StaleError, match=r"recipes/int8\.yaml does not say take_when"):
        gallery.gallery(recipes, results)


def test_settings_that_a_record_does_not_share_with_the_file_are_named(results: Path, recipes: Path) -> None:
    files = gallery.gallery(recipes, results)
    assert "Settings other than those below: `count` of `distill`: `200000`." in files["slim.md"]
    assert "Settings other" not in files["int8.md"]


def test_a_training_that_was_continued_counts_as_a_whole(results: Path, recipes: Path) -> None:
    page = gallery.gallery(recipes, results)["slim.md"]
    assert "| `distill` | 32.9\u00a0min |" in page  # 1,976 seconds by its curve, 428 of them in the last part
    assert "| `smoothquant` | 2.9\u00a0s |" in page


def test_a_picture_has_every_comparable_run_and_the_interval(results: Path, recipes: Path) -> None:
    files = gallery.gallery(recipes, results)
    drawn = ElementTree.fromstring(files["slim-speed.svg"])
    (panel,) = drawn.findall(f"{SVG}g")  # slim has one record, on MiniLM
    assert sum(path.get("d").count("M") for path in panel if "others" in (path.get("class") or "")) == 2
    (own,) = panel.iter(f"{SVG}circle")
    (bar,) = (path for path in panel if path.get("class") == "bar")
    top, bottom = map(float, re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", bar.get("d")).groups())
    share = (bottom - float(own.get("cy"))) / (bottom - top)
    assert share == pytest.approx((97.90 - 96.69) / (99.03 - 96.69), abs=0.01)
    assert len(ElementTree.fromstring(files["int8-speed.svg"]).findall(f"{SVG}g")) == 1  # nano has one run: nothing to compare with


def test_a_group_in_rounds_is_told_with_its_steps_and_compared_round_by_round(tmp_path: Path) -> None:
    heal = {"method": "distill", "texts": "t", "steps": 8}
    group = {"rounds": 2, "steps": [{"method": "depth", "keep": 0.5}, heal]}
    recipe = parse_recipe({"description": "half", "steps": [group, {"method": "rtn"}]})
    items = gallery.sentences(recipe)[1].splitlines()
    starts = ["1. [`rounds`](../recipes.md#rounds): Prune and heal", "    1. [`depth`]", "    2. [`distill`]", "2. [`rtn`]"]
    assert all(item.startswith(start) for item, start in zip(items, starts, strict=True))
    depth, first, last = {"method": "depth", "keep": 0.75}, heal | {"steps": 2}, heal | {"steps": 6, "first_batch": 2}
    record = SimpleNamespace(run="run", recipe={"steps": [depth, first, depth, last, {"method": "rtn"}]})
    assert gallery.differences(recipe, record) == ""
    record.recipe["steps"][3] = last | {"learning_rate": 0.5}
    assert gallery.differences(recipe, record) == "`learning_rate` of `distill`: `0.5`"
    record.recipe["steps"][4] = {"method": "gptq"}
    assert gallery.differences(recipe, record).startswith("steps `depth`, `distill`")
