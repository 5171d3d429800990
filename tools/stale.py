"""Which figures no longer follow from the code, numbers and data that are here: `make check`."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from mtprune_utils.data import data_digest
from mtprune_utils.execution import FIGURE_NOTEBOOKS, notebook_digest
from mtprune_utils.files import PROJECT, read_json
from mtprune_utils.profiles import PROFILES, Profile, flat
from mtprune_utils.runs import Experiment, code_digest, git


def drawn_otherwise(figure: Path, origin: dict) -> list[str]:
    """What has changed of the code that drew the figure with this provenance."""
    reasons = ["code: figure"] if origin["code"] != code_digest("figure") else []
    notebook = FIGURE_NOTEBOOKS.get(figure.stem)
    changed = notebook and origin.get("notebook") != notebook_digest(PROJECT / notebook)
    return [*reasons, "code: notebook"] if changed else reasons


def is_current(figure: Path, experiment: Experiment) -> bool:
    """Whether the figure with this provenance file would be drawn alike from the runs here."""
    runs = {f"{run.stage}/{run.name}": run.content for run in experiment.runs() if run.done}
    try:
        origin = read_json(figure)
        shown = {label: run["content"] for label, run in origin["runs"].items()}
        same_margin = origin["profile"]["margin"] == experiment.profile.margin
        return shown.items() <= runs.items() and same_margin and not drawn_otherwise(figure, origin)
    except (ValueError, LookupError, TypeError):  # no JSON, or not what `save_figure` writes
        return False


def other_codes(origin: dict) -> dict[str, tuple[str, str]]:
    """{stage: (their digest, the present one)} of the runs shown, where these are not the same."""
    codes = sorted({(label.split("/")[0], run["code"]) for label, run in origin["runs"].items()})
    now = {stage: code_digest(stage, origin["data"]) for stage, _ in codes}
    return {stage: (code, now[stage]) for stage, code in codes if code != now[stage]}


def outdated(figure: Path) -> list[str]:
    """What has changed since the figure with this provenance file was made. Empty: nothing."""
    origin = read_json(figure)
    name, data = origin["profile"]["name"], origin["data"]
    reasons = drawn_otherwise(figure, origin)
    if name not in PROFILES:
        return [*reasons, f"profile {name!r} is gone"]
    same = Experiment(PROFILES[name], data).same_code
    other = other_codes(origin).items()
    reasons += [f"code: {stage}" for stage, (code, now) in other if code not in same(stage, now)]
    now, then = (flat(json.loads(json.dumps(profile))) for profile in (dataclasses.asdict(PROFILES[name]), origin["profile"]))
    free = {setting.name for setting in dataclasses.fields(Profile) if not setting.compare}  # results do not depend on them
    reasons += [f"setting: {key}" for key in then if now.get(key) != then[key] and key not in free]
    try:
        digest = data_digest(data)
    except (OSError, ValueError):
        reasons.append(f"data: {data} is not here to compare")
    else:
        reasons += ["data"] if any(run["data_digest"] != digest for run in origin["runs"].values()) else []
    if origin["dirty"] or any(run["dirty"] for run in origin["runs"].values()):
        reasons.append("made by uncommitted code")
    return reasons


def main(figures: Path = PROJECT / "figures") -> int:
    """Print one line for each committed figure (without git: each) that is outdated or vouched for.

    Returns 1 if any is outdated or none is there, else 0.
    """
    committed = git("ls-files", "--", str(figures))
    found = compared = 0
    for figure in sorted(figures.glob("*/*.json")):
        if committed is not None and figure.relative_to(figures.parent).as_posix() not in committed.splitlines():
            continue
        compared += 1
        shown = figure.relative_to(figures.parent).with_suffix("")
        if reasons := outdated(figure):
            found = 1
            print(f"{shown}: changed since are {', '.join(reasons)}")
        elif other := other_codes(read_json(figure)):
            vouched = (f"{stage} ({code} for {now})" for stage, (code, now) in other.items())
            print(f"{shown}: follows from code that is vouched for: {', '.join(vouched)}")
    if not compared:
        print(f"Nothing was compared: {figures} holds no committed figure.")
        return 1
    if not found:
        print("Every figure follows from the code, the numbers and the data that are here.")
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ["MTPRUNE_OFFLINE"] = "1"  # data that is not here stays where it is
    sys.exit(main())
