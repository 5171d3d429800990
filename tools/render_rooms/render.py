"""Render `rooms`: procedurally furnished indoor rooms with exact labels for three tasks.

A seed decides everything: the room's size, furniture, materials, lights and camera.  The picture is
path-traced with Mitsuba 3; segmentation, depth and normals come from one ray through each pixel's
centre into the same scene, so they agree exactly.  World: x, y along the floor, z up, metres.
Camera: x right, y up, z towards the camera; depth is -z (planar, as in NYUv2), and a wall that
faces the camera has the normal (0, 0, 1).  Mirroring an image horizontally negates a normal's x.

    python -m tools.render_rooms.render --out DIR --workers 2
"""

import argparse
import colorsys
import io
import json
import multiprocessing
import os
import pathlib
import time

import numpy as np

from mtprune_utils.core.targets import IGNORE
from mtprune_utils.datasets.rooms import CLASSES, decode
from tools.render_rooms.furnish import Room, furnish

FIELD_OF_VIEW = 65.0  # degrees, horizontal
SPLITS = {"train": range(1024), "test": range(10000, 10256)}
QUALITY = 97  # of the JPEG
ENCODINGS = {
    "image": f"JPEG 4:4:4 quality {QUALITY}, sRGB",
    "segmentation": "8-bit PNG, class index, 255 = ignore",
    "depth": "16-bit PNG, millimetres along the camera's z axis, 0 = invalid",
    "normals": "8-bit RGB PNG, n = v / 127.5 - 1 (normalise after decoding), "
    "(255, 255, 255) = invalid",
}


def build_scene(mi, room):
    """The Mitsuba scene and the class index of each of its shapes, by `shape_index`."""

    def spectrum(value):
        if value.ndim == 3:
            return {"type": "bitmap", "bitmap": mi.Bitmap(value), "raw": True}
        return {"type": "rgb", "value": value.tolist()}

    def bsdf(reflectance, _, gloss):
        kind = (
            {"type": "diffuse", "reflectance": spectrum(reflectance)}
            if gloss is None
            else {
                "type": "principled",
                "base_color": spectrum(reflectance),
                "roughness": float(gloss) ** 0.5,
            }
        )
        return mi.load_dict({"type": "twosided", "bsdf": kind})

    bsdfs, scene = [bsdf(*m) for m in room.materials], {"type": "scene"}
    for (name, material), grids in room.surfaces.items():
        first = np.cumsum([0] + [len(p) for p, _, _ in grids])
        vertices, uv = np.concatenate([g[0] for g in grids]), np.concatenate([g[2] for g in grids])
        faces = np.concatenate([g[1] + n for g, n in zip(grids, first)])
        properties = mi.Properties()
        properties["bsdf"] = bsdfs[material]
        key = f"{name}_{material}"
        mesh = mi.Mesh(key, len(vertices), len(faces), has_vertex_texcoords=True, props=properties)
        values = mi.traverse(mesh)
        values["vertex_positions"] = vertices.ravel().astype("float32")
        values["vertex_texcoords"] = uv.ravel().astype("float32")
        values["faces"] = faces.ravel().astype("uint32")
        values.update()
        scene[key] = mesh
    for i, (name, shape, matrix, radiance, more) in enumerate(room.lights):
        to_world = mi.ScalarTransform4f(matrix)
        if shape == "spot":
            scene[f"{name}_light{i}"] = {
                "type": "spot",
                "to_world": to_world,
                "intensity": spectrum(radiance),
                **more,
            }
        else:
            scene[f"{name}_light{i}"] = {
                "type": shape,
                "to_world": to_world,
                "emitter": {"type": "area", "radiance": spectrum(radiance)},
            }
    scene = mi.load_dict(scene, optimize=False)
    return scene, np.array(
        [CLASSES.index(shape.id().split("_")[0]) for shape in scene.shapes()], "uint8"
    )


