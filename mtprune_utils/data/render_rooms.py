"""Render `rooms`: procedurally furnished indoor rooms with exact labels for four tasks.

A seed decides everything: the room's size, furniture, materials, lights and camera.  The picture is
path-traced with Mitsuba 3; segmentation, depth and normals come from one ray through each pixel's
centre into the same scene, so they agree exactly.  World: x, y along the floor, z up, metres.
Camera: x right, y up, z towards the camera; depth is -z (planar, as in NYUv2), and a wall that faces
the camera has the normal (0, 0, 1).  Mirroring an image horizontally negates a normal's x.

    python -m mtprune_utils.data.render_rooms --out DIR --workers 2
"""

import argparse
import colorsys
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import time

import numpy as np

CLASSES = (
    "wall",
    "floor",
    "ceiling",
    "window",
    "door",
    "bed",
    "sofa",
    "chair",
    "table",
    "cabinet",
    "lamp",
    "picture",
    "curtain",
    "rug",
    "plant",
    "clutter",
)
IGNORE = 255
FIELD_OF_VIEW = 65.0  # degrees, horizontal
SPLITS = {"train": range(1024), "test": range(10000, 10256)}
QUALITY = 97  # of the JPEG
ENCODINGS = {
    "image": f"JPEG 4:4:4 quality {QUALITY}, sRGB",
    "segmentation": "8-bit PNG, class index, 255 = ignore",
    "depth": "16-bit PNG, millimetres along the camera's z axis, 0 = invalid",
    "normals": "8-bit RGB PNG, n = v / 127.5 - 1 (normalise after decoding), (255, 255, 255) = invalid",
}


# ---------------------------------------------------------------------------------------- textures
def smooth_noise(rng, rows, columns, size=96):
    """(size, size) noise in 0..1 from a periodic grid of rows x columns random values."""
    from PIL import Image

    grid = np.pad(rng.random((rows, columns)), ((0, 1), (0, 1)), mode="wrap").astype("float32")
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.BICUBIC)).clip(0, 1)


def texture(rng, kind, a, b, size=96):
    """(size, size, 3) linear reflectance of a tileable pattern in the colours a and b."""
    y, x = np.mgrid[:size, :size] / size
    grain = smooth_noise(rng, int(rng.integers(8, 24)), 2)
    if kind == "wood":
        mask = 0.5 * grain
    elif kind == "planks":
        row = (y * 6).astype(int)
        shade = rng.uniform(0, 0.8, (6, 2))[row, ((x + row * 0.37) % 1 * 2).astype(int)]
        mask = 0.7 * shade + 0.3 * grain + 0.6 * (y * 6 % 1 < 0.06)
    elif kind == "tiles":
        mask = np.where(
            np.minimum(x * 3 % 1, y * 3 % 1) < 0.05,
            1.0,
            0.3 * rng.random((3, 3))[(y * 3).astype(int), (x * 3).astype(int)],
        )
    elif kind == "checker":
        mask = ((x * 4).astype(int) + (y * 4).astype(int)) % 2
    elif kind == "stripes":
        mask = x * rng.integers(3, 7) % 1 < rng.uniform(0.2, 0.6)
    elif kind == "plaid":
        mask = 0.5 * (x * 4 % 1 < 0.4) + 0.5 * (y * 4 % 1 < 0.4)
    elif kind == "dots":
        mask = np.hypot(x * 5 % 1 - 0.5, y * 5 % 1 - 0.5) < 0.25
    elif kind == "fabric":
        mask = 0.5 * rng.random((size, size)) + 0.4 * smooth_noise(rng, 12, 12)
    elif kind == "border":  # a rug: the whole texture is one rug
        edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
        mask = (edge * rng.uniform(6, 30) % 1 < rng.uniform(0.3, 0.7)) * (edge < rng.uniform(0.1, 0.5))
    elif kind == "picture":
        mask = (smooth_noise(rng, 4, 4) > 0.5) * 0.5 + (
            np.hypot(x - rng.random(), y - rng.random()) < rng.uniform(0.1, 0.4)
        ) * 0.5
    mask = np.asarray(mask, float).clip(0, 1)[..., None]
    image = (1 - mask) * a + mask * b
    if kind == "picture":
        third = colour(rng, (0, 1), (0.3, 1), (0.1, 1))
        image = np.where((y > rng.uniform(0.3, 0.9))[..., None], 0.5 * image + 0.5 * third, image)
    return image.astype("float32")


def colour(rng, hue, saturation, value):
    """Linear RGB reflectance drawn from ranges in HSV."""
    hsv = [rng.uniform(*bounds) for bounds in (hue, saturation, value)]
    return 0.85 * np.array(colorsys.hsv_to_rgb(hsv[0] % 1, *hsv[1:])) ** 2.2


# ------------------------------------------------------------------------------- geometry and place
def rigid(x=0.0, y=0.0, z=0.0, turn=0.0):
    """4x4 matrix: turn about the vertical (radians), then shift (metres)."""
    c, s = np.cos(turn), np.sin(turn)
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


