"""sentence-transformers' `Router` (once `Asym`): texts go through other modules for each task. No torch here.

A model with one is read as several: `Routes` gives the modules that the texts of a task pass, from the first to the last, with no
Router among them.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.common.errors import UserError, nearest
from compress.common.inputs import read_json
from compress.models.text.sentence_transformers import ROUTERS, STATIC, TRANSFORMER, Module, kind_of
from compress.models.text.spec import TASKS, UnknownTask

ROUTER_FILES = ("router_config.json", "config.json")
"""Names of a Router's file, in the order in which sentence-transformers looks for them; Asym had the second."""
INPUTS = (TRANSFORMER, STATIC)
"""What a route may begin with: modules that take texts, and that `compress.load` opens."""
TEXT = "text"
"""The modality of what is embedded here, by sentence-transformers' name."""

Condition = tuple[str | None, str | tuple[str, ...] | None]
"""A task and a modality; None: any."""


@dataclass(frozen=True)
class Router:
    """What a Router's file says."""

    path: Path
    """The file."""
    routes: Mapping[str, tuple[Module, ...]]
    """The modules of each route, by its name."""
    default: str | None
    """The route of texts without a task; None: there is none."""
    mappings: Mapping[Condition, str]
    """Routes of tasks and modalities that do not have the route's name."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that it names; which of them texts may have, `route` decides."""
        mapped = (task for task, _ in self.mappings if task is not None)
        return tuple(dict.fromkeys([*self.routes, *mapped]))

    def route(self, task: str | None) -> tuple[Module, ...]:
        """Return the modules for texts of a task, by the order of precedence of sentence-transformers' `Router`.

        Raises:
            UnknownTask: no route is for it; or there is no task, and no default route.
        """
        for condition in ((task, TEXT), (task, None), (None, TEXT), (None, None)):
            if condition in self.mappings:
                return self.routes[self.mappings[condition]]
        if task is not None and task in self.routes:
            return self.routes[task]
        if TEXT in self.routes:
            return self.routes[TEXT]
        known = f"known: {', '.join(self.tasks)}"
        if task is not None:
            raise UnknownTask(f"{self.path}: no route for task {task!r}", known)
        if self.default is None:
            raise UnknownTask(f"{self.path}: no default route, so texts need a task", known)
        return self.routes[self.default]


@dataclass(frozen=True)
class Routes:
    """The modules of a model with Routers."""

    path: Path
    """Its `modules.json`."""
    steps: tuple[Module | Router, ...]
    """What it lists, in order."""

    def modules(self, task: str | None) -> tuple[Module, ...]:
        """Return the modules that texts of a task pass, in order.

        Raises:
            UnknownTask: see `Router.route`.
        """
        found: list[Module] = []
        for step in self.steps:
            found += step.route(task) if isinstance(step, Router) else (step,)
        return tuple(found)

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """The tasks that texts may have, the model's own names for them included; None: no task."""
        named = [task for step in self.steps if isinstance(step, Router) for task in step.tasks]
        return tuple(task for task in dict.fromkeys([None, *TASKS, *named]) if self._knows(task))

    def _knows(self, task: str | None) -> bool:
        try:
            self.modules(task)
        except UnknownTask:
            return False
        return True

    @property
    def ways(self) -> tuple[tuple[Module, ...], ...]:
        """The different lists of modules that texts pass; that of the default route first, where there is one.

        Raises:
            UserError: a route does not begin with the one module of it that takes texts, or no task has one.
        """
        found = tuple(dict.fromkeys(self.modules(task) for task in self.tasks))
        if not found:
            raise UserError(f"{self.path}: no task has a route in each Router")
        for modules in found:
            kinds = [module.kind for module in modules]
            if [kind in INPUTS for kind in kinds] != [True] + [False] * (len(kinds) - 1):
                wanted = " or ".join(INPUTS)
                raise UserError(f"{self.path}: a route is {', '.join(kinds) or 'empty'}; it has to begin with its only {wanted}")
        return found

    def refusal(self) -> UserError:
        """Return the error of what takes one list of modules, and is given a model with several."""
        place = next(place for place, step in enumerate(self.steps) if isinstance(step, Router))
        router = self.steps[place]
        assert isinstance(router, Router)
        parts = [f"*model[{place}].sub_modules[{next(iter(router.routes))!r}]", f"*list(model)[{place + 1}:]"]
        listed = ", ".join([f"*list(model)[:{place}]", *parts] if place else parts)
        return UserError(
            f"{self.path}: a Router sends texts through other modules for each task; only compress.load and encode do that",
            f"save one route as a model of its own: SentenceTransformer(modules=[{listed}]).save(FOLDER)",
        )


