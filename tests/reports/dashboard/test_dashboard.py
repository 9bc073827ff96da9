"""The dashboard's page: what it holds, and what a real browser makes of it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from compress.common.errors import UserError
from compress.measure.record import Record
from compress.methods import METHODS, method_class
from compress.methods.base import FAMILIES
from compress.reports.dashboard import page as rendering
from compress.reports.dashboard.page import STATE_PATH, handler, render, state_of
from compress.reports.dashboard.payload import family, payload

pytest.importorskip("plotly", reason="the extra `dashboard` is not installed")
RESULTS = Path(__file__).parents[3] / "results"
RUNS = ("int8-openvino-minilm-4cafb257", "depth-50-minilm-ed852a53", "int4-gptq-only-minilm-83c44b29", "prune-int8-minilm-d7e971fc")
NASTY = "</script><script>window.hurt = true</script><img src=x onerror='window.hurt = true'>{{CSS}}"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Four runs; one of them quantized in a way that has a dangerous name, with a training's curve, cells and cosines; two broken."""
    folder = tmp_path / "results"
    for run in RUNS:
        (folder / run).mkdir(parents=True)
        shutil.copy(RESULTS / run / "record.json", folder / run)
    path = folder / RUNS[0] / "record.json"
    record = json.loads(path.read_text())
    record["recipe"]["name"] = record["verdict"] = NASTY
    record["steps"][0]["found"] = {"curve": [{"step": 1, "loss": 2.0, "cosine": 0.5}, {"step": 2, "loss": 1.0, "cosine": 0.75}]}
    record["fidelity"]["cosines"] = [0.9, 0.95, 0.99]
    record["rows"][-1]["speed"]["cells"] = [
        {"batch": 1, "length": 16, "seconds": 0.01},
        {"batch": 8, "length": 16, "seconds": 0.02},
    ]
    path.write_text(json.dumps(record))
    Record.read(path.parent)  # it is still a record
    (folder / "odd").mkdir()
    (folder / "odd" / "record.json").write_text("{}")
    return folder


def test_what_steps_do_is_said_in_few_words() -> None:
    assert family(["fold"]) == family([]) == "as it was"
    assert family(["depth", "distill", "gptq"]) == "smaller + distilled + quantized"
    assert family(["gptq", "sparsegpt"]) == "sparse + quantized"
    assert family(["rtn", "of-another-package"]) == "quantized + of-another-package"  # never left out


def test_every_method_has_a_family_that_the_page_orders() -> None:
    assert {method_class(name).family for name in METHODS} == set(FAMILIES)


def test_the_page_holds_every_run_and_what_was_not_read(results: Path) -> None:
    told = payload([results])
    assert {run["run"] for run in told["runs"]} == set(RUNS)
    assert [Path(place).name for place in told["broken"]] == ["odd"]
    page = render([results])
    (data,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', page, re.S)
    assert {run["run"] for run in json.loads(data)["runs"]} == set(RUNS)
    assert json.loads(data)["runs"][0]["recipe"] == NASTY
    without_plotly = page.replace(
        next(script for script in re.findall(r"<script>(.*?)</script>", page, re.S) if len(script) > 1e6), ""
    )
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", without_plotly.replace(data, ""))
    with pytest.raises(UserError, match="nothing to compare"):
        render([results / "odd"])


def test_a_served_page_knows_when_a_record_changes(results: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler([results]))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}") as answer:
            text: str = answer.read().decode()
        return text

    try:
        before = ask(STATE_PATH)
        assert before == state_of([results])
        assert f'data-watched="{before}"' in ask("/")
        shutil.rmtree(results / RUNS[1])
        after = ask(STATE_PATH)
        assert after != before
        page = ask("/")
        assert f'data-watched="{after}"' in page
        assert RUNS[1] not in page
        with pytest.raises(urllib.error.HTTPError):
            ask("/record.json")
    finally:
        server.shutdown()
        server.server_close()


