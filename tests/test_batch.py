"""The batch: a run counts as good only if it was, and jobs are resumed, refused or redone."""

import errno
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import matplotlib
import nbformat
import papermill
import pytest

from conftest import LAUNCH
from mtprune_utils import events
from mtprune_utils.files import KINDS, PROJECT
from mtprune_utils.run import launch
from mtprune_utils.run.notebook import NotebookError, check_parameters, execute, notebook_parameters
from mtprune_utils.study import store

PARAMETERS = """\
word: str = "a # b"  # what to write
number: int = 3
rate: float = 0.5  # a share"""
GOOD = 'with open("out.txt", "w") as file:\n    file.write(f"{word} {number}")'


def write_notebook(path, *cells, parameters=PARAMETERS, **metadata):
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    named = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata.update(kernelspec=named, **metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


def alive(pid):
    """A zombie has ended too, only nobody has waited for it yet."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout
    return bool(state) and not state.startswith("Z")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- parameters ---


def test_parameters_are_read_with_type_and_default(here):
    assert notebook_parameters(write_notebook(here / "nb.ipynb")) == {
        "word": (str, "a # b"),
        "number": (int, 3),
        "rate": (float, 0.5),
    }


@pytest.mark.parametrize(
    "line", ["number = 3", "number: int = 1 + 2", "number: Path = 3", "print(3)", "number: int"]
)
def test_parameters_cell_holds_nothing_else(here, line):
    with pytest.raises(ValueError, match="must have the form"):
        notebook_parameters(write_notebook(here / "nb.ipynb", parameters=line))


def test_misspelt_parameter_is_refused_with_the_nearest_name(here):
    with pytest.raises(ValueError, match="no parameter 'numbr': did you mean 'number'"):
        execute(write_notebook(here / "nb.ipynb", GOOD), "out.ipynb", {"numbr": 4})
    assert not Path("out.txt").exists()


@pytest.mark.parametrize(
    "name, value", [("number", "4"), ("number", 4.0), ("number", True), ("word", 4), ("rate", "")]
)
def test_wrong_type_is_refused(here, name, value):
    with pytest.raises(ValueError, match=f"'{name}' takes "):
        check_parameters(write_notebook(here / "nb.ipynb"), {name: value})


def test_a_forgotten_bracket_is_one_line_and_an_empty_word_is_a_word(capsys):
    broken = '{"dense.steps": 3'
    command = ["notebook", "notebooks/01_train_dense.ipynb", "out.ipynb"]
    assert launch.main([*command, "-p", "overrides", broken]) == 1
    said = capsys.readouterr().err
    assert said == f"01_train_dense.ipynb: 'overrides' takes {KINDS[dict]}, got {broken!r}\n"
    assert launch.parsed("") == "" and launch.parsed("1e-3") == 0.001
    assert launch.parsed("taylor") == "taylor"


TEXTS = ["2024", "true", "null", "1e3", "[1]", "NaN", '"quoted"', "", "a b"]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_declared_as_text_stays_text(here, text, monkeypatch):
    given = []
    monkeypatch.setattr(launch, "run_notebook", lambda *arguments: given.append(arguments[2]) or 0)
    write_notebook(here / "nb.ipynb")
    command = ["notebook", "nb.ipynb", "out.ipynb", "-p", "word", text, "-p", "number", "7"]
    assert launch.main(command) == 0
    assert given == [{"word": text, "number": 7}]


@pytest.mark.parametrize("text", ["# prose", "[]", "{}", '{"cells": [1]}'])
def test_what_is_no_notebook_is_refused_in_one_line(here, text, capsys):
    Path("README.md").write_text(text)
    assert launch.main(["notebook", "README.md", "out.ipynb"]) == 1
    assert capsys.readouterr().err == "README.md is no Jupyter notebook\n"


def test_whole_number_is_taken_for_a_float(here):
    assert repr(check_parameters(write_notebook(here / "nb.ipynb"), {"rate": 1})) == "{'rate': 1.0}"


# --- one notebook ---


def test_good_run_through_the_command_line(here):
    write_notebook(here / "nb.ipynb", GOOD, "")
    command = [*LAUNCH, "notebook", "nb.ipynb", "done/out.ipynb"]
    result = subprocess.run(
        [*command, "-p", "number", "7", "--expect", "out.txt"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert Path("out.txt").read_text() == "a # b 7"
    assert os.listdir("done") == ["out.ipynb"]
    assert str(here) not in Path("done/out.ipynb").read_text()


FAILURES = {
    "error": (["1 / 0"], "cell 3: ZeroDivisionError: division by zero"),
    "killed kernel": (["import os\nos.kill(os.getpid(), 9)", GOOD], "its kernel died"),
    "sys.exit(0)": (["import sys\nsys.exit(0)", GOOD], "only 3 of 4 code cells ran"),
    "sys.exit(0) at the end": (["import sys\nsys.exit(0)"], "SystemExit"),
    "missing file": (["pass"], "without writing out.txt"),
    "unknown magic": (["%no_such_magic"], "cell 3: .* function `%no_such_magic` not found"),
}


@pytest.mark.parametrize("cells, message", FAILURES.values(), ids=FAILURES)
def test_failed_run_is_told_and_keeps_the_good_output(here, cells, message):
    write_notebook(here / "nb.ipynb", *cells)
    Path("out.ipynb").write_text("an older, good output")
    with pytest.raises(NotebookError, match=message) as error:
        execute("nb.ipynb", "out.ipynb", {"number": 1}, ["out.txt"])
    assert "\n" not in str(error.value)
    assert Path("out.ipynb").read_text() == "an older, good output"
    nbformat.validate(nbformat.read("out.failed.ipynb", as_version=4))
    assert sorted(os.listdir()) == ["nb.ipynb", "out.failed.ipynb", "out.ipynb"]


def test_what_a_notebook_warns_of_is_said_on_the_terminal(here, capsys):
    write_notebook(here / "nb.ipynb", 'import sys\nprint("of other code", file=sys.stderr)')
    execute("nb.ipynb", "out.ipynb", {})
    assert capsys.readouterr().err == "of other code\n"


def test_two_runs_to_one_path_at_once_leave_one_whole_notebook(here):
    write_notebook(here / "nb.ipynb", GOOD.replace('"out.txt"', 'f"{number}.txt"'))
    command = [*LAUNCH, "notebook", "nb.ipynb", "out.ipynb"]
    runs = [
        subprocess.Popen([*command, "-p", "number", str(i), "--expect", f"{i}.txt"])
        for i in range(2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    executed = nbformat.read("out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells)
    assert sorted(os.listdir()) == ["0.txt", "1.txt", "nb.ipynb", "out.ipynb"]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_kernel_ends_with_its_runner(here, signum):
    sleep = 'import os, time\nopen("pid", "w").write(str(os.getpid()))\ntime.sleep(600)'
    write_notebook(here / "nb.ipynb", sleep)
    runner = subprocess.Popen([*LAUNCH, "notebook", "nb.ipynb", "out.ipynb"])
    wait_for(lambda: Path("pid").exists() and Path("pid").read_text())
    runner.send_signal(signum)
    assert runner.wait(timeout=100) != 0
    wait_for(lambda: not alive(Path("pid").read_text()))
    assert not Path("out.ipynb").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_told_in_the_first_words_of_its_error(here, code, monkeypatch):
    def half(handler, text, path):
        Path(path).write_text(text[: len(text) // 2])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", half)
    message = f"nb.ipynb: OSError: [Errno {code}] {os.strerror(code)}"
    with pytest.raises(NotebookError, match=f"^{re.escape(message)}$"):
        execute(write_notebook(here / "nb.ipynb", GOOD), "out.ipynb", {})
    assert os.listdir() == ["nb.ipynb"]


def test_an_output_that_is_a_folder_is_refused_before_anything_starts(here):
    (here / "done").mkdir()
    with pytest.raises(IsADirectoryError, match="done is a folder: name the file"):
        execute(write_notebook(here / "nb.ipynb", GOOD), "done", {})
    assert not Path("out.txt").exists() and not os.listdir("done")


SURROUNDINGS_CELL = """\
import locale, os, sys
import matplotlib.pyplot as plt
plt.plot([1, 2])
plt.show()
found = sys.executable, locale.getpreferredencoding(False), "theirs" in globals()
assert found == (EXECUTABLE, "utf-8", False), found
style = plt.rcParams["text.usetex"], plt.rcParams["lines.linewidth"]
assert style == (False, 1.5), style
open("ü.txt", "w").write("ü")"""


@pytest.mark.parametrize("home", ["theirs", "/dev/null"])
def test_a_notebook_runs_on_the_launchers_own_python_and_style(here, home):
    spec = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
    theirs = {
        "theirs/.local/share/jupyter/kernels/python3/kernel.json": json.dumps(spec),
        "ipython/profile_default/startup/00.py": "theirs = 1",
        "ipython/profile_default/ipython_config.py": "c.InlineBackend.rc = {'text.usetex': True}",
        "startup.py": "theirs = 1",
        "matplotlibrc": "text.usetex: True\nlines.linewidth: 9\nbackend: Agg\n",
    }
    for name, text in theirs.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    others = ("XDG_", "JUPYTER_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(others)}
    environment = kept | {
        "HOME": str(here / home),
        "JUPYTER_PREFER_ENV_PATH": "0",
        "MPLBACKEND": "Agg",
        "IPYTHONDIR": str(here / "ipython"),
        "PYTHONSTARTUP": "startup.py",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # its list of fonts takes seconds to make
    }
    cell = SURROUNDINGS_CELL.replace("EXECUTABLE", repr(sys.executable))
    path = write_notebook(here / "nb.ipynb", cell)
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.kernelspec = {"name": "py39_torch", "display_name": "py39_torch"}
    nbformat.write(notebook, path)
    command = [*LAUNCH, "notebook", "nb.ipynb", "out.ipynb"]
    result = subprocess.run([*command, "--expect", "ü.txt"], capture_output=True, env=environment)
    assert result.returncode == 0, result.stderr
    outputs = nbformat.read("out.ipynb", as_version=4).cells[-1].outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_job_gets_a_gpu_of_its_own(monkeypatch, tmp_path):
    # The locks are those of all the user's batches.
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "test-a,test-b")
    with launch.one_gpu():
        first = os.environ["CUDA_VISIBLE_DEVICES"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "test-a,test-b")
        with launch.one_gpu():
            assert {first, os.environ["CUDA_VISIBLE_DEVICES"]} == {"test-a", "test-b"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with launch.one_gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_locks_of_gpus_follow_no_link_and_any_name_has_one(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-8cd5/1/0")
    with launch.one_gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-GPU-8cd5/1/0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f"mtprune-{os.getuid()}-gpu-0.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="gpu-0.lock"), launch.one_gpu():
        pass
    assert (tmp_path / "precious").read_text() == "precious"


# --- make ---


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "it's",
        'a"b',
        "$HOME",
        "a$b",
        "1; touch PLACE",
        "`touch PLACE`",
        "$(touch PLACE)",
        "$(shell touch PLACE)",
        '"; touch PLACE; "',
        "'; touch PLACE; '",
        "#1",
        "~/data",
        "line\nümlaut",
        '{"x": "$(HOME)"}',
    ],
)
def test_make_passes_values_on_as_they_are(value, tmp_path):
    value = value.replace("PLACE", str(tmp_path / "executed"))
    (tmp_path / "program.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))")
    names = ("profile", "data", "root", "overrides", "jobs", "on")
    make = ["make", "-s", "-C", str(PROJECT), "-o", "/dev/null", "INSTALLED=/dev/null"]
    program = f"MTPRUNE={sys.executable} {tmp_path}/program.py"
    words = ["figures", program, *(f"{name.upper()}={value}" for name in names)]
    result = subprocess.run([*make, *words], capture_output=True, text=True, check=True)
    expected = [word for name in names for word in (f"--{name}", value)]
    assert json.loads(result.stdout) == ["figures", *expected]
    assert not (tmp_path / "executed").exists()


# --- what jobs tell the launcher ---


@pytest.mark.parametrize(
    "line",
    [
        'mtprune: {"job": "x", "event": "done", "seconds": 1}\n',
        "dense  many\n",
        "    output: /data/mtprune: {x}/done.json\n",
        f"    output: /data/{events.EVENT}x/a\n",
    ],
)
def test_what_snakemake_says_is_no_event_whatever_paths_are_in_it(line, tmp_path):
    progress = launch.Progress(tmp_path / "timings.csv", "here")
    before = dict(vars(progress))
    progress.read(line)
    assert vars(progress) == before


def test_a_killed_snakemake_leaves_its_own_words_and_how_to_go_on(tmp_path):
    log = tmp_path / "snakemake.log"
    log.write_text(f'Building DAG of jobs...\n{events.EVENT}{{"job": "batch", "event": "grid"}}\n')
    said = launch.Progress(tmp_path / "timings.csv", "here").trouble(log)
    assert said == f"Snakemake failed; its log ends:\nBuilding DAG of jobs...\n{launch.RESUME}"


@pytest.mark.parametrize("command", ["figures", "claims", "refresh"])
def test_what_needs_the_repository_says_so_and_deletes_nothing(command, here, monkeypatch, capsys):
    (here / "runs" / "smoke").mkdir(parents=True)
    monkeypatch.setattr(store, "PROJECT", Path())
    assert launch.main([command]) == 1
    message = f"{command} needs the repository, with its notebooks: run it in a clone\n"
    assert capsys.readouterr().err == message
    assert os.listdir("runs") == ["smoke"]


@pytest.mark.parametrize("name", ["{7f3a}", "a\nb", "a\x1eb", "a\udcffb"])
@pytest.mark.parametrize("option", ["--runs", "--figures"])
def test_folders_whose_names_snakemake_misreads_are_refused_at_once(option, name, here, capsys):
    assert launch.main(["figures", "--profile", "smoke", option, str(here / name)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("runs and figures may lie in no folder whose name has")
    assert error.count("\n") == 1
    assert not os.listdir()


# --- the batch, on a copy of the repository whose notebooks train nothing ---

STAGE_CELL = """\
import os, time
from pathlib import Path
from mtprune_utils.events import JOB, tell
from mtprune_utils.study.profiles import get_profile
from mtprune_utils.study.grid import Experiment
experiment = Experiment(get_profile(profile, overrides), data, root, Path(runs))
run = experiment.{run}
assert all(run.done for run in run.inputs)
Path("pid").write_text(str(os.getpid()))
tell(os.environ.get(JOB), "at", step=3, total=4, said="half of it")
if Path("slow").exists():
    time.sleep(600)
if Path("broken").exists():
    raise ValueError("a broken stage")
for file in ("evaluations.csv", "curve.csv", "trivial.csv", "layers.csv", "model.safetensors"):
    run.write_json(file, "")
run.write_json("provenance.json", "")
run.finish(run.code)"""
FIGURE_CELL = """\
from pathlib import Path
from mtprune_utils.files import write_atomically, write_json
from mtprune_utils.study import store
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import get_profile
place = Path(figures, f"{{profile}}-custom")
for suffix in ("png", "pdf", "csv"):
    write_atomically(place / f"{figure}.{{suffix}}", b"")
experiment = Experiment(get_profile(profile, overrides), data, root, Path(runs))
shown = experiment.needed("{needs}")
origins = {{f"{{run.stage}}/{{run.name}}": {{"content": run.content}} for run in shown}}
drawn_by = {{"code": store.figure_code(), "notebook": store.notebook_digest("{figure}")}}
margin = {{"margin": experiment.profile.margin}}
write_json(place / "{figure}.json", drawn_by | {{"profile": margin, "runs": origins}})"""
SHARED = """\
profile: str = "smoke"
runs: str = "runs"
data: str = "rooms"
root: str = ""
overrides: dict = {}"""
STAGES = {  # notebook: the run it makes, its own parameters
    "01_train_dense": ("dense(seed, arm)", 'seed: int = 0\narm: str = "multitask"'),
    "02_prune_iteratively": (
        "prune(criterion, seed, arm=arm)",
        'seed: int = 0\ncriterion: str = "taylor"\narm: str = "iterative"',
    ),
    "03_retrain_from_scratch": (
        "retrain(criterion, seed, level, arm)",
        'seed: int = 0\ncriterion: str = "taylor"\nlevel: int = 0\narm: str = "scratch"',
    ),
}
FIGURES = {  # notebook: the figure it draws, the runs that it shows
    "04_plot_fig1_iterative_pruning": ("fig1_iterative_pruning", "pruned"),
    "05_plot_fig2_layer_widths": ("fig2_layer_widths", "pruned"),
    "06_plot_fig3_retrained_from_scratch": ("fig3_retrained_from_scratch", "paper"),
    "08_judge_claims": ("fig5_claims", "all"),
    "10_measure_speedup": ("fig4_speedup", "pruned"),
}
# Eight jobs: dense, prune, retrain, five figures.
OVERRIDES = {"seeds": 1, "criteria": ["taylor"], "controls.seeds": 0, "tuning.trials": 0}
CHANGE = {"retrain.lr": 0.5}  # three jobs: the re-training, the figure and the table that show it
ANYTHING = """\
class Anything:
    def __init__(self, *given):
        self.width_list = []


def __getattr__(name):
    return Anything
"""
STUBS = {  # the copy needs no torch, which takes seconds to import
    **dict.fromkeys(
        ("core/iterative", "core/model", "core/evaluation", "core/data", "stages/_training"),
        ANYTHING,
    ),
    "core/trainer": ANYTHING,
    "core/task": f"{ANYTHING}\n\ndef channels(tasks):\n    return {{}}\n",
    "stages/tune": 'ARMS = TABLES = SETTINGS = ()\nNOTEBOOK = "07_tune_optimizer"\n',
    "datasets/rooms": 'def tasks(root):\n    return []\n\n\ndef digest(root):\n    return "data"\n',
}


@pytest.fixture(scope="module")
def finished_repository(tmp_path_factory):
    """A copy in which the batch has run once, and what it said."""
    repository = tmp_path_factory.mktemp("finished") / "repository"
    shutil.copytree(
        PROJECT / "mtprune_utils",
        repository / "mtprune_utils",
        ignore=shutil.ignore_patterns("rooms_v*", "__pycache__"),
    )
    for name, stub in STUBS.items():
        (repository / "mtprune_utils" / f"{name}.py").write_text(stub)
    shutil.copy(PROJECT / "Snakefile", repository)
    for name, (run, own) in STAGES.items():
        path = repository / "notebooks" / f"{name}.ipynb"
        write_notebook(path, STAGE_CELL.format(run=run), parameters=f"{SHARED}\n{own}")
    for name, (figure, needs) in FIGURES.items():
        path = repository / "notebooks" / f"{name}.ipynb"
        about = {"figures": [figure], "needs": needs}
        code = FIGURE_CELL.format(figure=figure, needs=needs)
        own = f'{SHARED}\nfigures: str = "figures"'
        write_notebook(path, code, parameters=own, mtprune=about)
    result = finish_batch(repository)
    assert result.returncode == 0, result.stdout
    return repository, result.stdout


@pytest.fixture
def repository(finished_repository, tmp_path):
    return shutil.copytree(finished_repository[0], tmp_path / "repository")


def batch_command(overrides):
    overrides = json.dumps({**OVERRIDES, **overrides})
    program = [*LAUNCH, "figures"]
    return [*program, "--profile", "smoke", "--overrides", overrides]


def launcher(repository, environment=None, **overrides):
    command = batch_command(overrides)
    environment = (environment or os.environ) | {"PYTHONPATH": str(repository)}  # kernels', too
    return subprocess.Popen(
        command,
        cwd=repository,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def in_terminal(command, folder, keys=lambda said: b"", seconds=180, **environment):
    """The exit code of a command in a pseudo-terminal, and all that it wrote there.

    keys: told what is written so far, says what is typed next.
    """
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        termios.tcsetwinsize(1, (40, 120))
        os.environ.update(environment, TERM="xterm-256color")
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.environ.pop("CI", None)
        os.execv(command[0], command)
    said, end = "", time.monotonic() + seconds
    try:
        while True:
            assert time.monotonic() < end, said
            if select.select([terminal], [], [], 0.2)[0]:
                said += os.read(terminal, 65536).decode(errors="replace")
            os.write(terminal, keys(said))
    except OSError:  # it has ended
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
    finally:
        os.close(terminal)  # which ends it otherwise


def finish_batch(repository, environment=None, **overrides):
    process = launcher(repository, environment, **overrides)
    output = process.communicate()[0]
    return subprocess.CompletedProcess([], process.returncode, output)


REOPEN = """
import json, sys
from pathlib import Path
from mtprune_utils.run import launch
from mtprune_utils.study.grid import Experiment
experiment = Experiment.open("smoke", "rooms", "", "runs", json.loads(sys.argv[1]))
launch.reopen_outdated(experiment, Path("figures", experiment.label))
"""


def stale(repository, **overrides):
    """The jobs that a batch would run, by a dry run: {stage: number}."""
    config = {"profile": "smoke", "overrides": {**OVERRIDES, **overrides}}
    reopen = [sys.executable, "-c", REOPEN, json.dumps(config["overrides"])]
    subprocess.run(reopen, cwd=repository, check=True)
    (repository / "dry.json").write_text(json.dumps(config))
    command = [*launch.snakemake_command("dry.json", launch.local_arguments(2)), "--dry-run"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^(dense|prune|retrain|figure)\s+(\d+)$", result.stdout + result.stderr, re.MULTILINE
    )
    return {stage: int(count) for stage, count in rows}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_batch_makes_every_figure_and_says_so(finished_repository):
    repository, output = finished_repository
    assert "8 jobs to do, 0 finished earlier" in output
    assert re.search(r"\[1/8\] dense seed 0 multitask  done in \d+ s   \(elapsed", output)
    assert re.search(r"\[\d/8\] retrain taylor seed 0 level 0 scratch  done in", output)
    assert "figures/smoke-custom/fig1_iterative_pruning.png" in output
    assert str(repository) not in output
    for figure in (
        "fig1_iterative_pruning",
        "fig2_layer_widths",
        "fig3_retrained_from_scratch",
        "fig4_speedup",
        "fig5_claims",
    ):
        suffixes = {file.suffix for file in repository.glob(f"figures/smoke-custom/{figure}.*")}
        assert suffixes == {".png", ".pdf", ".csv", ".json"}
        assert (repository / f"runs/smoke/figures/{figure}.ipynb").exists()
    (notebook,) = repository.glob("runs/smoke/prune/*/notebook.ipynb")
    assert str(repository) not in notebook.read_text()
    assert len((repository / "runs/smoke/timings-smoke-custom.csv").read_text().splitlines()) == 9


def test_a_batch_needs_no_user_name_no_home_no_locale_and_no_plain_path(repository):
    odd = repository.rename(repository.with_name("it's {v1} of $HOME ü"))
    nobody = "import pwd\ndef getpwuid(uid):\n    raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    (odd / "sitecustomize.py").write_text(nobody)
    named = ("USER", "LOGNAME", "LNAME", "USERNAME", "XDG_", "SNAKEMAKE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(named)}
    environment |= {"HOME": "/dev/null", "LC_ALL": "C", "SNAKEMAKE_PROFILE": "theirs"}
    result = finish_batch(odd, environment, **CHANGE)
    assert result.returncode == 0, result.stdout
    assert "3 jobs to do, 5 finished earlier" in result.stdout


@pytest.mark.parametrize(
    "setting, message",
    [
        ("profle=smoke", "unknown setting 'profle': did you mean 'profile'?"),
        ("profile=smok", "unknown profile 'smok': did you mean 'smoke'?"),
        ("data=room", "unknown data set 'room'"),
    ],
)
def test_snakemake_by_hand_refuses_what_the_launcher_refuses(repository, setting, message):
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", "--config", setting]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stdout + result.stderr


def test_comments_outputs_and_unused_numbers_redo_nothing(repository):
    edit(repository / "mtprune_utils/study/grid.py", '"""', '# a comment\n"""')
    edit(repository / "mtprune_utils/stages/retrain.py", '"""', '# a comment\n"""')
    path = repository / "notebooks/01_train_dense.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].execution_count = 5
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text="other")]
    notebook.cells.append(nbformat.v4.new_markdown_cell("a text"))
    nbformat.write(notebook, path)
    assert stale(repository) == {}


