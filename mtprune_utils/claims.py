"""The paper's claims as statements about result tables, each with the rule that decides it.

All metrics are brought to one scale, the share of the gap that a network keeps: 0 is the position prior, which never looks
at the image, 1 the mean of the dense networks; higher is better for every task. A claim is about one number per seed and
task: a difference of such shares between two arms, averaged over sizes (and criteria), or the share itself.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mtprune_utils import stats
from mtprune_utils.models import activation_bytes
from mtprune_utils.runs import UNIFORM, Experiment
from mtprune_utils.tasks import delta_m


COLUMNS = ["task", "estimate", "low", "high", "tost_low", "tost_high", "p", "p_sign_flip", "seeds", "verdict", "note", "decided_by"]


@dataclass(frozen=True)
class Claim:
    """values: one row per seed, one column per task. kind and threshold: the rule, see `stats.judge`."""

    name: str
    statement: str
    kind: str
    threshold: float
    values: pd.DataFrame
    notes: tuple[str, ...] = ()
    open_because: str = ""  # a reason for which it stays undecided whatever the numbers say
    unrefuted_because: str = ""  # a reason for which numbers can support it, but not refute it
    decided_by: str = ""  # the command that has what it lacks

    def rows(self) -> pd.DataFrame:
        """One row for the claim as a whole ("all": the mean over tasks), then one per task."""
        values = self.values.dropna()
        if values.empty:
            note = {"note": "no run of it is finished", "decided_by": self.decided_by}
            return self._with_columns(pd.DataFrame([{"task": "all", "seeds": 0, "verdict": "undecided", **note}]))
        verdict, rows = stats.judge({task: stats.estimate(column) for task, column in values.items()}, self.kind, self.threshold)
        _, whole = stats.judge({"all": stats.estimate(values.mean(axis=1))}, self.kind, self.threshold)
        null = 0.0 if self.kind == "equal" else self.threshold
        rows["p_sign_flip"] = [stats.sign_flip_p(column - null) for column in values.to_numpy().T]
        reasons = [self.open_because, self.unrefuted_because]
        notes = [*self.notes, *reasons, *(f"{row['task']} {row['note']}" for _, row in rows.iterrows() if row["note"])]
        if self.open_because or self.unrefuted_because and verdict == "refuted":
            verdict = rows["verdict"] = "undecided"
        elif verdict == "undecided":
            enough = stats.seeds_to_decide(values, self.kind, self.threshold)
            notes.append(f"about {enough} seeds would decide it" if enough else "no number of seeds up to 1000 would decide it"
                         if len(values) > 1 else "one seed decides nothing")
        decided_by = self.decided_by if verdict == "undecided" else ""
        whole = whole.assign(verdict=verdict, note="; ".join(filter(None, notes)), decided_by=decided_by)
        table = pd.concat([whole, rows.assign(decided_by="")], ignore_index=True)
        return self._with_columns(table.replace([np.inf, -np.inf], np.nan))  # of a single seed: there is no interval

    def _with_columns(self, rows: pd.DataFrame) -> pd.DataFrame:
        front = {"claim": self.name, "statement": self.statement, "rule": self.kind, "threshold": self.threshold}
        return pd.concat([pd.DataFrame([front] * len(rows)), rows.reindex(columns=COLUMNS)], axis=1)


class Evidence:
    """The result tables of one experiment (`results.collect`) on the scale of shares kept."""

    def __init__(self, experiment: Experiment, tables: dict[str, pd.DataFrame]):
        self.experiment, self.tables = experiment, tables
        self.profile = experiment.profile
        self.endpoints = {task.name: f"{task.name}.{task.endpoint}" for task in experiment.tasks.values()}
        dense = tables["dense_evaluations"]
        self.dense = dense if dense.empty else dense[(dense["seed"] < self.profile.seeds) & (dense["arm"] == "multitask")]
        if self.dense.empty:
            raise ValueError("no dense network of the evaluation's seeds is finished yet: there is nothing to judge")
        trivial = tables["dense_trivial"]
        prior = trivial[(trivial["predictor"] == "position prior") & (trivial["arm"] == "multitask")]
        self.prior = {task: prior[column].mean() for task, column in self.endpoints.items()}
        self.gap = {task: self.dense[column].mean() - self.prior[task] for task, column in self.endpoints.items()}
        self.dense_parameters = int(self.dense["parameters"].iloc[0])
        self.points = pd.concat([self._iterative(), self._retrained()], ignore_index=True)

    def kept(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows with one column per task: the share of the gap that is kept."""
        shares = {task: (rows[column] - self.prior[task]) / self.gap[task] for task, column in self.endpoints.items()}
        return rows.assign(**shares)

    def sizes(self) -> dict[int, int]:
        return {rank: round(size * self.dense_parameters) for rank, size in enumerate(self.profile.sizes)}

    def iterative(self) -> pd.DataFrame:
        """Every recovered network of the pruning runs of the evaluation's seeds."""
        rows = self._table("prune_evaluations")
        return self.kept(rows[(rows["phase"] != "removed") & (rows["seed"] < self.profile.seeds)])

    def _table(self, name: str) -> pd.DataFrame:
        """A table, with its columns even where no run of its stage is finished."""
        columns = ("criterion", "seed", "rank", "arm", "phase", "removal", "landing", "step", "parameters", "widths")
        table = self.tables[name]
        return table if len(table) else pd.DataFrame(columns=[*columns, *self.endpoints.values()], dtype=float)

    def _iterative(self) -> pd.DataFrame:
        """Pruning runs at each size: the run that was tuned for it, or the one that serves all."""
        points = []
        for (criterion, seed, arm), rows in self.iterative().groupby(["criterion", "seed", "arm"]):
            for rank, parameters in self.sizes().items():
                run = rows[rows["rank"].isna() | (rows["rank"] == rank)]
                # The very network whose architecture is re-trained, if its size is right; else between its neighbours.
                landed = run[(run["landing"] == rank) & stats.same_size(run["parameters"], parameters)]
                run = landed if len(landed) else run
                if len(run):
                    shares = {task: stats.value_at(run, parameters, task) for task in self.endpoints}
                    widths = run.loc[(run["parameters"] - parameters).abs().idxmin(), "widths"]
                    points.append({"criterion": criterion, "seed": seed, "arm": arm, "rank": rank, "widths": widths, **shares})
        return pd.DataFrame(points, columns=["criterion", "seed", "arm", "rank", "widths", *self.endpoints])

    def _retrained(self) -> pd.DataFrame:
        rows = self.kept(self._table("retrain_evaluations"))
        right = stats.same_size(rows["parameters"], rows["rank"].map(self.sizes()))
        return rows[right][["criterion", "seed", "arm", "rank", "widths", *self.endpoints]]

    def arm(self, arm: str, *criteria: str) -> pd.DataFrame:
        """Shares kept by seed and size, averaged over criteria."""
        rows = self.points[(self.points["arm"] == arm) & self.points["criterion"].isin(criteria)]
        complete = rows.groupby(["seed", "rank"]).filter(lambda cell: len(cell) == len(criteria))
        return complete.groupby(["seed", "rank"])[list(self.endpoints)].mean()

    def difference(self, first: pd.DataFrame, second: pd.DataFrame, left_out=()) -> pd.DataFrame:
        """First minus second, paired by seed and size, averaged over the sizes, of the seeds that have all of them.

        left_out: pairs (seed, rank) that do not count, although they are there.
        """
        paired = (first - second).dropna()
        sizes = paired.index.get_level_values("rank").nunique()
        complete = paired.groupby("seed").filter(lambda rows: len(rows) == sizes)
        return complete[~complete.index.isin(left_out)].groupby("seed").mean()

    def coinciding(self, arm: str, criteria: tuple[str, str]) -> pd.Index:
        """Seeds and sizes at which two criteria left the same widths, so that there is nothing to compare."""
        rows = self.points[self.points["arm"] == arm]
        widths = [rows[rows["criterion"] == criterion].set_index(["seed", "rank"])["widths"] for criterion in criteria]
        both = pd.concat(widths, axis=1, join="inner")
        return both.index[both.iloc[:, 0] == both.iloc[:, 1]]

    def training_curves(self) -> pd.DataFrame:
        """The re-training curves of both criteria's architectures, one row per evaluation and task, `kept` on validation."""
        curves = self.kept(self._table("retrain_curve"))
        curves = curves[curves["criterion"].isin(self.profile.criteria)]
        cell = ["criterion", "seed", "rank", "arm"]
        curves = curves.assign(progress=(curves["step"] / curves.groupby(cell)["step"].transform("max")).round(3))
        return curves.melt(id_vars=[*cell, "progress"], value_vars=list(self.endpoints), var_name="task", value_name="kept")

    def still_improving(self, arm: str) -> list[str]:
        """Tasks that re-training in this arm still improves by more than the margin between its last two evaluations.

        A falling learning rate makes any end look flat: where the arm with more steps is ahead by more than the margin, the
        shorter one was not at its end either.
        """
        curves = self.kept(self._table("retrain_curve"))
        curves = curves[(curves["arm"] == arm) & curves["criterion"].isin(self.profile.criteria)]
        if not len(curves):
            return []
        runs = curves.sort_values("step").groupby(["criterion", "seed", "rank"])[list(self.endpoints)]
        gains = [runs.apply(lambda curve: curve.iloc[-1] - curve.iloc[-2:].iloc[0]).mean()]
        if arm == "scratch":
            arms = (self.arm(name, *self.profile.criteria) for name in ("scratch_longer", "scratch"))
            gains.append(self.difference(*arms).mean())
        return [task for task in self.endpoints if max(gain[task] for gain in gains) > self.profile.margin]

    def equal_compute_shares(self) -> pd.Series:
        """What share of equal compute each longer re-training run got before its cap: see `stages.equal_compute_steps`."""
        longer, pruned = self._table("retrain_evaluations"), self._table("prune_evaluations")
        longer = longer[(longer["arm"] == "scratch_longer") & longer["criterion"].isin(self.profile.criteria)]
        shares = []
        for _, run in longer.iterrows():
            same = (pruned["criterion"] == run["criterion"]) & (pruned["seed"] == run["seed"])
            rows = pruned[same & (pruned["arm"] == "iterative") & (pruned["rank"].isna() | (pruned["rank"] == run["rank"]))]
            if not rows["landing"].eq(run["rank"]).any():
                continue  # the pruning run is not in the tables
            rows = rows.loc[: rows["landing"].eq(run["rank"]).idxmax()]
            spent = self.profile.dense.steps * rows["macs"].iloc[0] + (rows["step"].diff().shift(-1) * rows["macs"]).sum()
            shares.append(run["steps"] * rows["macs"].iloc[-1] / spent)
        return pd.Series(shares, dtype=float)


