"""Makes text embedders smaller and faster, and measures what that costs.

>>> import compress
>>> embedder = compress.load("nano")                         # doctest: +SKIP
>>> embedder.encode(["two", "texts"]).shape                  # doctest: +SKIP
(2, 384)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "run"]

if TYPE_CHECKING:
    from compress.pipeline.run import run
    from compress.runtimes.loading import load


def __getattr__(name: str) -> Any:
    # Lazy: both import torch, which `compress --help` must not.
    if name == "load":
        from compress.runtimes.loading import load

        return load
    if name == "run":
        from compress.pipeline.run import run

        return run
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
