"""What pruning runs leave to look at, and the widget that shows it: `14_explore_pruning.ipynb`.

Tables know how wide each layer was and what each network scored. Which filters went, and by which
scores, stands in no table: `replay` repeats a run and looks.
"""

import base64
import io
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from mtprune_utils import registry
from mtprune_utils.core.data import Dataset, Split
from mtprune_utils.core.evaluation import recalibrated
from mtprune_utils.core.iterative import removal_plan
from mtprune_utils.core.model import load_model
from mtprune_utils.core.scoring import TASK_GRADIENTS, Scores
from mtprune_utils.core.settings import Profile
from mtprune_utils.core.trainer import Trainer
from mtprune_utils.criteria import get_criterion
from mtprune_utils.files import read_json
from mtprune_utils.stages import prune
from mtprune_utils.stages._training import DENSE, at_level, device_of, network, set_up
from mtprune_utils.study import statistics as stats
from mtprune_utils.study import store, views
from mtprune_utils.study.execute import load_data, restore_weights
from mtprune_utils.study.figures import panels as shown_metrics
from mtprune_utils.study.grid import Experiment, Run
from mtprune_utils.study.palette import style_of
from mtprune_utils.study.pictures import Seen, film, limits_of, look, pixels
from mtprune_utils.study.profiles import PROFILES

# What a slider wants of the smoke profile: more sizes, a network that has seen a little, no search.
SMALL = {
    "dense.steps": 120,
    "prune.filters_per_step": 26,
    "prune.prune_interval": 4,
    "tuning.trials": 0,
}
IMAGES = 12  # of the test images, which predictions are kept of


# --- what there is ---


@dataclass(frozen=True)
class Filters:
    """The filters that are left before a removal: one array per layer.

    kept: their numbers in the dense network. scores: theirs. goes: which of them go next.
    """

    kept: list[np.ndarray]
    scores: list[np.ndarray]
    goes: list[np.ndarray]

    @cached_property
    def ranks(self) -> list[np.ndarray]:
        """Each score's place among all filters that are left, from 0, the lowest, to 1."""
        flat = np.concatenate(self.scores)
        places = flat.argsort(kind="stable").argsort(kind="stable") / max(len(flat) - 1, 1)
        return np.split(places, np.cumsum([len(part) for part in self.scores])[:-1])


@dataclass(frozen=True)
class Networks:
    """A run's networks, by removal: which filters they have left, and what they make of images."""

    filters: dict[int, Filters]
    seen: dict[int, Seen]

    @cached_property
    def score_pictures(self) -> list[str]:
        """Drawn once: a move only moves the frame."""
        dense = [len(kept) for kept in self.filters[0].kept]
        return views.score_pictures(dense, self.filters)


# --- a run once more ---


