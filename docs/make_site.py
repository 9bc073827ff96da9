"""Builds the documentation's site: `make docs`, into build/site.

The pages link to each other, to records, recipes and scripts as the repository lays them out. So pages and everything they link to
are copied into build/site-pages under the same paths, and the generator (Zensical) sees one tree without links that leave it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
PAGES, SITE = BUILD / "site-pages", BUILD / "site"
LINK = re.compile(r"\]\((?P<target>[^)\s#]+)(?:#[^)]*)?\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.S | re.M)
NAVIGATION = {
    "Guide": (
        "index",
        "models",
        "choosing",
        "recipes/index",
        "own-tasks",
        "search",
        "dashboard",
        "sweeps",
        "recipes",
        "quantization",
        "pruning",
        "distillation",
        "cluster",
        "static",
        "runtimes",
        "exports",
        "align",
        "encode",
        "vector-stores",
        "serving",
        "hub",
        "doctor",
    ),
    "Reference": ("measurement", "reliability", "nv-embed", "nano", "adding"),
}
PROJECT = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")


def links(page: Path) -> Iterator[Path]:
    """Give the files and folders of this repository that a page links to."""
    for found in LINK.finditer(CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in found["target"]:
            yield (page.parent / found["target"]).resolve()


def linked(starts: list[Path]) -> set[Path]:
    """Return the pages and everything that they link to, links of linked pages included."""
    seen: set[Path] = set()
    waiting = list(starts)
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            if path.suffix == ".md":
                waiting += links(path)
    return seen


def config() -> str:
    """Write the generator's configuration."""

    def entries(names: tuple[str, ...]) -> str:
        return ", ".join(f'"docs/{name}.md"' for name in names)

    sections = "\n".join(f'    {{ "{title}" = [{entries(names)}] }},' for title, names in NAVIGATION.items())
    project = ", ".join(f'"{name}"' for name in PROJECT)
    return f"""[project]
site_name = "compress"
site_description = "Makes text embedders smaller and faster, and measures what that cost"
docs_dir = "{PAGES.name}"
site_dir = "{SITE.name}"
use_directory_urls = false
nav = [
    {{ "Start" = "README.md" }},
{sections}
    {{ "Project" = [{project}] }},
]

[project.theme]
font = false
features = ["navigation.sections", "content.code.copy"]
"""


def main() -> None:
    """Copy the pages, then build the site; warnings are errors."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shutil.rmtree(PAGES, ignore_errors=True)
    starts = [ROOT / "README.md", *(ROOT / name for name in PROJECT), *(ROOT / "docs").glob("*.md")]
    for path in sorted(linked(starts)):
        copy = PAGES / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    (BUILD / "zensical.toml").write_text(config(), encoding="utf-8")
    command = ["zensical", "build", "--clean", "--strict", "--config-file", str(BUILD / "zensical.toml")]
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)
    print(SITE / "index.html")


if __name__ == "__main__":
    main()
