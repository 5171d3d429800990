"""The explorer: what it shows is what the runs did, in words and in time; its colours are safe."""

import itertools
import re
import shutil
from dataclasses import replace

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from mtprune_utils import registry
from mtprune_utils.files import PROJECT
from mtprune_utils.study import palette, views
from mtprune_utils.study.execute import execute
from mtprune_utils.study.explore import (
    SMALL,
    Explorer,
    Filters,
    Results,
    saved_networks,
    saved_results,
)
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.pictures import as_target, pixels
from mtprune_utils.study.tables import collect
from mtprune_utils.tasks.classification import classification

# Of full severity, on linear RGB (Machado, Oliveira and Fernandes, 2009).
EYES = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = np.array(
    [  # of linear sRGB
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colours) -> np.ndarray:
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colours, eye: str) -> np.ndarray:
    """CIELAB (colours, 3) of what an eye sees."""
    seen = np.clip(linear(colours) @ np.array(EYES[eye]).T, 0, 1)
    ratios = seen @ XYZ.T / XYZ.sum(1)
    f = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def contrast(colour: str, page: str) -> float:
    """WCAG's, from 1 to 21."""
    low, high = sorted(linear([colour, page]) @ XYZ[1])
    return (high + 0.05) / (low + 0.05)


# --- colours ---


@pytest.mark.parametrize("eye", EYES)
def test_every_eye_tells_each_two_colours_apart(eye):
    seen = lab(palette.COLOURS, eye)
    for i, j in itertools.combinations(range(len(seen)), 2):
        pair = palette.COLOURS[i], palette.COLOURS[j]
        assert np.linalg.norm(seen[i] - seen[j]) > 20, pair


def test_the_simulation_finds_colours_that_are_known_to_be_confused():
    red, green = lab(["tab:red", "tab:green"], "normal"), lab(["tab:olive", "tab:orange"], "normal")
    assert np.linalg.norm(red[0] - red[1]) > 80 and np.linalg.norm(green[0] - green[1]) > 30
    confused = lab(["#8C7A00", "#C06000"], "deuteranopia")
    assert np.linalg.norm(confused[0] - confused[1]) < 20


def test_colours_stand_out_on_white_and_on_the_dark_theme():
    for page in ("#FFFFFF", "#111111"):
        assert min(contrast(colour, page) for colour in palette.COLOURS) >= 3
        assert contrast(palette.INK, page) > 4


@pytest.mark.parametrize("eye", EYES)
def test_higher_scores_are_lighter_to_every_eye(eye):
    ramp = matplotlib.colormaps[palette.SEQUENTIAL](np.linspace(0, 1, 32))
    assert (np.diff(lab(ramp, eye)[:, 0]) > 0).all()


def test_no_two_criteria_look_alike():
    looks = [palette.style_of(name) for name in registry.names("criteria")]
    assert len({(colour, dashes) for colour, _, dashes in looks}) == len(looks)
    assert {colour for colour, *_ in looks} <= set(palette.COLOURS)


