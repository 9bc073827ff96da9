"""sentence-transformers as the reference, in a process of its own and, where wanted, in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.common.children import tied
from compress.common.errors import UserError
from compress.common.inputs import read_json
from compress.measure.doctor.answers import Answers, Facts, Side

PREFIX = "sentence-transformers:"
# Texts are encoded one by one: padding plays no part, and a text that is refused takes no other with it.
PROGRAM = """\
import json, sys
import numpy as np

with open(sys.argv[1], encoding="utf-8") as file:
    asked = json.load(file)
try:
    import sentence_transformers
except ImportError:
    sys.exit("sentence-transformers is not installed")
model = sentence_transformers.SentenceTransformer(asked["model"], device="cpu").float()
given = {} if asked["prompt"] is None else {"prompt": asked["prompt"]}
rows, refused = [], {}
for index, text in enumerate(asked["texts"]):
    try:
        rows.append(np.asarray(model.encode([text], show_progress_bar=False, **given)[0], dtype=np.float32))
    except Exception as error:  # of any library: it is handed on as the reason
        rows.append(None)
        refused[index] = f"{type(error).__name__}: {error}"
if all(row is None for row in rows):
    sys.exit(refused[0])
width = len(next(row for row in rows if row is not None))
np.save(asked["vectors"], np.stack([np.full(width, np.nan, np.float32) if row is None else row for row in rows]))
tokenizer = getattr(model, "tokenizer", None)
poolings = [module for module in model if type(module).__name__ == "Pooling"]
modes = getattr(poolings[0], "pooling_mode", None) if poolings else None  # a name or several; before 6 under another name
if poolings and modes is None and hasattr(poolings[0], "get_pooling_mode_str"):
    modes = poolings[0].get_pooling_mode_str()
facts = {
    "version": sentence_transformers.__version__,
    "prompts": {name: text for name, text in (model.prompts or {}).items() if text},
    "default_prompt": (model.prompts or {}).get(model.default_prompt_name) or "",
    "pooling": "+".join(map(str, modes)) if isinstance(modes, (list, tuple)) else modes,
    "max_length": getattr(model, "max_seq_length", None),
    "truncation_side": getattr(tokenizer, "truncation_side", None),
}
with open(asked["facts"], "w", encoding="utf-8") as file:
    json.dump({"facts": facts, "refused": refused}, file)
"""


class SentenceTransformersSide(Side):
    """A folder as `SentenceTransformer(folder).encode(texts)` reads it, in float32 on the CPU."""

    def __init__(self, name: str, folder: Path, python: Path) -> None:
        """Take the folder, and the interpreter in which the library is installed."""
        settings = folder / "config_sentence_transformers.json"
        super().__init__(f"{PREFIX}{name}", (read_json(settings).get("prompts") or {}) if settings.is_file() else {})
        self._folder = folder
        self._python = Path(shutil.which(python) or python).absolute()
        self._found: dict[str, Any] = {}

    def answer(self, texts: Sequence[str], prompt: str | None) -> Answers:
        """Encode texts; see `Side.answer`.

        Raises:
            UserError: the interpreter lacks the library, or the library cannot load the folder.
        """
        with tempfile.TemporaryDirectory() as work:
            asked, facts, vectors = Path(work) / "asked.json", Path(work) / "facts.json", Path(work) / "vectors.npy"
            request = {"model": str(self._folder.absolute()), "texts": list(texts), "prompt": prompt}
            asked.write_text(json.dumps(request | {"facts": str(facts), "vectors": str(vectors)}), encoding="utf-8")
            try:
                # -I: neither this folder nor the user's settings are looked into for modules.
                done = subprocess.run(
                    tied([self._python, "-I", "-c", PROGRAM, str(asked)]), cwd=work, capture_output=True, text=True, check=False
                )
            except OSError as error:
                raise UserError(f"{self._python}: is no Python that runs ({error})") from error
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(
                    f"{self._folder}: sentence-transformers gives no vectors: {reason}",
                    "--python names an interpreter that has it; --reference names something else to compare with",
                )
            found = json.loads(facts.read_text(encoding="utf-8"))
            self._found = found["facts"]
            self.prompts = self._found["prompts"]
            return Answers(np.load(vectors), {int(index): reason for index, reason in found["refused"].items()})

    def facts(self) -> Facts:
        """Return what the library says of the model."""
        found = dict(self._found)
        return Facts(name=self.name, kind=f"sentence-transformers {found.pop('version')}", dtype="float32", **found)
