"""Writes the keys of a recipe in Markdown, from the same JSON Schema that `compress schema` prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from compress.pipeline.recipe_file import schema

Schema = Mapping[str, Any]


def type_of(key: Schema) -> str:
    """Return what a value may be, in a few words."""
    if "enum" in key:
        return ", ".join(f"`{value}`" for value in key["enum"])
    if "const" in key:
        return f"`{key['const']}`"
    options = key.get("anyOf") or key.get("oneOf")
    if options:
        return " or ".join(dict.fromkeys(type_of(option) for option in options if option.get("type") != "null"))
    if "$ref" in key:
        return f"mapping, see {key['$ref'].rsplit('/', 1)[1]}"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping"}
    if key.get("type") == "array":
        of = key.get("items", {})
        return "list of steps" if "oneOf" in of else f"list of {type_of(of)}"
    if key.get("type") == "object" and "$ref" in key.get("additionalProperties", {}):
        return f"mapping to {key['additionalProperties']['$ref'].rsplit('/', 1)[1]}"
    return names[key["type"]]


def limits_of(key: Schema) -> str:
    """Return the bounds of a number."""
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    options = [key, *key.get("anyOf", ())]
    return ", ".join(f"{text} {option[word]:g}" for option in options for word, text in words.items() if word in option)


def _default(key: Schema, required: bool) -> str:
    if required:
        return "required"
    if "default" not in key or key["default"] is None:
        return ""
    if isinstance(key["default"], dict) and key["default"]:
        return ""  # its keys are listed in a section of their own
    return f"`{json.dumps(key['default'], ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def keys_table(of: Schema) -> str:
    """Write a table of an object's keys: what each may be, its default, what it says."""
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for name, key in of["properties"].items():
        if name == "method":
            continue
        value = "; ".join(part for part in (type_of(key), limits_of(key)) if part)
        cells = (f"`{name}`", value, _default(key, name in of.get("required", ())), key.get("description", ""))
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) if len(lines) > 2 else "No keys."


def recipe_keys() -> str:
    """Write every key of a recipe: the top level, its sections, then each method."""
    whole = schema()
    parts = ["## Top level", keys_table(whole)]
    parted: dict[bool, list[str]] = {False: [], True: []}
    for name, of in whole["$defs"].items():
        is_method = "method" in of["properties"]
        about, _, more = of.get("description", "").partition("\n\n")
        title = f"### `{name}`" if is_method else f"### {name}"
        words = [" ".join(paragraph.split()) for paragraph in (about, *more.split("\n\n")) if paragraph.strip()]
        parted[is_method] += [title, *words, keys_table(of)]
    parts += ["## Sections", *parted[False], "## Methods", *parted[True]]
    return "\n\n".join(parts)
