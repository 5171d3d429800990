"""Result tables: what all finished runs measured, in a few files committed with the figures.

<figures>/<profile>/results/<stage>_<table>.csv has the rows of every run of that stage, named by
`run`; runs.jsonl says of each run which cell of the grid it is and where it came from. Weights stay
in the run folders. A run folder that is gone is laid again from the tables, so that a study goes on
from a fresh clone.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mtprune_utils.files import csv_text, parse_json, read_json, read_table, write_atomically
from mtprune_utils.study.grid import Experiment, Run
from mtprune_utils.study.profiles import get_profile
from mtprune_utils.study.store import (
    AGAIN,
    BEST,
    PROVENANCE,
    RECORDS,
    TEXTS,
    results_folder,
    table_names,
)
from mtprune_utils.stages import stage_names


def collect(
    experiment: Experiment,
    figures: Path,
    write: bool = True,
    report: Callable[[str], None] | None = None,
) -> dict:
    """Bring the tables up to date with the run folders, and read them.

    write: whether the files are brought up to date too. report: see `Experiment.check_codes`.
    Returns {"<stage>_<table>": data frame}, with each run's cell (criterion, seed, level, arm) in
    front. Runs that are not of the experiment's grid, because a number has changed since, are
    dropped. Raises FileNotFoundError if no run is finished, and ValueError, before anything is
    written, if the runs of a stage are of several codes.
    """
    folder = results_folder(experiment.label, figures)
    grid = experiment.runs()
    records, stored = _read(folder)
    lines, parts = [], {name: [] for name in table_names()}
    codes: list[tuple[Run, str]] = []
    for run in grid:
        run.invalidate_if_corrupt(print)
        if not run.done and run.name not in records:
            continue
        record = _record(run) if run.done else records[run.name]
        lines.append(json.dumps(record))
        codes.append((run, record["files"][PROVENANCE]["code"]))
        for file in run.tables:
            here = run.path(file).read_text() if run.done else _stored(record, file, stored, folder)
            parts[f"{run.stage}_{Path(file).stem}"].append((run, here))
    if not lines:
        name, command = experiment.profile.name, experiment.command
        nothing = f"no run of {name} is finished, and no table of it is here"
        raise FileNotFoundError(f"{nothing}: run `{command}`")
    experiment.check_codes(codes, report)
    tables = {}
    for name, texts in parts.items():
        rows = [
            {"run": run.name, **row}
            for run, text in texts
            for row in csv.DictReader(io.StringIO(text))
        ]
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows and write:
            write_atomically(folder / f"{name}.csv", csv_text(rows, columns).encode())
        tables[name] = _with_cells(texts)
    if write:  # last: it names no run whose rows are not there
        write_atomically(folder / RECORDS, ("\n".join(lines) + "\n").encode())
    return tables


def gather(runs: list[Run], file: str):
    """One table of the given file of every run, with the run's cell in front."""
    return _with_cells([(run, run.path(file).read_text()) for run in runs])


