"""A complete iterative pruning run, timed removal by removal: make bench-run.

(PROFILE=paper on a GPU.) It starts from random weights, and is the run's own loop: down to the floor, with one more stretch
for each size that it lands on (`paper`: 42 removals and ten sizes). Writes
benchmarks/throughput/<profile>-<criterion>-<machine>.csv, one row per stretch between two removals:
the network's size, steps per second (augmentation and scoring included), what that is of the
processor's largest matrix products in the same precision, and the seconds of training, of the
removal before it (choosing included) and of its evaluations.
"""

import argparse
import gc
from pathlib import Path

import pandas as pd
import torch
from ratios import Case, as_in_a_batch, machine, scores_of
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from mtprune_utils import registry
from mtprune_utils.core.evaluation import evaluate_with_recalibrated_bn
from mtprune_utils.core.iterative import prune_iteratively
from mtprune_utils.core.model import Architecture, build
from mtprune_utils.files import write_atomically
from mtprune_utils.stages._training import device_of, set_up
from mtprune_utils.stages.retrain import widths_of
from mtprune_utils.study.profiles import PROFILES

RESULTS = Path(__file__).parent / "throughput"


def matrix_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a square matrix product, the best of two seconds.

    On a GPU, of float32 in TF32, as convolutions compute.
    """
    side = 2048
    if device.type == "cuda":
        side = 8192
        # The run, in which scores may not, is over.
        torch.backends.cuda.matmul.allow_tf32 = True
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    threads = torch.get_num_threads()
    product = Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads)
    return 2 * side**3 / min(product.blocked_autorange(min_run_time=2).times)


def step_flops(case: Case, architecture: Architecture, criterion: str) -> int:
    """Floating-point operations of a scored training step, forward and backward.

    Those of products of matrices and of convolutions.
    """
    gc.collect()  # the network before: a learning rate's schedule and its optimizer hold each other
    trainer = case.trainer(architecture)
    with FlopCounterMode(display=False) as counter:
        trainer.step([scores_of(criterion, trainer)])
    return counter.get_total_flops()


def timed_run(case: Case, criterion: str) -> pd.DataFrame:
    """One row per stretch between two removals.

    The first removal's time is among the first stretch's.
    """
    profile, device = case.profile, case.dataset.train.image.device
    marks = []  # when each evaluation began and ended

    def measure(model: torch.nn.Module) -> dict[str, float]:
        begun = timer()  # each waits for a GPU, if there is one
        test = case.dataset.test
        metrics = evaluate_with_recalibrated_bn(model, case.dataset, test, profile)
        marks.append((begun, timer()))
        return metrics

    model = build(case.architecture, 0).to(device)
    evaluations, _ = prune_iteratively(
        model, case.dataset, profile, profile.prune, criterion, 0, measure
    )
    # Evaluations come in pairs, after a removal and after the recovery; the dense network's alone.
    before, after = [marks[0], *marks[1::2]], [*marks[1:2], *marks[2::2]]
    table = pd.DataFrame([row for row in evaluations if row["phase"] != "removed"])
    table = table[["removal", "filters", "parameters", "macs", "widths"]]
    train = [end[0] - start[1] for start, end in zip(before, after, strict=True)]
    table["steps_per_second"] = profile.prune.prune_interval / pd.Series(train)
    networks = [case.architecture.with_widths(widths_of(text)) for text in table.pop("widths")]
    flops = pd.Series([step_flops(case, network, criterion) for network in networks])
    table["flops_per_second"] = flops * table["steps_per_second"]
    peak = matrix_peak(device, profile.precision)
    table["share_of_matrix_peak"] = table["flops_per_second"] / peak
    table["train_seconds"] = train
    removals = (end[0] - start[1] for start, end in zip(marks[2::2], marks[3::2]))
    table["removal_seconds"] = [0, 0, *removals]
    evaluated = [end - begun for begun, end in marks]
    pairs = zip(evaluated[1::2], evaluated[2::2], strict=True)
    table["evaluation_seconds"] = [evaluated[0], *map(sum, pairs)]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    criteria = registry.names("criteria")
    parser.add_argument("--criterion", default="cosprune", choices=criteria)
    options = parser.parse_args()
    as_in_a_batch()
    profile = PROFILES[options.profile]
    set_up(profile, device_of(profile))
    table = timed_run(Case(profile, images=None), options.criterion)
    summary = {
        "torch": torch.__version__, "precision": profile.precision, "batch": profile.batch_size,
        "crop": profile.crop,
    }
    place = RESULTS / f"{profile.name}-{options.criterion}-{machine()}.csv"
    text = table.assign(**summary).to_csv(index=False, float_format="%.4g")
    write_atomically(place, text.encode())
    print(table.round(3).to_string(index=False))
    minutes = table[["train_seconds", "removal_seconds", "evaluation_seconds"]].sum() / 60
    evaluated = f"{minutes['evaluation_seconds']:.1f} of them evaluation"
    print(f"in all {minutes.sum():.1f} minutes, {evaluated}; written to {place.name}")


if __name__ == "__main__":
    main()
