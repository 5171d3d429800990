"""Speed as ratios, each measured side by side in one run: make bench.

Writes benchmarks/results/<machine>.csv, one row per ratio: the median over rounds of numerator over denominator (timed one
after the other within a round, so that other load on the machine meets both), and the 10th and 90th percentile over rounds.
"""

import argparse
import gc
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.benchmark import Timer, timer

from mtprune_utils import stages
from mtprune_utils.batch import ENVIRONMENT
from mtprune_utils.criteria import Scores
from mtprune_utils.data import augment, load_dataset
from mtprune_utils.files import csv_text, write_atomically
from mtprune_utils.gradients import laid_out_like
from mtprune_utils.inference import device_name
from mtprune_utils.models import Architecture, build, complexity
from mtprune_utils.profiles import PROFILES, Profile
from mtprune_utils.pruning import Pruner, select_filters
from mtprune_utils.tasks import task_losses
from mtprune_utils.training import Trainer, forward

RESULTS = Path(__file__).parent / "results"


def as_in_a_batch() -> None:
    """Start this script anew with the environment of a batch's jobs, unless it has it: memory is set up as a process begins."""
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)


def machine() -> str:
    """A name for the kind of machine, not for this one."""
    if torch.cuda.is_available():
        name = device_name("cuda")
    else:  # of processors that go by the same name, some compute twice as many numbers at once
        name = f"{device_name('cpu')} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def compare(numerator: Callable, denominator: Callable, rounds: int, calls: int = 1) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile over rounds of the ratio of their times, so many calls each; two more warm each up."""
    gc.collect()  # the networks compared before: a learning rate's schedule and its optimizer hold each other
    threads = torch.get_num_threads()
    above, below = (Timer("call()", globals={"call": call}, num_threads=threads) for call in (numerator, denominator))
    ratios = [above.timeit(calls).mean / below.timeit(calls).mean for _ in range(rounds)]
    return tuple(torch.tensor(ratios).quantile(torch.tensor([0.5, 0.1, 0.9])).tolist())


class Case:
    """A network that trains on rooms, as a profile does."""

    def __init__(self, profile: Profile, images: int | None = 64):
        self.profile = profile
        dataset = load_dataset("rooms", "", images, images and 16)
        self.dataset = dataset.resized_for_evaluation(profile.crop).to(stages.device_of(profile))
        self.architecture = profile.architecture({name: task.channels for name, task in self.dataset.tasks.items()})

    def trainer(self, architecture: Architecture | None = None) -> Trainer:
        model = build(architecture or self.architecture, 0).to(self.dataset.train.image.device).train()
        return Trainer(model, self.dataset, self.profile, self.profile.dense, 10_000, 0)

    def step(self, criterion: str | None = None, architecture: Architecture | None = None) -> Callable:
        trainer = self.trainer(architecture)
        scores = [Scores(criterion, trainer.model.layers)] if criterion else []
        return lambda: trainer.step(scores)

    def compiled(self) -> tuple[Callable, float]:
        """A plain step under torch.compile, and the seconds that the first one takes."""
        trainer = self.trainer()
        trainer.model = torch.compile(trainer.model)
        start = timer()
        with torch.compiler.config.patch(force_disable_caches=True):  # else the next benchmark finds this one's work
            trainer.step()
        return trainer.step, timer() - start

    def minimal(self, batched: bool = False) -> Callable:
        """The least work that CosPrune needs, by hand: a minibatch, one forward pass, one backward per task, the optimizer.

        batched: the backbone's backward passes as one call, which autograd vectorises (`is_grads_batched`).
        """
        trainer, profile = self.trainer(), self.profile
        model, tasks = trainer.model, trainer.tasks
        backbone = list(model.backbone.parameters())

        def step() -> None:
            images, targets = augment(
                next(trainer.batches), tasks, profile.image_height, profile.crop, profile.scale, profile.depth_follows_scale,
                trainer.generator, trainer.mirror, profile.stride,
            )
            features = forward(model.backbone, images, profile)
            outputs = {task: forward(head, features, profile).float() for task, head in model.heads.items()}
            at_features = []
            for task, loss in task_losses(tasks, outputs, targets).items():
                head = list(model.heads[task].parameters())
                gradient, *grads = torch.autograd.grad(loss, [features, *head])
                at_features.append(gradient)
                for parameter, grad in zip(head, grads):
                    parameter.grad = grad
            if batched:
                stacked = torch.autograd.grad(features, backbone, torch.stack(at_features), is_grads_batched=True)
                total = [grads.sum(0) for grads in stacked]
            else:
                *earlier, last = at_features
                by_task = [torch.autograd.grad(features, backbone, gradient, retain_graph=True) for gradient in earlier]
                by_task.append(torch.autograd.grad(features, backbone, last))
                total = [sum(grads) for grads in zip(*by_task)]
            for parameter, grad in zip(backbone, total):
                parameter.grad = laid_out_like(parameter, grad)
            trainer.optimizer.step()

        return step


