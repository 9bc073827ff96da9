"""Rendering the page from its parts, and serving it so that it reloads when a record changes."""

from __future__ import annotations

import html
import json
import threading
import webbrowser
from collections.abc import Callable, Sequence
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

from compress.common.errors import UserError
from compress.measure.record import RECORD_FILE
from compress.reports.compare import find_runs
from compress.reports.dashboard.payload import payload

PARTS = resources.files("compress.reports.dashboard")
# A served page polls this path and reloads when the answer changes.
STATE_PATH = "/state"


@cache
def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("the dashboard needs the package plotly", "pip install 'compress-embedders[dashboard]'") from error
    script: str = get_plotlyjs()
    return script


def render(places: Sequence[Path], *, watched: str = "") -> str:
    """Return the page as one HTML document.

    Args:
        places: folders of runs, or folders that contain such folders.
        watched: state that a served page compares with; empty for a page that does not reload.

    Raises:
        UserError: no record can be read, or plotly is not installed.
    """
    # `</` anywhere in the data would end the script element around it.
    data = json.dumps(payload(places), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    parts = {
        "CSS": _part("page.css"),
        "PLOTLY": _plotly().replace("</script", "<\\/script"),
        "SCRIPT": "\n".join(_part(name) for name in ("charts.js", "runs.js", "page.js")),
        "DATA": data,
        "WATCHED": html.escape(watched, quote=True),
    }
    made = _part("page.html")
    before, *rest = made.split("{{")
    pieces = [before]
    for piece in rest:  # not by repeated replacing: the data may contain text that looks like a part's name
        name, _, after = piece.partition("}}")
        pieces += [parts[name.strip()], after]
    return "".join(pieces)


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def state_of(places: Sequence[Path]) -> str:
    """Return a string that changes when a record is added, removed or rewritten."""
    folders, broken = find_runs(places)
    times = [(str(folder), (folder / RECORD_FILE).stat().st_mtime_ns) for folder in folders]
    return f"{hash((tuple(times), tuple(broken))):x}"


def serve(places: Sequence[Path], port: int, say: Callable[[str], None], *, browser: bool = True) -> None:
    """Serve the page on this machine until interrupted; it reloads when a record changes.

    Raises:
        UserError: the port is in use, or the page cannot be rendered.
    """
    render(places)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(places))
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}", "choose another one: --port") from error
    address = f"http://127.0.0.1:{server.server_port}/"
    say(f"{address} (stop with Ctrl-C)")
    if browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with server:
        server.serve_forever()


def handler(places: Sequence[Path]) -> type[BaseHTTPRequestHandler]:
    """Return the request handler for the page and its state."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == STATE_PATH:
                self._answer(state_of(places), "text/plain")
            elif self.path == "/":
                try:
                    self._answer(render(places, watched=state_of(places)), "text/html")
                except UserError as error:  # the folder was emptied while the page was being served
                    self._answer(f"<p>{html.escape(error.message)}</p>", "text/html")
            else:
                self.send_error(404)

        def _answer(self, text: str, kind: str) -> None:
            content = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Do not log requests."""

    return Handler