def test_only_this_machine_s_own_names_are_answered_and_a_page_is_rendered_once(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[str] = []

    def counted(places: Any, *, watched: str = "") -> str:
        rendered.append(watched)
        return "page"

    monkeypatch.setattr(rendering, "render", counted)
    monkeypatch.setattr(rendering, "CLIENT_SECONDS", 0.2)
    server = rendering.Server(("127.0.0.1", 0), handler([results]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = f"127.0.0.1:{server.server_port}"
    try:
        for host, status in (
            (own, 200),
            ("localhost", 200),
            (f"[::1]:{server.server_port}", 200),
            ("evil.example", 403),
            ("", 403),
        ):
            connection = http.client.HTTPConnection(own, timeout=5)
            connection.request("GET", "/", headers={"Host": host})
            assert connection.getresponse().status == status, host
            connection.close()
        assert len(rendered) == 1
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as slow:  # says nothing, and is not waited for
            slow.sendall(b"GET / HT")
            assert slow.recv(100) == b""
    finally:
        server.shutdown()
        server.server_close()


def test_no_name_ends_or_holds_the_script_of_the_data(results: Path) -> None:
    record = results / RUNS[0] / "record.json"
    content = json.loads(record.read_text())
    content["recipe"]["name"] = "<!--<script></script>"
    record.write_text(json.dumps(content))
    made = render([results])
    data = made.partition('id="payload">')[2].partition("</script>")[0]
    assert "<" not in data
    assert "<!--<script></script>" in {run["recipe"] for run in json.loads(data)["runs"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium without a screen."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `dev`)")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "window-size=1440,900"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def page(browser: Any, results: Path, tmp_path: Path) -> Iterator[Any]:
    """The page as a file in the browser, which must not complain, and asks for nothing."""
    path = tmp_path / "report.html"
    path.write_text(render([results]), encoding="utf-8")
    browser.get(path.as_uri())
    assert soon(browser, "return document.documentElement.dataset.ready")
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not browser.execute_script("return window.hurt")


def soon(page: Any, script: str, *arguments: object) -> Any:
    """What a script returns once that is true: Plotly draws and resizes a little later than it is told to."""
    for _ in range(50):
        found = page.execute_script(script, *arguments)
        if found:
            break
        time.sleep(0.1)
    return found


def points(page: Any) -> int:
    return int(page.execute_script("return document.querySelectorAll('#scatter .scatterlayer .point').length"))


def choose(page: Any, name: str, value: str) -> None:
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))", name, value
    )


def shown(page: Any) -> list[str]:
    return list(page.execute_script("return [...document.querySelectorAll('#table button[data-run]')].map((e) => e.dataset.run)"))


def test_points_are_drawn_and_filters_leave_some(page: Any) -> None:
    assert points(page) == 3  # the fourth was not timed
    choose(page, "axis", "bytes")
    assert points(page) == 4
    choose(page, "filter-runtime", "openvino")
    assert points(page) == 1
    assert shown(page) == [RUNS[0]]
    choose(page, "filter-method", "depth")
    assert shown(page) == []
    assert "None of these runs" in page.find_element("id", "scatter").text
    page.find_element("id", "every").click()
    assert len(shown(page)) == 4
    assert "odd" in page.find_element("id", "broken").text
    choose(page, "filter-family", "smaller")
    assert shown(page) == [RUNS[1]]


def test_a_run_is_opened_with_all_that_it_holds(page: Any) -> None:
    page.execute_script("document.querySelector(`[data-run='${arguments[0]}']`).click()", RUNS[0])
    dialog = page.find_element("id", "run")
    assert dialog.get_attribute("open")
    assert page.find_element("id", "run-title").text == RUNS[0]
    assert "SciFact" in dialog.text
    for chart in ("run-cosines", "run-curve", "run-cells"):
        assert soon(
            page, "return document.querySelectorAll(`#${arguments[0]} :is(.barlayer, .scatterlayer) path`).length", chart
        ), chart
    page.find_element("id", "close").click()
    assert not dialog.get_attribute("open")
    # A point of the chart opens its run too.
    page.execute_script("document.getElementById('scatter').emit('plotly_click', {points: [{customdata: arguments[0]}]})", RUNS[1])
    assert page.find_element("id", "run-title").text == RUNS[1]


def test_two_runs_stand_side_by_side_and_the_table_sorts(page: Any) -> None:
    for number in (0, 1):
        page.execute_script("document.querySelectorAll('#table input[type=checkbox]')[arguments[0]].click()", number)
    pair = page.find_element("id", "pair").text
    assert "STSBenchmark" in pair
    assert "difference" in pair
    kept = shown(page)
    page.execute_script(
        "[...document.querySelectorAll('#table thead button')].find((e) => e.textContent.startsWith('on disk')).click()"
    )
    sizes = {run: Record.read(RESULTS / run).row("variant").size_bytes for run in RUNS}
    assert shown(page) == sorted(kept, key=lambda run: -sizes[run])
    assert page.execute_script("return document.querySelector('th[aria-sort]').textContent").startswith("on disk")


def test_every_chart_is_drawn_for_print_and_in_both_themes(page: Any) -> None:
    before = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.find_element("id", "theme").click()
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    for chart in ("tasks", "fidelity", "latency", "memory", "cost"):
        assert page.execute_script("return document.getElementById(arguments[0]).classList.contains('js-plotly-plot')", chart), (
            chart
        )


@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_is_wider_than_the_window(page: Any, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    )
    page.refresh()
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    try:
        assert soon(page, "return document.documentElement.scrollWidth <= arguments[0]", width)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