def premise(evidence: Evidence) -> pd.DataFrame:
    """One multi-task network against one network per task: size, compute, memory, endpoints, and Delta_m per seed.

    Sizes of the single-task networks are summed over tasks. Memory in MiB, float32: all weights, and what one image leaves
    for the backward pass.
    """
    experiment, dense = evidence.experiment, evidence.tables["dense_evaluations"]
    crop = (evidence.profile.crop, evidence.profile.crop)
    channels = {task.name: task.channels for task in experiment.tasks.values()}
    groups = {"multi-task": {"multitask": channels}, "single-task": {task: {task: count} for task, count in channels.items()}}
    rows = {}
    for name, arms in groups.items():
        found = dense[dense["arm"].isin(arms) & (dense["seed"] < evidence.profile.controls.seeds)]
        sizes = found.groupby("arm")[["parameters", "macs"]].first().sum()
        endpoints = found[list(evidence.endpoints.values())].mean()
        activations = sum(activation_bytes(evidence.profile.architecture(tasks), crop) for tasks in arms.values())
        rows[name] = {"networks": len(arms), **sizes, "weights_mib": sizes["parameters"] * 4 / 2**20,
                      "activations_mib": activations / 2**20, **endpoints}
    table = pd.DataFrame(rows)
    changes = delta_m_by_seed(evidence)
    table.loc["delta_m"] = [changes.mean(), 0.0]
    table.loc["delta_m_sd"] = [changes.std(), np.nan]
    table.loc["seeds"] = len(changes)
    return table


