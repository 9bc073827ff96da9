"""Time to render the dashboard's page and to load it in a browser, on copies of the project's records.

    python benchmarks/dashboard.py [--records 300] [--rounds 5]

Ready: from the start of the navigation until the first chart, the table and every filter are there, in headless Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from selenium import webdriver

from compress.measure.record import RECORD_FILE
from compress.reports.dashboard import render

RESULTS = Path(__file__).parents[1] / "results"
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run", "window-size=1440,900")


def many(folder: Path, count: int) -> None:
    """Write a number of records, each a copy of one of the project's."""
    originals = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(f"*/{RECORD_FILE}"))]
    for number in range(count):
        record = originals[number % len(originals)] | {"run": f"run-{number}"}
        record["retained"] -= number / 1e5
        (folder / f"run-{number}").mkdir()
        (folder / f"run-{number}" / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")


def main() -> None:
    """Print both times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        with tempfile.TemporaryDirectory() as folder:
            many(Path(folder), arguments.records)
            start = time.perf_counter()
            page = Path(folder) / "report.html"
            page.write_text(render([Path(folder)]), encoding="utf-8")
            made = time.perf_counter() - start
            ready = []
            for _ in range(arguments.rounds):
                browser.get(page.as_uri())
                ready.append(int(browser.execute_script("return document.documentElement.dataset.ready")))
            print(f"{arguments.records} records: {page.stat().st_size / 1e6:.1f} MB made in {made:.2f} s; ready after "
                  f"{median(ready)} ms (median of {arguments.rounds}, {min(ready)} to {max(ready)})")  # fmt: skip
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
