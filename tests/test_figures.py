"""Figures can be read on a page of any colour, and count steps in whole numbers."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib_inline.backend_inline import _fetch_figure_metadata

from conftest import TASKS
from mtprune_utils.study import figures
from mtprune_utils.study.profiles import get_profile
from test_explore import contrast

PAGES = ("#FFFFFF", "#111111")  # of JupyterLab's themes
STEPS = [0, 1, 2]


def curve():
    losses = {f"{kind}{task}.loss": [3.0, 2.0, 1.5] for task in TASKS for kind in ("", "train.")}
    return figures.show_curve(pd.DataFrame({"step": STEPS, "selected": [0, 0, 1], **losses}))


def recovery():
    metrics = {metric: [0.1, 0.3, 0.2] for metric in figures.panels(TASKS)}
    phases = ["recovered", "removed", "recovered"]
    return figures.show_recovery(pd.DataFrame({"step": STEPS, "phase": phases, **metrics}), TASKS)


def trials():
    state = ["complete", "complete", "pruned"]
    numbers = {"lr": [1e-3, 2e-3, 1e-2], "weight_decay": [1e-4] * 3, "loss": [3.0, 2.0, np.nan]}
    return figures.show_trials(pd.DataFrame({"trial": STEPS, "state": state, **numbers}))


def training_curves():
    row = {"criterion": "taylor", "arm": "scratch", "level": 0.0, "task": "depth"}
    rows = [row | {"progress": x, "kept": x / 2} for x in (0.5, 1.0)]
    return figures.fig6_training_curves(pd.DataFrame(rows), (0.3,))[0]


def tuning():
    row = {"arm": "prune", "level": 0, "criterion": "taylor"}
    rows = [row | {"lr": lr, "loss": loss} for lr, loss in ((1e-3, 2.0), (2e-3, 1.0))]
    return figures.fig7_tuning(pd.DataFrame(rows), get_profile("smoke"))[0]


@pytest.fixture(params=(curve, recovery, trials, training_curves, tuning))
def figure(request):
    yield request.param()
    plt.close("all")


def png(figure) -> np.ndarray:
    """As it is saved: (H, W, 4) from 0 to 1."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", facecolor=figure.get_facecolor())
    file.seek(0)
    return plt.imread(file)


def test_the_page_is_seen_behind_a_figure_and_its_text_is_read_on_a_light_and_a_dark_one(figure):
    opaque = png(figure)[..., 3]
    assert opaque[0, 0] == 0 and (opaque == 0).mean() > 0.5
    assert _fetch_figure_metadata(figure) is None, "JupyterLab would put it into a white box"
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    lines = [line for line in figure.findobj(Line2D) if line.get_visible()]
    assert len(texts) > 10 and len(lines) > 2
    for page in PAGES:
        assert min(contrast(to_hex(text.get_color()), page) for text in texts) > 4
        assert min(contrast(to_hex(line.get_color()), page) for line in lines) >= 3


@pytest.mark.parametrize("drawn", (curve, recovery, trials))
def test_steps_are_whole_numbers(drawn):
    axis = drawn().axes[0]
    ticks = axis.get_xticks()
    assert len(ticks) > 2 and (ticks == ticks.round()).all()
    axis.xaxis.set_major_locator(plt.AutoLocator())
    assert (axis.get_xticks() % 1).any(), "which matplotlib alone would not see to"
    plt.close("all")