def delta_m_by_seed(evidence: Evidence) -> pd.Series:
    """Delta_m of the multi-task network against the single-task networks of its seed; positive is better."""
    dense = evidence.tables["dense_evaluations"]
    changes = {}
    for seed, rows in dense[dense["seed"] < evidence.profile.seeds].groupby("seed"):
        rows = rows.set_index("arm")
        if {"multitask", *evidence.endpoints} <= set(rows.index):
            single = {column: rows.loc[task, column] for task, column in evidence.endpoints.items()}
            changes[seed] = delta_m(evidence.experiment.tasks, rows.loc["multitask"], single)
    return pd.Series(changes, dtype=float)


def collapses(evidence: Evidence) -> pd.DataFrame:
    """For each criterion, schedule and task: how many seeds collapse, and the parameter count at which they do.

    The control schedules' rows also say in how many seeds they collapse earlier and later than the profile's own schedule.
    """
    tasks = list(evidence.endpoints)
    rows = []
    for criterion, of_criterion in _to_the_floor(evidence).groupby("criterion"):
        by_schedule = {arm: stats.collapse_sizes(runs, tasks) for arm, runs in of_criterion.groupby("arm")}
        own = by_schedule.get("iterative")
        for arm, sizes in by_schedule.items():
            for task, column in sizes.items():
                # A censored seed would collapse, if at all, at a smaller size: it counts as the smallest in the median.
                median = column.fillna(-np.inf).median()
                row = {"criterion": criterion, "schedule": arm, "task": task, "seeds": len(column),
                       "collapsed": int(column.notna().sum()), "median_parameters": median if median > 0 else np.nan}
                if arm != "iterative" and own is not None:
                    row |= stats.collapse_order(column, own[task])
                rows.append(row)
    columns = ["criterion", "schedule", "task", "seeds", "collapsed", "median_parameters", "earlier", "later", "tied", "p_sign"]
    return pd.DataFrame(rows, columns=columns)


