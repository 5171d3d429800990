"""Hygiene: the committed notebooks hold the outputs of one clean run and keep the conventions."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?:/(?:home|root|tmp|work|Users|mnt|opt|var|workspace)/|[A-Z]:\\\\)")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


def test_there_are_notebooks_and_they_are_named_verb_object():
    assert len(NOTEBOOKS) >= 6
    assert all(re.fullmatch(r"\d\d_[a-z0-9]+_[a-z0-9_]+", path.stem) for path in NOTEBOOKS)


def test_outputs_are_those_of_one_clean_run(notebook):
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(
        range(1, len(code_cells(notebook)) + 1)
    )
    assert not [
        o for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "error"
    ]
    assert not [
        o for cell in code_cells(notebook) for o in cell.outputs if o.get("name") == "stderr"
    ]


def test_checked_cells_state_a_result(notebook):
    checked = tagged(notebook, "nbval-check-output")
    assert checked
    for cell in checked:
        text = "".join(output.get("text", "") for output in cell.outputs)
        assert text.strip(), "a checked cell without output compares nothing"
        assert not re.search(r"\d\.\d{4,}", text), "float soup differs between processors"


def test_one_parameters_cell_with_helped_literals(notebook):
    (cell,) = tagged(notebook, "parameters")
    statements = ast.parse(cell.source).body
    assert all(isinstance(statement, ast.AnnAssign) for statement in statements)
    for statement, line in zip(statements, cell.source.splitlines(), strict=True):
        ast.literal_eval(statement.value)
        assert re.search(r"  # \w", line), f"no help: {line}"
    defaults = {statement.target.id: ast.literal_eval(statement.value) for statement in statements}
    judges = "fig5_claims" in notebook.metadata.get("mtprune", {}).get("figures", ())
    assert defaults["profile"] == ("study" if judges else "smoke")


def test_thin_cells_and_words_between_them(notebook):
    assert len(code_cells(notebook)) <= 20
    # Fifteen or so, as ruff lays them out: a call's arguments in lines of their own.
    assert all(len(cell.source.splitlines()) <= 18 for cell in code_cells(notebook))
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 4
    assert notebook.metadata.kernelspec.name == "python3"


def test_no_path_of_a_machine(notebook):
    found = MACHINE_PATH.search(json.dumps(notebook))
    assert not found, f"...{json.dumps(notebook)[max(0, found.start() - 60) : found.end() + 60]}..."
