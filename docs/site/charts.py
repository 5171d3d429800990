"""Charts that answer to the pointer without a kernel: quality against size, from result tables."""

import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import vl_convert

from mtprune_utils.datasets import data_tasks
from mtprune_utils.study import statistics as stats
from mtprune_utils.study.figures import SIZES, panels
from mtprune_utils.study.palette import COLOURS, CRITERIA, DASHES, style_of

SPEC = Path(__file__).with_name("chart.json")  # in Vega-Lite, all but data and styles
POINTS = 18  # of a curve
KINDS = {  # arm: what it is, and its mark
    "iterative": ("pruned iteratively", None),
    "scratch": ("re-trained from random weights", "square"),
    "finetune": ("fine-tuned", "circle"),
}
CELL = ["criterion", "seed", "level", "arm"]


def script() -> str:
    """Vega-Lite, once for all pages, from its package: nothing is fetched."""
    return f"(() => {{{vl_convert.javascript_bundle()}\nwindow.vegaEmbed = vegaEmbed;}})();"


def section(results: Path) -> str:
    """The charts of one profile as a part of a page, one for each task, with common controls.

    results: its collected tables. Curves are means over seeds with bands of a standard deviation,
    points have 95 % intervals.
    """
    origin = json.loads((results / "runs.jsonl").read_text().splitlines()[0])
    metrics = panels(data_tasks(origin["files"]["provenance.json"]["data"]))
    pruned, retrained, dense, prior = _evaluations(results)
    rows = pd.concat([_curves(pruned, metrics), _points(retrained, metrics)], ignore_index=True)
    networks = list(dict.fromkeys(rows["network"]))
    styles = {name: _style(rows[rows["network"] == name].iloc[0]) for name in networks}
    many = rows["criterion"].nunique() > len(
        COLOURS
    )  # at first, those that have a colour of their own
    first = set(rows["network"][rows["criterion"].isin(CRITERIA)] if many else networks)
    rows = rows.drop(columns=["criterion", "tuned_for"])
    for column in ("x", "mean", "low", "high"):
        rows[column] = rows[column].map(lambda value: float(f"{value:.4g}"))
    figures = []
    for metric, title in metrics.items():
        levels = {"dense network": dense[metric].mean(), "position prior": prior[metric].mean()}
        of_task = rows[rows["metric"] == metric].drop(columns="metric")
        spec = json.dumps(_chart(of_task, levels, styles)).replace("</", r"<\/")
        name = html.escape(title)
        figures.append(
            f'<figure><figcaption>{name}</figcaption><div class="chart" role="img" aria-label='
            f'"{name} against size"></div><script type="application/json">{spec}</script></figure>'
        )
    there = [kind for kind in KINDS if kind in set(rows["kind"])]
    return "\n".join(
        [_controls(styles, first, there, many), '<div class="charts">', *figures, "</div>"]
    )


def _evaluations(results: Path) -> tuple[pd.DataFrame, ...]:
    """Recovered networks, re-trained, dense ones and guesses, each row with its run's cell."""
    records = [json.loads(line) for line in (results / "runs.jsonl").read_text().splitlines()]
    cells = pd.DataFrame([{"run": of["name"]} | {key: of[key] for key in CELL} for of in records])
    cells["share"] = [of["files"]["provenance.json"]["params"]["size"] for of in records]

    def table(name: str) -> pd.DataFrame:
        return pd.read_csv(results / f"{name}.csv").merge(cells, on="run")

    pruned, retrained = table("prune_evaluations"), table("retrain_evaluations")
    dense, trivial = table("dense_evaluations"), table("dense_trivial")
    return (
        pruned[(pruned["arm"] == "iterative") & (pruned["phase"] != "removed")],
        retrained[retrained["arm"].isin(KINDS)],
        dense[dense["arm"] == "multitask"],
        trivial[trivial["predictor"] == "position prior"],
    )


