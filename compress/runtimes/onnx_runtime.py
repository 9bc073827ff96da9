"""Runs variants in onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from compress.common.errors import UserError
from compress.layers.scheme import ActivationScheme
from compress.models.embedder import Vectors
from compress.models.folder import ModelFolder
from compress.models.text.tokens import Ids
from compress.runtimes.contract import TORCH, opening
from compress.runtimes.graph_embedder import GraphEmbedder, lowered, threads_and_streams

NAME = "onnxruntime"  # in `compress.runtimes.contract`
# On a CPU these fusions cost more time than they save. Measured with onnxruntime 1.32, 840 tokens x 384, one thread:
# SkipLayerNormalization takes 1.4 ms, the addition and normalisation that it replaces 0.2 ms. BiasGelu takes 1.0 ms, Gelu 0.6 ms;
# without the fusion the bias is part of the matrix product.
SLOWER_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
ERRORS_ONLY = 3
FLOAT32 = "1"


class OnnxEmbedder(GraphEmbedder):
    """An embedder that runs a variant in onnxruntime."""

    def __init__(self, folder: ModelFolder, dtype: str | None = None, threads: int | None = None) -> None:
        """Open a variant's folder; see `open_variant`."""
        graph = lowered(folder, NAME, dtype)
        threads, streams = threads_and_streams(folder, threads)
        check_groups(folder)
        self._session = _session(graph, threads // streams)
        self._names = [given.name for given in self._session.get_inputs()]
        super().__init__(folder, threads, streams)

    def _dimension(self) -> int:
        return int(self._session.get_outputs()[0].shape[1])

    def run(self, inputs: Sequence[Ids]) -> Vectors:
        """Run one batch; see `GraphEmbedder.run`."""
        vectors: Vectors = self._session.run(None, dict(zip(self._names, inputs, strict=True)))[0]
        return vectors


def _session(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a graph whose calls take so many threads each."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ONLY
    # By default onnxruntime also rounds the inputs of layers for which the variant quantizes only the weights.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", FLOAT32)
    with opening(graph):
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER_FUSIONS)


def open_graph(graph: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Open a graph of one input and one output; the function runs it in so many threads."""
    session = _session(graph, threads)
    (given,) = session.get_inputs()

    def run(rows: np.ndarray) -> np.ndarray:
        made: np.ndarray = session.run(None, {given.name: rows})[0]
        return made

    return run


def check_groups(folder: ModelFolder) -> None:
    """See that onnxruntime rounds a variant's activations in groups on this CPU, where the variant says so.

    Raises:
        UserError: it has no such product here, and would leave them in floating point.
    """
    layers = folder.compressed.quantized.values()
    sizes = {layer.group_size or 0 for layer in layers if layer.activations is ActivationScheme.DYNAMIC_PER_GROUP}
    if not sizes:
        return
    from compress.runtimes.onnx_trial import multiplies_groups

    for group_size in sorted(sizes):
        if not multiplies_groups(group_size):
            raise UserError(
                f"{folder.path}: onnxruntime {onnxruntime.__version__} has no exact product of activations rounded in groups of "
                f"{group_size} on this CPU",
                f"runtime: {TORCH}",
            )


def open_variant(folder: ModelFolder, *, dtype: str | None = None, threads: int | None = None) -> OnnxEmbedder:
    """Open a variant in onnxruntime.

    Args:
        folder: the variant's folder.
        dtype: dtype of the floating-point arithmetic; float32 is the only one.
        threads: number of CPU threads; None for one per core that the process may use.

    Raises:
        UserError: onnxruntime does not support the variant's number formats or the dtype.
    """
    return OnnxEmbedder(folder, dtype, threads)
