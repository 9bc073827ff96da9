"""Where one run stands: points and intervals at their values, and a picture that any name and any number of runs leaves whole."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from compress.reports.plot import Point
from compress.reports.standing import HEIGHT, LEFT, RIGHT, WIDTH, Standing, standing_svg

SVG = "{http://www.w3.org/2000/svg}"
PANEL = Standing(
    title="minilm",
    x_label="file, MB",
    run=Point("mine", 20.0, 98.0),
    low=97.0,
    high=100.5,
    others=[Point("better", 10.0, 100.0), Point("worse & <odd>", 40.0, 90.0, marked=False)],
    unchanged=40.0,
)


def parts(panel: Standing) -> tuple[ElementTree.Element, dict[str, list[ElementTree.Element]]]:
    drawn = ElementTree.fromstring(standing_svg([panel]))
    found: dict[str, list[ElementTree.Element]] = {}
    for element in drawn.iter():
        found.setdefault(element.get("class") or "", []).append(element)
    return drawn, found


def places(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)", path.get("d") or "")]


def test_points_and_the_interval_lie_at_their_values() -> None:
    _, found = parts(PANEL)
    (own,), (bar,) = found["own"], found["bar"]
    (best,), (other,) = places(found["others best"][0]), places(found["others"][0])
    x, y = float(own.get("cx") or 0), float(own.get("cy") or 0)
    assert (best[0] - LEFT) * 2 == pytest.approx(x - LEFT, abs=0.2)  # 10 and 20 MB, from an axis that starts at 0
    assert (other[0] - LEFT) == pytest.approx(2 * (x - LEFT), abs=0.2)
    point = (other[1] - best[1]) / 10  # pixels per percent; more is higher up
    assert point > 10
    assert y == pytest.approx(best[1] + 2 * point, abs=0.2)
    across, top, bottom = map(float, re.match(r"M([\d.]+) ([\d.]+)V([\d.]+)", bar.get("d") or "").groups())
    assert (across, top, bottom) == pytest.approx((x, best[1] - 0.5 * point, best[1] + 3 * point), abs=0.2)
    same = re.match(r"M\d+ ([\d.]+)H\d+M([\d.]+) ", found["same"][0].get("d") or "")
    assert tuple(map(float, same.groups())) == pytest.approx((best[1], other[0]), abs=0.2)


def test_the_run_is_named_and_so_are_those_that_none_beats() -> None:
    drawn, found = parts(PANEL)
    assert [text.text for text in found["mine"]] == ["mine"]
    assert [text.text for text in found["name"]] == ["better"]
    assert "worse & <odd>" not in {text.text for text in drawn.iter(f"{SVG}text")}
    odd = parts(replace(PANEL, run=replace(PANEL.run, name="a & <b>\x00")))[1]
    assert odd["mine"][0].text == "a & <b>?"


def test_a_name_that_would_be_taken_for_another_points_is_left_out() -> None:
    row = [Point(f"point-{letter}", 10.0 + 3.0 * number, 100.0) for number, letter in enumerate("abcdef")]
    _, found = parts(replace(PANEL, others=row))
    where = dict(zip((point.name for point in row), places(found["others best"][0]), strict=True))
    assert 1 <= len(found["name"]) < len(row)
    for text in found["name"]:
        x, y = float(text.get("x") or 0), float(text.get("y") or 0) - 4
        near = sorted(where, key=lambda name: max(abs(where[name][0] - x) - 22, 0) ** 2 + (where[name][1] - y) ** 2)
        assert text.text == near[0]
    twins = [Point("one", 10.0, 100.0), Point("same", 10.0, 100.0)]
    assert {text.text for text in parts(replace(PANEL, others=twins))[1]["name"]} == {"one", "same"}


def test_many_runs_make_a_small_picture_and_nothing_leaves_it() -> None:
    crowd = [Point(f"run-{number}", number % 17, 100 - number % 23, marked=number % 3 == 0) for number in range(500)]
    panel = replace(PANEL, others=crowd)
    text = standing_svg([panel, panel])
    assert len(text) < 30_000
    drawn = ElementTree.fromstring(text)
    assert drawn.get("height") == str(2 * HEIGHT)
    _, found = parts(panel)
    dots = [place for kind in ("others", "others best") for place in places(found[kind][0])]
    assert len(dots) == 500
    assert all(LEFT <= x <= WIDTH - RIGHT and 0 < y < HEIGHT for x, y in dots)


def test_equal_values_do_not_divide_by_zero() -> None:
    alone = Standing("minilm", "file, MB", Point("mine", 5.0, 100.0), 100.0, 100.0, [], 5.0)
    (own,) = parts(alone)[1]["own"]
    assert 0 < float(own.get("cy") or 0) < HEIGHT


def test_it_has_colours_for_dark_and_a_background_of_its_own() -> None:
    text = standing_svg([PANEL])
    assert "prefers-color-scheme:dark" in text
    assert ElementTree.fromstring(text).find(f"{SVG}rect").get("class") == "back"
