"""What README and docs tell a reader to write or to run, is written and run here."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import PurePath
from types import SimpleNamespace

import matplotlib
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from papermill.__main__ import papermill
from safetensors.torch import save_file
from torch import nn

from mtprune_utils.files import PROJECT
from mtprune_utils.registry import names
from mtprune_utils.run import cli
from mtprune_utils.run.launch import parsed
from mtprune_utils.run.notebook import check_run, notebook_parameters
from mtprune_utils.study import store
from mtprune_utils.study.profiles import PROFILES, get_profile

DOCUMENTS = [*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"`(mtprune_utils/[\w/]+\.py)`[^\n`]*:\n\n```python\n(.*?)^```", re.DOTALL | re.M)
CODE = (PROJECT / "docs" / "code.md").read_text()
ELSEWHERE = {"README.md", "code.md", "torch_pruning.md"}  # below, and in test_torch_pruning.py
SHOWN_PATH = "/where/the/two/files/lie"  # in docs/code.md, of a data set


def blocks(text: str, language: str) -> list[str]:
    return [code for of, code in BLOCK.findall(text) if of == language]


def commands(text: str) -> list[list[str]]:
    """The words of every command in a document's shell blocks."""
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layers = nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.ReLU()
        self.trunk = nn.Sequential(*layers)
        self.depth, self.normals = nn.Conv2d(40, 1, 1), nn.Conv2d(40, 3, 1)

    def forward(self, images):
        features = self.trunk(images)
        return {"depth": self.depth(features), "normals": self.normals(features)}


# --- code ---


def test_the_readmes_loop_prunes_and_saves_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks((PROJECT / "README.md").read_text(), "python")
    torch.manual_seed(0)
    model = Net()
    given = {
        "model": model,
        "MyModel": Net,
        "loader": [(torch.rand(2, 3, 8, 8), 0)] * 302,
        "optimizer": torch.optim.Adam(model.parameters()),
        "compute_losses": lambda outputs, _: {n: out.square().mean() for n, out in outputs.items()},
    }
    exec(compile(block, "README.md", "exec"), given)
    left = sum(given["model"].trunk[layer].out_channels for layer in (0, 2))
    assert left == 80 - 3 * 16
    assert (tmp_path / "pruned" / "config.json").exists()


def test_any_other_pages_code_runs_in_its_order():
    for page in DOCUMENTS:
        text, namespace = page.read_text(), {}
        if page.name not in ELSEWHERE:
            assert not FILE.search(text), f"{page.name} shows a file of the package: test it here"
            for block in blocks(text, "python"):
                exec(compile(block, page.name, "exec"), namespace)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with every file that docs/code.md shows, and a data set's files."""
    copy = tmp_path_factory.mktemp("extended")
    unread = shutil.ignore_patterns("rooms_v1", "__pycache__")
    shutil.copytree(PROJECT / "mtprune_utils", copy / "mtprune_utils", ignore=unread)
    rooms = "mtprune_utils/datasets/rooms_v1"
    (copy / rooms).symlink_to(PROJECT / rooms)
    for path, code in FILE.findall(CODE):
        assert not (copy / path).exists(), f"{path} is there already"
        (copy / path).write_text(code)
    for part, images in (("train", 12), ("test", 4)):
        split = {
            "image": torch.randint(256, (images, 3, 64, 64), dtype=torch.uint8),
            "segmentation": torch.randint(2, (images, 64, 64), dtype=torch.uint8),
            "depth": torch.rand(images, 1, 64, 64) + 1,
        }
        save_file(split, copy / f"{part}.safetensors")
    return copy


USED = """
import json, sys, torch
from mtprune_utils import Pruner
from mtprune_utils.backbones import get_backbone
from mtprune_utils.datasets import data_tasks, load_dataset
from mtprune_utils.schedules import get_schedule
from mtprune_utils.study.grid import Experiment
from mtprune_utils.weightings import get_weighting

for given in json.loads(sys.argv[1]):  # the page's `make figures`
    overrides = json.loads(given.get("OVERRIDES", "{}"))
    where = given["PROFILE"], given.get("DATA", "rooms"), given.get("ROOT", "")
    assert Experiment.open(*where, "runs", overrides).runs()
images = torch.rand(2, 3, 32, 32)
assert get_backbone("plain")(8)(images).shape == (2, 512, 4, 4)
assert get_schedule("halving")(100, 80, 10) == [60, 40, 30, 20]
losses = get_weighting("geometric")(["a"], 10)({"a": torch.tensor(torch.e)})
torch.testing.assert_close(losses["a"].item(), 1.0)
model = Net()
pruner = Pruner(model, (images,), model.trunk, "peak")
peaks = torch.cat([model.trunk[layer].weight.flatten(1).abs().amax(1) for layer in (0, 2)])
torch.testing.assert_close(torch.cat(pruner.scores.mean()), peaks.detach())
output = torch.full((1, 1, 2, 2), 2 * torch.e, requires_grad=True)
loss = data_tasks("rooms_log")["depth"].loss(output, torch.full((1, 1, 2, 2), 2.0))
torch.testing.assert_close(loss.item(), 1.0)
mine = load_dataset("mine", sys.argv[2])
assert len(mine.test.image) == 4 and set(mine.tasks) == {"segmentation", "depth"}
"""


