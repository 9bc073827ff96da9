"""What a request's texts are for, and so what is put before them: prompts by name, instructions, a Router's ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from compress.common.errors import UserError, nearest
from compress.models.folder import ModelFolder
from compress.models.text.spec import TASKS
from compress.models.text.tokens import TextTokenizer
from compress.serve.protocol import ApiError, EmbeddingsRequest

_INSTRUCTED = re.compile(r"(Instruct: ).+?(\nQuery: ?)", re.S)


@dataclass(frozen=True)
class Way:
    """Texts that pass the same modules; a model without a Router has one."""

    number: int
    folder: ModelFolder
    tokenizer: TextTokenizer


@dataclass(frozen=True)
class Purpose:
    """What a request's texts are embedded for."""

    way: Way
    prompt: str
    """What is put before each text."""
    name: str | None = None
    """The prompt's name, for logs; None: the default one, or one that the client has written."""


class Prompts:
    """The prompts of a model."""

    def __init__(self, folder: ModelFolder, default: str | None, template: str | None) -> None:
        """Read them.

        Args:
            folder: the model.
            default: name of the prompt of texts whose request names none; None: the model's own default.
            template: what an instruction becomes; None: the model's own way, if its prompts show one.

        Raises:
            UserError: the model has no prompt of the name `default`.
        """
        routes = folder.routes
        folders = [folder] if routes is None else [folder.along(way) for way in routes.ways]
        self.ways = [Way(number, one, one.tokenizer) for number, one in enumerate(folders)]
        self._of_task = {} if routes is None else {task: routes.ways.index(routes.modules(task)) for task in routes.tasks}
        self.named: Mapping[str, str] = self.ways[0].folder.spec.prompts
        self.template = template or _template_of(self.ways[0].folder)
        self.default = default
        if default is not None:
            try:
                self.by_name(default)
            except ApiError as error:
                raise UserError(f"--prompt: model {folder.name!r}: {error.message}") from error

    @property
    def names(self) -> list[str]:
        """What `input_type` may be."""
        return list(dict.fromkeys([*TASKS, *(task for task in self._of_task if task), *self.named]))

    def by_name(self, name: str) -> Purpose:
        """Return the purpose of a name: `query`, `document`, one of the model's prompts, or a task of its Router.

        Raises:
            ApiError: 400, there is none.
        """
        if self._of_task:
            if name in self._of_task:
                return Purpose(self._way(name), self._way(name).folder.spec.prompt(None, name if name in TASKS else None), name)
        elif name in self.named:
            return Purpose(self.ways[0], self.named[name], name)
        elif name in TASKS:
            return Purpose(self.ways[0], self.ways[0].folder.spec.prompt(None, name), name)
        raise ApiError(400, f"input_type {name[:80]!r} is not known to this model; {nearest(name, self.names)}", param="input_type")

    def _way(self, task: str | None) -> Way:
        if not self._of_task:
            return self.ways[0]
        if task not in self._of_task:
            raise ApiError(400, f"this model embeds by task; give input_type: {', '.join(self.names)}", param="input_type")
        return self.ways[self._of_task[task]]

    def of(self, request: EmbeddingsRequest, suffix: str | None) -> Purpose:
        """Return the purpose of a request.

        Args:
            request: the request.
            suffix: the name after `@` in `model`; None: there is none.

        Raises:
            ApiError: 400, a name is not known, the model takes no instructions, or two things are asked for at the same time.
        """
        given = {"input_type": request.input_type, "instruction": request.instruction, "prompt": request.prompt}
        chosen = [field for field, value in given.items() if value is not None] + (["model"] if suffix is not None else [])
        if len(chosen) > 1:
            raise ApiError(400, f"{' and '.join(chosen)} exclude each other: each says what is put before texts", param=chosen[0])
        if request.prompt is not None:
            return Purpose(self._way(None), request.prompt)
        if request.instruction is not None:
            return Purpose(self._way(None), self._instructed(request.instruction))
        name = request.input_type if request.input_type is not None else suffix
        if name is None:
            name = self.default
        if name is not None:
            return self.by_name(name)
        way = self._way(None)
        return Purpose(way, way.folder.spec.prompt())

    def _instructed(self, instruction: str) -> str:
        if not instruction:
            return ""
        if self.template is None:
            raise ApiError(
                400,
                "this model takes no instructions, as far as its files say; give input_type, or what is put before texts as prompt",
                param="instruction",
            )
        return self.template.replace("{instruction}", instruction)


def _template_of(folder: ModelFolder) -> str | None:
    """Return what an instruction becomes, as the model's own prompts show it."""
    for prompt in folder.spec.prompts.values():
        found = _INSTRUCTED.fullmatch(prompt)
        if found:
            return f"{found[1]}{{instruction}}{found[2]}"
    return None
