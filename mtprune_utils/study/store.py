"""Where everything lies, and whether it is whole: the only module that knows paths and tables.

runs/<profile>/<stage>/<readable name>-<hash of every parameter that its results depend on>/
    params.json  provenance.json  *.csv  model.safetensors  timing.json  done.json (written last)
figures/<profile>/<figure>.{png,pdf,csv,json}, figures/<profile>/results/<stage>_<table>.csv
notebooks/*.ipynb, each of which says in its metadata which figures it draws

A run is finished if done.json is there, which holds the digest of its code and checksums of what it
wrote and of what it started from: times do not count. Files are written beside their place and
renamed, so none is ever half there.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

from mtprune_utils import registry
from mtprune_utils.files import (
    PACKAGE,
    PROJECT,
    checksum,
    csv_text,
    read_json,
    source_digest,
    write_atomically,
    write_json,
)
from mtprune_utils.stages import get_stage, stage_names

DONE, BEST, PROVENANCE = "done.json", "best.json", "provenance.json"
RECORDS, VOUCHED, TIMINGS = "runs.jsonl", "vouched.json", "timings.csv"
FIGURE_KINDS = ("png", "pdf", "csv", "json")
# Columns; all others hold numbers.
TEXTS = ("run", "widths", "phase", "predictor", "state", "first", "second")
AGAIN = "take it from git again, or delete the folder's tables and make the runs anew"
# Modules that make figures.
DRAWING = ("figures", "comparison", "claims", "statistics", "latency", "tables")
KEPT = ("*.csv", "*.safetensors", BEST, PROVENANCE, "timing.json")  # what others read of a run


# --- places ---


def figures_folder(label: str, figures: Path = PROJECT / "figures") -> Path:
    """Of one experiment, by its label."""
    return Path(figures) / label


def results_folder(label: str, figures: Path = PROJECT / "figures") -> Path:
    """Where a profile's collected tables lie."""
    return figures_folder(label, figures) / "results"


def table_names() -> list[str]:
    """Every table that is collected, "<stage>_<table>"."""
    return [
        f"{stage}_{Path(file).stem}" for stage in stage_names() for file in get_stage(stage).TABLES
    ]


# --- notebooks ---


def stage_notebook(stage: str) -> Path:
    """The notebook that runs one run of a stage."""
    return PROJECT / "notebooks" / f"{get_stage(stage).NOTEBOOK}.ipynb"


def notebook_paths() -> list[Path]:
    """The repository's notebooks, in their order."""
    return sorted((PROJECT / "notebooks").glob("[0-9]*.ipynb"))


def about_notebook(path: Path) -> dict:
    """What a notebook's metadata say of it, under "mtprune".

    "figures": those that it draws, first the one that every profile has; "needs": the runs that it
    shows, see `Experiment.needed`; "question": of which profiles, see `Experiment.draws`; "alone":
    whether it measures times, so that nothing else may run beside it. "shows" and "example": its
    row in the README, if it has one, and parameters to try it with.
    """
    return read_json(path)["metadata"].get("mtprune", {})


def figure_notebooks() -> dict[str, Path]:
    """{figure: the notebook that draws it}."""
    return {
        figure: path
        for path in notebook_paths()
        for figure in about_notebook(path).get("figures", ())
    }


def notebook_digest(figure: str) -> str | None:
    """A hash of the code of the notebook that draws a figure; None if none does.

    The parameters' defaults are left out: they decide nothing.
    """
    if figure not in (notebooks := figure_notebooks()):
        return None
    cells = read_json(notebooks[figure])["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell not in tagged]
    sources = ["".join(cell["source"]) for cell in code]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


@cache
def figure_code() -> str:
    """A hash of the modules that figures are drawn by; comments and layout do not count."""
    return source_digest(registry.sources(*(f"study.{name}" for name in DRAWING)))


def drawn_otherwise(figure: str, origin: dict) -> list[str]:
    """What has changed of the code that drew the figure with this provenance."""
    reasons = ["code: figure"] if origin["code"] != figure_code() else []
    changed = origin.get("notebook") != notebook_digest(figure)
    return [*reasons, "code: notebook"] if changed else reasons


# --- where results came from ---


def provenance(code: str, packages: tuple[str, ...] = (), **more) -> dict:
    """Code, versions, machine. Paths and host names are left out."""
    names = ("torch", "numpy", "torch-pruning", "safetensors", *packages)
    changes = uncommitted("mtprune_utils", "notebooks")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "code": code,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in names},
        **more,
    }


