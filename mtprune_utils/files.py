"""Files that are whole or not there at all, results as CSV and JSON, and locks."""

import ast
import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# The repository, where relative paths start.
PROJECT = PACKAGE.parent if (PACKAGE.parent / "notebooks").is_dir() else Path()
MAX_JSON = 2**26  # bytes; ours have a few thousand, an index of data a few hundred thousand
KINDS = {  # of JSON's values, in messages
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: """a JSON object, with its keys in quotes: {"dense.steps": 200}""",
}
UNFINISHED = ".unfinished"  # ends the name of a file that is being written


def csv_text(rows: list[dict], columns: list[str] | None = None) -> str:
    """A CSV of the given columns, or of those of the first row; without rows, nothing.

    Where a row lacks a column, its field is empty. Raises ValueError for a row with a column that
    there is no place for.
    """
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_json(path: Path):
    """What a JSON file says. Raises OSError, or ValueError in one line that names it if damaged."""
    with open(path, "rb") as file:
        text = file.read(MAX_JSON)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error})") from error


def parse_json(text: str | bytes):
    """What JSON says, in any of its encodings. Raises ValueError where it is damaged."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("damaged JSON: brackets within brackets without end") from error


def write_json(path: Path, value) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV. (The figure notebooks read the same files with pandas.)"""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the place, flush to disk, rename.

    A reader sees the old file or the new one, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            _where_supported(os.fsync, file.fileno())
        _where_supported(os.chmod, name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, has to outlast a power cut
    try:
        _where_supported(os.fsync, folder)
    finally:
        os.close(folder)


def _where_supported(call: Callable, *arguments) -> None:
    """Call it. Shares (CIFS, FUSE) that know no such thing are passed over; errors are raised."""
    try:
        call(*arguments)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM):
            raise


def source_digest(modules: Iterable[Path]) -> str:
    """A hash of what Python modules do, whatever their comments, docstrings and layout.

    The same in every version of Python.
    """
    digest = hashlib.sha256()
    for module in modules:
        digest.update(_done(module.read_text(encoding="utf-8")))
    return digest.hexdigest()[:16]


@cache
def _done(source: str) -> bytes:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return _syntax(tree).encode()


def _syntax(node) -> str:
    """What `ast.dump` says in Python 3.11.

    Later ones leave out empty lists, know type parameters, and end some f-strings in ''.
    """
    if isinstance(node, list):
        return f"[{', '.join(map(_syntax, node))}]"
    if isinstance(node, ast.JoinedStr):
        node = ast.JoinedStr([part for part in node.values if getattr(part, "value", None) != ""])
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [(name, value) for name, value in ast.iter_fields(node) if name != "type_params"]
    # None there is a value, elsewhere an option not taken.
    literal = isinstance(node, (ast.Constant, ast.MatchSingleton))
    said = [
        f"{name}={_syntax(value)}"
        for name, value in fields
        if value is not None or literal and name == "value"
    ]
    return f"{type(node).__name__}({', '.join(said)})"


def checksum(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(file) -> bool:
    """Lock an open file for as long as it is open; False if another process has.

    Raises OSError where there are no locks, as on some network shares.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        folder = Path(file.name).parent
        raise OSError(
            f"{folder} gives no locks ({error.strerror}): choose a folder elsewhere"
        ) from error
    return True


@contextlib.contextmanager
def locked(
    path: Path, what: str, wait: bool = False, report: Callable[[str], None] = print
) -> Iterator[tuple[int, str]]:
    """Hold the lock file at `path`; a killed process lets go.

    Gives the file's descriptor, and the number of a process that held the lock and was killed, if
    there was one. Where another process holds it, say so and wait, or raise ValueError, which names
    that process.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            file.seek(0)
            if not try_lock(file):
                holder = file.read()
                if not wait:
                    already = f"{what} is already being run there, by process {holder}"
                    raise ValueError(f"{already}: wait for it or end it")
                report(f"waiting for process {holder}, which is at {what}")
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                continue  # deleted meanwhile: others lock the file that took its place
            killed = file.read()
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield file.fileno(), killed
            finally:
                file.truncate(0)
            return