def test_changes_redo_what_depends_on_them_and_no_more(repository):
    """A stage's notebook only calls the stage: what else is in it, a plot, re-trains nothing."""
    everything = {"dense": 1, "prune": 1, "retrain": 1, "figure": 5}
    changed = shutil.copytree(repository, repository.with_name("retrain"))
    assert stale(changed, **{"retrain.steps": 5}) == {"retrain": 1, "figure": 2}
    changed = shutil.copytree(repository, repository.with_name("dense"))
    assert stale(changed, **{"dense.steps": 5}) == everything
    edit(repository / "notebooks/03_retrain_from_scratch.ipynb", "import os", "import  os")
    figure = repository / "notebooks/04_plot_fig1_iterative_pruning.ipynb"
    edit(figure, 'profile: str = \\"smoke', 'profile: str = \\"quick')
    assert stale(repository) == {}
    edit(figure, "place = ", "place  = ")
    assert stale(repository) == {"figure": 1}
    with (repository / "mtprune_utils/study/figures.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    assert stale(repository) == {"figure": 5}
    with (repository / "mtprune_utils/stages/_training.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    assert stale(repository) == everything


def test_times_and_what_was_made_elsewhere_decide_nothing_by_themselves(repository):
    for path in [*repository.glob("runs/smoke/*/*/*"), *repository.glob("figures/*/*")][::2]:
        os.utime(path, (2e9, 2e9))  # in the future, as if the clock had been ahead
    assert stale(repository) == {}
    (dense,) = repository.glob("runs/smoke/dense/*")
    marker = json.loads((dense / "done.json").read_text())
    (dense / "curve.csv").write_text("other")
    marker["files"]["curve.csv"] = hashlib.sha256(b"other").hexdigest()
    (dense / "done.json").write_text(json.dumps(marker))
    os.utime(dense / "done.json", (1, 1))
    assert stale(repository) == {"prune": 1, "retrain": 1, "figure": 5}


def test_a_batch_split_by_criteria_is_put_together_by_copying_run_folders(repository, tmp_path):
    """Two clones, a criterion each. Then only figures are to be made, of both."""
    other = shutil.copytree(repository, tmp_path / "other")
    shutil.rmtree(other / "runs")
    result = finish_batch(other, criteria=["cosprune"])
    assert result.returncode == 0 and "8 jobs to do" in result.stdout, result.stdout
    shutil.copytree(other / "runs", repository / "runs", dirs_exist_ok=True)
    both = {"criteria": ["taylor", "cosprune"], "agreement_batches": 0}
    assert stale(repository, **both) == {"figure": 5}


def test_what_is_of_other_code_is_said_and_never_lost_where_it_came_from_tables(repository):
    with (repository / "mtprune_utils/stages/_training.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    markers = list(repository.glob("runs/smoke/*/*/done.json"))
    before = [path.read_text() for path in markers]
    from_tables = REOPEN.replace("label))", "label), restored=True)")
    reopen = [sys.executable, "-c", from_tables, json.dumps(OVERRIDES)]
    result = subprocess.run(reopen, cwd=repository, capture_output=True, text=True)
    assert "ValueError: 3 of 3 runs are outdated: dense seed0-multitask" in result.stderr
    said = result.stderr.splitlines()[-1]
    ways = ("`make vouch PROFILE=smoke`", "`make figures PROFILE=smoke` makes all again")
    assert all(way in said for way in ways)
    assert [path.read_text() for path in markers] == before
    result = finish_batch(repository)
    assert result.returncode == 0
    (line,) = (line for line in result.stdout.splitlines() if "3 of 3 runs are outdated" in line)
    old = {json.loads(text)["code"] for text in before}
    now = {json.loads(path.read_text())["code"] for path in markers}
    assert any(code in line for code in old) and any(code in line for code in now) and not old & now


def test_failure_is_told_and_what_is_finished_is_kept(repository):
    (repository / "broken").touch()
    result = finish_batch(repository, **CHANGE)
    assert result.returncode != 0
    assert "FAILED after" in result.stdout and "trying once more" in result.stdout
    reason = (
        "retrain taylor seed 0 level 0 scratch: 03_retrain_from_scratch.ipynb: cell 3: "
        "ValueError: a broken stage"
    )
    assert f"1 job failed:\n  {reason}\n" in result.stdout
    failed = re.search(r"runs/smoke/retrain/\S+/notebook.failed.ipynb", result.stdout)[0]
    assert "a broken stage" in (repository / failed).read_text()
    assert not (repository / failed).with_name("notebook.ipynb").exists()
    assert stale(repository, **CHANGE) == {"retrain": 1, "figure": 2}


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_stopped_batch_leaves_no_process_and_resumes(repository, signum, code):
    (repository / "pid").unlink()
    (repository / "slow").touch()
    process = launcher(repository, **CHANGE)
    wait_for(lambda: (repository / "pid").exists() and (repository / "pid").read_text())
    second = finish_batch(repository)
    assert second.returncode != 0
    held = f"profile 'smoke' is already being run there, by process {process.pid}"
    assert second.stdout.strip() == f"{held}: wait for it or end it"
    process.send_signal(signum)
    assert process.wait(timeout=100) == code
    wait_for(lambda: not alive((repository / "pid").read_text()))
    if signum != signal.SIGKILL:
        assert stale(repository, **CHANGE) == {"retrain": 1, "figure": 2}
        return
    (repository / "slow").unlink()
    result = finish_batch(repository, **CHANGE)
    assert result.returncode == 0
    assert "3 jobs to do, 5 finished earlier" in result.stdout


def test_a_terminal_shows_bars_and_is_left_clean(repository):
    """Stopped by Ctrl-C, then to its end."""
    command, own = batch_command(CHANGE), {"PYTHONPATH": str(repository)}
    at_work = "retrain taylor seed 0 level 0 scratch"
    row = re.compile(rf"{at_work} .*━.* 3/4 .*half of it")
    (repository / "slow").touch()
    # By which the plan would reckon with the networks that the copy lacks.
    (repository / "figures" / "smoke-custom" / store.TIMINGS).unlink()
    typed = []

    def keys(said):
        if row.search(said) and not typed:
            typed.append(b"\x03")
            return typed[0]
        return b""

    code, said = in_terminal(command, repository, keys, **own)
    assert code == 130 and typed, said
    hidden, cursor, after = said.rpartition("\x1b[?25h")
    assert "\x1b[?25l" in hidden and cursor and "\x1b[?25l" not in after, "it has its cursor again"
    end = [line.strip() for line in after.split("\n")]
    assert end[-3:] == ["Stopping the running jobs ...", f"Stopped. {launch.RESUME}", ""]
    (repository / "slow").unlink()
    code, said = in_terminal(command, repository, **own)
    assert code == 0 and "0 of 3 jobs finished, 1 running" in said
    assert "3 jobs to do, 5 finished earlier" in said and f"[1/3] {at_work}  done in" in said
    after = said.rpartition("\x1b[?25h")[2]
    assert "━" not in after and "Done in" in after and "fig5_claims.png" in after


def test_refreshed_notebooks_hold_outputs_and_nothing_volatile(repository):
    kept = repository / "notebooks/01_train_dense.ipynb"
    for notebook in set(repository.glob("notebooks/*.ipynb")) - {kept}:
        notebook.unlink()
    (repository / "runs/smoke/left_over").touch()
    command = [*LAUNCH, "refresh"]
    own = os.environ | {"PYTHONPATH": str(repository)}
    subprocess.run(command, cwd=repository, check=True, env=own)
    notebook = nbformat.read(repository / "notebooks/01_train_dense.ipynb", as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    assert [dict(cell.metadata) for cell in notebook.cells] == [{"tags": ["parameters"]}, {}]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not (repository / "runs/smoke/left_over").exists()
