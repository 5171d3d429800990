"""One notebook executed so that its success can be believed: parameters checked before, cells and files after.

papermill alone runs a misspelt parameter's notebook on the defaults, and calls a run good whose kernel left early.
"""

import ast
import contextlib
import difflib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import textwrap
import uuid
from pathlib import Path

from mtprune_utils.files import PROJECT, write_atomically, write_json

STAGE_NOTEBOOKS = {
    "dense": "notebooks/01_train_dense.ipynb",
    "tune": "notebooks/07_tune_optimizer.ipynb",
    "prune": "notebooks/02_prune_iteratively.ipynb",
    "retrain": "notebooks/03_retrain_from_scratch.ipynb",
}
FIGURE_NOTEBOOKS = {
    "fig1_iterative_pruning": "notebooks/04_plot_fig1_iterative_pruning.ipynb",
    "fig2_layer_widths": "notebooks/05_plot_fig2_layer_widths.ipynb",
    "fig3_retrained_from_scratch": "notebooks/06_plot_fig3_retrained_from_scratch.ipynb",
    "fig4_speedup": "notebooks/10_measure_speedup.ipynb",
    "fig5_claims": "notebooks/08_judge_claims.ipynb",
    "fig6_training_curves": "notebooks/08_judge_claims.ipynb",  # from the same run as the one before, as is the next
    "fig7_tuning": "notebooks/08_judge_claims.ipynb",  # where a profile tunes
}
# Garbage is sought a hundred times less often, and not at the end: imports and the kernel's end take 1.5 s less.
LESS_GARBAGE_COLLECTION = "import atexit, gc; gc.set_threshold(70_000); atexit.register(gc.freeze)"
OWN_STYLE = "import matplotlib; matplotlib.rcdefaults()"  # whatever the user's matplotlibrc says
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}


class NotebookError(RuntimeError):
    """A notebook did not run to its end. One line says why."""


# --- the parameters of a notebook ---

def notebook_parameters(notebook: str | Path) -> dict[str, tuple[type, object]]:
    """{name: (type, default)} of the cell tagged `parameters`, whose lines are `name: type = literal  # help`."""
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{Path(notebook).name} is no Jupyter notebook") from None
    if len(sources) != 1:
        raise ValueError(f"{Path(notebook).name}: {len(sources)} cells are tagged 'parameters', there must be one")
    return _declared(sources[0], Path(notebook).name)


def _declared(source: str, notebook: str) -> dict[str, tuple[type, object]]:
    parameters = {}
    for node in ast.parse(source).body:
        try:
            parameters[node.target.id] = (TYPES[node.annotation.id], ast.literal_eval(node.value))
        except (AttributeError, KeyError, ValueError):
            raise ValueError(f"{notebook}: {ast.unparse(node)}: a parameter must have the form 'name: type = literal'") from None
    return parameters


def check_parameters(notebook: str | Path, given: dict[str, object]) -> dict[str, object]:
    """The given values, whole numbers made float where float is declared.

    Raises ValueError for an unknown name or a wrong type: papermill would run on the defaults and report success.
    """
    return _check_values(given, notebook_parameters(notebook), Path(notebook).name)


def _check_values(given: dict[str, object], known: dict[str, tuple[type, object]], notebook: str) -> dict[str, object]:
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
            raise ValueError(f"{notebook}: {name!r} takes a {declared.__name__}, got {value!r}")
        checked[name] = value
    return checked


def check_run(notebook: str | Path, parameters: dict[str, object]) -> None:
    """Whether the values name a run that there can be. Raises ValueError, or FileNotFoundError where the data is missing."""
    from mtprune_utils.runs import Experiment  # and torch with it

    defaults = {name: default for name, (_, default) in notebook_parameters(notebook).items()}
    values = defaults | check_parameters(notebook, parameters)
    if "profile" not in values:
        return
    experiment = Experiment.open(*(values.get(name, "") for name in ("profile", "data", "root", "runs")), values.get("overrides"))
    for stage, own in STAGE_NOTEBOOKS.items():
        if Path(own).name == Path(notebook).name:
            cell = {name: values[name] for name in ("criterion", "seed", "level", "arm") if name in values}
            if stage == "prune" and cell["level"] < 0:
                del cell["level"]
            getattr(experiment, stage)(**cell)
    experiment.check()