def draw_camera(room):
    """Position (3,) and rotation (3, 3): rows right, up and backward in world coordinates."""
    rng = room.rng
    position = np.array(
        [
            rng.uniform(0.25, room.width - 0.25),
            rng.uniform(0.25, room.length - 0.25),
            rng.uniform(0.5, min(2.2, room.height - 0.3)),
        ]
    )
    yaw = rng.uniform(0, 2 * np.pi)
    pitch = np.radians(np.clip(rng.normal(-6, 15), -35, 25))
    roll = np.radians(np.clip(rng.normal(0, 6), -12, 12))
    forward = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    level = np.array([np.sin(yaw), -np.cos(yaw), 0])
    right = np.cos(roll) * level + np.sin(roll) * np.cross(level, forward)
    return position, np.stack([right, np.cross(right, forward), -forward])


def sensor(mi, position, rotation, size, sampler, rfilter):
    matrix = np.eye(4)
    # In Mitsuba, x is left and z forward.
    matrix[:3, :4] = np.stack([-rotation[0], rotation[1], -rotation[2], position], 1)
    return mi.load_dict(
        {
            "type": "perspective",
            "fov": FIELD_OF_VIEW,
            "near_clip": 0.01,
            "to_world": mi.ScalarTransform4f(matrix),
            "sampler": sampler,
            "film": {
                "type": "hdrfilm",
                "width": size,
                "height": size,
                "pixel_format": "rgb",
                "component_format": "float32",
                "rfilter": {"type": rfilter},
            },
        }
    )


def trace_labels(mi, scene, classes, camera, size):
    """One ray through each pixel's centre.

    Returns segmentation (H, W), depth (H, W), normals and albedo (H, W, 3).
    """
    position, rotation = camera
    integrator = mi.load_dict(
        {"type": "aov", "aovs": "i:shape_index,p:position,n:geo_normal,a:albedo"}
    )
    centred = {"type": "stratified", "sample_count": 1, "jitter": False}
    out = np.array(
        mi.render(
            scene, sensor=sensor(mi, *camera, size, centred, "box"), integrator=integrator, spp=1
        )
    )
    index, hit = out[..., 0].round().astype(int), out[..., 0] > 0.5
    points = (out[..., 1:4] - position) @ rotation.T
    normals = out[..., 4:7] @ rotation.T
    normals *= np.where((normals * points).sum(-1, keepdims=True) > 0, -1, 1)
    segmentation = np.where(hit, classes[index - 1], IGNORE).astype("uint8")
    return (
        segmentation,
        np.where(hit, -points[..., 2], 0).astype("float32"),
        normals * hit[..., None],
        out[..., 7:10],
    )


def choose_camera(mi, scene, classes, room):
    """Of the first few acceptable views (labels at 24 x 24), the one that sees most classes."""
    best, found = (-1.0, None), 0
    for _ in range(80):
        camera = draw_camera(room)
        segmentation, depth, *_ = trace_labels(mi, scene, classes, camera, 24)
        if (segmentation == IGNORE).any():
            continue
        share = np.bincount(segmentation.ravel(), minlength=len(CLASSES)) / segmentation.size
        good = (
            depth.min() > 0.45
            and np.median(depth) > 1.2
            and share.max() < 0.6
            and (share > 0.01).sum() >= 4
        )
        found += good
        best = max(
            best,
            (
                10.0 * good
                + (share > 0.01).sum()
                + 0.5 * room.rng.random()
                - 3 * (depth.min() < 0.45),
                camera,
            ),
            key=lambda c: c[0],
        )
        if found == 4:
            break
    return best[1]


def remove_fireflies(radiance):
    """Scale down pixels of (H, W, 3) radiance that outshine all but four of the 25 around them."""
    level = radiance.mean(-1)
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(level, 2, mode="reflect"), (5, 5)
    ).reshape(*level.shape, 25)
    return radiance * np.minimum(1, np.sort(around, -1)[..., 20] / level.clip(1e-6))[..., None]


