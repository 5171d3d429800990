"""Whether the present code gives the numbers of committed tables: refactoring need cost no study.

    python -m mtprune_utils.vouch --profile quick

Committed runs of other code are drawn at random, one of each stage and criterion (a profile has one
backbone), and repeated with all that they start from, under runs/vouch. Searches that were not
drawn are laid out from the tables. Only if every table is the same, byte for byte, is it noted
beside the tables (results/vouched.json) that the present digests are as good as theirs. They are
compared with

committed tables  where the machine is of the kind that made them: device, threads and torch;
another commit    elsewhere, where the same code gives other last digits. The runs are then repeated
                  twice, by the present code and by a commit whose digests are those of the tables.
                  That is as sound: code is compared with code on one machine, and the digests say
                  that the commit is the code that made the tables.

The draw's seed follows from the digests: nobody chooses it, and what was interrupted goes on when
it is started again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mtprune_utils import results, stages
from mtprune_utils.batch import ENVIRONMENT
from mtprune_utils.data import data_root
from mtprune_utils.files import PACKAGE, PROJECT, read_json, write_json
from mtprune_utils.runs import TABLES, Experiment, Run, code_digest, git, provenance, uncommitted

FIGURES = PROJECT / "figures"
# In a process of its own, in another commit's tree too: what it calls has to stay. It says its
# digests, and what its runs are called. Then each line is a chain of runs, with the files that a run
# is given, or null for one to be made; it answers with their folders.
REPEATER = """
import json, sys
from mtprune_utils import files, runs, stages
answers, sys.stdout = sys.stdout, sys.stderr
experiment = runs.Experiment.open(**json.loads(sys.argv[1]))
digests = {stage: runs.code_digest(stage, experiment.data) for stage in runs.TABLES}
print(json.dumps([digests, [run.name for run in experiment.runs()]]), file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    chain = [(runs.Run(experiment, stage, **cell), given) for stage, cell, given in asked]
    for run, given in chain:
        if given is None:
            stages.execute(run, report=lambda line: None)
        elif not run.done:
            for file, text in given.items():
                files.write_atomically(run.path(file), text.encode())
            run.finish(digests[run.stage])
    print(json.dumps([str(run.folder) for run, given in chain]), file=answers, flush=True)
"""


def vouch(experiment: Experiment, base: str | None = None) -> list[dict]:
    """Repeat, compare, and stamp. Returns the stamps: one for each stage with runs of other code.

    base: the commit to compare with; by default, where another machine made the tables, their own.
    Raises ValueError, and stamps nothing, if a table differs or there is nothing to compare with.
    """
    experiment.check()
    commit = git("rev-parse", "HEAD")
    if commit is None or uncommitted("mtprune_utils"):
        raise ValueError("a stamp names a commit: commit what has changed in mtprune_utils first")
    place = PROJECT / "runs" / "vouch" / experiment.label
    committed = replace(experiment, root=place / "committed")
    shutil.rmtree(committed.root, ignore_errors=True)  # since an earlier start tables may be others
    results.restore(committed, FIGURES)
    code_of = {run: run.marker["code"] for run in committed.runs() if run.done}
    runs = [run for run, code in code_of.items() if experiment.refusal(run.stage, code)]
    if not runs:
        print(f"{experiment.label}: nothing to vouch for, no committed run is of other code")
        return []
    stages_made = dict.fromkeys(run.stage for run in runs)
    codes = {s: sorted({code_of[run] for run in runs if run.stage == s}) for s in stages_made}
    now = {stage: code_digest(stage, experiment.data) for stage in codes}
    seed = int(hashlib.sha256(json.dumps([codes, now]).encode()).hexdigest()[:8], 16)
    drawn, origins = draw(runs, seed), [read_json(run.path("provenance.json")) for run in runs]
    stages.set_up(experiment.profile, device := stages.device_of(experiment.profile))
    kind = {"threads": torch.get_num_threads(), "device": stages.device_kind(device)}
    here = _machine(provenance("dense", experiment.data) | kind)
    with contextlib.ExitStack() as stack:
        other = None
        if base or any(_machine(origin) != here for origin in origins):
            tables = str(experiment.vouched_file.with_name(results.RECORDS))
            touched = (git("log", "--format=%H", "--", tables) or "").split()
            commits = [git("rev-parse", base) or base] if base else [*touched, *(origin["commit"] for origin in origins)]
            base, other = stack.enter_context(_code_of(codes, drawn, commits, place))
        compared = f"commit {base} on this machine" if other else "committed tables"
        print(f"{experiment.label}: {len(drawn)} of {len(runs)} runs, drawn with seed {seed}; "
              f"compared with {compared} ({here['device']})", flush=True)
        present = stack.enter_context(_repeater(PACKAGE.parent, experiment, place / f"{seed:08x}"))
        _answer(present)  # its digests and names
        for i, run in enumerate(drawn, 1):
            _compare(_chain(run, drawn), present, other, compared)
            print(f"[{i}/{len(drawn)}] {run.stage} {run.name}: the same", flush=True)
    more = {"commit": commit, "base": base, "compared": compared, "machine": here, "seed": seed,
            "repeated": [f"{run.stage}/{run.name}" for run in drawn]}
    stamps = [{"stage": stage, "from": codes[stage], "to": now[stage], **more} for stage in codes]
    earlier = read_json(experiment.vouched_file) if experiment.vouched_file.exists() else []
    write_json(experiment.vouched_file, [*earlier, *stamps])
    shutil.rmtree(place)
    return stamps


def draw(runs: list[Run], seed: int) -> list[Run]:
    """One run of each stage and criterion, in the given order."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.stage, run.criterion), []).append(run)
    chance = random.Random(seed)
    return sorted((chance.choice(group) for group in groups.values()), key=runs.index)


def _machine(origin: dict) -> dict:
    """What of a machine a run's bits depend on."""
    torch_version = {"torch": origin["packages"]["torch"]}
    return {"device": origin["device"], "threads": origin["threads"], **torch_version}


def _chain(run: Run, drawn: list[Run]) -> list[tuple[Run, dict | None]]:
    """The run after what it starts from; a search that was not drawn with the files it is given."""
    if run.stage == "tune" and run not in drawn:
        known = [file for file in run.folder.iterdir() if file.name != "done.json"]
        return [(run, {file.name: file.read_text() for file in known})]
    return [*(link for source in run.inputs for link in _chain(source, drawn)), (run, None)]


def _compare(chain: list[tuple[Run, dict | None]], present, other, compared: str) -> None:
    """Raises ValueError for the first table that differs."""
    sides = [present, other] if other else [present]
    asked = json.dumps([(run.stage, run.cell, given) for run, given in chain])
    for side in sides:  # at the same time
        print(asked, file=side.stdin, flush=True)
    found = [_answer(side) for side in sides]
    for i, (run, given) in enumerate(chain):
        after, before = Path(found[0][i]), Path(found[1][i]) if other else run.folder
        for table in TABLES[run.stage] if given is None else ():
            if (after / table).read_bytes() != (before / table).read_bytes():
                raise ValueError(
                    f"{run.stage} {run.name}: {table} is not that of {compared}. Numbers have "
                    f"changed, nothing is stamped. Compare {after / table} with {before / table}"
                )


@contextlib.contextmanager
def _code_of(
    codes: dict[str, list[str]], drawn: list[Run], commits: list[str], place: Path
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The first of the commits that has these digests and runs, and a process that runs it."""
    experiment = drawn[0].experiment
    for commit in dict.fromkeys(commits):
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            tree = Path(scratch, "base")
            if git("worktree", "add", "--detach", str(tree), commit) is None:
                raise ValueError(f"git has no commit {commit!r} to compare with: see --base")
            stack.callback(git, "worktree", "remove", "--force", str(tree))
            other = stack.enter_context(_repeater(tree, experiment, place / commit))
            digests, names = _answer(other)
            known = all({run.name, run.stream} & {*names} for run in drawn)  # by either of its names
            if known and all({*codes[s]} <= experiment.same_code(s, digests[s]) for s in codes):
                yield commit, other
                return
    raise ValueError(f"{', '.join(commits)}: not the code and the numbers that made the tables, by "
                     f"their digests {codes}: name another commit with --base")


@contextlib.contextmanager
def _repeater(tree: Path, experiment: Experiment, runs: Path) -> Iterator[subprocess.Popen]:
    """A process that repeats runs, into that folder, by the code of a working tree."""
    root = experiment.data_root and str(Path(data_root(experiment.data_root)).resolve())
    own = {"profile": experiment.profile.name, "data": experiment.data, "root": root}
    command = [sys.executable, "-c", REPEATER, json.dumps(own | {"runs": str(runs)})]
    with subprocess.Popen(
        command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=ENVIRONMENT | os.environ | {"PYTHONPATH": str(tree)},
    ) as process:
        try:
            yield process
        finally:
            process.terminate()  # what it is at keeps a checkpoint


def _answer(process: subprocess.Popen):
    if not (line := process.stdout.readline()):
        raise ValueError("a repetition has failed, for the reason above: nothing is stamped")
    return json.loads(line)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--data", default="rooms")
    parser.add_argument("--root", default="")
    parser.add_argument("--base", metavar="COMMIT", help="what to compare with, see above")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        experiment = Experiment.open(options.profile, options.data, options.root, "runs")
        for stamp in vouch(experiment, options.base):
            print(f"{stamp['stage']}: {stamp['to']} gives what {', '.join(stamp['from'])} gave")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
