"""A complete iterative pruning run, timed removal by removal: make bench-run.

(PROFILE=paper on a GPU.) It starts from random weights, and is the run's own loop: down to the
floor, with one more stretch for each size that it lands on (`paper`: 42 removals and ten sizes).
Writes benchmarks/throughput/<profile>-<criterion>-<machine>.csv, one row per stretch between two
removals, as it comes: the network's size, the seconds of the stretch's first step (memory, and on a
GPU the choice of kernels for new shapes), steps per second of the others (augmentation and scoring
included), what that is of the processor's peak in the same precision, and the seconds of training,
of the removal before it (choosing included) and of its evaluations.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from ratios import Case, as_in_a_batch, machine
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from mtprune_utils import registry
from mtprune_utils.core import iterative
from mtprune_utils.core.evaluation import evaluate_with_recalibrated_bn
from mtprune_utils.core.model import Architecture, build, complexity, skeleton
from mtprune_utils.core.scoring import TASK_GRADIENTS, Scores
from mtprune_utils.core.signals import backward, task_backward
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.criteria import get_criterion
from mtprune_utils.files import write_atomically
from mtprune_utils.stages._training import device_of, set_up
from mtprune_utils.study.profiles import PROFILES

RESULTS = Path(__file__).parent / "throughput"


def peaks(
    device: torch.device,
    precision: str,
    tf32: bool = True,
    side: int | None = None,
    seconds: float = 1.0,
) -> dict[str, float]:
    """FLOP/s of a large matrix product and of a large 3x3 convolution, the best of some seconds.

    Neither is always the faster one. tf32: whether float32 computes in TF32, on a GPU. side: of the
    matrices; the convolution has an eighth of that in channels.
    """
    large, images = (8192, 32) if device.type == "cuda" else (2048, 1)
    side = side or large
    channels = side // 8
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, dtype=dtype)

    a, b = random(side, side), random(side, side)
    image, weight = (
        random(count, channels, size, size).contiguous(memory_format=torch.channels_last)
        for count, size in ((images, 64), (channels, 3))
    )
    calls = {
        "product": (lambda: a @ b, 2 * side**3),
        "convolution": (
            lambda: torch.conv2d(image, weight, padding=1),
            2 * images * 64**2 * weight.numel(),
        ),
    }
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = tf32
    found = {}
    for name, (call, flops) in calls.items():
        measured = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        call()  # kernels are chosen
        times = measured.blocked_autorange(min_run_time=seconds).times
        found[name] = flops / min(times)
    cuda.allow_tf32, cudnn.allow_tf32 = before
    return found


def step_flops(case: Case, architecture: Architecture, criterion: str | None) -> int:
    """Floating-point operations of a training step's convolutions, forward and backward.

    criterion: one that needs task gradients goes backward through the trunk once per task. Counted
    without weights. (The scores themselves take less than a thousandth.)
    """
    crop = case.profile.crop
    model = skeleton(architecture)
    by_task = criterion and get_criterion(criterion).needs == TASK_GRADIENTS
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        outputs = model(torch.empty(case.profile.batch_size, 3, crop, crop))
        losses = {task: output.sum() for task, output in outputs.items()}
        if by_task:
            task_backward(losses, model, model.trunk.parameters())
        else:
            backward(losses)
    return counter.get_total_flops()


def timed_run(
    case: Case,
    criterion: str,
    peak: float,
    written: Callable[[list[dict]], None] = lambda rows: None,
) -> pd.DataFrame:
    """One row per stretch between two removals; `written` is told all rows after each.

    peak: FLOP/s of the processor. The first removal's time is among the first stretch's.
    """
    profile, device = case.profile, case.dataset.train.image.device
    interval = profile.prune.prune_interval
    rows: list[dict] = []
    marks: list[tuple[float, float, float]] = []  # evaluation begins, ends; the run goes on
    first_steps: list[float] = []
    model = build(case.architecture, 0).to(device)
    before = model.architecture  # at the last mark

    class Timed(Trainer):
        def step(self, scores: list[Scores] = ()) -> None:
            first = self.step_count % interval == 0
            start = timer() if first else 0.0  # waits for a GPU, if there is one
            super().step(scores)
            if first:
                first_steps.append(timer() - start)

    def add(network: Architecture, train: float, removal: float, evaluation: float) -> None:
        rate = (interval - 1) / (train - first_steps[-1])
        flops = rate * step_flops(case, network, criterion)
        rows.append(
            {
                "removal": len(rows),
                **complexity(network, (profile.crop, profile.crop)),
                "steps": interval,
                "steps_per_second": rate,
                "flops_per_second": flops,
                "share_of_matrix_peak": flops / peak,
                "first_step_seconds": first_steps[-1],
                "train_seconds": train,
                "removal_seconds": removal,
                "evaluation_seconds": evaluation,
            }
        )
        written(rows)

    def measure(model: torch.nn.Module) -> dict[str, float]:
        """Called for the dense network, and then after each removal and each recovery."""
        nonlocal before
        begun = timer()
        metrics = evaluate_with_recalibrated_bn(model, case.dataset, case.dataset.test, profile)
        ended = timer()
        taken, last = ended - begun, marks[-1] if marks else None
        if len(marks) == 1:
            add(before, begun - last[2], 0.0, last[1] - last[0])
        elif marks and len(marks) % 2 == 0:
            removal = last[0] - marks[-2][2] if len(marks) > 2 else 0.0
            add(model.architecture, begun - last[2], removal, last[1] - last[0] + taken)
        before = model.architecture
        marks.append((begun, ended, timer()))
        return metrics

    with mock.patch.object(iterative, "Trainer", Timed):
        iterative.prune_iteratively(
            model, case.dataset, profile, profile.prune, criterion, 0, measure
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    criteria = registry.names("criteria")
    parser.add_argument("--criterion", default="cosprune", choices=criteria)
    options = parser.parse_args()
    as_in_a_batch()
    profile = PROFILES[options.profile]
    device = device_of(profile)
    set_up(profile, device)
    summary = {
        "torch": torch.__version__,
        "precision": profile.precision,
        "batch": profile.batch_size,
        "crop": profile.crop,
    }
    place = RESULTS / f"{profile.name}-{options.criterion}-{machine()}.csv"

    def written(rows: list[dict]) -> None:
        text = pd.DataFrame(rows).assign(**summary).to_csv(index=False, float_format="%.4g")
        write_atomically(place, text.encode())

    peak = max(peaks(device, profile.precision).values())
    table = timed_run(Case(profile, images=None), options.criterion, peak, written)
    print(table.round(3).to_string(index=False))
    minutes = table[["train_seconds", "removal_seconds", "evaluation_seconds"]].sum() / 60
    evaluated = f"{minutes['evaluation_seconds']:.1f} of them evaluation"
    print(f"in all {minutes.sum():.1f} minutes, {evaluated}; written to {place.name}")


if __name__ == "__main__":
    main()