# --- what there is ---


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Two criteria, two seeds, a handful of steps."""
    changed = SMALL | {
        "dense.steps": 4,
        "prune.filters_per_step": 60,
        "prune.prune_interval": 2,
        "criteria": ["cosprune", "l1"],
    }
    folder = tmp_path_factory.mktemp("explore")
    made = Experiment.open("smoke", "rooms", "", str(folder / "runs"), changed)
    for run in made.needed("pruned"):
        execute(run, lambda line: None)
    collect(made, folder / "figures")
    return made


@pytest.fixture(scope="module")
def figures(experiment):
    return experiment.root.parent / "figures"


@pytest.fixture(scope="module")
def results(experiment, figures):
    return Results(experiment, figures, seconds=float("inf"))


@pytest.fixture
def explorer(results, figures):
    return Explorer(results, saved_results(results.experiment, figures), figures)


@pytest.mark.parametrize("criterion", ["cosprune", "l1"])
def test_a_replay_is_the_run_itself(criterion, results):
    """To the last bit: it predicts what the networks predict that the run saved."""
    cell = (criterion, 1)
    replayed = results.networks(cell)
    saved = saved_networks(results.runs[cell], results.sizes[cell], results.images)
    assert len(saved.seen) == 3 and len(replayed.seen) == len(results.sizes[cell])
    for removal, seen in saved.seen.items():
        for task, prediction in seen.predictions.items():
            assert torch.equal(prediction, replayed.seen[removal].predictions[task]), removal


def test_filters_go_as_the_tables_say_and_the_lowest_first(results):
    for cell, rows in results.sizes.items():
        by_removal = results.networks(cell).filters
        assert list(by_removal) == list(rows.index)
        for removal, filters in by_removal.items():
            widths = [int(width) for width in rows.loc[removal, "widths"].split()]
            assert [len(kept) for kept in filters.kept] == widths
            for kept, scores, goes in zip(filters.kept, filters.scores, filters.goes):
                gone = np.isin(kept, goes)
                assert gone.sum() == len(goes)
                assert not gone.any() or scores[gone].max() <= scores[~gone].min()
        for before, after in itertools.pairwise(by_removal.values()):
            for kept, goes, left in zip(before.kept, before.goes, after.kept):
                assert (np.setdiff1d(kept, goes) == left).all()


def test_a_replay_of_a_run_with_other_tables_is_refused(experiment, figures, tmp_path):
    shutil.copytree(experiment.root, tmp_path / "runs")
    other = Results(replace(experiment, root=tmp_path / "runs"), figures, seconds=float("inf"))
    table = other.runs["l1", 0].path("layers.csv")
    layers = pd.read_csv(table)
    layers.loc[layers["removal"] == 0, "removed_next"] = 0
    layers.to_csv(table, index=False)
    with pytest.raises(ValueError, match="it is not the run of its tables"):
        other.networks(("l1", 0))


def test_ranks_are_places_among_all_layers():
    scores = [np.array([5.0, 1.0]), np.array([3.0, 2.0, 4.0])]
    ranks = Filters([np.arange(2), np.arange(3)], scores, []).ranks
    assert [of.tolist() for of in ranks] == [[1.0, 0.0], [0.5, 0.25, 0.75]]


def test_a_class_of_the_whole_image_is_read_where_its_task_looks():
    task = classification("left", ("a", "b"), (0, 0, 1, 0.5))
    output = torch.zeros(1, 2, 4, 4)
    output[:, 1, :, :2], output[:, 0, :, 2:] = 1.0, 9.0
    assert as_target(output, task).tolist() == [1]


def test_pixels_without_a_target_are_transparent(results):
    task = results.tasks["depth"]
    depth = torch.tensor([[[0.0, 1.0, 3.0]]])
    assert pixels(depth, task, (1.0, 3.0))[0, :, 3].tolist() == [0, 255, 255]


# --- what is drawn ---


def test_every_filter_is_a_square_and_says_what_becomes_of_it():
    filters = Filters(
        [np.array([0, 2]), np.array([0, 1, 2])],
        [np.array([2.0, 1.0]), np.array([3.0, 4.0, 5.0])],
        [np.array([2]), np.array([], int)],
    )
    drawn = views.filter_map([3, 3], [2, 3], filters)
    titles = dict(re.findall(r"<title>(layer \d, filter \d): ([^<]*)</title>", drawn))
    assert len(titles) == 6
    assert titles["layer 1, filter 2"] == "gone"
    assert titles["layer 1, filter 3"] == "score 1, above 0%; goes next"
    assert titles["layer 2, filter 3"] == "score 5, above 100%"
    counted = views.filter_map([3, 3], [2, 3])
    assert counted.count(": left<") == 5 and counted.count(": gone<") == 1


def test_the_legend_reads_the_curves_where_the_cursor_stands():
    curve = pd.DataFrame({"x": [10.0, 1000.0], "mean": [1.0, 3.0], "sd": [0.5, 0.5]})
    drawn = views.metric_plot("Metric", {"taylor": curve}, 100.0, ("taylor", 2.5))
    assert "Taylor 2 ± 0.5" in drawn and palette.ORANGE in drawn and "nan" not in drawn
    alone = curve.assign(sd=np.nan)
    assert "±" not in views.metric_plot("Metric", {"l1": alone}, 100.0, ("l1", 2.5))
    elsewhere = views.metric_plot("Metric", {"l1": curve}, 5.0, ("l1", 2.5))
    assert "L1 magnitude –" in elsewhere


# --- the widget ---


def shown(explorer) -> dict[str, str]:
    plots = {f"plot {i}": plot.value for i, plot in enumerate(explorer.plots.children)}
    return {name: view.value for name, view in explorer.views.items()} | plots


def test_a_move_draws_everything_anew_in_time(explorer):
    before = shown(explorer)
    for _, removal in explorer.size.options[1:]:
        explorer.size.value = removal
        after = shown(explorer)
        assert all(after[name] != before[name] for name in after)
        assert f'data-removal="{removal}"' in after["head"]
        before = after
    explorer.image.value = 2
    changed = [name for name, text in shown(explorer).items() if text != before[name]]
    assert set(changed) <= {"images", "head"} and "images" in changed
    # By the kernel's clock; the lower quartile, as other work on the machine holds up the others.
    assert np.quantile(explorer.milliseconds, 0.25) < 200


def test_another_criterion_is_shown_at_the_nearest_size(explorer):
    explorer.size.value = explorer.size.options[2][1]
    size = explorer.results.sizes[explorer.cell].loc[explorer.size.value, "parameters"]
    explorer.criterion.value = "l1"
    rows = explorer.results.sizes["l1", 0]["parameters"]
    assert explorer.size.value == (rows - size).abs().idxmin()
    assert f'data-removal="{explorer.size.value}"' in explorer.views["head"].value


def test_runs_that_take_too_long_are_not_replayed_and_it_is_said(experiment, figures):
    unwatched = Results(experiment, figures, seconds=0)
    explorer = Explorer(unwatched, {experiment.label: experiment}, figures)
    assert "stand in no table" in explorer.views["filters"].value
    assert "Predictions of this network" in explorer.views["images"].value
    saved = explorer.results.networks(explorer.cell).seen
    other = next(removal for _, removal in explorer.size.options if removal not in saved)
    explorer.size.value = other
    assert "No weights of this size" in explorer.views["images"].value


def test_tables_alone_are_shown_as_what_they_are(experiment, figures, tmp_path):
    elsewhere = replace(experiment, root=tmp_path)
    alone = Results(elsewhere, figures)
    explorer = Explorer(alone, {elsewhere.label: elsewhere}, figures)
    here = Results(experiment, figures).sizes
    for cell, rows in alone.sizes.items():
        assert rows["widths"].tolist() == here[cell]["widths"].tolist()
    assert "No weights of this run are here" in explorer.views["images"].value
    assert "image/png" not in explorer._repr_mimebundle_()
    with pytest.raises(FileNotFoundError, match="make figures PROFILE=smoke"):
        Results(elsewhere, tmp_path)


def test_a_criterion_offers_the_seeds_that_it_has(experiment, figures, tmp_path):
    shutil.copytree(experiment.root, tmp_path / "runs")
    half = replace(experiment, root=tmp_path / "runs")
    half.prune("l1", 0).path("done.json").unlink()
    explorer = Explorer(Results(half, tmp_path, seconds=0), {half.label: half}, tmp_path)
    assert explorer.seed.options == (0, 1)
    explorer.criterion.value = "l1"
    assert explorer.seed.options == (1,) and explorer.cell == ("l1", 1)
    explorer.criterion.value = "cosprune"
    assert explorer.seed.options == (0, 1) and explorer.cell == ("cosprune", 1)


def test_results_that_are_not_there_are_named_and_the_old_ones_stay(results, figures, tmp_path):
    quick = Experiment.open("quick", "rooms", "", str(tmp_path))
    label = results.experiment.label
    explorer = Explorer(results, {label: results.experiment, "quick": quick}, figures)
    explorer.data.value = "quick"
    assert "run `make figures PROFILE=quick`" in explorer.views["head"].value
    assert explorer.results is results


def test_without_a_kernel_a_picture_stands_in_its_place(explorer):
    assert explorer._repr_mimebundle_()["image/png"].startswith("iVBOR")
    notebook = nbformat.read(PROJECT / "notebooks" / "14_explore_pruning.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert "image/png" in kinds
    assert not any("widget" in kind for kind in kinds), "a view without its kernel"
