"""YAML that people write, read strictly: bounded, free of duplicate keys, and every fault named with file, line and key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from compress.common.errors import UserError, nearest
from compress.common.inputs import read_text

YAML_BYTES = 2**19
MOST_VALUES = 100_000
"""Values of a file, each counted wherever an alias repeats it. The longest recipe here has 60."""
DEEPEST = 32
"""Levels of nested lists and mappings."""
# Quoted strings, and comments to the end of the line: brackets in them nest nothing.
_QUOTED = re.compile(r"'[^']*'|\"(?:\\\\.|[^\"\\\\])*\"|(?:^|\s)#.*$")
_LONG_NUMBER = re.compile(r"(?<![\w.])[-+]?[0-9_]{4000}")
Fault = tuple[int, str]
"""A line number, from 1 (0 if there is no file), and what is wrong there."""


def check_there(path: Path, what: str) -> None:
    """See that a file is there; `what` says what it is meant to be: `recipe`.

    Raises:
        UserError: it is not; names the nearest that is next to it.
    """
    if not path.exists():
        siblings = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), siblings) if siblings else ""
        why = "a link to nothing" if path.is_symlink() else "no such file"
        raise UserError(f"{what} {path}: cannot be read ({why})", hint)


def read_yaml(path: Path, kind: str, example: str) -> Mapping[str, Any]:
    """Read a YAML file that holds a mapping; the reader's own containers are kept, for they know the lines.

    Args:
        path: the file.
        kind: what the file is, with an article, for errors: `a recipe`.
        example: where to see one that is right, for errors.

    Raises:
        UserError: it cannot be read, is not YAML, is too large or nested too deeply, or holds something else.
    """
    text = read_text(path, YAML_BYTES)
    _check_brackets(text, path)
    try:
        data = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {' '.join(str(error.problem or error.context).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply for {kind}") from error
    except (YAMLError, ValueError, TypeError, AttributeError) as error:
        # Errors of the reader itself (control characters) and of its numbers, dates and keys carry no mark.
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: {kind} is a mapping of keys to values, this is a {type(data).__name__}", example)
    _check_size(data, path)
    return data


def refusal(faults: Sequence[Fault], place: str) -> UserError:
    """Return the error that names every fault, at least one, in the order of their lines; `place` names the file."""
    lines = [f"{place}{f', line {line}' if line else ''}: {message}" for line, message in sorted(faults)]
    return UserError(lines[0], "\n".join(lines[1:]))


def refuse(faults: Sequence[Fault], place: str) -> None:
    """Refuse a file that has faults; `place` names it.

    Raises:
        UserError: there are faults; see `refusal`.
    """
    if faults:
        raise refusal(faults, place)


def _check_brackets(text: str, path: Path) -> None:
    """See that lists in brackets are not nested deeply, for which the YAML reader takes seconds, and that numbers have few digits.

    Raises:
        UserError: they are, or have not; names the line.
    """
    depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        bare = _QUOTED.sub("", line)
        if _LONG_NUMBER.search(bare):
            raise UserError(f"{path}, line {number}: a number has too many digits")
        for character in bare if "[" in bare or "{" in bare or depth else "":
            depth += (character in "[{") - (character in "]}")
            if depth > DEEPEST:
                raise UserError(f"{path}, line {number}: nested more than {DEEPEST} levels deep")
        depth = max(depth, 0)


def _check_size(data: Any, path: Path) -> None:
    """See that a file has as many values as a person writes, those that aliases repeat counted each time, and none inside itself.

    Raises:
        UserError: it has more; names the line of the key that holds them.
    """
    level: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    count = 0
    for _ in range(DEEPEST):
        below = []
        for place, value in level:
            items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, set)) else ()
            for key, item in items:
                count += 1
                if count > MOST_VALUES:
                    line = line_at(data, place)
                    raise UserError(f"{path}, line {line}: with its aliases the file has more than {MOST_VALUES:,} values")
                if isinstance(item, (Mapping, list, set)):
                    below.append(((*place, key), item))
        if not below:
            return
        level = below
    raise UserError(f"{path}, line {line_at(data, level[0][0])}: nested more than {DEEPEST} levels deep, or an alias holds itself")


def plain(value: Any) -> Any:
    """Convert the YAML reader's own containers and scalars to Python's."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(plain(item) for item in value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def faults_of(error: ValidationError, model: type[BaseModel], data: Any, prefix: tuple[str | int, ...]) -> list[Fault]:
    """Return each fault that pydantic found, with its line."""
    faults: list[Fault] = []
    for fault in error.errors():
        location = (*prefix, *fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _fields_at(model, fault["loc"][:-1])
            message = f"unknown key {fault['loc'][-1]!r}; {nearest(str(fault['loc'][-1]), known)}"
        elif fault["type"] == "literal_error":
            message = f"{fault['input']!r} is not allowed here; {_meant(fault['input'], _options_at(model, fault['loc']))}"
        elif fault["type"] == "missing":
            message = "field required"
        else:
            said = fault["msg"].replace("valid tuple", "list").replace("valid dictionary or instance of", "mapping:")
            message = f"{said[0].lower()}{said[1:]}, got {fault['input']!r}"
        faults.append(fault_at(data, location, message))
    return faults


def _meant(given: Any, options: Sequence[Any]) -> str:
    """Suggest which of the options was meant."""
    same = next((option for option in options if str(option) == str(given)), None)
    if same is not None:
        return f"write {same} {'without' if isinstance(given, str) else 'in'} quotes"
    return nearest(str(given), [str(option) for option in options])


def fault_at(data: Any, location: Sequence[str | int], message: str) -> Fault:
    """Return a fault with its line and key."""
    return line_at(data, location), f"{'.'.join(str(part) for part in location)}: {message}"


def line_at(data: Any, location: Sequence[str | int]) -> int:
    """Return the line, from 1, of the deepest part of `location` that is in the file; 0 where nothing is from a file."""
    line = 0
    for part in location:
        marks = getattr(data, "lc", None)
        if isinstance(data, Mapping):  # keys are read as strings, and may be numbers or nothing in the file
            part = next((key for key in data if str(key) == str(part)), part)
        if marks is None or marks.data is None or (part not in data if isinstance(data, Mapping) else not isinstance(part, int)):
            break
        position = marks.key(part) if isinstance(data, Mapping) else marks.item(part)
        line = position[0] + 1
        data = data[part]
    return line


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    kinds: dict[str, Any] = {}
    for part in location:
        if part in kinds:  # after a key that takes several kinds of mapping, pydantic names the kind that it judged by
            model, kinds = kinds[str(part)], {}
            continue
        field = model.model_fields.get(str(part))
        kinds = _kinds(field.annotation) if field else {}
        if kinds:
            continue
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def _kinds(annotation: Any) -> dict[str, Any]:
    """Return the mappings that a key with tagged kinds takes, by their tags; empty for every other key."""
    found: dict[str, Any] = {}
    for member in get_args(annotation):
        tags = [mark.tag for mark in getattr(member, "__metadata__", ()) if isinstance(mark, Tag)]
        found |= dict.fromkeys(tags, member.__origin__) if tags else _kinds(member)
    return {tag: kind for tag, kind in found.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    return list(_model_at(model, location).model_fields)


def _options_at(model: type[BaseModel], location: Sequence[str | int]) -> list[Any]:
    """Return the values that a Literal field allows, also inside tuples, and in every kind of mapping that a key takes."""
    names = [part for part in location if isinstance(part, str)]
    owners = [_model_at(model, names[:-1])]
    if len(names) > 2:
        field = _model_at(model, names[:-3]).model_fields.get(names[-3])
        kinds = _kinds(field.annotation) if field else {}
        owners = list(kinds.values()) if names[-2] in kinds else owners
    return [option for owner in owners for option in _literals(owner.model_fields.get(names[-1]))]


def _literals(field: FieldInfo | None) -> list[Any]:
    annotation: Any = field.annotation if field else None
    while get_args(annotation) and isinstance(get_args(annotation)[0], type(Literal["x"])):
        annotation = get_args(annotation)[0]
    return list(get_args(annotation))
