"""A reader's own entries, from a file that lies elsewhere: found, hashed, refused in one line."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mtprune_utils import registry
from mtprune_utils.core.data import Source, Split
from mtprune_utils.datasets import data_digest, load_dataset
from mtprune_utils.files import PROJECT, read_json
from mtprune_utils.run.launch import main
from mtprune_utils.study import grid, palette
from mtprune_utils.study.execute import check_dataset, execute
from mtprune_utils.study.grid import Experiment
from test_add_one import (
    BACKBONE,
    CRITERION,
    DATA_SET,
    ENTRIES,
    TASK,
    TINY,
    WEIGHTING,
    batch,
    copied,
)

TEMPLATE = PROJECT / "docs" / "templates" / "my_dataset.py"


def forget():
    """As in a new process, in which no plugin is loaded."""
    for name in registry.PLUGGED:
        sys.modules.pop(f"mtprune_utils.{name}", None)
    registry.PLUGGED.clear()
    grid._code.cache_clear()


@pytest.fixture(autouse=True)
def fresh():
    yield
    forget()


def opened(plugin: Path, tmp_path: Path, data="rooms", root="", **overrides) -> Experiment:
    forget()
    numbers = TINY | overrides | {"plugin": str(plugin)}
    return Experiment.open("smoke", data, root, str(tmp_path / "runs"), numbers)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.lstrip())
    return path


# --- what a plugin is ---


def test_a_files_kind_is_told_by_what_it_defines(tmp_path):
    assert len(ENTRIES) == 6
    for place, text in ENTRIES.items():
        kind, name = place.removesuffix(".py").split("/")
        assert registry._kind(written(tmp_path / f"{name}.py", text)) == kind
    for kind in registry.CONTRACTS:  # and those of the package are what they are
        for file in (registry.PACKAGE / kind).glob("[a-z]*.py"):
            assert registry._kind(file) == kind


def test_a_files_entry_has_its_name_behind_those_of_the_package(tmp_path):
    before = registry.names("criteria")
    colours = [palette.style_of(name) for name in before]
    file = written(tmp_path / "a_first.py", CRITERION)
    experiment = opened(file, tmp_path, criteria=["taylor", "a_first"])
    assert registry.names("criteria") == (*before, "a_first")
    assert [palette.style_of(name) for name in before] == colours, "other figures look as they did"
    assert "a_first" in experiment.prune("a_first", 0).name
    assert f"PLUGIN={file}" in experiment.command
    registry.load_plugin(str(file))  # once more: by every notebook that opens the experiment


def test_a_folder_laid_out_as_the_package_holds_several_that_know_each_other(tmp_path):
    written(tmp_path / "mine" / "tasks" / "edges.py", TASK)
    shared = "from mtprune_utils.criteria._energies import mean_square as score\n"
    criterion = f'"""Energy."""\nfrom mtprune_utils.core.scoring import WEIGHTS as NEEDS\n{shared}'
    written(tmp_path / "mine" / "criteria" / "energy.py", criterion)
    helper = written(
        tmp_path / "mine" / "criteria" / "_energies.py",
        CRITERION.replace("def score", "def mean_square"),
    )
    written(tmp_path / "mine" / "datasets" / "discs.py", DATA_SET)
    plugin = tmp_path / "mine"
    experiment = opened(plugin, tmp_path, data="discs", criteria=["energy"])
    assert sorted(experiment.tasks) == ["depth", "edges"]
    assert "_energies" not in registry.names("criteria")
    dense, pruned = experiment.dense(0).code, experiment.prune("energy", 0).code
    helper.write_text(f"{helper.read_text()}\nADDED = 1\n")
    edited = opened(plugin, tmp_path, data="discs", criteria=["energy"])
    assert edited.dense(0).code == dense and edited.prune("energy", 0).code != pruned


# --- what follows from its content ---


def codes(experiment: Experiment) -> dict[str, str]:
    return {f"{run.stage} {run.criterion}": run.code for run in experiment.runs()}


USED_BY = {  # the entry's file, the overrides that name it, the runs that its content counts for
    "energy": (CRITERION, {"criteria": ["taylor", "energy"]}, {"prune energy"}),
    "three_layers": (BACKBONE, {"backbone": "three_layers", "width": 1.0}, "all"),
    "doubled": (WEIGHTING, {"weighting": "doubled"}, "all"),
}


@pytest.mark.parametrize("name", USED_BY)
def test_an_edited_plugin_outdates_the_runs_that_use_it_and_no_others(tmp_path, name):
    text, named, users = USED_BY[name]
    file = written(tmp_path / f"{name}.py", text)
    before = codes(opened(file, tmp_path, **named))
    file.write_text(f"# A comment is no change.\n{file.read_text()}")
    assert codes(opened(file, tmp_path, **named)) == before
    file.write_text(f"{file.read_text()}\nADDED = 1\n")
    after = codes(opened(file, tmp_path, **named))
    changed = {run for run in before if after[run] != before[run]}
    assert changed == ({*before} if users == "all" else users)


def test_where_a_plugin_lies_and_that_it_is_loaded_changes_no_digest(tmp_path):
    here = written(tmp_path / "a" / "energy.py", CRITERION)
    there = Path(shutil.copytree(tmp_path / "a", tmp_path / "z")) / "energy.py"
    named = {"criteria": ["taylor", "energy"]}
    found = [codes(opened(file, tmp_path, **named)) for file in (here, there)]
    assert found[0] == found[1]
    forget()
    without = Experiment.open("smoke", "rooms", "", str(tmp_path / "runs"), TINY)
    assert codes(without).items() <= found[0].items()


# --- bad ones ---

BAD = {  # file: its text, what is said of it
    "no_entry.py": ("VALUE = 1\n", "defines no entry of a registry"),
    "broken.py": ("def score(:\n", "is no Python module"),
    "imports.py": (f"import no_such_module\n{CRITERION}", "fails as it is imported: ModuleNotFoun"),
    "My-Entry.py": (CRITERION, "needs a name of small letters"),
    "taylor.py": (CRITERION, "there is 'taylor' among the criteria already"),
    "score.py": (CRITERION, "put it into a folder criteria/ or tasks/"),
    "mine/backbones/energy.py": (CRITERION, "is no entry of backbones, which defines build"),
    "mine/other/energy.py": (CRITERION, "holds no entry: put files into one of its folders"),
}


@pytest.mark.parametrize("place", BAD)
def test_a_bad_plugin_is_refused_in_one_line(tmp_path, place, capfd):
    text, said = BAD[place]
    file = written(tmp_path / place, text)
    plugin = tmp_path / "mine" if place.startswith("mine") else file
    assert main(["figures", "--profile", "smoke", "--plugin", str(plugin)]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and str(plugin) in lines[0]
    assert not registry.PLUGGED


def test_a_plugin_that_is_missing_or_another_one_of_the_same_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no plugin none.py"):
        opened(Path("none.py"), tmp_path)
    with pytest.raises(ValueError, match="'plugin' takes the path of a file or folder, got 3"):
        Experiment.open("smoke", "rooms", "", "runs", {"plugin": 3})
    opened(written(tmp_path / "a" / "energy.py", CRITERION), tmp_path)
    with pytest.raises(ValueError, match="is loaded already: start anew"):
        registry.load_plugin(str(written(tmp_path / "b" / "energy.py", CRITERION)))


def test_one_that_fails_leaves_those_loaded_before_as_they_were(tmp_path):
    folder = written(tmp_path / "mine" / "criteria" / "energy.py", CRITERION).parents[1]
    registry.load_plugin(str(folder))
    energy = registry.entry("criteria", "energy", "criterion")
    written(folder / "criteria" / "failing.py", f"{CRITERION}\nraise OSError('no disk')\n")
    with pytest.raises(ValueError, match="fails as it is imported: OSError: no disk"):
        registry.load_plugin(str(folder))
    assert [*registry.PLUGGED] == ["criteria.energy"]
    assert registry.entry("criteria", "energy", "criterion") is energy


def test_what_is_defined_twice_counts_once(tmp_path):
    twice = f"{CRITERION}\n\ndef helper():\n    pass\n\n\ndef helper():\n    pass\n"
    registry.load_plugin(str(written(tmp_path / "energy.py", twice)))
    assert "energy" in registry.names("criteria")


# --- data that is not in the common form ---


def broken(split: Split, **targets) -> Split:
    return replace(split, targets=split.targets | targets)


WRONG = {  # what is wrong: the training images, what is said
    "one more class": (
        lambda s: broken(s, segmentation=torch.full((24, 32, 32), 7)),
        "segmentation has class 7, expected 0 to 4, or 255",
    ),
    "a plane too many": (
        lambda s: broken(s, segmentation=s.targets["segmentation"][:, None]),
        "segmentation is uint8 (24, 1, 32, 32), expected whole numbers (24, 32, 32)",
    ),
    "no plane": (
        lambda s: broken(s, depth=s.targets["depth"][:, 0]),
        "depth is float32 (24, 32, 32), expected floats (24, 1, 32, 32)",
    ),
    "millimetres": (
        lambda s: broken(s, depth=s.targets["depth"].int()),
        "depth is int32 (24, 1, 32, 32), expected floats (24, 1, 32, 32)",
    ),
    "another size": (
        lambda s: broken(s, normals=s.targets["normals"][..., :16]),
        "normals is float16 (24, 3, 32, 16), expected floats (24, 3, 32, 32)",
    ),
    "channels last": (
        lambda s: replace(s, image=s.image.movedim(1, -1)),
        "images are uint8 (24, 32, 32, 3), expected uint8 (N, 3, H, W)",
    ),
    "no target": (
        lambda s: replace(s, targets={"depth": s.targets["depth"]}),
        "there are targets depth, expected those of segmentation, depth, normals",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_data_that_is_not_in_the_common_form_is_refused_in_one_line(dataset, what):
    check_dataset(dataset)
    spoil, said = WRONG[what]
    with pytest.raises(ValueError, match=re.escape(f"random, train: {said}")):
        check_dataset(replace(dataset, train=spoil(dataset.train)))


# --- in a batch, whose jobs are other processes ---


def test_a_batch_trains_and_draws_by_a_plugin_that_lies_elsewhere(tmp_path):
    repository = copied(tmp_path / "repository")
    file = written(tmp_path / "elsewhere" / "energy.py", CRITERION)
    done = batch(repository, "--plugin", str(file), criteria=["energy"])
    assert done == [
        "dense seed 0 multitask",
        "figure fig1_iterative_pruning",
        "prune energy seed 0 iterative",
        "retrain energy seed 0 level 0 scratch",
    ]


# --- the template of a data set ---


def picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of images: things, one to three metres away, and nothing measured behind them."""
    monkeypatch.setenv("MTPRUNE_CACHE", str(tmp_path / "cache"))
    chance, folder = np.random.default_rng(0), tmp_path / "files"
    for part, count in (("train", 24), ("test", 8)):
        for i in range(count):
            mask = np.zeros((32, 48), np.uint8)
            mask[8 : 20 + i % 8, 10:30] = 1
            mask[0] = 255
            image = chance.integers(0, 99, (32, 48, 3), np.uint8) + 150 * (mask == 1)[..., None]
            kind = "jpg" if i % 2 else "png"
            picture(folder / part / "image" / f"{i}.{kind}", image.astype(np.uint8))
            picture(folder / part / "segmentation" / f"{i}.png", mask)
            depth = np.where(mask == 1, 1000 + 80 * i, 0).astype(np.uint16)
            picture(folder / part / "depth" / f"{i}.png", depth)
    return folder


