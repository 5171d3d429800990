"""Real data sets in every layout, fabricated in miniature with every kind of invalid pixel, and
trained on.
"""

import gzip
import json
import os
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from mtprune_utils import registry
from mtprune_utils.core import evaluation, trainer
from mtprune_utils.core.data import Split, augment
from mtprune_utils.core.model import build
from mtprune_utils.core.task import channels, numbers
from mtprune_utils.datasets import _reading, data_digest, load_dataset
from mtprune_utils.datasets.multifashion import DEBIAN, FILES
from mtprune_utils.files import PROJECT
from mtprune_utils.run import notebook
from mtprune_utils.stages._training import architecture
from mtprune_utils.study import figures
from mtprune_utils.study.execute import execute, load_data
from mtprune_utils.study.grid import Experiment
from mtprune_utils.study.profiles import get_profile
from mtprune_utils.tasks.depth import depth as depth_task
from test_data import normals_from

SIZE = (24, 32)
SAMPLES = Path(__file__).parents[2] / "shared" / "nyu_v2_samples"


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MTPRUNE_CACHE", str(tmp_path / "cache"))


class Scene:
    """One sample, exact: what every layout encodes in its own way. Row 0 has no label, rows 1 and 2
    no depth, row 2 no normal.
    """

    def __init__(self, seed, classes=13):
        rng = np.random.default_rng(seed)
        self.image = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        self.labels = rng.integers(0, classes, SIZE)
        self.depth = rng.uniform(0.1, 0.45, SIZE).astype(np.float32)
        normals = rng.normal(size=(*SIZE, 3)).astype(np.float32)
        self.normals = normals / np.linalg.norm(normals, axis=-1, keepdims=True)


def adashare(folder, count=(12, 4)):
    index = {}
    for split, number in zip(("train", "test"), count):
        index[split] = []
        for i in range(number):
            scene, names = (
                Scene(i, 40),
                [
                    f"{kind}/{split}{i}.{end}"
                    for kind, end in (
                        ("img", "png"),
                        ("seg", "png"),
                        ("normal", "png"),
                        ("depth", "npy"),
                    )
                ],
            )
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            labels, depth = scene.labels.astype(np.uint8), scene.depth
            stored = scene.normals[..., [0, 2, 1]] * (1, -1, 1)  # right, into the scene, up
            normals = np.round((stored + 1) * 127.5).astype(np.uint8)
            labels[0], depth[1:3], normals[2, ::2], normals[2, 1::2] = 255, 2e-5, 255, 127
            for name, array in zip(names, (scene.image, labels, normals)):
                Image.fromarray(array).save(folder / name)
            np.save(folder / names[3], depth)
            index[split].append(names)
    (folder / "nyu_v2_3task.json").write_text(json.dumps(index))
    return folder


def mtan(folder, count=(12, 4), normals=True, label_folder="label"):
    for split, number in zip(("train", "val"), count):
        for i in range(number):
            scene = Scene(i, 13 if normals else 7)
            scene.labels[0], scene.depth[1:3], scene.normals[2] = -1, 0, 0
            arrays = {"image": scene.image / 255.0, label_folder: scene.labels.astype(np.float32)}
            arrays["depth"] = scene.depth[..., None] if normals else scene.depth
            if normals:
                arrays["normal"] = scene.normals
            for kind, array in arrays.items():
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                np.save(folder / split / kind / f"{i}.npy", array)
    return folder


