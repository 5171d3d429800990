"""The three stages of the experiment, from run folder to run folder: dense training, pruning, re-training.

Each takes a `Run`, does nothing if it is finished, and writes `done.json` last. A figure notebook opened alone calls
the same functions for whatever is missing.
"""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mtprune_utils import training
from mtprune_utils.data import Dataset, load_dataset
from mtprune_utils.models import Architecture, MultiTaskNet, build, load_imagenet_backbone, load_model, model_bytes
from mtprune_utils.profiles import Optimization
from mtprune_utils.runs import Run, code_digest, provenance, read_json, read_table, write_atomically


def load_data(run: Run) -> Dataset:
    """The run's data set, as many images as its profile takes, on the CPU."""
    profile = run.profile
    return load_dataset(
        run.experiment.data, run.experiment.data_root, profile.train_images, profile.test_images,
        profile.validation_share,
    )


def execute(run: Run, report: Callable[[str], None] = print) -> None:
    """Do the run, and first whatever it starts from, unless it is finished."""
    if run.done:
        changed = read_json(run.path("done.json"))["code"] != code_digest(run.stage)
        how = " with other code (delete its folder to repeat it)" if changed else ""
        report(f"{run.stage} {run.name}: finished before{how}, nothing to do")
        return
    for upstream in run.inputs:
        execute(upstream, report)
    if "OMP_NUM_THREADS" not in os.environ:
        # A second thread gains little on small networks, and two busy thread pools slow each other tenfold.
        torch.set_num_threads(1)
    started = time.perf_counter()
    torch.manual_seed(_seed(run))  # dropout; everything else has a generator of its own
    run.write_json("params.json", run.params)
    dataset = load_data(run)
    origin = provenance(  # before the run: the code may be edited while it lasts
        run.stage, params=run.params, data_digest=dataset.digest, threads=torch.get_num_threads(), device=str(_device())
    )
    run.write_json("provenance.json", origin)
    {"dense": _dense, "prune": _prune, "retrain": _retrain}[run.stage](run, dataset.to(_device()), report)
    run.write_json("timing.json", {"seconds": round(time.perf_counter() - started, 1)})
    run.write_json("done.json", {"code": origin["code"]})


def execute_missing(runs: list[Run], report: Callable[[str], None] = print) -> None:
    """For a figure: make what is missing of the smoke profile; of a larger one, say which command makes it.

    Raises FileNotFoundError in the latter case.
    """
    missing = [run for run in runs if not run.done]
    if missing and runs[0].profile.name != "smoke":
        name = runs[0].profile.name
        raise FileNotFoundError(f"{len(missing)} of {len(runs)} runs of {name} are missing: run `make figures PROFILE={name}`")
    for run in missing:
        execute(run, report)


def _seed(run: Run) -> int:
    """One stream of random numbers per stage and seed. The criterion is left out: its runs are paired."""
    digest = hashlib.sha256(f"{run.stage} {run.seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dense(run: Run, dataset: Dataset, report) -> None:
    model = build(run.profile.architecture({name: task.channels for name, task in dataset.tasks.items()}), _seed(run))
    if run.profile.pretrained:
        load_imagenet_backbone(model)
    _train_and_save(run, model, dataset, run.profile.dense, report)
    trivial = training.trivial_predictors(dataset, run.profile)
    run.write_table("trivial.csv", [{"predictor": name} | metrics for name, metrics in trivial.items()])


def _retrain(run: Run, dataset: Dataset, report) -> None:
    _train_and_save(run, build(found_architecture(run), _seed(run)), dataset, run.profile.retrain, report)


def found_architecture(run: Run) -> Architecture:
    """What a re-training run trains: the pruning run's architecture with the number of filters nearest to its rank's."""
    pruned = run.inputs[0]
    wanted = run.profile.retrain_filters[run.rank]
    nearest = min(read_table(pruned.path("evaluations.csv")), key=lambda row: abs(int(row["filters"]) - wanted))
    widths = tuple(int(width) for width in nearest["widths"].split())
    return replace(load_model(pruned.path("model.safetensors")).architecture, widths=widths)


def _train_and_save(run: Run, model: MultiTaskNet, dataset: Dataset, settings: Optimization, report) -> None:
    model.to(_device())
    curve = training.train(model, dataset, run.profile, settings, _seed(run), report)
    run.write_table("curve.csv", curve)
    write_atomically(run.path("model.safetensors"), model_bytes(model))
    metrics = training.evaluate_on_test(model, dataset, run.profile)
    run.write_table("evaluations.csv", [training.describe(model, run.profile) | metrics])


def _prune(run: Run, dataset: Dataset, report) -> None:
    model = load_model(run.inputs[0].path("model.safetensors")).to(_device())
    evaluations, layer_rows = [], []
    for evaluation, layers in training.prune_iteratively(model, dataset, run.profile, run.criterion, _seed(run)):
        evaluations.append(evaluation)
        layer_rows += layers
        if evaluation["phase"] == "recovered":
            report(f"removal {evaluation['removal']}: {evaluation['filters']} filters left")
    run.write_table("evaluations.csv", evaluations)
    run.write_table("layers.csv", layer_rows)
    write_atomically(run.path("model.safetensors"), model_bytes(model))
