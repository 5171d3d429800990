"""The paper's claims as statements about result tables, each with the rule that decides it.

All metrics are brought to one scale, the share of the gap that a network keeps: 0 is the position
prior, which never looks at the image, 1 the mean of the dense networks; higher is better for every
task. A comparison is judged cell by cell: a criterion, a size and a task. No number is averaged
over cells, since effects of opposite sign would cancel.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from mtprune_utils.core.model import activation_bytes
from mtprune_utils.core.task import channels, delta_m
from mtprune_utils.stages._training import architecture
from mtprune_utils.stages.prune import SHUFFLED
from mtprune_utils.stages.retrain import FROM_WEIGHTS
from mtprune_utils.study import statistics as stats
from mtprune_utils.study.grid import UNIFORM, Experiment

CELL = ["criterion", "size", "task"]  # criterion: empty where two criteria are compared
AGREES, DISAGREES, CANNOT_SAY, NOT_CLAIMED = "agrees", "disagrees", "cannot say", "not claimed"
MEANS = {  # rule: what a comparison's outcome means for a paper that claims it
    "two-sided": {"equivalent": AGREES, "different": DISAGREES},
    "zero": {"not told apart": AGREES, "differs": DISAGREES},
    "ahead": {"better": AGREES, "worse": DISAGREES, "mixed": DISAGREES},
    "half": {"below half": AGREES, "above half": DISAGREES},
}
Side = tuple[str, str]  # one side of a comparison: an arm, and the criterion that found its widths
AXES = {"parameters": "parameters", "macs": "MACs"}  # on which sizes are equal
END = [*CELL, "estimate", "low", "high"]  # what Table 1 says of a comparison's extreme cells
COLUMNS = [
    "claim",
    "statement",
    "rule",
    "outcome",
    "says",
    "paper",
    "note",
    "seeds",
    "seeds_most",
    *(f"{which}_{key}" for which in ("lowest", "highest") for key in END),
    "cells",
    "decided_by",
]
LONGER = {  # arm: what trains on from it, or for longer
    "scratch": "scratch_longer",
    "iterative": "finetune",
    "dense": "finetune",
}
NAMES = {
    "dense": "the dense network",
    "iterative": "the iterative run",
    "scratch": "re-training",
    "scratch_longer": "the longer re-training",
    "finetune": "fine-tuning",
}


@dataclass(frozen=True)
class Claim:
    """One comparison. values: one row per seed, one column per cell (levels: CELL).

    rule: see `stats.judge_cells`; a difference is positive where the first named is ahead.
    """

    name: str
    statement: str
    rule: str
    values: pd.DataFrame
    margin: float
    claimed: bool = True  # by the paper; a control is not
    doubts: dict[str, list[str]] = field(default_factory=dict)  # what speaks against "agrees", ...
    notes: tuple[str, ...] = ()
    decided_by: str = ""  # the command that has what it lacks

    def cells(self) -> pd.DataFrame:
        """One row per cell: CELL, estimate, seeds, intervals, p and outcome."""
        values = self.values.dropna(axis="columns", how="all")
        mean, sd, seeds = values.mean(), values.std(), values.count()
        judged = stats.judge_cells(mean, sd, seeds, self.rule, self.margin) if len(mean) else {}
        cells = values.columns.to_frame(index=False) if len(mean) else pd.DataFrame(columns=CELL)
        table = cells.assign(estimate=mean.to_numpy(), seeds=seeds.to_numpy(), **judged)
        table.insert(0, "claim", self.name)
        return table.replace([np.inf, -np.inf], np.nan)  # of a single seed: there is no interval

    def row(self) -> dict:
        """The comparison as a whole: its outcome, its cells in words, and what it means."""
        cells = self.cells()
        front = {"claim": self.name, "statement": self.statement, "rule": self.rule}
        if cells.empty:
            says = "no two networks compare" if self.values.size else "no run of it is finished"
            return front | {"outcome": "no cells", "says": says} | self._means("", [])
        outcome = stats.judge_all(cells["outcome"], self.rule)
        most = int(self.values.count().max())
        few = {1: "one seed decides", 2: "two seeds decide"}.get(most)
        doubts = [f"{few} nothing"] if few else []
        at = {"lowest": cells["estimate"].idxmin(), "highest": cells["estimate"].idxmax()}
        ends = {f"{which}_{key}": cells.loc[i, key] for which, i in at.items() for key in END}
        says = {"outcome": outcome, "says": says_of(cells), "cells": list_of(cells)}
        seeds = {"seeds": int(cells["seeds"].min()), "seeds_most": most}
        return front | says | ends | seeds | self._means(outcome, doubts)

    def _means(self, outcome: str, doubts: list[str]) -> dict:
        """The second column, why, and what would decide it."""
        means = MEANS[self.rule].get(outcome, CANNOT_SAY)
        doubts = [*doubts, *filter(None, self.doubts.get(means, []))]
        if not self.claimed:
            note = "; ".join(filter(None, self.notes))
            return {"paper": NOT_CLAIMED, "note": note, "decided_by": ""}
        open_ = bool(doubts) or means == CANNOT_SAY
        if open_ and not doubts and outcome:
            doubts = [self._seeds_that_would_decide()]
        note = "; ".join(dict.fromkeys(filter(None, [*self.notes, *doubts])))  # each once
        paper = CANNOT_SAY if open_ else means
        return {"paper": paper, "note": note, "decided_by": self.decided_by if open_ else ""}

    def _seeds_that_would_decide(self) -> str:
        values = self.values.dropna(axis="columns", how="all")
        arguments = values.mean(), values.std(), values.count(), self.rule, self.margin
        enough = stats.seeds_to_decide(*arguments, decided=set(MEANS[self.rule]))
        if enough:
            return f"about {enough} seeds would decide it"
        return "200 seeds would not decide it"


def says_of(cells: pd.DataFrame) -> str:
    """A comparison's cells in a line: how many of each outcome, and the lowest and the highest."""
    counts = Counter(cells["outcome"])
    many = "; ".join(f"{counts[word]} {word}" for word in stats.OUTCOMES if word in counts)
    ordered = cells.sort_values("estimate")
    ends = [f"{cell['estimate']:+.2f} ({cell_name(cell)})" for _, cell in ordered.iterrows()]
    return f"{many}. From {ends[0]} to {ends[-1]}" if len(ends) > 1 else f"{many}. {ends[0]}"