def check_injected(cells: list[str]) -> None:
    """The same check within a notebook that papermill itself runs, on the sources of the cells so far (IPython's `In`).

    papermill puts the given parameters into a cell of its own behind the declared ones, whatever their names. In
    JupyterLab the declared values themselves are edited.
    """
    declared: dict = {}
    for cell in cells:
        if cell.startswith("# Parameters\n"):
            given = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell).body}
            _check_values(given, declared, "the notebook")
            continue
        try:
            found = _declared(cell, "the notebook")
        except (ValueError, SyntaxError):  # another cell, which somebody ran first
            continue
        if not declared or found.keys() == declared.keys():  # the first time, or edited and run again
            declared = found
            _check_values({name: value for name, (_, value) in declared.items()}, declared, "the notebook")


def notebook_digest(notebook: str | Path) -> str:
    """A hash of the code cells' sources, but for the parameters' defaults, which decide nothing."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    code = [cell for cell in cells if cell["cell_type"] == "code" and cell not in tagged]
    sources = ["".join(cell["source"]) for cell in code]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


# --- one notebook ---

def execute(notebook: str | Path, output: str | Path, parameters: dict, expected_files=()) -> None:
    """Run a notebook in the working directory; put it at `output` only if it ran to its end and left what it should.

    Otherwise raise NotebookError; the notebook as far as it came then lies beside `output`, as *.failed.ipynb, and an
    older `output` stays untouched.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # 2 s to import, and jsonschema does without it
    import nbformat
    import papermill
    from traitlets.config import Config

    notebook, output = Path(notebook), Path(output)
    parameters = check_parameters(notebook, parameters)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: name the file for the executed notebook")
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    scratch = output.with_name(f".{output.stem}.{uuid.uuid4().hex}.ipynb")  # runs at the same time never share a file
    try:
        try:
            paths = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, scratch)]
            # What a kernel gets to write its checkpoint when it is asked to end; five seconds are the default.
            patience = Config({"KernelManager": {"shutdown_wait_time": 80}})
            lines = f"{LESS_GARBAGE_COLLECTION}; {OWN_STYLE}"
            # A cell's errors are told anyway.
            kernel = ["--log-level=50", f"--IPKernelApp.exec_lines={lines}"]
            with _own_kernel() as name:
                executed = papermill.execute_notebook(
                    *paths, parameters, progress_bar=False, config=patience, extra_arguments=kernel,
                    kernel_name=name, language="python",
                )
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
        return f"it stopped early, only {count} of {len(cells)} code cells ran (sys.exit in a cell?)"
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
        return textwrap.shorten(f"cell {error.exec_count}: {error.ename}: {error.evalue}", 300)
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


# --- the notebooks of the repository ---

def refresh_notebooks() -> None:
    """Execute every notebook on its defaults and keep the outputs: how the committed ones are made.

    It starts from an empty smoke profile. Nothing is replaced unless every notebook ran to its end.
    """
    for folder in ("runs/smoke", "figures/smoke"):
        shutil.rmtree(PROJECT / folder, ignore_errors=True)
    notebooks = sorted((PROJECT / "notebooks").glob("[0-9]*.ipynb"))
    with tempfile.TemporaryDirectory() as scratch:
        for notebook in notebooks:
            print(f"{notebook.name} ...", flush=True)
            execute(notebook, Path(scratch, notebook.name), {})
        for notebook in notebooks:
            executed = Path(scratch, notebook.name).read_text(encoding="utf-8")
            write_atomically(notebook, without_volatile_metadata(executed).encode())


def without_volatile_metadata(text: str) -> str:
    """A notebook without times, versions and widget states, which differ from one execution to the next."""
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
    return nbformat.writes(notebook) + "\n"
