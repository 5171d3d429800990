"""What one GPU says in a quarter of an hour: make gpu.

Writes tables into benchmarks/results/<machine>/, row by row. A part that was finished in an earlier
call is skipped, and no part is begun that would not fit into --minutes. In this order:

steps     training steps per second at the paper's scale, by network, criterion and precision
run-...   a complete iterative run of each criterion, between removals as many steps as time allows
ratios    those of `make bench`, in few rounds
scores    what bf16 and TF32 change in the ranking of filters
latency   of pruned networks at inference
checks    repeating to the bit, checkpoints, from GPU to CPU, the stages, and who waits for the GPU

parts.csv says how each ended. The exit status is 1 if one failed.
"""

import argparse
import copy
import gc
import math
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import pandas as pd
import ratios
import torch
from ratios import RESULTS, Case, as_in_a_batch, described, machine, scores_of
from scores import agreement, still_scores
from throughput import peaks, step_flops, timed_run
from torch.utils.benchmark import Timer, timer

from mtprune_utils.core.checkpoints import pack, unpack
from mtprune_utils.core.iterative import removal_plan
from mtprune_utils.core.model import (
    Architecture,
    build,
    complexity,
    evaluation_mode,
    load_model,
    model_bytes,
    plan_of,
)
from mtprune_utils.core.scoring import Scores
from mtprune_utils.core.selection import select
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.files import PACKAGE, csv_text, read_table, write_atomically
from mtprune_utils.stages._training import device_of, set_up
from mtprune_utils.study.execute import execute
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.latency import cuda_peak_bytes, latency, rounded_up
from mtprune_utils.study.profiles import get_profile

# The paper's published widths of a network with 23.7M parameters: few are multiples of eight.
FOUND = (36, 60, 119, 123, 248, 252, 247, 494, 492, 439, 318, 175, 21)
STEPS = {"plain": None, "taylor": "taylor", "cosprune": "cosprune"}
SMALL = {  # the same network and code in a second or two, wherever
    "width": 1 / 16,
    "head_width": 16,
    "crop": 32,
    "image_height": 48,
    "batch_size": 2,
    "train_images": 64,
    "test_images": 8,
    "pretrained": False,
    "prune.prune_interval": 4,
    "prune.filters_per_step": 60,
    "prune.cosine_batches": 1,
    "sizes": [0.9],
    "controls.levels": [0],
}
# Enough for a GPU's kernels to be those of large networks: what checks are made on.
CHECKED = {"width": 1 / 4, "head_width": 256, "crop": 160, "image_height": 240, "batch_size": 8}
NO_SEARCH = {"tuning.trials": 0}  # which takes a package that a bare machine has not
TUNING = 2.5  # seconds that each new network may cost a run beside its steps
TEST_IMAGES = 32  # of the 654 that an evaluation of the paper's data would take


class Cut(Exception):
    """Time is up; what was measured is written down."""


@dataclass
class Session:
    """One call: its time, its numbers and its tables."""

    folder: Path
    minutes: float
    rehearse: bool
    begun: float = field(default_factory=time.monotonic)
    until: float = 0.0  # so many seconds of the budget are left to later parts

    def __post_init__(self):
        self.small = get_profile("paper", SMALL if self.rehearse else SMALL | CHECKED)
        whole = get_profile("paper", {"pretrained": False})
        self.paper = self.small if self.rehearse else whole
        self.quick = get_profile("smoke" if self.rehearse else "quick")
        self.device = device_of(self.paper)
        self.backend = "eager" if self.rehearse else "inductor"
        self.seconds = 0.01 if self.rehearse else 0.6  # spent on each number, or more
        self.side = 128 if self.rehearse else None  # of the matrices whose product is the peak

    def left(self) -> float:
        """Seconds of the call's budget."""
        return 60 * self.minutes - (time.monotonic() - self.begun)

    def allow(self, minutes: float) -> None:
        """The part that begins may take so long."""
        self.until = self.left() - 60 * minutes

    def check(self) -> None:
        """Raises Cut if the part, or the call, has no time left."""
        if self.left() < max(self.until, 0):
            raise Cut("no time left")

    def table(self, name: str) -> "Table":
        return Table(self.folder / f"{name}.csv")