def list_of(cells: pd.DataFrame) -> str:
    """Every cell of a comparison in words, the lowest estimate first."""
    return "; ".join(
        f"{cell_name(cell)}: {cell['estimate']:+.2f} [{cell['low']:+.2f}, {cell['high']:+.2f}] "
        f"{cell['outcome']}"
        for _, cell in cells.sort_values("estimate").iterrows()
    )


def cell_name(cell: pd.Series) -> str:
    """As in "taylor, depth at 30%"."""
    where = f" at {cell['size']}" if cell["size"] else ""
    return ", ".join(filter(None, [cell["criterion"], f"{cell['task']}{where}"]))


class Evidence:
    """The result tables of one experiment (`tables.collect`) on the scale of shares kept."""

    def __init__(self, experiment: Experiment, tables: dict[str, pd.DataFrame]):
        self.experiment, self.tables = experiment, tables
        self.profile = experiment.profile
        tasks = experiment.tasks.values()
        self.endpoints = {task.name: f"{task.name}.{task.endpoint}" for task in tasks}
        dense = tables["dense_evaluations"]
        if len(dense):
            dense = dense[(dense["seed"] < self.profile.seeds) & (dense["arm"] == "multitask")]
        if dense.empty:
            raise ValueError(
                "no dense network of the evaluation's seeds is finished: there is nothing to judge"
            )
        self.dense_parameters = int(dense["parameters"].iloc[0])
        trivial = tables["dense_trivial"]
        position = trivial["predictor"] == "position prior"
        prior = trivial[position & (trivial["arm"] == "multitask")]
        self.prior = {task: prior[column].mean() for task, column in self.endpoints.items()}
        self.gap = {
            task: dense[column].mean() - self.prior[task] for task, column in self.endpoints.items()
        }
        self.pruned = self._pruned()
        self.runs = dict(list(self.pruned.groupby(["arm", "criterion", "seed"])))
        self.points = self._points()
        self.arms = dict(list(self.points.groupby(["arm", "criterion"])))

    def _pruned(self) -> pd.DataFrame:
        """Every recovered network of the pruning runs of the evaluation's seeds."""
        rows = self._table("prune_evaluations")
        rows = rows[(rows["phase"] != "removed") & (rows["seed"] < self.profile.seeds)]
        return self.kept(rows.assign(steps=rows["step"] + self.profile.dense.steps))

    def _points(self) -> pd.DataFrame:
        """Every arm's networks at each size: shares kept, MACs, and the steps behind them."""
        columns = ["macs", "steps", *self.endpoints]
        pruned = stats.at_sizes(self.pruned, self.sizes(), columns)
        retrained = self.kept(self._table("retrain_evaluations"))
        # A network that landed beside its size is not compared.
        right = stats.same_size(retrained["parameters"], retrained["level"].map(self.sizes()))
        cell = ["criterion", "seed", "level"]
        inherited = pruned[pruned["arm"] == "iterative"].set_index(cell)["steps"]
        before = inherited.reindex(pd.MultiIndex.from_frame(retrained[cell])).to_numpy()
        retrained["steps"] += np.where(retrained["arm"].isin(FROM_WEIGHTS), before, 0)
        return pd.concat([pruned, retrained.loc[right, pruned.columns]], ignore_index=True)

    def kept(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows with one column per task: the share of the gap that is kept."""
        shares = {
            task: (rows[column] - self.prior[task]) / self.gap[task]
            for task, column in self.endpoints.items()
        }
        return rows.assign(**shares)

    def sizes(self) -> dict[int, int]:
        """The parameter counts at which networks are compared, by level."""
        sizes = enumerate(self.profile.sizes)
        return {level: round(size * self.dense_parameters) for level, size in sizes}

    def _table(self, name: str) -> pd.DataFrame:
        """A table, with its columns even where no run of its stage is finished."""
        columns = (
            "criterion",
            "seed",
            "level",
            "arm",
            "phase",
            "removal",
            "target_level",
            "step",
            "parameters",
            "macs",
            "steps",
            "widths",
        )
        table = self.tables[name]
        empty = pd.DataFrame(columns=[*columns, *self.endpoints.values()], dtype=float)
        return table if len(table) else empty

    def compare(
        self, sides: list[tuple[str, Side, Side]], axis: str = "parameters"
    ) -> tuple[pd.DataFrame, str]:
        """How far each first side is ahead of its second at equal size, paired by seed.

        sides: (what stands there for the criterion, first, second). Returns one row per seed with
        one column per cell, and how many pairs are left out, in words. A pair is left out (NaN)
        where both criteria left the same widths, so that there is nothing to compare, and, with
        axis "macs", where the networks' MACs differ by more than 3 %.
        """
        pairs = [
            self._pairs(*side, axis).assign(criterion=name)  # type: ignore[call-arg]
            for name, *side in sides
        ]
        both = pd.concat(pairs, ignore_index=True)
        left_out = both["left_out"].astype(bool)
        for task in self.endpoints:
            both[task] = (both[task] - both[f"{task}.other"]).mask(left_out)
        sizes = {level: f"{size:.0%}" for level, size in enumerate(self.profile.sizes)}
        values = self.by_cell(both.assign(size=both["level"].map(sizes)))
        why = "the same widths" + (", or MACs more than 3 % apart" if axis == "macs" else "")
        note = f"{left_out.sum()} of {len(both)} pairs left out: {why}" if left_out.any() else ""
        return values, note

    def ahead(self, first: str, second: str) -> pd.DataFrame:
        """How far one arm is ahead of another, for the architectures of each of the criteria."""
        return self.compare([(c, (first, c), (second, c)) for c in self.profile.criteria])[0]

    def _pairs(self, first: Side, second: Side, axis: str) -> pd.DataFrame:
        """Two arms' networks side by side. The second's columns end in ".other".

        At equal MACs, of two networks that pruning passed through, the smaller run is read where it
        had the larger one's MACs: recorded, or interpolated on the logarithm.
        """
        one, other = (
            self.arms.get(side, self.points[:0]).set_index(["seed", "level"])
            for side in (first, second)
        )
        both = one.join(other.add_suffix(".other"), how="inner").reset_index()
        left_out = (both["widths"] == both["widths.other"]) & (first[1] != second[1])
        if axis == "macs":
            for i, pair in both.iterrows():
                smaller = "" if pair["macs"] < pair["macs.other"] else ".other"
                names = [pair[f"arm{smaller}"], pair[f"criterion{smaller}"], pair["seed"]]
                run = self.runs.get(tuple(names), self.pruned[:0])  # none of a re-trained network
                run = run[run["level"].isna() | (run["level"] == pair["level"])]
                size = max(pair["macs"], pair["macs.other"])
                if len(run):
                    values = [stats.value_at(run, size, task, "macs") for task in self.endpoints]
                    columns = [f"{column}{smaller}" for column in (*self.endpoints, "macs")]
                    both.loc[i, columns] = [*values, size]
            left_out |= ~stats.same_size(both["macs"], both["macs.other"])
        return both.assign(left_out=left_out)

    def of_criteria(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Without those of the controls."""
        return rows[rows["criterion"].isin(self.profile.criteria)]

    def by_cell(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows with seed, criterion, size and one column per task: by seed, one column per cell."""
        if rows.empty:
            return pd.DataFrame(columns=pd.MultiIndex.from_tuples([], names=CELL), dtype=float)
        tasks, networks = list(self.endpoints), rows[CELL[:2]].drop_duplicates()
        wide = rows.set_index(["seed", *CELL[:2]])[tasks].astype(float).unstack(CELL[:2])
        wide.columns = wide.columns.reorder_levels([1, 2, 0]).rename(CELL)
        return wide[[(*network, task) for network in networks.values for task in tasks]]

    def training_curves(self) -> pd.DataFrame:
        """The re-training curves of both criteria's architectures: `kept` on validation images.

        One row per evaluation and task.
        """
        curves = self.of_criteria(self.kept(self._table("retrain_curve")))
        cell = ["criterion", "seed", "level", "arm"]
        progress = curves["step"] / curves.groupby(cell)["step"].transform("max")
        return curves.assign(progress=progress.round(3)).melt(
            [*cell, "progress"], list(self.endpoints), "task", "kept"
        )

    def unfinished(self, arm: str) -> str:
        """Why an arm was not at the end of its training; "" if nothing speaks for that.

        By the doubling rule: trained on, or for longer, it gets ahead by more than the margin in
        some cell (a falling learning rate makes any end look flat). What trains on from the dense
        network is smaller, and counts all the same. Or it gains more than the margin between its
        last two evaluations on validation images.
        """
        gains = [self._last_gains(arm)]
        if arm in LONGER:
            dense = arm == "dense"  # it keeps 1
            longer = self._kept_finetuned() - 1 if dense else self.ahead(LONGER[arm], arm)
            if longer.notna().to_numpy().sum() == 0:
                return f"nothing shows whether {NAMES[arm]} is at its end"
            gains.append(longer.mean().groupby("task").max())
        most = pd.concat(gains, axis=1).max(axis=1)
        tasks = [task for task in self.endpoints if most.get(task, 0) > self.profile.margin]
        if not tasks:
            return ""
        gains = f"more steps gain up to {most.max():.2f} ({', '.join(tasks)})"
        return f"{NAMES[arm]} is not at its end, {gains}"

    def _kept_finetuned(self) -> pd.DataFrame:
        rows = self.of_criteria(self.points)
        rows = rows[rows["arm"] == "finetune"]
        return self.by_cell(rows.assign(size=rows["level"]))

    def _last_gains(self, arm: str) -> pd.Series:
        """By task: what the arm gains between its last two evaluations, where it gains most."""
        if arm == "dense":
            curves = self._table("dense_curve")
            curves = curves[curves["arm"] == "multitask"].assign(criterion="", level=0)
        else:
            curves = self.of_criteria(self._table("retrain_curve"))
            curves = curves[curves["arm"] == arm]
        if curves.empty:
            return pd.Series(dtype=float)
        runs = self.kept(curves).sort_values("step").groupby(["criterion", "level", "seed"])
        ends = runs[list(self.endpoints)].apply(lambda run: run.iloc[-1] - run.iloc[-2:].iloc[0])
        return ends.groupby(["criterion", "level"]).mean().max()

    def steps_in_all(self, arm: str) -> str:
        """Of dense training, pruning and re-training together: what is behind an arm's networks."""
        rows = self.of_criteria(self.points)
        steps = rows[rows["arm"] == arm]["steps"]
        few, many = steps.min(), steps.max()
        if steps.empty:
            return "no"
        return f"{few:.0f}" if few == many else f"{few:.0f} to {many:.0f}"

    def equal_compute_shares(self) -> pd.Series:
        """What share of equal compute each longer re-training run got before its cap.

        See `stages.equal_compute_steps`.
        """
        longer = self.of_criteria(self._table("retrain_evaluations"))
        pruned = self._table("prune_evaluations")
        pruned = pruned[pruned["arm"] == "iterative"]
        shares = []
        for _, run in longer[longer["arm"] == "scratch_longer"].iterrows():
            rows = pruned[pruned["criterion"] == run["criterion"]]
            rows = rows[rows["seed"] == run["seed"]]
            rows = rows[rows["level"].isna() | (rows["level"] == run["level"])]
            if not rows["target_level"].eq(run["level"]).any():
                continue  # the pruning run is not in the tables
            rows = rows.loc[: rows["target_level"].eq(run["level"]).idxmax()]
            spent = self.profile.dense.steps * rows["macs"].iloc[0]
            spent += (rows["step"].diff().shift(-1) * rows["macs"]).sum()
            shares.append(run["steps"] * rows["macs"].iloc[-1] / spent)
        return pd.Series(shares, dtype=float)


def premise(evidence: Evidence) -> pd.DataFrame:
    """One multi-task network against one full-size network per task, and what share is saved.

    Sizes of the single-task networks are summed over tasks. Memory in MiB, float32: all weights,
    and what one image leaves for the backward pass. Below, what changes for each task, and the
    mean over tasks (Delta_m) with its 95 % interval.
    """
    experiment, dense = evidence.experiment, evidence.tables["dense_evaluations"]
    crop = (evidence.profile.crop, evidence.profile.crop)
    outputs = channels(experiment.tasks)
    single = {task: {task: count} for task, count in outputs.items()}
    rows = {}
    for name, arms in (("multi-task", {"multitask": outputs}), ("single-task", single)):
        found = dense[dense["arm"].isin(arms) & (dense["seed"] < evidence.profile.controls.seeds)]
        sizes = found.groupby("arm")[["parameters", "macs"]].first().sum()
        endpoints = found[list(evidence.endpoints.values())].mean()
        networks = (architecture(evidence.profile, tasks) for tasks in arms.values())
        activations = sum(activation_bytes(network, crop) for network in networks)
        rows[name] = {
            "networks": len(arms),
            **sizes,
            "weights_mib": sizes["parameters"] * 4 / 2**20,
            "activations_mib": activations / 2**20,
            **endpoints,
        }
    table = pd.DataFrame(rows)
    saved = ["parameters", "macs", "weights_mib", "activations_mib"]
    table.loc[saved, "saved"] = 1 - table["multi-task"] / table["single-task"]
    changes = changes_by_seed(evidence)
    for task, change in changes.mean().items():
        table.loc[f"change.{task}", "multi-task"] = change
    delta = changes.mean(axis=1)
    low, high = stats.interval(delta.mean(), delta.std(), len(delta), stats.ALPHA)
    ends = {"delta_m": delta.mean(), "delta_m_low": low, "delta_m_high": high}
    for name, value in (ends | {"seeds": len(delta)}).items():
        table.loc[name, "multi-task"] = value if np.isfinite(value) else np.nan
    return table


def changes_by_seed(evidence: Evidence) -> pd.DataFrame:
    """Relative change of each task's metric against the single-task network of the seed.

    One row per seed, one column per task; positive is better. Delta_m is the mean over tasks.
    """
    dense = evidence.tables["dense_evaluations"]
    changes = {}
    for seed, rows in dense[dense["seed"] < evidence.profile.seeds].groupby("seed"):
        rows = rows.set_index("arm")
        if {"multitask", *evidence.endpoints} <= set(rows.index):
            changes[seed] = {
                name: delta_m({name: task}, rows.loc["multitask"], rows.loc[name])
                for name, task in evidence.experiment.tasks.items()
            }
    return pd.DataFrame.from_dict(changes, "index", dtype=float, columns=list(evidence.endpoints))


def collapses(evidence: Evidence) -> pd.DataFrame:
    """For each criterion, schedule and task: how many seeds collapse, and at which parameter count.

    The control schedules' rows also say in how many seeds they collapse earlier and later than the
    profile's own schedule.
    """
    tasks = list(evidence.endpoints)
    rows = []
    for criterion, of_criterion in _to_the_floor(evidence).groupby("criterion"):
        by_schedule = {
            arm: stats.collapse_sizes(runs, tasks) for arm, runs in of_criterion.groupby("arm")
        }
        own = by_schedule.get("iterative")
        for arm, sizes in by_schedule.items():
            for task, column in sizes.items():
                # A censored seed would collapse, if at all, at a smaller size: in the median it
                # counts as the smallest.
                median = column.fillna(-np.inf).median()
                row = {
                    "criterion": criterion,
                    "schedule": arm,
                    "task": task,
                    "seeds": len(column),
                    "collapsed": int(column.notna().sum()),
                    "median_parameters": median if median > 0 else np.nan,
                }
                if arm != "iterative" and own is not None:
                    row |= stats.collapse_order(column, own[task])
                rows.append(row)
    columns = ["criterion", "schedule", "task", "seeds", "collapsed", "median_parameters"]
    return pd.DataFrame(rows, columns=[*columns, "earlier", "later", "tied", "p_sign"])


def _to_the_floor(evidence: Evidence) -> pd.DataFrame:
    last = len(evidence.profile.sizes) - 1
    rows = evidence.pruned[evidence.pruned["arm"] != SHUFFLED]  # which is no other schedule
    return rows[rows["level"].isna() | (rows["level"] == last)]


def _kept_at_the_floor(evidence: Evidence, arm: str, criteria: tuple[str, ...]) -> pd.DataFrame:
    rows = _to_the_floor(evidence)
    rows = rows[(rows["arm"] == arm) & rows["criterion"].isin(criteria)]
    ends = rows.sort_values("removal").groupby(["criterion", "seed"]).tail(1)
    ends = ends.assign(size="the floor")
    found = [evidence.by_cell(ends[ends["criterion"] == criterion]) for criterion in criteria]
    return pd.concat(found, axis=1)


def _premise_shares(evidence: Evidence) -> pd.DataFrame:
    """Share kept by the multi-task network minus that of each single-task network, by seed."""
    rows = evidence.kept(evidence.tables["dense_evaluations"])
    rows = rows[rows["seed"] < evidence.profile.seeds].set_index("seed")
    multi, *single = (rows[rows["arm"] == arm] for arm in ("multitask", *evidence.endpoints))
    ahead = {task: multi[task] - own[task] for task, own in zip(evidence.endpoints, single)}
    table = pd.DataFrame(ahead).assign(criterion="", size="").rename_axis("seed").reset_index()
    return evidence.by_cell(table)


def deciding_command(experiment: Experiment) -> str:
    """What has more seeds than the experiment, every arm, and tuning: "" if it has them itself."""
    profile = experiment.profile
    if profile.seeds >= 8 and profile.controls.seeds >= 8 and profile.tuning.trials:
        return ""
    if experiment.data == "rooms":
        return "make study"
    controls, tuning = replace(profile.controls, seeds=8), replace(profile.tuning, trials=16)
    enough = replace(profile, seeds=8, controls=controls, tuning=tuning)
    root = "..." if experiment.data_root else ""
    return replace(experiment, profile=enough, data_root=root).command


def savings(table: pd.DataFrame) -> dict:
    """Claim 1's row: what one multi-task network saves, and at which change of quality.

    table: `premise`.
    """
    saved, ends = table["saved"], table["multi-task"]
    statement = "one multi-task network saves computation and storage"
    row = {"claim": "1", "statement": statement, "rule": "saved"}
    if not ends["seeds"]:
        return row | {"outcome": "no runs", "says": "no run of it is finished", "paper": CANNOT_SAY}
    saves = saved["parameters"] > 0 and saved["macs"] > 0
    seeds = int(ends["seeds"])
    interval = f" [{ends['delta_m_low']:+.1%}, {ends['delta_m_high']:+.1%}]" if seeds > 1 else ""
    changes = ends[ends.index.str.startswith("change.")].sort_values()
    lowest, highest = (
        f"{changes.iloc[i]:+.1%} ({changes.index[i].removeprefix('change.')})" for i in (0, -1)
    )
    says = (
        f"{saved['parameters']:.0%} of the parameters and {saved['macs']:.0%} of the MACs saved "
        f"against {table.loc['networks', 'single-task']:.0f} full-size networks; metrics change by "
        f"{ends['delta_m']:+.1%}{interval} on average (Delta_m), from {lowest} to {highest}"
    )
    outcome, paper = ("saves", AGREES) if saves else ("does not save", DISAGREES)
    return row | {
        "outcome": outcome,
        "says": says,
        "paper": paper,
        "seeds": seeds,
        "seeds_most": seeds,
        "note": "" if seeds > 1 else "one seed: Delta_m has no interval",
    }


def comparisons(evidence: Evidence, saved: pd.Series) -> list[Claim]:
    """Every comparison with the rule that decides it: Table 1's rows but the first.

    saved: `premise`'s column.
    """
    return [
        _strict_premise(evidence, saved),
        *_criteria(evidence),
        *_controls(evidence),
        *_collapse(evidence),
        *_retraining(evidence),
    ]


def _claim(
    evidence: Evidence,
    name: str,
    statement: str,
    rule: str,
    values: pd.DataFrame,
    agrees=(),
    disagrees=(),
    notes=(),
    claimed=True,
) -> Claim:
    """agrees, disagrees: what speaks against calling it so."""
    tasks = evidence.experiment.tasks.values()
    better = [1 if task.endpoint in task.higher_is_better else -1 for task in tasks]
    learnt = list(np.sign(list(evidence.gap.values()))) == better
    unlearnt = "" if learnt else "the dense network does not beat the position prior on every task"
    doubts = {
        AGREES: [unlearnt, *agrees],
        DISAGREES: [unlearnt, *disagrees],
        CANNOT_SAY: [unlearnt, *(doubt for doubt in agrees if doubt in disagrees)],
    }
    command = deciding_command(evidence.experiment) if claimed else ""
    margin = evidence.profile.margin
    return Claim(name, statement, rule, values, margin, claimed, doubts, tuple(notes), command)


def _strict_premise(evidence: Evidence, saved: pd.Series) -> Claim:
    """Stricter than the paper's claim 1, which is about what is saved: see `savings`."""
    times = [f"{1 / (1 - saved[size]):.1f} times the {name}" for size, name in AXES.items()]
    return _claim(
        evidence,
        "1 strict",
        "no worse on any task than a full-size network for each",
        "ahead",
        _premise_shares(evidence),
        claimed=False,
        notes=[f"those take {' and '.join(times)}"],
    )


def _criteria(evidence: Evidence) -> list[Claim]:
    """Claim 2, arm by arm."""
    criteria = evidence.profile.criteria
    if len(criteria) != 2:
        return []
    doubts = [] if evidence.profile.tuning.trials else ["not tuned"]
    found = []
    for name, arm, words in (
        ("2", "scratch", "re-trained from scratch"),
        ("2 longer", "scratch_longer", "re-trained for longer"),
        ("2 finetune", "finetune", "fine-tuned"),
        ("2i", "iterative", "iteratively pruned"),
    ):
        for axis, equal in AXES.items():
            sides = [("", (arm, criteria[1]), (arm, criteria[0]))]
            values, note = evidence.compare(sides, axis)
            statement = f"{criteria[1]} against {criteria[0]} at equal {equal}, {words}"
            at = "" if axis == "parameters" else f" ({equal})"
            of = (values, doubts, doubts, [note])
            found.append(_claim(evidence, name + at, statement, "two-sided", *of))
            if axis == "parameters" and arm in ("scratch", "iterative"):  # what the paper says
                literal = f"no significant difference: {statement}"
                found.append(_claim(evidence, f"{name} literal", literal, "zero", *of))
    return found


def _controls(evidence: Evidence) -> list[Claim]:
    """Claim 2's controls: that criteria do not differ says little where nothing else does."""
    found = []
    for name, arm, control, words in (
        ("2 vs uniform", "scratch", UNIFORM, "re-trained"),
        ("2 vs random", "scratch", "random", "re-trained"),
        ("2i vs random", "iterative", "random", "iteratively pruned"),
    ):
        for axis, equal in AXES.items():
            sides = [(c, (arm, c), (arm, control)) for c in evidence.profile.criteria]
            values, note = evidence.compare(sides, axis)
            statement = f"found against {control} architectures at equal {equal}, {words}"
            at = "" if axis == "parameters" else f" ({equal})"
            of = (evidence, name + at, statement, "two-sided", values)
            found.append(_claim(*of, notes=[note], claimed=False))
    return found


def _collapse(evidence: Evidence) -> list[Claim]:
    statement = "at the extreme, less than half of the gap is kept"
    kept = _kept_at_the_floor(evidence, "iterative", evidence.profile.criteria)
    claims = [_claim(evidence, "3", f"iterative pruning collapses: {statement}", "half", kept)]
    for schedule in evidence.experiment.schedules:
        kept = _kept_at_the_floor(evidence, schedule, evidence.profile.controls.schedules_of)
        words = f"with the {schedule.replace('_', ' ')} schedule: {statement}"
        claims.append(_claim(evidence, f"3 {schedule}", words, "half", kept, claimed=False))
    return claims


def _retraining(evidence: Evidence) -> list[Claim]:
    """Claim 4. The same networks stand on both sides: their parameters and MACs are equal.

    Re-training that was not at its end cannot disagree: more of it might be ahead. Where its
    opponent was not at its end, or comes from a dense network that was not, being ahead of it
    cannot agree: it may be ahead of too little training only.
    """
    profile, shares = evidence.profile, evidence.equal_compute_shares()
    untuned = "" if profile.tuning.trials else "not tuned"
    capped = ""
    if len(shares) and shares.min() < 0.99:
        longest = round(profile.controls.budget * profile.retrain.steps)
        given = f"given {shares.min():.0%} to {shares.max():.0%} of equal compute"
        capped = f"{given}, capped at {longest} steps"
    opponents = {
        "iterative": [evidence.unfinished("iterative"), evidence.unfinished("dense")],
        "finetune": [evidence.unfinished("finetune")],
    }
    found = []
    for name, first, second, words, limit in (
        ("4", "scratch", "iterative", "from scratch, against the weights that pruning kept", ""),
        ("4 compute", "scratch_longer", "iterative", "for longer, against them", capped),
        ("4 finetune", "scratch", "finetune", "from scratch, against fine-tuned for as long", ""),
        ("4 longer", "scratch_longer", "finetune", "for longer, against fine-tuned", ""),
    ):
        steps = " steps in all against ".join(map(evidence.steps_in_all, (first, second)))
        agrees, disagrees = opponents[second], [evidence.unfinished(first), limit]
        found.append(
            _claim(
                evidence,
                name,
                f"re-trained {words}",
                "ahead",
                evidence.ahead(first, second),
                agrees,
                disagrees,
                notes=[untuned, steps, *disagrees, *agrees],
            )
        )
    return found


def judge(
    evidence: Evidence, table: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table 1, one row per comparison: what its numbers say, and what that means for the paper.

    And every cell of every comparison. table: `premise`'s, where it is there already.
    """
    table = premise(evidence) if table is None else table
    judged = comparisons(evidence, table["saved"])
    rows = [savings(table), *(claim.row() for claim in judged)]
    cells = pd.concat([claim.cells() for claim in judged], ignore_index=True)
    return pd.DataFrame(rows).reindex(columns=COLUMNS), cells
