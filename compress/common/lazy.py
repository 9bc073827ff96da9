"""Tables name their entries as "module:attribute", so that listing them imports nothing."""

from __future__ import annotations

import importlib
from typing import Any


def attribute(place: str) -> Any:
    """Import a module and return one of its attributes.

    Args:
        place: `module:attribute`, such as `compress.export.gguf:write`.

    Raises:
        ImportError: the module cannot be imported.
        AttributeError: the module has no such attribute.
    """
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
