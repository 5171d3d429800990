"""Augmentation keeps image and targets aligned; rooms is what its card says."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conftest import TASKS, random_split
from mtprune_utils.core.data import IMAGENET_MEAN, IMAGENET_SD, RandomBatches, Split, augment
from mtprune_utils.core.evaluation import evaluate
from mtprune_utils.datasets import load_dataset
from mtprune_utils.datasets.rooms import FOLDER
from mtprune_utils.files import PROJECT, read_json
from mtprune_utils.study.profiles import get_profile


def ramp(size: int = 64) -> Split:
    """An image whose red is its x and whose green is its y; depth and class say the same, normals
    point along x.
    """
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    image = torch.stack([x, y, 0 * x]).to(torch.uint8).repeat(8, 1, 1, 1)
    normals = torch.zeros(8, 3, size, size).half()
    normals[:, 0] = 1
    return Split(
        image, {"segmentation": image[:, 0], "depth": image[:, 1:2].float() + 1, "normals": normals}
    )


def test_augmentation_moves_image_and_targets_together():
    images, targets = augment(
        ramp(), TASKS, 64, 32, (0.75, 1.5), False, torch.Generator().manual_seed(0)
    )
    red, green = ((images[:, c] * IMAGENET_SD[c] + IMAGENET_MEAN[c]) * 255 for c in (0, 1))
    assert (
        red - targets["segmentation"]
    ).abs().max() <= 1  # nearest against bilinear: at most half a pixel each way
    assert (green - (targets["depth"][:, 0] - 1)).abs().max() <= 1
    mirrored = red[:, 0, 0] > red[:, 0, -1]
    assert mirrored.any() and not mirrored.all()
    assert torch.equal(targets["normals"][:, 0].mean((1, 2)) < 0, mirrored)


def test_depth_follows_the_scale_only_if_asked():
    draws = [
        augment(ramp(), TASKS, 64, 32, (0.75, 1.5), follows, torch.Generator().manual_seed(0))
        for follows in (False, True)
    ]
    red = draws[0][0][:, 0] * IMAGENET_SD[0] * 255
    scale = 1 / (red[:, 0, 1:] - red[:, 0, :-1]).abs().mean(
        1
    )  # one source pixel per target pixel at scale 1
    ratio = draws[0][1]["depth"] / draws[1][1]["depth"]
    assert torch.allclose(ratio[:, 0, 0, 0], scale, rtol=0.02)
    assert ratio.std((1, 2, 3)).max() < 1e-5


def test_crops_lie_anywhere_and_keep_the_aspect_of_wide_images():
    y, x = torch.meshgrid(torch.arange(48), torch.arange(96), indexing="ij")
    image = torch.stack([x, y, 0 * x]).to(torch.uint8).repeat(32, 1, 1, 1)
    wide = Split(
        image,
        {
            "depth": x.float().repeat(32, 1, 1, 1) + 1,
            "segmentation": y.to(torch.uint8).repeat(32, 1, 1),
        },
    )
    _, targets = augment(wide, TASKS, 48, 32, (1.0, 1.0), False, torch.Generator().manual_seed(0))
    spans = targets["depth"].amax((1, 2, 3)) - targets["depth"].amin((1, 2, 3))
    assert (spans - 31).abs().max() <= 1, "at scale 1, 32 target pixels cover 32 source columns"
    left, top = targets["depth"].amin((1, 2, 3)), targets["segmentation"].amin((1, 2))
    assert left.min() < 10 and left.max() > 54 and top.min() <= 2 and top.max() >= 14


def test_what_falls_outside_the_image_is_invalid():
    _, targets = augment(
        ramp(32), TASKS, 32, 32, (0.5, 0.5), False, torch.Generator().manual_seed(0)
    )
    outside = targets["segmentation"] == 255
    assert 0.7 < outside.float().mean() < 0.8
    assert torch.equal(outside, targets["depth"][:, 0] == 0) and torch.equal(
        outside, targets["normals"][:, 0] == 0
    )


def test_normals_agree_with_depth_after_scale_crop_and_mirror():
    """A curved surface seen by a pinhole camera: normals recomputed from the transformed depth are
    the transformed normals.

    An enlarged picture was taken with a focal length times s, and crop and mirror move the
    principal point; the image's colours are its coordinates, so each sample tells how it was
    transformed.
    """
    size, focal, centre = 200, 220.0, 99.5
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    depth = 3 + 0.004 * (x - 70) + 0.003 * y + 0.3 * torch.sin(x / 40) * torch.cos(y / 50)
    normals = normals_from(depth, (x - centre) / focal, (y - centre) / focal)
    batch = Split(
        torch.stack([x, y, 0 * x]).to(torch.uint8).repeat(8, 1, 1, 1),
        {"depth": depth.repeat(8, 1, 1, 1), "normals": normals.repeat(8, 1, 1, 1)},
    )
    images, targets = augment(
        batch, TASKS, size, 96, (1.0, 2.0), False, torch.Generator().manual_seed(0)
    )
    red, green = ((images[:, c] * IMAGENET_SD[c] + IMAGENET_MEAN[c]) * 255 for c in (0, 1))
    mirrored, scales = set(), set()
    for i in range(8):
        step_x, step_y = (
            (red[i, 40, 80] - red[i, 40, 16]) / 64,
            (green[i, 80, 40] - green[i, 16, 40]) / 64,
        )
        scale, sign = 1 / step_y, step_x.sign()
        assert step_x.abs() == pytest.approx(step_y.item(), rel=1e-3)
        u, v = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="xy")
        u0, v0 = 16 + (centre - red[i, 40, 16]) / step_x, 16 + (centre - green[i, 16, 40]) / step_y
        recomputed = normals_from(
            targets["depth"][i, 0], (u - u0) / (focal * scale), (v - v0) / (focal * scale)
        )
        # Nearest-neighbour sampling makes single differences jump: compare means over patches.
        means = [
            torch.nn.functional.avg_pool2d(n[None, :, 8:88, 8:88], 16)[0]
            for n in (recomputed, targets["normals"][i])
        ]
        cosine = torch.nn.functional.cosine_similarity(*means, dim=0)
        assert cosine.min() > 0.99
        turned = means[1] * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
        assert torch.nn.functional.cosine_similarity(means[0], turned, dim=0).min() < 0.95, (
            "the sign of x is seen"
        )
        mirrored.add(sign.item())
        scales.add(round(scale.item(), 2))
    assert mirrored == {-1.0, 1.0} and len(scales) > 4


def normals_from(depth, ray_x, ray_y):
    """Unit normals (3, H, W), x right, y up, z to the camera, from depth along the optical axis and
    each pixel's ray.
    """
    points = torch.stack([depth * ray_x, -depth * ray_y, -depth])
    along_x, along_y = (torch.gradient(points, dim=dim)[0] for dim in (2, 1))
    return torch.nn.functional.normalize(torch.cross(along_y, along_x, dim=0), dim=0)


@pytest.mark.parametrize("size, stride", [(32, 8), (33, 8), (45, 4)])
def test_targets_are_sampled_where_the_loss_looks(size, stride):
    def drawn(stride):
        return augment(
            ramp(),
            TASKS,
            64,
            size,
            (0.75, 1.5),
            True,
            torch.Generator().manual_seed(0),
            stride=stride,
        )

    (images, whole), (same, sparse) = drawn(1), drawn(stride)
    assert torch.equal(images, same)
    for name, target in sparse.items():
        assert target.shape[-2:] == (size // stride, size // stride)
        assert torch.equal(target, TASKS[name].target.resize(whole[name], (size // stride,) * 2))


def test_batches_cover_an_epoch_without_repetition_and_are_seeded():
    split = random_split(10)
    batches = RandomBatches(split, 5, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(batches).image for _ in range(2)])
    assert len(epoch.flatten(1).unique(dim=0)) == 10
    again = RandomBatches(split, 5, torch.Generator().manual_seed(0))
    assert torch.equal(next(again).image, epoch[:5])
    resumed = RandomBatches(split, 5, torch.Generator())
    resumed.restore(again.state())
    assert torch.equal(next(resumed).image, epoch[5:]), "an epoch goes on where it was left"
    with pytest.raises(ValueError, match="a batch of 11 needs"):
        RandomBatches(split, 11, torch.Generator())


def test_validation_is_held_out_of_train():
    rooms = load_dataset("rooms", train_images=64, test_images=16)
    assert (len(rooms.train), len(rooms.validation), len(rooms.test)) == (56, 8, 16)
    assert (
        torch.equal(rooms.calibration.image, rooms.train.image) and not rooms.calibration.targets
    ), "of training images alone"
    seen = torch.cat([rooms.train.image, rooms.validation.image, rooms.test.image]).flatten(1)
    assert len(seen.unique(dim=0)) == 80


def test_rooms_is_complete_valid_and_small():
    rooms = load_dataset("rooms")
    classes = len(rooms.tasks["segmentation"].classes)
    assert len(rooms.train) + len(rooms.validation) == 1024 and len(rooms.test) == 256
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 40 * 2**20
    for split in (rooms.train, rooms.validation, rooms.test):
        assert split.image.shape[1:] == (3, 128, 128)
        labels, depth, normals = (
            split.targets[task] for task in ("segmentation", "depth", "normals")
        )
        assert labels.max() < classes
        assert depth.min() > 0.2 and depth.max() < 12
        assert (normals.float().norm(dim=1) - 1).abs().max() < 2e-3
    shares = torch.bincount(
        rooms.train.targets["segmentation"].flatten().long(), minlength=classes
    ).float()
    assert classes >= 10 and (shares > 0).all() and shares.max() / shares.sum() < 0.4


def test_rooms_normals_agree_with_its_depth():
    """On smooth surfaces, the normal recomputed from neighbouring depths is the stored one."""
    rooms = load_dataset("rooms", test_images=32)
    depth, stored = rooms.test.targets["depth"][:, 0], rooms.test.targets["normals"].float()
    size = depth.shape[-1]
    focal = size / 2 / np.tan(np.radians(65 / 2))
    y, x = torch.meshgrid(
        torch.arange(size) + 0.5 - size / 2, torch.arange(size) + 0.5 - size / 2, indexing="ij"
    )
    points = torch.stack([x / focal * depth, -y / focal * depth, -depth], 1)
    right, down = (
        points[:, :, :-1, 1:] - points[:, :, :-1, :-1],
        points[:, :, 1:, :-1] - points[:, :, :-1, :-1],
    )
    recomputed = torch.nn.functional.normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    angle = (recomputed * stored[:, :, :-1, :-1]).sum(1).clamp(-1, 1).acos().rad2deg()
    assert angle.median() < 3


def test_a_missing_or_broken_file_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.parquet, which is not there"):
        load_dataset("rooms", root=str(tmp_path))
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes()[:1000])
    with pytest.raises(ValueError, match="train.parquet is not a readable Parquet file"):
        load_dataset("rooms", root=str(tmp_path))
    with pytest.raises(ValueError, match="unknown data set 'room': did you mean 'rooms'"):
        load_dataset("room")
    with pytest.raises(ValueError, match="choose one of .*rooms"):
        load_dataset("xyz")
    with pytest.raises(ValueError, match="only 1024"):
        load_dataset("rooms", train_images=5000)


def png(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


def cells(name, change):
    """Put `change` of its bytes into the last row of a column."""

    def damage(table):
        column = table[name].to_pylist()
        column[-1] = change(column[-1])
        return table.set_column(table.schema.get_field_index(name), name, pa.array(column))

    return damage


def picture(name, array):
    return cells(name, lambda cell: cell | {"bytes": png(array)})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda table: table.drop_columns(["depth"]), "has no depth: expected image, segmentation"),
        (
            lambda table: table.set_column(
                table.schema.get_field_index("image"), "image", pa.array(range(12))
            ),
            "a row that cannot be read",
        ),
        (lambda table: table.slice(0, 0), "the split is empty"),
        (lambda table: pa.concat_tables([table, table[:1]]), "row 12 of .* is the same as row 0"),
        (cells("normals", lambda cell: None), "a row that cannot be read"),
        (cells("image", lambda cell: cell | {"bytes": b"xx"}), "a row that cannot be read"),
        (
            cells("image", lambda cell: cell | {"bytes": b"%!PS-Adobe-3.0"}),
            "a row that cannot be read",
        ),
        (picture("image", np.zeros((64, 64, 3), np.uint8)), "is 128 x 128: expected 64 x 64"),
        (
            picture("segmentation", np.full((128, 128), 200, np.uint8)),
            "has label 200: expected 0 to 15",
        ),
        (
            picture("depth", np.full((128, 128), 200, np.uint8)),
            "depth is uint8, expected millimetres",
        ),
        (
            picture("depth", np.full((128, 128), 60000, np.uint16)),
            "holds float32 from 60 to 60: expected",
        ),
    ],
)
def test_rooms_that_are_not_as_they_were_rendered_are_refused(damage, message, tmp_path):
    table = pq.read_table(FOLDER / "test.parquet")[:12]
    for name, content in {"train": damage(table), "test": table}.items():
        pq.write_table(content, tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=f"train.parquet.*{message}|{message}.*train.parquet"):
        load_dataset("rooms", root=str(tmp_path))


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"", b'{"a": 1'])
def test_damaged_json_is_one_line_that_names_the_file(text, tmp_path):
    (tmp_path / "some.json").write_bytes(text)
    with pytest.raises(ValueError, match="some.json is no whole JSON file") as caught:
        read_json(tmp_path / "some.json")
    assert str(caught.value).isprintable()
    (tmp_path / "some.json").write_bytes('{"ü": 1}'.encode("utf-8-sig"))
    assert read_json(tmp_path / "some.json") == {"ü": 1}


@pytest.mark.parametrize("task, nothing", [("segmentation", 255), ("depth", 0), ("normals", 0)])
def test_a_split_in_which_a_task_is_valid_nowhere_is_not_measured(task, nothing, model):
    split, profile = random_split(4), replace(get_profile("smoke"), image_height=32, crop=32)
    assert evaluate(model, split, TASKS, profile)
    split.targets[task][1:] = nothing
    assert all(np.isfinite(value) for value in evaluate(model, split, TASKS, profile).values())
    split.targets[task][:] = nothing
    with pytest.raises(ValueError, match=f"no pixel of 4 images has a valid {task}: take more"):
        evaluate(model, split, TASKS, profile)
    with pytest.raises(ValueError, match="no pixel of 0 images"):
        evaluate(model, split[:0], TASKS, profile)


@pytest.mark.parametrize("split, row", [("train", 5), ("test", 100)])
def test_the_generator_renders_the_shipped_images_again(split, row, monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "tools" / "render_rooms")
    from render import render

    seed = pq.read_table(FOLDER / f"{split}.parquet", columns=["seed"])["seed"][row].as_py()
    again = render(seed)
    rooms = load_dataset("rooms")
    shipped = rooms.test[row] if split == "test" else rooms.train[row]
    assert (shipped.targets["segmentation"].numpy() == again["segmentation"]).mean() >= 0.999
    difference = np.abs(
        shipped.image.permute(1, 2, 0).numpy().astype(int) - again["image"].astype(int)
    )
    assert difference.mean() < 2
