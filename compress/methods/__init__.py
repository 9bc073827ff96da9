"""How a model gets smaller: one file a method, named in this table, imported when a recipe asks for it."""

from __future__ import annotations

import importlib

from compress.methods.base import Method

METHODS = {
    "fold": "compress.methods.fold:Fold",
    "rtn": "compress.methods.quantize.rtn:RTN",
}


def method_class(name: str) -> type[Method]:
    """Return the config class of a method.

    Raises:
        KeyError: there is no such method.
    """
    module, _, attribute = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), attribute)
    return found
