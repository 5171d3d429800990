"""The API reference, from docstrings, which are Markdown; the package is read, not imported."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import griffe

PROJECT = Path(__file__).resolve().parents[2]
NAME = "mtprune_utils"
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # which is no quotation
PACKAGES = ("core", "study")  # a page for each module
REGISTRIES = (  # a page for each folder: an entry does what the folder's docstring says
    "criteria",
    "tasks",
    "backbones",
    "datasets",
    "schedules",
    "rankings",
    "weightings",
    "stages",
)


def load(folder: Path = PROJECT) -> griffe.Module:
    """The package that lies in a folder, wherever this process is."""
    return griffe.load(NAME, search_paths=[folder], try_relative_path=False)


def members(of: griffe.Object) -> list[griffe.Object]:
    """A module's or class's own public functions, classes and properties, in their order."""
    return [
        member
        for name, member in of.members.items()
        if not name.startswith("_")
        and not member.is_alias
        and (member.is_function or member.is_class or "property" in member.labels)
    ]


def modules(package: griffe.Module) -> list[griffe.Module]:
    return [m for name, m in sorted(package.modules.items()) if not name.startswith("_")]


def docstring(member: griffe.Object) -> str:
    """Its own, or that of what it overrides, in Markdown; "" if there is none."""
    overridden = member.parent.mro() if member.parent and member.parent.is_class else ()
    for at in (member, *(base.members.get(member.name) for base in overridden)):
        if at and at.docstring:
            return EXAMPLE.sub(r"```pycon\n\g<0>\n```", inspect.cleandoc(at.docstring.value))
    return ""


def undocumented(package: griffe.Module) -> Iterator[str]:
    """The public names in the reference that no docstring explains."""
    for folder in (*PACKAGES, *REGISTRIES):
        known = "" if folder in PACKAGES else docstring(package[folder])
        for module in (package[folder], *modules(package[folder])):
            if not docstring(module):
                yield module.path
            for member in members(module):
                if not docstring(member) and not re.search(rf"\b{member.name}\(", known):
                    yield member.path
                for inner in members(member) if member.is_class else ():
                    if not docstring(inner):
                        yield inner.path


def pages(package: griffe.Module) -> Iterator[tuple[str, str]]:
    """(name, Markdown) of every page. Raises ValueError where a public name has no docstring."""
    if missing := list(undocumented(package)):
        raise ValueError(f"no docstring: {', '.join(missing)}")
    yield "index", _index(package)
    for folder in PACKAGES:
        for module in modules(package[folder]):
            yield f"{folder}.{module.name}", _page(module)
    for folder in REGISTRIES:
        entries = [
            f"## {entry.name}\n\n```{{py:currentmodule}} {entry.path}\n```\n\n{docstring(entry)}"
            f"\n\n{_members(entry)}"
            for entry in modules(package[folder])
        ]
        yield folder, _page(package[folder]) + "\n\n" + "\n\n".join(entries)


def page_of(path: str) -> str | None:
    """The page that explains a file or folder of the package, if one does."""
    parts = Path(path).with_suffix("").parts[1:]
    if parts and parts[0] in REGISTRIES:
        return parts[0]
    return ".".join(parts) if len(parts) == 2 and parts[0] in PACKAGES else None


def _index(package: griffe.Module) -> str:
    """What the package itself offers, and all pages."""
    places = [package["core.pruner"], package["core.pretrained"]]
    offered = [m for place in places for m in members(place) if m.name in package.exports]
    lines = ["# API reference", "", f"For a network of your own, `{NAME}` itself is enough:", ""]
    lines += [
        f"- [`{NAME}.{m.name}`]({m.parent.path.removeprefix(NAME + '.')}.md): {_first(m)}"
        for m in offered
    ]
    named = [*(f"{folder}.{m.name}" for folder in PACKAGES for m in modules(package[folder]))]
    for title, pages_ in (("Modules", named), ("Registries and stages", REGISTRIES)):
        lines += ["", f"## {title}", "", "| | |", "|---|---|"]
        lines += [f"| [`{page}`]({page}.md) | {_first(package[page])} |" for page in pages_]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", *named, *REGISTRIES, "```"])


def _first(member: griffe.Object) -> str:
    """The first paragraph of its docstring, on one line."""
    return docstring(member).split("\n\n")[0].replace("\n", " ").replace("|", r"\|")


def _page(module: griffe.Module) -> str:
    path = module.path.removeprefix(f"{NAME}.")
    head = [f"# `{path}`", f"```{{py:module}} {module.path}\n```", docstring(module)]
    return "\n\n".join([*head, _members(module)])


def _members(module: griffe.Module) -> str:
    return "\n\n".join(_directive(m) for m in members(module) if docstring(m))


def _directive(member: griffe.Object) -> str:
    """A function, class (with what it has) or property as Sphinx's directive for it."""
    signature, fence = member.name, "````"  # an example within has three
    if member.is_class:
        kind, fence = "class", "`````"
        if "__init__" in member.members:
            signature = _without_self(member["__init__"].signature(return_type=False))
            signature = signature.replace("__init__", member.name, 1)
    elif member.is_function:
        kind = "method" if member.parent.is_class else "function"
        signature = member.signature()
        if member.parent.is_class and "staticmethod" not in member.labels:
            signature = _without_self(signature)
    else:
        kind = "property"
    inner = [_directive(m) for m in members(member)] if member.is_class else []
    body = "\n\n".join([docstring(member), *inner])
    name = f"{member.parent.name}.{signature}" if member.parent.is_class else signature
    return f"{fence}{{py:{kind}}} {name}\n{body}\n{fence}"


def _without_self(signature: str) -> str:
    return re.sub(r"\((?:self|cls)(?:, )?", "(", signature, count=1)
