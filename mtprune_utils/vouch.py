"""Whether the present code gives the numbers of the committed tables: a refactoring need not cost a study.

    python -m mtprune_utils.vouch --profile quick

Committed runs of other code are drawn at random, one of each stage and criterion (a profile has one backbone), and
repeated with all that they start from, under runs/vouch. Searches that were not drawn are laid out from the tables.
Only if every table is the same, byte for byte, is it noted beside the tables (results/vouched.json) that the present
code's digests are as good as theirs. They are compared with

committed tables  where the machine is of the kind that made them: device, threads and version of torch; or with
another commit    where it is not, since the same code gives other last digits there. The runs are then repeated twice
                  on one machine, by the present code and by a commit whose digests are those of the tables. That is
                  as sound: code is compared with code, and the digests say that the commit is what made the tables.

The draw's seed follows from the digests: nobody chooses it, and what was interrupted goes on when started again.
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
from mtprune_utils.files import PACKAGE, PROJECT, read_json, write_json
from mtprune_utils.runs import TABLES, Experiment, Run, code_digest, git, provenance

FIGURES = PROJECT / "figures"
# In a process of its own, in another commit's tree too: what it calls has to stay. It says its digests, then answers
# each line, a chain of runs with the files that each is given (null: it is to be made), with the folders of these runs.
REPEATER = """
import json, sys
from mtprune_utils import files, runs, stages
experiment, answers, sys.stdout = runs.Experiment.open(**json.loads(sys.argv[1])), sys.stdout, sys.stderr
digests = {stage: runs.code_digest(stage, experiment.data) for stage in runs.TABLES}
print(json.dumps(digests), file=answers, flush=True)
for line in sys.stdin:
    chain = [(runs.Run(experiment, stage, **cell), given) for stage, cell, given in json.loads(line)]
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
    """Repeat, compare, and stamp. Returns the stamps, one for each stage that had results of other code.

    base: the commit to repeat them with too; without it, where another machine made the tables, the one that made them.
    Raises ValueError if a table differs, or if what to compare with cannot be had; then nothing is stamped.
    """
    experiment.check()
    commit = git("rev-parse", "HEAD")
    if commit is None or git("status", "--porcelain", "--untracked-files=no", "--", "mtprune_utils"):
        raise ValueError("a stamp names a commit of this repository: commit what has changed in mtprune_utils first")
    place, folder = PROJECT / "runs" / "vouch" / experiment.label, experiment.vouched_file.parent
    committed = replace(experiment, root=place / "committed")
    shutil.rmtree(committed.root, ignore_errors=True)  # of an earlier start: tables may have changed since
    results.restore(committed, FIGURES)
    runs = [run for run in committed.runs() if run.done and experiment.refusal(run.stage, run.marker["code"])]
    if not runs:
        print(f"{experiment.label}: no committed run is of other code, there is nothing to vouch for")
        return []
    codes = {run.stage: sorted({r.marker["code"] for r in runs if r.stage == run.stage}) for run in runs}
    now = {stage: code_digest(stage, experiment.data) for stage in codes}
    seed = int(hashlib.sha256(json.dumps([codes, now]).encode()).hexdigest()[:8], 16)
    drawn, origins = draw(runs, seed), [read_json(run.path("provenance.json")) for run in runs]
    stages.set_up(experiment.profile, device := stages.device_of(experiment.profile))
    kind = {"threads": torch.get_num_threads(), "device": stages.device_kind(device)}
    here = _machine(provenance("dense", experiment.data) | kind)
    with contextlib.ExitStack() as stack:
        other = None
        if base or any(_machine(origin) != here for origin in origins):
            last = git("log", "-1", "--format=%H", "--", str(folder / results.RECORDS))
            commits = [base] if base else dict.fromkeys([last, *(origin["commit"] for origin in origins)])
            base, other = stack.enter_context(_code_of(codes, experiment, commits, place))
        compared = f"commit {base} on this machine" if other else "committed tables"
        print(f"{experiment.label}: {len(drawn)} of {len(runs)} runs, drawn with seed {seed}; "
              f"compared with {compared} ({here['device']})", flush=True)
        present = stack.enter_context(_repeater(PACKAGE.parent, experiment, place / f"{seed:08x}"))
        _answer(present)  # its digests
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
    return {"device": origin["device"], "threads": origin["threads"], "torch": origin["packages"]["torch"]}


def _chain(run: Run, drawn: list[Run]) -> list[tuple[Run, dict | None]]:
    """The run after what it starts from, each with the committed files that it is given: searches not drawn."""
    if run.stage == "tune" and run not in drawn:
        return [(run, {file.name: file.read_text() for file in run.folder.iterdir() if file.name != "done.json"})]
    return [*(link for source in run.inputs for link in _chain(source, drawn)), (run, None)]


def _compare(chain: list[tuple[Run, dict | None]], present, other, compared: str) -> None:
    """Raises ValueError for the first table that differs."""
    sides = [present, other] if other else [present]
    for side in sides:  # at the same time
        print(json.dumps([(run.stage, run.cell, given) for run, given in chain]), file=side.stdin, flush=True)
    new, old = [[Path(folder) for folder in _answer(side)] for side in sides] + [[r.folder for r, _ in chain]] * (not other)
    for (run, given), *folders in zip(chain, new, old):
        for table in TABLES[run.stage] if given is None else ():
            after, before = (folder / table for folder in folders)
            if after.read_bytes() != before.read_bytes():
                raise ValueError(f"{run.stage} {run.name}: {table} is not that of {compared}: the present code changes "
                                 f"numbers, and nothing is stamped. Compare {after} with {before}")


@contextlib.contextmanager
def _code_of(codes: dict[str, list[str]], experiment: Experiment, commits, place: Path) -> Iterator[tuple]:
    """The first of the commits whose code has these digests, and a process that runs it."""
    for commit in filter(None, commits):
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            tree = Path(scratch, "base")
            if git("worktree", "add", "--detach", str(tree), commit) is None:
                raise ValueError(f"git has no commit {commit!r} here to compare with: name one with --base")
            stack.callback(git, "worktree", "remove", "--force", str(tree))
            other = stack.enter_context(_repeater(tree, experiment, place / commit))
            digests = _answer(other)
            if all({*codes[stage]} <= experiment.same_code(stage, digests[stage]) for stage in codes):
                yield commit, other
                return
    raise ValueError(f"{', '.join(filter(None, commits))}: not the code that made the tables, whose digests are {codes}: "
                     "name another commit with --base")


@contextlib.contextmanager
def _repeater(tree: Path, experiment: Experiment, runs: Path) -> Iterator[subprocess.Popen]:
    """A process that repeats runs, into that folder, by the code of a working tree."""
    root = experiment.data_root and str(Path(experiment.data_root).resolve())
    settings = {"profile": experiment.profile.name, "data": experiment.data, "root": root, "runs": str(runs)}
    with subprocess.Popen(
        [sys.executable, "-c", REPEATER, json.dumps(settings)], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=ENVIRONMENT | os.environ | {"PYTHONPATH": str(tree)},
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
    parser = argparse.ArgumentParser(prog="python -m mtprune_utils.vouch", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--data", default="rooms")
    parser.add_argument("--root", default="")
    parser.add_argument("--base", metavar="COMMIT", help="whose code to compare with; by default what the tables name")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        experiment = Experiment.open(options.profile, options.data, options.root, "runs")
        for stamp in vouch(experiment, options.base):
            print(f"{stamp['stage']}: {stamp['to']} gives the numbers of {', '.join(stamp['from'])}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