def _with_cells(texts: list[tuple[Run, str]]):
    import pandas as pd  # the launcher, which lays folders again, starts without

    parts = [
        pd.DataFrame([run.cell]).merge(pd.read_csv(io.StringIO(text)), how="cross")
        for run, text in texts
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def origins_of(runs: list[Run]) -> dict[str, dict]:
    """{"<stage>/<name>": provenance} of finished runs, with the hash of their tables, "content"."""
    origins = [read_json(run.path(PROVENANCE)) | {"content": run.content} for run in runs]
    return {f"{run.stage}/{run.name}": origin for run, origin in zip(runs, origins)}


def recorded_origins(experiment: Experiment, figures: Path) -> dict[str, dict]:
    """The same of every run in the tables; those whose folders are gone have no "content"."""
    records = _read(results_folder(experiment.label, figures))[0].values()
    known = {
        f"{record['stage']}/{record['name']}": record["files"][PROVENANCE] for record in records
    }
    here = origins_of([run for run in experiment.runs() if run.done])
    return known | {label: origin for label, origin in here.items() if label in known}


def restore(experiment: Experiment, figures: Path) -> int:
    """Lay the run folders that the tables know and that are not here, without weights.

    The tables are those of the experiment and of its profile as it stands, whose runs it may share.
    Returns how many. Raises ValueError, in one line that names the file, before anything is laid,
    if a record or table is not as `collect` wrote it: broken off, edited, merged.
    """
    own = replace(experiment, profile=get_profile(experiment.profile.name))
    grid, found = experiment.runs(), {}
    texts: dict[Path, str] = {}
    for label in dict.fromkeys((experiment.label, own.label)):
        folder = results_folder(label, figures)
        records, stored = _read(folder)
        for run in grid:
            if run.name in records and run not in found and not run.done:
                record = found[run] = records[run.name]
                for file in run.tables:
                    texts[run.path(file)] = _stored(record, file, stored, folder)
    for run, record in found.items():
        origin = record["files"][PROVENANCE]
        for file in run.tables:
            run.write(file, texts[run.path(file)].encode())
        for file, content in record["files"].items():
            run.write_json(file, content)
        run.write_json("params.json", origin["params"])
        for foreign in (*run.folder.glob("*.safetensors"), *run.folder.glob("checkpoints/*")):
            foreign.unlink()  # of an unfinished run: perhaps of other code
        run.finish(origin["code"])
    return len(found)


def _files(stage: str) -> tuple[str, ...]:
    """A run's files that its record holds."""
    return (PROVENANCE, "timing.json", *([BEST] if stage == "tune" else []))


def _record(run: Run) -> dict:
    files = {file: read_json(run.path(file)) for file in _files(run.stage)}
    rows = {file: _sum(read_table(run.path(file))) for file in run.tables}
    return {"stage": run.stage, "name": run.name, **run.cell, "files": files, "rows": rows}


def _read(folder: Path) -> tuple[dict[str, dict], dict[str, dict[str, list[dict[str, str]]]]]:
    """The records by the run's name, and of each table the rows by the run's name.

    Raises ValueError, in one line, for what `collect` does not write.
    """
    path, records = folder / RECORDS, {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            stage, name, files = record["stage"], record["name"], record["files"]
            sound = (
                stage in stage_names() and re.fullmatch(r"[\w.-]+", name) and name not in records
            )
            sound = sound and all(type(files[file]) is dict for file in _files(stage))
            if not sound or set(files) != {*_files(stage)}:
                raise ValueError("not the record of one run")
            {key: files[PROVENANCE][key] for key in ("code", "params")}  # read later on
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path}: line {number} is damaged ({reason}), {AGAIN}"[:300]
            ) from None
        records[name] = record
    return records, {name: _read_parts(folder / f"{name}.csv") for name in table_names()}


def _read_parts(path: Path) -> dict[str, list[dict[str, str]]]:
    """{run name: its rows}, every number as it was written."""
    parts: dict[str, list[dict[str, str]]] = {}
    try:
        for number, row in enumerate(read_table(path) if path.exists() else (), 2):
            if None in row or None in row.values():
                raise ValueError(f"line {number} has too many values or too few")
            for column, value in row.items():
                if column not in TEXTS and value:
                    float(value)
            parts.setdefault(row.pop("run"), []).append(row)
    except (ValueError, KeyError, csv.Error) as error:  # a byte that is no UTF-8 among them
        reason = "no column 'run'" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged ({reason}), {AGAIN}"[:300]) from None
    return parts


def _stored(record: dict, file: str, stored: dict, folder: Path) -> str:
    """A run's own CSV, from the tables. Raises ValueError if it is not what was collected."""
    table = f"{record['stage']}_{Path(file).stem}"
    rows = stored[table].get(record["name"])
    if not rows or record.get("rows", {}).get(file, _sum(rows)) != _sum(rows):
        what = "has other rows than were collected" if rows else "has no rows"
        raise ValueError(f"{folder / table}.csv {what} of {record['name']}, {AGAIN}")
    return _text(rows)


def _sum(rows: list[dict[str, str]]) -> str:
    """A checksum of a run's rows, in the form that they have in any table."""
    return hashlib.sha256(_text(rows).encode()).hexdigest()[:16] if rows else ""


def _text(rows: list[dict[str, str]]) -> str:
    """A run's own CSV again: without the columns that only other runs have."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    return csv_text([{column: row[column] for column in columns} for row in rows])
