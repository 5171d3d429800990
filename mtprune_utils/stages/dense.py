"""Dense training: the network that pruning starts from, and one network per task beside it."""

from mtprune_utils.core.evaluation import trivial_predictors
from mtprune_utils.core.model import build, load_imagenet_trunk
from mtprune_utils.core.settings import Optimization
from mtprune_utils.core.task import channels
from mtprune_utils.stages._training import architecture, train_and_save

TABLES = ("evaluations.csv", "curve.csv", "trivial.csv")
SETTINGS = ("dense", "pretrained")
NOTEBOOK = "01_train_dense"
ALL_TASKS = "multitask"  # the arm of the network that has them all; others are named by their task


def source(run) -> None:
    return None


def search(run) -> None:
    return None


def settings(run) -> Optimization:
    return run.profile.dense


def weights(run) -> None:
    return None


def entries(run) -> list[str]:
    return []


def perform(run, dataset, report, checkpoints) -> None:
    if run.arm != ALL_TASKS:
        dataset = dataset.only(run.arm)
    model = build(architecture(run.profile, channels(dataset.tasks)), run.random_seed)
    if run.profile.pretrained:
        load_imagenet_trunk(model)
    train_and_save(run, model, dataset, settings(run), report, checkpoints)
    trivial = trivial_predictors(dataset, run.profile)
    rows = [{"predictor": name} | metrics for name, metrics in trivial.items()]
    run.write_table("trivial.csv", rows)