def _to_the_floor(evidence: Evidence) -> pd.DataFrame:
    last = len(evidence.profile.sizes) - 1
    rows = evidence.iterative()
    return rows[rows["rank"].isna() | (rows["rank"] == last)]


def _kept_at_the_floor(evidence: Evidence, arm: str, criteria: tuple[str, ...]) -> pd.DataFrame:
    """Averaged over the criteria, of the seeds that have all of them."""
    rows = _to_the_floor(evidence)
    rows = rows[(rows["arm"] == arm) & rows["criterion"].isin(criteria)]
    ends = rows.sort_values("removal").groupby(["criterion", "seed"]).tail(1)
    return ends.groupby("seed").filter(lambda seed: len(seed) == len(criteria)).groupby("seed")[list(evidence.endpoints)].mean()


def deciding_command(experiment: Experiment) -> str:
    """What has more seeds than the experiment, every arm of each, and tuning: empty if it has them itself."""
    profile = experiment.profile
    enough = {"seeds": 8, "controls": replace(profile.controls, seeds=8), "tuning": replace(profile.tuning, trials=16)}
    if profile.seeds >= 8 and profile.controls.seeds >= 8 and profile.tuning.trials:
        return ""
    if experiment.data == "rooms":
        return "make study"
    return replace(experiment, profile=replace(profile, **enough), data_root="..." if experiment.data_root else "").command