def test_the_template_of_a_data_set_reads_a_folder_of_images_and_is_pruned_on(tmp_path, root):
    own = Path(shutil.copy(TEMPLATE, tmp_path / "things.py"))
    experiment = opened(own, tmp_path, "things", str(root))
    source = registry.entry("datasets", "things", "data set").load(str(root))
    assert isinstance(source, Source) and source.train.image.shape == (24, 3, 32, 48)
    targets = {name: (target.dtype, target.shape) for name, target in source.train.targets.items()}
    assert sorted(targets) == ["depth", "segmentation"]
    assert source.train.targets["segmentation"].unique().tolist() == [0, 1, 255]
    by_name = sorted(map(str, range(24)))
    readings = source.train.targets["depth"].amax((1, 2, 3))
    assert readings.allclose(readings.new_tensor([1 + 0.08 * int(i) for i in by_name]))
    pruned = experiment.prune("taylor", 0)
    execute(pruned, report=lambda line: None)
    assert pruned.done and experiment.dense(0).done
    assert read_json(pruned.path("params.json"))["tasks"] == {"segmentation": 2, "depth": 1}


def test_the_templates_cache_follows_its_code_and_its_digest_the_files(tmp_path, root):
    own = Path(shutil.copy(TEMPLATE, tmp_path / "things.py"))
    sizes = {"train_images": 24, "test_images": 8}
    opened(own, tmp_path, "things", str(root))
    first = load_dataset("things", str(root), **sizes)
    own.write_text(own.read_text().replace("UNITS = 1000", "UNITS = 500"))
    opened(own, tmp_path, "things", str(root))
    second = load_dataset("things", str(root), **sizes)
    assert first.digest == second.digest
    assert second.train.targets["depth"].equal(2 * first.train.targets["depth"])
    (root / "test" / "depth" / "0.png").unlink()
    assert data_digest("things", str(root)) != first.digest
    with pytest.raises(FileNotFoundError, match=r"test/depth/0.png is missing: expected its depth"):
        load_dataset("things", str(root), **sizes)


def test_the_template_says_what_is_wrong_with_a_file(tmp_path, root):
    own = Path(shutil.copy(TEMPLATE, tmp_path / "things.py"))
    opened(own, tmp_path, "things", str(root))
    load = registry.entry("datasets", "things", "data set").load
    with pytest.raises(FileNotFoundError, match="there are no images in nowhere/train/image"):
        load("nowhere")
    picture(root / "train" / "depth" / "3.png", np.full((32, 48), 9, np.uint8))
    with pytest.raises(ValueError, match="train/depth/3.png has 8 bits per pixel: expected 16"):
        load(str(root))
    picture(root / "train" / "segmentation" / "0.png", np.full((32, 48), 2, np.uint8))
    with pytest.raises(ValueError, match="segmentation/0.png has label 2: expected 0 to 1"):
        load(str(root))
