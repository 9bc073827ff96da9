"""onnxruntime on the CPU: a variant in, an Embedder out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from compress.models.embedder import Vectors
from compress.models.text.tokens import Ids
from compress.runtimes.graph_embedder import GraphEmbedder, lowered, threads_and_streams

NAME = "onnxruntime"  # in `compress.runtimes.contract`
# On a CPU these fusions cost more than they save (onnxruntime 1.32; 840 tokens x 384, one thread): a SkipLayerNormalization takes
# 1.4 ms, the addition and the normalisation that it replaces 0.2; a BiasGelu 1.0, Gelu alone 0.6, its bias being in the product.
SLOWER_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
ERRORS_ONLY = 3
FLOAT32 = "1"


class OnnxEmbedder(GraphEmbedder):
    """A variant in onnxruntime."""

    def __init__(self, name: str, folder: Path, dtype: str | None = None, threads: int | None = None) -> None:
        """Open a variant's folder; see `open_variant`."""
        graph = lowered(folder, NAME, dtype)
        threads, streams = threads_and_streams(folder, threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads // streams
        options.log_severity_level = ERRORS_ONLY
        # By default it rounds the inputs of layers whose weights alone are integers, which the variant does not ask for.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", FLOAT32)
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOWER_FUSIONS
        )
        self._names = [given.name for given in self._session.get_inputs()]
        super().__init__(name, folder, threads, streams)

    def _dimension(self) -> int:
        return int(self._session.get_outputs()[0].shape[1])

    def run(self, inputs: Sequence[Ids]) -> Vectors:
        """Run one batch; see `GraphEmbedder.run`."""
        vectors: Vectors = self._session.run(None, dict(zip(self._names, inputs, strict=True)))[0]
        return vectors


def open_variant(folder: Path, name: str, *, dtype: str | None = None, threads: int | None = None) -> OnnxEmbedder:
    """Open a variant.

    Args:
        folder: of the variant.
        name: to be spoken of by.
        dtype: of the floating-point arithmetic: float32.
        threads: that compute; None: one for each core that the process may use.

    Raises:
        UserError: onnxruntime does not execute the variant's numbers or the dtype.
    """
    return OnnxEmbedder(name, folder, dtype, threads)
