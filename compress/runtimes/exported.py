"""Exports of `compress export --format onnx|openvino` as embedders: a graph, `tokenizer.json` and `embedder.json` in one folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.common.inputs import read_as
from compress.models.embedder import BatchedEmbedder, Vectors, with_progress
from compress.models.text.spec import EmbedderSpec, Similarity
from compress.models.text.tokens import Batch, Ids, TextTokenizer, open_tokenizer
from compress.runtimes.contract import RUNTIMES, opening
from compress.runtimes.graph_embedder import BATCH_TOKENS, pooled_from

SETTINGS_FILE = "embedder.json"
GRAPHS = {"model.onnx": "onnxruntime", "model.xml": "openvino"}


class ExportSettings(BaseModel):
    """What `embedder.json` says of a graph; keys of later versions are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    dimension: int
    max_length: int
    prompts: dict[str, str]
    default_prompt: str
    pool_prompt: bool
    prompt_specials: bool
    lowercase: bool
    suffix: str
    normalized: bool
    similarity: Similarity = "cosine"
    inputs: tuple[str, ...]


Run = Callable[[Sequence[Ids]], Vectors]
_OF_TEXTS = {"pool_prompt", "prompt_specials", "lowercase", "suffix", "prompts", "default_prompt", "similarity"}


class ExportedEmbedder(BatchedEmbedder):
    """A graph that was written for a runtime alone, run by that runtime."""

    def __init__(self, name: str, folder: Path, settings: ExportSettings, runtime: str, run: Run) -> None:
        """Take what `open_export` has read."""
        kept = settings.model_dump(include=_OF_TEXTS)
        # The pooling is in the graph and written nowhere; nothing here asks for it.
        spec = EmbedderSpec(**kept, normalize=settings.normalized, max_length=settings.max_length)
        tokenizer = TextTokenizer(open_tokenizer(folder), settings.max_length, spec)
        super().__init__(name, spec, tokenizer, settings.dimension, BATCH_TOKENS)
        self.runtime = runtime
        self._inputs = len(settings.inputs)
        self._run = run

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""
        for ids, mask in with_progress(batches, "encoding", show):
            yield self._run((ids, mask, pooled_from(mask, pool_from))[: self._inputs])


def is_export(folder: Path) -> bool:
    """Whether a folder is an export for a graph runtime."""
    return (folder / SETTINGS_FILE).is_file()


def open_export(folder: Path) -> ExportedEmbedder:
    """Open an export.

    Raises:
        UserError: it lacks its graph or a setting, or its runtime is not installed.
    """
    settings = read_as(folder / SETTINGS_FILE, ExportSettings, "compress export writes it anew")
    graph = next((folder / name for name in GRAPHS if (folder / name).is_file()), None)
    if graph is None:
        raise UserError(f"{folder}: has {SETTINGS_FILE}, and no graph next to it", f"one of {', '.join(GRAPHS)}")
    runtime = RUNTIMES[GRAPHS[graph.name]]
    if not runtime.is_installed:
        raise UserError(
            f"{folder}: {runtime.name} runs it, and is not installed", f"pip install 'compress-embedders[{runtime.extra}]'"
        )
    opener = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}[runtime.name]
    return ExportedEmbedder(folder.resolve().name, folder, settings, runtime.name, opener(graph, settings.inputs))


def _in_onnxruntime(graph: Path, inputs: Sequence[str]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    # As the export's own example: inputs of layers whose weights alone are integers stay in float32.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    with opening(graph):
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(arrays: Sequence[Ids]) -> Vectors:
        vectors: Vectors = session.run(None, dict(zip(inputs, arrays, strict=True)))[0]
        return vectors

    return run


def _in_openvino(graph: Path, inputs: Sequence[str]) -> Run:
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # as the export's own example
    with opening(graph):
        compiled = openvino.Core().compile_model(graph, "CPU", exact)

    def run(arrays: Sequence[Ids]) -> Vectors:
        vectors: Vectors = compiled(list(arrays))[0]
        return vectors

    return run
