"""Writes the pages of the site for Sphinx, and has it make them into HTML: `make site`.

Pages lie as their originals do in the repository, so that links between documents hold.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import api
import charts
import formulas
import nbformat
from sphinx.cmd.build import build_main

from mtprune_utils.files import PROJECT, read_json
from mtprune_utils.registry import names
from mtprune_utils.study import store
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import PROFILES

HERE = Path(__file__).parent
HOME, FIGURES, LOG = "README.md", "figures", "docs/log.md"
CARD = "mtprune_utils/datasets/rooms_v1/README.md"
ABOUT = ("CONTRIBUTING.md", "CHANGELOG.md")  # shown where they are there
FIRST = ("study", "quick")  # of the profiles
MENU = (  # of the how-to pages, the first
    "code",
    "data",
    "torch_pruning",
    "cluster",
    "faults",
    "speed",
    "reproduction",
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^()\s]+)\)$", re.MULTILINE)  # on a line of its own
OWN = re.compile("^smoke|-custom$")  # a reader's own experiments, which are no results
LABEL = re.compile(r"fig(\d+)_(\w+)")


class Site:
    """The pages, in a folder."""

    def __init__(self, pages: Path):
        self.pages = pages
        self.labels = [
            place.name
            for place in sorted(
                (PROJECT / FIGURES).iterdir(),
                key=lambda p: (p.name not in FIRST, p.name != "study"),
            )
            if (place / "results").exists() and not OWN.search(place.name)
        ]
        self.notebooks = {name: path.stem for name, path in store.figure_notebooks().items()}

    def write(self, name: str, text: str) -> None:
        place = self.pages / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")

    def copy(self, name: str) -> None:
        """A file that is downloaded, not shown."""
        (self.pages / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, self.pages / name)

    # --- links ---

    def linked(self, text: str, of: str) -> str:
        """A document's text, with links to pages of the site, and captions under figures."""
        text = PICTURE.sub(lambda found: self._figure(*found.groups(), of), text)
        return LINK.sub(lambda found: self._link(*found.groups(), of), text)

    def _figure(self, alt: str, target: str, of: str) -> str:
        path = _joined(of, target)
        if not (PROJECT / path).with_suffix(".json").exists():
            return f"![{alt}]({target})"
        folder, name = PurePosixPath(path).parent.name, PurePosixPath(path).stem
        caption = self.caption(folder, name, _up(of))
        return f"```{{figure}} {target}\n:alt: {alt}\n\n{caption}\n```"

    def _link(self, image: str, label: str, target: str, of: str) -> str:
        if "://" in target or target.startswith("#"):
            return f"{image}[{label}]({target})"
        path = _joined(of, target.partition("#")[0])
        if not (PROJECT / path).exists():
            raise ValueError(f"{of} links to {target}, which is not there")
        page = self._page(path)
        if not image and page:
            return f"[{label}]({page if page.startswith('#') else _up(of) + page})"
        if (PROJECT / path).is_dir():
            return label
        if path.endswith((".md", ".ipynb")):
            return f"[{label}]({target})"
        self.copy(path)
        return f"{image}[{label}]({target})"

    def _page(self, path: str) -> str | None:
        """Where on the site a file or folder of the repository is explained, if anywhere."""
        if path == HOME:
            return "index.md"
        place = PurePosixPath(path)
        if place.suffix == ".png" and place.parent.name in self.labels:
            return f"#{place.parent.name}-{place.stem}"
        if place.parts[0] == api.NAME and place.suffix in ("", ".py"):
            if place.parts[1:2] == ("criteria",):
                return f"criteria/{place.stem if len(place.parts) > 2 else 'index'}.md"
            return (page := api.page_of(path)) and f"api/{page}.md"
        return None

    # --- documents and notebooks ---

    def documents(self) -> list[str]:
        """README, how-to pages and what else is written in Markdown. Returns the how-to pages."""
        found = sorted(path.stem for path in (PROJECT / "docs").glob("*.md"))
        found = [*(name for name in MENU if name in found), *sorted({*found} - {*MENU})]
        others = [CARD, *(name for name in ABOUT if (PROJECT / name).exists())]
        for name in (*(f"docs/{page}.md" for page in found), *others):
            self.write(name, self.linked((PROJECT / name).read_text(encoding="utf-8"), name))
        return [f"docs/{name}" for name in found if f"docs/{name}.md" != LOG]

    def notebook(self, path: Path) -> None:
        """A notebook with its committed outputs, and where they and its figures are from."""
        notebook, name = nbformat.read(path, as_version=4), f"notebooks/{path.name}"
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = self.linked(cell.source, name)
        about = store.about_notebook(path)
        commit = store.git("log", "-1", "--format=%h", "--", str(path))
        where = f", as committed in `{commit.strip()}`" if commit else ""
        note = f"*Outputs of the `smoke` profile{where}: they show the way, not the result."
        drawn = [
            f"[{_title(figure)}, `{label}`](#{label}-{figure})"
            for figure in about.get("figures", ())
            for label in self.labels
            if (PROJECT / FIGURES / label / f"{figure}.png").exists()
        ]
        note += f" Whole runs: {'; '.join(drawn)}.*" if drawn else "*"
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(note))
        place = self.pages / name
        place.parent.mkdir(exist_ok=True)
        nbformat.write(notebook, place)

    # --- figures ---

    def caption(self, folder: str, figure: str, up: str) -> str:
        """Which notebook, command and commit a figure is from, by its provenance."""
        origin = read_json(PROJECT / FIGURES / folder / f"{figure}.json")
        profile, notebook = origin["profile"]["name"], self.notebooks.get(figure)
        command = Experiment(PROFILES[profile], origin["data"]).command
        this = f"this notebook [{notebook}]({up}notebooks/{notebook}.ipynb)"
        commit = f"this commit `{origin['commit'][:12]}`"
        if origin["dirty"]:
            commit += ", with changes that were not committed"
        return f"{_title(figure)}: {this}, this command `{command}`, {commit}."

    def profile(self, label: str) -> str:
        """A profile's page: charts, then every figure with where it is from."""
        folder = PROJECT / FIGURES / label
        parts = [f"# Figures: `{label}`", "## Quality against size"]
        parts += [
            "Each network's mean over its seeds after recovery, with a band of one standard "
            "deviation; points have 95 % intervals. Point at a curve for its numbers.",
            f"```{{raw}} html\n{charts.section(folder / 'results')}\n"
            '<script src="../_static/vega.js"></script>'
            '<script src="../_static/charts.js"></script>\n```',
        ]
        for image in sorted(folder.glob("fig*.png")):
            name = image.stem
            self.copy(f"{FIGURES}/{label}/{image.name}")
            files = []
            for kind, what in (("csv", "data"), ("pdf", "PDF"), ("json", "where it is from")):
                if image.with_suffix(f".{kind}").exists():
                    self.copy(f"{FIGURES}/{label}/{name}.{kind}")
                    files.append(f"[{what}]({label}/{name}.{kind})")
            title = _title(name)
            parts += [
                f"({label}-{name})=\n## {title}",
                f"```{{figure}} {label}/{image.name}\n:alt: {title}\n\n"
                f"{self.caption(label, name, '../')} {', '.join(files)}.\n```",
            ]
        tables = [*sorted(folder.glob("*table*.csv")), *sorted((folder / "results").glob("*.csv"))]
        parts.append("## Tables\n\n" + "\n".join(self._downloads(tables)))
        self.write(f"{FIGURES}/{label}.md", "\n\n".join(parts))
        return f"{FIGURES}/{label}"

    def _downloads(self, tables: list[Path]) -> Iterator[str]:
        for table in tables:
            name = table.relative_to(PROJECT).as_posix()
            self.copy(name)
            yield f"- [{table.stem}]({name.removeprefix(FIGURES + '/')})"

    # --- criteria and the reference ---

    def criteria(self, package) -> None:
        """A page for each criterion, with its formula, and a table of all."""
        rows = []
        for name in names("criteria"):
            module = package["criteria"][name]
            first, formula, rest = _split(api.docstring(module))
            needs = str(module["NEEDS"].value).replace("_", " ").lower()
            formula, letters = formulas.latex(formula) if formula else ([], [])
            rows.append(f"| [{name}]({name}.md) | {first} | {needs} |")
            source = module.filepath.read_text(encoding="utf-8")
            use = f'pruner = mtprune_utils.Pruner(model, (images,), criterion="{name}")'
            parts = [
                f"# {name}",
                first,
                _display(formula),
                "where" if letters else "",
                _display(letters),
                rest,
                f"Reads: {needs}. In a loop of your own: `{use}`.",
                f"## Source\n\n```python\n{source}```",
            ]
            self.write(f"criteria/{name}.md", "\n\n".join(filter(None, parts)))
        notation = (
            "Filters with the lowest scores go first. $w$: a filter's weights; $g$: their mean "
            "gradient of the summed loss on a minibatch; $g_k$: of task $k$'s loss; $b$, $g^b$: "
            r"its bias and that one's gradient; $\mathbb{E}$: the mean over minibatches since the "
            "last removal."
        )
        table = "\n".join(["| criterion | a filter's score | reads |", "|---|---|---|", *rows])
        menu = _menu("", names("criteria"))
        self.write("criteria/index.md", "\n\n".join(["# Criteria", notation, table, menu]))

    def reference(self, package) -> None:
        for name, text in api.pages(package):
            self.write(f"api/{name}.md", text)

    def all(self) -> None:
        package = api.load()
        how_to = self.documents()
        for path in store.notebook_paths():
            self.notebook(path)
        figures = [self.profile(label) for label in self.labels]
        self.criteria(package)
        self.reference(package)
        about = [name for name in (LOG, *ABOUT) if (PROJECT / name).exists()]
        home = self.linked((PROJECT / HOME).read_text(encoding="utf-8"), HOME)
        menus = [
            _menu("Results", ["docs/results", *figures]),
            _menu("Notebooks", [f"notebooks/{path.stem}" for path in store.notebook_paths()]),
            _menu("How to", [name for name in how_to if name != "docs/results"]),
            _menu("Reference", ["criteria/index", "api/index", CARD]),
            *([_menu("The project", about)] if about else []),
        ]
        self.write("index.md", "\n\n".join([home, *menus]))