class Table:
    """Rows on disk, those of an earlier call included; written and printed as they come."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = read_table(path) if path.exists() else []

    def find(self, **key: object) -> dict | None:
        """The first row with these values."""
        wanted = {name: str(value) for name, value in key.items()}
        return next((row for row in self.rows if self._key(row, wanted) == wanted), None)

    def add(self, row: dict) -> None:
        """Append a row; floats with four digits."""
        self.replace([*self.rows, row])

    def replace(self, rows: list[dict]) -> None:
        self.rows = [
            {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()}
            for row in rows
        ]
        write_atomically(self.path, csv_text(self.rows).encode())
        shown = [v for k, v in self.rows[-1].items() if k not in ("machine", "threads", "python")]
        print(f"{self.path.stem}: {' | '.join(shown)}", flush=True)

    @staticmethod
    def _key(row: dict, names) -> dict:
        return {name: row[name] for name in names}


def networks(dense: Architecture) -> dict[str, Architecture]:
    full = plan_of(dense).full_widths.values()
    widths = dense.width_list
    found = [max(1, round(f * w / most)) for f, w, most in zip(FOUND, widths, full, strict=True)]
    return {
        "dense": dense,
        "half": dense.narrowed(0.5),
        "floor": dense.with_widths([5] * len(widths)),
        "found": dense.with_widths(found),
        "rounded up": dense.with_widths(list(rounded_up(found, dense, 8))),
    }


def measured(call: Callable[[], object], seconds: float) -> tuple[float, list[float]]:
    """Seconds of the first call, and of a call in each of three rounds, sorted.

    Calls follow each other without waiting for the GPU within a round, as in training.
    """
    start = timer()
    call()
    first = timer() - start
    clock = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    calls = max(2, math.ceil(seconds / 3 / clock.timeit(2).mean))
    return first, sorted(clock.timeit(calls).mean for _ in range(3))


@contextmanager
def computing(tf32: bool = True, tuned: bool = True) -> Iterator[None]:
    """Convolutions in TF32 or not; kernels chosen by trial or by cuDNN's rule."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, cudnn.benchmark = tf32, tuned
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


# --- steps ---


def step_of(
    case: Case, criterion: str | None, network: Architecture, layout: str
) -> Callable[[], None]:
    trainer = case.trainer(network)
    if layout == "contiguous":  # which training is not, otherwise
        trainer.model.to(memory_format=torch.contiguous_format)
        trainer.model.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    scores = [scores_of(criterion, trainer)] if criterion else []
    return lambda: trainer.step(scores)


def steps(session: Session) -> None:
    table = session.table("steps")
    last, whole, three = "channels-last", tuple(STEPS), ("dense", "half", "floor")
    every = (*three, "found", "rounded up")
    if session.rehearse:
        three, every, whole = ("dense",), ("dense",), ("cosprune",)
    plan = [  # by value: what time does not reach is left out
        ("bf16", last, "tuned", every, whole),
        ("TF32", last, "tuned", three, whole),
        ("bf16", last, "by rule", every, ("cosprune",)),
        ("bf16", last, "compiled", ("dense",), ("plain",)),
        ("bf16", "contiguous", "tuned", three, whole),
        ("TF32", last, "compiled", ("dense",), ("plain",)),
        ("TF32", "contiguous", "tuned", three, whole),
        ("float32", last, "tuned", three, whole),
        ("float32", "contiguous", "tuned", three, whole),
    ]
    keys = [
        {
            "network": network,
            "step": kind,
            "precision": precision,
            "layout": layout,
            "kernels": kernels,
        }
        for precision, layout, kernels, which, kinds in plan
        for network in which
        for kind in kinds
    ]
    case_of = cache(lambda arithmetic: Case(replace(session.paper, precision=arithmetic)))
    flops_of = cache(
        lambda network, kind: step_flops(
            case_of("float32"), networks(case_of("float32").architecture)[network], STEPS[kind]
        )
    )
    peaks_of = cache(
        lambda precision: peaks(
            session.device,
            arithmetic_of(precision),
            precision != "float32",
            session.side,
            session.seconds,
        )
    )
    for key in keys:
        if table.find(**key):
            continue
        session.check()
        precision, case = key["precision"], case_of(arithmetic_of(key["precision"]))
        with computing(precision != "float32", key["kernels"] != "by rule"):
            found, best = timed_step(session, case, key), peaks_of(precision)
        done = flops_of(key["network"], key["step"]) * found["steps_per_second"]
        shares = {
            "tflops_per_second": done / 1e12,
            "share_of_matrix_peak": done / max(best.values()),
            "product_tflops": best["product"] / 1e12,
            "convolution_tflops": best["convolution"] / 1e12,
        }
        rates = {name: found.pop(name) for name in ("steps_per_second", "low", "high")}
        table.add(key | rates | shares | found | described())