def hugging_face(folder, count=(12, 4)):
    (folder / "data").mkdir(parents=True)
    for split, number in zip(("train", "val"), count):
        rows = []
        for i in range(number):
            scene = Scene(i)
            scene.labels[0], scene.depth[1:3], scene.normals[2] = -1, 0, 0
            planes = {
                "image": np.moveaxis(scene.image / np.float32(255), -1, 0),
                "segmentation": scene.labels,
                "depth": scene.depth[None],
                "normal": np.moveaxis(scene.normals, -1, 0),
            }
            rows.append({name: array.tolist() for name, array in planes.items()})
        pd.DataFrame(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def cityscapes(folder, count=(12, 4), label_folder="label_7"):
    return mtan(folder, count, normals=False, label_folder=label_folder)


def fashion(folder, count=(24, 8)):
    """The four files of FashionMNIST in miniature; torchvision reads them as it reads the real
    ones.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, number in zip(("train", "t10k"), count):
        images, labels = (
            rng.integers(1, 256, (number, 28, 28), dtype=np.uint8),
            rng.integers(0, 10, number, dtype=np.uint8),
        )
        sizes = [
            b"".join(n.to_bytes(4, "big") for n in size) for size in ((number, 28, 28), (number,))
        ]
        head = [b"\0\0\x08\x03" + sizes[0], b"\0\0\x08\x01" + sizes[1]]
        for kind, start, array in zip(("images-idx3", "labels-idx1"), head, (images, labels)):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(start + array.tobytes()))
    return folder


LAYOUTS = {
    "adashare": ("nyuv2", adashare),
    "mtan": ("nyuv2", mtan),
    "hugging face": ("nyuv2", hugging_face),
    "cityscapes": ("cityscapes", cityscapes),
    "multifashion": ("multifashion", fashion),
}


@pytest.mark.parametrize("layout", ["adashare", "mtan", "hugging face"])
def test_every_layout_of_nyuv2_gives_the_same_samples_with_invalid_pixels_marked(layout, tmp_path):
    name, make = LAYOUTS[layout]
    data = load_dataset(name, str(make(tmp_path / "data")))
    assert (len(data.train) + len(data.validation), len(data.test)) == (12, 4)
    classes = 40 if layout == "adashare" else 13
    assert len(data.tasks["segmentation"].classes) == classes == data.tasks["segmentation"].channels
    scene = Scene(0, classes)
    assert torch.equal(data.train.image[0], torch.from_numpy(scene.image).permute(2, 0, 1))
    targets = {task: target[0] for task, target in data.train.targets.items()}
    assert (targets["segmentation"][0] == 255).all() and np.array_equal(
        targets["segmentation"][1:], scene.labels[1:]
    )
    assert (targets["depth"][0, 1:3] == 0).all() and np.array_equal(
        targets["depth"][0, 3:], scene.depth[3:]
    )
    normals = targets["normals"].float().permute(1, 2, 0)
    assert (normals[2] == 0).all(), "white and grey pixels, zero vectors"
    error = np.abs(normals[3:].numpy() - scene.normals[3:]).max()
    assert error < (0.01 if layout == "adashare" else 0.001)
    assert torch.allclose(normals[3:].norm(dim=-1), torch.ones(21, 32), atol=2e-3)


@pytest.mark.parametrize("label_folder", ["label", "label_7"])
def test_cityscapes_has_two_tasks_and_inverse_depth(tmp_path, label_folder):
    data = load_dataset("cityscapes", str(cityscapes(tmp_path / "data", label_folder=label_folder)))
    assert (
        list(data.tasks) == ["segmentation", "depth"]
        and data.tasks["depth"].target.name == "inverse depth"
    )
    assert (data.train.targets["segmentation"][:, 0] == 255).all() and (
        data.train.targets["depth"][:, 0, 1] == 0
    ).all()
    assert np.array_equal(data.train.targets["segmentation"][0, 1:], Scene(0, 7).labels[1:])


def test_inverse_depth_grows_with_the_picture_and_depth_shrinks():
    target = torch.full((1, 1, 16, 16), 0.3)
    both = {"depth": depth_task(), "inverse depth": depth_task(inverse=True)}
    split = Split(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), dict.fromkeys(both, target))
    _, ours = augment(split, both, 16, 8, (2.0, 2.0), True, torch.Generator().manual_seed(0))
    assert ours["depth"].unique().tolist() == pytest.approx([0.15])
    assert ours["inverse depth"].unique().tolist() == pytest.approx([0.6])
    assert (
        both["depth"].target.unscaled(torch.ones(1), 0.5) == 0.5
        and both["inverse depth"].target.unscaled(torch.ones(1), 0.5) == 2.0
    )


def test_multifashion_lays_two_garments_over_each_other(tmp_path):
    data = load_dataset("multifashion", str(fashion(tmp_path / "data")))
    assert list(data.tasks) == ["upper_left", "lower_right"] and not data.mirror
    images = np.frombuffer(
        gzip.decompress((tmp_path / "data" / FILES[0]).read_bytes())[16:], np.uint8
    ).reshape(-1, 28, 28)
    labels = np.frombuffer(
        gzip.decompress((tmp_path / "data" / FILES[1]).read_bytes())[8:], np.uint8
    )
    picture = data.train.image[0]
    assert picture.shape == (3, 36, 36) and torch.equal(picture[0], picture[2])
    assert np.array_equal(picture[0, :8, :28], images[0, :8]) and (picture[0, :8, 28:] == 0).all()
    partner = next(i for i in range(24) if np.array_equal(picture[0, 28:, 8:], images[i, 20:]))
    assert (data.train.targets["upper_left"][0], data.train.targets["lower_right"][0]) == (
        labels[0],
        labels[partner],
    )
    assert np.array_equal(
        picture[0, 8:28, 8:28], np.maximum(images[0, 8:, 8:], images[partner, :20, :20])
    )
    images, _ = augment(
        data.train[:8],
        data.tasks,
        36,
        36,
        (1.0, 1.0),
        True,
        torch.Generator().manual_seed(0),
        data.mirror,
    )
    assert torch.allclose(images[:, 0] * 0.229 + 0.485, data.train.image[:8, 0] / 255, atol=1e-5), (
        "neither moved nor mirrored"
    )


def test_the_real_fashionmnist_is_what_multifashion_is_made_of():
    if not DEBIAN.exists():
        assert "CI" not in os.environ, "CI installs Debian's dataset-fashion-mnist"
        pytest.skip("Debian's dataset-fashion-mnist is not installed here")
    data = load_dataset("multifashion", "", train_images=4000, test_images=500)
    assert len(data.train) + len(data.validation) == 4000 and len(data.test) == 500
    counts = torch.bincount(data.train.targets["upper_left"].long(), minlength=10)
    assert counts.min() > 280, "ten balanced classes"
    profile = get_profile(
        "fashion",
        {"train_images": 4000, "test_images": 500, "dense.steps": 300, "dense.evaluations": 2},
    )
    model = build(architecture(profile, channels(data.tasks)), 0)
    trainer.train(model, data, profile, profile.dense, 0, report=lambda line: None)
    ours = evaluation.evaluate_with_recalibrated_bn(model, data, data.test, profile)
    trivial = evaluation.trivial_predictors(data, profile)["position prior"]
    for task in data.tasks:
        assert trivial[f"{task}.accuracy"] < 0.2 < 0.45 < ours[f"{task}.accuracy"], (
            "it learns both garments"
        )


TINY = {
    "image_height": 24,
    "crop": 16,
    "batch_size": 4,
    "dense.steps": 3,
    "dense.evaluations": 1,
    "retrain.steps": 3,
    "retrain.evaluations": 1,
    "prune.prune_interval": 1,
    "prune.filters_per_step": 110,
    "tuning.trials": 0,
    "train_images": None,
    "test_images": None,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_chain_runs_on_every_layout(layout, tmp_path):
    name, make = LAYOUTS[layout]
    experiment = Experiment.open(
        "smoke", name, str(make(tmp_path / "data")), str(tmp_path / "runs"), TINY
    )
    run = experiment.retrain("cosprune", 0, 0)
    execute(run, report=lambda line: None)
    row = pd.read_csv(run.path("evaluations.csv")).iloc[0]
    assert row[list(figures.panels(experiment.tasks))].notna().all()
    trivial = pd.read_csv(experiment.dense(0).path("trivial.csv"))
    assert trivial[list(figures.panels(experiment.tasks))].notna().all(axis=None)
    origin = json.loads(run.path("provenance.json").read_text())
    assert origin["data"] == name and str(tmp_path) not in json.dumps(origin)
    data = load_data(run)
    for figure in (
        figures.show_samples(data.train, data),
        figures.show_statistics(data.train, data),
    ):
        figure.canvas.draw()


def test_the_tour_shows_every_data_set_that_it_is_given(tmp_path):
    others = {
        "cityscapes": str(cityscapes(tmp_path / "streets")),
        "multifashion": str(fashion(tmp_path / "garments")),
    }
    place = {"data": "nyuv2", "root": str(mtan(tmp_path / "rooms")), "others": others}
    notebook.execute(PROJECT / "notebooks" / "09_tour_data.ipynb", tmp_path / "tour.ipynb", place)
    outputs = [
        output
        for cell in nbformat.read(tmp_path / "tour.ipynb", 4).cells
        for output in cell.get("outputs", [])
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3 * 3, (
        "samples, distributions, minibatches"
    )
    text = "".join(output.get("text", "") for output in outputs)
    assert all(f"{name}\n" in text for name in ("nyuv2", *others))


def test_a_run_is_named_by_the_files_not_by_where_they_lie(tmp_path):
    here, there = (
        Experiment.open("smoke", "nyuv2", str(mtan(tmp_path / place)), "runs").dense(0).name
        for place in ("here", "there")
    )
    assert here == there
    np.save(tmp_path / "here" / "val" / "depth" / "0.npy", np.ones((*SIZE, 1), np.float32))
    assert Experiment.open("smoke", "nyuv2", str(tmp_path / "here"), "runs").dense(0).name != here


def test_batches_that_are_brought_to_the_device_are_those_that_lie_there(tmp_path):
    data = load_dataset("nyuv2", str(mtan(tmp_path / "data")))
    streamed = data.streamed("cpu")
    profile = get_profile("smoke", TINY)
    curves = []
    for version in (data, streamed):
        model = build(architecture(profile, channels(data.tasks)), 0)
        curves.append(
            trainer.train(model, version, profile, profile.dense, 0, report=lambda line: None)
        )
    assert curves[0] == curves[1]


# --- what is wrong is told in one line that names the file, before any training starts ---


def break_index(folder):
    (folder / "nyu_v2_3task.json").write_text('{"train": [["a", "b"]], "test": []}')


def save(kind, array):
    return lambda folder: np.save(folder / "train" / kind / "3.npy", array)


def truncate(name):
    def cut(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])

    return cut


def remove(name):
    return lambda folder: (folder / name).unlink()


def empty(folder):
    for file in folder.glob("val/*/*.npy"):
        file.unlink()


def another_size(folder):
    for kind, shape in {
        "image": (9, 9, 3),
        "label": (9, 9),
        "depth": (9, 9),
        "normal": (9, 9, 3),
    }.items():
        np.save(folder / "train" / kind / "3.npy", np.ones(shape))


def empty_cell(folder):
    file = folder / "data" / "train-00000-of-00001.parquet"
    table = pd.read_parquet(file)
    table.at[3, "depth"] = None
    table.to_parquet(file)


@pytest.mark.parametrize(
    "layout, damage, message",
    [
        ("adashare", break_index, r"nyu_v2_3task.json \(a row has not four files\): expected"),
        ("adashare", remove("seg/train2.png"), r"seg/train2.png is missing"),
        (
            "adashare",
            truncate("img/train1.png"),
            r"img/train1.png cannot be read .*: expected an RGB image",
        ),
        (
            "adashare",
            lambda folder: np.save(folder / "depth/train1.npy", np.ones((9, 9))),
            r"depth/train1.npy is 9 x 9: expected 24 x 32, as its image",
        ),
        ("mtan", remove("train/depth/3.npy"), r"train/depth/3.npy is missing: expected depth"),
        ("mtan", truncate("train/normal/3.npy"), r"train/normal/3.npy cannot be read"),
        (
            "mtan",
            save("label", np.full(SIZE, 13)),
            r"train/label/3.npy has label 13: expected 0 to 12, 255 or -1",
        ),
        (
            "mtan",
            save("label", np.full(SIZE, 0.5)),
            r"train/label/3.npy has labels that are no whole numbers",
        ),
        (
            "mtan",
            save("image", np.full((*SIZE, 3), 7.0)),
            r"train/image/3.npy: expected RGB as uint8, or as floats from 0 to 1",
        ),
        (
            "mtan",
            save("image", np.ones(SIZE)),
            r"train/image/3.npy has shape \(24, 32\): expected an RGB image",
        ),
        (
            "mtan",
            save("normal", np.ones((*SIZE, 2))),
            r"train/normal/3.npy has shape .*: expected normals",
        ),
        ("mtan", empty, r"val: the split is empty"),
        (
            "mtan",
            another_size,
            r"train/image/3.npy is 9 x 9: expected 24 x 32, as .*train/image/0.npy",
        ),
        (
            "hugging face",
            truncate("data/train-00000-of-00001.parquet"),
            r"train-00000-of-00001.parquet is not a readable Parquet file",
        ),
        ("hugging face", remove("data/val-00000-of-00001.parquet"), r"val\*.parquet is missing"),
        (
            "hugging face",
            empty_cell,
            r"train-00000-of-00001.parquet has a row whose depth is no array of numbers",
        ),
        (
            "cityscapes",
            save("label_7", np.full(SIZE, 9)),
            r"train/label_7/3.npy has label 9: expected 0 to 6",
        ),
        ("multifashion", truncate(FILES[0]), r"train-images-idx3-ubyte.gz cannot be read"),
    ],
)
def test_damage_is_one_line_that_names_the_file(layout, damage, message, tmp_path):
    name, make = LAYOUTS[layout]
    folder = make(tmp_path / "data")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run = Experiment.open("smoke", name, str(folder), str(tmp_path / "runs"), TINY).dense(0)
        execute(run, report=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def rewrite(name, change):
    """Put what `change` makes of it in the place of an array, a picture or the index."""

    def damage(folder):
        file = folder / name
        if file.suffix == ".npy":
            np.save(file, change(np.load(file)))
        elif file.suffix == ".png":
            Image.fromarray(change(np.asarray(Image.open(file)))).save(file)
        elif file.suffix == ".gz":
            file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes()))))
        else:
            file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return damage


def everywhere(pattern, change):
    def damage(folder):
        for file in folder.glob(pattern):
            rewrite(file.relative_to(folder), change)(folder)

    return damage


def rename(pattern, name):
    def damage(folder):
        for file in list(folder.glob(pattern)):
            file.rename(file.with_name(name.format(file.stem)))

    return damage


def copied(pattern, name):
    def damage(folder):
        for file in list(folder.glob(pattern)):
            file.with_name(name).write_bytes(file.read_bytes())

    return damage


def row(change):
    """Change the first sample's four names in AdaShare's index."""

    def changed(index):
        return index | {"train": [change(index["train"][0]), *index["train"][1:]]}

    return rewrite("nyu_v2_3task.json", changed)


def content(name, written):
    return lambda folder: (folder / name).write_bytes(written)


def header(shape):
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    text = repr(fields).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def table(change, name="train-00000-of-00001"):
    def damage(folder):
        file = folder / "data" / f"{name}.parquet"
        change(pd.read_parquet(file)).to_parquet(file)

    return damage


def ragged(frame):
    plane = [list(line) for line in frame.at[3, "depth"][0]]
    plane[4].append(plane[5].pop())
    frame.at[3, "depth"] = [plane]
    return frame


def millimetres(frame):
    return frame.assign(depth=[[[list(line * 1000) for line in d[0]]] for d in frame["depth"]])


def turned_cell(frame):
    frame.at[3, "segmentation"] = [list(line) for line in np.zeros(SIZE[::-1], int)]
    return frame


@pytest.mark.parametrize(
    "layout, damage, message",
    [
        # units and ranges
        (
            "mtan",
            rewrite("train/depth/3.npy", lambda d: d * 1000),
            r"depth/3.npy holds float32 from 0 to .*: expected depth in metres",
        ),
        (
            "mtan",
            rewrite("train/depth/3.npy", lambda d: (d * 1000).astype("u2")),
            r"3.npy holds uint16 .*: expected depth in metres",
        ),
        (
            "mtan",
            rewrite("train/depth/3.npy", lambda d: (d * 9).astype("u1")),
            r"3.npy holds uint8 from 0 to 4: expected depth in metres",
        ),
        (
            "mtan",
            rewrite("train/depth/3.npy", lambda d: -d * 9),
            r"3.npy holds float32 from -.*: expected depth in metres",
        ),
        (
            "mtan",
            rewrite("train/depth/3.npy", lambda d: d.astype("f8") * 1e300),
            r"3.npy holds float64 from 0 to .*e\+299: expected depth in metres",
        ),
        (
            "cityscapes",
            rewrite("train/depth/3.npy", lambda d: d * 256),
            r"3.npy holds float32 .*: expected inverse depth, floats up to 1",
        ),
        (
            "adashare",
            rewrite("depth/train3.npy", lambda d: d * 1000),
            r"depth/train3.npy holds .*: expected depth in metres",
        ),
        (
            "hugging face",
            table(millimetres),
            r"train-00000-of-00001.parquet holds .*: expected depth in metres",
        ),
        (
            "mtan",
            rewrite("train/normal/3.npy", lambda n: (n + 1) / 2),
            r"normal/3.npy holds float32 .*: expected normals, float unit",
        ),
        (
            "mtan",
            rewrite("train/normal/3.npy", lambda n: n * 127.5),
            r"normal/3.npy holds float32 .*: expected normals",
        ),
        (
            "mtan",
            rewrite("train/normal/3.npy", lambda n: ((n + 1) * 127).astype("u1")),
            r"normal/3.npy holds uint8 .*: expected normals",
        ),
        (
            "mtan",
            rewrite("train/label/3.npy", lambda n: n + 2),
            r"label/3.npy has label 1[34]: expected 0 to 12",
        ),
        (
            "mtan",
            rewrite("train/label/3.npy", lambda n: n * np.nan),
            r"label/3.npy has labels that are no whole numbers",
        ),
        (
            "adashare",
            rewrite("seg/train3.png", lambda n: n * 0 + 40),
            r"seg/train3.png has label 40: expected 0 to 39",
        ),
        ("mtan", rewrite("train/image/3.npy", lambda i: i * np.nan), r"image/3.npy: expected RGB"),
        (
            "mtan",
            everywhere("train/image/*.npy", lambda i: i.astype("u1")),
            r"train: no pixel of 12 samples has a valid image",
        ),
        # types
        (
            "mtan",
            save("depth", np.zeros(SIZE, [("a", "f4")])),
            r"depth/3.npy holds \[\('a', '<f4'\)\]: expected numbers",
        ),
        (
            "mtan",
            save("depth", np.ones(SIZE, complex)),
            r"depth/3.npy holds complex128: expected numbers",
        ),
        ("mtan", save("label", np.ones(SIZE, bool)), r"label/3.npy holds bool: expected numbers"),
        ("mtan", save("label", np.full(SIZE, "a")), r"label/3.npy holds <U1: expected numbers"),
        (
            "mtan",
            save("normal", np.zeros((*SIZE, 3), "M8[s]")),
            r"normal/3.npy holds datetime64\[s\]: expected numbers",
        ),
        (
            "mtan",
            save("depth", np.full(SIZE, None)),
            r"depth/3.npy cannot be read \(Array can't be memory-mapped: Python objects",
        ),
        (
            "mtan",
            content("train/depth/3.npy", b"\x80\x04"),
            r"depth/3.npy cannot be read .*: expected depth in a .npy file",
        ),
        (
            "mtan",
            content("train/depth/3.npy", header((2**40,))),
            r"depth/3.npy cannot be read \(mmap length is greater",
        ),
        (
            "mtan",
            content("train/depth/3.npy", b"\x93NUMPY\x02\x00\x60\xea\0\0" + b"(" * 60000),
            r"depth/3.npy cannot be read \(Header info length \(60000\) is large",
        ),
        (
            "mtan",
            everywhere("*/*/*.npy", lambda a: a[:0, :0]),
            r"image/0.npy has shape \(0, 0, 3\)",
        ),
        (
            "adashare",
            rewrite("normal/train3.png", lambda n: np.dstack([n, n[..., :1]])),
            r"normal/train3.png has shape \(24, 32, 4\)",
        ),
        (
            "adashare",
            rewrite("img/train3.png", lambda i: i[..., 0].astype("u2")),
            r"img/train3.png has shape \(24, 32\): expected an RGB",
        ),
        (
            "adashare",
            content("img/train3.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n"),
            r"img/train3.png cannot be read",
        ),
        # what is not there, or twice
        (
            "mtan",
            remove("train/image/3.npy"),
            r"train/image/3.npy is missing: expected image 0.npy to 11.npy",
        ),
        ("mtan", rename("train/*/3.npy", "99.npy"), r"train/image/3.npy is missing"),
        (
            "mtan",
            rename("train/*/*.npy", "{}.png"),
            r"train: the split is empty, expected image/0.npy",
        ),
        ("mtan", rename("val", "test"), r"val: the split is empty"),
        (
            "mtan",
            copied("train/*/3.npy", "5.npy"),
            r"train/image/5.npy is the same as .*train/image/3.npy",
        ),
        (
            "mtan",
            everywhere("val/depth/*.npy", lambda d: d * 0),
            r"val: no pixel of 4 samples has a valid depth",
        ),
        (
            "mtan",
            everywhere("train/label/*.npy", lambda n: n * 0 - 1),
            r"train: no pixel of 12 samples has a valid segmentation",
        ),
        (
            "mtan",
            everywhere("train/normal/*.npy", lambda n: n * 0),
            r"train: no pixel of 12 samples has a valid normals",
        ),
        (
            "hugging face",
            rename("data/train*", "train-00000-of-00002.parquet"),
            r"has 1 of 2 files train\*.parquet; missing: train-00001-of-00002",
        ),
        (
            "hugging face",
            copied("data/train*", "train-00000-of-00001-copy.parquet"),
            r"has 2 of 1 files train\*.parquet",
        ),
        (
            "hugging face",
            table(lambda f: pd.concat([f, f[5:6]])),
            r"row 12 of .*parquet is the same as row 5",
        ),
        (
            "hugging face",
            table(lambda f: f.drop(columns="depth")),
            r"train-00000-of-00001.parquet has no depth: expected image",
        ),
        ("hugging face", table(lambda f: f[:0]), r"train: the split is empty"),
        (
            "hugging face",
            table(ragged),
            r"parquet has a row whose depth is no array of numbers \(lists of 3 lengths\)",
        ),
        ("hugging face", table(turned_cell), r"parquet is 32 x 24: expected 24 x 32, as its image"),
        (
            "hugging face",
            table(lambda f: f.assign(segmentation="a")),
            r"parquet has a row whose segmentation is no array",
        ),
        # the index
        ("adashare", row(lambda names: [*names[:3], None]), r"nyu_v2_3task.json \(.*NoneType"),
        ("adashare", row(lambda names: [5, *names[1:]]), r"nyu_v2_3task.json \(.*int"),
        (
            "adashare",
            row(lambda names: ["", *names[1:]]),
            r"nyu_v2_3task.json \('' is no file's path under its folder\)",
        ),
        (
            "adashare",
            row(lambda names: ["a\nb\0", *names[1:]]),
            r"nyu_v2_3task.json \('a\\nb\\x00' is no file's path",
        ),
        (
            "adashare",
            row(lambda names: ["\ud800", *names[1:]]),
            r"nyu_v2_3task.json \('\\ud800' is no file's path",
        ),
        (
            "adashare",
            row(lambda names: ["x" * 5000, *names[1:]]),
            r"nyu_v2_3task.json \('x{99} is no file's path",
        ),
        (
            "adashare",
            row(lambda names: ["../a.png", *names[1:]]),
            r"nyu_v2_3task.json \('../a.png' is no file's path",
        ),
        (
            "adashare",
            row(lambda names: [r"img\..\..\a.png", *names[1:]]),
            r"nyu_v2_3task.json .* is no file's path",
        ),
        (
            "adashare",
            row(lambda names: ["/dev/zero", *names[1:]]),
            r"nyu_v2_3task.json \('/dev/zero' is no file's path",
        ),
        (
            "adashare",
            row(lambda names: ["img", *names[1:]]),
            r"data/img is missing or no regular file: nyu_v2_3task.json lists it",
        ),
        (
            "adashare",
            row(lambda names: ["img/train1.png", *names[1:]]),
            r"nyu_v2_3task.json \(img/train1.png is listed twice\)",
        ),
        (
            "adashare",
            content("nyu_v2_3task.json", b'{"train": [["\xff"]]}'),
            r"nyu_v2_3task.json is no whole JSON file",
        ),
        (
            "adashare",
            content("nyu_v2_3task.json", b"[" * 100_000),
            r"nyu_v2_3task.json is no whole JSON file \(damaged JSON",
        ),
        (
            "adashare",
            content("nyu_v2_3task.json", b'{"train": []}'),
            r"nyu_v2_3task.json .*: expected {train, test",
        ),
        # FashionMNIST's files
        (
            "multifashion",
            rewrite(FILES[1], lambda b: b[:-1]),
            r"train-labels-idx1-ubyte.gz holds no IDX of \(23,\) bytes",
        ),
        (
            "multifashion",
            rewrite(FILES[1], lambda b: b[:-1] + b"\x0a"),
            r"train-labels-idx1-ubyte.gz has 24 labels up to 10",
        ),
        (
            "multifashion",
            rewrite(FILES[2], lambda b: b[:16]),
            r"t10k-images-idx3-ubyte.gz holds no IDX of \(0, 28, 28\) bytes",
        ),
        (
            "multifashion",
            rewrite(FILES[0], lambda b: bytes(2**26)),
            r"train-images-idx3-ubyte.gz cannot be read \(it holds 50331649 ",
        ),
    ],
)
def test_data_that_is_not_what_its_layout_says_is_refused(layout, damage, message, tmp_path):
    name, make = LAYOUTS[layout]
    folder = make(tmp_path / "data")
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        load_dataset(name, str(folder))
    assert "\n" not in str(caught.value) and "pickle" not in str(caught.value)


def hidden_beside(folder):
    for file in list(folder.glob("*/*/*.npy")):
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")


def linked_folder(folder):
    (folder / "data").rename(folder.with_name("disk"))
    (folder / "data").symlink_to(folder.with_name("disk"))
    (folder / "loop").symlink_to(folder)


def windows_index(folder):
    file = folder / "nyu_v2_3task.json"
    file.write_bytes(file.read_text().replace("/", "\\\\").encode("utf-8-sig"))


@pytest.mark.parametrize(
    "layout, change",
    [
        ("mtan", hidden_beside),
        ("mtan", everywhere("*/label/*.npy", lambda n: n[..., None])),
        ("mtan", everywhere("*/label/*.npy", lambda n: n.astype("i1"))),
        ("mtan", everywhere("*/label/*.npy", lambda n: np.where(n < 0, 255, n))),
        ("mtan", everywhere("*/*/*.npy", np.asfortranarray)),
        ("mtan", everywhere("*/*/*.npy", lambda a: a.astype(a.dtype.newbyteorder(">")))),
        ("mtan", everywhere("*/depth/*.npy", lambda d: np.where(d == 0, np.inf, d))),
        ("mtan", everywhere("*/depth/*.npy", lambda d: np.where(d == 0, -1, d))),
        ("hugging face", linked_folder),
        ("adashare", windows_index),
    ],
)
def test_the_same_data_in_another_guise_is_read_as_it_is(layout, change, tmp_path):
    name, make = LAYOUTS[layout]
    plain = load_dataset(name, str(make(tmp_path / "plain")))
    changed = make(tmp_path / "changed")
    change(changed)
    same = load_dataset(name, str(changed))
    assert torch.equal(plain.train.image, same.train.image)
    for task, target in plain.train.targets.items():
        assert torch.equal(target, same.train.targets[task])


def test_real_depths_and_rooms_up_to_ten_metres_are_taken():
    depth = np.linspace(0.7, 10, 24 * 32, dtype=np.float32).reshape(SIZE)
    assert np.array_equal(_reading.checked_depth(depth, SIZE, Path("0.npy"))[..., 0], depth)


def test_a_normal_with_a_part_that_is_no_number_is_none():
    normals = np.tile(np.float32([0, -0.6, 0.8]), (*SIZE, 1))
    normals[3, :2] = [[np.nan, -0.6, 0.8], [0, 1, np.inf]]
    read = _reading.checked_normals(normals, SIZE, Path("0.npy"))
    assert not read[3, :2].any() and read.any(-1).sum() == 24 * 32 - 2


# --- where data lies, and what is remembered of it ---


def test_a_root_means_the_same_from_wherever_it_is_asked_for(tmp_path, monkeypatch):
    mtan(tmp_path / "home" / "nyu")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    whole = data_digest("nyuv2", str(tmp_path / "home" / "nyu"))
    assert data_digest("nyuv2", "~/nyu") == whole
    from_project = os.path.relpath(tmp_path / "home" / "nyu", PROJECT)
    for place in (PROJECT, PROJECT / "notebooks", tmp_path):
        monkeypatch.chdir(place)
        assert data_digest("nyuv2", from_project) == whole
    monkeypatch.chdir(tmp_path / "home")
    assert data_digest("nyuv2", "nyu") == whole, "the working folder comes first"


@pytest.mark.parametrize(
    "root, message",
    [
        (os.fsdecode(b"/non\xffutf8"), r"'/non\\udcffutf8' has a character that is no UTF-8"),
        ("/two\nlines", r"'/two\\nlines' has a character .* ends a line"),
        (
            "~nobody-of-that-name/nyu",
            "there is no ~nobody-of-that-name/nyu .*: write the whole path",
        ),
    ],
)
def test_a_root_that_cannot_be_is_one_line_that_names_it(root, message):
    with pytest.raises(ValueError, match=message) as caught:
        data_digest("nyuv2", root)
    assert str(caught.value).isprintable()


def test_the_cache_needs_a_home_only_where_nothing_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MTPRUNE_CACHE", "")
    assert _reading.cache_folder() == tmp_path / ".cache" / "mtprune"
    monkeypatch.delenv("MTPRUNE_CACHE")
    assert _reading.cache_folder() == tmp_path / ".cache" / "mtprune"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(ValueError, match="no folder for decoded data .*: set MTPRUNE_CACHE"):
        _reading.cache_folder()
    monkeypatch.setenv("MTPRUNE_CACHE", str(tmp_path / "named"))
    assert _reading.cache_folder() == tmp_path / "named"


def test_files_in_the_place_of_others_are_noticed_whatever_their_time(tmp_path):
    file = mtan(tmp_path / "data") / "train" / "label" / "3.npy"
    os.utime(file, (315532800, 315532800))
    before = load_dataset("nyuv2", str(tmp_path / "data"))
    np.save(file, np.full(SIZE, 7, np.float32))
    os.utime(file, (315532800, 315532800))
    after = load_dataset("nyuv2", str(tmp_path / "data"))
    assert after.digest != before.digest and (after.train.targets["segmentation"][3] == 7).all()


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"../../escaped", b"0123456789abcdeF", b"0123456789abcdef\n"]
)
def test_a_remembered_hash_that_is_none_is_computed_again(content, tmp_path):
    whole = load_dataset("nyuv2", str(mtan(tmp_path / "data")))
    for file in (tmp_path / "cache" / "digests").iterdir():
        file.write_bytes(content)
    again = load_dataset("nyuv2", str(tmp_path / "data"))
    assert again.digest == whole.digest and torch.equal(again.train.image, whole.train.image)


def zeros_at_the_end(train, test):
    size = train.stat().st_size
    os.truncate(train, size // 2)
    os.truncate(train, size)


@pytest.mark.parametrize(
    "damage",
    [
        zeros_at_the_end,
        lambda train, test: train.write_bytes(train.read_bytes()[:-1] + b"\x55"),
        lambda train, test: train.write_bytes(test.read_bytes()),
        lambda train, test: train.write_bytes(safetensors.torch.save({"x": torch.zeros(1)})),
    ],
)
def test_a_cache_that_is_not_what_was_written_is_decoded_again(damage, tmp_path):
    whole = load_dataset("nyuv2", str(mtan(tmp_path / "data")))
    test, train = sorted((tmp_path / "cache").glob("nyuv2-*.safetensors"))
    kept = whole.train.image.clone()
    for file in (train, test):  # not in place: they are mapped
        file.write_bytes(file.rename(file.with_suffix(".mapped")).read_bytes())
    damage(train, test)
    again = load_dataset("nyuv2", str(tmp_path / "data"))
    assert torch.equal(again.train.image, kept) and len(again.train.targets) == 3


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
def test_a_folder_without_the_data_set_says_what_was_expected(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="set root"):
        load_dataset(name, str(tmp_path / "nowhere"))
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="expected .*train/image/0.npy"):
        load_dataset(name, str(tmp_path / "other"))


def test_a_mistyped_root_is_not_downloaded_to(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere holds no FashionMNIST: set root"):
        load_dataset("multifashion", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_without_root_or_network_the_download_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"tanganke/nyuv2 cannot be downloaded \(.*\): set root to a folder with NYUv2",
    ):
        load_dataset("nyuv2")


def test_nothing_is_downloaded_where_that_is_forbidden(monkeypatch):
    monkeypatch.setenv("MTPRUNE_OFFLINE", "1")
    with pytest.raises(
        FileNotFoundError, match=r"what cannot be downloaded \(MTPRUNE_OFFLINE is set\): do without"
    ):
        _reading.downloaded(lambda: pytest.fail("it was fetched"), "what", "do without")


def test_data_sets_go_by_the_names_of_their_files():
    assert registry.names("datasets") == ("cityscapes", "multifashion", "nyuv2", "rooms")
    with pytest.raises(ValueError, match="unknown data set 'nyu'"):
        load_dataset("nyu")


# --- two real images ---


@pytest.fixture
def real(tmp_path):
    if not SAMPLES.exists():
        pytest.skip("the two real NYUv2 images are not here")
    rows = [
        [f"img/{i}.png", f"seg/{i}.png", f"normal_mask/{i}.png", f"depth/{i}.npy"]
        for i in ("0061", "1314")
    ]
    for row in rows:
        for name in row:
            (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "real" / name).symlink_to(SAMPLES / name)
    (tmp_path / "real" / "nyu_v2_3task.json").write_text(json.dumps({"train": rows, "test": rows}))
    return load_dataset("nyuv2", str(tmp_path / "real"))


def test_real_images_go_through_loader_augmentation_and_metrics(real):
    assert real.test.image.shape == (2, 3, 480, 640)
    valid = {
        "segmentation": (real.test.targets["segmentation"] != 255).float().mean().item(),
        "depth": (real.test.targets["depth"] > 0).float().mean().item(),
        "normals": (real.test.targets["normals"].float().square().sum(1) > 0).float().mean().item(),
    }
    assert valid["depth"] > 0.99 and 0.6 < valid["normals"] < 0.9 and valid["segmentation"] > 0.5, (
        valid
    )
    profile = get_profile("paper")
    images, targets = augment(
        real.test,
        real.tasks,
        profile.image_height,
        profile.crop,
        (1.0, 1.0),
        False,
        torch.Generator().manual_seed(0),
    )
    assert images.shape == (2, 3, 321, 321) and set(targets["segmentation"].unique().tolist()) <= {
        *range(40),
        255,
    }
    for _, targets in evaluation.evaluation_batches(real.test, real.tasks, profile):
        for name, task in real.tasks.items():
            meter = task.meter()
            output = truth = targets[name]
            if name == "segmentation":
                output = (
                    torch.nn.functional.one_hot(truth.long().clamp(max=39), 40)
                    .permute(0, 3, 1, 2)
                    .float()
                )
            meter.update(output, truth)
            perfect = numbers(meter.compute())
            assert perfect[task.shown] == pytest.approx(
                1.0 if name == "segmentation" else 0.0, abs=0.1
            )


def test_real_images_are_drawn_with_their_targets(real):
    figure = figures.show_samples(real.train, real, count=1)
    figure.canvas.draw()
    assert len([axis for axis in figure.axes if axis.images]) == 4


def test_real_normals_are_those_of_the_real_depth(real):
    """In the common axes, x right, y up, z to the camera, with the Kinect's focal length: they
    agree but for noise.
    """
    y, x = torch.meshgrid(torch.arange(480.0), torch.arange(640.0), indexing="ij")
    for depth, normals in zip(real.test.targets["depth"], real.test.targets["normals"].float()):
        smooth = torch.nn.functional.avg_pool2d(depth[None], 9, 1, 4)[0, 0]
        recomputed = normals_from(smooth, (x - 325.6) / 518.9, (y - 253.7) / 519.5)
        valid = normals.square().sum(0) > 0
        assert (normals * recomputed).sum(0)[valid].mean() > 0.9
        for wrong in ((-normals[0], normals[1], normals[2]), (normals[0], normals[2], normals[1])):
            assert (torch.stack(wrong) * recomputed).sum(0)[valid].mean() < 0.7