def denoise(radiance, depth, normals, albedo, reach=5):
    """Joint bilateral filter of (H, W, 3) radiance, guided by noise-free labels and albedo."""
    h, w = depth.shape
    axis = (np.arange(w) + 0.5) / w * 2 - 1
    tangent = np.tan(np.radians(FIELD_OF_VIEW / 2))
    points = np.stack(
        np.broadcast_arrays(axis * tangent * depth, -axis[:, None] * tangent * depth, -depth), -1
    )
    level = np.log(radiance.mean(-1) + 1e-3)

    def gather(level, reach, sigma_level):
        total, weights = np.zeros_like(radiance), np.zeros((h, w, 1))
        padded = [
            np.pad(a, [(reach, reach)] * 2 + [(0, 0)] * (a.ndim - 2), mode="edge")
            for a in (radiance, points, normals, albedo, level)
        ]
        for dy in range(2 * reach + 1):
            for dx in range(2 * reach + 1):
                c, p, n, a, b = [q[dy : dy + h, dx : dx + w] for q in padded]
                cost = ((dy - reach) ** 2 + (dx - reach) ** 2) / (reach + 1.0) ** 2
                cost = (
                    cost
                    + (np.einsum("ijk,ijk->ij", p - points, normals) / (0.02 * depth + 1e-3)) ** 2
                )
                cost += (
                    ((n - normals) ** 2).sum(-1) / 0.1**2
                    + ((a - albedo) ** 2).sum(-1) / 0.05**2
                    + ((b - level) / sigma_level) ** 2
                )
                weight = np.exp(-cost)[..., None]
                total += weight * c
                weights += weight
        return total / weights

    return gather(np.log(gather(level, 1, 3.0).mean(-1) + 1e-3), reach, 0.3)


def develop(radiance, segmentation, brightness):
    """Linear radiance (H, W, 3) to sRGB uint8.

    It is exposed for the 60th percentile of what does not shine.
    """
    shining = np.isin(segmentation, [CLASSES.index("window"), CLASSES.index("lamp")])
    level = radiance.mean(-1)[~shining] if not shining.all() else radiance.mean(-1)
    linear = 1 - np.exp(-radiance * brightness / max(np.percentile(level, 60), 1e-4))
    srgb = np.where(
        linear < 0.0031308, 12.92 * linear, 1.055 * linear.clip(1e-6) ** (1 / 2.4) - 0.055
    )
    return (srgb.clip(0, 1) * 255).round().astype("uint8")


def render(seed, size=128, samples=16):
    """One room as a dict of arrays; samples = 0 leaves the path-traced image out (labels only).

    image uint8 (H, W, 3) sRGB; segmentation uint8 (H, W), 255 = ignore; depth float32 (H, W),
    metres along the camera's z axis, 0 = invalid; normals float32 (H, W, 3), unit, x right, y up,
    z towards the camera.
    """
    import mitsuba as mi

    mi.set_variant("scalar_rgb")
    room = Room(seed)
    furnish(room)
    scene, classes = build_scene(mi, room)
    camera = choose_camera(mi, scene, classes, room)
    segmentation, depth, normals, albedo = trace_labels(mi, scene, classes, camera, size)
    sample = {"segmentation": segmentation, "depth": depth, "normals": normals.astype("float32")}
    if samples:
        sampler = {"type": "multijitter", "sample_count": samples, "seed": int(seed)}
        path = mi.load_dict({"type": "path", "max_depth": 5, "rr_depth": 4})
        view = sensor(mi, *camera, size, sampler, "gaussian")
        radiance = np.array(
            mi.render(scene, sensor=view, integrator=path, spp=samples, seed=int(seed)), float
        )
        radiance = denoise(remove_fireflies(radiance), depth.astype(float), normals, albedo)
        sample["image"] = develop(radiance, segmentation, room.u(0.35, 0.7))
    return sample


# ------------------------------------------------------------------------------- files and the card
def encode(sample):
    """A rendered sample as a dict of file contents (bytes); see ENCODINGS."""
    from PIL import Image

    def save(array, kind, **options):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, kind, **options)
        return buffer.getvalue()

    invalid = sample["depth"] == 0
    normals = ((sample["normals"] + 1) * 127.5).round().astype("uint8")
    normals[invalid] = 255
    return {
        "image": save(sample["image"], "JPEG", quality=QUALITY, subsampling=0, optimize=True),
        "segmentation": save(sample["segmentation"], "PNG", optimize=True),
        "depth": save((sample["depth"] * 1000).round().astype("uint16"), "PNG", optimize=True),
        "normals": save(normals, "PNG", optimize=True),
    }


def angle(a, b):
    """Degrees between unit vectors (..., 3)."""
    return np.degrees(2 * np.arcsin(np.linalg.norm(a - b, axis=-1).clip(0, 2) / 2))


