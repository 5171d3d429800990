"""Writes what runs know better than people: README.md's and docs' parts between two comments.

They stand between `<!-- name -->` and `<!-- /name -->`.
"""

import argparse
from pathlib import Path

import pandas as pd

from mtprune_utils.files import PROJECT, read_json, write_atomically
from mtprune_utils.stages import get_stage, stage_names
from mtprune_utils.study import comparison, store
from mtprune_utils.study.figures import style_of, title

CLAIM_PROFILES = ("study", "quick")  # the first one that has runs of all of these decides them
CLAIMS = {  # the README's rows of Table 1, in the paper's terms
    "1": "One multi-task network saves computation and storage against one network per task.",
    "2": "Tuned and at equal size, the two criteria find architectures that do not differ "
    "(re-trained from scratch).",
    "2 literal": "The same word for word: no *significant* difference.",
    "2i": "The same of the iteratively pruned networks.",
    "3": "Iterative pruning collapses at extreme levels, in every task.",
    "4": "The same architectures, re-trained from random weights, do better.",
    "4 longer": "Stricter: they do better than fine-tuned ones too, at about equal steps in all.",
    "2 vs uniform": "Control: the architectures found, against uniform ones of equal size.",
}
ZOO = {  # folder of figures: the network and its data
    "zoo": "VGG-16 on rooms",
    "zoo_resnet18": "ResNet-18 on rooms",
    "zoo_fashion-multifashion": "VGG-16 on MultiFashion",
}
NAMED = 3  # so many criteria at most are named in a cell
RESULTS = {"study": "study", "quick": "quick", "fashion": "fashion-multifashion"}


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    """In Markdown."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def notebook_table(figures: Path) -> str:
    """Each notebook: what it shows, a command, the batch's runs and minutes, its figure.

    figures: the folder of all profiles.
    """
    timings = pd.read_csv(figures / "quick" / store.TIMINGS)
    stage_of = {get_stage(stage).NOTEBOOK: stage for stage in stage_names()}
    rows = []
    for path in store.notebook_paths():
        about = store.about_notebook(path)
        if "shows" not in about:
            continue
        stage, (figure, *_) = stage_of.get(path.stem), about.get("figures", [""])
        of_stage = timings["job"].str.split().str[0].eq(stage)
        runs = timings[of_stage | timings["job"].eq(f"figure {figure}")]
        images = [figures / label / f"{figure}.png" for label in ("quick", *ZOO)]
        there = next((image for image in images if image.exists()), None)
        shown = f"[{figure}](figures/{there.parent.name}/{there.name})" if there else ""
        link = f"[{path.stem}](notebooks/{path.name})"
        minutes = f"{runs['seconds'].mean() / 60:.1f}" if len(runs) else "–"
        rows.append((about["shows"], link, f"`{about['example']}`", len(runs), minutes, shown))
    header = ("paper", "notebook", "one run", "runs in the batch", "minutes each", "figure")
    return _table(header, rows)


def result_table(figures: Path) -> str:
    """Figure 3 in numbers: at each size, both arms of both criteria."""
    table = pd.read_csv(figures / "fig3_retrained_from_scratch.csv")
    points = table[(table["size"] == "parameters") & (table["kind"] == "point")]
    rows = []
    cells = points.groupby(["metric", "criterion", "tuned_for"], sort=False)
    for (metric, criterion, _), arms in cells:
        arms = arms.set_index("arm")
        digits = 3 if arms["mean"].max() < 10 else 1
        levels = (
            f"{arms[level].iloc[0]:.{digits}f}" for level in ("position_prior", "dense_network")
        )
        both = (
            f"{arms.loc[arm, 'mean']:.{digits}f} ± {arms.loc[arm, 'sd']:.{digits}f}"
            for arm in ("iterative", "scratch")
        )
        parameters = f"{arms.loc['scratch', 'x'] / 1000:.0f} k"
        rows.append((title(metric), *levels, style_of(criterion)[1], parameters, *both))
    header = (
        "metric",
        "position prior",
        "dense",
        "criterion",
        "parameters",
        "iterative",
        "from scratch",
    )
    seeds = len(read_json(figures / "fig3_retrained_from_scratch.json")["seeds"])
    note = f"Mean ± standard deviation over {seeds} seeds, on the test images."
    return f"{_table(header, rows)}\n\n{note}"


def claims_table(figures: Path) -> str:
    """What the numbers say of each of CLAIMS, by the first of CLAIM_PROFILES that has runs of all.

    figures: the folder of all profiles.
    """
    judged = {name: figures / name / "table1_claims.csv" for name in CLAIM_PROFILES}
    tables = {
        name: pd.read_csv(path, index_col="claim").reindex(CLAIMS)
        for name, path in judged.items()
        if path.exists()
    }
    whole = (name for name, table in tables.items() if table["seeds"].notna().all())
    profile = next(whole, CLAIM_PROFILES[-1])
    rows = [
        (claim, CLAIMS[claim], f"**{row['outcome']}**: {row['says']}", f"**{row['paper']}**")
        for claim, row in tables[profile].iterrows()
    ]
    header = ("", "the paper says", "the numbers say", "do they agree with the paper?")
    folder, seeds = f"figures/{profile}", int(tables[profile]["seeds_most"].max())
    source = (
        f"From the `{profile}` profile: {seeds} seeds, small networks, rendered rooms. Each cell "
        "is judged by itself; nothing is averaged over cells. "
        f"[Every cell in one figure]({folder}/fig5_claims.png). "
        "[What each word means](notebooks/08_judge_claims.ipynb). "
        "[All comparisons, and the reasons](docs/results.md)."
    )
    return f"{_in_short(tables[profile])}\n\n{_table(header, rows)}\n\n{source}"


def _in_short(table: pd.DataFrame) -> str:
    """With which of the paper's claims the numbers agree. table: Table 1, by claim."""
    verdicts = table.loc[["1", "2", "3", "4"], "paper"]
    words = {"agrees": "agree with", "disagrees": "disagree with", "cannot say": "cannot say of"}
    parts = []
    for verdict, said in words.items():
        claims = list(verdicts.index[verdicts == verdict])
        if claims:
            parts.append(f"{said} claim{'s' * (len(claims) > 1)} {' and '.join(claims)}")
    return f"**In short, the numbers {'; they '.join(parts)}.**"


