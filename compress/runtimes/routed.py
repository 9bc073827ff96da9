"""An embedder with a Router: an embedder for each of its routes, and the task of the texts chooses. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from compress.models.embedder import Embedder, Vectors
from compress.models.text.router import Routes
from compress.models.text.sentence_transformers import Module
from compress.models.text.spec import TASKS


@runtime_checkable
class Routed(Protocol):
    """An embedder that computes otherwise for each task, not only with another prompt."""

    def route(self, task: str | None) -> Embedder:
        """Return the embedder for texts of a task.

        Raises:
            ValueError: there is none.
        """
        ...


class RoutedEmbedder:
    """Sends texts through the modules that a model's Router has for their task."""

    def __init__(self, name: str, routes: Routes, embedders: Mapping[tuple[Module, ...], Embedder]) -> None:
        """Combine the embedders of all routes.

        Args:
            name: the model's name.
            routes: which modules texts pass.
            embedders: the embedder of each of `routes.ways`. The first one's spec and width are taken for the model's.
        """
        self.name = name
        self._routes, self._embedders = routes, embedders
        first = embedders[routes.ways[0]]
        self.spec, self.dimension = first.spec, first.dimension

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """The tasks that texts may have, the model's own names for them included; None: no task, which takes the default route."""
        return self._routes.tasks

    def route(self, task: str | None) -> Embedder:
        """Return the embedder for texts of a task; None: that of the default route.

        Raises:
            ValueError: no route is for the task; or there is no task, and no default route.
        """
        return self._embedders[self._routes.modules(task)]

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        task: str | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts; see `compress.models.embedder.BatchedEmbedder.encode`.

        `task` may also be a name that the model's Router has for a route of its own; the prompt is then the default one.

        Raises:
            ValueError: see `route`.
        """
        named = task if task in TASKS else None
        return self.route(task).encode(texts, prompt, task=named, batch_tokens=batch_tokens, progress=progress)
