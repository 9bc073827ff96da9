"""The dashboard's page: what it holds, and what a real browser makes of it."""

from __future__ import annotations

import csv
import http.client
import io
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
from dashboard_support import mteb_result, sensitivity, write

from compress.common.errors import UserError
from compress.measure.record import Record
from compress.methods import METHODS, method_class
from compress.methods.base import FAMILIES
from compress.reports.compare import compare_runs
from compress.reports.dashboard import page as rendering
from compress.reports.dashboard.page import STATE_PATH, handler, render, state_of
from compress.reports.dashboard.payload import family, payload

Keys = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the extra `dev`)").Keys
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

    def counted(places: Any, *, imports: Any = (), watched: str = "") -> str:
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


def bound(page: Any, name: str, value: str) -> None:
    """Type a bound."""
    page.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))",
        f"bound-{name}",
        value,
    )


def winners(page: Any) -> list[str]:
    """The runs that are named as the answer, the fastest and the smallest of each comparable set in turn."""
    return list(page.execute_script("return [...document.querySelectorAll('[data-answer]')].map((e) => e.dataset.answer)"))


def expected(kept: float = 0.0, most: float = float("inf"), least: float = 0.0) -> list[str]:
    """The same answer from the records, by their own numbers."""
    found = []
    for group in compare_runs([RESULTS / run for run in RUNS]).groups:
        holding = [
            line
            for line in group.lines
            if (not kept or (line.low is not None and 100 * line.low >= kept))
            and line.bytes <= most * 1e6
            and (not least or (line.speedup or 0) >= least)
        ]
        timed = [line for line in holding if line.speedup is not None]
        found += [max(timed, key=lambda line: line.speedup or 0).run] if timed else []
        found += [min(holding, key=lambda line: line.bytes).run] if holding else []
    return found


def test_the_first_thing_on_the_page_is_the_fastest_and_the_smallest_of_those_that_keep_99_percent(page: Any) -> None:
    first = page.execute_script("return document.querySelector('main').firstElementChild.id")
    assert first == "answer-section"
    assert page.find_element("id", "answer-title").text == "At least 99 % kept: fastest, smallest"
    assert winners(page) == expected(99)
    assert len(shown(page)) == len(RUNS)  # nothing is hidden before somebody asks for it


def test_bounds_change_the_answer_and_filter_everything_below(page: Any) -> None:
    bound(page, "kept", "99.8")
    assert winners(page) == expected(99.8) != expected(99)
    bound(page, "kept", "")
    bound(page, "speed", "1.2")
    assert page.find_element("id", "answer-title").text == "At least 1.2 times as fast: fastest, smallest"
    assert winners(page) == expected(0, least=1.2)
    fast = {
        line.run
        for group in compare_runs([RESULTS / run for run in RUNS]).groups
        for line in group.lines
        if (line.speedup or 0) >= 1.2
    }
    assert soon(page, "return document.querySelectorAll('#table tbody tr').length === arguments[0]", len(fast))
    assert set(shown(page)) == fast
    bound(page, "speed", "1000")
    assert winners(page) == []
    assert "loosen one" in page.find_element("id", "answers").text
    bound(page, "speed", "")
    bound(page, "kept", "99.99")  # none: the nearest is named, with the lower end that it does reach
    assert "The nearest in score" in page.find_element("id", "answers").text
    page.find_element("id", "every").click()
    assert len(shown(page)) == len(RUNS)


def test_a_slider_moves_its_number_and_its_loose_end_means_no_bound(page: Any) -> None:
    script = (
        "const [slider, number] = ['slide-', 'bound-'].map((kind) => document.getElementById(kind + arguments[0]));"
        "slider.value = arguments[1]; slider.dispatchEvent(new Event('input'));"
        "return [number.value, slider.getAttribute('aria-valuetext')]"
    )
    sizes = sorted(Record.read(RESULTS / run).row("variant").size_bytes / 1e6 for run in RUNS)
    value, said = page.execute_script(script, "size", 0)
    assert float(value) == pytest.approx(sizes[0], rel=0.01)
    assert said == f"{value} MB"
    middle, _ = page.execute_script(script, "size", 50)
    assert float(middle) == pytest.approx((sizes[0] * sizes[-1]) ** 0.5, rel=0.01)  # half way on a logarithmic scale
    assert page.execute_script(script, "size", 100) == ["", "no bound"]
    assert page.execute_script(script, "kept", 95) == ["99.5", "99.5 %"]
    assert page.execute_script(script, "kept", 0) == ["", "no bound"]


def test_the_address_holds_the_run_and_what_is_shown(page: Any) -> None:
    address = page.current_url
    page.get(f"{address}#run={RUNS[1]}")
    assert soon(page, "return document.getElementById('run').open")
    assert page.find_element("id", "run-title").text == RUNS[1]
    assert page.find_element("id", "run-link").get_attribute("href") == f"{address}#run={RUNS[1]}"
    page.find_element("id", "close").click()
    assert soon(page, "return !location.hash")
    choose(page, "filter-runtime", "openvino")
    choose(page, "axis", "bytes")
    bound(page, "size", "50")
    assert soon(page, "return location.hash.includes('bound-size=50')")
    kept, held = page.current_url, shown(page)
    page.get("about:blank")
    page.get(kept)  # somebody else opens the link
    assert soon(page, "return document.documentElement.dataset.ready")
    assert shown(page) == held != list(RUNS)
    script = "return ['filter-runtime', 'axis', 'bound-size'].map((id) => document.getElementById(id).value)"
    assert page.execute_script(script) == ["openvino", "bytes", "50"]
    assert page.find_element("id", "apply").is_selected()
    page.execute_script("location.hash = '#run=gone'")
    assert soon(page, "return !document.getElementById('missing').hidden")
    assert "gone is not on this page" in page.find_element("id", "missing").text
    page.execute_script("location.hash = '#table-section'")  # a part of the page, no state
    assert soon(page, "return location.hash === '#table-section'")
    assert shown(page) == list(page.execute_script("return ordered(shownRuns(), state).map((run) => run.run)"))