class Room:
    """Surfaces, materials and lights of one room, and the places that are taken."""

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        self.width, self.length, self.height = rng.uniform(2.8, 6.5), rng.uniform(2.8, 6.5), rng.uniform(2.4, 3.2)
        self.surfaces, self.materials, self.lights = {}, [], []
        self.frame = np.eye(4)
        sizes = self.width, self.length
        self.wall_lengths = [sizes[k % 2] for k in range(4)]  # wall frame: x along it, y into the room
        corners = [(0, 0), (self.width, 0), (self.width, self.length), (0, self.length)]
        self.walls = [rigid(*corners[k], 0, k * np.pi / 2) for k in range(4)]
        self.on_wall, self.openings = [[] for _ in range(4)], [[] for _ in range(4)]
        self.on_floor, self.tops = [], []  # taken (x0, y0, x1, y1); free tops (frame, width, depth)
        self.day = rng.random() < 0.65
        self.wood_colour = colour(rng, (0.04, 0.11), (0.2, 0.75), (0.3, 0.95))
        self.accent = rng.random()

    def u(self, low, high):
        return self.rng.uniform(low, high)

    def chance(self, probability):
        return self.rng.random() < probability

    @contextlib.contextmanager
    def at(self, frame):
        """Build in a local frame (4x4, relative to the present one)."""
        outer, self.frame = self.frame, self.frame @ frame
        yield
        self.frame = outer

    # materials: each call adds one and returns its index
    def material(self, reflectance, metres=1.0, gloss=None):
        """A colour (3,) or a texture (H, W, 3) that repeats every so many metres; gloss: microfacet width."""
        self.materials.append((np.asarray(reflectance, "float32"), metres, gloss))
        return len(self.materials) - 1

    def paint(self, saturation=(0, 1), value=(0.2, 1), gloss=None):
        return self.material(colour(self.rng, (0, 1), saturation, value), gloss=gloss)

    def wood(self):
        if self.chance(0.2):
            return self.paint((0, 0.2), (0.75, 1), 0.2)
        a = self.wood_colour if self.chance(0.7) else colour(self.rng, (0.03, 0.12), (0.2, 0.8), (0.2, 0.9))
        return self.material(
            texture(self.rng, "wood", a, a * self.u(0.25, 0.7)),
            self.u(0.4, 0.9),
            self.u(0.1, 0.3) if self.chance(0.4) else None,
        )

    def cloth(self):
        hue = (self.accent - 0.08, self.accent + 0.08) if self.chance(0.5) else (0, 1)
        a = colour(self.rng, hue, (0, 0.8), (0.25, 0.95))
        b = colour(self.rng, (0, 1), (0, 0.5), (0.3, 1))
        kind = self.rng.choice(["plain", "fabric", "stripes", "plaid", "dots"], p=[0.3, 0.3, 0.16, 0.12, 0.12])
        if kind == "plain":
            return self.material(a)
        return self.material(texture(self.rng, kind, a, a * 0.7 if kind == "fabric" else b), self.u(0.4, 0.9))

    def metal(self):
        return self.material(np.full(3, self.u(0.05, 0.6)), gloss=0.2)

    # surfaces
    def surface(self, name, material, points):
        """A grid of points (m, n, 3) in the local frame; texture coordinates are arc lengths in metres."""
        points = np.asarray(points, float)
        (m, n), steps = points.shape[:2], [np.linalg.norm(np.diff(points, axis=k), axis=2).mean(1 - k) for k in (0, 1)]
        v, u = [np.concatenate([[0], np.cumsum(s)]) for s in steps]
        corner = (np.arange(m - 1)[:, None] * n + np.arange(n - 1)).ravel()
        faces = np.concatenate(
            [np.stack([corner, corner + 1, corner + n + 1], 1), np.stack([corner, corner + n + 1, corner + n], 1)]
        )
        world = points.reshape(-1, 3) @ self.frame[:3, :3].T + self.frame[:3, 3]
        uv = np.stack(np.meshgrid(u, v), -1).reshape(-1, 2) / self.materials[material][1]
        self.surfaces.setdefault((name, material), []).append((world, faces, uv))

    def box(self, name, material, x, y, z):
        """An axis-aligned box; x, y and z are (low, high)."""
        corners = np.stack(np.meshgrid(x, y, z, indexing="ij"), -1)
        for axis in range(3):
            for side in range(2):
                self.surface(name, material, corners.take(side, axis))

    def lathe(self, name, material, profile, base=(0, 0, 0), axis=(0, 0, 1), segments=16):
        """A profile [(radius, height), ...] turned around an axis (3,) through base (3,)."""
        axis = np.asarray(axis, float) / np.linalg.norm(axis)
        side = np.cross(axis, (1, 0, 0) if abs(axis[0]) < 0.6 else (0, 1, 0))
        side /= np.linalg.norm(side)
        angle = np.linspace(0, 2 * np.pi, segments + 1)[:, None]
        ring = np.cos(angle) * side + np.sin(angle) * np.cross(axis, side)
        self.surface(name, material, [np.asarray(base) + radius * ring + height * axis for radius, height in profile])

    def rod(self, name, material, start, end, radius):
        axis = np.subtract(end, start)
        height = np.linalg.norm(axis)
        self.lathe(name, material, [(0, 0), (radius, 0), (radius, height), (0, height)], start, axis, 10)

    def cushion(self, name, material, x, y, z, roundness=0.4):
        """A rounded box (superellipsoid) between (low, high) bounds."""

        def power(a):
            return np.sign(a) * np.abs(a) ** roundness

        latitude, longitude = np.linspace(-np.pi / 2, np.pi / 2, 11)[:, None], np.linspace(0, 2 * np.pi, 25)
        unit = np.stack(
            [
                power(np.cos(latitude)) * power(np.cos(longitude)),
                power(np.cos(latitude)) * power(np.sin(longitude)),
                power(np.sin(latitude)) + 0 * longitude,
            ],
            -1,
        )
        bounds = np.array([x, y, z], float)
        self.surface(name, material, bounds.mean(1) + unit * np.ptp(bounds, axis=1) / 2)

    def light(self, name, shape, matrix, radiance, **more):
        """An emitting Mitsuba shape in the local frame; radiance is RGB (3,) or a texture (H, W, 3)."""
        self.lights.append((name, shape, self.frame @ matrix, np.asarray(radiance, "float32"), more))

    # places
    def reserve(self, frame, width, depth, x=0.0, y=0.0):
        """Take the floor under a (width, depth) rectangle whose back edge is centred on the frame."""
        xy = np.array([(a, b, 0, 1) for a in (x - width / 2, x + width / 2) for b in (y + 0.0, y + depth)]) @ frame.T
        x0, y0, x1, y1 = *xy[:, :2].min(0), *xy[:, :2].max(0)
        if min(x0, y0) < -0.01 or x1 > self.width + 0.01 or y1 > self.length + 0.01:
            return False
        if any(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in self.on_floor):
            return False
        self.on_floor.append((x0 + 0.02, y0 + 0.02, x1 - 0.02, y1 - 0.02))
        return True

    def against_wall(self, width, depth, height, z=0.0, gap=0.0):
        """Frame of a free place at a wall, taken from now on, or None."""
        for _ in range(25):
            k = self.rng.integers(4)
            if self.wall_lengths[k] < width + 0.1:
                continue
            start = self.u(0.03, self.wall_lengths[k] - width - 0.03)
            if any(
                start - gap < b and a < start + width + gap and z < d and c < z + height
                for a, b, c, d in self.on_wall[k]
            ):
                continue
            frame = self.walls[k] @ rigid(start + width / 2, 0.02 if depth else 0.0)
            if depth and not self.reserve(frame, width, depth):
                continue
            self.on_wall[k].append((start, start + width, z, z + height))
            return frame
        return None

    def on_open_floor(self, width, depth):
        """Frame of a free place away from the walls, turned at random, or None."""
        for _ in range(25):
            turn = self.rng.integers(4) * np.pi / 2 + self.rng.normal(0, 0.08)
            frame = rigid(self.u(0, self.width), self.u(0, self.length), 0, turn)
            if self.reserve(frame, width + 0.1, depth + 0.1, 0, -depth / 2 - 0.05):
                return frame
        return None


