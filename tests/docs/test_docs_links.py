"""Links of the documentation lead somewhere, the site's navigation names every page, and the pages are plain files of this repository."""

from __future__ import annotations

import re
from pathlib import Path

import make_site
import pytest
from test_imports import LEVELS

ROOT = make_site.ROOT
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site's generator make them."""
    plain = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", plain, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    text = make_site.CODE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)]*))?\)", text):
        if "://" in target:
            continue
        place = (page.parent / target).resolve() if target else page
        if not place.is_file() or not place.is_relative_to(ROOT) or (anchor and anchor not in anchors(place)):
            broken.append(f"{target}#{anchor}")
    assert broken == []


def test_the_navigation_has_every_page_once() -> None:
    named = [f"{name}.md" for names in make_site.NAVIGATION.values() for name in names]
    assert sorted(named) == sorted([page.name for page in (ROOT / "docs").glob("*.md")] + ["recipes/index.md"])


def test_the_index_links_every_page() -> None:
    linked = set(make_site.links(ROOT / "docs" / "index.md"))
    assert linked >= set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "index.md"}


def test_the_index_of_recipes_links_each_of_their_pages() -> None:
    pages = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    linked = set(make_site.links(ROOT / "docs" / "recipes" / "index.md"))
    assert linked >= {ROOT / "docs" / "recipes" / f"{name}.md" for name in pages}


def test_the_readme_is_one_page() -> None:
    assert 6_000 < (ROOT / "README.md").stat().st_size <= 8_192


def test_the_architecture_page_has_the_floors_of_the_import_rule() -> None:
    floors: dict[int, list[str]] = {}
    for floor, room in re.findall(
        r"^\| (\d+) \| `(\w+)(?:/|\.py)` \|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.M
    ):
        floors.setdefault(int(floor), []).append(room)
    assert [set(floors[number]) for number in sorted(floors)] == [set(rooms) for rooms in LEVELS]
