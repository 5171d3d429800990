"""Data sets, one file each: `tasks(root)`, `load(root) -> Source` and `digest(root)`.

root: where its files lie, "" for an embedded one. digest: 16 characters, from the files' content.
"""

import re
from pathlib import Path

from mtprune_utils import registry
from mtprune_utils.core.data import Dataset
from mtprune_utils.core.task import Task
from mtprune_utils.files import PROJECT

FOLDER = "datasets"


def data_digest(name: str, root: str = "") -> str:
    """A hash of a data set's files.

    Raises ValueError for an unknown name, FileNotFoundError where a file is missing.
    """
    return registry.entry(FOLDER, name, "data set").digest(data_root(root))


def data_tasks(name: str, root: str = "") -> dict[str, Task]:
    """The tasks of a data set, without loading it. Raises as `data_digest` does."""
    tasks = registry.entry(FOLDER, name, "data set").tasks(data_root(root))
    return {task.name: task for task in tasks}


def load_dataset(name: str, root: str = "", **images) -> Dataset:
    """Load a data set. images: how many of them, see `Dataset.of`.

    Raises ValueError for an unknown name, broken data or more images than there are,
    FileNotFoundError where data is missing.
    """
    source = registry.entry(FOLDER, name, "data set").load(data_root(root))
    return Dataset.of(name, data_tasks(name, root), source, data_digest(name, root), **images)


def data_root(root: str) -> str:
    """The folder that `root` means, in a notebook as on the command line. ~ is the home folder.

    A relative one starts in the working folder or, where it is not there, at the repository.
    Raises ValueError for a name that no message can hold, or without a home folder.
    """
    if not plain(root):
        raise ValueError(f"{root!a} has a character that is no UTF-8, or ends a line: rename it")
    try:
        folder = Path(root).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no {root} ({error}): write the whole path") from error
    elsewhere = not folder.exists() and (PROJECT / folder).exists()
    return root and str(PROJECT / folder if elsewhere else folder)


def plain(name: str) -> bool:
    """Whether a file's name is UTF-8, on one line, and of a usual length."""
    ends_line_or_odd = r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return len(name) < 1000 and not re.search(ends_line_or_odd, name)
