"""Pictures of the articles: error maps, ribbons, fronts, tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mtprune_utils.core.model import build, model_bytes
from mtprune_utils.datasets import data_tasks
from mtprune_utils.study import pictures
from mtprune_utils.study.profiles import get_profile

TASKS = data_tasks("rooms")


def test_errors_are_those_of_the_targets_own_unit():
    truth = torch.tensor([[1, 2], [255, 3]])  # 255: no target
    wrong = pictures.errors(torch.tensor([[1, 0], [3, 3]]), truth, TASKS["segmentation"])
    assert np.array_equal(wrong, [[0, 1], [np.nan, 0]], equal_nan=True)

    truth = torch.tensor([[[2.0, 4.0], [0.0, 1.0]]])
    wrong = pictures.errors(torch.tensor([[[3.0, 3.0], [1.0, 1.0]]]), truth, TASKS["depth"])
    assert np.array_equal(wrong, [[0.5, 0.25], [np.nan, 0]], equal_nan=True)

    x, y = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    truth = torch.stack([x, x, torch.zeros(3)], 1)[:, None]  # (3, 1, 3), the last without
    wrong = pictures.errors(torch.stack([x, y, y], 1)[:, None], truth, TASKS["normals"])
    assert np.allclose(wrong, [[0, 90, np.nan]], equal_nan=True, atol=0.1)


def test_a_class_of_a_whole_image_has_no_error_map():
    task = next(iter(data_tasks("multifashion").values()))
    with pytest.raises(ValueError, match="whole images"):
        pictures.errors(torch.tensor(1), torch.tensor(1), task)


def test_the_front_has_the_networks_that_no_other_beats():
    chance = np.random.default_rng(0)
    cost = pd.Series(chance.integers(0, 12, 60), index=range(100, 160))
    quality = pd.Series(chance.integers(0, 12, 60), index=cost.index)
    points = list(zip(cost, quality))

    def beaten(c, q):
        return any(x <= c and y >= q and (x, y) != (c, q) for x, y in points)

    found = pictures.front(cost, quality)
    assert (found.index == cost.index).all()
    undefeated = {point for point in points if not beaten(*point)}
    assert {point for point, on in zip(points, found) if on} == undefeated
    assert found.sum() == len(undefeated), "of equal networks, one"


def test_ribbons_are_as_thick_as_layers_have_filters():
    widths = [[8, 16], [5, 16], [5, 7]]
    layers = pd.DataFrame(
        [
            {"removal": removal, "layer": layer, "width": width}
            for removal, row in enumerate(widths)
            for layer, width in enumerate(row)
        ]
    )
    axis = pictures.show_survival(layers).axes[0]
    for layer, ribbon in enumerate(axis.collections):
        corners = ribbon.get_paths()[0].vertices
        for removal, row in enumerate(widths):
            y = corners[corners[:, 0] == removal, 1]
            assert np.isclose(y.max() - y.min(), row[layer])
    words = [text.get_text() for text in axis.texts]
    assert words == ["layer 1: 8", "5", "layer 2: 16", "7"]


def test_a_table_says_where_a_number_is_missing_and_is_the_same_each_time():
    table = pd.DataFrame({"count": [1234567], "low": [np.nan], "share": [0.12345]})
    text = pictures.styled(table, 2, missing="one seed").data
    assert text == pictures.styled(table, 2, missing="one seed").data
    assert all(f">{word}<" in text for word in ("1,234,567", "one seed", "0.12"))
    assert "nan" not in text and "nan" not in pictures.styled(table).data


def test_error_maps_are_of_the_tasks_that_every_network_has(dataset, architecture, tmp_path):
    files = {}
    for name, tasks in {"all": architecture.tasks, "depth": {"depth": 1}}.items():
        files[name] = tmp_path / name
        files[name].write_bytes(model_bytes(build(replace(architecture, tasks=tasks), seed=0)))

    def rows(networks):
        axes = pictures.show_errors(networks, dataset, get_profile("smoke")).axes
        return [axis.get_ylabel() for axis in axes if axis.get_ylabel() in TASKS]

    assert rows({"all": files["all"]}) == [*TASKS]
    assert rows({"depth": files["depth"]}) == ["depth"]
    assert rows(files) == ["depth"]
