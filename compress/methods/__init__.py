"""How a model gets smaller: one file per method, named in this table and imported only when a recipe asks for it.

Other packages can add methods with an entry point in the group `compress.methods`: its name is the method's, its object the class.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from compress.common.errors import UserError, nearest
from compress.common.lazy import attribute
from compress.methods.base import FAMILIES, Method

METHODS = {
    "fold": "compress.methods.nv_embed.fold:Fold",
    "rotate": "compress.methods.rotate:Rotate",
    "rtn": "compress.methods.quantize.rtn:RTN",
    "gptq": "compress.methods.quantize.gptq:GPTQ",
    "autoround": "compress.methods.quantize.autoround:AutoRound",
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
    "align": "compress.methods.align.method:Align",
}
"""The methods of this package, by name. A method of another package never replaces one of these."""

GROUP = "compress.methods"
"""Group of the entry points by which other packages add methods."""


def method_names() -> tuple[str, ...]:
    """Return the names of all methods: this package's, then other packages'. Imports none of them."""
    return (*METHODS, *sorted({entry.name for entry in entry_points(group=GROUP)} - METHODS.keys()))


def is_method(name: str) -> bool:
    """Whether there is a method of this name. For one of this package no other package is looked at."""
    return name in METHODS or name in method_names()


def method_class(name: str) -> type[Method]:
    """Return the config class of a method.

    Raises:
        UserError: there is no such method, several packages have one of this name, or the package that has it is broken.
    """
    if name in METHODS:
        found: type[Method] = attribute(METHODS[name])
        return found
    entries = tuple(entry_points(group=GROUP, name=name))
    if not entries:
        raise UserError(f"unknown method {name!r}", nearest(name, method_names()))
    if len(entries) > 1:
        packages = " and ".join(sorted(_package(entry) for entry in entries))
        raise UserError(f"method {name!r} is in the packages {packages}", "uninstall one of them, or rename its method")
    return _loaded(entries[0])


def _loaded(entry: EntryPoint) -> type[Method]:
    """Import another package's method.

    Raises:
        UserError: it cannot be imported, or is no method of that name.
    """
    place = f"method {entry.name!r} of the package {_package(entry)} ({entry.value})"
    hint = "repair or uninstall the package; docs/adding.md says what a method needs"
    try:
        found: Any = entry.load()
    except Exception as error:  # the package's own code runs here, and may raise anything
        raise UserError(f"{place} cannot be imported: {type(error).__name__}: {error}", hint) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{place} is not a subclass of compress.methods.base.Method", hint)
    if found.model_fields["method"].default != entry.name:
        raise UserError(f"{place} does not have `method: Literal[{entry.name!r}] = {entry.name!r}`", hint)
    if not isinstance(getattr(found, "family", None), str):
        raise UserError(f"{place} does not have a `family`, such as {', '.join(map(repr, FAMILIES))}", hint)
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module