def uncommitted(*folders: str) -> str | None:
    """What has changed there since the last commit; None where there is no repository."""
    return git("status", "--porcelain", "--untracked-files=no", "--", *folders)


def git(*arguments: str) -> str | None:
    """What git says of the repository; None if there is none, or only one around the package."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=PACKAGE.parent,
            env=own,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def origin_of(run) -> dict:
    """A run's provenance, as far as it is known beforehand."""
    packages = ("optuna",) if run.stage == "tune" else ()
    return provenance(run.code, packages, data=run.experiment.data, params=run.params)


# --- run folders ---


class RunFolder:
    """A run's files. Its subclass says `stage`, `name`, `place`, `inputs`, `code` and so on."""

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.place / self.stage / self.name

    def path(self, file: str) -> Path:
        """A file of the run."""
        return self.folder / file

    @property
    def lock_file(self) -> Path:
        """Not in the folder: to delete that lets nobody else in."""
        return self.place / ".locks" / f"{self.stage}-{self.name}"

    def write(self, file: str, content: bytes) -> None:
        """Write a file of the run, whole or not at all."""
        write_atomically(self.path(file), content)

    def write_table(self, file: str, rows: list[dict]) -> None:
        """Write rows as CSV, likewise."""
        self.write(file, csv_text(rows).encode())

    def write_json(self, file: str, value) -> None:
        """Write a value as JSON, likewise."""
        write_json(self.path(file), value)

    # --- finished, and by which code ---

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return self.path(DONE).exists()

    @property
    def marker(self) -> dict:
        """What `finish` wrote: the digest "code", contents of "inputs", checksums of "files"."""
        return read_json(self.path(DONE))

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that its stage writes."""
        return get_stage(self.stage).TABLES

    @property
    def content(self) -> str:
        """A hash of what a finished run has found, in tables; its weights can be made again."""
        sums = self.marker["files"]
        taken = [sums[file] for file in (*self.tables, BEST) if file in sums]
        return hashlib.sha256(" ".join(taken).encode()).hexdigest()[:16]

    def input_contents(self) -> dict[str, str]:
        """{name: content} of the finished runs that it starts from."""
        return {run.name: run.content for run in self.inputs if run.done}

    def outdated(self) -> str:
        """Why a finished run does not count as the present code's, in one line; "" if it does."""
        if refusal := self.experiment.refusal(self, self.marker["code"]):
            return f"{self.stage} {self.name} is {refusal}"
        then, now = self.marker.get("inputs", {}), self.input_contents()
        if changed := [name for name in now if then.get(name, now[name]) != now[name]]:
            return (
                f"{self.stage} {self.name} was made from other results of {', '.join(changed)} "
                "than are here: delete its folder to repeat it"
            )
        return next(filter(None, (run.outdated() for run in self.inputs if run.done)), "")

    def finish(self, code: str, inputs: dict[str, str] | None = None) -> None:
        """Write the marker, with a checksum of everything that other runs and figures read.

        code: the run's digest. inputs: `input_contents` as the run began; by default, as they are.
        """
        found = [path for pattern in KEPT for path in sorted(self.folder.glob(pattern))]
        files = {path.name: checksum(path) for path in found}
        inputs = self.input_contents() if inputs is None else inputs
        self.write_json(DONE, {"code": code, "inputs": inputs, "files": files})

    def update_checksum(self, file: str) -> None:
        """Note that of weights that a finished run has got again."""
        files = self.marker["files"] | {file: checksum(self.path(file))}
        self.write_json(DONE, self.marker | {"files": files})

    def invalidate_if_corrupt(self, report: Callable[[str], None]) -> None:
        """Take a finished run for unfinished if its tables are no longer what it wrote.

        (Its weights can be made again: see `execute.restore_weights`.)
        """
        if self.done and (damaged := self._damaged_tables()):
            what = f"{self.stage} {self.name}: {', '.join(damaged)} is damaged"
            report(f"{what}, the run is repeated")
            self.path(DONE).unlink()

    def intact(self, file: str) -> bool:
        """Whether a finished run's file is here, and what it wrote."""
        written = self.marker["files"].get(file)
        return self.path(file).exists() and checksum(self.path(file)) == written

    def _damaged_tables(self) -> list[str]:
        """Damaged or missing files, of all but the weights."""
        try:
            record = self.marker
            files = [name for name in record["files"] if not name.endswith(".safetensors")]
            if "code" in record and set(files) >= {*self.tables, PROVENANCE}:
                return [name for name in files if not self.intact(name)]
        except (ValueError, KeyError, TypeError, AttributeError):  # not what `finish` writes
            pass
        return [DONE]