def replay(run: Run, dataset: Dataset, images: Split) -> Networks:
    """A finished run once more, from the same dense network, with a look at every filter.

    The loop is that of `core.iterative`; how many filters go of each layer it reads from the run's
    tables. Raises ValueError if the filters that it finds are not as many.
    """
    profile, settings, seed = run.profile, prune.settings(run), run.random_seed
    restore_weights(run)
    set_up(profile, device_of(profile))
    torch.manual_seed(seed)
    model = network(run.source, DENSE).to(device_of(profile)).train()
    layers = pd.read_csv(run.path("layers.csv"))
    plan = removal_plan(model.architecture.width_list, settings)
    steps = (len(plan) + len(profile.sizes) + 1) * settings.prune_interval
    trainer = Trainer(model, dataset, profile, settings, steps, seed)
    scored, generator = get_criterion(prune.scored_by(run)), torch.Generator().manual_seed(seed)
    kept = [np.arange(width) for width in model.architecture.width_list]
    found = Networks({}, {0: _look_afresh(model, dataset, images, profile)})
    for removal, rows in layers.groupby("removal"):
        scores = Scores(scored, model.groups, model, generator)
        cosine = Scores(get_criterion("cosprune"), model.groups, model)  # as gradients are read by
        for left in reversed(range(settings.prune_interval)):
            batch, offset = divmod(left, settings.score_every)
            reading = [] if offset and scored.needs == TASK_GRADIENTS else [scores]
            if not offset and batch < settings.cosine_batches:
                reading.append(cosine)
            trainer.step(reading)
        means = scores.mean()
        if [len(mean) for mean in means] != rows["width"].tolist():
            raise ValueError(f"{run.name}: replayed, it is not the run of its tables: repeat it")
        if removal:
            found.seen[removal] = _look_afresh(model, dataset, images, profile)
        chosen = [
            mean.argsort(stable=True)[:count].sort().values.cpu()
            for mean, count in zip(means, rows["removed_next"])
        ]
        found.filters[removal] = Filters(
            kept,
            [mean.cpu().numpy() for mean in means],
            [units[gone.numpy()] for units, gone in zip(kept, chosen)],
        )
        kept = [np.delete(units, gone.numpy()) for units, gone in zip(kept, chosen)]
        model.remove(chosen, trainer.optimizer)
    return found


def _look_afresh(model, dataset: Dataset, images: Split, profile: Profile) -> Seen:
    return look(recalibrated(model, dataset, profile), images, dataset.tasks, profile)


def saved_networks(run: Run, sizes: pd.DataFrame, images: Split) -> Networks:
    """What the weights show that a run has left: none of its scores, and images at a few sizes."""
    dense = run.source or run  # every pruning run has one
    files = {0: dense.path(DENSE), sizes["removal"].max(): run.path(DENSE)}
    for row in sizes.dropna(subset="target_level").to_dict("records"):
        files[row["removal"]] = run.path(at_level(int(row["target_level"])))
    device, tasks = device_of(run.profile), run.experiment.tasks
    return Networks(
        {},
        {
            removal: look(load_model(file).to(device), images, tasks, run.profile)
            for removal, file in files.items()
            if file.exists()
        },
    )


# --- the runs of a profile ---


class Results:
    """Every pruning run of a profile on its data: tables, and networks as far as they are there.

    figures: the folder of committed tables, where runs themselves are not here. seconds: runs are
    replayed if all of them took no longer than this. Raises FileNotFoundError if there is nothing.
    """

    def __init__(self, experiment: Experiment, figures: Path, seconds: float = 60.0):
        self.experiment, self.profile, self.tasks = experiment, experiment.profile, experiment.tasks
        cells = [(c, s) for c in self.profile.criteria for s in range(self.profile.seeds)]
        runs = {cell: experiment.prune(*cell) for cell in cells}
        self.sizes: dict[tuple[str, int], pd.DataFrame] = {}
        self.layers: dict[tuple[str, int], pd.DataFrame] = {}
        for cell, run in runs.items():
            rows, layers = (_table(run, file, figures) for file in run.tables)
            if len(rows) and len(layers):
                recovered = rows[rows["phase"] != "removed"]
                self.sizes[cell] = recovered.set_index("removal", drop=False)
                self.layers[cell] = layers
        if not self.sizes:
            raise FileNotFoundError(
                f"no pruning run of {experiment.label} is here: run `{experiment.command}`"
            )
        self.runs = {cell: runs[cell] for cell in self.sizes}
        experiment.check_codes((run, run.marker["code"]) for run in self.runs.values() if run.done)
        self.metrics = shown_metrics(self.tasks)
        self.seconds = sum(
            read_json(run.path("timing.json"))["seconds"] if run.done else np.inf
            for run in self.runs.values()
        )
        self.replayed = self.seconds <= seconds
        self._networks: dict[tuple[str, int], Networks] = {}

    @cached_property
    def dataset(self) -> Dataset:
        """The data, as networks are evaluated on it."""
        return load_data(next(iter(self.runs.values()))).resized_for_evaluation(self.profile.crop)

    @cached_property
    def images(self) -> Split:
        """The first test images with their targets, at the size of a crop."""
        size = (self.profile.crop, self.profile.crop)
        return self.dataset.test[:IMAGES].resized(size, self.tasks)

    def networks(self, cell: tuple[str, int]) -> Networks:
        """Replayed, or what was saved; once."""
        if cell not in self._networks:
            run = self.runs[cell]
            device = device_of(self.profile)
            images = self.images.to(device)
            self._networks[cell] = (
                replay(run, self.dataset.to(device), images)
                if self.replayed
                else saved_networks(run, self.sizes[cell], images)
            )
        return self._networks[cell]

    @cached_property
    def curves(self) -> dict[str, dict[str, pd.DataFrame]]:
        """{metric: {criterion: its mean and spread over seeds, by parameters}}."""
        criteria = dict.fromkeys(criterion for criterion, _ in self.sizes)
        tables = {
            criterion: pd.concat(
                rows.assign(seed=seed)
                for (name, seed), rows in self.sizes.items()
                if name == criterion
            )
            for criterion in criteria
        }
        return {
            metric: {
                criterion: stats.curve_over_seeds(table, "parameters", metric)
                for criterion, table in tables.items()
            }
            for metric in self.metrics
        }


