"""One notebook executed so that its success can be believed.

Parameters are checked before, cells and files after: papermill alone runs a misspelt parameter's
notebook on the defaults, and calls a run good whose kernel left early.
"""

import ast
import contextlib
import difflib
import json
import os
import shutil
import sys
import tempfile
import textwrap
import uuid
from pathlib import Path
from typing import Any

from mtprune_utils.files import KINDS, PROJECT, write_atomically, write_json
from mtprune_utils.stages import stage_names
from mtprune_utils.study import store

# Garbage is sought a hundred times less often, and not at the end: imports and the kernel's end
# take 1.5 s less.
LESS_GARBAGE_COLLECTION = "import atexit, gc; gc.set_threshold(70_000); atexit.register(gc.freeze)"
OWN_STYLE = "import matplotlib; matplotlib.rcdefaults()"  # whatever the user's matplotlibrc says
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
# What a kernel gets to write its checkpoint when it is asked to end; five seconds are the default.
SECONDS_TO_END = 80
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
Declared = dict[str, tuple[type, Any]]  # name: (type, default)


class NotebookError(RuntimeError):
    """A notebook did not run to its end. One line says why."""


# --- the parameters of a notebook ---


def notebook_parameters(notebook: str | Path) -> Declared:
    """Those of the cell tagged `parameters`, whose lines are `name: type = literal  # help`."""
    name = Path(notebook).name
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
        sources = ["".join(cell["source"]) for cell in tagged]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name} is no Jupyter notebook") from None
    if len(sources) != 1:
        count = f"{len(sources)} cells are tagged 'parameters'"
        raise ValueError(f"{name}: {count}, there must be one")
    return _declared(sources[0], name)


def _declared(source: str, notebook: str) -> Declared:
    parameters = {}
    for node in ast.parse(source).body:
        try:
            match node:
                case ast.AnnAssign(ast.Name(name), ast.Name(kind), ast.expr() as default):
                    parameters[name] = (TYPES[kind], ast.literal_eval(default))
                case _:
                    raise ValueError
        except (KeyError, ValueError):
            form = "a parameter must have the form 'name: type = literal'"
            raise ValueError(f"{notebook}: {ast.unparse(node)}: {form}") from None
    return parameters


def check_parameters(notebook: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """The given values, whole numbers made float where float is declared.

    Raises ValueError for an unknown name or a wrong type: papermill would run on the defaults and
    report success.
    """
    return _check_values(given, notebook_parameters(notebook), Path(notebook).name)


def _check_values(given: dict[str, Any], known: Declared, notebook: str) -> dict[str, Any]:
    checked = {}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, list(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known)}"
            raise ValueError(f"{notebook} has no parameter {name!r}: {hint}")
        declared = known[name][0]
        if declared is float and type(value) is int:
            value = float(value)
        if type(value) is not declared:
            raise ValueError(f"{notebook}: {name!r} takes {KINDS[declared]}, got {value!r}")
        checked[name] = value
    return checked


def check_run(notebook: str | Path, parameters: dict[str, Any]) -> None:
    """Whether the values name a run that there can be.

    Raises ValueError, or FileNotFoundError where the data is missing.
    """
    from mtprune_utils.study.grid import Experiment  # and torch with it

    defaults = {name: default for name, (_, default) in notebook_parameters(notebook).items()}
    values = defaults | check_parameters(notebook, parameters)
    if "profile" not in values:
        return
    where = {name: values.get(name, "") for name in ("profile", "data", "root", "runs")}
    experiment = Experiment.open(**where, overrides=values.get("overrides"))
    for stage in stage_names():
        if store.stage_notebook(stage).name == Path(notebook).name:
            names = [n for n in ("criterion", "seed", "level", "arm") if n in values]
            cell = {name: values[name] for name in names}
            if stage == "prune" and cell["level"] < 0:
                del cell["level"]
            getattr(experiment, stage)(**cell)
    experiment.check()


def check_injected(cells: list[str]) -> None:
    """The same check within a notebook that papermill itself runs.

    cells: the sources of the cells so far (IPython's `In`). papermill puts the given parameters
    into a cell of its own behind the declared ones, whatever their names. In JupyterLab the
    declared values themselves are edited.
    """
    declared: Declared = {}
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            nodes = [node for node in ast.parse(cell).body if isinstance(node, ast.Assign)]
            given = {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in nodes}
            _check_values(given, declared, "the notebook")
            continue
        try:
            found = _declared(cell, "the notebook")
        except (ValueError, SyntaxError):  # another cell, which somebody ran first
            continue
        # The first time, or edited and run again.
        if not declared or found.keys() == declared.keys():
            declared = found
            defaults = {name: value for name, (_, value) in declared.items()}
            _check_values(defaults, declared, "the notebook")


# --- one notebook ---