def test_the_runs_shown_are_saved_as_csv(page: Any) -> None:
    choose(page, "filter-runtime", "openvino")
    text = page.execute_script("return csv(ordered(shownRuns(), state))")
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    (line,) = compare_runs([RESULTS / RUNS[0]]).groups[0].lines
    assert (row["run"], row["recipe"], row["runtime"]) == (RUNS[0], NASTY, "openvino")
    for column, value in (("kept", line.kept), ("kept_low", line.low), ("bytes", line.bytes), ("speedup", line.speedup)):
        assert float(row[column]) == value
    assert row["pareto_optimal"] in ("true", "false")
    cells = page.execute_script("return ['=1+1', '-x', 'a,\"b\"', null, -1.5].map(csvCell)")
    assert cells == ["'=1+1", "'-x", '"a,""b"""', "", "-1.5"]


def test_every_chart_has_its_numbers_in_a_table(page: Any) -> None:
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    page.execute_script("for (const one of document.querySelectorAll('main details.numbers')) one.open = true")
    for chart in ("scatter", "tasks", "fidelity", "latency", "memory", "cost"):
        rows = soon(
            page,
            "return [...document.querySelectorAll(`#${arguments[0]}-numbers tr`)].map((row) => [...row.cells].map((cell) => cell.textContent))",
            chart,
        )
        assert len(rows) > 1, chart
        assert "table after it" in page.find_element("id", chart).get_attribute("aria-label")
        if chart == "tasks":
            names = {Record.read(RESULTS / run).recipe["name"]: Record.read(RESULTS / run) for run in RUNS[1:]}
            (row,) = [row for row in rows if row[0] == "depth-50"]
            task = next(task for task in names["depth-50"].tasks if task.task == "SciFact")
            assert row[rows[0].index("SciFact")].replace("\u2212", "-") == f"{100 * task.delta:+.2f}"


def test_the_keyboard_alone_sorts_moves_a_bound_and_opens_a_run(page: Any) -> None:
    def press(key: str) -> None:
        page.switch_to.active_element.send_keys(key)

    page.execute_script("document.querySelector('#table thead button').focus()")
    key = "return document.activeElement.dataset.key"
    before = page.execute_script(key)
    press(Keys.ENTER)
    press(Keys.ENTER)
    assert page.execute_script(key) == before  # the table was made anew, and the focus is where it was
    assert page.execute_script("return state.sorted") == "recipe"
    page.execute_script("document.getElementById('slide-kept').focus()")
    press(Keys.ARROW_LEFT)
    assert page.find_element("id", "bound-kept").get_attribute("value") == "98.9"
    page.find_element("id", "every").send_keys(Keys.ENTER)
    page.execute_script("document.querySelector('#table tbody button').focus()")
    run = page.execute_script("return document.activeElement.dataset.run")
    press(Keys.ENTER)
    assert page.find_element("id", "run-title").text == run
    press(Keys.ESCAPE)
    assert soon(page, "return !document.getElementById('run').open")
    assert page.execute_script("return document.activeElement.dataset.run") == run
    assert not page.execute_script("return [...document.querySelectorAll('[tabindex]')].some((e) => e.tabIndex > 0)")


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


@pytest.mark.parametrize("width", [pytest.param(1440, marks=pytest.mark.slow), 390])
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


def test_imported_models_and_sensitivities_are_drawn(browser: Any, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(RESULTS / RUNS[1], folder / RUNS[1])
    record = Record.read(folder / RUNS[1])
    for task in record.tasks:
        write(tmp_path / "other" / "a__b" / "r" / f"{task.task}.json", mteb_result(task.task, task.baseline, metric=task.metric))
    write(tmp_path / "other" / "a__b" / "r" / "model_meta.json", {"name": "a/b", "memory_usage_mb": 30})
    sensitivity(record.model.fingerprint).write(folder / "x.sensitivity.json")
    path = tmp_path / "report.html"
    path.write_text(render([folder], imports=[tmp_path / "other"]), encoding="utf-8")
    browser.get(f"{path.as_uri()}#axis=bytes")
    assert soon(browser, "return document.documentElement.dataset.ready")
    assert points(browser) == 2
    browser.execute_script("document.querySelector('[data-run^=mteb]').click()")
    assert "Measured elsewhere" in browser.find_element("id", "run-body").text
    browser.find_element("id", "close").click()
    assert "mteb" not in " ".join(winners(browser))  # without an interval nothing is known to hold
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    browser.execute_script("document.getElementById('sensitivity-map-numbers').open = true")
    rows = soon(browser, "return [...document.querySelectorAll('#sensitivity-map-numbers tbody tr')].map((e) => e.textContent)")
    assert rows == ["01.0e-32.0e-3", "13.0e-34.0e-3"]
    assert "table 5.0e-3" in browser.find_element("id", "sensitivity").text
    choose(browser, "upward", "mean")
    assert points(browser) == 2
    open_run = "document.querySelector(`[data-run='${arguments[0]}']`).click(); return document.getElementById('run-sensitivity-map') !== null"
    assert browser.execute_script(open_run, RUNS[1])
    assert browser.get_log("browser") == []
