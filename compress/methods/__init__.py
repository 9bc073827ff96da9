"""How a model gets smaller: one file a method, named in this table, imported when a recipe asks for it."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from compress.common.lazy import attribute
from compress.methods.base import Method

METHODS = {
    "fold": "compress.methods.nv_embed.fold:Fold",
    "rtn": "compress.methods.quantize.rtn:RTN",
    "gptq": "compress.methods.quantize.gptq:GPTQ",
    "awq": "compress.methods.quantize.awq:AWQ",
    "smoothquant": "compress.methods.quantize.smoothquant:SmoothQuant",
    "fp8": "compress.methods.quantize.fp8:FP8",
    "bitsandbytes": "compress.methods.quantize.bitsandbytes:BitsAndBytes",
    "magnitude": "compress.methods.prune.magnitude:Magnitude",
    "wanda": "compress.methods.prune.wanda:Wanda",
    "sparsegpt": "compress.methods.prune.sparsegpt:SparseGPT",
    "depth": "compress.methods.prune.depth:Depth",
    "width": "compress.methods.prune.width:Width",
    "distill": "compress.methods.distill.method:Distill",
    "vocabulary": "compress.methods.vocabulary:Vocabulary",
    "latents": "compress.methods.nv_embed.latents:Latents",
    "mean_pooling": "compress.methods.nv_embed.mean_pooling:MeanPooling",
    "embeddings": "compress.methods.quantize.embeddings:Embeddings",
}


GROUP = "compress.methods"
"""Entry points of this group, `name = "module:Class"`, add the methods of other packages."""


@cache
def _added() -> dict[str, str]:
    """Return where the methods of other packages are, by name; none of them replaces a method of this project."""
    return {point.name: point.value for point in entry_points(group=GROUP) if point.name not in METHODS}


def method_names() -> list[str]:
    """Return the names of all methods: this project's, then those of installed packages."""
    return [*METHODS, *sorted(_added())]


def method_class(name: str) -> type[Method]:
    """Return the config class of a method.

    Raises:
        KeyError: there is no such method.
    """
    found: type[Method] = attribute(METHODS.get(name) or _added()[name])
    return found
