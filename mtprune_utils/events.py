"""What a job of a batch tells its launcher, as it goes: lines, on standard output or in files."""

import json
import os
import sys
import time
import uuid
from pathlib import Path

from mtprune_utils.files import write_atomically

# Precedes a line, among Snakemake's own: a control character, so that no path that Snakemake names
# is taken for it.
EVENT = "\x1emtprune: "
# In a job's environment: its name; every how many seconds the launcher wants to hear of its steps;
# on a cluster, the folder for lines, as no pipe leads from there.
JOB, EVERY, FOLDER = "MTPRUNE_JOB", "MTPRUNE_TELL_EVERY", "MTPRUNE_EVENTS"


def tell(job: str | None, event: str, **more) -> None:
    """Tell the launcher of an event, which Snakemake passes on. Without a job, nothing is told.

    (A notebook's kernel has the standard output of the process that started it.)
    """
    if not job:
        return
    line = f"{EVENT}{json.dumps({'job': job, 'event': event, **more})}\n"
    if FOLDER in os.environ:
        put(line)
    else:
        os.write(standard_output(), line.encode())  # in one piece, whatever the other jobs write


def put(line: str) -> None:
    """Leave a line for the launcher: a file each, as shares know no lines written by several."""
    name = f"{time.time_ns()}-{uuid.uuid4().hex}.event"
    write_atomically(Path(os.environ[FOLDER], name), line.encode())


def standard_output() -> int:
    """The descriptor that this process was given as such: a kernel gives its notebook another."""
    try:
        return sys.stdout.fileno()
    except OSError:  # the kernel leaves it where it was
        return 1
