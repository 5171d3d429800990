"""Registries: folders of the package in which each file is an entry, found by being there.

A reader's own entries may lie elsewhere (`load_plugin`). They get names as if they lay here.
"""

import ast
import difflib
import re
import symtable
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from mtprune_utils.files import PROJECT

PACKAGE = Path(__file__).resolve().parent
NAME = PACKAGE.name
# What the file of an entry defines. A reader's own file is told by it which entry it is.
CONTRACTS = {
    "criteria": ({"NEEDS", "score"}, {"NEEDS", "statistics", "combine"}),
    "datasets": ({"tasks", "load", "digest"},),
    "backbones": ({"build(stride)"},),
    "weightings": ({"build(tasks, epoch)"},),
    "schedules": ({"plan"},),
    "rankings": ({"comparable"},),
    "tasks": ({"a function of the file's name"},),
}
PLUGIN = "plugin"  # its name among the overrides of an experiment's numbers
PLUGGED: dict[str, Path] = {}  # {"criteria.peak": its file}, of those that lie elsewhere


def names(registry: str) -> tuple[str, ...]:
    """The entries' names, without importing them; files that begin with an underscore are none.

    A reader's own come last: the others keep their places, and so their colours in figures.

    >>> names("rankings")
    ('global', 'lamp', 'layer')
    """
    own = sorted(file.stem for file in (PACKAGE / registry).glob("[a-z]*.py"))
    more = (name.split(".") for name in sorted(PLUGGED))
    return *own, *(name for folder, name in more if folder == registry and name[0] != "_")


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
    Files of a plugin come last, by their modules' names: it does not matter where they lie.
    """
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        file = _file(module)
        if file is None or file.parent == PACKAGE:
            continue
        if module in found or within not in ("", module.split(".")[0]):
            continue
        found[module] = file
        waiting += _imports(file.read_text(encoding="utf-8"), module.rpartition(".")[0])
    plugged = {module: PLUGGED[module] for module in sorted(found) if module in PLUGGED}
    return [*sorted({*found.values()} - {*plugged.values()}), *plugged.values()]


@cache
def _imports(source: str, folder: str) -> list[str]:
    """The package's modules that it imports, and what it takes from them, which may be modules.

    folder: the package's that the source lies in, for what it imports from beside itself.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            given = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            beside = f"{NAME}.{folder}." if node.level == 1 else ""
            module = f"{beside}{node.module or ''}".strip(".")
            given = [module, *(f"{module}.{name.name}" for name in node.names)]
        else:
            continue
        ours = (name for name in given if name == NAME or name.startswith(f"{NAME}."))
        found += [name.removeprefix(NAME).removeprefix(".") for name in ours]
    return found


def _file(module: str) -> Path | None:
    """The file of a module of the package, or of one that a plugin adds to it, if it is one."""
    place = PACKAGE.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py", PLUGGED.get(module)):
        if file and file.is_file():
            return file
    return None


# --- entries of a reader's own ---


def load_plugin(path: str) -> None:
    """Add a file's entry to its registry, or those of a folder that is laid out as the package.

    path: a file, whose name is the entry's and whose kind is told by what it defines (CONTRACTS);
    or a folder with criteria/*.py, datasets/*.py and so on. From the working folder or, where it is
    not there, from the repository. Raises ValueError, in one line, for what cannot be an entry.
    """
    if not isinstance(path, str):
        raise ValueError(f"{PLUGIN!r} takes the path of a file or folder, got {path!r}")
    place = Path(path).expanduser()
    place = (place if place.exists() else PROJECT / place).resolve()
    if place.is_dir():
        found = {f"{kind}.{f.stem}": f for kind in CONTRACTS for f in _modules(place / kind)}
    elif place.is_file():
        found = {f"{_kind(place)}.{place.stem}": place}
    else:
        raise ValueError(f"there is no plugin {path}: name a file, or a folder of entries")
    if not found:
        folders = ", ".join(f"{kind}/" for kind in CONTRACTS)
        raise ValueError(f"{path} holds no entry: put files into one of its folders {folders}")
    for module, file in found.items():
        _check_entry(module, file)
    added = found.keys() - PLUGGED.keys()
    PLUGGED.update(found)
    for module, file in found.items():
        try:
            import_module(f"{NAME}.{module}")
        except Exception as error:
            for one in added:
                del PLUGGED[one]
                sys.modules.pop(f"{NAME}.{one}", None)
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{file} fails as it is imported: {said}") from error


def _modules(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.py")) if not file.name.startswith("__")]


def _kind(file: Path) -> str:
    """The registry that a file's entry belongs to. Raises ValueError where it is not one."""
    kinds = [kind for kind in CONTRACTS if _keeps(file, kind)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        either = " or ".join(f"{kind}/" for kind in kinds)
        raise ValueError(f"{file} may be one of several: put it into a folder {either}")
    forms = [f"{kind}: {_needed(kind)}" for kind in CONTRACTS]
    raise ValueError(f"{file} defines no entry of a registry ({'; '.join(forms)})")


def _keeps(file: Path, kind: str) -> bool:
    """Whether a file defines what an entry of that kind does."""
    defined = _defined(file)
    return any(contract <= defined for contract in CONTRACTS[kind])


def _needed(kind: str) -> str:
    return " or ".join(", ".join(sorted(contract)) for contract in CONTRACTS[kind])


def _defined(file: Path) -> set[str]:
    """The names that a file defines, as far as CONTRACTS speak of them; it is not executed."""
    try:
        table = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is no Python module: {error}") from None
    symbols = [s for s in table.get_symbols() if s.is_assigned() or s.is_imported()]
    found = {symbol.get_name() for symbol in symbols}
    # The last of those that are defined several times.
    functions = {s.get_name(): s.get_namespaces()[-1] for s in symbols if s.is_namespace()}
    if "build" in functions:
        takes: tuple = getattr(functions["build"], "get_parameters", tuple)()
        found.add("build(tasks, epoch)" if len(takes) == 2 else "build(stride)")
    return found | ({"a function of the file's name"} if file.stem in functions else set())


def _check_entry(module: str, file: Path) -> None:
    """Raises ValueError where a file cannot be the entry, or another one has its name."""
    kind, name = module.split(".")
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise ValueError(f"{file} needs a name of small letters, digits and _: the entry has it")
    if PLUGGED.get(module, file) != file:
        raise ValueError(f"{name} of {PLUGGED[module]} is loaded already: start anew for {file}")
    if module not in PLUGGED and _file(module):
        raise ValueError(f"there is {name!r} among the {kind} already: rename {file}")
    if name[0] != "_" and not _keeps(file, kind):
        raise ValueError(f"{file} is no entry of {kind}, which defines {_needed(kind)}")


class _Finder:
    """How Python finds a plugin's modules, under the names that they would have in the package."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        file = PLUGGED.get(name.removeprefix(f"{NAME}."))
        return file and spec_from_file_location(name, file)


sys.meta_path.append(_Finder)
