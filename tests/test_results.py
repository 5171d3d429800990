"""The committed results of the quick profile: complete, worth a look, and what the README shows."""

import ast
import graphlib
import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import readme

from mtprune_utils.files import PACKAGE, PROJECT
from mtprune_utils.study import claims, store, tables
from mtprune_utils.study.figures import fig2_layer_widths
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import PROFILES

FIGURES = PROJECT / "figures" / "quick"
DOCS = sorted((PROJECT / "docs").glob("*.md"))


def test_the_documents_show_the_committed_results_and_every_notebook():
    for document, text in readme.documents(FIGURES.parent).items():
        assert (PROJECT / document).read_text() == text, f"{document}: run `make readme`"
    shown = readme.notebook_table(FIGURES.parent), readme.claims_table(FIGURES.parent)
    assert "nan" not in "".join(shown)
    assert all(f"(notebooks/{path.name})" in shown[0] for path in store.notebook_paths())
    assert shown[1].count("\n| ") <= 8 + 1, "a reader has two minutes"


def test_a_notebook_that_says_nothing_of_itself_has_no_row(tmp_path, monkeypatch):
    table = readme.notebook_table(FIGURES.parent)
    own = tmp_path / "15_plot_removed.ipynb"
    own.write_text(json.dumps({"metadata": {"mtprune": {"figures": ["own"], "needs": "pruned"}}}))
    paths = [*store.notebook_paths(), own]
    monkeypatch.setattr(store, "notebook_paths", lambda: paths)
    assert readme.notebook_table(FIGURES.parent) == table