def arithmetic_of(precision: str) -> str:
    """The profile's precision; TF32 is a switch of the GPU's."""
    return "bf16" if precision == "bf16" else "float32"


def timed_step(session: Session, case: Case, key: dict[str, str]) -> dict[str, float]:
    """Steps per second (median, low, high), seconds of the first, and the GPU's memory."""
    gc.collect()  # a learning rate's schedule and its optimizer hold each other
    gpu = session.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    if key["kernels"] == "compiled":
        step, compiling = case.compiled(session.backend)
    else:
        network = networks(case.architecture)[key["network"]]
        step, compiling = step_of(case, STEPS[key["step"]], network, key["layout"]), 0.0
    first, times = measured(step, session.seconds)
    memory = torch.cuda.max_memory_allocated() / 2**30 if gpu else math.nan
    return {
        "steps_per_second": 1 / times[1],
        "low": 1 / times[2],
        "high": 1 / times[0],
        "first_seconds": first + compiling,
        "peak_gib": memory,
    }


# --- a complete run ---


def interval_for(session: Session, criterion: str, seconds: float, stretches: int) -> int:
    """As many steps between removals as fit into so many seconds, at most the profile's.

    The smaller networks on the way take, on average, what lies halfway from dense to floor.
    """
    settings, table = session.paper.prune, session.table("steps")
    key = {"step": criterion, "precision": "bf16", "layout": "channels-last", "kernels": "tuned"}
    rows = [table.find(network=network, **key) for network in ("dense", "floor")]
    times = [1 / float(row["steps_per_second"]) for row in rows if row]
    step = sum(times) / len(times) if times else 0.03
    fit = int((seconds / stretches - TUNING) / step)
    return min(max(fit, 40), settings.prune_interval)


def run(session: Session, criterion: str, seconds: float) -> None:
    settings = session.paper.prune
    table = session.table(f"run-{criterion}")
    dense = Case(session.paper).architecture
    plan = removal_plan(dense.width_list, settings)
    stretches = len(plan) + len(session.paper.sizes) + 1
    whole = settings.prune_interval
    interval = interval_for(session, criterion, seconds, stretches)
    profile = replace(session.paper, prune=replace(settings, prune_interval=interval))
    print(f"run of {criterion}: {stretches} stretches of {interval} steps", flush=True)

    def written(rows: list[dict]) -> None:
        table.replace(
            [
                row
                | {
                    "seconds_in_full": row["first_step_seconds"]
                    + (whole - 1) / row["steps_per_second"]
                    + row["removal_seconds"]
                    + row["evaluation_seconds"],
                    "steps_in_full": whole,
                    "precision": profile.precision,
                    "batch": profile.batch_size,
                    "crop": profile.crop,
                    "test_images": len(case.dataset.test),
                }
                | described()
                for row in rows
            ]
        )
        if len(rows) < stretches:
            session.check()

    images = 64 if session.rehearse else None
    case = Case(profile, images, test_images=8 if session.rehearse else TEST_IMAGES)
    peak = max(peaks(session.device, profile.precision, side=session.side).values())
    found = timed_run(case, criterion, peak, written)
    total = sum(float(row["seconds_in_full"]) for row in table.rows) / 60
    took = found[["train_seconds", "removal_seconds", "evaluation_seconds"]].sum().sum() / 60
    full = f"with {whole} steps each {total:.2f}"
    print(f"run of {criterion}: {took:.2f} minutes; {full}", flush=True)


