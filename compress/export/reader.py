"""How other libraries load an export, and reading it back: do they compute the variant's vectors?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.common.children import tied
from compress.common.errors import UserError
from compress.common.memory import available_memory_bytes, gigabytes
from compress.data.texts import suite_texts
from compress.measure.vectors.fidelity import cosines
from compress.models.embedder import Embedder
from compress.models.folder import ModelFolder
from compress.models.text.spec import EmbedderSpec, Pooling
from compress.runtimes.contract import TORCH
from compress.runtimes.loading import open_source

READ_BACK_TEXTS, READ_BACK_COSINE = 20, 0.9999
OURS = "compress-embedders"

IN_SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer
{imports}
model = SentenceTransformer(".", model_kwargs={{{options}}})  # the folder of this file

def embed(texts, prompt=""):
    return model.encode(texts, prompt=prompt)
"""
IN_TRANSFORMERS = """\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # the folder of this file
model = AutoModel.from_pretrained(".", dtype=torch.float32).eval()  # float16 on a GPU
{opened}
@torch.no_grad()
def embed(texts, prompt=""):
    texts = [{prepared} for text in texts]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    tokens, pooled = model(**batch).last_hidden_state.float(), batch["attention_mask"].clone()
{pooling}
    return {vectors}.numpy()
"""
WITHOUT_PROMPT = """\
    if prompt:  # the network reads it, but the mean leaves it out
        pooled[:, : len(tokenizer(prompt)["input_ids"]) - 1] = 0
"""
POOLED: dict[Pooling | tuple[Pooling, ...], str] = {
    Pooling.MEAN: "    vectors = (tokens * pooled[..., None]).sum(dim=1) / pooled.sum(dim=1, keepdim=True)",
    Pooling.CLS: "    vectors = tokens[:, 0]",
    Pooling.LAST: "    vectors = tokens[torch.arange(len(texts)), pooled.sum(dim=1) - 1]",
}

VERSIONS = """\
import json, sys
from importlib import metadata

found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        continue
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Reader:
    """The library that loads an export, and how."""

    library: str
    """Name of the library."""
    packages: tuple[str, ...]
    """Names of the pip packages that the example needs."""
    example: str
    """A program that defines `embed(texts, prompt="")`, run in the export's folder."""
    runtime: str = TORCH
    """Runtime of this project whose vectors the export must reproduce."""
    lowest: float = READ_BACK_COSINE
    """Lowest accepted cosine to the variant's vectors; lower for libraries that round the inputs or outputs of layers."""
    quantizes: bool = False
    """Whether the library quantizes activations as the variant does; otherwise they stay in floating point."""
    notes: tuple[str, ...] = ()
    """What a user should know about the export, one sentence or two each."""


def in_transformers(spec: EmbedderSpec, opened: str = "") -> str:
    """Return the example for plain transformers, with a spec's prompts and pooling; `opened`: code to run after loading."""
    unknown = spec.pooling not in POOLED or (spec.pooling is not Pooling.MEAN and not spec.pool_prompt)
    if unknown or spec.layers or spec.modules or spec.dimensions:
        raise UserError(
            f"cannot be written as transformers: its example has no pooling {' + '.join(spec.poolings)} with what is around it",
            "the layout sentence-transformers holds all of it",
        )
    pooling = (WITHOUT_PROMPT if not spec.pool_prompt else "") + POOLED[spec.pooling]
    prepared = "(prompt + text).lower()" if spec.lowercase else "prompt + text"
    vectors = "torch.nn.functional.normalize(vectors, dim=1)" if spec.normalize else "vectors"
    return IN_TRANSFORMERS.format(opened=opened, prepared=prepared, pooling=pooling, vectors=vectors)


def in_sentence_transformers(imports: str = "", options: str = '"dtype": "float32"') -> str:
    """Return the example for sentence-transformers; `options`: arguments that it passes to transformers."""
    return IN_SENTENCE_TRANSFORMERS.format(imports=imports, options=options)