def execute(notebook: str | Path, output: str | Path, parameters: dict, expected_files=()) -> None:
    """Run a notebook in the working directory.

    It is put at `output` only if it ran to its end and left what it should. Otherwise raise
    NotebookError; the notebook as far as it came then lies beside `output`, as *.failed.ipynb, and
    an older `output` stays untouched.
    """
    # 2 s to import; jsonschema does without it.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import nbformat

    notebook, output = Path(notebook), Path(output)
    parameters = check_parameters(notebook, parameters)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: name the file for the executed notebook")
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    # Runs at the same time never share a file.
    scratch = output.with_name(f".{output.stem}.{uuid.uuid4().hex}.ipynb")
    try:
        try:
            executed = _papermill(notebook, scratch, parameters)
            problem = _incomplete(executed, expected_files)
        except Exception as error:
            problem = _reason(error)
        try:
            if scratch.exists():
                executed = nbformat.read(scratch, as_version=4)
                problem = problem and f"{problem}{_said_by_magic(executed)}"
                for key in ("input_path", "output_path"):  # paths on this machine
                    executed.metadata.get("papermill", {}).pop(key, None)
                content = f"{nbformat.writes(executed)}\n".encode()
                write_atomically(failed if problem else output, content)
        except (OSError, ValueError) as error:  # the disk is full: half of it is no notebook
            problem = problem or _reason(error)
    finally:
        scratch.unlink(missing_ok=True)
    if problem:
        raise NotebookError(f"{notebook.name}: {problem}")
    failed.unlink(missing_ok=True)
    for output in (output for cell in executed.cells for output in cell.get("outputs", [])):
        if output.get("name") == "stderr":  # what it warns of, such as numbers of other code
            print(output.text, end="", file=sys.stderr)


def _papermill(notebook: Path, output: Path, parameters: dict):
    """The notebook as papermill executes it, on a kernel of our own."""
    import papermill
    from traitlets.config import Config

    paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)]
    patience = Config({"KernelManager": {"shutdown_wait_time": SECONDS_TO_END}})
    lines = f"{LESS_GARBAGE_COLLECTION}; {OWN_STYLE}"
    # A cell's errors are told anyway.
    kernel = ["--log-level=50", f"--IPKernelApp.exec_lines={lines}"]
    with _own_kernel() as name:
        return papermill.execute_notebook(
            *paths,
            parameters,
            progress_bar=False,
            config=patience,
            extra_arguments=kernel,
            kernel_name=name,
            language="python",
        )


@contextlib.contextmanager
def _own_kernel():
    """The name of a kernel on this very Python, while its environment holds.

    The user's kernels, IPython profile, startup files, backend and locale have no say in it, and
    no home is needed.
    """
    from ipykernel.kernelspec import KERNEL_NAME, get_kernel_dict

    theirs = dict(os.environ)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        write_json(Path(folder, "kernels", KERNEL_NAME, "kernel.json"), get_kernel_dict())
        own = dict.fromkeys(("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"), folder)
        try:
            os.environ.update(own, PYTHONUTF8="1")
            for name in ("MPLBACKEND", "PYTHONSTARTUP"):
                os.environ.pop(name, None)
            yield KERNEL_NAME
        finally:
            os.environ.clear()
            os.environ.update(theirs)


def _incomplete(executed, expected_files) -> str | None:
    """What is missing from a run that papermill calls good."""
    cells = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    count = sum(cell.execution_count is not None for cell in cells)
    if count < len(cells):
        ran = f"only {count} of {len(cells)} code cells ran"
        return f"it stopped early, {ran} (sys.exit in a cell?)"
    for cell in cells:
        for output in cell.outputs:
            if output.output_type == "error":
                return f"cell {cell.execution_count}: {output.ename}: {output.evalue}"
    missing = [str(file) for file in expected_files if not Path(file).exists()]
    return f"it ran to its end without writing {', '.join(missing)}" if missing else None


def _said_by_magic(executed) -> str:
    """What IPython printed where a cell failed without an error, as with an unknown magic."""
    cells = executed.cells
    failed = [cell for cell in cells if cell.metadata.get("papermill", {}).get("exception")]
    outputs = failed[-1].outputs if failed else []
    if any(output.output_type == "error" for output in outputs):
        return ""
    text = "".join(output.text for output in outputs if output.get("name") == "stderr")
    return f" {text.strip().splitlines()[-1]}" if text.strip() else ""


def _reason(error: Exception) -> str:
    """One line for what papermill raised."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, DeadKernelError):
        return "its kernel died (killed, or out of memory?)"
    if isinstance(error, PapermillExecutionError):
        line = f"cell {error.exec_count}: {error.ename}: {error.evalue}"
        return textwrap.shorten(line, 300)
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


# --- the notebooks of the repository ---


def refresh_notebooks() -> None:
    """Execute every notebook on its defaults and keep the outputs: how the committed ones are made.

    It starts from an empty smoke profile. Nothing is replaced unless every notebook ran to its end.
    """
    for folder in ("runs/smoke", "figures/smoke"):
        shutil.rmtree(PROJECT / folder, ignore_errors=True)
    notebooks = store.notebook_paths()
    with tempfile.TemporaryDirectory() as scratch:
        for notebook in notebooks:
            print(f"{notebook.name} ...", flush=True)
            execute(notebook, Path(scratch, notebook.name), {})
        for notebook in notebooks:
            executed = Path(scratch, notebook.name).read_text(encoding="utf-8")
            write_atomically(notebook, without_volatile_metadata(executed).encode())


def without_volatile_metadata(text: str) -> str:
    """A notebook without times, versions and widgets, which differ between executions.

    A widget that has something to show without its kernel leaves that, and no broken view.
    """
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    name = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    own = {"mtprune": notebook.metadata.mtprune} if "mtprune" in notebook.metadata else {}
    notebook.metadata = {"kernelspec": name, "language_info": {"name": "python"}, **own}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", ()):
            if len(output.get("data", ())) > 1:
                output.data.pop(WIDGET_VIEW, None)
    return nbformat.writes(notebook) + "\n"
