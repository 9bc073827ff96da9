"""OpenVINO on the CPU: a variant in, an Embedder out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import openvino

from compress.models.embedder import Vectors
from compress.models.text.tokens import Ids
from compress.runtimes.graph_embedder import GraphEmbedder, lowered, threads_and_streams

NAME = "openvino"  # in `compress.runtimes.contract`
# The bindings look numpy up when they see its first array, under a lock of C++ that two threads can deadlock on together with
# Python's own (openvino 2026.4). So it happens here: of threads that import a module, one runs it.
openvino.Tensor(np.zeros(1, dtype=np.int64), shared_memory=True)

# Kernels are compiled for every shape that comes, some 5 ms for a MiniLM, and kept. Batches have few shapes; single texts have one
# for each length, so these are padded to a multiple of this, as their masks say.
SINGLE_STEP = 8
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINOEmbedder(GraphEmbedder):
    """A variant in OpenVINO."""

    def __init__(self, name: str, folder: Path, dtype: str | None = None, threads: int | None = None) -> None:
        """Open a variant's folder; see `open_variant`."""
        graph = lowered(folder, NAME, dtype)
        threads, streams = threads_and_streams(folder, threads)
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[dtype or "float32"],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            # By default it rounds the inputs of layers whose weights alone are integers, which the variant does not ask for.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self._compiled = openvino.Core().compile_model(graph, "CPU", settings)
        # A request runs one batch at a time; whoever wants to run one takes a request and puts it back.
        self._requests: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for _ in range(streams):
            self._requests.put(self._compiled.create_infer_request())
        super().__init__(name, folder, threads, streams)

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


def open_variant(folder: Path, name: str, *, dtype: str | None = None, threads: int | None = None) -> OpenVINOEmbedder:
    """Open a variant.

    Args:
        folder: of the variant.
        name: to be spoken of by.
        dtype: of the floating-point arithmetic: float32, or bfloat16 where the CPU multiplies it.
        threads: that compute; None: one for each core that the process may use.

    Raises:
        UserError: OpenVINO does not execute the variant's numbers or the dtype.
    """
    return OpenVINOEmbedder(name, folder, dtype, threads)
