"""The committed results of the quick profile: complete, worth looking at, and what the README shows."""

import json
from pathlib import Path

import pandas as pd
import pytest

from mtprune_utils import readme
from mtprune_utils.profiles import PROFILES
from mtprune_utils.runs import Experiment

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "figures" / "quick"


def test_the_readme_shows_the_committed_results_and_every_notebook():
    text = (ROOT / "README.md").read_text()
    assert readme.updated(text, FIGURES) == text, "run `make readme`"
    assert set(readme.NOTEBOOKS) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    for line in readme.notebook_table(FIGURES).splitlines():
        assert "nan" not in line


def test_every_link_of_the_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert all((ROOT / link).exists() for link in links if not link.startswith("http"))


@pytest.mark.parametrize("name", ["fig1_iterative_pruning", "fig2_layer_widths", "fig3_retrained_from_scratch"])
def test_figures_come_from_the_profile_as_it_is_now(name):
    assert all((FIGURES / f"{name}.{kind}").exists() for kind in ("png", "pdf", "csv", "json"))
    origin = json.loads((FIGURES / f"{name}.json").read_text())
    stages = {used.split("/")[0] for used in origin["runs"]}
    expected = [run for run in Experiment(PROFILES["quick"]).runs() if run.stage in stages]
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