def zoo_table(figures: Path) -> str:
    """Whether the criterion matters, by Figure 8 of each profile of the zoo that there is."""
    rows = []
    for folder, network in ZOO.items():
        path = figures / folder / "fig8_criteria.csv"
        table = pd.read_csv(path) if path.exists() else pd.DataFrame({"low": []})
        if table["low"].notna().any():  # of more than one seed
            rows.append(_zoo_row(table, figures / folder, network))
    if not rows:
        return ""
    header = (
        "pruned, criteria × seeds × cells",
        "fine-tuned, against random filters",
        "re-trained, against uniform widths",
        "own filters, against random ones at the same widths",
    )
    return _table(header, rows)


def _zoo_row(table: pd.DataFrame, folder: Path, network: str) -> tuple[str, ...]:
    about, place = read_json(folder / "fig8_criteria.json"), f"figures/{folder.name}"
    criteria, seeds = len(about["profile"]["criteria"]), len(about["seeds"])
    cells = len(table[["level", "task"]].drop_duplicates())
    found = {name: comparison.against(table, *sides) for name, sides in comparison.SUMMARY.items()}
    whole, choice, _, widths = found.values()
    better, worse, tried = choice[["ahead", "behind", "cells"]].sum()
    return (
        f"[{network}]({place}/fig8_criteria.png), {criteria} × {seeds} × {cells}, "
        f"[counted]({place}/table4_criteria.csv)",
        _ahead_and_behind(whole),
        _ahead_and_behind(widths),
        f"of {tried} cells, {better} ahead and {worse} behind ({', '.join(choice.index)})",
    )


def _ahead_and_behind(counts: pd.DataFrame) -> str:
    """Of criteria, by the cells in which each is told apart; the few of a kind are named."""
    ahead, behind = counts["ahead"] > 0, counts["behind"] > 0
    kinds = {
        "ahead": ahead & ~behind,
        "behind": behind & ~ahead,
        "both": ahead & behind,
        "neither": ~ahead & ~behind,
    }
    words = []
    for what, chosen in kinds.items():
        names = list(counts.index[chosen])
        few = f" ({', '.join(names)})" if len(names) <= NAMED else ""
        words += [f"{len(names)} {what}{few}"] if names else []
    return ", ".join(words)


