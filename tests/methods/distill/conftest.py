"""Texts to distil on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.data.texts import suite_texts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in suite_texts()[:400]))
    return path