def removal(case: Case, filters: int) -> Callable:
    """Choose and remove so many filters. Each call has fewer left, as in a run."""
    trainer = case.trainer()
    pruner = Pruner(trainer.model)
    trainer.step()
    generator = torch.Generator().manual_seed(0)

    def remove() -> None:
        scores = [torch.rand(layer.conv.out_channels, generator=generator) for layer in trainer.model.layers]
        pruner.remove(select_filters(scores, filters, floor=5), trainer.optimizer)

    return remove


def quarter(architecture: Architecture, crop: int) -> Architecture:
    """Equal shares of every layer, so many that a quarter of the multiply-accumulates is left."""
    dense = complexity(architecture, (crop, crop))["macs"]

    def narrowed(share: float) -> Architecture:
        return replace(architecture, widths=tuple(max(1, round(share * width)) for width in architecture.widths))

    shares = [i / 256 for i in range(8, 257)]
    return min(map(narrowed, shares), key=lambda a: abs(complexity(a, (crop, crop))["macs"] / dense - 0.25))


def measure(rounds: int) -> Iterator[dict]:
    """One row after the other, so that none is lost if a later one fails."""
    paper, quick = PROFILES["paper"], PROFILES["quick"]
    precision = "bf16" if torch.cuda.is_available() else "float32"  # few CPUs have arithmetic for bf16
    large = replace(paper, pretrained=False, precision=precision)
    small = replace(large, crop=97, batch_size=4)

    def row(name: str, setting: str, numerator: Callable, denominator: Callable, rounds: int, calls: int = 1) -> dict:
        ratio, low, high = compare(numerator, denominator, rounds, calls)
        print(f"{name:22} {ratio:.3f} ({low:.3f} to {high:.3f})  {setting}", flush=True)
        return {"name": name, "setting": setting, "ratio": f"{ratio:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}"}

    for profile, setting, calls in ((quick, "quick", 5), (small, f"full width, {precision}, batch 4, 97 x 97", 1)):
        case = Case(profile)
        yield row("taylor_over_plain", setting, case.step("taylor"), case.step(), rounds, calls)
        yield row("cosprune_over_plain", setting, case.step("cosprune"), case.step(), rounds, calls)
        yield row("cosprune_over_minimal", setting, case.step("cosprune"), case.minimal(), rounds, calls)
        yield row("batched_over_minimal", setting, case.minimal(batched=True), case.minimal(), rounds, calls)
        fewer = quarter(case.architecture, profile.crop)
        yield row("quarter_over_dense", setting, case.step(architecture=fewer), case.step(), rounds, calls)
    case, setting, few = Case(large), f"full width, {precision}, batch 16, 321 x 321", min(rounds, 3)
    fewer = quarter(case.architecture, large.crop)
    yield row("quarter_over_dense", setting, case.step(architecture=fewer), case.step(), few)
    yield row("removal_over_plain", setting, removal(case, 100), case.step(), few)
    case = Case(quick)
    compiled, seconds = case.compiled()
    yield row("compiled_over_plain", f"quick, after {seconds:.0f} s of compiling", compiled, case.step(), rounds, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error("--rounds must be at least 1")
    as_in_a_batch()
    stages.set_up(PROFILES["paper"], stages.device_of(PROFILES["paper"]))
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    more = {"machine": machine(), "threads": torch.get_num_threads(), **versions}
    rows = []
    for row in measure(rounds):
        rows.append(row | more)
        write_atomically(RESULTS / f"{machine()}.csv", csv_text(rows).encode())


if __name__ == "__main__":
    main()
