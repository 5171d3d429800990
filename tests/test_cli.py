"""The command `mtprune`: its words, networks in and out, and what it says to bad input."""

import json
import os
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import onnx
import pytest
import torch

from mtprune_utils import save_pretrained
from mtprune_utils.core.model import load_model
from mtprune_utils.core.pretrained import load_pretrained
from mtprune_utils.files import PROJECT, read_table
from mtprune_utils.run import cli, launch
from mtprune_utils.study import latency, networks, store
from mtprune_utils.study.execute import execute
from test_runs import experiment

COMMANDS = ("figures", "notebook", "claims", "check", "vouch", "plan", "export", "evaluate")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny dense network's finished run."""
    made = experiment(tmp_path_factory.mktemp("runs")).dense(0)
    execute(made, report=lambda line: None)
    return made


def measured(place, *more, capsys):
    """{task.metric: value}, as the command prints them."""
    assert cli.main(["evaluate", str(place), *more]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {f"{task}.{metric}": float(value) for task, metric, value in rows}


# --- its words ---


def test_every_command_has_a_line_of_help_and_imports_no_torch():
    code = "import sys; from mtprune_utils.run import cli\ntry: cli.main(['--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("False\n"), "a job's runner waits for its kernel without it"
    assert all(f"\n    {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_every_command_and_its_options(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert "overrides" in script and "builder" in script


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_a_command_and_its_options(tmp_path, capsys):
    cli.main(["completion", "bash"])
    (tmp_path / "mtprune").write_text(capsys.readouterr().out)

    def offered(*words):
        at = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        line = f"source {tmp_path}/mtprune; {at}; _shtab_mtprune; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout.split()

    assert offered("mtprune", "ev") == ["evaluate"]
    assert "--overrides" in offered("mtprune", "evaluate", "--o")


def test_the_console_command_is_this_one():
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"mtprune": f"{cli.__name__}:main"}


# --- networks ---


def test_a_runs_network_is_measured_as_the_run_was(run, capsys, tmp_path):
    row = read_table(run.path("evaluations.csv"))[-1]
    found = measured(run.folder, "--csv", str(tmp_path / "metrics.csv"), capsys=capsys)
    assert found.keys() == {name for name in row if "." in name}
    assert all(value == pytest.approx(float(row[name]), abs=1e-4) for name, value in found.items())
    table = read_table(tmp_path / "metrics.csv")
    exact = {f"{line['task']}.{line['metric']}": float(line["value"]) for line in table}
    assert exact == {name: float(row[name]) for name in exact}, "to the last digit"


def test_other_numbers_and_images_are_asked_for(run, capsys):
    usual = measured(run.folder, capsys=capsys)
    assert measured(run.folder, "--split", "validation", capsys=capsys) != usual
    assert measured(run.folder, "--overrides", '{"crop": 48}', capsys=capsys) != usual
    assert measured(run.folder / "model.safetensors", capsys=capsys) == usual


def test_an_exported_folder_is_measured_alike_and_loads_without_mtprune_run(run, tmp_path, capsys):
    target = tmp_path / "exported"
    assert cli.main(["export", str(run.folder), str(target)]) == 0
    assert capsys.readouterr().out == f"Written: {target}\n"
    assert measured(target, capsys=capsys) == measured(run.folder, capsys=capsys)
    model = load_pretrained(target, networks.builder_of(target))
    assert model.interface == load_model(run.path("model.safetensors")).interface
    images = torch.randint(0, 256, (1, 3, 48, 40), dtype=torch.uint8)
    assert model.predict(images)["depth"].shape[-2:] == (48, 40)
    assert cli.main(["export", str(target), str(tmp_path / "again")]) == 0, "from a folder, too"


def test_an_onnx_file_gives_what_the_network_gives_and_says_how_to_use_it(run, tmp_path):
    target = tmp_path / "network.onnx"
    assert cli.main(["export", str(run.folder), str(target)]) == 0
    model = load_model(run.path("model.safetensors"))
    images = torch.rand(5, 3, 32, 32)
    outputs = latency.onnx_session(target.read_bytes()).run(None, {"images": images.numpy()})
    with torch.no_grad():
        for output, expected in zip(outputs, model(images).values()):
            np.testing.assert_allclose(output, expected, atol=1e-4)
    told = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert json.loads(told["interface"])["scales"] == model.interface.scales
    assert json.loads(told["interface"])["side"] == 32


OWN = """
import torch
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Conv2d(3, 8, 3, 8, 1)
        self.head = torch.nn.Conv2d(8, 1, 1)
    def forward(self, images):
        return {"depth": self.head(self.trunk(images))}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a network of somebody else's, of a module in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(OWN)
    scope = {}
    exec(OWN, scope)
    save_pretrained(scope["Own"](), tmp_path / "own")
    yield tmp_path / "own"
    sys.modules.pop("own_network", None)


def test_a_network_of_others_is_exported_and_measured_by_its_builder(own, tmp_path, capsys):
    builder = ["--builder", "own_network:Own"]
    numbers = ["--overrides", '{"crop": 32, "train_images": 16, "test_images": 4}']
    found = measured(own, *builder, *numbers, capsys=capsys)
    assert {name.split(".")[0] for name in found} == {"depth"}, "the task that it has"
    sized = ["--size", "32", "40"]
    assert cli.main(["export", str(own), str(tmp_path / "own.onnx"), *builder, *sized]) == 0
    session = latency.onnx_session((tmp_path / "own.onnx").read_bytes())
    assert [output.name for output in session.get_outputs()] == ["depth"]
    assert session.run(None, {"images": np.zeros((2, 3, 32, 40), "f4")})[0].shape == (2, 1, 4, 5)


# --- bad input: one line, and nothing written ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "nowhere"], "there is no network at nowhere: name a run folder"),
        (["export", "RUN", "a.onnx", "--builder", "a:b"], "leave --builder out"),
        (["export", "RUN", "folder", "--size", "9", "9"], "--size is about an ONNX file"),
        (["evaluate", "RUN", "--data", "rooom"], "did you mean 'rooms'?"),
        (["evaluate", "RUN", "--profile", "smok"], "did you mean 'smoke'?"),
        (["evaluate", "RUN", "--overrides", '{"crop": -1}'], "crop"),
        (["evaluate", "own"], "give --builder module:name"),
        (["evaluate", "own", "--builder", "own_network:Other"], "has no attribute 'Other'"),
        (["evaluate", "own", "--builder", "none"], "No module named 'none'"),
        (["export", "own", "a.onnx", "--builder", "own_network:Own"], "give --size H W"),
        (["evaluate", "README.md"], "is not a network written by mtprune"),
    ],
)
def test_bad_input_is_told_in_one_line(words, said, run, own, tmp_path, capsys):
    (tmp_path / "README.md").write_text("no network")
    before = sorted(os.listdir(tmp_path))
    words = [str(run.folder) if word == "RUN" else word for word in words]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [name for name in sorted(os.listdir(tmp_path)) if name != "__pycache__"] == before


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["figuers"],
        ["evaluate"],
        ["evaluate", "a", "--split", "tset"],
        ["evaluate", "a", "--overrides", "{crop"],
        ["export", "a", "b", "--size", "9"],
        ["completion", "powershell"],
    ],
)
def test_a_misspelt_command_ends_with_status_2(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "usage: mtprune" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"settings": 3}, {"data": None}, {"interface": 1}, {"architecture": {"tasks": 1, "x": 2}}],
)
def test_a_folder_that_export_did_not_write_so_is_refused(change, run, tmp_path, capsys):
    folder = networks.export(networks.open_network(run.folder), tmp_path / "exported")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert cli.main(["evaluate", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "config.json was not written by `mtprune export`" in said and said.count("\n") == 1


def test_outputs_that_are_not_the_data_sets_tasks_are_refused(run):
    network = networks.open_network(run.folder)
    network.model.heads["thickness"] = network.model.heads.pop("depth")
    with pytest.raises(ValueError, match="outputs are .*thickness.* the data set's tasks are"):
        networks.evaluate(network)


@pytest.mark.parametrize("command", ["figures", "claims", "refresh", "check", "plan"])
def test_what_needs_a_clone_says_so(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(store, "notebook_paths", list)
    assert cli.main([command]) == 1
    needs = "needs the repository, with its notebooks: run it in a clone"
    assert capsys.readouterr().err == f"{command} {needs}\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m mtprune_utils.run.cli completion bash | head -c 1"
    result = subprocess.run(["bash", "-c", command], cwd=PROJECT, capture_output=True, text=True)
    assert result.stderr == ""


def test_a_package_that_is_not_installed_is_named(monkeypatch, capsys):
    def perform(options):
        import nothing_of_that_name  # noqa: F401

    assert launch.guarded(perform, None) == 1
    assert "pip install 'mtprune-utils[notebooks]'" in capsys.readouterr().err
