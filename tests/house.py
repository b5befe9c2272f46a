"""The structure of the three packages, read from their source: who imports whom.

    python -m tests.house      writes docs/house.md anew

`tests/test_house.py` compares the document with the tree and holds the rules.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from tests.places import DOCS, ROOT

PACKAGES: Final = ("runtime", "export", "calibration")
DOCUMENT: Final = DOCS / "house.md"

Module = tuple[str, ...]
"""A module's path without its suffix, such as ``("runtime", "bundle", "reader")``."""

_HEAD: Final = """# The house

One folder answers one question. What stands above may use what stands below, never the reverse:
`calibration` → `export` → `runtime`. No circle of imports exists among neighbours, at any level.
Imports inside functions count; imports for type checkers alone don't.

`python -m tests.house` writes this page from the source; `tests/test_house.py` compares them.
"""


@cache
def modules() -> dict[Module, Path]:
    """Return every module of the three packages."""
    return {
        path.relative_to(ROOT).with_suffix("").parts: path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imported_names(path: Path, *, top_level_only: bool = False) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every import; `if TYPE_CHECKING:` blocks don't count."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a module lives"
            assert node.module is not None
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        elif not (top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            pending.extend(ast.iter_child_nodes(node))


def _resolved(module: str, name: str | None) -> Module | None:
    """Return the module of ours that an import reaches."""
    top, *rest = module.split(".")
    if top != "vzip":
        return None
    stem = tuple(rest)
    tries = [(*stem, name), (*stem, name, "__init__")] if name else []
    for found in (*tries, stem, (*stem, "__init__")):
        if found in modules():
            return found
    return None


@cache
def imports() -> frozenset[tuple[Module, Module]]:
    """Return (importer, imported) of all imports among our modules."""
    found = set()
    for module, path in modules().items():
        for name in imported_names(path):
            target = _resolved(*name)
            if target is not None and target != module:
                found.add((module, target))
    return frozenset(found)


def neighbours() -> dict[Module, dict[str, set[str]]]:
    """Return folder → what stands in it → what of the same folder that imports."""
    found: dict[Module, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for importer, imported in imports():
        depth = 0
        while importer[depth] == imported[depth]:
            depth += 1
        if depth:  # the three packages beside each other are a rule of their own
            found[importer[:depth]][importer[depth]].add(imported[depth])
    return found


def circles() -> list[str]:
    """Return every circle of imports among neighbours, as ``folder: a → b → a``."""
    found = []
    for folder, graph in neighbours().items():
        finished: set[str] = set()

        def walk(node: str, path: list[str]) -> None:
            if node in path:
                ring = [*path[path.index(node) :], node]
                found.append(f"{'/'.join(folder)}: {' → '.join(ring)}")  # noqa: B023 called here
                return
            if node in finished:  # noqa: B023
                return
            for target in sorted(graph.get(node, ())):  # noqa: B023
                walk(target, [*path, node])
            finished.add(node)  # noqa: B023

        for node in sorted(graph):
            walk(node, [])
    return found


def document() -> str:
    """Return the text of docs/house.md."""
    folders: dict[Module, list[Path]] = defaultdict(list)
    for module, path in modules().items():
        folders[module[:-1]].append(path)
    uses: dict[Module, set[Module]] = defaultdict(set)
    for importer, imported in imports():
        if importer[:-1] != imported[:-1]:
            uses[importer[:-1]].add(imported[:-1])
    rows = ["| folder | what it is for | modules | imports |", "|---|---|---|---|"]
    for folder in sorted(folders, key=lambda each: (PACKAGES.index(each[0]), each)):
        init = ROOT.joinpath(*folder, "__init__.py")
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        first = text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        count = sum(path.name != "__init__.py" for path in folders[folder])
        names = ", ".join(f"`{'/'.join(each)}`" for each in sorted(uses[folder]))
        rows.append(f"| `{'/'.join(folder)}/` | {first} | {count} | {names} |")
    return _HEAD + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