# ------------------------------------------------ furniture (back edge at y = 0, facing +y, z from 0)
def add_shell(r):
    """Floor, ceiling, walls with window openings, door, windows and curtains."""
    w, d, h, u = r.width, r.length, r.height, r.u
    kind = r.rng.choice(["planks", "tiles", "checker", "fabric"], p=[0.5, 0.2, 0.1, 0.2])
    a = r.wood_colour if kind == "planks" else colour(r.rng, (0, 1), (0, 0.4), (0.4, 0.95))
    floor = r.material(
        texture(r.rng, kind, a, a * u(0.3, 0.7)),
        u(0.8, 1.6),
        u(0.15, 0.4) if kind != "fabric" and r.chance(0.4) else None,
    )
    r.surface("floor", floor, [[(0, 0, 0), (w, 0, 0)], [(0, d, 0), (w, d, 0)]])
    ceiling = r.paint((0, 0.08), (0.8, 1))
    r.surface("ceiling", ceiling, [[(0, 0, h), (w, 0, h)], [(0, d, h), (w, d, h)]])
    if r.chance(0.25):
        beam = r.wood() if r.chance(0.6) else ceiling
        for x in np.arange(u(0.3, 0.8), w, u(0.6, 1.3)):
            r.box("ceiling", beam, (x - 0.07, x + 0.07), (0, d), (h - u(0.08, 0.15), h))
    k = r.rng.integers(4)
    door_width = u(0.75, 0.95)
    start = (
        r.wall_lengths[k] - door_width - u(0.08, 0.5)
        if r.chance(0.5)
        else u(0.08, r.wall_lengths[k] - door_width - 0.08)
    )
    r.on_wall[k].append((start - 0.08, start + door_width + 0.08, 0, 2.15))
    with r.at(r.walls[k] @ rigid(start + door_width / 2)):
        r.reserve(r.frame, door_width, 0.7)
        add_door(r, door_width, u(1.95, 2.1))
    curtain, opaque = r.cloth(), r.chance(0.75)
    for k in r.rng.permutation(4)[: r.rng.choice([1, 2, 3], p=[0.4, 0.45, 0.15])]:
        width, low, high = u(0.8, min(2.4, r.wall_lengths[k] - 1.0)), u(0.1, 1.0), h - u(0.2, 0.6)
        side = u(0.2, 0.4) if opaque else 0.05
        start = u(0.1 + side, max(r.wall_lengths[k] - width - side - 0.1, 0.2 + side))
        taken = (start - side - 0.08, start + width + side + 0.08, 0 if opaque else low, h)
        if taken[1] > r.wall_lengths[k] or any(taken[0] < b and q < taken[1] for q, b, *_ in r.on_wall[k]):
            continue
        r.on_wall[k].append(taken)
        r.openings[k].append((start, start + width, low, high))
        with r.at(r.walls[k] @ rigid(start + width / 2)):
            r.reserve(r.frame, width + 2 * side, 0.15)
            add_window(r, width, low, high)
            if opaque:
                add_curtains(r, curtain, width, side, u(0.02, 0.1) if r.chance(0.6) else low - 0.1, high + 0.08)
    paint = r.paint((0, 0.35), (0.65, 1))
    paper = colour(r.rng, (0, 1), (0, 0.4), (0.5, 0.95))
    second = (
        r.material(
            texture(r.rng, r.rng.choice(["stripes", "dots", "fabric", "tiles"]), paper, paper * u(0.6, 1.1)),
            u(0.5, 1.2),
        )
        if r.chance(0.4)
        else r.paint((0.1, 0.7), (0.3, 0.9))
    )
    accent, skirting = r.rng.integers(8), r.paint((0, 0.3), (0.2, 1))
    for k in range(4):
        material, length = second if k == accent else paint, r.wall_lengths[k]
        with r.at(r.walls[k]):
            xs, zs = [
                sorted({0.0, end, *(o[i + j] for o in r.openings[k] for j in (0, 1))})
                for i, end in ((0, length), (2, h))
            ]
            for x0, x1 in itertools.pairwise(xs):
                for z0, z1 in itertools.pairwise(zs):
                    if not any(a <= x0 < b and c <= z0 < e for a, b, c, e in r.openings[k]):
                        r.surface("wall", material, [[(x0, 0, z0), (x1, 0, z0)], [(x0, 0, z1), (x1, 0, z1)]])
            r.box("wall", skirting, (0, length), (0, 0.012), (0, 0.08))


def add_door(r, width, height):
    leaf, frame = (
        (r.wood(), r.wood()) if r.chance(0.7) else (r.paint(value=(0.3, 1), gloss=0.2), r.paint((0, 0.1), (0.8, 1)))
    )
    x = width / 2
    r.box("door", leaf, (-x, x), (0, 0.03), (0, height))
    for side in (-x - 0.07, x):
        r.box("door", frame, (side, side + 0.07), (0, 0.06), (0, height))
    r.box("door", frame, (-x - 0.07, x + 0.07), (0, 0.06), (height, height + 0.07))
    rows, columns = r.rng.integers(1, 5), r.rng.integers(1, 3)
    for z in np.linspace(0.12, height - 0.05, rows + 1)[:-1]:
        for c in np.linspace(-x + 0.1, x - 0.02, columns + 1)[:-1]:
            r.box(
                "door",
                leaf,
                (c, c + (width - 0.12) / columns - 0.08),
                (0.03, 0.045),
                (z, z + (height - 0.17) / rows - 0.1),
            )
    r.lathe(
        "door",
        r.metal(),
        [(0.01, 0), (0.01, 0.04), (0.03, 0.05), (0.03, 0.07), (0, 0.08)],
        (x - 0.07, 0.03, 1.0),
        (0, 1, 0),
    )


def add_window(r, width, low, high):
    """A pane that shines, 12 cm behind the wall, with frame, bars and sill."""
    x, frame, wall = width / 2, r.paint((0, 0.3), (0.6, 1)), r.paint((0, 0.05), (0.8, 1))
    depth = -0.12
    for a in (-x, x):
        r.surface("wall", wall, [[(a, 0, low), (a, depth, low)], [(a, 0, high), (a, depth, high)]])
    r.surface("wall", wall, [[(-x, 0, high), (x, 0, high)], [(-x, depth, high), (x, depth, high)]])
    r.box("window", frame, (-x - 0.04, x + 0.04), (depth, 0.1), (low - 0.03, low))
    for z in (low, high - 0.06):
        r.box("window", frame, (-x, x), (depth, depth + 0.05), (z, z + 0.06))
    bars = r.rng.integers(1, 4)
    for a in np.linspace(-x, x - 0.05, bars + 1):
        r.box("window", frame, (a, a + 0.05), (depth, depth + 0.05), (low, high))
    if r.chance(0.5):
        z = low + (high - low) * r.u(0.5, 0.75)
        r.box("window", frame, (-x, x), (depth, depth + 0.04), (z, z + 0.04))
    # what is seen outside: sky above, blurred green and grey below
    rows = np.linspace(0, 1, 64)[:, None]  # upwards: a texture's first row is at v = 0
    sky = colour(r.rng, (0.55, 0.62), (0.02, 0.4), (0.85, 1)) * (0.8 + 0.4 * rows[..., None])
    ground = colour(r.rng, (0.05, 0.4), (0.05, 0.6), (0.3, 0.7)) * (0.4 + smooth_noise(r.rng, 8, 10, 64)[..., None])
    horizon = r.u(-0.2, 0.5) + 0.15 * smooth_noise(r.rng, 2, 6, 64)
    view = np.where((rows > horizon)[..., None], sky, ground) * (r.u(2, 5) if r.day else r.u(0.03, 0.15))
    pane = np.array([[-x, 0, 0, 0], [0, 0, 1, depth], [0, (high - low) / 2, 0, (low + high) / 2], [0, 0, 0, 1]])
    r.light("window", "rectangle", pane, view)
    if r.day and r.chance(0.45):  # sunshine: a beam from the pane down into the room
        aim = np.array([r.u(-0.8, 0.8), 1.0, -r.u(0.35, 0.9)])
        aim /= np.linalg.norm(aim)
        left = np.cross((0, 0, 1), aim) / np.linalg.norm(aim[:2])
        beam = np.eye(4)
        beam[:3, :4] = np.stack([left, np.cross(aim, left), aim, (0, depth + 0.06, high - 0.3)], 1)
        r.light("sun", "spot", beam, np.array([1, 0.85, 0.6]) * r.u(10, 35), cutoff_angle=r.u(14, 26), beam_width=13.0)