# --- ratios, scores, latency ---


def all_ratios(session: Session) -> None:
    table, rows = session.table("ratios"), []
    rounds = 1 if session.rehearse else 3
    for row in ratios.measure(rounds, session.paper, session.quick, session.backend):
        rows.append(row | described())
        table.replace(rows)
        session.check()


def all_scores(session: Session) -> None:
    """Of a network that has learnt for a while; dropout would draw other masks in bf16."""
    table = session.table("scores")
    profile = replace(session.paper, dropout=0.0)
    warmup, batches = (3, 3) if session.rehearse else (150, 40)
    case = Case(profile, images=64 if session.rehearse else None, test_images=8)
    trainer = case.trainer()
    for _ in range(warmup):
        trainer.step()
    trainer.check()
    model = trainer.model
    for criterion in ("cosprune", "taylor"):

        def scores(precision: str, tf32: bool, seed: int) -> list[torch.Tensor]:
            session.check()
            with computing(tf32):
                other = replace(profile, precision=precision)
                return still_scores(model, case.dataset, other, criterion, batches, seed)

        exact, fast = scores("float32", False, 0), scores("float32", True, 0)
        others = {
            "TF32 against float32": (fast, exact),
            "bf16 against float32": (scores("bf16", True, 0), exact),
            "other minibatches, TF32": (scores("float32", True, 1), fast),
        }
        for name, (found, reference) in others.items():
            shares = agreement(profile.prune, found, reference)
            how = {"batches": batches, "steps_before": warmup}
            table.add({"criterion": criterion, "comparison": name, **shares, **how} | described())


def all_latencies(session: Session) -> None:
    table, profile = session.table("latency"), session.paper
    dense = Case(profile).architecture
    gpu, size = session.device.type == "cuda", (profile.crop, profile.crop)
    several = networks(dense) | {"a quarter": dense.narrowed(0.25)}
    for name, network in several.items():
        built = build(network, 0).eval().to(session.device)
        built = built.to(memory_format=torch.channels_last)
        for precision, dtype in (("bf16", torch.bfloat16), ("TF32", torch.float32)):
            for batch in (1, 16):
                setting = {"precision": precision, "batch": batch}
                if table.find(network=name, **setting):
                    continue
                session.check()
                model = copy.deepcopy(built).to(dtype)
                images = torch.rand(batch, 3, *size, device=session.device, dtype=dtype)
                images = images.contiguous(memory_format=torch.channels_last)
                with torch.inference_mode():
                    milliseconds = 1000 * latency(partial(model, images), session.seconds)
                reference = table.find(network="dense", **setting)
                slowest = float(reference["milliseconds"]) if reference else milliseconds
                peak = cuda_peak_bytes(model, images) / 2**20 if gpu else math.nan
                table.add(
                    {"network": name, **setting}
                    | complexity(network, size)
                    | {
                        "milliseconds": milliseconds,
                        "speedup": slowest / milliseconds,
                        "peak_mib": peak,
                    }
                    | described()
                )


# --- checks ---


def trained(
    session: Session, criterion: str, count: int = 20, every: int = 8
) -> tuple[Trainer, list[Scores]]:
    """A small network after so many steps, with a removal after every eighth."""
    torch.manual_seed(0)  # dropout
    case = Case(session.small)
    trainer = case.trainer()
    scores = [scores_of(criterion, trainer)]
    for step in range(count):
        trainer.step(scores)
        if step % every == every - 1:
            chosen = select(scores[0].mean(), session.small.prune.filters_per_step, floor=5)
            trainer.model.remove(chosen, trainer.optimizer)
            scores = [scores_of(criterion, trainer)]
    trainer.check()
    return trainer, scores


