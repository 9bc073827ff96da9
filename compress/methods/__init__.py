"""How a model gets smaller: one file a method, named in this table, imported when a recipe asks for it."""

from __future__ import annotations

import importlib

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


def method_class(name: str) -> type[Method]:
    """Return the config class of a method.

    Raises:
        KeyError: there is no such method.
    """
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found
