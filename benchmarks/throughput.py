"""A complete iterative pruning run, timed removal by removal: make bench-run (PROFILE=paper on a GPU).

It starts from random weights, and is the run's own loop: down to the floor, with one more stretch for each size that it
lands on (`paper`: 42 removals and ten sizes). Writes benchmarks/throughput/<profile>-<criterion>-<machine>.csv, one row per
stretch between two removals: the network's size, steps per second (augmentation and scoring included), what that is of the
processor's largest matrix products in the same precision, and the seconds of training, of the removal before it (choosing
included) and of its evaluations.
"""

import argparse
import gc
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from ratios import Case, as_in_a_batch, machine
from torch.utils.benchmark import Timer, timer
from torch.utils.flop_counter import FlopCounterMode

from mtprune_utils import stages, training
from mtprune_utils.criteria import CRITERIA, Scores
from mtprune_utils.files import write_atomically
from mtprune_utils.models import Architecture, build
from mtprune_utils.profiles import PROFILES

RESULTS = Path(__file__).parent / "throughput"


def matrix_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a square matrix product, the best of two seconds. On a GPU, of float32 in TF32, as convolutions compute."""
    side = 2048
    if device.type == "cuda":
        side = 8192
        torch.backends.cuda.matmul.allow_tf32 = True  # the run, in which scores may not, is over
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    product = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / min(product.blocked_autorange(min_run_time=2).times)


def step_flops(case: Case, architecture: Architecture, criterion: str) -> int:
    """Floating-point operations of a scored training step: products of matrices and convolutions, forward and backward."""
    gc.collect()  # the network before: a learning rate's schedule and its optimizer hold each other
    trainer = case.trainer(architecture)
    with FlopCounterMode(display=False) as counter:
        trainer.step([Scores(criterion, trainer.model.layers)])
    return counter.get_total_flops()


def timed_run(case: Case, criterion: str) -> pd.DataFrame:
    """One row per stretch between two removals; the first removal's time is among the first stretch's."""
    profile, device = case.profile, case.dataset.train.image.device
    marks = []  # when each evaluation began and ended

    def measure(model: torch.nn.Module) -> dict[str, float]:
        begun = timer()  # each waits for a GPU, if there is one
        metrics = training.evaluate_afresh(model, case.dataset, case.dataset.test, profile)
        marks.append((begun, timer()))
        return metrics

    model = build(case.architecture, 0).to(device)
    evaluations, _ = training.prune_iteratively(model, case.dataset, profile, profile.prune, criterion, 0, measure)
    # Evaluations come in pairs, after a removal and after the recovery; the dense network's is alone.
    before, after = [marks[0], *marks[1::2]], [*marks[1:2], *marks[2::2]]
    table = pd.DataFrame([row for row in evaluations if row["phase"] != "removed"])
    table = table[["removal", "filters", "parameters", "macs", "widths"]]
    train = [end[0] - start[1] for start, end in zip(before, after, strict=True)]
    table["steps_per_second"] = profile.prune.every / pd.Series(train)
    architectures = [replace(case.architecture, widths=tuple(map(int, widths.split()))) for widths in table.pop("widths")]
    flops = pd.Series([step_flops(case, architecture, criterion) for architecture in architectures])
    table["flops_per_second"] = flops * table["steps_per_second"]
    table["share_of_matrix_peak"] = table["flops_per_second"] / matrix_peak(device, profile.precision)
    table["train_seconds"] = train
    table["removal_seconds"] = [0, 0, *(end[0] - start[1] for start, end in zip(marks[2::2], marks[3::2]))]
    evaluated = [end - begun for begun, end in marks]
    table["evaluation_seconds"] = [evaluated[0], *(sum(pair) for pair in zip(evaluated[1::2], evaluated[2::2], strict=True))]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    parser.add_argument("--criterion", default="cosprune", choices=CRITERIA)
    options = parser.parse_args()
    as_in_a_batch()
    profile = PROFILES[options.profile]
    stages.set_up(profile, stages.device_of(profile))
    table = timed_run(Case(profile, images=None), options.criterion)
    summary = {"torch": torch.__version__, "precision": profile.precision, "batch": profile.batch_size, "crop": profile.crop}
    place = RESULTS / f"{profile.name}-{options.criterion}-{machine()}.csv"
    write_atomically(place, table.assign(**summary).to_csv(index=False, float_format="%.4g").encode())
    print(table.round(3).to_string(index=False))
    minutes = table[["train_seconds", "removal_seconds", "evaluation_seconds"]].sum() / 60
    print(f"in all {minutes.sum():.1f} minutes, {minutes['evaluation_seconds']:.1f} of them evaluation; written to {place.name}")


if __name__ == "__main__":
    main()
