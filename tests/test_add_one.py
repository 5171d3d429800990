"""Adding one entry is adding one file: the batch makes what names it, and nothing else is stale.

Copies of the repository with a batch in miniature; whatever is added or edited, is so in a copy.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import test_runs
from conftest import LAUNCH
from mtprune_utils import registry
from mtprune_utils.files import PROJECT, read_json, read_table, write_json
from mtprune_utils.run.launch import is_current, reopen_outdated
from mtprune_utils.study import grid, store
from mtprune_utils.study.grid import Experiment

NOTEBOOKS = (  # of the stages, and Figure 1's; the claims' where everything is new
    "01_train_dense",
    "02_prune_iteratively",
    "03_retrain_from_scratch",
    "04_plot_fig1_iterative_pruning",
)
CLAIMS = "08_judge_claims"
TINY = test_runs.TINY | {
    "agreement_batches": 0,
    "seeds": 1,
    "controls.seeds": 0,
    "criteria": ["taylor"],
}

# --- one file each: what a reader writes ---

CRITERION = '''
"""Mean squared weight of a filter."""

import torch
from torch import Tensor

from mtprune_utils.core.scoring import WEIGHTS, Signals

NEEDS = WEIGHTS


def score(signals: Signals, generator: torch.Generator) -> Tensor:
    return torch.cat(signals.weights(), 1).square().mean(1)
'''

TASK = '''
"""Edges: on or off, by a cross-entropy in which edges weigh ten times as much."""

import torch
import torch.nn.functional as F

from mtprune_utils.core.targets import IGNORE, Labels
from mtprune_utils.core.task import Meter, Task, masked_mean


def edges(name: str = "edges") -> Task:
    return Task(
        name, 2, Labels(), weighted, Accuracy, prior=frequencies, endpoint="accuracy",
        shown="accuracy", higher_is_better=frozenset({"accuracy"}), classes=("plain", "edge"),
    )


def weighted(output, target):
    weight, target = output.new_tensor([1.0, 10.0]), target.long()
    losses = F.cross_entropy(output, target, weight, ignore_index=IGNORE, reduction="none")
    return masked_mean(losses, target != IGNORE)


def frequencies(target):
    edge = (target == 1).float().mean(0)
    return torch.stack([1 - edge, edge])[None]


class Accuracy(Meter):
    def __init__(self):
        self.sums = 0

    def update(self, output, target):
        right, valid = output.max(1).indices == target, target != IGNORE
        self.sums = self.sums + torch.stack([right.sum(), valid.sum()])

    def compute(self):
        return {"accuracy": self.sums[0] / self.sums[1]}
'''

DATA_SET = '''
"""Discs: bright, near ones on a dark ground far away."""

import torch

from mtprune_utils.core.data import Source, Split
from mtprune_utils.core.task import Task
from mtprune_utils.tasks.depth import depth
from mtprune_utils.tasks.edges import edges


def tasks(root: str = "") -> list[Task]:
    return [depth(), edges()]


def digest(root: str = "") -> str:
    return "discs, version 1"  # made here: there is no file to hash


def load(root: str = "") -> Source:
    return Source(made(24, seed=0), made(8, seed=1))


def made(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    across = torch.arange(32.0)
    row, column, radius = (torch.rand(3, count, 1, 1, generator=generator) * 8 + 8).unbind()
    distance = ((across[:, None] - row).square() + (across - column).square()).sqrt() - radius
    inside = distance < 0
    image = torch.randint(0, 50, (count, 3, 32, 32), generator=generator) + 200 * inside[:, None]
    near = torch.where(inside, 1.0, 4.0)[:, None]
    return Split(image.byte(), {"depth": near, "edges": (distance.abs() < 1).byte()})
'''

BACKBONE = '''
"""Three convolutions with batch norm, each with a max-pool behind it."""

from torch import nn

WIDTHS = (16, 24, 32)


def build(stride: int = 8) -> nn.Module:
    if stride != 8:
        raise ValueError(f"stride must be one of (8,), got {stride}")
    layers, channels = [], 3
    for width in WIDTHS:
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers)
'''

SCHEDULE = '''
"""Half of what can go each time."""


def plan(total: int, spare: int, filters_per_step: int) -> list[int]:
    least, counts = total - spare, []
    while spare:
        spare //= 2
        counts.append(least + spare)
    return counts
'''

WEIGHTING = '''
"""Twice each loss."""

from torch import nn


class Doubled(nn.Module):
    def forward(self, losses):
        return {task: 2 * loss for task, loss in losses.items()}


def build(tasks: list[str], epoch: int) -> nn.Module:
    return Doubled()
'''

ENTRIES = {  # file in the package: what it says; the registries know an entry by its file's name
    "criteria/energy.py": CRITERION,
    "tasks/edges.py": TASK,
    "datasets/discs.py": DATA_SET,
    "backbones/three_layers.py": BACKBONE,
    "schedules/halves.py": SCHEDULE,
    "weightings/doubled.py": WEIGHTING,
}
FIGURE = "widths_at_the_floor"
FIGURE_CELL = f'''
import matplotlib.pyplot as plt
import pandas as pd

runs = [run for run in experiment.needed("pruned") if run.stage == "prune"]
execute_missing(runs)
table = gather(runs, "layers.csv")
drawn, axis = plt.subplots()
axis.plot(table["layer"], table["width"], ".")
origins = origins_of(experiment.needed("pruned"))
save_figure(drawn, "{FIGURE}", table, experiment, origins, PROJECT / figures)'''


def add(repository: Path, *files: str) -> None:
    for file in files:
        (repository / "mtprune_utils" / file).write_text(ENTRIES[file].lstrip())


def add_figure(repository: Path) -> Path:
    """A notebook with Figure 1's parameters and imports, and one cell of its own."""
    notebook = nbformat.read(repository / "notebooks" / f"{NOTEBOOKS[-1]}.ipynb", as_version=4)
    begun = [cell for cell in notebook.cells if cell.cell_type == "code"][:2]
    notebook.cells = [*begun, nbformat.v4.new_code_cell(FIGURE_CELL.strip())]
    notebook.metadata["mtprune"] = {"figures": [FIGURE], "needs": "pruned"}
    path = repository / "notebooks" / "11_plot_widths.ipynb"
    nbformat.write(notebook, path)
    return path