def _curves(pruned: pd.DataFrame, metrics: dict[str, str]) -> pd.DataFrame:
    """A band for each criterion's pruning runs; where they were tuned for a size, for each size."""
    parts = []
    for (criterion, level), runs in pruned.groupby(["criterion", "level"], dropna=False):
        tuned_for = -1 if np.isnan(level) else int(level)
        names = {"network": style_of(criterion)[1], "kind": "iterative"}
        if tuned_for >= 0:
            names["network"] += f", tuned for {runs['share'].iloc[0]:.0%}"
        names |= {"criterion": criterion, "tuned_for": tuned_for}
        for size in SIZES:
            for metric in metrics:
                curve = stats.curve_over_seeds(runs, size, metric, POINTS)
                spread = curve["sd"].fillna(0)
                low, high = curve["mean"] - spread, curve["mean"] + spread
                parts.append(curve.assign(size=size, metric=metric, low=low, high=high, **names))
    return pd.concat(parts).drop(columns="sd")


def _points(retrained: pd.DataFrame, metrics: dict[str, str]) -> pd.DataFrame:
    """What was trained at the profile's sizes, in the colours of its criterion."""
    parts = []
    for (criterion, arm), runs in retrained.groupby(["criterion", "arm"]):
        names = {"network": style_of(criterion)[1], "kind": arm, "criterion": criterion}
        sizes = runs.groupby("level")[[*SIZES]].mean().reset_index(drop=True)
        for metric in metrics:
            at = stats.points_over_seeds(runs, "parameters", metric, by="level")
            ends = {end: at[end].fillna(at["mean"]) for end in ("low", "high")}
            at = at.assign(metric=metric, tuned_for=-1, **names, **ends)
            parts += [at.assign(size=size, x=sizes[size]) for size in SIZES]
    return pd.concat(parts).drop(columns=["sd", "level"])


def _style(row: pd.Series) -> tuple[str, str]:
    """Colour and dashes, as in the suite's figures."""
    colour, _, dashes = style_of(row["criterion"])
    return colour, dashes if row["tuned_for"] < 0 else DASHES[1 + row["tuned_for"] % 3]


def _chart(rows: pd.DataFrame, levels: dict[str, float], styles: dict) -> dict:
    """One task's. Its parameters are set from outside: see static/charts.js."""
    spec = json.loads(SPEC.read_text(encoding="utf-8"))
    colours, dashes = zip(*styles.values())
    dashes = [[float(part) for part in text.split()] or [1, 0] for text in dashes]
    for channel, values in (("color", colours), ("strokeDash", dashes)):
        spec["encoding"][channel]["scale"] = {"domain": list(styles), "range": list(values)}
    params = {"size": "parameters", "networks": list(styles), "kinds": list(KINDS)}
    spec["params"] = [{"name": name, "value": value} for name, value in params.items()]
    named = [{"level": name, "mean": value} for name, value in levels.items()]
    return spec | {"datasets": {"rows": rows.to_dict("records"), "levels": named}}


def _controls(styles: dict, first: set[str], kinds: list[str], many: bool) -> str:
    """What is common to a page's charts: kind of size, networks, kinds of training.

    first: the networks that are shown at first; many: points, too, come when they are asked for.
    """
    sizes = "".join(f'<option value="{name}">{label}</option>' for name, label in SIZES.items())
    lines = [
        '<form class="chart-controls" autocomplete="off">',
        f'<label>size: <select name="size">{sizes}</select></label>',
        "<fieldset><legend>networks</legend>",
    ]
    for name, (colour, dashes) in styles.items():
        line = f'<line x2="28" y1="6" y2="6" stroke="{colour}" stroke-dasharray="{dashes}"/>'
        lines.append(_box("networks", name, name, line, name in first))
    lines += ['<button type="button">all</button><button type="button">none</button></fieldset>']
    drawn = {
        None: '<line x2="28" y1="6" y2="6" stroke="currentColor"/>',
        "square": '<rect x="9" y="1" width="10" height="10" fill="currentColor"/>',
        "circle": '<circle cx="14" cy="6" r="5" fill="currentColor"/>',
    }
    lines.append("<fieldset><legend>training</legend>")
    for kind in kinds:
        label, mark = KINDS[kind]
        lines.append(_box("kinds", kind, label, drawn[mark], mark is None or not many))
    return "\n".join([*lines, "</fieldset></form>"])


def _box(group: str, value: str, label: str, drawing: str, checked: bool) -> str:
    value, label = html.escape(value), html.escape(label)
    picture = f'<svg width="28" height="12" stroke-width="2" aria-hidden="true">{drawing}</svg>'
    on = " checked" if checked else ""
    box = f'<input type="checkbox" name="{group}" value="{value}"{on}>'
    return f"<label>{box}{picture}{label}</label>"
