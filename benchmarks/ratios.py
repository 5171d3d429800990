"""Speed as ratios, each measured side by side in one run: make bench.

Writes benchmarks/results/<machine>.csv, one row per ratio: the median over rounds of numerator over
denominator (timed one after the other within a round, so that other load on the machine meets
both), and the 10th and 90th percentile over rounds.
"""

import argparse
import copy
import gc
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer, timer

from mtprune_utils import registry
from mtprune_utils.core.data import augment
from mtprune_utils.core.evaluation import forward
from mtprune_utils.core.model import Architecture, MultiTaskModel, build, complexity
from mtprune_utils.core.scoring import WEIGHTS, Scores
from mtprune_utils.core.selection import select
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.signals import laid_out_like
from mtprune_utils.core.task import channels, task_losses
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.criteria import get_criterion
from mtprune_utils.datasets import load_dataset
from mtprune_utils.files import csv_text, write_atomically
from mtprune_utils.processes import ENVIRONMENT
from mtprune_utils.stages._training import architecture, device_of, set_up
from mtprune_utils.study.latency import device_name
from mtprune_utils.study.profiles import PROFILES

RESULTS = Path(__file__).parent / "results"


def as_in_a_batch() -> None:
    """Start this script anew with the environment of a batch's jobs, unless it has it.

    Memory is set up as a process begins.
    """
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)


def machine() -> str:
    """A name for the kind of machine, not for this one."""
    if torch.cuda.is_available():
        name = device_name("cuda")
    else:  # of processors that go by the same name, some compute twice as many numbers at once
        kind = f"{device_name('cpu')} {torch.backends.cpu.get_cpu_capability()}"
        name = f"{kind} {torch.get_num_threads()} threads"
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def described() -> dict:
    """What stands beside every number: machine, threads and versions."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"machine": machine(), "threads": torch.get_num_threads(), **versions}


def compare(
    numerator: Callable, denominator: Callable, rounds: int, calls: int = 1
) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile over rounds of the ratio of their times.

    So many calls each; two more warm each up.
    """
    # The networks compared before: a learning rate's schedule and its optimizer hold each other.
    gc.collect()
    threads = torch.get_num_threads()
    above, below = (
        Timer("call()", globals={"call": call}, num_threads=threads)
        for call in (numerator, denominator)
    )
    ratios = [above.timeit(calls).mean / below.timeit(calls).mean for _ in range(rounds)]
    return tuple(torch.tensor(ratios).quantile(torch.tensor([0.5, 0.1, 0.9])).tolist())


class Case:
    """A network that trains on rooms, as a profile does."""

    def __init__(self, profile: Profile, images: int | None = 64, test_images: int | None = None):
        self.profile = profile
        test_images = test_images or images and 16
        dataset = load_dataset("rooms", train_images=images, test_images=test_images)
        self.dataset = dataset.resized_for_evaluation(profile.crop).to(device_of(profile))
        self.architecture = architecture(profile, channels(dataset.tasks))
        self._built: dict[tuple[int, ...], MultiTaskModel] = {}  # drawing weights takes a second

    def trainer(self, architecture: Architecture | None = None) -> Trainer:
        wanted = architecture or self.architecture
        widths = tuple(wanted.width_list)
        if widths not in self._built:
            self._built[widths] = build(wanted, 0).to(self.dataset.train.image.device)
        model = copy.deepcopy(self._built[widths])
        return Trainer(model.train(), self.dataset, self.profile, self.profile.dense, 10_000, 0)

    def step(
        self, criterion: str | None = None, architecture: Architecture | None = None
    ) -> Callable:
        trainer = self.trainer(architecture)
        scores = [scores_of(criterion, trainer)] if criterion else []
        return lambda: trainer.step(scores)

    def compiled(self, backend: str = "inductor") -> tuple[Callable, float]:
        """A plain step under torch.compile, and the seconds that the first one takes."""
        trainer = self.trainer()
        trainer.model = torch.compile(trainer.model, backend=backend)
        start = timer()
        # Else the next benchmark finds this one's work.
        with torch.compiler.config.patch(force_disable_caches=True):
            trainer.step()
        return trainer.step, timer() - start

    def minimal(self, batched: bool = False) -> Callable:
        """The least work that CosPrune needs, by hand.

        A minibatch, one forward pass, one backward pass per task, the optimizer. batched: the
        trunk's backward passes as one call, which autograd vectorises (`is_grads_batched`).
        """
        trainer, profile = self.trainer(), self.profile
        model, tasks = trainer.model, trainer.tasks
        trunk = list(model.trunk.parameters())

        def step() -> None:
            images, targets = minibatch(trainer)
            features = forward(model.trunk, images, profile)
            outputs = {
                task: forward(head, features, profile).float() for task, head in model.heads.items()
            }
            at_features = []
            for task, loss in task_losses(tasks, outputs, targets).items():
                head = list(model.heads[task].parameters())
                gradient, *grads = torch.autograd.grad(loss, [features, *head])
                at_features.append(gradient)
                for parameter, grad in zip(head, grads):
                    parameter.grad = grad
            if batched:
                stacked = torch.autograd.grad(
                    features, trunk, torch.stack(at_features), is_grads_batched=True
                )
                total = [grads.sum(0) for grads in stacked]
            else:
                *earlier, last = at_features
                by_task = [
                    torch.autograd.grad(features, trunk, gradient, retain_graph=True)
                    for gradient in earlier
                ]
                by_task.append(torch.autograd.grad(features, trunk, last))
                total = [sum(grads) for grads in zip(*by_task)]
            for parameter, grad in zip(trunk, total):
                parameter.grad = laid_out_like(parameter, grad)
            trainer.optimizer.step()

        return step