def whole_claims_table(figures: Path) -> str:
    """Table 1 of one profile: every comparison, with the note that says why."""
    table = pd.read_csv(figures / "table1_claims.csv", dtype={"note": str}).fillna({"note": ""})
    rows = []
    for _, row in table.iterrows():
        few, most = row["seeds"], row["seeds_most"]
        several = f"{few:.0f}" if few == most else f"{few:.0f} to {most:.0f}"
        seeds = "–" if pd.isna(few) else several
        cells = row["claim"], row["statement"], f"**{row['outcome']}**: {row['says']}", seeds
        rows.append((*cells, row["paper"], row["note"]))
    return _table(("", "comparison", "the numbers say", "seeds", "the paper", "note"), rows)


def speed_table(benchmarks: Path) -> str:
    """Every ratio that `make bench` has measured, on each kind of machine.

    benchmarks: the folder of their tables.
    """
    rows = []
    for path in sorted(benchmarks.glob("*.csv")):
        for _, row in pd.read_csv(path).iterrows():
            ratio, spread = f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"
            rows.append((f"`{row['name']}`", row["setting"], ratio, spread, row["machine"]))
    return _table(("ratio", "setting", "median", "10 % to 90 % of rounds", "machine"), rows)


def gpu_tables(benchmarks: Path) -> str:
    """What `make gpu` has measured, machine by machine: steps, whole runs, rankings, checks."""
    parts = []
    for folder in sorted(path.parent for path in benchmarks.glob("*/steps.csv")):
        steps = pd.read_csv(folder / "steps.csv")
        steps = steps[(steps["layout"] == "channels-last") & (steps["kernels"] == "tuned")]
        cell = ["network", "precision"]
        rates = steps.pivot(index=cell, columns="step", values="steps_per_second")
        rates = rates.dropna()  # cut short
        share = steps[steps["step"] == "plain"].set_index(cell)
        rows = [
            (
                *of,
                *(f"{rate:.0f}" for rate in rates.loc[of]),
                f"{share.loc[of, 'share_of_matrix_peak']:.0%}",
            )
            for of in share.index
            if of in rates.index
        ]
        names = [f"{step}, steps/s" for step in rates.columns]
        steps_table = _table(("network", "precision", *names, "plain, of the peak"), rows)
        runs = []
        for path in sorted(folder.glob("run-*.csv")):
            run = pd.read_csv(path)
            taken = run[["train_seconds", "removal_seconds", "evaluation_seconds"]].sum().sum()
            counts = (len(run), run["steps"][0], run["steps_in_full"][0])
            minutes = (f"{taken / 60:.1f}", f"{run['seconds_in_full'].sum() / 60:.1f}")
            runs.append((path.stem.removeprefix("run-"), *counts, *minutes))
        header = ("criterion", "stretches", "steps each", "of", "minutes", "minutes in full")
        ranked = pd.read_csv(folder / "scores.csv")
        of_both = ranked["chosen by both, of 100"].map("{:.0%}".format)
        ranked = ranked.assign(**{"of 100 filters, chosen by both": of_both})
        columns = ["criterion", "comparison", "rank correlation", "of 100 filters, chosen by both"]
        checks = pd.read_csv(folder / "checks.csv")[["check", "outcome", "detail"]]
        tables = (
            steps_table,
            _table(header, runs),
            *(
                _table(tuple(table.columns), list(table.itertuples(index=False)))
                for table in (ranked[columns], checks)
            ),
        )
        parts.append("\n\n".join((f"**{folder.name}**", *tables)))
    return "\n\n".join(parts)


def documents(figures: Path) -> dict[str, str]:
    """{document: its text with every generated part renewed}. figures: of all profiles."""
    quick, measured = figures / "quick", PROJECT / "benchmarks" / "results"
    parts = {
        "README.md": {
            "claims": claims_table(figures),
            "zoo": zoo_table(figures),
            "notebooks": notebook_table(figures),
        },
        "docs/results.md": {
            **{name: whole_claims_table(figures / folder) for name, folder in RESULTS.items()},
            "results": result_table(quick),
        },
        "docs/speed.md": {"speed": speed_table(measured), "gpu": gpu_tables(measured)},
    }
    return {document: _renewed(document, generated) for document, generated in parts.items()}


def _renewed(document: str, parts: dict[str, str]) -> str:
    text = (PROJECT / document).read_text(encoding="utf-8")
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if start not in text or end not in text:
            raise ValueError(f"{document} has no {start.strip()} ... {end}")
        text = text[: text.index(start) + len(start)] + part + "\n" + text[text.index(end) :]
    return text


def renew() -> None:
    """Write the repository's documents anew, from its figures."""
    for document, text in documents(PROJECT / "figures").items():
        write_atomically(PROJECT / document, text.encode())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    renew()
