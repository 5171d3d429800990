"""Registries: folders of the package in which each file is an entry, found by being there."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent


def names(registry: str) -> tuple[str, ...]:
    """The entries' names, without importing them; files that begin with an underscore are none."""
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