def _table(run: Run, file: str, figures: Path) -> pd.DataFrame:
    """A run's rows, from its folder or else from the committed tables; none if there are none."""
    if run.done:
        return pd.read_csv(run.path(file))
    path = store.results_folder(run.experiment.label, figures) / f"{run.stage}_{file}"
    if not path.exists():
        return pd.DataFrame()
    rows = pd.read_csv(path)
    return rows[rows["run"] == run.name]


def saved_results(first: Experiment, figures: Path) -> dict[str, Experiment]:
    """{label: experiment}: the first, and those whose tables are committed."""
    found = {first.label: first}
    for folder in sorted(figures.glob("*/results")):
        profile, _, data = folder.parent.name.partition("-")
        known = not data or data in registry.names("datasets")  # not "custom", nor a plugin's
        if profile in PROFILES and known:
            other = Experiment(PROFILES[profile], data or "rooms", first.data_root, first.root)
            found.setdefault(other.label, other)
    return found


# --- the widget ---


class Explorer:
    """Pickers, a slider over the network's size, and what they choose, drawn anew at every move.

    `milliseconds`: of each move, by the kernel's clock. In a notebook it shows itself; where no
    kernel runs, as on a page of the web, `picture` stands in its place.
    """

    def __init__(self, results: Results, others: dict[str, Experiment], figures: Path):
        self.others, self.figures = others, figures
        self.results = results
        self.milliseconds: list[float] = []
        self._loaded = {results.experiment.label: results}
        self._parameters = np.inf  # of the network that is shown
        fixed = {"layout": {"width": "max-content"}}
        self.data = widgets.Dropdown(
            options=list(others), value=results.experiment.label, description="results", **fixed
        )
        self.criterion = widgets.Dropdown(description="criterion", **fixed)
        self.seed = widgets.Dropdown(description="seed", **fixed)
        self.image = widgets.IntSlider(min=1, max=IMAGES, description="test image")
        self.size = widgets.SelectionSlider(
            options=[""], description="size", layout={"width": "98%"}
        )
        self.size.add_class("explore-size")
        panel = {"layout": {"flex": "1 1 330px"}}
        self.views = {name: widgets.HTML(**panel) for name in ("filters", "images")}
        self.views |= {name: widgets.HTML() for name in ("head", "maps")}
        self.plots = widgets.HBox(layout={"flex_flow": "row wrap", "width": "100%"})
        pickers = widgets.HBox(
            [self.data, self.criterion, self.seed, self.image], layout={"flex_flow": "row wrap"}
        )
        pair = widgets.HBox(
            [self.views["filters"], self.views["images"]], layout={"flex_flow": "row wrap"}
        )
        self.box = widgets.VBox(
            [
                widgets.HTML(views.STYLE),
                pickers,
                self.size,
                self.views["head"],
                pair,
                self.plots,
                self.views["maps"],
            ]
        )
        self.box.add_class("explore")
        self._open(results)
        self.data.observe(self._data_picked, "value")
        for picker in (self.criterion, self.seed):
            picker.observe(self._run_picked, "value")
        for picker in (self.size, self.image):
            picker.observe(self._moved, "value")

    @property
    def cell(self) -> tuple[str, int]:
        """The criterion and the seed that are shown."""
        return self.criterion.value, self.seed.value

    def _open(self, results: Results) -> None:
        images = len(results.images)  # first: it may fail, and then nothing has changed
        self.results, self._busy = results, True
        criteria = dict.fromkeys(criterion for criterion, _ in results.runs)
        self.criterion.options = [(style_of(name)[1], name) for name in criteria]
        self.criterion.index = 0
        self.image.max = images
        self.plots.children = [widgets.HTML(layout={"flex": "1 1 300px"}) for _ in results.metrics]
        self._busy = False
        self._run_picked()

    def _data_picked(self, change) -> None:
        """Open other results; what they lack is said, and the old ones stay."""
        label = change["new"]
        try:
            if label not in self._loaded:
                self._loaded[label] = Results(self.others[label], self.figures, seconds=0)
            self._open(self._loaded[label])
        except (OSError, ValueError) as error:
            self.views["head"].value = f"<p><strong>{label} cannot be shown.</strong> {error}</p>"

    def _run_picked(self, change=None) -> None:
        """Take the network of the other run that is nearest in size."""
        if self._busy:
            return
        self._offer_seeds()
        rows = self.results.sizes[self.cell]
        options = [
            (f"{size / rows['parameters'].max():.0%} · {filters} filters", removal)
            for removal, size, filters in zip(rows.index, rows["parameters"], rows["filters"])
        ]
        self._busy = True
        self.size.options = options
        distance = (rows["parameters"] - min(self._parameters, rows["parameters"].max())).abs()
        self.size.value = distance.idxmin()
        self._busy = False
        self.draw()

    def _offer_seeds(self) -> None:
        """Those that the criterion has runs of: the picked one stays, if it is among them."""
        seeds = tuple(seed for name, seed in self.results.runs if name == self.criterion.value)
        if seeds != self.seed.options:
            self._busy, before = True, self.seed.value
            self.seed.options = seeds
            self.seed.value = before if before in seeds else seeds[0]
            self._busy = False

    def _moved(self, change) -> None:
        if not self._busy:
            self.draw()

    def draw(self) -> None:
        """Show the network that the pickers name."""
        start = time.perf_counter()
        results, cell, removal = self.results, self.cell, self.size.value
        rows, networks = results.sizes[cell], results.networks(cell)
        row = rows.loc[removal]
        share = row["parameters"] / rows.loc[0, "parameters"]
        self._parameters = row["parameters"]
        dense, widths = ([int(w) for w in rows.loc[r, "widths"].split()] for r in (0, removal))
        self._draw_filters(dense, widths, networks, removal)
        self._draw_images(networks.seen, removal, rows)
        for plot, (metric, title) in zip(self.plots.children, results.metrics.items()):
            plot.value = views.metric_plot(
                title, results.curves[metric], row["parameters"], (cell[0], row[metric])
            )
        took = (time.perf_counter() - start) * 1000
        self.milliseconds.append(took)
        self.views["head"].value = (
            f'<p class="readout" data-removal="{removal}" data-milliseconds="{took:.1f}"><strong>'
            f"{row['filters']} of {sum(dense)} filters</strong>, {row['parameters']:,} parameters "
            f"({share:.0%}), {row['macs'] / 1e6:.2f} million multiply-accumulates. "
            f"{_when(removal)}.</p>"
        )

    def _draw_filters(
        self, dense: list[int], widths: list[int], networks: Networks, removal: int
    ) -> None:
        known = networks.filters
        title = "<h4>Filters left, layer by layer</h4>"
        drawn = title + views.filter_map(dense, widths, known.get(removal))
        if known:
            self.views["filters"].value = drawn + views.score_key()
            self.views["maps"].value = (
                "<h4>Scores over the run: a row per filter, a column per size</h4>"
                + views.score_maps(networks.score_pictures, dense, sorted(known), removal)
            )
            return
        self.views["filters"].value = drawn + (
            "<p>Squares only count here: which filters are gone, and their scores, stand in no "
            "table. A replay finds them.</p>"
        )
        layers = self.results.layers[self.cell]
        self.views["maps"].value = (
            "<h4>Where the tasks agree: a row per layer, a column per size</h4>"
            f'<div style="max-width:520px">{views.cosine_map(layers, removal)}</div>'
        )

    def _draw_images(self, seen: dict[int, Seen], removal: int, rows: pd.DataFrame) -> None:
        if not seen:
            words = "No weights of this run are here, so there is nothing to predict with."
            self.views["images"].value = f"<h4>A test image</h4><p>{words}</p>"
            return
        sizes = rows["parameters"]
        nearest = (sizes[list(seen)] - sizes[removal]).abs().idxmin()
        share = f"{sizes[nearest] / sizes[0]:.0%} of the parameters"
        words = f"Predictions of this network, with {share}."
        if nearest != removal:
            words = f"No weights of this size: these are predictions at {share}, the nearest saved."
        i, images = self.image.value - 1, self.results.images
        tiles = [views.tile("image", {"input": images.image[i].permute(1, 2, 0).numpy()})]
        for name, task in self.results.tasks.items():
            target, predicted = images.targets[name][i], seen[nearest].predictions[name][i]
            quality = f"{task.shown.replace('_', ' ')} {seen[nearest].quality[name][i]:.3g}"
            if not task.target.of_pixels:
                said = f"predicted {task.classes[predicted]}, true {task.classes[target]}"
                tiles.append(views.tile(name, {}, said))
                continue
            limits = limits_of(target, task)
            both = {"predicted": predicted, "true": target}
            shown = {word: pixels(of, task, limits) for word, of in both.items()}
            tiles.append(views.tile(name, shown, quality))
        self.views["images"].value = f"<h4>A test image</h4><p>{words}</p>{views.row(tiles)}"

    def picture(self) -> Figure | None:
        """The shown image by networks of several sizes; None where no weights are."""
        seen = self.results.networks(self.cell).seen
        if not seen:
            return None
        sizes = self.results.sizes[self.cell]["parameters"]
        shares = (sizes[sorted(seen)] / sizes[0]).map("{:.0%}".format)
        every = np.linspace(0, len(shares) - 1, min(len(shares), 5)).round().astype(int)
        predictions = {shares.iloc[at]: seen[shares.index[at]].predictions for at in every}
        return film(self.results.images, predictions, self.results.tasks, self.image.value - 1)

    def _repr_mimebundle_(self, **options) -> dict:
        """Itself, and the picture for who cannot show it."""
        bundle = self.box._repr_mimebundle_(**options) | {"text/plain": repr(self)}
        figure = self.picture()
        if figure is not None:
            file = io.BytesIO()
            figure.savefig(file, dpi=110, transparent=True, metadata={"Software": None})
            plt.close(figure)
            bundle["image/png"] = base64.b64encode(file.getvalue()).decode()
        return bundle

    def __repr__(self) -> str:
        (criterion, seed), label = self.cell, self.results.experiment.label
        return f"Explorer of {label}: {criterion}, seed {seed}, {self.size.label}"


def _when(removal: int) -> str:
    return f"After removal {removal} and its recovery" if removal else "The dense network"
