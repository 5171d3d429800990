"""Writes the parts of README.md that runs know better than people: between `<!-- name -->` and `<!-- /name -->`."""

from pathlib import Path

import pandas as pd

from mtprune_utils.plots import PANELS, style_of
from mtprune_utils.runs import PROJECT, read_json, write_atomically

NOTEBOOKS = {  # notebook: (item of the paper, stage it runs or figure it draws, its own parameters)
    "01_train_dense": ("the network that pruning starts from", "dense", "-p seed 0"),
    "02_prune_iteratively": ("iterative pruning, Taylor or CosPrune", "prune", "-p criterion cosprune -p seed 0"),
    "03_retrain_from_scratch": (
        "found architectures from random weights", "retrain", "-p criterion cosprune -p seed 0 -p rank 1",
    ),
    "04_plot_fig1_iterative_pruning": ("Figure 1", "fig1_iterative_pruning", ""),
    "05_plot_fig2_layer_widths": ("Figure 2", "fig2_layer_widths", ""),
    "06_plot_fig3_retrained_from_scratch": ("Figure 3", "fig3_retrained_from_scratch", ""),
}


def notebook_table(figures: Path) -> str:
    """Each notebook with the paper's item, a command, the batch's runs and minutes for each, and its figure."""
    timings = pd.read_csv(figures / "timings.csv")
    lines = ["| paper | notebook | one run of it: `RUN` and | runs in the batch | minutes each | figure |", "|---" * 6 + "|"]
    for notebook, (item, what, parameters) in NOTEBOOKS.items():
        runs = timings[timings["job"].str.split().str[0].eq(what) | timings["job"].eq(f"figure {what}")]
        image = figures / f"{what}.png"
        figure = f"[{what}]({image.relative_to(PROJECT).as_posix()})" if image.exists() else ""
        link = f"[{notebook}](notebooks/{notebook}.ipynb)"
        command = f"notebooks/{notebook}.ipynb my_run.ipynb -p profile quick {parameters}".strip()
        minutes = runs["seconds"].mean() / 60
        lines.append(f"| {item} | {link} | `{command}` | {len(runs)} | {minutes:.1f} | {figure} |")
    return "\n".join(lines)


def result_table(figures: Path) -> str:
    """Figure 3 in numbers: at each re-trained size, both arms of both criteria."""
    table = pd.read_csv(figures / "fig3_retrained_from_scratch.csv")
    seeds = len(read_json(figures / "fig3_retrained_from_scratch.json")["seeds"])
    header = ("metric", "position prior", "dense", "criterion", "parameters", "iterative", "from scratch")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for (metric, criterion), rows in table.groupby(["metric", "criterion"], sort=False):
        iterative = rows[rows["arm"] == "iterative"]
        for _, point in rows[rows["arm"] == "from scratch"].sort_values("x", ascending=False).iterrows():
            near = iterative.iloc[(iterative["x"] - point["x"]).abs().argmin()]
            digits = 3 if point["mean"] < 10 else 1
            levels = (f"{point[level]:.{digits}f}" for level in ("position_prior", "dense_network"))
            arms = (f"{arm['mean']:.{digits}f} ± {arm['sd']:.{digits}f}" for arm in (near, point))
            cells = (PANELS[metric], *levels, style_of(criterion)[1], f"{point['x'] / 1000:.0f} k", *arms)
            lines.append("| " + " | ".join(cells) + " |")
    note = f"Mean ± standard deviation over {seeds} seeds, on the test images; iterative: Figure 3's curve at that size."
    return "\n".join([*lines, "", note])


def updated(text: str, figures: Path) -> str:
    """README's text with every generated part renewed from the given folder of figures."""
    parts = {"notebooks": notebook_table(figures), "results": result_table(figures)}
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start not in text or end not in text:
            raise ValueError(f"README.md has no {start.strip()} ... {end}")
        text = text[: text.index(start) + len(start)] + part + "\n" + text[text.index(end) :]
    return text


def renew() -> None:
    """Write the repository's README.md anew, from its figures."""
    readme = PROJECT / "README.md"
    write_atomically(readme, updated(readme.read_text(), PROJECT / "figures" / "quick").encode())


if __name__ == "__main__":
    renew()