def add_curtains(r, cloth, width, side, low, high):
    s = np.linspace(0, 1, 40)
    for sign in (-1, 1):
        reach = width / 2 + side - r.u(0.4, 0.9) * (side + width * 0.25)
        waves, phase = r.u(4, 8), r.u(0, 6)
        x = sign * (reach + (width / 2 + side - reach) * s)
        y = 0.08 + 0.035 * np.sin(2 * np.pi * waves * s + phase)
        pinch = [
            (z, 1 - 0.35 * r.chance(0.3) * np.sin(np.pi * t))
            for z, t in zip(np.linspace(low, high, 6), np.linspace(0, 1, 6))
        ]
        edge = sign * (width / 2 + side)
        r.surface("curtain", cloth, [np.stack([edge + (x - edge) * p, y, 0 * x + z], 1) for z, p in pinch])
    r.rod(
        "curtain",
        r.metal(),
        (-width / 2 - side - 0.06, 0.08, high + 0.02),
        (width / 2 + side + 0.06, 0.08, high + 0.02),
        0.015,
    )


def add_bed(r, w, d):
    u, wood, x, h = r.u, r.wood(), w / 2, r.u(0.25, 0.4)
    r.box("bed", wood, (-x, x), (0.03, d), (0.1 if r.chance(0.5) else 0, h))
    for a in (-x, x - 0.07):
        for b in (0.03, d - 0.07):
            r.box("bed", wood, (a, a + 0.07), (b, b + 0.07), (0, h))
    head, foot = u(0.6, 1.2), u(0.0, 0.7)
    if r.chance(0.5):
        r.box("bed", wood, (-x - 0.03, x + 0.03), (0, 0.06), (0, head))
    else:
        r.cushion("bed", r.cloth(), (-x - 0.03, x + 0.03), (0, 0.12), (0.1, head), 0.2)
    if foot > h:
        r.box("bed", wood, (-x, x), (d - 0.05, d), (0, foot))
    top, sheet = h + u(0.14, 0.25), r.paint((0, 0.3), (0.7, 1))
    r.cushion("bed", sheet, (-x + 0.02, x - 0.02), (0.06, d - 0.05), (h - 0.02, top), 0.15)
    blanket = u(0.35, 0.6)
    r.cushion("bed", r.cloth(), (-x - 0.02, x + 0.02), (blanket, d - 0.03), (h - u(0, 0.15), top + 0.05), 0.15)
    n, cover = (1 if w < 1.3 else 2), r.cloth() if r.chance(0.5) else r.paint((0, 0.3), (0.6, 1))
    for i in range(n):
        c = -x + w * (i + 0.5) / n
        r.cushion("bed", cover, (c - 0.33, c + 0.33), (0.12, 0.52), (top - 0.03, top + 0.15), 0.5)


def add_sofa(r, w, d):
    u, cloth, x = r.u, r.cloth(), w / 2
    seat, back, arm, thick = u(0.36, 0.46), u(0.68, 0.95), u(0.1, 0.2), u(0.16, 0.26)
    leg, arm_height, e = u(0, 0.15), u(0.5, 0.68), r.rng.choice([0.1, 0.25, 0.4])
    r.box("sofa", cloth, (-x + 0.02, x - 0.02), (0.02, d - 0.03), (leg, seat - 0.12))
    r.cushion("sofa", cloth, (-x, x), (0, thick), (leg, back), e)
    for a in (-x, x - arm):
        r.cushion("sofa", cloth, (a, a + arm), (0.02, d), (leg, arm_height), e)
    n, second = max(1, round(w / 0.75)), r.cloth() if r.chance(0.3) else cloth
    step = (w - 2 * arm) / n
    for i in range(n):
        a = -x + arm + i * step
        r.cushion("sofa", second, (a, a + step), (thick * 0.8, d - 0.01), (seat - 0.14, seat), 0.25)
        r.cushion(
            "sofa", second, (a, a + step), (thick * 0.6, thick + 0.14), (seat - 0.02, back + u(-0.05, 0.05)), 0.35
        )
        if r.chance(0.4):
            r.cushion("sofa", r.cloth(), (a + 0.05, a + 0.45), (thick + 0.12, thick + 0.26), (seat, seat + 0.36), 0.45)
    for a in (-x + 0.05, x - 0.1):
        for b in (0.05, d - 0.1):
            r.box("sofa", r.wood(), (a, a + 0.05), (b, b + 0.05), (0, leg + 0.02))


def add_chair(r, style):
    """A chair centred on the frame that faces +y; style = (kind, two materials, seat and back heights)."""
    kind, hard, soft, seat, back, w = style
    x = w / 2
    if kind == "swivel":
        for a in np.arange(5) * 2 * np.pi / 5:
            r.rod("chair", hard, (0, 0, 0.08), (0.28 * np.cos(a), 0.28 * np.sin(a), 0.04), 0.025)
        r.rod("chair", hard, (0, 0, 0.05), (0, 0, seat - 0.05), 0.03)
    elif kind == "stool":
        for a in np.arange(4) * np.pi / 2 + 0.8:
            r.rod(
                "chair",
                hard,
                (0.3 * np.cos(a), 0.3 * np.sin(a), 0),
                (0.1 * np.cos(a), 0.1 * np.sin(a), seat - 0.03),
                0.018,
            )
    else:
        for a in (-x, x - 0.04):
            for b in (-x, x - 0.04):
                r.box(
                    "chair", hard, (a, a + 0.04), (b, b + 0.04), (0, back if b < 0 and kind != "shell" else seat - 0.03)
                )
    if kind == "ladder":
        r.box("chair", hard, (-x, x), (-x, x), (seat - 0.04, seat))
        for z in np.linspace(seat + 0.12, back - 0.08, 3):
            r.box("chair", hard, (-x, x), (-x + 0.01, -x + 0.03), (z, z + 0.06))
    else:
        r.cushion("chair", soft, (-x, x), (-x, x), (seat - 0.07, seat + 0.02), 0.3)
        r.cushion("chair", soft, (-x, x), (-x - 0.01, -x + 0.06), (seat + 0.1 if kind == "swivel" else seat, back), 0.3)
    if kind == "swivel":
        r.rod("chair", hard, (0, -x, seat - 0.05), (0, -x - 0.01, seat + 0.2), 0.025)


def chair_style(r):
    """Materials and measures that the chairs around one table share."""
    return (
        r.rng.choice(["ladder", "padded", "shell", "swivel", "stool"]),
        r.wood() if r.chance(0.7) else r.metal(),
        r.cloth(),
        r.u(0.42, 0.5),
        r.u(0.75, 1.05),
        r.u(0.38, 0.48),
    )


def add_table(r, w, d, h):
    """A table or desk of several constructions; its top is offered to clutter."""
    u, x, top, leg = r.u, w / 2, r.wood(), r.wood() if r.chance(0.6) else r.metal()
    kind, t = r.rng.choice(["legs", "pedestal", "panels", "trestle"], p=[0.5, 0.15, 0.2, 0.15]), u(0.03, 0.06)
    if kind == "pedestal" and w < 1.7 * d:
        a, c = min(w, d) / 2, (0, d / 2, 0)
        r.lathe("table", top, [(0, h - t), (a, h - t), (a, h), (0, h)], c, segments=28)
        r.lathe("table", leg, [(0, 0), (a * 0.6, 0), (a * 0.5, 0.04), (0.05, 0.1), (0.05, h - t)], c)
        w = d = 1.4 * a
        r.tops.append((r.frame @ rigid(0, c[1] - d / 2, h), w, d))
        return
    r.box("table", top, (-x, x), (0, d), (h - t, h))
    thick = u(0.04, 0.08)
    if kind == "panels":
        for a in (-x, x - 0.04):
            r.box("table", top, (a, a + 0.04), (0.02, d - 0.02), (0, h - t))
        r.box("table", top, (-x, x), (0.03, 0.05), (h * 0.4, h - t))
    elif kind == "trestle":
        for a in (-x + 0.15, x - 0.15):
            r.rod("table", leg, (a, 0.05, 0), (a, d / 2, h - t), thick / 2)
            r.rod("table", leg, (a, d - 0.05, 0), (a, d / 2, h - t), thick / 2)
        r.rod("table", leg, (-x + 0.15, d / 2, h * 0.6), (x - 0.15, d / 2, h * 0.6), thick / 2)
    else:
        for a in (-x + 0.02, x - thick - 0.02):
            for b in (0.02, d - thick - 0.02):
                r.box("table", leg, (a, a + thick), (b, b + thick), (0, h - t))
        r.box("table", leg, (-x + 0.03, x - 0.03), (0.03, d - 0.03), (h - t - u(0.02, 0.1), h - t))
    r.tops.append((r.frame @ rigid(0, 0, h), w, d))


