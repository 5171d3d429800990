"""The layout that the code had before: what `vouch` needs to repeat runs of commits from then.

It goes with the next study, when no committed table is of such code.
"""

COLUMNS = {b"landing": b"target_level"}  # of result tables: the name then, and now

# As `vouch.REPEATER`, by modules of then. Runs go by the names that `_streams.stream_of` makes.
REPEATER = """
import json, sys
from mtprune_utils import files, runs, stages
answers, sys.stdout = sys.stdout, sys.stderr
experiment = runs.Experiment.open(**json.loads(sys.argv[1]))
digests = {stage: runs.code_digest(stage, experiment.data) for stage in runs.TABLES}
grid = experiment.runs()
known = {getattr(run, "stream", run.name): digests[run.stage] for run in grid}
print(json.dumps(known), file=answers, flush=True)
for line in sys.stdin:
    chain = []
    for stage, cell, given in json.loads(line):
        rank = cell.pop("level")
        chain.append((runs.Run(experiment, stage, rank=rank, **cell), given))
    for run, given in chain:
        if given is None:
            stages.execute(run, report=lambda line: None)
        elif not run.done:
            for file, text in given.items():
                files.write_atomically(run.path(file), text.encode())
            run.finish(digests[run.stage])
    print(json.dumps([str(run.folder) for run, given in chain]), file=answers, flush=True)
"""


def renamed(table: bytes) -> bytes:
    """A run's CSV with the columns' names of now."""
    header, end, rows = table.partition(b"\n")
    columns = [COLUMNS.get(column, column) for column in header.split(b",")]
    return b",".join(columns) + end + rows
