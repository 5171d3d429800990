"""Writes the parts of README.md that runs know better than people: between `<!-- name -->` and `<!-- /name -->`."""

import argparse
from pathlib import Path

import pandas as pd

from mtprune_utils.files import PROJECT, read_json, write_atomically
from mtprune_utils.plots import style_of, title

NOTEBOOKS = {  # notebook: (item of the paper, stage it runs or figure it draws, its own parameters)
    "01_train_dense": ("the network that pruning starts from", "dense", "-p seed 0"),
    "02_prune_iteratively": ("iterative pruning, Taylor or CosPrune", "prune", "-p criterion cosprune -p seed 0"),
    "03_retrain_from_scratch": ("found architectures from random weights", "retrain", "-p criterion cosprune -p seed 0 -p rank 1"),
    "04_plot_fig1_iterative_pruning": ("Figure 1", "fig1_iterative_pruning", ""),
    "05_plot_fig2_layer_widths": ("Figure 2", "fig2_layer_widths", ""),
    "06_plot_fig3_retrained_from_scratch": ("Figure 3", "fig3_retrained_from_scratch", ""),
    "07_tune_optimizer": ("careful tuning, a part of claim 2", "tune", "-p arm retrain -p criterion taylor -p rank 0"),
    "08_judge_claims": ("the claims' verdicts", "fig5_claims", ""),
    "09_tour_data": ("the data", "", ""),
    "10_measure_speedup": ("what pruning buys at inference", "fig4_speedup", ""),
}
CLAIM_PROFILES = ("study", "quick")  # the first one that has results on every claim decides them


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def notebook_table(figures: Path) -> str:
    """Each notebook with the paper's item, a command, the batch's runs and minutes for each, and its figure."""
    timings = pd.read_csv(figures / "timings.csv")
    rows = []
    for notebook, (item, what, parameters) in NOTEBOOKS.items():
        runs = timings[timings["job"].str.split().str[0].eq(what) | timings["job"].eq(f"figure {what}")]
        image = figures / f"{what}.png"
        figure = f"[{what}]({image.relative_to(PROJECT).as_posix()})" if image.exists() else ""
        link = f"[{notebook}](notebooks/{notebook}.ipynb)"
        profile = "study" if what == "tune" else "quick"  # quick does not tune
        command = f"notebooks/{notebook}.ipynb my_run.ipynb -p profile {profile} {parameters}".strip()
        minutes = f"{runs['seconds'].mean() / 60:.1f}" if len(runs) else "–"
        rows.append((item, link, f"`{command}`", len(runs), minutes, figure))
    return _table(("paper", "notebook", "one run of it: `RUN` and", "runs in the batch", "minutes each", "figure"), rows)


def result_table(figures: Path) -> str:
    """Figure 3 in numbers: at each re-trained size, both arms of both criteria."""
    table = pd.read_csv(figures / "fig3_retrained_from_scratch.csv")
    table = table[table["size"] == "parameters"]
    seeds = len(read_json(figures / "fig3_retrained_from_scratch.json")["seeds"])
    rows = []
    for (metric, criterion), curves in table.groupby(["metric", "criterion"], sort=False):
        iterative = curves[curves["arm"] == "iterative"]
        for _, point in curves[curves["arm"] == "from scratch"].sort_values("x", ascending=False).iterrows():
            near = iterative.iloc[(iterative["x"] - point["x"]).abs().argmin()]
            digits = 3 if point["mean"] < 10 else 1
            levels = (f"{point[level]:.{digits}f}" for level in ("position_prior", "dense_network"))
            arms = (f"{arm['mean']:.{digits}f} ± {arm['sd']:.{digits}f}" for arm in (near, point))
            rows.append((title(metric), *levels, style_of(criterion)[1], f"{point['x'] / 1000:.0f} k", *arms))
    header = ("metric", "position prior", "dense", "criterion", "parameters", "iterative", "from scratch")
    note = f"Mean ± standard deviation over {seeds} seeds, on the test images; iterative: Figure 3's curve at that size."
    return f"{_table(header, rows)}\n\n{note}"


def claims_table(figures: Path) -> str:
    """The verdict on every claim, of the first of CLAIM_PROFILES that has runs of each. figures: the folder of all profiles."""
    judged = {name: figures / name / "table1_claims.csv" for name in CLAIM_PROFILES}
    tables = {name: pd.read_csv(path) for name, path in judged.items() if path.exists()}
    profile = next((name for name, table in tables.items() if (table["seeds"] > 0).all()), CLAIM_PROFILES[-1])
    table, rows = tables[profile], []
    for _, row in table[table["task"] == "all"].iterrows():
        interval = f"{row['low']:+.2f} to {row['high']:+.2f}" if pd.notna(row["low"]) else "–"
        estimate = f"{row['estimate']:+.2f}" if pd.notna(row["estimate"]) else "–"
        note = f" ({row['note']})" if pd.notna(row["note"]) else ""
        rows.append((row["claim"], row["statement"], estimate, interval, row["seeds"], f"**{row['verdict']}**{note}"))
    folder = f"figures/{profile}"
    source = (
        f"From the `{profile}` profile's results so far. Estimates are means over tasks, in shares of the gap between the "
        "position prior (0) and the dense network (1): what is kept (claim 3), or by how much the first named is ahead; "
        f"verdicts are about every task, each with its own interval in "
        f"[table1_claims.csv]({folder}/table1_claims.csv) and [the forest plot]({folder}/fig5_claims.png). The rules are in "
        "[08_judge_claims](notebooks/08_judge_claims.ipynb), written down before the runs, but for three that came later and "
        "can only leave a claim undecided."
    )
    if profile != CLAIM_PROFILES[0]:
        source += " `make study` is what can decide more."
    return f"{_table(('claim', '', 'estimate', '95 % interval', 'seeds', 'verdict'), rows)}\n\n{source}"


def speed_table(benchmarks: Path) -> str:
    """Every ratio that `make bench` has measured, on each kind of machine. benchmarks: the folder of their tables."""
    rows = []
    for path in sorted(benchmarks.glob("*.csv")):
        for _, row in pd.read_csv(path).iterrows():
            spread = f"{row['low']:.2f} to {row['high']:.2f}"
            rows.append((f"`{row['name']}`", row["setting"], f"{row['ratio']:.2f}", spread, row["machine"]))
    return _table(("ratio", "setting", "median", "10 % to 90 % of rounds", "machine"), rows)


def updated(text: str, figures: Path) -> str:
    """README's text with every generated part renewed. figures: the folder of all profiles' figures."""
    quick = figures / "quick"
    parts = {"notebooks": notebook_table(quick), "results": result_table(quick), "claims": claims_table(figures),
             "speed": speed_table(PROJECT / "benchmarks" / "results")}
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start not in text or end not in text:
            raise ValueError(f"README.md has no {start.strip()} ... {end}")
        text = text[: text.index(start) + len(start)] + part + "\n" + text[text.index(end) :]
    return text


def renew() -> None:
    """Write the repository's README.md anew, from its figures."""
    readme = PROJECT / "README.md"
    write_atomically(readme, updated(readme.read_text(), PROJECT / "figures").encode())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    renew()
