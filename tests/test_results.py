"""The committed results of the quick profile: complete, worth looking at, and what the README shows."""

import ast
import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from mtprune_utils import claims, readme, results
from mtprune_utils.run.notebook import FIGURE_NOTEBOOKS
from mtprune_utils.files import PROJECT
from mtprune_utils.study.figures import fig2_layer_widths
from mtprune_utils.study.profiles import PROFILES
from mtprune_utils.study.grid import Experiment

FIGURES = PROJECT / "figures" / "quick"
DOCS = sorted((PROJECT / "docs").glob("*.md"))


def test_the_documents_show_the_committed_results_and_every_notebook():
    for document, text in readme.documents(FIGURES.parent).items():
        assert (PROJECT / document).read_text() == text, f"{document}: run `make readme`"
    assert set(readme.NOTEBOOKS) == {path.stem for path in (PROJECT / "notebooks").glob("*.ipynb")}
    shown = readme.notebook_table(FIGURES), readme.claims_table(FIGURES.parent)
    assert "nan" not in "".join(shown)
    assert shown[1].count("\n| ") <= 8 + 1, "a reader has two minutes"


def test_a_changed_table_changes_the_documents(tmp_path):
    figures = shutil.copytree(FIGURES.parent, tmp_path / "figures")
    table = figures / "study" / "table1_claims.csv"
    table.write_text(table.read_text().replace("disagrees", "agrees"))
    changed = {name for name, text in readme.documents(figures).items()
               if (PROJECT / name).read_text() != text}
    assert changed == {"README.md", "docs/results.md"}


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in DOCS)])
def test_every_link_leads_somewhere(document):
    text = (PROJECT / document).read_text()
    links = [part.split(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    place = (PROJECT / document).parent
    assert all((place / link).exists() for link in links if not link.startswith("http"))


def test_modules_import_only_from_those_before_them():
    """In the order in which docs/code.md says that data flows; what stands behind it serves the whole."""
    lines = (PROJECT / "docs" / "code.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("`tasks.py` →")]
    order = [name.strip("`/").removesuffix(".py") for name in line.partition(";")[0].split(" → ")]
    assert {f"{name}.py" for name in order if name != "data"} <= {path.name for path in (PROJECT / "mtprune_utils").glob("*.py")}
    for place, module in enumerate(order):
        files = (PROJECT / "mtprune_utils" / module).glob("*.py") if module == "data" else [PROJECT / "mtprune_utils" / f"{module}.py"]
        for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mtprune_utils"):
                continue
            _, _, inner = node.module.partition("mtprune_utils.")
            for imported in [inner.partition(".")[0]] if inner else [alias.name for alias in node.names]:
                assert imported == module or imported not in order[place:], f"{module} imports {imported}"


def test_the_training_path_imports_no_more_than_four_packages():
    heavy = ["torchvision", "pandas", "matplotlib", "seaborn", "scipy", "pyarrow", "PIL", "optuna", "snakemake", "papermill"]
    code = f"import sys, mtprune_utils.stages; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


@pytest.mark.parametrize("name", [name for name in FIGURE_NOTEBOOKS if name != "fig7_tuning"])  # quick does not tune
def test_figures_come_from_the_profile_as_it_is_now(name):
    assert all((FIGURES / f"{name}.{kind}").exists() for kind in ("png", "pdf", "csv", "json"))
    origin = json.loads((FIGURES / f"{name}.json").read_text())
    stages = {used.split("/")[0] for used in origin["runs"]}
    experiment = Experiment(PROFILES["quick"])
    grid = experiment.runs() if name in ("fig5_claims", "fig6_training_curves") else experiment.paper_runs()
    expected = [run for run in grid if run.stage in stages and (run.seed == 0 or name != "fig4_speedup")]
    assert set(origin["runs"]) == {f"{run.stage}/{run.name}" for run in expected}, "run `make figures`"
    assert len({run["data_digest"] for run in origin["runs"].values()}) == 1


def test_the_dense_network_has_learnt_to_see():
    """Against the position prior: ten points of accuracy, 30 % of the relative depth error, nine degrees."""
    table = pd.read_csv(FIGURES / "fig1_iterative_pruning.csv").groupby("metric")[["dense_network", "position_prior"]].first()
    accuracy, depth, angle = (
        table.loc[metric] for metric in ("segmentation.pixel_accuracy", "depth.relative_error", "normals.mean_angle")
    )
    assert accuracy["dense_network"] >= accuracy["position_prior"] + 0.10
    assert depth["dense_network"] <= 0.70 * depth["position_prior"]
    assert angle["dense_network"] <= angle["position_prior"] - 9


def test_a_quarter_of_the_filters_is_worse_on_every_task():
    """Trained alike; or the data could not tell a pruned network from a whole one. By more than both spreads together."""
    table = pd.read_csv(PROJECT / "benchmarks" / "capacity.csv", index_col=0)
    assert int(table.loc["filters", "a quarter of the filters"]) == int(table.loc["filters", "dense"]) // 4
    for task in Experiment(PROFILES["quick"]).tasks.values():
        sign = 1 if task.endpoint in task.higher_is_better else -1
        means, spreads = (table.loc[f"{task.name}.{task.endpoint} {kind}"].astype(float) for kind in ("mean", "std"))
        assert sign * (means["dense"] - means["a quarter of the filters"]) > spreads.sum(), task.name


def test_figure_2_is_drawn_where_every_seed_passed():
    """A seed lands on a size at a number of filters of its own: a mean of one seed among means of all would look like a trend."""
    table = pd.DataFrame([
        {"criterion": "taylor", "seed": seed, "removal": removal, "layer": layer, "width": width, "cosine": 0.1, "dead_share": 0}
        for seed, widths in ((0, (8, 6, 5)), (1, (8, 7, 5))) for removal, width in enumerate(widths) for layer in range(2)
    ])
    _, drawn = fig2_layer_widths(table)
    assert sorted(set(drawn["filters"])) == [10, 16]
    assert sorted(set(drawn["share"])) == [5 / 8, 1], "of the dense network's width"


TARGETS = {"taylor_over_plain": 1.05, "cosprune_over_minimal": 1.05, "removal_over_plain": 2, "quarter_over_dense": 0.4}


@pytest.mark.parametrize("table", sorted((PROJECT / "benchmarks" / "results").glob("*.csv")), ids=lambda path: path.stem)
def test_measured_ratios_keep_to_their_limits(table):
    """On every kind of machine that was measured. What a quarter of the MACs pays is held against its limit at the paper's
    resolution: small networks, and small images beside an optimizer of so many parameters, cost more than their arithmetic."""
    ratios = pd.read_csv(table)
    ratios = ratios[ratios["name"].ne("quarter_over_dense") | ratios["setting"].str.contains("321 x 321")]
    limits = ratios["name"].map(TARGETS).dropna()
    assert set(ratios["name"]) >= set(TARGETS)
    assert (ratios.loc[limits.index, "ratio"] <= limits).all()


def test_half_precision_ranks_filters_alike():
    scores = pd.read_csv(PROJECT / "benchmarks" / "scores.csv", index_col=0)["bf16"]
    assert scores["rank correlation mean"] > 0.99
    assert scores["chosen by both, of 100 mean"] > 0.95


JUDGED = [path.parent.name for path in sorted((PROJECT / "figures").glob("*/table1_claims.csv")) if path.parent.name in PROFILES]


@pytest.mark.parametrize("profile", [name for name in JUDGED if name != "smoke"])
def test_the_claims_follow_from_the_committed_tables(profile, tmp_path):
    """Judged anew from the result tables alone, every row of Table 1 is the committed one."""
    experiment = Experiment(PROFILES[profile], root=tmp_path / "runs")
    figures = shutil.copytree(PROJECT / "figures" / profile / "results", tmp_path / profile / "results").parents[1]
    tables = results.collect(experiment, figures)
    for file in (figures / profile / "results").iterdir():
        assert file.read_bytes() == (PROJECT / "figures" / profile / "results" / file.name).read_bytes(), "rows of other runs"
    fresh = claims.judge(claims.Evidence(experiment, tables))
    for table, name in zip(fresh, ("table1_claims", "table1_cells")):
        committed = pd.read_csv(PROJECT / "figures" / profile / f"{name}.csv", keep_default_na=False)
        assert table["claim"].tolist() == committed["claim"].tolist()
        assert table["outcome"].tolist() == committed["outcome"].tolist()
    assert fresh[0]["paper"].tolist() == pd.read_csv(
        PROJECT / "figures" / profile / "table1_claims.csv"
    )["paper"].tolist()
    numbers = ["estimate", "low", "high", "tost_low", "tost_high", "p"]
    committed = pd.read_csv(PROJECT / "figures" / profile / "table1_cells.csv")
    pd.testing.assert_frame_equal(
        fresh[1][numbers].astype(float), committed[numbers].astype(float), check_dtype=False
    )