# --- the batch in a copy ---


def copied(repository: Path, notebooks=NOTEBOOKS) -> Path:
    """The package, those notebooks and the Snakefile; the rooms' images are linked to."""
    unread = shutil.ignore_patterns("rooms_v1", "__pycache__")
    shutil.copytree(PROJECT / "mtprune_utils", repository / "mtprune_utils", ignore=unread)
    rooms = Path("mtprune_utils", "datasets", "rooms_v1")
    (repository / rooms).symlink_to(PROJECT / rooms)
    (repository / "notebooks").mkdir()
    for name in notebooks:
        shutil.copy(PROJECT / "notebooks" / f"{name}.ipynb", repository / "notebooks")
    return Path(shutil.copy(PROJECT / "Snakefile", repository)).parent


def batch(repository: Path, *more: str, **overrides) -> list[str]:
    """Run it; which jobs were done, sorted."""
    command = [*LAUNCH, "figures", "--profile", "smoke"]
    numbers = ["--overrides", json.dumps(TINY | overrides), "--jobs", "2", *more]
    environment = os.environ | {"PYTHONPATH": str(repository)}  # of kernels, too
    result = subprocess.run(
        [*command, *numbers],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return sorted(re.findall(r"\] (.*)  done in", result.stdout))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A batch of one criterion that has ended."""
    repository = copied(tmp_path_factory.mktemp("base") / "repository")
    assert batch(repository) == [
        "dense seed 0 multitask",
        "figure fig1_iterative_pruning",
        "prune taylor seed 0 iterative",
        "retrain taylor seed 0 level 0 scratch",
    ]
    return repository


@pytest.fixture(scope="module")
def grown(base, tmp_path_factory):
    """The same with one more criterion and one more figure; and what its batch did."""
    repository = Path(
        shutil.copytree(base, tmp_path_factory.mktemp("grown") / "repository", symlinks=True)
    )
    add(repository, "criteria/energy.py")
    add_figure(repository)
    return repository, batch(repository, criteria=["taylor", "energy"])


@pytest.fixture
def copy(grown, tmp_path):
    """One of the grown repository, to be edited."""
    return Path(shutil.copytree(grown[0], tmp_path / "repository", symlinks=True))


@pytest.fixture
def opened(monkeypatch):
    """The experiment of a copy, as a process that starts now would see its code."""

    def of(repository: Path, **overrides) -> Experiment:
        monkeypatch.setattr(registry, "PACKAGE", repository / "mtprune_utils")
        monkeypatch.setattr(store, "PROJECT", repository)
        for known in (grid._code, store.figure_code):
            known.cache_clear()
        numbers = TINY | {"criteria": ["taylor", "energy"]} | overrides
        return Experiment.open("smoke", "rooms", "", str(repository / "runs"), numbers)

    yield of
    monkeypatch.undo()
    for known in (grid._code, store.figure_code):
        known.cache_clear()


def figures_of(experiment: Experiment) -> dict[str, Path]:
    """{figure: its provenance file}."""
    folder = experiment.root.parent / "figures" / experiment.label
    return {name: folder / f"{name}.json" for name in store.figure_notebooks()}


def stale(experiment: Experiment) -> set[str]:
    """What is to be made again, in words: "dense", "prune taylor", "fig1_iterative_pruning"."""
    runs = {" ".join(filter(None, (r.stage, r.criterion))): r for r in experiment.runs()}
    assert all(run.done for run in runs.values())
    figures = figures_of(experiment)
    return {
        *(name for name, run in runs.items() if run.outdated()),
        *(n for n, path in figures.items() if not (path.exists() and is_current(path, experiment))),
    }


def edit(repository: Path, file: str) -> None:
    path = repository / "mtprune_utils" / file
    path.write_text(f"{path.read_text()}\n\nADDED = 1\n")


# --- adding ---


def test_a_new_criterion_and_a_new_figure_are_made_and_nothing_else_is_trained(base, grown, opened):
    repository, done = grown
    assert done == [
        "figure fig1_iterative_pruning",
        f"figure {FIGURE}",
        "prune energy seed 0 iterative",
        "retrain energy seed 0 level 0 scratch",
    ]
    place = repository / "figures" / "smoke-custom"
    shown = pd.read_csv(place / "fig1_iterative_pruning.csv")["criterion"]
    assert set(shown) == {"taylor", "energy"}
    assert {path.suffix for path in place.glob(f"{FIGURE}.*")} == {".png", ".pdf", ".csv", ".json"}
    experiment = opened(repository)
    assert stale(experiment) == set()
    pruned = experiment.prune("energy", 0)
    assert read_json(pruned.path("provenance.json"))["params"]["criterion"] == "energy"
    tables = [read_table(run.path("layers.csv")) for run in (experiment.prune("taylor", 0), pruned)]
    theirs, own = ([row["removed_next"] for row in table] for table in tables)
    assert theirs != own


@pytest.mark.parametrize("file", ENTRIES)
def test_an_added_file_makes_nothing_stale_and_is_there_by_its_name(copy, opened, file):
    add(copy, file)
    experiment = opened(copy)
    assert Path(file).stem in registry.names(Path(file).parts[0])
    assert stale(experiment) == set()


def test_an_added_figure_makes_nothing_stale_but_itself(copy, opened):
    path = add_figure(copy)
    notebook = read_json(path)
    notebook["metadata"]["mtprune"] = {"figures": ["another"], "needs": "paper"}
    write_json(path.with_name("12_plot_another.ipynb"), notebook)
    assert stale(opened(copy)) == {"another"}, "which is not drawn yet"


def test_a_new_schedule_is_one_more_arm_once_it_is_named_and_leaves_the_others(copy, opened):
    before = {run.name for run in opened(copy, **{"controls.seeds": 1}).runs()}
    add(copy, "schedules/halves.py")
    assert {run.name for run in opened(copy, **{"controls.seeds": 1}).runs()} == before
    named = {"controls.seeds": 1, "controls.schedules": ["fixed", "geometric", "halves"]}
    added = [run for run in opened(copy, **named).runs() if run.name not in before]
    assert {(run.stage, run.arm) for run in added} == {("prune", "halves")}


def test_everything_new_at_once_is_pruned_retrained_drawn_and_judged(tmp_path):
    """A data set with a task of its own, a backbone and so on, each one file."""
    repository = copied(tmp_path / "repository", (*NOTEBOOKS, CLAIMS))
    add(repository, *ENTRIES)
    numbers = {
        "backbone": "three_layers",
        "width": 1.0,
        "prune.pruning_schedule": "halves",
        "criteria": ["energy"],
        "sizes": [0.8],
        "weighting": "doubled",
    }
    done = batch(repository, "--data", "discs", **numbers)
    assert done == [
        "dense seed 0 multitask",
        "figure fig1_iterative_pruning",
        "figure fig5_claims",
        "prune energy seed 0 iterative",
        "retrain energy seed 0 level 0 scratch",
    ]
    place = repository / "figures" / "smoke-discs-custom"
    metrics = {"depth.relative_error", "edges.accuracy"}
    assert set(pd.read_csv(place / "fig1_iterative_pruning.csv")["metric"]) == metrics
    assert len(pd.read_csv(place / "table1_claims.csv")) > 1
    (pruned,) = repository.glob("runs/smoke/prune/*/")
    params = read_json(pruned / "params.json")
    assert params["weighting"] == "doubled"
    assert (params["tasks"], params["data"]) == ({"depth": 1, "edges": 2}, "discs, version 1")
    rows = pd.read_csv(pruned / "evaluations.csv")
    left = rows[rows["phase"] == "removed"]["filters"].tolist()
    assert {72 - 57 + spare for spare in (28, 14, 7, 3, 1, 0)} <= {*left} and left[-1] == 15
    assert len(rows["widths"].iloc[0].split()) == 3


# --- editing ---

PRUNED = {"prune taylor", "prune energy", "retrain taylor", "retrain energy"}  # and what follows
ALL = {"dense", *PRUNED}
FIGURES = {"fig1_iterative_pruning", FIGURE}
EDITS = {
    "criteria/energy.py": {"prune energy", "retrain energy"},
    "criteria/taylor.py": {"prune taylor", "retrain taylor"},
    "criteria/cosprune.py": PRUNED,  # every pruning run observes its cosines
    "criteria/random.py": set(),
    "backbones/vgg16_bn.py": ALL,
    "backbones/_vgg.py": ALL,
    "backbones/resnet18.py": set(),
    "datasets/rooms.py": ALL,
    "datasets/_reading.py": ALL,
    "datasets/multifashion.py": set(),
    "tasks/depth.py": ALL,
    "tasks/classification.py": set(),
    "schedules/fixed.py": PRUNED,
    "schedules/geometric.py": set(),
    "weightings/equal.py": ALL,
    "weightings/dwa.py": set(),
    "rankings/global.py": PRUNED,
    "rankings/lamp.py": set(),
    "criteria/_shared.py": PRUNED,
    # The grid, which figures read, knows the stages.
    "stages/retrain.py": {"retrain taylor", "retrain energy"} | FIGURES,
    "stages/prune.py": PRUNED | FIGURES,
    "stages/dense.py": ALL | FIGURES,
    "stages/tune.py": FIGURES,
    "study/figures.py": FIGURES,
    "study/claims.py": FIGURES,
    "study/statistics.py": FIGURES,
    "study/profiles.py": FIGURES,
    "study/execute.py": set(),
    "run/launch.py": set(),
    "registry.py": set(),
    "files.py": set(),
}


@pytest.mark.parametrize("file", EDITS)
def test_an_edited_file_makes_stale_what_names_it(copy, opened, file):
    edit(copy, file)
    assert stale(opened(copy)) == EDITS[file]


CORE = sorted(path.stem for path in (PROJECT / "mtprune_utils" / "core").glob("*.py"))
OF_PRUNING = ("iterative", "selection")
OF_NO_RUN = ("pruner", "pretrained", "interop")  # for a reader's own loop


@pytest.mark.parametrize("name", CORE)
def test_an_edited_core_makes_all_stale(copy, opened, name):
    edit(copy, f"core/{name}.py")
    expected = set() if name in OF_NO_RUN else PRUNED if name in OF_PRUNING else ALL
    assert stale(opened(copy)) - FIGURES == expected


def test_an_edited_plot_cell_redraws_its_figure_and_trains_nothing(copy, opened):
    path = copy / "notebooks" / "11_plot_widths.ipynb"
    text = path.read_text()
    assert '\\".\\"' in text
    path.write_text(text.replace('\\".\\"', '\\"x\\"'))
    assert stale(opened(copy)) == {FIGURE}
    assert batch(copy, criteria=["taylor", "energy"]) == [f"figure {FIGURE}"]
    assert stale(opened(copy)) == set()


def test_an_edited_cell_of_a_stages_notebook_trains_nothing(copy, opened):
    path = copy / "notebooks" / "02_prune_iteratively.ipynb"
    text = path.read_text()
    assert "show_recovery(evaluations" in text
    path.write_text(text.replace("show_recovery(evaluations", "show_recovery(evaluations.tail(9)"))
    assert stale(opened(copy)) == set()


def test_a_figure_that_lacks_a_run_that_is_here_is_drawn_again(copy, opened):
    """As after a batch that was stopped between the last run and the figure."""
    experiment = opened(copy)
    figures = figures_of(experiment)
    origin = read_json(figures[FIGURE])
    (lacking,) = [label for label in origin["runs"] if "energy" in label]
    del origin["runs"][lacking]
    write_json(figures[FIGURE], origin)
    assert stale(experiment) == {FIGURE}
    reopen_outdated(experiment, figures[FIGURE].parent)
    assert [name for name, path in figures.items() if path.exists()] == ["fig1_iterative_pruning"]
    assert all(run.done for run in experiment.runs())
