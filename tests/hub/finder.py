"""Finds models in processes that each read their environment anew, as the command line does, without starting Python each time.

Reads a line of JSON at a time, `[models, environment]`; forks, before anything has read the environment; answers with a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.util import find_spec

from compress.common.errors import UserError
from compress.models.source import find


def answer(model: str) -> tuple[str, str]:
    try:
        found = find(model)
    except UserError as error:
        return error.message, error.hint
    return found.name, str(found.path)


for name in ("httpx2", "httpx", "filelock", "fsspec", "tqdm.auto", "yaml"):  # take long to import and read no environment
    if find_spec(name):
        import_module(name)
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    models, environment = json.loads(line)
    if os.fork() == 0:
        os.environ.clear()
        os.environ.update(environment)
        answers = [answer(model) for model in models]
        assert not {"torch", "transformers", "datasets"} & set(sys.modules)
        print(json.dumps(answers), flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        print("null", flush=True)