def usual_prompt(variant: ModelFolder) -> str:
    """Return the default prompt, else the first; empty where the prompt takes half of the maximum length or more."""
    prompt = variant.spec.default_prompt or next(iter(variant.spec.prompts.values()), "")
    return prompt if 2 * variant.tokenizer.prompt_length(prompt) < variant.tokenizer.max_length else ""


@dataclass(frozen=True)
class Checked:
    """Result of reading back: `outcome` for the card, `advice` for the user where nothing could be read back."""

    outcome: str
    advice: str = ""


def read_back(source: ModelFolder, folder: Path, reader: Reader, python: Path) -> Checked:
    """Embed some texts with the reader and compare the vectors with the variant's own.

    Args:
        source: the variant.
        folder: the export's folder.
        reader: how the export is loaded.
        python: interpreter that has the reader's packages.

    Raises:
        UserError: the vectors differ, or the reader's example fails.
    """
    python = Path(shutil.which(python) or python).absolute()  # the example runs in another folder
    there = package_versions(reader, python)
    missing = [name for name in reader.packages if name not in there]
    if missing:
        return Checked(
            f"Not read back: {', '.join(missing)} not installed when it was written.",
            "Give an interpreter that has them: --python.",
        )
    needed, free = _float32_bytes(source), available_memory_bytes()
    if needed > free:
        return Checked(f"Not read back: that takes {gigabytes(needed)} of memory, and {gigabytes(free)} were free.")
    texts = list(suite_texts()[:READ_BACK_TEXTS])
    prompt = usual_prompt(source)
    expected = own(source, reader).encode(texts, prompt)  # and out of memory again
    worst = float(cosines(expected, run_example(folder, reader, texts, prompt, python)).min())
    if worst < reader.lowest:
        raise UserError(f"{source.name}: {reader.library} gives other vectors: lowest cosine {worst:.6f} on {len(texts)} texts")
    versions = ", ".join(f"{name} {version}" for name, version in there.items())
    return Checked(f"Read back with {versions}: lowest cosine {worst:.7f} to the variant's own vectors on {len(texts)} texts.")


def own(source: ModelFolder, reader: Reader) -> Embedder:
    """Open the variant in the way in which the reader runs the export."""
    if reader.runtime == TORCH and not reader.quantizes:
        from compress.runtimes.torch_runtime import open_variant

        return open_variant(source, device="cpu", activations=False)
    return open_source(source, runtime=reader.runtime, device="cpu")


def _float32_bytes(source: ModelFolder) -> int:
    """Return the bytes of a variant's network with every weight in float32, the most that reading back may need."""
    from compress.models.network.build import empty_network

    network = empty_network(source)
    return 4 * sum(parameter.numel() for parameter in network.parameters())


def package_versions(reader: Reader, python: Path) -> dict[str, str]:
    """Return the versions of a reader's packages that an interpreter has.

    Raises:
        UserError: `python` is not a Python interpreter that runs.
    """
    try:
        done = subprocess.run(tied([python, "-I", "-c", VERSIONS, *reader.packages]), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{python}: is not a Python that runs ({error})") from error
    found: dict[str, str] = json.loads(done.stdout)
    return found


def run_example(folder: Path, reader: Reader, texts: list[str], prompt: str, python: Path = Path(sys.executable)) -> np.ndarray:
    """Run a reader's example in a process without this package, and return its vectors of texts.

    Raises:
        UserError: the example failed.
    """
    with tempfile.TemporaryDirectory() as work:
        script, out = Path(work) / "example.py", Path(work) / "vectors.npy"
        ours = "" if reader.library == OURS else "\nimport sys\nassert 'compress' not in sys.modules\n"
        given = f"\nimport numpy\nnumpy.save({str(out)!r}, embed({texts!r}, {prompt!r}))\n{ours}"
        script.write_text(reader.example + given, encoding="utf-8")
        # -I: modules are not imported from this folder or the user's site-packages.
        done = subprocess.run(tied([python, "-I", str(script)]), cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"{folder}: the example of the card failed: {reason}", "--no-check writes the export anyway")
        vectors: np.ndarray = np.load(out)
    return vectors
