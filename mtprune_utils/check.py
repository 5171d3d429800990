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
from mtprune_utils.runs import code_digest, git


def outdated(figure: Path) -> list[str]:
    """What has changed since the figure with this provenance file was made. Empty: nothing."""
    origin = read_json(figure)
    name, data = origin["profile"]["name"], origin["data"]
    reasons = []
    if origin["code"] != code_digest("figure"):
        reasons.append("code: figure")
    if (notebook := FIGURE_NOTEBOOKS.get(figure.stem)) and origin.get("notebook") != notebook_digest(PROJECT / notebook):
        reasons.append("code: notebook")
    made_by = {(label.split("/")[0], run["code"]) for label, run in origin["runs"].items()}
    digests = {stage: code_digest(stage, data) for stage, _ in made_by}
    reasons += [f"code: {stage}" for stage in sorted({stage for stage, code in made_by if code != digests[stage]})]
    if name not in PROFILES:
        return [*reasons, f"profile {name!r} is gone"]
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
    """Print one line for each outdated figure that is committed (each that there is, without git). Returns 1 if any, else 0."""
    found, committed = 0, git("ls-files", "--", str(figures))
    for figure in sorted(figures.glob("*/*.json")):
        if committed is not None and figure.relative_to(figures.parent).as_posix() not in committed.splitlines():
            continue
        if reasons := outdated(figure):
            found = 1
            print(f"{figure.relative_to(figures.parent).with_suffix('')}: changed since are {', '.join(reasons)}")
    if not found:
        print("Every figure follows from the code, the numbers and the data that are here.")
    return found


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ["MTPRUNE_OFFLINE"] = "1"  # data that is not here stays where it is
    sys.exit(main())
