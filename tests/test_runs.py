"""Profiles, run folders and their names, whole files, and what a finished run records."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from mtprune_utils import files, runs, stages
from mtprune_utils.data.rooms import FOLDER
from mtprune_utils.files import csv_text, read_table, source_digest, write_atomically
from mtprune_utils.profiles import PROFILES, get_profile
from mtprune_utils.runs import Experiment, code_digest

TINY = {
    "train_images": 24, "test_images": 8, "crop": 32, "image_height": 32, "dense.steps": 3, "dense.evaluations": 1,
    "retrain.steps": 3, "retrain.evaluations": 1, "prune.every": 1, "prune.filters": 110, "tuning.trials": 0,
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
    assert base.retrain("taylor", 0, 0).name != slower.retrain("taylor", 0, 0).name, "upstream counts"
    more_seeds = experiment(tmp_path, seeds=9)
    assert base.prune("taylor", 0).name == more_seeds.prune("taylor", 0).name


def test_both_criteria_of_a_seed_see_the_same_random_numbers(tmp_path):
    base = experiment(tmp_path)
    assert stages._seed(base.prune("taylor", 0)) == stages._seed(base.prune("cosprune", 0)) != stages._seed(base.prune("taylor", 1))


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
    """Or paths inside it would not be told from others, and those of this machine would get into notebooks."""
    (tmp_path / "link").symlink_to(files.PROJECT)
    spec = importlib.util.spec_from_file_location("linked", tmp_path / "link" / "mtprune_utils" / "files.py")
    linked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked)
    assert linked.PROJECT == files.PROJECT.resolve()


def test_a_digest_of_code_is_the_same_in_every_version_of_python(tmp_path):
    """Of what they parse differently; the value is Python 3.11's `ast.dump`, by which the committed runs go."""
    module = tmp_path / "module.py"
    module.write_text('''class A:
    x: int = 1

    def f(self, *names, key=None, **more):
        match key:
            case None:
                return f"{names!r:>{self.x}} {{}}"
        return [lambda: None, {**more}, ...]
''')
    assert source_digest([module]) == "b91bdc026ab14e0a"


def test_code_digest_ignores_comments_but_not_code(tmp_path, monkeypatch):
    for name in {name for names in runs.STAGE_MODULES.values() for name in names} | {"data/rooms.py"}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((runs.PACKAGE / name).read_text())
    monkeypatch.setattr(runs, "PACKAGE", tmp_path)
    before = {stage: code_digest(stage) for stage in runs.STAGE_MODULES}
    plots, criteria = tmp_path / "plots.py", tmp_path / "criteria.py"
    plots.write_text(plots.read_text() + "# a comment\n")
    assert {stage: code_digest(stage) for stage in runs.STAGE_MODULES} == before
    plots.write_text(plots.read_text() + "SIZE = 1\n")
    criteria.write_text(criteria.read_text() + "SIZE = 1\n")
    changed = {stage for stage in runs.STAGE_MODULES if code_digest(stage) != before[stage]}
    assert changed == {"figure", "prune", "tune"}


def test_provenance_tells_whether_the_code_was_committed(tmp_path, monkeypatch):
    package = tmp_path / "mtprune_utils"
    package.mkdir()
    module = package / "module.py"
    module.write_text("A = 1\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(runs, "PACKAGE", package)
    monkeypatch.setattr(runs, "code_digest", lambda stage, data: "")
    clean = runs.provenance("dense")
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    module.write_text("A = 2\n")
    assert runs.provenance("dense")["dirty"] is True


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.csv"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_tables_round_trip(tmp_path):
    rows = [{"a": 1, "b": 0.1}, {"a": 2, "b": 1e-30}]
    write_atomically(tmp_path / "t.csv", csv_text(rows).encode())
    assert [{"a": int(row["a"]), "b": float(row["b"])} for row in read_table(tmp_path / "t.csv")] == rows


def test_a_chain_of_runs_makes_what_it_needs_and_is_not_repeated(tmp_path):
    run = experiment(tmp_path).retrain("cosprune", 0, 0)
    stages.execute(run, report=lambda line: None)
    chain = [run, *run.inputs, *run.inputs[0].inputs]
    assert [part.stage for part in chain] == ["retrain", "prune", "dense"] and all(part.done for part in chain)
    origin = json.loads(run.path("provenance.json").read_text())
    assert origin["params"]["seed"] == 0 and origin["code"] == code_digest("retrain") and len(origin["data_digest"]) == 16
    (row,) = read_table(run.path("evaluations.csv"))
    assert abs(int(row["parameters"]) / int(read_table(chain[2].path("evaluations.csv"))[0]["parameters"]) - 0.4) < 0.03
    said = []
    stages.execute(run, report=said.append)
    assert said == [f"retrain {run.name}: finished before, nothing to do"]
    run.finish("older")
    stages.execute(run, report=said.append)
    assert "with other code" in said[-1]
    paths = "".join(file.read_text() for part in chain for file in part.folder.glob("*.json"))
    assert str(Path.home()) not in paths and str(tmp_path) not in paths


def test_two_runs_from_empty_folders_give_equal_tables(tmp_path):
    tables = []
    for name in ("one", "two"):
        run = experiment(tmp_path / name).prune("taylor", 0)
        stages.execute(run, report=lambda line: None)
        tables.append([run.path(file).read_bytes() for file in ("evaluations.csv", "layers.csv", "model.safetensors")])
    assert tables[0] == tables[1]


def test_a_figure_of_a_larger_profile_says_which_command_makes_its_runs(tmp_path):
    grid = Experiment.open("quick", "rooms", "", str(tmp_path)).runs()
    with pytest.raises(FileNotFoundError, match=r"(\d+) of \1 runs of quick are missing: run `make figures PROFILE=quick`"):
        stages.execute_missing(grid)