def measure_losses(sample, decoded):
    """What the encoding lost: image in 8-bit steps and dB, depth in metres, normals in degrees."""
    difference = sample["image"].astype(float) - decoded["image"]
    depth = np.abs(sample["depth"] - decoded["depth"])
    turned = angle(sample["normals"], decoded["normals"])
    return {
        "image_mean_abs": np.abs(difference).mean(),
        "image_psnr": 10 * np.log10(255**2 / (difference**2).mean()),
        "depth_mean": depth.mean(),
        "depth_max": depth.max(),
        "normals_mean": turned.mean(),
        "normals_max": turned.max(),
    }


def use_one_thread():
    """For the pool's processes, so that they do not compete."""
    import drjit

    drjit.set_thread_count(1)


def render_to_file(job):
    """Render one seed into SCRATCH/SEED.parquet (one row and its losses), unless it is there."""
    seed, scratch = job
    target = scratch / f"{seed}.parquet"
    if target.exists():
        return
    import pyarrow
    import pyarrow.parquet

    start = time.process_time()
    sample = render(seed)
    files = encode(sample)
    losses = {**measure_losses(sample, decode(files)), "seconds": time.process_time() - start}
    row = {
        "seed": seed,
        **{name: {"bytes": content, "path": None} for name, content in files.items()},
        "losses": {name: float(value) for name, value in losses.items()},
    }
    file = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [
            ("seed", pyarrow.int64()),
            *((name, file) for name in ENCODINGS),
            ("losses", pyarrow.struct([(name, pyarrow.float64()) for name in losses])),
        ]
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row], schema), f"{target}.part")
    os.replace(f"{target}.part", target)


def assemble(out, scratch):
    """Join the rendered rows into OUT/train.parquet and OUT/test.parquet; returns the losses."""
    import pyarrow
    import pyarrow.parquet

    features = {
        "seed": {"dtype": "int64", "_type": "Value"},
        **{name: {"_type": "Image"} for name in ENCODINGS},
    }
    metadata = {
        "classes": json.dumps(CLASSES),
        "encodings": json.dumps(ENCODINGS),
        "field_of_view_degrees": str(FIELD_OF_VIEW),
        "normals_axes": "x right, y up, z towards the camera",
        "huggingface": json.dumps({"info": {"features": features}}),
    }
    losses = []
    for split, seeds in SPLITS.items():
        done = [
            scratch / f"{seed}.parquet" for seed in seeds if (scratch / f"{seed}.parquet").exists()
        ]
        table = pyarrow.concat_tables(
            [pyarrow.parquet.read_table(path) for path in done]
        ).combine_chunks()
        losses += table["losses"].to_pylist()
        pyarrow.parquet.write_table(
            table.drop_columns("losses").replace_schema_metadata(metadata),
            out / f"{split}.parquet",
            compression="none",
            use_dictionary=False,
            row_group_size=128,
        )
    return losses


