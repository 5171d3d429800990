"""Profiles, run folders and their names, whole files, and what a finished run records."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mtprune_utils import files
from mtprune_utils.datasets.rooms import FOLDER
from mtprune_utils.files import csv_text, read_table, source_digest, write_atomically
from mtprune_utils.study import store
from mtprune_utils.study.execute import execute, execute_missing
from mtprune_utils.study.grid import Experiment, Run
from mtprune_utils.study.profiles import PROFILES, get_profile

TINY = {
    "train_images": 24,
    "test_images": 8,
    "crop": 32,
    "image_height": 32,
    "dense.steps": 3,
    "dense.evaluations": 1,
    "retrain.steps": 3,
    "retrain.evaluations": 1,
    "prune.prune_interval": 1,
    "prune.filters_per_step": 110,
    "tuning.trials": 0,
    "prune.cosine_batches": 1,
}


def experiment(folder, **more) -> Experiment:
    return Experiment.open("smoke", "rooms", "", str(folder), TINY | more)


def test_overrides_replace_single_settings():
    profile = get_profile("quick", {"dense.lr": 1, "scale": [1.0, 2.0], "train_images": 10})
    assert (profile.dense.lr, profile.scale, profile.train_images) == (1.0, (1.0, 2.0), 10)
    assert profile.prune == PROFILES["quick"].prune


def test_a_run_is_named_by_every_number_that_its_results_depend_on(tmp_path):
    base, slower = experiment(tmp_path), experiment(tmp_path, **{"prune.lr": 1e-5})
    assert base.dense(0).name == slower.dense(0).name != base.dense(1).name
    assert base.prune("taylor", 0).name != slower.prune("taylor", 0).name
    assert base.retrain("taylor", 0, 0).name != slower.retrain("taylor", 0, 0).name, (
        "upstream counts"
    )
    more_seeds = experiment(tmp_path, seeds=9)
    assert base.prune("taylor", 0).name == more_seeds.prune("taylor", 0).name


def test_both_criteria_of_a_seed_see_the_same_random_numbers(tmp_path):
    base = experiment(tmp_path)
    assert (
        base.prune("taylor", 0).random_seed
        == base.prune("cosprune", 0).random_seed
        != base.prune("taylor", 1).random_seed
    )


def test_other_data_make_another_run(tmp_path):
    for file in FOLDER.glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    same = Experiment.open("smoke", "rooms", str(tmp_path), "runs").dense(0).name
    assert same == Experiment.open("smoke", "rooms", "", "runs").dense(0).name
    with open(tmp_path / "test.parquet", "ab") as file:
        file.write(b"x")
    assert Experiment.open("smoke", "rooms", str(tmp_path), "runs").dense(0).name != same


def test_the_grid_lists_every_run_once_and_upstream_first():
    grid = Experiment(PROFILES["quick"]).runs()
    paper = Experiment(PROFILES["quick"]).paper_runs()
    assert [run.stage for run in paper] == ["dense"] * 3 + ["prune"] * 6 + ["retrain"] * 12
    assert {run.folder for run in paper} < {run.folder for run in grid}
    assert len({run.folder for run in grid}) == len(grid)
    for i, run in enumerate(grid):
        assert all(upstream in grid[:i] for upstream in run.inputs)


def test_the_repository_is_known_by_its_real_path_behind_a_link_too(tmp_path):
    """Or paths inside it would not be told from others, and would get into notebooks."""
    (tmp_path / "link").symlink_to(files.PROJECT)
    spec = importlib.util.spec_from_file_location(
        "linked", tmp_path / "link" / "mtprune_utils" / "files.py"
    )
    linked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked)
    assert files.PROJECT.resolve() == linked.PROJECT


def test_a_digest_of_code_is_the_same_in_every_version_of_python(tmp_path):
    """Of what they parse differently; the value is of Python 3.11's `ast.dump`.

    The committed runs go by that.
    """
    module = tmp_path / "module.py"
    module.write_text("""class A:
    x: int = 1

    def f(self, *names, key=None, **more):
        match key:
            case None:
                return f"{names!r:>{self.x}} {{}}"
        return [lambda: None, {**more}, ...]
""")
    assert source_digest([module]) == "b91bdc026ab14e0a"


def test_words_about_code_are_no_part_of_its_digest_and_other_strings_are(tmp_path):
    module = tmp_path / "module.py"

    def digest(text):
        module.write_text(text)
        return source_digest([module])

    code = """class A:
    def f(self):
        return 'said'

    async def g(self):
        ...