def test_a_changed_table_changes_the_documents(tmp_path):
    figures = shutil.copytree(FIGURES.parent, tmp_path / "figures")
    table = figures / "study" / "table1_claims.csv"
    table.write_text(table.read_text().replace("disagrees", "agrees"))
    changed = {
        name
        for name, text in readme.documents(figures).items()
        if (PROJECT / name).read_text() != text
    }
    assert changed == {"README.md", "docs/results.md"}


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in DOCS)])
def test_every_link_leads_somewhere(document):
    text = (PROJECT / document).read_text()
    links = [part.split(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    place = (PROJECT / document).parent
    assert all((place / link).exists() for link in links if not link.startswith("http"))


# Data flows one way. What stands behind the entries' registries is not known to the core, which
# takes them by name; `files`, `processes` and `registry` serve all.
ENTRIES = ("tasks", "criteria", "backbones", "datasets", "schedules", "rankings", "weightings")
ORDER = {"core": 0, **dict.fromkeys(ENTRIES, 1), "stages": 2, "study": 3, "run": 4}
SERVING = {"events", "files", "processes", "registry"}
BY_NAME = {f"{entries}.__init__" for entries in ENTRIES}  # what looks an entry up


def imported(file):
    """The package's modules that a file imports, as "folder.module"."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mtprune_utils"):
            inside = node.module.split(".")[1:]
            for name in node.names:
                parts = [*inside, name.name]
                is_module = PACKAGE.joinpath(*parts).with_suffix(".py").exists()
                is_folder = PACKAGE.joinpath(*parts).is_dir()
                parts = parts if is_module or is_folder else inside
                is_folder = PACKAGE.joinpath(*parts).is_dir()
                yield ".".join([*parts, "__init__"] if is_folder else parts)


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.glob("*/*.py")), ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_packages_import_only_from_those_before_them(file):
    own = file.parent.name
    for module in imported(file):
        package = module.partition(".")[0]
        if package in SERVING or module in BY_NAME:
            continue
        same_or_before = package == own or ORDER[package] < ORDER[own]
        assert same_or_before or ORDER[package] == ORDER[own] == 1, f"{file.name} imports {module}"


def test_modules_of_a_package_form_no_circle():
    found = {
        f"{file.parent.name}.{file.stem}": set(imported(file)) for file in PACKAGE.glob("*/*.py")
    }
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError


def test_the_training_path_imports_no_more_than_four_packages():
    heavy = [
        "torchvision",
        "pandas",
        "matplotlib",
        "seaborn",
        "scipy",
        "pyarrow",
        "PIL",
        "optuna",
        "snakemake",
        "papermill",
    ]
    loaded = f"[name for name in {heavy} if name in sys.modules]"
    code = f"import sys, mtprune_utils.study.execute; print({loaded})"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


QUICK = [
    name
    for name, path in store.figure_notebooks().items()
    if Experiment(PROFILES["quick"]).draws(store.about_notebook(path)) and name != "fig7_tuning"
]  # it does not tune


@pytest.mark.parametrize("name", QUICK)
def test_figures_come_from_the_profile_as_it_is_now(name):
    assert all((FIGURES / f"{name}.{kind}").exists() for kind in store.FIGURE_KINDS)
    origin = json.loads((FIGURES / f"{name}.json").read_text())
    about = store.about_notebook(store.figure_notebooks()[name])
    expected = Experiment(PROFILES["quick"]).needed(about["needs"])
    assert set(origin["runs"]) == {f"{run.stage}/{run.name}" for run in expected}, (
        "run `make figures`"
    )
    assert len({run["data_digest"] for run in origin["runs"].values()}) == 1


def test_the_dense_network_has_learnt_to_see():
    """Against the position prior.

    By ten points of accuracy, 30 % of the relative depth error, nine degrees.
    """
    table = pd.read_csv(FIGURES / "fig1_iterative_pruning.csv").groupby("metric")
    table = table[["dense_network", "position_prior"]].first()
    accuracy, depth, angle = (
        table.loc[metric]
        for metric in ("segmentation.pixel_accuracy", "depth.relative_error", "normals.mean_angle")
    )
    assert accuracy["dense_network"] >= accuracy["position_prior"] + 0.10
    assert depth["dense_network"] <= 0.70 * depth["position_prior"]
    assert angle["dense_network"] <= angle["position_prior"] - 9


def test_a_quarter_of_the_filters_is_worse_on_every_task():
    """Trained alike; or the data could not tell a pruned network from a whole one.

    By more than both spreads together.
    """
    table = pd.read_csv(PROJECT / "benchmarks" / "capacity.csv", index_col=0)
    quarter, dense = (table.loc["filters", name] for name in ("a quarter of the filters", "dense"))
    assert int(quarter) == int(dense) // 4
    for task in Experiment(PROFILES["quick"]).tasks.values():
        sign = 1 if task.endpoint in task.higher_is_better else -1
        means, spreads = (
            table.loc[f"{task.name}.{task.endpoint} {kind}"].astype(float)
            for kind in ("mean", "std")
        )
        assert sign * (means["dense"] - means["a quarter of the filters"]) > spreads.sum(), (
            task.name
        )


def test_figure_2_is_drawn_where_every_seed_passed():
    """A seed lands on a size at a number of filters of its own.

    A mean of one seed among means of all would look like a trend.
    """
    table = pd.DataFrame(
        [
            {
                "criterion": "taylor",
                "seed": seed,
                "removal": removal,
                "layer": layer,
                "width": width,
                "cosine": 0.1,
                "dead_share": 0,
            }
            for seed, widths in ((0, (8, 6, 5)), (1, (8, 7, 5)))
            for removal, width in enumerate(widths)
            for layer in range(2)
        ]
    )
    _, drawn = fig2_layer_widths(table)
    assert sorted(set(drawn["filters"])) == [10, 16]
    assert sorted(set(drawn["share"])) == [5 / 8, 1], "of the dense network's width"


TARGETS = {
    "taylor_over_plain": 1.05,
    "cosprune_over_minimal": 1.05,
    "removal_over_plain": 2,
    "quarter_over_dense": 0.4,
}


@pytest.mark.parametrize(
    "table", sorted((PROJECT / "benchmarks" / "results").glob("*.csv")), ids=lambda path: path.stem
)
def test_measured_ratios_keep_to_their_limits(table):
    """On every kind of machine that was measured.

    What a quarter of the MACs pays is held against its limit at the paper's resolution: small
    networks, and small images beside an optimizer of so many parameters, cost more than their
    arithmetic.
    """
    ratios = pd.read_csv(table)
    ratios = ratios[
        ratios["name"].ne("quarter_over_dense") | ratios["setting"].str.contains("321 x 321")
    ]
    limits = ratios["name"].map(TARGETS).dropna()
    assert set(ratios["name"]) >= set(TARGETS)
    assert (ratios.loc[limits.index, "ratio"] <= limits).all()


def test_half_precision_ranks_filters_alike():
    scores = pd.read_csv(PROJECT / "benchmarks" / "scores.csv", index_col=0)["bf16"]
    assert scores["rank correlation mean"] > 0.99
    assert scores["chosen by both, of 100 mean"] > 0.95


JUDGED = [
    path.parent.name
    for path in sorted((PROJECT / "figures").glob("*/table1_claims.csv"))
    if path.parent.name in PROFILES
]


@pytest.mark.parametrize("profile", [name for name in JUDGED if name != "smoke"])
def test_the_claims_follow_from_the_committed_tables(profile, tmp_path):
    """Judged anew from the result tables alone, every row of Table 1 is the committed one."""
    experiment = Experiment(PROFILES[profile], root=tmp_path / "runs")
    figures = shutil.copytree(
        PROJECT / "figures" / profile / "results", tmp_path / profile / "results"
    ).parents[1]
    found = tables.collect(experiment, figures)
    for file in (figures / profile / "results").iterdir():
        stored = PROJECT / "figures" / profile / "results" / file.name
        assert file.read_bytes() == stored.read_bytes(), "rows of other runs"
    fresh = claims.judge(claims.Evidence(experiment, found))
    for table, name in zip(fresh, ("table1_claims", "table1_cells")):
        committed = pd.read_csv(
            PROJECT / "figures" / profile / f"{name}.csv", keep_default_na=False
        )
        assert table["claim"].tolist() == committed["claim"].tolist()
        assert table["outcome"].tolist() == committed["outcome"].tolist()
    assert (
        fresh[0]["paper"].tolist()
        == pd.read_csv(PROJECT / "figures" / profile / "table1_claims.csv")["paper"].tolist()
    )
    numbers = ["estimate", "low", "high", "tost_low", "tost_high", "p"]
    committed = pd.read_csv(PROJECT / "figures" / profile / "table1_cells.csv")
    pd.testing.assert_frame_equal(
        fresh[1][numbers].astype(float), committed[numbers].astype(float), check_dtype=False
    )
