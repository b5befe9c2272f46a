"""Which tokens leave the graph: one file per selection, registered by decorator.

A selection sees the tower alone, never the question, so an image is encoded once for all of its
questions. Its graph must be static: no shape may depend on values. To add one: a file here with a
class, found by its being here; or a class in a package of your own, found by its entry point in the
group ``vzip.selections`` (docs/selections.md).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vzip.export.algorithm.budget import VISIONZIP, Budget
from vzip.export.algorithm.rules import SelectionRule
from vzip.runtime.errors import InvalidInputError
from vzip.runtime.guard import guarded

if TYPE_CHECKING:
    from vzip.export.architecture import VisionConfig

__all__ = [
    "DEFAULT",
    "GROUP",
    "budget_of",
    "check",
    "file_of",
    "get",
    "kind_of",
    "names",
    "register",
]

DEFAULT = VISIONZIP
GROUP = "vzip.selections"
"""The group of entry points: name → class, a `SelectionRule`."""

# The selection that scores by attention is the paper's, and has the paper's name.
_NAMES = {"attention": DEFAULT}
_MODULES = {name: module for module, name in _NAMES.items()}

_REGISTRY: dict[str, type[SelectionRule]] = {}


def register(name: str) -> Callable[[type[SelectionRule]], type[SelectionRule]]:
    """Register a selection's class under the name that ``--selection`` takes."""

    def add(selection: type[SelectionRule]) -> type[SelectionRule]:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = selection
        return selection

    return add


def names() -> tuple[str, ...]:
    """Return the names of all selections, the default first, without importing any."""
    found = sorted({*_own(), *_installed()})
    return tuple(sorted(found, key=lambda name: name != DEFAULT))


def check(name: str) -> None:
    """Refuse a name that no selection has, without importing any.

    Raises:
        InvalidInputError: There is none, or there are two.
    """
    if name not in names():
        raise InvalidInputError(
            f"the selection is {name!r}",
            expected=f"one of {', '.join(names())}",
            cause="it was mistyped, its package isn't installed, or the bundle was made by another "
            "version of vzip",
        )
    packages = ["vzip"] * (name in _own()) + [_package(each) for each in _installed().get(name, [])]
    if len(packages) > 1:
        raise InvalidInputError(
            f"{' and '.join(packages)} have a selection {name!r} each",
            expected="one",
            cure="rename one of them, or uninstall its package",
        )


def get(name: str, options: Mapping[str, float | str] | None = None) -> SelectionRule:
    """Return the selection of a name.

    Args:
        name: One of `names`.
        options: What it is made with; what they leave out has its default.

    Raises:
        InvalidInputError: There is none, its package can't be imported, or it takes no such option.
    """
    kind = kind_of(name)
    known: list[str] = []
    if dataclasses.is_dataclass(kind):
        known = [each.name for each in dataclasses.fields(kind)]
    given: dict[str, Any] = dict(options or {})
    if unknown := sorted(set(given) - set(known)):
        raise InvalidInputError(
            f"the selection {name!r} got the option {unknown[0]!r}",
            expected=" or ".join(known) or "no option",
            cure="leave it out, or choose another selection",
        )
    return kind(**given)


def kind_of(name: str) -> type[SelectionRule]:
    """Return the class of a name.

    Raises:
        InvalidInputError: There is none, or its package can't be imported.
    """
    check(name)
    return _imported(name)


def budget_of(
    config: VisionConfig,
    *,
    selection: str = DEFAULT,
    options: Mapping[str, float | str] | None = None,
    **asked: Any,
) -> Budget:
    """Return the budget that a user asked for, with the selection's options complete.

    Args:
        config: The architecture.
        selection: One of `names`.
        options: Of the selection.
        asked: As `Budget.from_options` takes them.

    Raises:
        BudgetError: The options contradict each other, or the selection or the tower's tokens can't
            fill the budget.
        InvalidInputError: There is no such selection, or it takes no such option.
    """
    if selection == DEFAULT and not options:  # which needs no torch to be refused
        return Budget.from_options(config, selection=selection, **asked)
    rule = get(selection, options).settled(config.grid)
    budget = Budget.from_options(
        config, selection=selection, options=rule.options, merges=rule.merges, **asked
    )
    rule.check(budget)
    return budget


def file_of(rule: SelectionRule) -> str:
    """Return the file that a selection's class is written in, for messages."""
    try:
        return inspect.getsourcefile(type(rule)) or type(rule).__module__
    except (OSError, TypeError):  # it was typed in
        return type(rule).__module__


def _own() -> list[str]:
    return [_NAMES.get(module.name, module.name) for module in pkgutil.iter_modules(__path__)]


def _installed() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return name → entry points of that name in installed packages."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for each in importlib.metadata.entry_points(group=GROUP):
        found.setdefault(each.name, []).append(each)
    return found


def _package(point: importlib.metadata.EntryPoint) -> str:
    return "a package" if point.dist is None else f"the package {point.dist.name}"


def _imported(name: str) -> type[SelectionRule]:
    """Return a selection's class."""
    if name in _own():
        importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
        return _REGISTRY[name]
    (point,) = _installed()[name]
    with guarded(
        InvalidInputError,
        f"the selection {name!r} of {_package(point)} ({point.value}) can't be imported",
        cure="install the package again, or mend it",
    ):
        kind = point.load()
    if not (isinstance(kind, type) and issubclass(kind, SelectionRule)):
        raise InvalidInputError(
            f"the selection {name!r} of {_package(point)} is {point.value}",
            expected="a class that is a vzip.export.algorithm.rules.SelectionRule",
        )
    return kind