def add_cabinet(r, w, d, h):
    """Drawers, doors or open shelves with books, in columns."""
    u, wood, x, back, foot = r.u, r.wood(), w / 2, 0.015, r.u(0.0, 0.12)
    front = wood if r.chance(0.6) else r.paint(value=(0.3, 1), gloss=0.3 if r.chance(0.3) else None)
    kind, t = r.rng.choice(["shelves", "doors", "drawers", "mixed"], p=[0.45, 0.25, 0.15, 0.15]), 0.025
    n, rows = max(1, round(w / u(0.45, 0.9))), max(1, round((h - foot) / u(0.28, 0.42)))
    r.box("cabinet", wood, (-x, x), (0, d), (h - t, h))
    r.box("cabinet", wood, (-x, x), (0, back), (foot, h))
    for a in np.linspace(-x, x - t, n + 1):
        r.box("cabinet", wood, (a, a + t), (0, d), (0, h))
    step, rise, books = w / n, (h - foot - t) / rows, [r.paint(value=(0.1, 0.95)) for _ in range(6)]
    for i in range(n):
        a, b = -x + i * step + t, -x + (i + 1) * step
        part = r.rng.choice(["shelves", "doors", "drawers"]) if kind == "mixed" else kind
        if part == "doors":
            r.box("cabinet", front, (a, b - 0.005), (d, d + 0.02), (foot, h - 0.01))
            r.rod("cabinet", wood, (b - 0.06, d + 0.04, h * 0.5 - 0.08), (b - 0.06, d + 0.04, h * 0.5 + 0.08), 0.012)
        for j in range(rows):
            z = foot + j * rise
            if part == "drawers":
                r.box("cabinet", front, (a, b - 0.005), (d, d + 0.02), (z + 0.01, z + rise - 0.01))
                r.box(
                    "cabinet",
                    wood,
                    ((a + b) / 2 - 0.06, (a + b) / 2 + 0.06),
                    (d + 0.02, d + 0.04),
                    (z + rise * 0.6, z + rise * 0.6 + 0.02),
                )
            elif part == "shelves":
                r.box("cabinet", wood, (a, b), (0, d - 0.01), (z, z + t))
                if r.chance(0.75):
                    add_books(r, books, a, b, d, z + t, rise - t)
                elif r.chance(0.5):
                    with r.at(rigid((a + b) / 2, 0, z + t)):
                        add_item(r, min(b - a, 0.4), d - 0.05, rise - t - 0.02)
    r.tops.append((r.frame @ rigid(0, 0, h), w, d))


def add_books(r, materials, a, b, d, z, room):
    end = b if r.chance(0.5) else r.u(a, b)
    while a < end - 0.05:
        t = r.u(0.02, 0.055)
        r.box(
            "clutter",
            materials[r.rng.integers(len(materials))],
            (a, a + t - 0.003),
            (0.03, d * r.u(0.65, 0.95)),
            (z, z + room * r.u(0.55, 0.92)),
        )
        a += t


def add_item(r, w, d, h):
    """One small thing that stands in (w, d, h) metres: books, box, bowl, vase, bottle, ball, screen."""
    u = r.u
    size, paint = min(w, d), lambda: r.paint(value=(0.15, 1), gloss=0.15 if r.chance(0.4) else None)
    kind = r.rng.choice(["books", "box", "bowl", "vase", "ball", "screen"])
    with r.at(rigid(0, d / 2, 0, r.rng.normal(0, 0.15))):
        if kind == "screen" and w > 0.45 and h > 0.45:
            b, z = min(w, 1.2) / 2, min(h, u(0.4, 0.8))
            r.box("clutter", r.material([0.02] * 3, gloss=0.1), (-b, b), (-0.03, 0.03), (0.08, z))
            r.box("clutter", r.metal(), (-b / 3, b / 3), (-0.1, 0.1), (0, 0.02))
            r.rod("clutter", r.metal(), (0, 0, 0), (0, 0, 0.15), 0.03)
        elif kind == "books":
            z = 0.0
            while z < min(h - 0.05, u(0.05, 0.3)):
                t, a, b = u(0.02, 0.05), size * u(0.25, 0.45), size * u(0.3, 0.48)
                r.box("clutter", paint(), (-a, a), (-b, b), (z, z + t - 0.002))
                z += t
        elif kind == "bowl":
            a, z = size * u(0.25, 0.45), min(h, u(0.06, 0.15))
            r.lathe(
                "clutter",
                paint(),
                [(0, 0.01), (a * 0.5, 0), (a * 0.85, z * 0.5), (a, z), (a * 0.9, z), (a * 0.5, z * 0.3), (0, z * 0.2)],
            )
        elif kind == "vase":
            z = min(h, u(0.18, 0.5))
            r.lathe(
                "clutter", paint(), [(0, 0)] + [(min(size, z) * u(0.1, 0.35), z * t) for t in (0, 0.3, 0.5, 0.8, 1)]
            )
        elif kind == "ball":
            a = min(size, h) * u(0.2, 0.45)
            r.lathe("clutter", paint(), [(a * np.sin(t), a - a * np.cos(t)) for t in np.linspace(0, np.pi, 11)])
        else:
            a, b, z = w * u(0.25, 0.45), d * u(0.25, 0.45), min(h, size * u(0.3, 1.0))
            r.box("clutter", paint(), (-a, a), (-b, b), (0, z))
            r.box("clutter", paint(), (-a - 0.005, a + 0.005), (-b - 0.005, b + 0.005), (z * 0.8, z))


def add_plant(r, height):
    u, pot, z = r.u, r.u(0.12, 0.22), height * r.u(0.18, 0.32)
    pot = min(pot, height * 0.3)
    r.lathe(
        "plant",
        r.paint((0, 0.6), (0.2, 0.9)),
        [(0, 0), (pot * 0.7, 0), (pot, z), (pot * 0.9, z), (pot * 0.85, z * 0.9), (0, z * 0.9)],
    )
    leaf = [r.material(colour(r.rng, (0.22, 0.4), (0.4, 0.9), (0.25, 0.75))) for _ in range(2)]
    trunk, t = u(0, 0.4) * (height - z), np.linspace(0, 1, 5)[:, None]
    r.rod("plant", r.wood(), (0, 0, z * 0.8), (0, 0, z + trunk + 0.02), 0.02)
    long, broad = (height - z - trunk), u(0.15, 0.35)
    for _ in range(r.rng.integers(18, 45)):
        turn, lift, size = u(0, 2 * np.pi), u(0.15, 1.3), long * u(0.6, 1.0)
        out, across = np.array([np.cos(turn), np.sin(turn), 0]), np.array([-np.sin(turn), np.cos(turn), 0])
        spine = (0, 0, z + trunk * u(0.5, 1)) + size * (
            t * np.cos(lift) * out * 0.8 + (t * np.sin(lift) - 0.35 * t**2) * (0, 0, 1)
        )
        half = size * broad * np.sin(np.pi * (0.08 + 0.9 * t)) * across / 2
        r.surface(
            "plant",
            leaf[r.rng.integers(2)],
            np.stack([spine - half, spine, spine + half], 1) + [[[0, 0, 0], [0, 0, -0.01], [0, 0, 0]]],
        )