def all_claims(evidence: Evidence) -> list[Claim]:
    """Every claim and control, with the rules that were fixed before the runs."""
    profile, margin = evidence.profile, evidence.profile.margin
    both, untuned = profile.criteria, "" if profile.tuning.trials else "not tuned"
    learnt = all(np.sign(gap) == (1 if task.endpoint in task.higher_is_better else -1)
                 for gap, task in zip(evidence.gap.values(), evidence.experiment.tasks.values()))
    unlearnt = "" if learnt else "the dense network does not beat the position prior on every task"
    command = deciding_command(evidence.experiment)

    def claim(name, statement, kind, threshold, values, open_because="", notes=(), unrefuted_because=""):
        return Claim(name, statement, kind, threshold, values, tuple(notes), unlearnt or open_because, unrefuted_because, command)

    def unfinished(*arms: str) -> str:
        tasks = sorted({task for arm in arms for task in evidence.still_improving(arm)})
        return f"re-training still improves {', '.join(tasks)} at its end" if tasks else ""

    def no_difference(name: str, arm: str, words: str, controls: list[Claim]) -> Claim:
        """Claim 2. That criteria do not differ says little where nothing else does."""
        told_apart = any(control.rows()["verdict"].iloc[0] == "supported" for control in controls)
        caveat = "" if told_apart else "found architectures are not shown to beat the controls either"
        arms, left_out = (evidence.arm(arm, criterion) for criterion in reversed(both)), evidence.coinciding(arm, both)
        statement = f"{both[1]} and {both[0]} do not differ at equal size, once tuned ({words})"
        return claim(name, statement, "equal", margin, evidence.difference(*arms, left_out), untuned, notes=[caveat])

    scratch, iterative = evidence.arm("scratch", *both), evidence.arm("iterative", *both)
    sizes = ", ".join(f"{profile.sizes[rank]:g}" for rank in profile.controls.ranks)
    some = f"at {sizes} of the parameters" if len(profile.controls.ranks) < len(profile.sizes) else ""
    retrained_controls = [
        claim(f"2 vs {control}", f"control: found architectures do better than {control} ones (re-trained)", "above", 0.0,
              evidence.difference(scratch, evidence.arm("scratch", control)), notes=[some])
        for control in (UNIFORM, "random")
    ]
    pruned_control = claim(
        "2i vs random", "control: found architectures do better than random ones (iteratively pruned)", "above", 0.0,
        evidence.difference(iterative, evidence.arm("iterative", "random")),
    )
    claims = [claim("1", "a multi-task network is no worse than one network per task", "above", -margin, _premise_shares(evidence))]
    if len(both) == 2:
        claims.append(no_difference("2", "scratch", "re-trained from scratch", retrained_controls))
        claims.append(no_difference("2i", "iterative", "iteratively pruned", [pruned_control]))
    claims += [*retrained_controls, pruned_control]
    claims.append(claim(
        "3", "iterative pruning collapses at the extreme: less than half of the gap is kept", "below", 0.5,
        _kept_at_the_floor(evidence, "iterative", both),
    ))
    pruned = profile.controls.schedules_of
    for schedule in evidence.experiment.schedules:
        words = f"control: with the {schedule.replace('_', ' ')} schedule it collapses too ({', '.join(pruned)})"
        claims.append(claim(f"3 {schedule}", words, "below", 0.5, _kept_at_the_floor(evidence, schedule, pruned)))
    longest, shares = round(profile.controls.budget * profile.retrain.steps), evidence.equal_compute_shares()
    capped = len(shares) and shares.min() < 0.99
    compute = f"given {shares.min():.0%} to {shares.max():.0%} of equal compute, capped at {longest} steps" if capped else ""
    lengths = f"{profile.retrain.steps} steps, dense training {profile.dense.steps}"
    for name, better, than, words, notes, limit in (
        ("4", "scratch", "iterative", "re-trained from scratch, an architecture beats its pruned weights", [lengths], ""),
        ("4 compute", "scratch_longer", "iterative", "the same, re-trained for equal compute, as far as the cap lets it", [some], compute),
        ("4 finetune", "scratch", "finetune", "re-trained from scratch, it does better than fine-tuned for as long", [some], ""),
    ):
        claims.append(claim(
            name, words, "above", 0.0, evidence.difference(evidence.arm(better, *both), evidence.arm(than, *both)),
            unfinished(*{better, than} - {"iterative"}), [untuned, *notes], limit,
        ))
    return claims


def _premise_shares(evidence: Evidence) -> pd.DataFrame:
    """Share kept by the multi-task network minus that of the single-task network, by seed and task."""
    rows = evidence.kept(evidence.tables["dense_evaluations"])
    rows = rows[rows["seed"] < evidence.profile.seeds].set_index("seed")
    multi, *single = (rows[rows["arm"] == arm] for arm in ("multitask", *evidence.endpoints))
    return pd.DataFrame({task: multi[task] - own[task] for task, own in zip(evidence.endpoints, single)}).dropna()


def verdict_table(claims: list[Claim]) -> pd.DataFrame:
    """Table 1: one block per claim, the claim as a whole first, then task by task."""
    return pd.concat([claim.rows() for claim in claims], ignore_index=True)