def equal(one: Trainer, other: Trainer) -> None:
    """Raises AssertionError, with what differs first, unless weights and losses have equal bits."""
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), f"{name} differs"
    for task, losses in one.losses.items():
        pairs = zip(losses, other.losses[task], strict=True)
        different = [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
        assert not different, f"the loss of {task} differs first at step {different[0] + 1}"


@contextmanager
def deterministic(session: Session) -> Iterator[list[str]]:
    """With `deterministic` on. Gives the operations that torch says are not, once it is over."""
    named: list[str] = []
    set_up(replace(session.small, deterministic=True), session.device)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield named
    finally:
        set_up(session.paper, session.device)
    texts = {str(warning.message).split(" does not have")[0] for warning in caught}
    named += sorted(text[:120] for text in texts)


def check_training(session: Session) -> str:
    found = []
    for criterion in ("taylor", "cosprune"):
        trainer, _ = trained(session, criterion)
        left, losses = trainer.model.architecture.filters, trainer.mean_losses()
        removed = sum(Case(session.small).architecture.width_list) - left
        assert removed == 2 * session.small.prune.filters_per_step, f"{removed} filters went"
        found.append(f"{criterion} {left} filters, loss {sum(losses.values()):.3f}")
    return "; ".join(found)


def check_repeats(session: Session, criterion: str) -> str:
    with deterministic(session) as named:
        equal(*(trained(session, criterion)[0] for _ in range(2)))
    return f"equal bits; warned of: {', '.join(named) or 'nothing'}"


def check_restored(session: Session) -> str:
    """A run goes on from its checkpoint to the same bits."""
    with deterministic(session), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        one, scores = trained(session, "cosprune", 12)
        state = {"trainer": one.state(), "scores": scores[0].state()}
        path.write_bytes(pack(state))
        other = Case(session.small).trainer()
        now, dense = one.model.architecture.width_list, other.model.architecture.width_list
        gone = [torch.arange(most - width) for most, width in zip(dense, now)]
        other.model.remove(gone, other.optimizer)
        restored = [scores_of("cosprune", other)]
        for _ in range(4):
            one.step(scores)
        state = unpack(path)
        other.restore(state["trainer"])
        restored[0].restore(state["scores"])
        for _ in range(4):
            other.step(restored)
        equal(one, other)
        for a, b in zip(scores[0].mean(), restored[0].mean()):
            assert torch.equal(a, b), "scores differ"
    return "equal bits"


def check_loaded_on_cpu(session: Session) -> str:
    """What was trained here predicts the same there, in float32."""
    model = trained(session, "taylor")[0].model
    size = session.small.crop
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), computing(tf32=False):
        path = Path(folder) / "model.safetensors"
        path.write_bytes(model_bytes(model))
        loaded = load_model(path)
        with evaluation_mode(model):
            there = model(images.to(session.device))
        here = loaded(images)
    found = []
    for task, output in here.items():
        off = (output - there[task].cpu()).abs().max() / output.abs().max()
        assert off < 1e-4, f"{task} is off by {off:.1e}"
        found.append(f"{task} {off:.1e}")
    return "relative difference: " + ", ".join(found)


def check_stages(session: Session) -> str:
    """The package's own runs, dense and pruned, from settings to tables."""
    with tempfile.TemporaryDirectory() as folder:
        pruning = Experiment.open("smoke", "rooms", "", folder, NO_SEARCH).prune("cosprune", 0)
        execute(pruning, lambda line: None)
        rows = len(pd.read_csv(pruning.path("evaluations.csv")))
    set_up(session.paper, session.device)
    return f"{rows} evaluations"