"""
    documented = """'''A module.'''


class A:
    '''A class.'''

    def f(self):
        '''A method,

        of two lines.'''
        return "said"  # a comment

    async def g(self):
        'Another.'
        ...
"""
    assert digest(code) == digest(documented)
    assert digest(documented) != digest(documented.replace("said", "kept"))
    assert digest(code) != digest(code.replace("        ...\n", "        f'{self}'\n"))


def test_a_digest_of_code_is_the_same_in_every_locale():
    script = (
        "from mtprune_utils.study.grid import Experiment; "
        "print(Experiment.open('smoke', 'rooms', '', 'runs').prune('cosprune', 0).code)"
    )
    other = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=files.PROJECT, env=other, capture_output=True, text=True)
    assert result.stdout.strip() == experiment("runs").prune("cosprune", 0).code


def test_provenance_tells_whether_the_code_was_committed(tmp_path, monkeypatch):
    package = tmp_path / "mtprune_utils"
    package.mkdir()
    module = package / "module.py"
    module.write_text("A = 1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(store, "PACKAGE", package)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    clean = store.provenance("")
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    module.write_text("A = 2\n")
    assert store.provenance("")["dirty"] is True
    installed = shutil.copytree(package, tmp_path / ".venv" / "mtprune_utils")
    monkeypatch.setattr(store, "PACKAGE", installed)
    somebody_elses = store.provenance("")  # is the repository around it
    assert (somebody_elses["commit"], somebody_elses["dirty"]) == (None, None)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_tables_round_trip(tmp_path):
    rows = [{"a": 1, "b": 0.1}, {"a": 2, "b": 1e-30}]
    write_atomically(tmp_path / "t.csv", csv_text(rows).encode())
    back = read_table(tmp_path / "t.csv")
    assert [{"a": int(row["a"]), "b": float(row["b"])} for row in back] == rows


def test_a_chain_of_runs_makes_what_it_needs_and_is_not_repeated(tmp_path):
    run = experiment(tmp_path).retrain("cosprune", 0, 0)
    execute(run, report=lambda line: None)
    chain = [run, *run.inputs, *run.inputs[0].inputs]
    assert [part.stage for part in chain] == ["retrain", "prune", "dense"]
    assert all(part.done for part in chain)
    origin = json.loads(run.path("provenance.json").read_text())
    assert origin["params"]["seed"] == 0 and origin["code"] == run.code
    assert len(origin["data_digest"]) == 16
    (row,) = read_table(run.path("evaluations.csv"))
    dense = read_table(chain[2].path("evaluations.csv"))[0]
    assert abs(int(row["parameters"]) / int(dense["parameters"]) - 0.4) < 0.03
    said = []
    execute(run, report=said.append)
    assert said == [f"retrain {run.name}: finished before, nothing to do"]
    paths = "".join(file.read_text() for part in chain for file in part.folder.glob("*.json"))
    assert str(Path.home()) not in paths and str(tmp_path) not in paths


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    run = experiment(tmp_path_factory.mktemp("chain")).retrain("taylor", 0, 0)
    execute(run, report=lambda line: None)
    return run


def elsewhere(run, folder):
    """The same finished run in a copy of its folders."""
    shutil.copytree(run.experiment.root, folder / "runs")
    return replace(run, experiment=replace(run.experiment, root=folder / "runs"))


@pytest.mark.parametrize("part", ["run", "source", "source of the source"])
@pytest.mark.parametrize("what", ["code", "results"])
def test_a_run_of_other_code_or_from_other_results_is_refused(chain, tmp_path, part, what):
    run = elsewhere(chain, tmp_path)
    changed = {"run": run, "source": run.source, "source of the source": run.source.source}[part]
    if what == "code":
        changed.finish("0123456789abcdef")
    else:
        table = changed.path("evaluations.csv")
        table.write_text(table.read_text().replace("0.", "1."))
        changed.finish(changed.code)
    if (what, part) == ("results", "run"):  # nothing starts from it
        return execute(run, report=lambda line: None)
    with pytest.raises(ValueError) as error:
        execute(run, report=lambda line: None)
    assert "\n" not in str(error.value) and changed.name in str(error.value)
    if what == "code":
        words = ("0123456789abcdef", changed.code, "make vouch", "delete its folder")
        assert all(word in str(error.value) for word in words)


def test_code_that_is_vouched_for_is_the_present_one(chain, tmp_path, monkeypatch):
    run, stamps = elsewhere(chain, tmp_path), tmp_path / "vouched.json"
    run.finish("older")
    now = run.code
    files.write_json(stamps, [{"stage": "retrain", "from": ["oldest", "older"], "to": now}])
    monkeypatch.setattr(Experiment, "vouched_file", stamps)
    execute(run, report=lambda line: None)


def test_runs_of_several_codes_are_not_shown_together_and_other_code_is_said(chain, capsys):
    base = chain.experiment
    dense, pruned = base.dense(0), base.prune("taylor", 0)
    base.check_codes([(dense, dense.code), (pruned, pruned.code)])
    assert capsys.readouterr().err == ""
    base.check_codes([(dense, "older"), (base.dense(1), "older")])
    said = capsys.readouterr().err
    assert "dense runs are of other code, older, not the present" in said and said.count("\n") == 1
    with pytest.raises(ValueError, match="dense runs of several codes .*make vouch"):
        base.check_codes([(dense, dense.code), (base.dense(1), "older")])


def test_tasks_name_a_run_and_do_not_draw_a_search(tmp_path, monkeypatch):
    before, single = experiment(tmp_path), experiment(tmp_path).dense(0, "depth")
    assert single.params["tasks"] == {"depth": 1}
    more = dict(before.tasks) | {"edges": replace(before.tasks["depth"], name="edges")}
    after = experiment(tmp_path)
    monkeypatch.setitem(after.__dict__, "tasks", more)
    for run, other in zip(before.paper_runs(), after.paper_runs()):
        assert run.name != other.name and run.stream == other.stream
    assert after.dense(0, "depth").name == single.name, "of a network of one task, that one counts"


@pytest.mark.parametrize("file", ["params.json", "provenance.json", "trivial.csv"])
def test_a_folder_that_is_deleted_in_mid_run_is_not_finished(tmp_path, monkeypatch, file):
    run, write = experiment(tmp_path).dense(0), Run.write_json

    def deleting(self, name, value):
        write(self, name, value)
        if name == "timing.json":
            run.path(file).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_json", deleting)
        with pytest.raises(FileNotFoundError, match=f"{file} was deleted while it ran"):
            execute(run, report=lambda line: None)
    assert not run.done
    execute(run, report=lambda line: None)
    assert run.done and run.path(file).exists()


def test_who_starts_from_a_run_waits_for_it_and_says_so(tmp_path):
    run, said = experiment(tmp_path).prune("taylor", 0), []
    with files.locked(run.source.lock_file, "the dense network"):
        with pytest.raises(ValueError, match="is already being run there"):
            execute(run.source, report=said.append)
        thread = threading.Thread(target=execute, args=(run, said.append))
        thread.start()
        while not said:
            assert thread.is_alive()
            time.sleep(0.01)
        assert not run.source.done
    thread.join()
    assert run.done and said[0].startswith("waiting for process ")


def test_a_lock_whose_file_was_deleted_is_taken_anew(tmp_path):
    path, inside = tmp_path / "place" / "lock", []

    def hold():
        with files.locked(path, "it", wait=True, report=inside.append):
            inside.append(path.exists())

    with files.locked(path, "it"):
        thread = threading.Thread(target=hold)
        thread.start()
        while not inside:
            time.sleep(0.01)
        shutil.rmtree(path.parent)
    thread.join()
    assert inside[1:] == [True], "it holds the file that others find"


def test_two_runs_from_empty_folders_give_equal_tables(tmp_path):
    tables = []
    for name in ("one", "two"):
        run = experiment(tmp_path / name).prune("taylor", 0)
        execute(run, report=lambda line: None)
        tables.append(
            [
                run.path(file).read_bytes()
                for file in ("evaluations.csv", "layers.csv", "model.safetensors")
            ]
        )
    assert tables[0] == tables[1]


def test_a_figure_of_a_larger_profile_says_which_command_makes_its_runs(tmp_path):
    grid = Experiment.open("quick", "rooms", "", str(tmp_path)).runs()
    with pytest.raises(
        FileNotFoundError,
        match=r"(\d+) of \1 runs of quick are missing: run `make figures PROFILE=quick`",
    ):
        execute_missing(grid)