def add_lamp(r, height, radius):
    """A lamp that stands on, or hangs (height < 0) from, the frame's origin; lit or not."""
    u, shade = r.u, radius * r.u(1.2, 2.2)
    tip, lit = abs(height) - shade, r.chance(0.35 if r.day else 0.75)
    sign = np.sign(height)
    r.rod("lamp", r.metal(), (0, 0, 0), (0, 0, sign * tip), 0.015)
    if height > 0:
        r.lathe(
            "lamp",
            r.wood(),
            [(0, 0), (radius * 0.7, 0), (radius * 0.7, 0.02), (radius * u(0.1, 0.5), tip * 0.3), (0.015, tip * 0.7)],
        )
    low, high = sorted((sign * (tip - 0.02), sign * (tip - 0.02 + shade)))
    if r.chance(0.4):
        centre = rigid(0, 0, (low + high) / 2)
        if lit:
            r.light("lamp", "sphere", centre @ np.diag([radius, radius, radius, 1]), warm(r) * u(2, 6))
        else:
            r.lathe(
                "lamp",
                r.paint((0, 0.3), (0.6, 1)),
                [(radius * np.sin(t), (low + high) / 2 - radius * np.cos(t)) for t in np.linspace(0, np.pi, 11)],
            )
    elif lit:
        radiance = warm(r) * u(2, 6)
        r.light("lamp", "cylinder", rigid(0, 0, low) @ np.diag([radius, radius, high - low, 1]), radiance)
        r.light("lamp", "disk", rigid(0, 0, low) @ np.diag([radius, -radius, -1, 1]), radiance)
        r.lathe("lamp", r.paint((0, 0.1), (0.9, 1)), [(radius, high), (0, high)])
    else:
        r.lathe("lamp", r.cloth(), [(radius, low), (radius * u(0.4, 1), high)], segments=20)


def warm(r):
    return np.array([1, r.u(0.75, 0.95), r.u(0.45, 0.85)])


def add_picture(r, w, h):
    """A framed picture centred on the frame, at the wall y = 0."""
    t, frame, edge = r.u(0.02, 0.05), r.wood() if r.chance(0.7) else r.metal(), r.u(0.015, 0.05)
    art = texture(r.rng, "picture", colour(r.rng, (0, 1), (0, 1), (0.2, 1)), colour(r.rng, (0, 1), (0, 1), (0.1, 1)))
    r.box("picture", frame, (-w / 2, w / 2), (0, t), (-h / 2, h / 2))
    x, z = w / 2 - edge, h / 2 - edge
    r.surface(
        "picture",
        r.material(art, max(w, h)),
        [[(-x, t + 0.003, -z), (x, t + 0.003, -z)], [(-x, t + 0.003, z), (x, t + 0.003, z)]],
    )


def add_rug(r, w, d):
    """A rug centred on the frame: rectangular or round."""
    kind = r.rng.choice(["border", "checker", "stripes", "dots", "fabric", "plaid"])
    a, b = colour(r.rng, (0, 1), (0.2, 0.9), (0.2, 0.9)), colour(r.rng, (0, 1), (0, 0.8), (0.2, 1))
    material = r.material(texture(r.rng, kind, a, b), max(w, d) if kind == "border" else r.u(0.6, 1.5))
    if r.chance(0.25):
        r.lathe("rug", material, [(min(w, d) / 2 + 0.01, 0), (min(w, d) / 2, 0.015), (0, 0.015)], segments=32)
    else:
        r.box("rug", material, (-w / 2, w / 2), (-d / 2, d / 2), (0, 0.015))