def read_split(path):
    """Decoded labels and images of one Parquet file, each stacked (N, H, W, ...)."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path, columns=list(ENCODINGS)).to_pylist()
    samples = [decode({name: row[name]["bytes"] for name in ENCODINGS}) for row in rows]
    return {name: np.stack([sample[name] for sample in samples]) for name in ENCODINGS}


def describe(train, test):
    """Class shares, and how a predictor does that knows nothing but a pixel's position.

    Returns lines of Markdown.
    """
    lines = ["| class | train pixels % | test pixels % | train images % |", "|---|---|---|---|"]
    counts = np.stack([(train["segmentation"] == c).mean((1, 2)) for c in range(len(CLASSES))], 1)
    for c, name in enumerate(CLASSES):
        lines.append(
            f"| {c} {name} | {100 * counts[:, c].mean():.1f} "
            f"| {100 * (test['segmentation'] == c).mean():.1f} "
            f"| {100 * (counts[:, c] > 0).mean():.0f} |"
        )
    mode = np.stack([(train["segmentation"] == c).sum(0) for c in range(len(CLASSES))]).argmax(0)
    direction = train["normals"].mean(0)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    error = np.abs(test["depth"] - np.median(train["depth"], 0))
    depth = np.percentile(train["depth"], (0, 5, 50, 95, 100))
    invalid = sum((split["depth"] == 0).sum() for split in (train, test))
    lines += [
        "",
        "Depth, metres (minimum, 5 %, median, 95 %, maximum): "
        + ", ".join(f"{d:.2f}" for d in depth)
        + ".",
        (
            "Classes in an image (over 1 % of its pixels): "
            f"mean {(counts > 0.01).sum(1).mean():.1f}, "
            f"minimum {(counts > 0.01).sum(1).min()}. Invalid pixels: {invalid}."
        ),
        "",
        (
            "Position prior "
            "(per pixel the training mode, median and mean direction; scored on test): "
            f"segmentation accuracy {100 * (test['segmentation'] == mode).mean():.1f} %, "
            f"depth error {error.mean():.2f} m (relative {(error / test['depth']).mean():.2f}), "
            f"normals mean angle {angle(test['normals'], direction).mean():.1f} degrees."
        ),
    ]
    return lines


def write_card(out, losses):
    """The statistics between the markers of OUT/README.md, and OUT/samples.png (32 test rooms)."""
    from PIL import Image

    train, test = [read_split(out / f"{split}.parquet") for split in SPLITS]
    mean = {name: np.mean([row[name] for row in losses]) for name in losses[0]}
    worst = {name: np.max([row[name] for row in losses]) for name in losses[0]}
    lines = [
        f"{len(train['image'])} training and {len(test['image'])} test images of "
        f"{test['image'].shape[2]} x {test['image'].shape[1]} pixels; "
        + ", ".join(
            f"`{split}.parquet` {(out / f'{split}.parquet').stat().st_size / 2**20:.1f} MiB"
            for split in SPLITS
        )
        + ".",
        "",
        *describe(train, test),
        "",
        (
            f"Encoding loss: image {mean['image_mean_abs']:.2f} of 255 mean absolute "
            f"({mean['image_psnr']:.1f} dB PSNR); "
            f"depth {1000 * mean['depth_mean']:.2f} mm mean, "
            f"{1000 * worst['depth_max']:.2f} mm at most; "
            f"normals {mean['normals_mean']:.2f} degrees mean, {worst['normals_max']:.2f} at most. "
            f"Rendering took {mean['seconds']:.1f} CPU-seconds an image."
        ),
    ]
    card = out / "README.md"
    if card.exists():
        begin, end = "<!-- statistics: begin -->", "<!-- statistics: end -->"
        before, after = card.read_text().split(begin)[0], card.read_text().split(end)[1]
        card.write_text("\n".join([before + begin, *lines, end]) + after)
    print("\n".join(lines))
    palette = np.array(
        [
            colorsys.hsv_to_rgb(c * 0.382 % 1, 0.45 + 0.5 * (c % 2), 0.95 - 0.2 * (c % 3))
            for c in range(len(CLASSES))
        ]
    )
    cells = [
        np.concatenate(
            [
                test["image"][i],
                (255 * palette[test["segmentation"][i]]).astype("uint8"),
                np.repeat(
                    (255 * (1 - test["depth"][i, ..., None] / 8).clip(0, 1)).astype("uint8"), 3, 2
                ),
                ((test["normals"][i] + 1) * 127.5).astype("uint8"),
            ],
            1,
        )
        for i in range(min(32, len(test["image"]) // 2 * 2))
    ]
    Image.fromarray(
        np.concatenate([np.concatenate(cells[i : i + 2], 1) for i in range(0, len(cells), 2)])
    ).save(out / "samples.png", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument(
        "--scratch", type=pathlib.Path, help="one file per finished image (default: OUT/scratch)"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--assemble-only", action="store_true", help="write the files from what is rendered so far"
    )
    arguments = parser.parse_args()
    out, scratch = arguments.out, arguments.scratch or arguments.out / "scratch"
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    if not arguments.assemble_only:
        ordered = sorted(
            (i / len(seeds), seed) for seeds in SPLITS.values() for i, seed in enumerate(seeds)
        )
        start = time.time()
        with multiprocessing.get_context("spawn").Pool(arguments.workers, use_one_thread) as pool:
            for n, _ in enumerate(
                pool.imap(render_to_file, [(seed, scratch) for _, seed in ordered]), 1
            ):
                if n % 20 == 0:
                    print(f"{n} of {len(ordered)} rooms, {time.time() - start:.0f} s", flush=True)
    write_card(out, assemble(out, scratch))


if __name__ == "__main__":
    main()