def _joined(of: str, target: str) -> str:
    """A link's target from the repository's root."""
    return os.path.normpath(PurePosixPath(of).parent / target)


def _up(of: str) -> str:
    """From a page to the root of the site."""
    return "../" * (len(PurePosixPath(of).parts) - 1)


def _title(figure: str) -> str:
    """ "fig2_layer_widths": "Figure 2, layer widths"."""
    number, words = LABEL.fullmatch(figure).groups()
    return f"Figure {number}, {words.replace('_', ' ')}"


def _split(docstring: str) -> tuple[str, str, str]:
    """The first sentence, the indented formula ("" if there is none), the rest."""
    paragraphs = docstring.split("\n\n")
    formula = [part for part in paragraphs if part.startswith("    ")]
    words = [part.replace("\n", " ") for part in paragraphs if part not in formula]
    return words[0], "\n".join(formula), "\n\n".join(words[1:])


def _display(lines: list[str]) -> str:
    """Formulas, one below the other."""
    return "\n\n".join(f"$$\n{line}\n$$" for line in lines)


def _menu(caption: str, pages) -> str:
    shown = f":caption: {caption}\n" if caption else ""
    entries = "\n".join(str(page).removesuffix(".md") for page in pages)
    return f"```{{toctree}}\n:hidden:\n{shown}\n{entries}\n```"


def main(out: Path) -> int:
    """Make the site anew: out/html. Returns Sphinx's exit status: not 0 after any warning."""
    pages, made = out / "pages", out / "html"
    for folder in (pages, made):
        shutil.rmtree(folder, ignore_errors=True)
    Site(pages).all()
    options = ["-q", "-W", "--keep-going", "-j", "2", "-d", str(out / "doctrees")]
    status = build_main(["-b", "html", "-c", str(HERE), *options, str(pages), str(made)])
    if not status:
        (made / "_static" / "vega.js").write_text(charts.script(), encoding="utf-8")
        print(f"The site: {made / 'index.html'}")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that html/ is made in")
    sys.exit(main(parser.parse_args().out))