# ------------------------------------------------------------------------------------------ layout
def furnish(r):
    """Fill the room: shell, large furniture, then lamps, pictures, plants, rugs and small things."""
    add_shell(r)
    u, chance = r.u, r.chance
    kind = r.rng.choice(["bedroom", "living", "dining", "office"], p=[0.33, 0.3, 0.2, 0.17])
    anchors = []  # frames on which a rug may be centred

    def wall_item(build, w, d, h, rug=False):
        frame = r.against_wall(w, d, h)
        if frame is not None:
            with r.at(frame):
                build(w, d, h)
            if rug:
                anchors.append(frame @ rigid(0, d * u(0.7, 1.1)))
        return frame

    def desk(w, d, h):
        add_table(r, w, d, h)
        with r.at(rigid(u(-0.2, 0.2), d + u(0, 0.2), 0, np.pi + r.rng.normal(0, 0.3))):
            add_chair(r, chair_style(r))
        r.reserve(r.frame, 0.6, 0.6, 0, d)

    def dining(w, d):
        frame = r.on_open_floor(w + 0.8, d + 0.8)
        if frame is None:
            return
        anchors.append(frame)
        style = chair_style(r)
        with r.at(frame):
            with r.at(rigid(0, -d / 2)):
                add_table(r, w, d, u(0.7, 0.78))
            n = max(1, int(w / 0.6))
            places = [
                (x, sign * (d / 2 + u(0, 0.2)), (1 + sign) * np.pi / 2)
                for sign in (-1, 1)
                for x in ((np.arange(n) + 0.5) / n - 0.5) * w
            ]
            places += [(sign * (w / 2 + u(0, 0.2)), 0, sign * np.pi / 2) for sign in (-1, 1) if w > 1.2]
            for x, y, turn in places:
                if chance(0.85):
                    with r.at(rigid(x, y, 0, turn + r.rng.normal(0, 0.15))):
                        add_chair(r, style)

    def coffee(w, d):
        frame = r.on_open_floor(w, d)
        if frame is not None:
            anchors.append(frame)
            with r.at(frame @ rigid(0, -d / 2)):
                add_table(r, w, d, u(0.3, 0.5))

    def beds(n=1):
        for _ in range(n):
            wall_item(
                lambda w, d, h: add_bed(r, w, d), r.rng.choice([u(0.9, 1.1), u(1.4, 1.9)]), u(1.95, 2.1), 1.2, rug=True
            )

    def sofas(n=1):
        for _ in range(n):
            wall_item(lambda w, d, h: add_sofa(r, w, d), u(0.8, 2.6), u(0.8, 1.0), 0.95, rug=True)

    def cabinet(w, d, h):
        add_cabinet(r, w, d, h)

    if kind == "bedroom":
        beds(1 if min(r.width, r.length) < 4 else 2)
        wall_item(cabinet, u(0.9, 2.0), u(0.45, 0.65), min(u(1.7, 2.3), r.height - 0.15))
        wall_item(desk, u(0.9, 1.5), u(0.45, 0.65), u(0.7, 0.78))
        for _ in range(2):
            wall_item(cabinet, u(0.4, 0.55), u(0.35, 0.45), u(0.4, 0.6))
        sofas(chance(0.35))
    elif kind == "living":
        sofas(r.rng.integers(1, 4))
        coffee(u(0.6, 1.2), u(0.5, 0.8))
        wall_item(cabinet, u(1.0, 2.2), u(0.3, 0.45), u(0.4, 1.0))
        if r.width * r.length > 20:
            dining(u(0.9, 1.6), u(0.75, 0.95))
    elif kind == "dining":
        dining(u(0.9, 2.0), u(0.75, 1.1))
        wall_item(cabinet, u(1.0, 2.0), u(0.35, 0.5), u(0.7, 1.1))
        sofas(chance(0.5))
        beds(chance(0.3))
    else:
        for _ in range(r.rng.integers(1, 4)):
            wall_item(desk, u(1.0, 1.7), u(0.55, 0.8), u(0.7, 0.78))
        sofas(chance(0.6))
        beds(chance(0.4))
    for _ in range(r.rng.integers(1, 4)):
        wall_item(cabinet, u(0.5, 1.8), u(0.25, 0.4), min(u(0.8, 2.2), r.height - 0.15))
    for _ in range(r.rng.integers(0, 4)):  # single chairs
        frame = r.on_open_floor(0.5, 0.5)
        if frame is not None:
            with r.at(frame):
                add_chair(r, chair_style(r))
    for build, low, high, count in (
        (add_plant, 0.7, 1.9, r.rng.integers(1, 4)),
        (add_lamp, 1.2, 1.8, r.rng.integers(1, 3)),
    ):
        for _ in range(count):
            height = u(low, high)
            frame = r.against_wall(0.5, 0.5, height) if chance(0.8) else r.on_open_floor(0.4, 0.4)
            if frame is not None:
                with r.at(frame @ rigid(0, 0.25)):
                    build(r, height, *([u(0.13, 0.22)] if build is add_lamp else []))
    for _ in range(r.rng.integers(1, 7)):  # boxes, balls, stacks on the floor
        frame = r.against_wall(0.45, 0.45, 0.4) if chance(0.5) else r.on_open_floor(0.4, 0.4)
        if frame is not None:
            with r.at(frame):
                add_item(r, u(0.3, 0.45), u(0.3, 0.45), u(0.2, 0.45))
    for frame, w, d in r.tops:
        slots = max(1, int(w / u(0.28, 0.5)))
        for i in range(slots):
            with r.at(frame @ rigid(-w / 2 + (i + 0.5) * w / slots)):
                space = r.height - r.frame[2, 3] - 0.05
                what = r.rng.choice(["item", "lamp", "plant", "nothing"], p=[0.45, 0.08, 0.09, 0.38])
                with r.at(rigid(0, d / 2)):
                    if what == "lamp" and space > 0.6:
                        add_lamp(r, u(0.35, 0.55), min(0.4 * d, u(0.09, 0.15)))
                    elif what == "plant" and space > 0.6:
                        add_plant(r, u(0.25, 0.55))
                if what == "item" and space > 0.1:
                    add_item(r, min(w / slots, 1.0), min(d, 0.6), min(0.5, space))
    for _ in range(r.rng.integers(3, 10)):
        w, h = u(0.35, 1.3), u(0.35, 1.0)
        z = min(u(1.35, 1.7), r.height - h / 2 - 0.1)
        frame = r.against_wall(w, 0, h, z - h / 2, 0.06)
        if frame is not None:
            with r.at(frame @ rigid(0, 0, z)):
                add_picture(r, w, h)
    for _ in range(r.rng.integers(1, 3)):
        frame = (
            anchors.pop(r.rng.integers(len(anchors)))
            if anchors
            else rigid(u(0.3, 0.7) * r.width, u(0.3, 0.7) * r.length)
        )
        x, y = frame[:2, 3]
        w, d = [min(u(1.2, 3.2), 2 * (side - 0.1)) for side in (min(x, r.width - x), min(y, r.length - y))]
        if min(w, d) > 0.6:
            with r.at(rigid(x, y, 0.001 * len(anchors))):
                add_rug(r, w, d)
    x, y, h = r.width * u(0.4, 0.6), r.length * u(0.4, 0.6), r.height
    if chance(0.6):
        with r.at(rigid(x, y, h)):
            add_lamp(r, -u(0.45, 0.9), u(0.16, 0.3))
    else:  # a flush ceiling light, always lit
        a = u(0.15, 0.4)
        with r.at(rigid(x, y, h)):
            r.box("lamp", r.metal(), (-a - 0.02, a + 0.02), (-a - 0.02, a + 0.02), (-0.05, 0))
            r.light("lamp", "rectangle", np.diag([a, -a, -1, 1]) @ rigid(0, 0, 0.055), warm(r) * u(5, 12))
    if not r.day or not any(r.openings):  # somewhere the light must come from: a panel at the ceiling
        with r.at(rigid(r.width * u(0.2, 0.8), r.length * u(0.2, 0.8), h - 0.004)):
            r.light("lamp", "rectangle", np.diag([u(0.1, 0.3), -u(0.1, 0.3), -1, 1]), warm(r) * u(4, 12))


# ------------------------------------------------------------------------------------- to Mitsuba 3
def build_scene(mi, room):
    """The Mitsuba scene and the class index of each of its shapes, in the order of `shape_index`."""

    def spectrum(value):
        if value.ndim == 3:
            return {"type": "bitmap", "bitmap": mi.Bitmap(value), "raw": True}
        return {"type": "rgb", "value": value.tolist()}

    def bsdf(reflectance, _, gloss):
        kind = (
            {"type": "diffuse", "reflectance": spectrum(reflectance)}
            if gloss is None
            else {"type": "principled", "base_color": spectrum(reflectance), "roughness": float(gloss) ** 0.5}
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
            scene[f"{name}_light{i}"] = {"type": "spot", "to_world": to_world, "intensity": spectrum(radiance), **more}
        else:
            scene[f"{name}_light{i}"] = {
                "type": shape,
                "to_world": to_world,
                "emitter": {"type": "area", "radiance": spectrum(radiance)},
            }
    scene = mi.load_dict(scene, optimize=False)
    return scene, np.array([CLASSES.index(shape.id().split("_")[0]) for shape in scene.shapes()], "uint8")


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
    matrix[:3, :4] = np.stack([-rotation[0], rotation[1], -rotation[2], position], 1)  # Mitsuba: x left, z forward
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
    """One ray through each pixel's centre: segmentation (H, W), depth (H, W), normals and albedo (H, W, 3)."""
    position, rotation = camera
    integrator = mi.load_dict({"type": "aov", "aovs": "i:shape_index,p:position,n:geo_normal,a:albedo"})
    centred = {"type": "stratified", "sample_count": 1, "jitter": False}
    out = np.array(mi.render(scene, sensor=sensor(mi, *camera, size, centred, "box"), integrator=integrator, spp=1))
    index, hit = out[..., 0].round().astype(int), out[..., 0] > 0.5
    points = (out[..., 1:4] - position) @ rotation.T
    normals = out[..., 4:7] @ rotation.T
    normals *= np.where((normals * points).sum(-1, keepdims=True) > 0, -1, 1)
    segmentation = np.where(hit, classes[index - 1], IGNORE).astype("uint8")
    return segmentation, np.where(hit, -points[..., 2], 0).astype("float32"), normals * hit[..., None], out[..., 7:10]


def choose_camera(mi, scene, classes, room):
    """Of the first few acceptable views (labels at 24 x 24), the one that sees most classes."""
    best, found = (-1.0, None), 0
    for _ in range(80):
        camera = draw_camera(room)
        segmentation, depth, *_ = trace_labels(mi, scene, classes, camera, 24)
        if (segmentation == IGNORE).any():
            continue
        share = np.bincount(segmentation.ravel(), minlength=len(CLASSES)) / segmentation.size
        good = depth.min() > 0.45 and np.median(depth) > 1.2 and share.max() < 0.6 and (share > 0.01).sum() >= 4
        found += good
        best = max(
            best,
            (10.0 * good + (share > 0.01).sum() + 0.5 * room.rng.random() - 3 * (depth.min() < 0.45), camera),
            key=lambda c: c[0],
        )
        if found == 4:
            break
    return best[1]


def remove_fireflies(radiance):
    """Scale down pixels of (H, W, 3) radiance that outshine all but four of the 25 around them."""
    level = radiance.mean(-1)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(level, 2, mode="reflect"), (5, 5)).reshape(
        *level.shape, 25
    )
    return radiance * np.minimum(1, np.sort(around, -1)[..., 20] / level.clip(1e-6))[..., None]


