"""Runs variants in OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import openvino

from compress.models.embedder import Vectors
from compress.models.folder import ModelFolder
from compress.models.text.tokens import Ids
from compress.runtimes.contract import opening
from compress.runtimes.graph_embedder import GraphEmbedder, lowered, threads_and_streams

NAME = "openvino"  # in `compress.runtimes.contract`
# The bindings import numpy when they get their first array, and hold a C++ lock meanwhile. Two threads can deadlock on it and on
# Python's own lock (openvino 2026.4). Doing it here is safe, because only one thread executes a module on import.
openvino.Tensor(np.zeros(1, dtype=np.int64), shared_memory=True)

# OpenVINO compiles kernels for each new input shape, about 5 ms for a MiniLM, and caches them. Batches have few shapes, but single
# texts have one per length. So single texts are padded, with a mask, to a multiple of this many tokens.
SINGLE_STEP = 8
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINOEmbedder(GraphEmbedder):
    """An embedder that runs a variant in OpenVINO."""

    def __init__(self, folder: ModelFolder, dtype: str | None = None, threads: int | None = None) -> None:
        """Open a variant's folder; see `open_variant`."""
        graph = lowered(folder, NAME, dtype)
        threads, streams = threads_and_streams(folder, threads)
        self._compiled = _compiled(graph, threads, streams, dtype)
        # A request runs one batch at a time. `run` takes one from this queue and returns it afterwards.
        self._requests: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for _ in range(streams):
            self._requests.put(self._compiled.create_infer_request())
        super().__init__(folder, threads, streams)

    def _dimension(self) -> int:
        return int(self._compiled.output(0).get_partial_shape()[1].get_length())

    def run(self, inputs: Sequence[Ids]) -> Vectors:
        """Run one batch; see `GraphEmbedder.run`."""
        if len(inputs[0]) == 1:
            missing = -inputs[0].shape[1] % SINGLE_STEP
            inputs = [np.pad(rows, ((0, 0), (0, missing))) for rows in inputs]
        request = self._requests.get()
        try:
            request.infer(list(inputs), share_inputs=True)
            return np.array(request.get_output_tensor().data, dtype=np.float32)
        finally:
            self._requests.put(request)


def _compiled(graph: Path, threads: int, streams: int, dtype: str | None = None) -> openvino.CompiledModel:
    """Open a graph."""
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype or "float32"],
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        # By default OpenVINO also rounds the inputs of layers for which the variant quantizes only the weights.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    with opening(graph):
        return openvino.Core().compile_model(graph, "CPU", settings)


def open_graph(graph: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Open a graph of one input and one output; the function runs it in so many threads."""
    request = _compiled(graph, threads, 1).create_infer_request()

    def run(rows: np.ndarray) -> np.ndarray:
        request.infer([rows], share_inputs=True)
        made: np.ndarray = request.get_output_tensor().data
        return made

    return run


def open_variant(folder: ModelFolder, *, dtype: str | None = None, threads: int | None = None) -> OpenVINOEmbedder:
    """Open a variant in OpenVINO.

    Args:
        folder: the variant's folder.
        dtype: dtype of the floating-point arithmetic: float32, or bfloat16 if the CPU has instructions for it; None for float32.
        threads: number of CPU threads; None for one per core that the process may use.

    Raises:
        UserError: OpenVINO does not support the variant's number formats or the dtype.
    """
    return OpenVINOEmbedder(folder, dtype, threads)
