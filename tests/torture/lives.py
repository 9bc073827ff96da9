"""A process that runs recipes in children of its own, each with a disk that goes wrong; JSON lines in, JSON lines out.

The libraries are imported once; a life is a fork. `torture_support.Lives` starts it and talks to it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def live(request: dict[str, Any]) -> None:
    """Run a recipe in this process, a child, and end it with the exit code of the command."""
    from disk import Disk

    import compress
    from compress.common.errors import UserError
    from compress.common.failures import told
    from compress.models.files import shards
    from compress.models.network import walk

    root = Path(request["root"])
    with Path(request["log"]).open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["COMPRESS_CACHE"] = str(root / "cache")
    disk = Disk(root, request.get("fails"), request.get("at", 0), request.get("seed", 0))
    for module in (shards, walk):
        disk.wrap(module, "save_file")
    disk.install()
    code = 0
    try:
        compress.run(
            Path(request["recipe"]), model=request["model"], output=root / "out", device="cpu", wait=request.get("wait", False)
        )
    except UserError as error:
        code, text = told(error)
        print(text, file=sys.stderr, flush=True)
    except BaseException as error:
        code, text = told(error)
        if code != 2:
            text += traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
    Path(request["log"] + ".count").write_text(str(disk.count))
    os._exit(code)


def born(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            live(request)
        finally:
            os._exit(99)
    return pid


def main() -> None:
    """Fork a life for every request; a list of requests is lived at the same time."""
    import torch

    torch.set_num_threads(1)
    warm = json.loads(sys.stdin.readline())
    import compress

    compress.run(Path(warm["recipe"]), model=warm["model"], output=warm["output"], device="cpu", say=lambda _: None)
    print("ready", flush=True)
    for line in sys.stdin:
        requests = json.loads(line)
        pids = [born(request) for request in requests]
        ends, limit = {}, time.monotonic() + 120
        while len(ends) < len(pids):
            for pid in [pid for pid in pids if pid not in ends]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ends[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > limit:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ends[pid] = -1000
            time.sleep(0.01)
        answers = []
        for request, pid in zip(requests, pids, strict=True):
            log = Path(request["log"])
            count = Path(f"{log}.count")
            answers.append(
                {
                    "code": ends[pid],
                    "said": log.read_text(encoding="utf-8", errors="replace") if log.exists() else "",
                    "count": int(count.read_text()) if count.exists() else 0,
                }
            )
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
