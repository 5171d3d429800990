"""Writes the parts of README.md that runs know better than people: between `<!-- name -->` and `<!-- /name -->`."""

from pathlib import Path

import pandas as pd

from mtprune_utils.plots import LABELS, PANELS
from mtprune_utils.runs import PROJECT, read_json, write_atomically

NOTEBOOKS = {  # notebook: (item of the paper, stage it runs or figure it draws)
    "01_train_dense": ("§4, the network that pruning starts from", "dense"),
    "02_prune_iteratively": ("§3, iterative pruning with Taylor or CosPrune", "prune"),
    "03_retrain_from_scratch": ("§4.2, found architectures from random weights", "retrain"),
    "04_plot_fig1_iterative_pruning": ("Figure 1", "fig1_iterative_pruning"),
    "05_plot_fig2_layer_widths": ("Figure 2", "fig2_layer_widths"),
    "06_plot_fig3_retrained_from_scratch": ("Figure 3", "fig3_retrained_from_scratch"),
}


def notebook_table(figures: Path) -> str:
    """Each notebook with the paper's item, the command, minutes per run in the quick batch, and its figure."""
    timings = pd.read_csv(figures / "timings.csv")
    lines = ["| paper | notebook | what the batch ran | minutes each | figure |", "|---|---|---|---|---|"]
    for notebook, (item, what) in NOTEBOOKS.items():
        runs = timings[timings["job"].str.split().str[0].eq(what) | timings["job"].eq(f"figure {what}")]
        image = figures / f"{what}.png"
        figure = f"[{what}]({image.relative_to(PROJECT).as_posix()})" if image.exists() else ""
        link = f"[{notebook}](notebooks/{notebook}.ipynb)"
        lines.append(f"| {item} | {link} | {len(runs)} runs | {runs['seconds'].mean() / 60:.1f} | {figure} |")
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
            cells = (PANELS[metric], _number(point["position_prior"]), _number(point["dense_network"]), LABELS[criterion],
                     f"{point['x'] / 1000:.0f} k", _spread(near), _spread(point))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Mean ± standard deviation over {seeds} seeds, on the test images."])


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _spread(row: pd.Series) -> str:
    return f"{_number(row['mean'])} ± {_number(row['sd'])}"


def updated(text: str, figures: Path) -> str:
    """README's text with every generated part renewed from the given folder of figures."""
    parts = {"notebooks": notebook_table(figures), "results": result_table(figures)}
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start not in text or end not in text:
            raise ValueError(f"README.md has no {start.strip()} ... {end}")
        text = text[: text.index(start) + len(start)] + part + "\n" + text[text.index(end) :]
    return text


if __name__ == "__main__":
    readme = PROJECT / "README.md"
    write_atomically(readme, updated(readme.read_text(), PROJECT / "figures" / "quick").encode())
