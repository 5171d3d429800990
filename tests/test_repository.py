"""The habits of the repository: rules that hold, a wheel that works elsewhere, documents."""

import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from mtprune_utils.files import PROJECT
from mtprune_utils.study import store

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}

# Runs in a folder that has nothing to do with the clone, on the wheel's own files.
ELSEWHERE = """
import sys
import mtprune_utils, torch
from mtprune_utils import files
from mtprune_utils.datasets import load_dataset
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.execute import execute
from mtprune_utils.study.networks import evaluate, open_network

assert mtprune_utils.__file__.startswith(sys.argv[1]), mtprune_utils.__file__
rooms = load_dataset("rooms", train_images=8, test_images=4, validation_share=0.25)
assert len(rooms.test) == 4
tiny = {"train_images": 16, "test_images": 4, "crop": 32, "image_height": 32, "tuning.trials": 0,
        "dense.steps": 2, "dense.evaluations": 1, "prune.prune_interval": 1,
        "prune.filters_per_step": 200, "prune.cosine_batches": 1}
run = Experiment.open("smoke", "rooms", "", "runs", tiny).prune("taylor", 0)
execute(run, report=lambda line: None)
assert len(evaluate(open_network(run.folder))) > 10
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built without network from what git knows, installed into a folder."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "scratch")
    shutil.copytree(PROJECT / "mtprune_utils", source / "mtprune_utils", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(place), str(source)]
    subprocess.run(build, check=True, env=os.environ | OFFLINE)
    (wheel,) = place.glob("*.whl")
    site = place / "site"
    install = [*pip, "install", "--no-compile", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, env=os.environ | OFFLINE)
    return site


def elsewhere(installed, folder, *command):
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_prunes_outside_the_clone_and_its_command_works(installed, tmp_path):
    result = elsewhere(installed, tmp_path, sys.executable, "-c", ELSEWHERE, str(installed))
    assert result.returncode == 0, result.stderr
    command = str(installed / "bin" / "mtprune")
    assert "evaluate" in elsewhere(installed, tmp_path, command, "--help").stdout
    refused = elsewhere(installed, tmp_path, command, "figures")
    assert refused.stderr == (
        "figures needs the repository, with its notebooks: run it in a clone\n"
    )


def test_the_wheel_has_types_data_and_licences_but_no_more(installed):
    package = installed / "mtprune_utils"
    assert (package / "py.typed").exists()
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {
        "bin",
        "mtprune_utils",
    }
    tracked = subprocess.run(
        ["git", "ls-files", "mtprune_utils"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.split()
    found = {str(path.relative_to(installed)) for path in package.rglob("*") if path.is_file()}
    assert {name for name in found if "__pycache__" not in name} >= set(tracked)


# --- rules ---


def ruff(*words):
    tool = shutil.which("ruff", path=f"{PROJECT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}")
    if tool is None and "CI" not in os.environ:
        pytest.skip("ruff is not installed")
    return subprocess.run([tool, *words], cwd=PROJECT, capture_output=True, text=True)


def test_code_and_notebooks_keep_the_rules_and_the_layout():
    for words in (["check", "--no-cache", "."], ["format", "--no-cache", "--check", "."]):
        result = ruff(*words)
        assert result.returncode == 0, result.stdout


def test_the_rules_find_something(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import os, sys\nx = dict()\nassert x is 1\n" + "y = 1" + " " * 99 + "# z\n")
    config = ["--config", str(PROJECT / "pyproject.toml")]
    said = ruff("check", "--no-cache", *config, str(bad)).stdout
    assert {"F401", "I001", "F632", "E501"} <= set(re.findall(r"\b[A-Z]+\d+\b", said)), said


def test_tools_are_pinned_and_what_runs_them_agrees():
    pins = (PROJECT / "requirements.txt").read_text()
    assert all(re.search(rf"^{tool}==", pins, re.MULTILINE) for tool in ("ruff", "mypy", "shtab"))
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"], "nothing is fetched"
    entries = {hook["id"]: hook for hook in hooks[0]["hooks"]}
    assert all(hook["language"] == "system" for hook in entries.values())
    for tool in ("ruff check", "ruff format", "mypy"):
        assert f"/{tool}" in lint[1] and any(f"/{tool}" in h["entry"] for h in entries.values())


# --- documents ---

OWN = ("CONTRIBUTING.md", "CHANGELOG.md", "docs/log.md")


@pytest.mark.parametrize("document", OWN)
def test_every_link_and_command_of_a_document_exists(document):
    text, place = (PROJECT / document).read_text(), (PROJECT / document).parent
    links = [part.split(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    assert all((place / link).exists() for link in links if link and "://" not in link)
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (PROJECT / "CHANGELOG.md").read_text()
    version = re.search(
        r'__version__ = "(.*)"', (PROJECT / "mtprune_utils/__init__.py").read_text()
    )
    headings = re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased" and version[1] in text
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_every_entry_of_the_log_has_a_date_and_a_commit_that_exists():
    text = (PROJECT / "docs" / "log.md").read_text()
    entries = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    dates = [re.match(r"(\d{4}-\d{2}-\d{2})\b", entry) for entry in entries]
    assert len(entries) >= 10 and all(dates)
    days = [date[1] for date in dates]
    assert days == sorted(days, reverse=True), "the newest first"
    paragraphs = [part for entry in entries for part in re.split(r"\n(?=- )", entry)[1:]]
    commits = [re.findall(r"`([0-9a-f]{7})`", part) for part in paragraphs]
    assert all(commits), "each finding names its commit"
    if store.git("rev-parse", "--is-shallow-repository") == "false":
        known = store.git("log", "--format=%H").split()
        named = {name for names in commits for name in names}
        assert all(any(commit.startswith(name) for commit in known) for name in named)


@pytest.mark.parametrize("form", sorted((PROJECT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_forms_are_whole(form):
    told = yaml.safe_load(form.read_text())
    if form.stem == "config":
        return
    assert {"name", "description", "body"} <= told.keys()
    fields = [part for part in told["body"] if part["type"] != "markdown"]
    assert fields and all(part["attributes"]["label"] for part in fields)