def denoise(radiance, depth, normals, albedo, reach=5):
    """Joint bilateral filter of (H, W, 3) radiance, guided by the noise-free plane, normal and albedo."""
    h, w = depth.shape
    axis = (np.arange(w) + 0.5) / w * 2 - 1
    tangent = np.tan(np.radians(FIELD_OF_VIEW / 2))
    points = np.stack(np.broadcast_arrays(axis * tangent * depth, -axis[:, None] * tangent * depth, -depth), -1)
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
                cost = cost + (np.einsum("ijk,ijk->ij", p - points, normals) / (0.02 * depth + 1e-3)) ** 2
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
    """Linear radiance (H, W, 3) to sRGB uint8; exposed for the 60th percentile of what does not shine."""
    shining = np.isin(segmentation, [CLASSES.index("window"), CLASSES.index("lamp")])
    level = radiance.mean(-1)[~shining] if not shining.all() else radiance.mean(-1)
    linear = 1 - np.exp(-radiance * brightness / max(np.percentile(level, 60), 1e-4))
    srgb = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear.clip(1e-6) ** (1 / 2.4) - 0.055)
    return (srgb.clip(0, 1) * 255).round().astype("uint8")


def render(seed, size=128, samples=16):
    """One room as a dict of arrays; samples = 0 leaves the path-traced image out (labels only).

    image uint8 (H, W, 3) sRGB; segmentation uint8 (H, W), 255 = ignore; depth float32 (H, W), metres along
    the camera's z axis, 0 = invalid; normals float32 (H, W, 3), unit, x right, y up, z towards the camera.
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
        radiance = np.array(mi.render(scene, sensor=view, integrator=path, spp=samples, seed=int(seed)), float)
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


def decode(files):
    """What `encode` wrote, back as a sample (invalid normals are zero)."""
    from PIL import Image

    arrays = {name: np.asarray(Image.open(io.BytesIO(content))) for name, content in files.items()}
    normals = arrays["normals"] / np.float32(127.5) - 1
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    arrays["normals"] = np.where((arrays["normals"] == 255).all(-1, keepdims=True), 0, normals).astype("float32")
    arrays["depth"] = arrays["depth"].astype("float32") / 1000
    return arrays


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

    features = {"seed": {"dtype": "int64", "_type": "Value"}, **{name: {"_type": "Image"} for name in ENCODINGS}}
    metadata = {
        "classes": json.dumps(CLASSES),
        "encodings": json.dumps(ENCODINGS),
        "field_of_view_degrees": str(FIELD_OF_VIEW),
        "normals_axes": "x right, y up, z towards the camera",
        "huggingface": json.dumps({"info": {"features": features}}),
    }
    losses = []
    for split, seeds in SPLITS.items():
        done = [scratch / f"{seed}.parquet" for seed in seeds if (scratch / f"{seed}.parquet").exists()]
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in done]).combine_chunks()
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
    """Class shares, and how a predictor does that knows nothing but a pixel's position (lines of Markdown)."""
    lines = ["| class | train pixels % | test pixels % | train images % |", "|---|---|---|---|"]
    counts = np.stack([(train["segmentation"] == c).mean((1, 2)) for c in range(len(CLASSES))], 1)
    for c, name in enumerate(CLASSES):
        lines.append(
            f"| {c} {name} | {100 * counts[:, c].mean():.1f} | {100 * (test['segmentation'] == c).mean():.1f} "
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
        "Depth, metres (minimum, 5 %, median, 95 %, maximum): " + ", ".join(f"{d:.2f}" for d in depth) + ".",
        (
            f"Classes in an image (over 1 % of its pixels): mean {(counts > 0.01).sum(1).mean():.1f}, "
            f"minimum {(counts > 0.01).sum(1).min()}. Invalid pixels: {invalid}."
        ),
        "",
        (
            "Position prior (per pixel the training mode, median and mean direction; scored on test): "
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
            f"`{split}.parquet` {(out / f'{split}.parquet').stat().st_size / 2**20:.1f} MiB" for split in SPLITS
        )
        + ".",
        "",
        *describe(train, test),
        "",
        (
            f"Encoding loss: image {mean['image_mean_abs']:.2f} of 255 mean absolute ({mean['image_psnr']:.1f} dB PSNR); "
            f"depth {1000 * mean['depth_mean']:.2f} mm mean, {1000 * worst['depth_max']:.2f} mm at most; "
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
        [colorsys.hsv_to_rgb(c * 0.382 % 1, 0.45 + 0.5 * (c % 2), 0.95 - 0.2 * (c % 3)) for c in range(len(CLASSES))]
    )
    cells = [
        np.concatenate(
            [
                test["image"][i],
                (255 * palette[test["segmentation"][i]]).astype("uint8"),
                np.repeat((255 * (1 - test["depth"][i, ..., None] / 8).clip(0, 1)).astype("uint8"), 3, 2),
                ((test["normals"][i] + 1) * 127.5).astype("uint8"),
            ],
            1,
        )
        for i in range(min(32, len(test["image"]) // 2 * 2))
    ]
    Image.fromarray(np.concatenate([np.concatenate(cells[i : i + 2], 1) for i in range(0, len(cells), 2)])).save(
        out / "samples.png", optimize=True
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--scratch", type=pathlib.Path, help="one file per finished image (default: OUT/scratch)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--assemble-only", action="store_true", help="write the files from what is rendered so far")
    arguments = parser.parse_args()
    out, scratch = arguments.out, arguments.scratch or arguments.out / "scratch"
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    if not arguments.assemble_only:
        ordered = sorted((i / len(seeds), seed) for seeds in SPLITS.values() for i, seed in enumerate(seeds))
        start = time.time()
        with multiprocessing.get_context("spawn").Pool(arguments.workers, use_one_thread) as pool:
            for n, _ in enumerate(pool.imap(render_to_file, [(seed, scratch) for _, seed in ordered]), 1):
                if n % 20 == 0:
                    print(f"{n} of {len(ordered)} rooms, {time.time() - start:.0f} s", flush=True)
    write_card(out, assemble(out, scratch))


if __name__ == "__main__":
    main()