def scores_of(criterion: str, trainer: Trainer) -> Scores:
    return Scores(get_criterion(criterion), trainer.model.groups, trainer.model)


def minibatch(trainer: Trainer) -> tuple[Tensor, dict[str, Tensor]]:
    """The next one's images and targets, as a step of the trainer takes them."""
    profile = trainer.profile
    return augment(
        next(trainer.batches),
        trainer.tasks,
        profile.image_height,
        profile.crop,
        profile.scale,
        profile.depth_follows_scale,
        trainer.generator,
        trainer.mirror,
        profile.stride,
    )


def update(case: Case, criterion: str) -> tuple[Callable, Callable]:
    """One update of a criterion's scores, and one backward pass of the summed loss.

    Of the same minibatch, whose gradients are there; a criterion of weights is asked for its scores
    instead.
    """
    trainer = case.trainer()
    model, profile, scores = trainer.model, trainer.profile, scores_of(criterion, trainer)
    images, targets = minibatch(trainer)
    losses = task_losses(trainer.tasks, forward(model, images, profile), targets)
    parameters = list(model.parameters())
    total = sum(losses.values())
    once = lambda: torch.autograd.grad(total, parameters, retain_graph=True)  # noqa: E731
    gradients = {
        task: dict(
            zip(
                parameters,
                torch.autograd.grad(
                    loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                ),
            )
        )
        for task, loss in losses.items()
    }
    for parameter, grad in zip(parameters, once()):
        parameter.grad = grad
    if scores.criterion.needs == WEIGHTS:
        return scores.mean, once
    maps = scores._watch.take() if scores._watch else None
    return lambda: scores._add(scores._signals(gradients, maps)), once


def removal(case: Case, filters: int) -> Callable:
    """Choose and remove so many filters. Each call has fewer left, as in a run."""
    trainer = case.trainer()
    trainer.step()
    generator = torch.Generator().manual_seed(0)

    def remove() -> None:
        widths = trainer.model.architecture.width_list
        scores = [torch.rand(width, generator=generator) for width in widths]
        trainer.model.remove(select(scores, filters, floor=5), trainer.optimizer)

    return remove


def quarter(dense: Architecture, crop: int) -> Architecture:
    """Equal shares of every layer, so many that a quarter of the multiply-accumulates is left."""

    def macs(network: Architecture) -> int:
        return complexity(network, (crop, crop))["macs"]

    networks = [dense.narrowed(i / 256) for i in range(8, 257)]
    return min(networks, key=lambda network: abs(macs(network) / macs(dense) - 0.25))


def measure(
    rounds: int,
    paper: Profile = PROFILES["paper"],
    quick: Profile = PROFILES["quick"],
    backend: str = "inductor",
) -> Iterator[dict]:
    """One row after the other, so that none is lost if a later one fails.

    backend: of torch.compile.
    """
    # Few CPUs have arithmetic for bf16.
    precision = "bf16" if torch.cuda.is_available() else "float32"
    large = replace(paper, pretrained=False, precision=precision)
    small = replace(large, crop=min(97, large.crop), batch_size=min(4, large.batch_size))

    def row(
        name: str,
        setting: str,
        numerator: Callable,
        denominator: Callable,
        rounds: int,
        calls: int = 1,
    ) -> dict:
        ratio, low, high = compare(numerator, denominator, rounds, calls)
        print(f"{name:22} {ratio:.3f} ({low:.3f} to {high:.3f})  {setting}", flush=True)
        found = {"ratio": ratio, "low": low, "high": high}
        numbers = {key: f"{value:.3f}" for key, value in found.items()}
        return {"name": name, "setting": setting, **numbers}

    def full(profile: Profile) -> str:
        return (
            f"full width, {precision}, batch {profile.batch_size}, {profile.crop} x {profile.crop}"
        )

    residual = replace(quick, backbone="resnet18")
    settings = ((quick, "quick", 5), (residual, "quick, ResNet-18", 5), (small, full(small), 1))
    for profile, setting, calls in settings:
        case, how = Case(profile), (rounds, calls)
        by_hand, batched = case.minimal, case.minimal(batched=True)
        yield row("taylor_over_plain", setting, case.step("taylor"), case.step(), *how)
        yield row("cosprune_over_plain", setting, case.step("cosprune"), case.step(), *how)
        yield row("cosprune_over_minimal", setting, case.step("cosprune"), by_hand(), *how)
        yield row("batched_over_minimal", setting, batched, by_hand(), *how)
        fewer = quarter(case.architecture, profile.crop)
        narrow = case.step(architecture=fewer)
        yield row("quarter_over_dense", setting, narrow, case.step(), *how)
    case, setting, few = Case(large), full(large), min(rounds, 3)
    fewer = quarter(case.architecture, large.crop)
    yield row("quarter_over_dense", setting, case.step(architecture=fewer), case.step(), few)
    removed = removal(case, large.prune.filters_per_step)
    yield row("removal_over_plain", setting, removed, case.step(), few)
    case = Case(quick)
    for criterion in registry.names("criteria"):
        name = f"{criterion}_over_backward"
        yield row(name, "quick", *update(case, criterion), rounds, 5)
    compiled, seconds = case.compiled(backend)
    setting = f"quick, after {seconds:.0f} s of compiling"
    yield row("compiled_over_plain", setting, compiled, case.step(), rounds, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    as_in_a_batch()
    set_up(PROFILES["paper"], device_of(PROFILES["paper"]))
    rows = []
    for row in measure(rounds):
        rows.append(row | described())
        write_atomically(RESULTS / f"{machine()}.csv", csv_text(rows).encode())


if __name__ == "__main__":
    main()
