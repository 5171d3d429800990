"""Which figures no longer follow from the code, numbers and data that are here: `mtprune check`."""

import dataclasses
import json
from functools import cache
from pathlib import Path

from mtprune_utils.core.settings import Profile
from mtprune_utils.datasets import data_digest
from mtprune_utils.files import PROJECT, read_json
from mtprune_utils.study import store
from mtprune_utils.study.grid import Experiment, Run
from mtprune_utils.study.profiles import PROFILES, flat

# Results do not depend on these settings.
FREE = {setting.name for setting in dataclasses.fields(Profile) if not setting.compare}


@cache
def present_runs(profile: str, data: str) -> dict[str, Run]:
    """Every run of a profile, by the name that figures tell it by."""
    return {f"{run.stage}/{run.name}": run for run in Experiment(PROFILES[profile], data).runs()}


def other_codes(origin: dict) -> dict[tuple[str, str, str], str]:
    """{(stage, digest of what is shown, present one): why that will not do}, where these differ.

    "" for code that is vouched for.
    """
    runs = present_runs(origin["profile"]["name"], origin["data"])
    told = {(runs[label], run["code"]) for label, run in origin["runs"].items() if label in runs}
    return {
        (run.stage, code, run.code): run.experiment.refusal(run, code)
        for run, code in told
        if code != run.code
    }


def outdated(figure: Path) -> list[str]:
    """What has changed since the figure with this provenance file was made. Empty: nothing."""
    origin = read_json(figure)
    reasons = store.drawn_otherwise(figure.stem, origin)
    name, data, shown = origin["profile"]["name"], origin["data"], origin["runs"]
    if name not in PROFILES:
        return [*reasons, f"profile {name!r} is gone"]
    profiles = (dataclasses.asdict(PROFILES[name]), origin["profile"])
    now, then = (flat(json.loads(json.dumps(profile))) for profile in profiles)
    changed = [key for key in then if now.get(key) != then[key] and key not in FREE]
    reasons += [f"setting: {key}" for key in changed]
    if origin["dirty"] or any(run["dirty"] for run in shown.values()):
        reasons.append("made by uncommitted code")
    try:
        digest, runs = data_digest(data), present_runs(name, data)
    except (OSError, ValueError):
        return [*reasons, f"data: {data} is not here to compare"]
    if any(run["data_digest"] != digest for run in shown.values()):
        reasons.append("data")
    elif not changed and not shown.keys() <= runs.keys():
        reasons.append("runs that the profile no longer has")
    refused = {stage for (stage, *_), refusal in other_codes(origin).items() if refusal}
    return [*reasons, *(f"code: {stage}" for stage in sorted(refused))]


def check(figures: Path = PROJECT / "figures") -> int:
    """Print one line for each committed figure (without git: each) that is outdated or vouched for.

    Returns 1 if any is outdated or none is there, else 0.
    """
    committed = store.git("ls-files", "--", str(figures))
    found = compared = 0
    for figure in sorted(figures.glob("*/*.json")):
        place = figure.relative_to(figures.parent)
        if committed is not None and place.as_posix() not in committed.splitlines():
            continue
        compared += 1
        name = place.with_suffix("")
        if reasons := outdated(figure):
            found = 1
            print(f"{name}: changed since are {', '.join(reasons)}")
        elif other := other_codes(read_json(figure)):
            vouched = sorted(f"{stage} ({code} for {now})" for stage, code, now in other)
            print(f"{name}: follows from code that is vouched for: {', '.join(vouched)}")
    if not compared:
        print(f"Nothing was compared: {figures} holds no committed figure.")
        return 1
    if not found:
        print("Every figure follows from the code, the numbers and the data that are here.")
    return found
