"""Registries: folders of the package in which each file is an entry, found by being there."""

import ast
import difflib
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
NAME = PACKAGE.name


def names(registry: str) -> tuple[str, ...]:
    """The entries' names, without importing them; files that begin with an underscore are none.

    >>> names("rankings")
    ('global', 'lamp', 'layer')
    """
    return tuple(sorted(file.stem for file in (PACKAGE / registry).glob("[a-z]*.py")))


def entry(registry: str, name: str, kind: str) -> ModuleType:
    """An entry's module. Raises ValueError, with the nearest name, for an unknown one."""
    return import_module(f"mtprune_utils.{registry}.{known(name, names(registry), kind)}")


def known(name: str, among: Iterable[str], kind: str, shown: str = "") -> str:
    """The name itself. Raises ValueError, with the nearest name, if it is not among these.

    shown: what to call it there, if it is a part of something longer.
    """
    among = list(among)
    if name not in among:
        close = difflib.get_close_matches(str(name), among, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(among)}"
        raise ValueError(f"unknown {kind} {(shown or name)!r}: {hint}")
    return name


def sources(*modules: str, within: str = "") -> list[Path]:
    """The files of modules of the package and of all that they import from its folders, sorted.

    modules: as in "stages.dense"; within: a folder outside of which nothing is followed. What lies
    beside the folders (files, this module) is plumbing that no result depends on, and left out.
    """
    found: dict[Path, None] = {}
    waiting = [_file(module) for module in modules]
    while waiting:
        file = waiting.pop()
        outside = file is None or file.parent == PACKAGE
        if outside or file in found or not file.is_relative_to(PACKAGE / within):
            continue
        found[file] = None
        waiting += [_file(name) for name in _imports(file.read_text(encoding="utf-8"))]
    return sorted(found)


@cache
def _imports(source: str) -> list[str]:
    """The package's modules that it imports, and what it takes from them, which may be modules."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
            inside = node.module.removeprefix(NAME).removeprefix(".")
            found += [inside, *(f"{inside}.{name.name}".strip(".") for name in node.names)]
    return found


def _file(module: str) -> Path | None:
    """The file of a module of the package, if it is one."""
    place = PACKAGE.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None
