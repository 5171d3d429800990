"""Bad input and bad luck: one clear line, and nothing that is finished is harmed."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
import torch

from conftest import LAUNCH, convs
from mtprune_utils import files
from mtprune_utils.core import trainer
from mtprune_utils.core.checkpoints import Interrupted
from mtprune_utils.core.model import load_model, model_bytes
from mtprune_utils.core.scoring import Criterion
from mtprune_utils.datasets import _reading, load_dataset
from mtprune_utils.files import PROJECT
from mtprune_utils.run import launch
from mtprune_utils.run.notebook import check_injected, check_run
from mtprune_utils.stages import stage_names, tune
from mtprune_utils.study import stale, store
from mtprune_utils.study.execute import execute, execute_missing, restore_weights
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import PROFILES, get_profile
from test_batch import wait_for
from test_runs import experiment

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
DOCS = PROJECT / "docs" / "faults.md"


def quiet(line):
    pass


# --- what is on disk ---


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "gone", "marker", "other json"])
def test_a_damaged_result_is_noticed_and_the_run_repeated(damage, tmp_path):
    run = experiment(tmp_path).prune("taylor", 0)
    execute(run, quiet)
    table = run.path("evaluations.csv")
    whole, marker = table.read_bytes(), run.path("done.json")
    if damage == "flipped bit":
        table.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    elif damage == "truncated":
        table.write_bytes(whole[:-10])
    elif damage == "gone":
        table.unlink()
    elif damage == "marker":
        marker.write_bytes(marker.read_bytes()[:10])
    else:
        files.write_json(marker, {"code": "", "files": {}})
    said = []
    execute(run, said.append)
    name = {"marker": "done.json", "other json": "done.json"}.get(damage, "evaluations.csv")
    assert said[0] == f"prune {run.name}: {name} is damaged, the run is repeated"
    assert run.done and table.read_bytes() == whole


def test_figures_take_no_damaged_table(tmp_path):
    base = experiment(tmp_path)
    runs = base.paper_runs()[:1]
    execute_missing(runs, quiet)
    table = runs[0].path("evaluations.csv")
    whole = table.read_bytes()
    table.write_bytes(whole.replace(b"0", b"1"))
    said = []
    execute_missing(runs, said.append)
    assert "evaluations.csv is damaged" in said[0] and table.read_bytes() == whole


@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_weights_are_made_again_when_something_starts_from_them(damage, tmp_path, capsys):
    run = experiment(tmp_path).dense(0)
    execute(run, quiet)
    weights = run.path("model.safetensors")
    whole, said = weights.read_bytes(), []
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    execute(run, said.append)
    assert said == [f"dense {run.name}: finished before, nothing to do"], "its tables are whole"
    restore_weights(run.experiment.prune("taylor", 0))
    assert weights.read_bytes() == whole
    assert (
        f"{weights.name} is gone or damaged, the run is repeated for it" in capsys.readouterr().out
    )
    restore_weights(run.experiment.prune("taylor", 0))
    assert "repeated" not in capsys.readouterr().out


def test_damaged_weights_beside_those_that_are_made_again_stay_damaged(tmp_path):
    run = experiment(tmp_path).prune("taylor", 0)
    execute(run, quiet)
    names = sorted(path.name for path in run.folder.glob("*.safetensors"))
    for name in names:
        files.write_atomically(run.path(name), b"0" * 100)
    again = run.experiment.retrain("taylor", 0, 0, "finetune")
    restore_weights(again)
    assert len(names) > 1
    assert [name for name in names if run.intact(name)] == [again.record.weights(again)]


def test_a_repetition_that_is_interrupted_goes_on_where_it_was(tmp_path, monkeypatch):
    run = experiment(tmp_path).dense(0)
    execute(run, quiet)
    whole = run.path("model.safetensors").read_bytes()
    run.path("model.safetensors").unlink()
    step, steps = trainer.Trainer.step, []

    def interrupted(trainer, *scores):
        steps.append(trainer.step_count)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        step(trainer, *scores)

    monkeypatch.setattr(trainer.Trainer, "step", interrupted)
    with pytest.raises(Interrupted, match="whose state is kept"):
        restore_weights(run.experiment.prune("taylor", 0))
    restore_weights(run.experiment.prune("taylor", 0))
    assert steps == list(range(len(steps))), "no step twice"
    assert run.path("model.safetensors").read_bytes() == whole
    assert not list((tmp_path / "repeated").iterdir())


def test_weights_that_cannot_be_made_again_say_what_to_delete(tmp_path):
    run = experiment(tmp_path).dense(0)
    execute(run, quiet)
    table = run.path("evaluations.csv")
    files.write_atomically(table, table.read_bytes() + b"1\n")
    run.finish("other code")
    run.path("model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=f"other code, or another machine.: delete {run.folder}, and start without --restore",
    ):
        restore_weights(run.experiment.prune("taylor", 0))


def test_the_command_that_makes_what_is_missing_names_all_that_was_asked_for(tmp_path):
    assert experiment(tmp_path).command.startswith("make figures PROFILE=smoke OVERRIDES='{")
    base = Experiment.open(
        "quick",
        "multifashion",
        "/some where",
        str(tmp_path),
        {"dense.steps": 10, "dense.evaluations": 2},
    )
    words = shlex.split(base.command)
    assert words[:5] == [
        "make",
        "figures",
        "PROFILE=quick",
        "DATA=multifashion",
        "ROOT=/some where",
    ]
    overrides = json.loads(words[5].removeprefix("OVERRIDES="))
    assert overrides == {"dense.steps": 10, "dense.evaluations": 2} and len(words) == 6
    assert (
        Experiment.open("quick", "rooms", "", str(tmp_path)).command == "make figures PROFILE=quick"
    )


@pytest.mark.parametrize(
    "code, words",
    [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")],
)
def test_a_disk_that_takes_no_more_is_one_line_and_harms_nothing(
    code, words, tmp_path, monkeypatch
):
    base = experiment(tmp_path)
    run = base.prune("taylor", 0)
    execute(run.source, quiet)
    before = {path: path.read_bytes() for path in run.source.folder.iterdir()}
    sync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 4:  # parameters, provenance and a network fit still
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        OSError, match=rf"{words} at prune {run.name}: make room or choose another folder"
    ) as caught:
        execute(run, quiet)
    assert "\n" not in str(caught.value)
    assert not run.done and not list(run.folder.glob(f".*{files.UNFINISHED}"))
    assert {path: path.read_bytes() for path in run.source.folder.iterdir()} == before
    monkeypatch.undo()
    execute(run, quiet)
    assert run.done


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("unknown", ["fsync", "chmod"])
def test_a_share_that_cannot_flush_holds_files_all_the_same(unknown, code, tmp_path, monkeypatch):
    def of_a_share(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, unknown, of_a_share)
    files.write_atomically(tmp_path / "table.csv", b"a,b\n")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"table.csv": b"a,b\n"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_share_without_locks_is_one_line_that_names_the_folder(code, tmp_path, monkeypatch):
    def of_a_share(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", of_a_share)
    message = f"{tmp_path} gives no locks ({os.strerror(code)}): choose a folder elsewhere"
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        files.locked(tmp_path / ".lock", "it").__enter__()


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="Not a directory at .*file.*: make room or choose another folder"
    ):
        execute(experiment(tmp_path / "file").dense(0), quiet)


def test_the_launcher_too_has_one_line_for_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    smoke = ["figures", "--profile", "smoke"]
    assert launch.main([*smoke, "--runs", str(tmp_path / "file" / "runs")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert launch.main([*smoke, "--data", "cityscapes", "--root", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("nowhere holds no Cityscapes: set root")
    assert launch.main(["figures", "--profile", "smok"]) == 1
    assert capsys.readouterr().err == "unknown profile 'smok': did you mean 'smoke'?\n"


def test_a_cache_that_broke_off_is_decoded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MTPRUNE_CACHE", str(tmp_path))
    whole = load_dataset("rooms", train_images=16, test_images=8)
    for cache in tmp_path.glob("*.safetensors"):
        files.write_atomically(cache, cache.read_bytes()[:1000])  # not in place: it is mapped
    again = load_dataset("rooms", train_images=16, test_images=8)
    assert torch.equal(whole.train.image, again.train.image)


def test_a_cache_of_an_older_loader_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("MTPRUNE_CACHE", str(tmp_path))

    def decode(value):
        return lambda: {"image": torch.full((1, 3, 2, 2), value, dtype=torch.uint8)}

    assert _reading.decoded("rooms", "train", "digest", decode(1)).image[0, 0, 0, 0] == 1
    assert _reading.decoded("rooms", "train", "digest", decode(2)).image[0, 0, 0, 0] == 1, (
        "decoded before"
    )
    monkeypatch.setattr(_reading, "source_digest", lambda modules: "newer")
    assert _reading.decoded("rooms", "train", "digest", decode(3)).image[0, 0, 0, 0] == 3
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [
        "rooms-train-digest-newer.safetensors"
    ]


# --- during a run ---


def test_a_search_without_a_single_good_trial_says_what_to_lower(tmp_path, monkeypatch):
    def diverges(*arguments):
        raise trainer.Diverged("nan")

    monkeypatch.setattr(tune, "_run_trial", diverges)
    run = experiment(tmp_path, **{"tuning.trials": 2}).tune("retrain", "uniform", 0)
    with pytest.raises(
        trainer.Diverged, match=r"every trial diverged, lower tuning.lr, now \(0.0001, 0.01\)"
    ):
        execute(run, quiet)


@pytest.mark.parametrize("damage", [b"{\xff\n", b'{"op_code":6,"work'])
def test_a_damaged_journal_of_a_search_is_cut_where_the_damage_begins(damage, tmp_path):
    journal, said = tmp_path / "journal.log", []
    journal.write_bytes(b'{"a":1}\n' + damage + (b'{"b":2}\n' if damage.endswith(b"\n") else b""))
    tune._repair(journal, said.append)
    assert journal.read_bytes() == b'{"a":1}\n' and "going on from its first 1 of" in said[0]
    tune._repair(journal, said.append)
    assert len(said) == 1


def test_out_of_memory_says_what_to_try(tmp_path, monkeypatch):
    def train(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB ...\n...")

    monkeypatch.setattr(trainer, "train", train)
    with pytest.raises(
        RuntimeError,
        match=r"^out of memory on \w+ with batches of 8 at 32 pixels: override batch_size or crop, "
        r"e.g. \{'batch_size': 4\}$",
    ):
        execute(experiment(tmp_path).dense(0), quiet)


def test_a_loss_that_is_not_finite_names_task_step_and_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    run = experiment(tmp_path, **{"dense.steps": 9, "checkpoint_seconds": 0.0}).dense(0)
    losses, steps = trainer.task_losses, []

    def breaks(tasks, outputs, targets):
        steps.append(1)
        values = losses(tasks, outputs, targets)
        return values | {"normals": values["normals"] / 0} if len(steps) == 6 else values

    monkeypatch.setattr(trainer, "task_losses", breaks)
    expected = (
        r"the loss of normals is \w+ at step 6: lower the learning rate; "
        "the last good checkpoint is that of step 5"
    )
    with pytest.raises(trainer.Diverged, match=expected):
        execute(run, quiet)
    assert not run.done


# --- networks from elsewhere ---


def header(tensors: dict, metadata: dict) -> bytes:
    text = json.dumps({"__metadata__": metadata, **tensors}).encode()
    return struct.pack("<Q", len(text)) + text


TINY_RECORD = {"tasks": {"depth": 1}, "widths": {}, "head_width": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95" + b"a pickle" * 9,
        struct.pack("<Q", 2**62) + b"{}",
        header({}, {}),
        header({}, {"architecture": "not json"}),
        header({}, {"architecture": json.dumps(TINY_RECORD | {"widths": {"trunk.0": 10**9}})}),
        header({}, {"architecture": json.dumps(TINY_RECORD | {"head_width": "wide"})}),
        header({}, {"architecture": json.dumps(TINY_RECORD | {"backbone": "__import__('os')"})}),
        header(
            {"trunk.0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
            {"architecture": json.dumps(TINY_RECORD)},
        ),
    ],
    ids=[
        "empty",
        "pickle",
        "huge header",
        "no architecture",
        "no json",
        "huge widths",
        "wrong type",
        "backbone",
        "huge tensor",
    ],
)
def test_a_malformed_network_is_one_clear_error(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{re.escape(str(path))} is not a network written by mtprune"
    ) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil, message", [(lambda p: p.half(), "float16"), (lambda p: p * float("nan"), "not finite")]
)
def test_weights_that_cannot_be_ours_are_refused(spoil, message, model, tmp_path):
    path = tmp_path / "model.safetensors"
    layer = convs(model)[0]
    layer.weight = torch.nn.Parameter(spoil(layer.weight.detach()))
    path.write_bytes(model_bytes(model))
    with pytest.raises(ValueError, match=message):
        load_model(path)
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "nowhere.safetensors")


def test_nothing_in_the_package_unpickles():
    sources = {path.name: path.read_text() for path in (PROJECT / "mtprune_utils").rglob("*.py")}
    for name, text in sources.items():
        found = re.search(
            r"\bpickle\b|torch\.load\(|allow_pickle=True|\beval\(\w|\bexec\(",
            text.replace("model.eval(", ""),
        )
        assert not found, f"{name}: {found}"


# --- parameters, before a kernel starts ---


@pytest.mark.parametrize(
    "notebook, parameters, message",
    [
        ("01_train_dense", {"sed": 1}, "has no parameter 'sed': did you mean 'seed'?"),
        ("01_train_dense", {"seed": "1"}, "'seed' takes a whole number, got '1'"),
        ("01_train_dense", {"profile": "smok"}, "unknown profile 'smok': did you mean 'smoke'?"),
        *((notebook.stem, {"data": "romms"}, "unknown data set 'romms'") for notebook in NOTEBOOKS),
        (
            "03_retrain_from_scratch",
            {"data": "cityscapes", "root": "nowhere"},
            "nowhere holds no Cityscapes: set root",
        ),
        ("01_train_dense", {"seed": -1}, "seed must not be negative, got -1"),
        (
            "02_prune_iteratively",
            {"overrides": {"sizes": [0.001]}},
            "sizes: at the floor of 5 filters per layer a share of",
        ),
        ("01_train_dense", {"arm": "dept"}, "unknown arm 'dept': did you mean 'depth'?"),
        ("01_train_dense", {"overrides": {"backbone": "vgg61"}}, "unknown backbone 'vgg61'"),
        (
            "02_prune_iteratively",
            {"criterion": "tailor"},
            "unknown criterion 'tailor': did you mean 'taylor'?",
        ),
        ("02_prune_iteratively", {"overrides": {"prune.lr": -1.0}}, "lr must be positive"),
        ("03_retrain_from_scratch", {"level": 7}, "level must be from 0 to 0, got 7"),
        (
            "03_retrain_from_scratch",
            {"criterion": "uniform", "arm": "finetune"},
            "unknown arm 'finetune'",
        ),
        ("07_tune_optimizer", {"arm": "prun"}, "unknown arm 'prun': did you mean 'prune'?"),
        (
            "04_plot_fig1_iterative_pruning",
            {"overrides": {"crop": 96.5}},
            "'crop' takes a whole number, got 96.5",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_a_kernel_starts(notebook, parameters, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        check_run(PROJECT / "notebooks" / f"{notebook}.ipynb", parameters)


def test_every_stage_has_its_notebook_and_its_defaults_are_a_run():
    for stage in stage_names():
        check_run(store.stage_notebook(stage), {})


def test_the_command_line_refuses_it_too(tmp_path):
    command = [
        *LAUNCH,
        "notebook",
        "notebooks/02_prune_iteratively.ipynb",
        str(tmp_path / "out.ipynb"),
        "-p",
        "criterion",
        "tailor",
    ]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["unknown criterion 'tailor': did you mean 'taylor'?"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "parameters, message",
    [({"sed": 1}, "did you mean 'seed'"), ({"seed": "one"}, "takes a whole number, got 'one'")],
)
def test_papermill_itself_is_no_way_around_the_check(parameters, message, tmp_path):
    import papermill

    with pytest.raises(papermill.exceptions.PapermillExecutionError, match=message):
        papermill.execute_notebook(
            PROJECT / "notebooks" / "01_train_dense.ipynb",
            tmp_path / "out.ipynb",
            {"runs": str(tmp_path), **parameters},
            progress_bar=False,
        )
    assert not list(tmp_path.glob("smoke*"))


def test_every_notebook_checks_what_papermill_injects():
    for path in (PROJECT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, 4).cells
        first, second = [cell for cell in cells if cell.cell_type == "code"][:2]
        assert "parameters" in first.metadata.tags
        assert "check_injected(In)" in second.source.splitlines(), path.name
    declared = "seed: int = 0  # help\nlr: float = 0.1  # help"
    check_injected(["", declared, "# Parameters\nseed = 3\nlr = 1\n", "x = 1"])
    check_injected(["", declared, "x = 1"])
    again = "# Parameters\nseed = 4\n"  # run twice, and behind cells that somebody ran first
    check_injected(
        ["", "import os", declared, "%matplotlib inline", "# Parameters\nseed = 3\n", again]
    )
    with pytest.raises(ValueError, match="has no parameter 'rl'"):
        check_injected(["", declared, "# Parameters\nrl = 1\n"])
    with pytest.raises(ValueError, match="'seed' takes a whole number, got 1.5"):  # edited there
        check_injected(["", declared.replace("0  #", "1.5  #")])
    with pytest.raises(ValueError, match="'lr' takes a number, got 'x'"):  # there, and run again
        check_injected(["", declared, "x = 1", declared.replace("0.1", "'x'")])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"dense.stepz": 1}, "unknown setting 'dense.stepz': did you mean 'steps'"),
        ({"dense": 1}, "'dense' is a group of settings"),
        ({"crop": "96"}, "'crop' takes a whole number, got '96'"),
        ({"dense.steps": True}, "'dense.steps' takes a whole number, got True"),
        ({"dense.lr_schedule": "cosin"}, "lr_schedule must be constant or cosine, got 'cosin'"),
        ({"dense.evaluations": 0}, "evaluations must be from 1 to steps, got 0"),
        ({"scale": [1.0, 0.5]}, "scale must be"),
        ({"criteria": ["tailor"]}, "unknown criterion 'tailor': did you mean 'taylor'"),
        ({"backbone": "resnet"}, "unknown backbone 'resnet'"),
        ({"backbone": "vgg17"}, "did you mean 'vgg16'"),
        ({"widths": [8, 8]}, "unknown setting 'widths': did you mean 'width'"),
        ({"width": 1.5}, "width must lie above 0 and be at most 1"),
        ({"crop": 4}, "crop must be at least the stride, 8 pixels, got 4"),
        ({"dropout": 1.0}, "dropout must lie between 0 and 1"),
        ({"train_images": 8}, "of train_images, a batch of 8 must be left after validation, got 7"),
        (
            {"train_images": 10, "validation_share": 0.5},
            "a batch of 8 must be left after validation, got 5",
        ),
        ({"dense.weight_decay": -1}, "weight_decay must not be negative"),
        ({"dense.betas": [0.5, 2]}, "betas must lie between 0 and 1"),
        ({"dense.betas": ["x", "y"]}, "'dense.betas' takes a number, got 'x'"),
        ({"scale": [1]}, "'scale' takes a list of 2 floats"),
        ({"width": "wide"}, "'width' takes a number, got 'wide'"),
        ({"criteria": [1]}, "'criteria' takes text, got 1"),
        ({"criteria": []}, "criteria must name at least one"),
        ({"criteria": ["taylor", "taylor"]}, "criteria must name at least one, and each once"),
        ({"tuning.lr": [1e-4, math.inf]}, r"tuning.lr must be \(low, high\)"),
        ({"dense.lr.x": 1}, "unknown setting 'dense.lr.x'"),
        ({"crop.x": 1}, "unknown setting 'crop.x'"),
        ({"name": "x"}, "unknown setting 'name'"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must not be negative"),
        ({"precision": "fp16"}, "precision must be float32 or bf16"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda"),
        ({"prune.score_every": 5}, "score_every must be from 1 to prune_interval"),
        ({"prune.round_to": 8}, "round_to must be at least 1 and divide min_filters"),
        ({"sizes": []}, "sizes must name at least one share"),
        ({"dense.weight_decay": math.inf}, "dense.weight_decay must be finite"),
        ({"controls.budget": math.inf}, "controls.budget must be finite"),
        ({"checkpoint_seconds": math.inf}, "checkpoint_seconds must be finite"),
        ({"dense.lr": math.nan}, "lr must be positive"),
        ({"scale": [0.5, 1e308]}, "scale must be"),
        (
            {"dense.lr": 10**400},
            "'dense.lr' takes whole numbers up to 1000000000, got a larger one",
        ),
        ({"dense.steps": 10**5000}, "'dense.steps' takes whole numbers up to 1000000000"),
        ({"head_width": 10**9}, "head_width, image_height and crop must be at most 16384"),
        ({"crop": 10**8}, "must be at most 16384, got 100000000"),
    ],
)
def test_values_out_of_range_and_contradictions_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        get_profile("smoke", overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"stride": 5}, "stride must be one of"),
        ({"pretrained": True}, "ImageNet weights fit the full widths only"),
        ({"prune.round_to": 5}, "prune.round_to must divide every width of the dense network"),
    ],
)
def test_networks_that_cannot_be_are_refused_before_training(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        execute(Experiment.open("smoke", "rooms", "", str(tmp_path), overrides).dense(0), quiet)
    assert not list(tmp_path.iterdir())


def test_a_criterion_of_ones_own_may_not_need_what_nothing_provides():
    choice = "choose one of weights, gradient, task_gradients, activations"
    with pytest.raises(ValueError, match=f"the criterion 'mine' needs 'task_gradient': {choice}"):
        Criterion("mine", "task_gradient", lambda *_: None)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--jobs", "0"], "'0' is no number of jobs"),
        (["--jobs", "1; touch x"], "'1; touch x' is no number of jobs"),
        (["--overrides", "[" * 10**5], "is no JSON object: write it like"),
        (["--overrides", '[["seeds", 1]]'], "is no JSON object: write it like"),
        (["--overrides", "{seeds: 1}"], "is no JSON object: write it like"),
    ],
)
def test_the_launchers_own_options_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        launch.main(["figures", *arguments])
    assert message in capsys.readouterr().err


def test_a_batch_that_asks_for_a_gpu_where_there_is_none_does_not_start(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(launch, "visible_gpus", list)
    command = ["figures", "--profile", "smoke", "--runs", str(tmp_path)]
    assert launch.main([*command, "--overrides", '{"device": "cuda"}']) == 1
    assert "there is no GPU here" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_batch_does_not_start_on_the_cpu_because_torch_cannot_use_the_gpu(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(launch, "visible_gpus", lambda: ["0"])
    assert launch.main(["figures", "--profile", "smoke", "--runs", str(tmp_path)]) == 1
    assert "there is a GPU here that torch cannot use" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert launch.main(["figures", "--profile", "smoke", "--runs", str(tmp_path)]) == 1
    named = "CUDA_VISIBLE_DEVICES names 7, which torch cannot use: correct or unset it"
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        {"batch_size": 256, "train_images": 600},
        {"dense.steps": 1, "dense.evaluations": 1},
        {"controls.levels": [1], "sizes": [0.5, 0.3]},
    ],
)
def test_overrides_go_together_in_any_order(overrides):
    there, back = (
        get_profile("smoke", dict(items))
        for items in (overrides.items(), reversed(overrides.items()))
    )
    assert there == back


# --- figures that no longer follow ---


def test_check_names_what_has_changed_since_a_figure_was_made(tmp_path, capsys, monkeypatch):
    source = PROJECT / "figures" / "quick" / "fig1_iterative_pruning.json"
    origin = json.loads(source.read_text())
    monkeypatch.setattr(store, "git", lambda *arguments: None)
    own = {"code": store.figure_code(), "notebook": store.notebook_digest(source.stem)}
    present = stale.present_runs("quick", "rooms")
    origin |= {**own, "dirty": False, "profile": dataclasses.asdict(PROFILES["quick"])}
    dense = next(label for label in present if label.startswith("dense"))
    data = Experiment(PROFILES["quick"]).data_digest
    origin["runs"] = {
        label: {"code": run.code, "data_digest": data, "dirty": False}
        for label, run in present.items()
    }
    path = tmp_path / "figures" / "quick" / source.name

    def reasons(**changes):
        files.write_json(path, origin | changes)
        return stale.outdated(path)

    assert reasons() == [] and stale.check(tmp_path / "figures") == 0
    assert reasons(code="older") == ["code: figure"]
    assert reasons(notebook="older") == ["code: notebook"]
    assert reasons(dirty=True) == ["made by uncommitted code"]
    assert reasons(profile=origin["profile"] | {"batch_size": 9}) == ["setting: batch_size"]
    assert reasons(runs=origin["runs"] | {dense: origin["runs"][dense] | {"code": "older"}}) == [
        "code: dense"
    ]
    assert reasons(
        runs=origin["runs"] | {dense: origin["runs"][dense] | {"data_digest": "other"}}
    ) == ["data"]
    assert stale.check(tmp_path / "figures") == 1
    assert "figures/quick/fig1_iterative_pruning: changed since are data" in capsys.readouterr().out


# --- the table in the documentation ---


def test_every_test_that_the_table_of_faults_names_exists():
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        file, test = re.search(r"`(test_\w+)\.(test_\w+)`", row).groups()
        assert f"def {test}(" in Path(__file__).with_name(f"{file}.py").read_text(), row


# --- what is installed, and what is served ---


def test_the_lock_file_pins_what_the_requirements_ask_for_with_hashes():
    def pins(name):
        return dict(re.findall(r"^([\w.-]+)==([\w.]+)", (PROJECT / name).read_text(), re.MULTILINE))

    asked, locked = pins("requirements.txt"), pins("requirements.lock")
    named = {name.replace("_", "-"): version for name, version in asked.items()}
    assert len(named) >= 15 and named.items() <= locked.items(), "run `make lock`"
    packages = re.split(
        r"^(?=\w)", (PROJECT / "requirements.lock").read_text(), flags=re.MULTILINE
    )[1:]
    assert all("--hash=sha256:" in package for package in packages)
    assert "--require-hashes -r requirements.lock" in (PROJECT / "Makefile").read_text()


@contextlib.contextmanager
def serving(command, folder):
    """The Jupyter server of that command, with settings of its own in `folder`.

    Gives its (port, token) while it lasts.
    """
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder),
        "JUPYTER_RUNTIME_DIR": str(folder),
    }
    words = [*command, "--no-browser", "--port=0", "--allow-root"]
    server = subprocess.Popen(words, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL)

    def record():
        with contextlib.suppress(ValueError):  # half written
            return next(
                (json.loads(file.read_text()) for file in folder.glob("jpserver-*.json")), None
            )

    try:
        server_info = wait_for(record, 60)
        yield server_info["port"], server_info["token"]
    finally:
        server.terminate()
        server.wait(60)


def test_the_lab_shows_the_repository_to_this_machine_alone_and_asks_for_a_token(tmp_path):
    lines = subprocess.run(
        ["make", "-n", "lab"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (command,) = [line for line in lines if "jupyter lab" in line]
    own_options = command.split()[1:]  # behind the program
    with serving([sys.executable, "-m", "jupyter", *own_options], tmp_path) as (port, token):
        assert len(token) >= 32
        url = f"http://127.0.0.1:{port}/api/contents"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(url)
        headers = {"Authorization": f"token {token}"}

        def opened(path: str):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", headers=headers)
            return urllib.request.urlopen(request)

        assert opened("").url.endswith("/lab/tree/notebooks")  # where a reader begins
        for path in ("notebooks/01_train_dense.ipynb", "mtprune_utils/criteria/taylor.py"):
            assert PROJECT.joinpath(path).name in opened(f"api/contents/{path}").read().decode()
        assert "README.md" in opened("api/contents").read().decode()
        for hidden in (".git", ".venv"):  # nor what lies above
            with pytest.raises(urllib.error.HTTPError, match="40[04]"):
                opened(f"api/contents/{hidden}")
        with pytest.raises(urllib.error.HTTPError, match="40[034]"):
            opened("api/contents/%2e%2e")
        own = socket.gethostbyname(socket.gethostname())
        if not own.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((own, port), timeout=5)
