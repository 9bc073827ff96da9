"""Rendering the page from its parts, and serving it so that it reloads when a record changes."""

from __future__ import annotations

import html
import json
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

from compress.common.errors import UserError
from compress.measure.record import RECORD_FILE
from compress.reports.compare import find_runs
from compress.reports.dashboard.payload import payload

PARTS = resources.files("compress.reports.dashboard")
SCRIPTS = ("charts.js", "runs.js", "answer.js", "links.js", "sensitivity.js", "page.js")
# A served page polls this path and reloads when the answer changes.
STATE_PATH = "/state"
HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
CLIENT_SECONDS = 10
"""How long a client may take for a request, or for taking the answer."""


@cache
def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("the dashboard needs the package plotly", "pip install 'compress-embedders[dashboard]'") from error
    script: str = get_plotlyjs()
    return script


def render(places: Sequence[Path], *, imports: Sequence[Path] = (), watched: str = "") -> str:
    """Return the page as one HTML document.

    Args:
        places: folders of runs, or folders that contain such folders.
        imports: folders with other people's results, of mteb or HAKARI-Bench.
        watched: state that a served page compares with; empty for a page that does not reload.

    Raises:
        UserError: no record can be read, or plotly is not installed.
    """
    # `</` in the data would end the script element around it, and `<!--<script>` would keep it from ever ending.
    data = json.dumps(payload(places, imports), ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "CSS": _part("page.css"),
        "PLOTLY": _plotly().replace("</script", "<\\/script"),
        "SCRIPT": "\n".join(_part(name) for name in SCRIPTS),
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


def _host(header: str) -> str:
    """Return the name in a Host header, without the port, in lower case."""
    name, colon, port = header.strip().lower().rpartition(":")
    return name if colon and port.isdigit() else header.strip().lower()


def state_of(places: Sequence[Path]) -> str:
    """Return a string that changes when a record is added, removed or rewritten."""
    folders, broken = find_runs(places)
    times = []
    for folder in folders:
        with suppress(FileNotFoundError):  # it was removed since it was found
            times.append((str(folder), (folder / RECORD_FILE).stat().st_mtime_ns))
    return f"{hash((tuple(times), tuple(broken))):x}"


def serve(
    places: Sequence[Path], port: int, say: Callable[[str], None], *, imports: Sequence[Path] = (), browser: bool = True
) -> None:
    """Serve the page on this machine until interrupted; it reloads when a record changes.

    Raises:
        UserError: the port is in use, or the page cannot be rendered.
    """
    render(places, imports=imports)
    try:
        server = Server(("127.0.0.1", port), handler(places, imports))
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}", "choose another one: --port") from error
    address = f"http://127.0.0.1:{server.server_port}/"
    say(f"{address} (stop with Ctrl-C)")
    if browser:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    with server:
        server.serve_forever()


class Server(ThreadingHTTPServer):
    """A server that does not wait for slow clients when it is stopped, nor speaks of those that went away."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away in the middle of an answer; anything else as usual."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Page:
    """The page as it is now, rendered once for each state of the records, however many ask for it at once."""

    def __init__(self, places: Sequence[Path], imports: Sequence[Path] = ()) -> None:
        self._places, self._imports = places, imports
        self._lock = threading.Lock()
        self._state, self._text = "", ""

    def text(self) -> str:
        """Return the page."""
        with self._lock:
            state = state_of(self._places)
            if state != self._state:
                try:
                    self._text = render(self._places, imports=self._imports, watched=state)
                except UserError as error:  # the folder was emptied while the page was being served
                    self._text = f"<p>{html.escape(error.message)}</p>"
                self._state = state
            return self._text


def handler(places: Sequence[Path], imports: Sequence[Path] = ()) -> type[BaseHTTPRequestHandler]:
    """Return the request handler for the page and its state.

    It answers requests to this machine's own names only: a page of another site, whose name points here, gets nothing.
    """
    page = Page(places, imports)

    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_SECONDS

        def do_GET(self) -> None:
            if _host(self.headers.get("Host", "")) not in HOSTS:
                self.send_error(403, "this server answers to localhost only")
            elif self.path == STATE_PATH:
                self._answer(state_of(places), "text/plain")
            elif self.path == "/":
                self._answer(page.text(), "text/html")
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