def read_routes(path: Path, modules: Sequence[Module]) -> Routes | None:
    """Read the Routers that a `modules.json` lists; None where it lists none.

    Args:
        path: the `modules.json`.
        modules: what it lists.

    Raises:
        UserError: a Router's file is missing or says what this workbench does not know, or a module of a route is not supported.
    """
    if not any(module.kind in ROUTERS for module in modules):
        return None
    return Routes(path, tuple(_read_router(module.folder) if module.kind in ROUTERS else module for module in modules))


def every_module(modules: Sequence[Module]) -> tuple[Module, ...]:
    """Return modules with those of all routes in the place of each Router."""
    found: list[Module] = []
    for module in modules:
        if module.kind in ROUTERS:
            found += [inside for route in _read_router(module.folder).routes.values() for inside in route]
        else:
            found.append(module)
    return tuple(dict.fromkeys(found))


def _read_router(folder: Path) -> Router:
    path = next((folder / name for name in ROUTER_FILES if (folder / name).exists()), None)
    if path is None:
        raise UserError(
            f"{folder / ROUTER_FILES[0]}: missing, although modules.json names a Router there", "download the model again"
        )
    config = dict(read_json(path))
    sections = ("types", "structure", "parameters")
    for name in sections:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{path}: {name} is not a table")
    types, structure, parameters = (dict(config.pop(name, {})) for name in sections)
    if config:
        raise UserError(f"{path}: key {next(iter(config))!r} is not known", nearest(next(iter(config)), sections))
    modules = {name: _module(path, name, str(kind)) for name, kind in types.items()}
    if not structure:
        raise UserError(f"{path}: structure: no route")
    routes = {}
    for route, names in structure.items():
        for name in names:
            if name not in modules:
                raise UserError(f"{path}: structure.{route}: {name!r} is not one of types", nearest(str(name), modules))
        routes[route] = tuple(modules[name] for name in names)
    return _with_parameters(path, routes, parameters)


def _module(path: Path, name: str, type_name: str) -> Module:
    """Return a module of a route; its folder lies in the Router's."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{path}: types: {name!r} is not a folder in the Router's own")
    kind = kind_of(path, type_name)
    if kind in ROUTERS:
        raise UserError(f"{path}: types.{name}: a Router inside a Router is not supported")
    return Module(kind, path.parent / name)


def _with_parameters(path: Path, routes: Mapping[str, tuple[Module, ...]], parameters: dict[str, Any]) -> Router:
    default, first = parameters.pop("default_route", None), parameters.pop("allow_empty_key", True)
    mappings = {_condition(path, key): str(route) for key, route in (parameters.pop("route_mappings", None) or {}).items()}
    if parameters:
        known = ["default_route", "allow_empty_key", "route_mappings"]
        raise UserError(f"{path}: parameters: key {next(iter(parameters))!r} is not known", nearest(next(iter(parameters)), known))
    for place, route in (("default_route", default), *(("route_mappings", route) for route in mappings.values())):
        if route is not None and route not in routes:
            raise UserError(f"{path}: parameters.{place}: {route!r} is not a route", nearest(str(route), routes))
    if default is None and first:
        default = next(iter(routes))
    return Router(path, routes, default, mappings)


def _condition(path: Path, key: str) -> Condition:
    """Read a key of `route_mappings`, which is a tuple as Python prints it."""
    try:
        task, modality = ast.literal_eval(key)
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(
            f"{path}: parameters.route_mappings: {key!r} is no pair of a task and a modality", "such as ('query', 'text')"
        ) from error
    return task, modality
