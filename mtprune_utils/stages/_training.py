"""What stages share: the network of a profile, its device, training it and writing it down."""

import os
from dataclasses import replace

import torch

from mtprune_utils.core import evaluation, trainer
from mtprune_utils.core.data import Dataset
from mtprune_utils.core.model import (
    Architecture,
    Interface,
    MultiTaskModel,
    load_model,
    model_bytes,
)
from mtprune_utils.core.settings import Optimization, Profile, Pruning
from mtprune_utils.files import read_json

DENSE = "model.safetensors"  # the network that a run ends with


def at_level(level: int) -> str:
    """The file of a pruning run that holds the network of that level's size."""
    return f"level{level}.safetensors"


def architecture(profile: Profile, tasks: dict[str, int]) -> Architecture:
    """The dense network of a profile, for {task: output channels}."""
    p = profile
    full = Architecture(tasks, p.backbone, p.stride, p.head_width, p.dropout)
    return full.narrowed(p.width, p.least_width)


def device_of(profile: Profile) -> torch.device:
    """Raises ValueError if the profile asks for a GPU and there is none."""
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is cuda, but torch finds no GPU here: override it with auto or cpu"
        )
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(automatic if profile.device == "auto" else profile.device)


def device_kind(device: torch.device) -> str:
    """The device as results depend on it: "cpu AVX2", "cuda NVIDIA H100 80GB HBM3"."""
    cuda = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {kind}"


def set_up(profile: Profile, device: torch.device) -> None:
    """Turn torch's global switches."""
    if "OMP_NUM_THREADS" not in os.environ:
        # A second thread gains little on small networks, and two busy thread pools slow each other
        # tenfold.
        torch.set_num_threads(1)
    if device.type == "cuda":
        # What deterministic operations ask for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(profile.deterministic, warn_only=True)
        # Shapes stay the same from one removal to the next.
        torch.backends.cudnn.benchmark = not profile.deterministic
        torch.backends.cudnn.allow_tf32 = True  # of convolutions; CosPrune's products stay float32


def train_and_save(
    run, model: MultiTaskModel, dataset: Dataset, settings: Optimization, report, checkpoints
) -> None:
    """One training phase: its curve, the network, and its metrics on test images."""
    profile = run.profile
    model.to(device_of(profile))
    curve = trainer.train(
        model, dataset, profile, settings, run.random_seed, report, checkpoints=checkpoints
    )
    run.write_table("curve.csv", curve)
    fresh = save(run, DENSE, model, dataset)
    metrics = evaluation.evaluate(fresh, dataset.test, dataset.tasks, profile)
    used = {name: getattr(settings, name) for name in ("steps", "lr", "weight_decay")}
    size = evaluation.describe(model, profile)
    run.write_table("evaluations.csv", [used | size | metrics])


def save(run, file: str, model: MultiTaskModel, dataset: Dataset) -> MultiTaskModel:
    """Write the network as it is evaluated, with fresh batch statistics. Returns it like that."""
    profile, tasks = run.profile, dataset.tasks
    fresh = evaluation.recalibrated(model, dataset, profile)
    one, scale = torch.ones(()), evaluation.output_scale(profile)
    fresh.interface = Interface(
        profile.crop,
        classes={name: task.classes for name, task in tasks.items() if task.classes},
        scales={name: task.target.unscaled(one, scale).item() for name, task in tasks.items()},
        pixels=tuple(name for name, task in tasks.items() if task.target.of_pixels),
    )
    run.write(file, model_bytes(fresh, trained=model))
    return fresh


def network(run, file: str) -> MultiTaskModel:
    """A network that a finished run has left, to go on from. Raises as `load_model` does."""
    return load_model(run.path(file), to_train=True)


def tuned(settings: Optimization | Pruning, search) -> Optimization | Pruning:
    """With what a finished search found best, if there is one."""
    if search is None:
        return settings
    best = read_json(search.path("best.json"))
    return replace(settings, lr=best["lr"], weight_decay=best["weight_decay"])