def test_the_files_that_the_page_shows_do_what_it_says(extended):
    shown = [words for words in commands(CODE) if words[:2] == ["make", "figures"]]
    given = [dict(word.split("=", 1) for word in words[2:]) for words in shown]
    assert sum("ROOT" in settings for settings in given) == 1
    command = json.dumps(given).replace(SHOWN_PATH, str(extended))
    script = f"from torch import nn\n{inspect.getsource(Net)}{USED}"
    result = subprocess.run(
        [sys.executable, "-c", script, command, str(extended)],
        cwd=extended,
        env=os.environ | {"PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_the_pages_figure_is_drawn_and_saved_with_its_data():
    figure = blocks(CODE, "python")[-1]
    assert "save_figure" in figure and figure not in [code for _, code in FILE.findall(CODE)]
    rows = [("taylor", 0, 3), ("taylor", 0, 2), ("l1", 0, 1), ("l1", 1, 4)]
    saved = []
    stubs = {
        "gather": lambda runs, table: pd.DataFrame(
            rows, columns=["criterion", "layer", "removed_next"]
        ),
        "grid": [SimpleNamespace(stage="prune")],
        "save_figure": lambda *given: saved.append(given),
        "origins_of": lambda runs: {},
        "experiment": None,
        "PROJECT": PROJECT,
        "figures": "figures",
    }
    matplotlib.use("agg")
    exec(compile(figure, "docs/code.md", "exec"), stubs)
    ((drawn, name, plotted, *_),) = saved
    assert name == json.loads("{" + blocks(CODE, "json")[0] + "}")["mtprune"]["figures"][0]
    assert plotted["removed_next"].tolist() == [5, 1, 4] and drawn.axes[0].get_lines()


# --- commands ---


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_what_there_is(page):
    makefile = (PROJECT / "Makefile").read_text()
    own = [path.split("/")[-1][:-3] for path, _ in FILE.findall(CODE)]
    for program, *words in commands(page.read_text()):
        if program == "make":
            target, *given = words
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
            settings = dict(word.split("=", 1) for word in given)
            for name in settings:
                assert re.search(rf"^{name} =", makefile, re.MULTILINE), name
            assert settings.get("PROFILE", "quick") in PROFILES
            plugged = PurePath(settings.get("PLUGIN", "")).stem
            assert settings.get("DATA", "rooms") in (*names("datasets"), *own, plugged)
            assert (PROJECT / "cluster" / settings.get("ON", "slurm")).is_dir()
            if page.name != "code.md":  # whose overrides name entries of its own
                get_profile(
                    settings.get("PROFILE", "quick"), parsed(settings.get("OVERRIDES", "{}"))
                )
        elif program == ".venv/bin/python" and words[0] == "-m":
            assert find_spec(words[1]), words[1]
        elif program.endswith("mtprune") and words != ["--help"]:
            options = cli.parser().parse_args(words)
            if options.command == "notebook":
                values = {name: parsed(text) for name, text in options.parameters}
                check_run(PROJECT / options.notebook, values)


@pytest.mark.parametrize("notebook", store.notebook_paths(), ids=lambda path: path.stem)
def test_papermill_tells_every_parameter_with_its_help(notebook):
    told = CliRunner().invoke(papermill, ["--help-notebook", str(notebook)])
    assert told.exit_code == 0, told.output
    entries = re.split(r"\n  (?=\w+: )", told.output)[1:]
    found = {entry.split(":")[0]: " ".join(entry.split()) for entry in entries}
    assert found.keys() == notebook_parameters(notebook).keys()
    for name, entry in found.items():
        assert re.search(r"\(default .*\) \w", entry), f"{name} has no help: {entry}"