def check_waiting(session: Session) -> str:
    """Which lines of ours make the host wait for the GPU within a step: none should."""
    if session.device.type != "cuda":
        return "no GPU"
    places: dict[str, int] = {}

    def note(message, *_, **__) -> None:
        if "called a synchronizing" not in str(message):
            return
        frames = traceback.extract_stack()
        ours = [frame for frame in frames if PACKAGE.name in Path(frame.filename).parts]
        frame = (ours or frames)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        places[place] = places.get(place, 0) + 1

    for criterion in STEPS.values():
        step = Case(session.small).step(criterion)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert not places, f"waits at {places}"
    return "no waiting"


def checks(session: Session) -> None:
    table = session.table("checks")
    table.rows = []
    all_checks = {
        "20 steps and two removals": check_training,
        "waiting for the GPU": check_waiting,
        "taylor repeats": partial(check_repeats, criterion="taylor"),
        "cosprune repeats": partial(check_repeats, criterion="cosprune"),
        "a checkpoint is gone on from": check_restored,
        "trained here, loaded on the CPU": check_loaded_on_cpu,
        "the stages": check_stages,
    }
    for name, check in all_checks.items():
        session.check()
        start = time.monotonic()
        try:
            outcome, detail = "holds", check(session)
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            outcome, detail = "FAILS", one_line(error)
        seconds = time.monotonic() - start
        table.add(
            {"check": name, "outcome": outcome, "detail": detail, "seconds": seconds} | described()
        )
    failed = [row["check"] for row in table.rows if row["outcome"] == "FAILS"]
    if failed:
        raise AssertionError(f"failed: {', '.join(failed)}")


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


# --- all of it ---

# Minutes on an H100: what a part needs at least before it is begun.
PARTS = {
    "steps": (steps, 3.0),
    "run-taylor": (partial(run, criterion="taylor"), 2.5),
    "run-cosprune": (partial(run, criterion="cosprune"), 3.0),
    "ratios": (all_ratios, 2.0),
    "scores": (all_scores, 1.0),
    "latency": (all_latencies, 0.7),
    "checks": (checks, 1.2),
}


def perform(session: Session, names: list[str]) -> bool:
    """Do the parts of these names that are not finished. Returns whether none failed."""
    table = session.table("parts")
    finished = {row["part"] for row in table.rows if row["outcome"] == "finished"}
    todo = [name for name in PARTS if name in names and name not in finished]
    good = True
    for i, name in enumerate(todo):
        part, minutes = PARTS[name]
        start, left = time.monotonic(), session.left() / 60
        if not session.rehearse and minutes > left:
            outcome = f"not begun: {minutes} minutes needed, {left:.1f} left"
        else:
            print(f"--- {name}, {left:.1f} minutes left", flush=True)
            more, allowed = {}, 1.4 * minutes
            if name.startswith("run-"):  # the runs share what the other parts leave
                after = [n for n in todo[i + 1 :] if not n.startswith("run-")]
                runs = sum(n.startswith("run-") for n in todo[i:])
                spare = left - sum(PARTS[n][1] for n in after)
                allowed = max(minutes, spare / runs)
                more = {"seconds": 60 * allowed}
                allowed *= 1.4
            session.allow(allowed)
            try:
                part(session, **more)
                outcome = "finished"
            except Cut as cut:
                outcome = f"cut short: {cut}"
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                outcome, good = f"failed: {one_line(error)}", False
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = time.monotonic() - start
        table.rows = [row for row in table.rows if row["part"] != name]
        table.add({"part": name, "outcome": outcome, "seconds": seconds} | described())
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables' folder")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    small = "small numbers, on whatever device there is"
    parser.add_argument("--rehearse", action="store_true", help=small)
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error("--minutes must be positive")
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("torch finds no GPU here: --rehearse tries the script on the CPU")
    as_in_a_batch()
    folder = options.out / (f"rehearsal-{machine()}" if options.rehearse else machine())
    session = Session(folder, options.minutes, options.rehearse)
    set_up(session.paper, session.device)
    return 0 if perform(session, options.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
