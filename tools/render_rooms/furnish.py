"""Furnish `rooms`: a seed decides a room's size, furniture, materials and lights.

(render.py makes images of it.)

World: x, y along the floor, z up, metres.
"""

import colorsys
import contextlib
import itertools

import numpy as np


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
        mask = (edge * rng.uniform(6, 30) % 1 < rng.uniform(0.3, 0.7)) * (
            edge < rng.uniform(0.1, 0.5)
        )
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
        self.width, self.length, self.height = (
            rng.uniform(2.8, 6.5),
            rng.uniform(2.8, 6.5),
            rng.uniform(2.4, 3.2),
        )
        self.surfaces, self.materials, self.lights = {}, [], []
        self.frame = np.eye(4)
        sizes = self.width, self.length
        # A wall's frame: x along it, y into the room.
        self.wall_lengths = [sizes[k % 2] for k in range(4)]
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
        """A colour (3,) or a texture (H, W, 3) that repeats every so many metres.

        gloss: microfacet width.
        """
        self.materials.append((np.asarray(reflectance, "float32"), metres, gloss))
        return len(self.materials) - 1

    def paint(self, saturation=(0, 1), value=(0.2, 1), gloss=None):
        return self.material(colour(self.rng, (0, 1), saturation, value), gloss=gloss)

    def wood(self):
        if self.chance(0.2):
            return self.paint((0, 0.2), (0.75, 1), 0.2)
        a = (
            self.wood_colour
            if self.chance(0.7)
            else colour(self.rng, (0.03, 0.12), (0.2, 0.8), (0.2, 0.9))
        )
        return self.material(
            texture(self.rng, "wood", a, a * self.u(0.25, 0.7)),
            self.u(0.4, 0.9),
            self.u(0.1, 0.3) if self.chance(0.4) else None,
        )

    def cloth(self):
        hue = (self.accent - 0.08, self.accent + 0.08) if self.chance(0.5) else (0, 1)
        a = colour(self.rng, hue, (0, 0.8), (0.25, 0.95))
        b = colour(self.rng, (0, 1), (0, 0.5), (0.3, 1))
        kind = self.rng.choice(
            ["plain", "fabric", "stripes", "plaid", "dots"], p=[0.3, 0.3, 0.16, 0.12, 0.12]
        )
        if kind == "plain":
            return self.material(a)
        return self.material(
            texture(self.rng, kind, a, a * 0.7 if kind == "fabric" else b), self.u(0.4, 0.9)
        )

    def metal(self):
        return self.material(np.full(3, self.u(0.05, 0.6)), gloss=0.2)

    # surfaces
    def surface(self, name, material, points):
        """A grid of points (m, n, 3) in the local frame.

        Texture coordinates are arc lengths in metres.
        """
        points = np.asarray(points, float)
        (m, n), steps = (
            points.shape[:2],
            [np.linalg.norm(np.diff(points, axis=k), axis=2).mean(1 - k) for k in (0, 1)],
        )
        v, u = [np.concatenate([[0], np.cumsum(s)]) for s in steps]
        corner = (np.arange(m - 1)[:, None] * n + np.arange(n - 1)).ravel()
        faces = np.concatenate(
            [
                np.stack([corner, corner + 1, corner + n + 1], 1),
                np.stack([corner, corner + n + 1, corner + n], 1),
            ]
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
        self.surface(
            name,
            material,
            [np.asarray(base) + radius * ring + height * axis for radius, height in profile],
        )

    def rod(self, name, material, start, end, radius):
        axis = np.subtract(end, start)
        height = np.linalg.norm(axis)
        self.lathe(
            name, material, [(0, 0), (radius, 0), (radius, height), (0, height)], start, axis, 10
        )

    def cushion(self, name, material, x, y, z, roundness=0.4):
        """A rounded box (superellipsoid) between (low, high) bounds."""

        def power(a):
            return np.sign(a) * np.abs(a) ** roundness

        latitude, longitude = (
            np.linspace(-np.pi / 2, np.pi / 2, 11)[:, None],
            np.linspace(0, 2 * np.pi, 25),
        )
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
        """An emitting Mitsuba shape in the local frame.

        radiance: RGB (3,) or a texture (H, W, 3).
        """
        self.lights.append(
            (name, shape, self.frame @ matrix, np.asarray(radiance, "float32"), more)
        )

    # places
    def reserve(self, frame, width, depth, x=0.0, y=0.0):
        """Take the floor under a (width, depth) rectangle, its back edge centred on the frame."""
        xy = (
            np.array(
                [(a, b, 0, 1) for a in (x - width / 2, x + width / 2) for b in (y + 0.0, y + depth)]
            )
            @ frame.T
        )
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


# -------------------------------------------- furniture (back edge at y = 0, facing +y, z from 0)
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
        if taken[1] > r.wall_lengths[k] or any(
            taken[0] < b and q < taken[1] for q, b, *_ in r.on_wall[k]
        ):
            continue
        r.on_wall[k].append(taken)
        r.openings[k].append((start, start + width, low, high))
        with r.at(r.walls[k] @ rigid(start + width / 2)):
            r.reserve(r.frame, width + 2 * side, 0.15)
            add_window(r, width, low, high)
            if opaque:
                add_curtains(
                    r,
                    curtain,
                    width,
                    side,
                    u(0.02, 0.1) if r.chance(0.6) else low - 0.1,
                    high + 0.08,
                )
    paint = r.paint((0, 0.35), (0.65, 1))
    paper = colour(r.rng, (0, 1), (0, 0.4), (0.5, 0.95))
    second = (
        r.material(
            texture(
                r.rng,
                r.rng.choice(["stripes", "dots", "fabric", "tiles"]),
                paper,
                paper * u(0.6, 1.1),
            ),
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
                        r.surface(
                            "wall",
                            material,
                            [[(x0, 0, z0), (x1, 0, z0)], [(x0, 0, z1), (x1, 0, z1)]],
                        )
            r.box("wall", skirting, (0, length), (0, 0.012), (0, 0.08))


def add_door(r, width, height):
    leaf, frame = (
        (r.wood(), r.wood())
        if r.chance(0.7)
        else (r.paint(value=(0.3, 1), gloss=0.2), r.paint((0, 0.1), (0.8, 1)))
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
    ground = colour(r.rng, (0.05, 0.4), (0.05, 0.6), (0.3, 0.7)) * (
        0.4 + smooth_noise(r.rng, 8, 10, 64)[..., None]
    )
    horizon = r.u(-0.2, 0.5) + 0.15 * smooth_noise(r.rng, 2, 6, 64)
    view = np.where((rows > horizon)[..., None], sky, ground) * (
        r.u(2, 5) if r.day else r.u(0.03, 0.15)
    )
    pane = np.array(
        [[-x, 0, 0, 0], [0, 0, 1, depth], [0, (high - low) / 2, 0, (low + high) / 2], [0, 0, 0, 1]]
    )
    r.light("window", "rectangle", pane, view)
    if r.day and r.chance(0.45):  # sunshine: a beam from the pane down into the room
        aim = np.array([r.u(-0.8, 0.8), 1.0, -r.u(0.35, 0.9)])
        aim /= np.linalg.norm(aim)
        left = np.cross((0, 0, 1), aim) / np.linalg.norm(aim[:2])
        beam = np.eye(4)
        beam[:3, :4] = np.stack([left, np.cross(aim, left), aim, (0, depth + 0.06, high - 0.3)], 1)
        r.light(
            "sun",
            "spot",
            beam,
            np.array([1, 0.85, 0.6]) * r.u(10, 35),
            cutoff_angle=r.u(14, 26),
            beam_width=13.0,
        )


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
        r.surface(
            "curtain", cloth, [np.stack([edge + (x - edge) * p, y, 0 * x + z], 1) for z, p in pinch]
        )
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
    r.cushion(
        "bed",
        r.cloth(),
        (-x - 0.02, x + 0.02),
        (blanket, d - 0.03),
        (h - u(0, 0.15), top + 0.05),
        0.15,
    )
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
            "sofa",
            second,
            (a, a + step),
            (thick * 0.6, thick + 0.14),
            (seat - 0.02, back + u(-0.05, 0.05)),
            0.35,
        )
        if r.chance(0.4):
            r.cushion(
                "sofa",
                r.cloth(),
                (a + 0.05, a + 0.45),
                (thick + 0.12, thick + 0.26),
                (seat, seat + 0.36),
                0.45,
            )
    for a in (-x + 0.05, x - 0.1):
        for b in (0.05, d - 0.1):
            r.box("sofa", r.wood(), (a, a + 0.05), (b, b + 0.05), (0, leg + 0.02))


def add_chair(r, style):
    """A chair centred on the frame that faces +y.

    style: (kind, two materials, seat and back heights).
    """
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
                    "chair",
                    hard,
                    (a, a + 0.04),
                    (b, b + 0.04),
                    (0, back if b < 0 and kind != "shell" else seat - 0.03),
                )
    if kind == "ladder":
        r.box("chair", hard, (-x, x), (-x, x), (seat - 0.04, seat))
        for z in np.linspace(seat + 0.12, back - 0.08, 3):
            r.box("chair", hard, (-x, x), (-x + 0.01, -x + 0.03), (z, z + 0.06))
    else:
        r.cushion("chair", soft, (-x, x), (-x, x), (seat - 0.07, seat + 0.02), 0.3)
        r.cushion(
            "chair",
            soft,
            (-x, x),
            (-x - 0.01, -x + 0.06),
            (seat + 0.1 if kind == "swivel" else seat, back),
            0.3,
        )
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
    kind, t = (
        r.rng.choice(["legs", "pedestal", "panels", "trestle"], p=[0.5, 0.15, 0.2, 0.15]),
        u(0.03, 0.06),
    )
    if kind == "pedestal" and w < 1.7 * d:
        a, c = min(w, d) / 2, (0, d / 2, 0)
        r.lathe("table", top, [(0, h - t), (a, h - t), (a, h), (0, h)], c, segments=28)
        r.lathe(
            "table", leg, [(0, 0), (a * 0.6, 0), (a * 0.5, 0.04), (0.05, 0.1), (0.05, h - t)], c
        )
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
    kind, t = (
        r.rng.choice(["shelves", "doors", "drawers", "mixed"], p=[0.45, 0.25, 0.15, 0.15]),
        0.025,
    )
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
            r.rod(
                "cabinet",
                wood,
                (b - 0.06, d + 0.04, h * 0.5 - 0.08),
                (b - 0.06, d + 0.04, h * 0.5 + 0.08),
                0.012,
            )
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
    """A thing that stands in (w, d, h) metres: books, box, bowl, vase, bottle, ball, screen."""
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
                [
                    (0, 0.01),
                    (a * 0.5, 0),
                    (a * 0.85, z * 0.5),
                    (a, z),
                    (a * 0.9, z),
                    (a * 0.5, z * 0.3),
                    (0, z * 0.2),
                ],
            )
        elif kind == "vase":
            z = min(h, u(0.18, 0.5))
            r.lathe(
                "clutter",
                paint(),
                [(0, 0)] + [(min(size, z) * u(0.1, 0.35), z * t) for t in (0, 0.3, 0.5, 0.8, 1)],
            )
        elif kind == "ball":
            a = min(size, h) * u(0.2, 0.45)
            r.lathe(
                "clutter",
                paint(),
                [(a * np.sin(t), a - a * np.cos(t)) for t in np.linspace(0, np.pi, 11)],
            )
        else:
            a, b, z = w * u(0.25, 0.45), d * u(0.25, 0.45), min(h, size * u(0.3, 1.0))
            r.box("clutter", paint(), (-a, a), (-b, b), (0, z))
            r.box(
                "clutter", paint(), (-a - 0.005, a + 0.005), (-b - 0.005, b + 0.005), (z * 0.8, z)
            )


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
        out, across = (
            np.array([np.cos(turn), np.sin(turn), 0]),
            np.array([-np.sin(turn), np.cos(turn), 0]),
        )
        spine = (0, 0, z + trunk * u(0.5, 1)) + size * (
            t * np.cos(lift) * out * 0.8 + (t * np.sin(lift) - 0.35 * t**2) * (0, 0, 1)
        )
        half = size * broad * np.sin(np.pi * (0.08 + 0.9 * t)) * across / 2
        r.surface(
            "plant",
            leaf[r.rng.integers(2)],
            np.stack([spine - half, spine, spine + half], 1)  # noqa: RUF005
            + [[[0, 0, 0], [0, 0, -0.01], [0, 0, 0]]],
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
            [
                (0, 0),
                (radius * 0.7, 0),
                (radius * 0.7, 0.02),
                (radius * u(0.1, 0.5), tip * 0.3),
                (0.015, tip * 0.7),
            ],
        )
    low, high = sorted((sign * (tip - 0.02), sign * (tip - 0.02 + shade)))
    if r.chance(0.4):
        centre = rigid(0, 0, (low + high) / 2)
        if lit:
            r.light(
                "lamp", "sphere", centre @ np.diag([radius, radius, radius, 1]), warm(r) * u(2, 6)
            )
        else:
            r.lathe(
                "lamp",
                r.paint((0, 0.3), (0.6, 1)),
                [
                    (radius * np.sin(t), (low + high) / 2 - radius * np.cos(t))
                    for t in np.linspace(0, np.pi, 11)
                ],
            )
    elif lit:
        radiance = warm(r) * u(2, 6)
        r.light(
            "lamp",
            "cylinder",
            rigid(0, 0, low) @ np.diag([radius, radius, high - low, 1]),
            radiance,
        )
        r.light("lamp", "disk", rigid(0, 0, low) @ np.diag([radius, -radius, -1, 1]), radiance)
        r.lathe("lamp", r.paint((0, 0.1), (0.9, 1)), [(radius, high), (0, high)])
    else:
        r.lathe("lamp", r.cloth(), [(radius, low), (radius * u(0.4, 1), high)], segments=20)


def warm(r):
    return np.array([1, r.u(0.75, 0.95), r.u(0.45, 0.85)])


def add_picture(r, w, h):
    """A framed picture centred on the frame, at the wall y = 0."""
    t, frame, edge = r.u(0.02, 0.05), r.wood() if r.chance(0.7) else r.metal(), r.u(0.015, 0.05)
    art = texture(
        r.rng,
        "picture",
        colour(r.rng, (0, 1), (0, 1), (0.2, 1)),
        colour(r.rng, (0, 1), (0, 1), (0.1, 1)),
    )
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
    material = r.material(
        texture(r.rng, kind, a, b), max(w, d) if kind == "border" else r.u(0.6, 1.5)
    )
    if r.chance(0.25):
        r.lathe(
            "rug",
            material,
            [(min(w, d) / 2 + 0.01, 0), (min(w, d) / 2, 0.015), (0, 0.015)],
            segments=32,
        )
    else:
        r.box("rug", material, (-w / 2, w / 2), (-d / 2, d / 2), (0, 0.015))


# ------------------------------------------------------------------------------------------ layout
def furnish(r):
    """Fill the room: shell, large furniture, lamps, pictures, plants, rugs and small things."""
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
            places += [
                (sign * (w / 2 + u(0, 0.2)), 0, sign * np.pi / 2) for sign in (-1, 1) if w > 1.2
            ]
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
                lambda w, d, h: add_bed(r, w, d),
                r.rng.choice([u(0.9, 1.1), u(1.4, 1.9)]),
                u(1.95, 2.1),
                1.2,
                rug=True,
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
                what = r.rng.choice(
                    ["item", "lamp", "plant", "nothing"], p=[0.45, 0.08, 0.09, 0.38]
                )
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
        w, d = [
            min(u(1.2, 3.2), 2 * (side - 0.1))
            for side in (min(x, r.width - x), min(y, r.length - y))
        ]
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
            r.light(
                "lamp",
                "rectangle",
                np.diag([a, -a, -1, 1]) @ rigid(0, 0, 0.055),
                warm(r) * u(5, 12),
            )
    if not r.day or not any(r.openings):  # the light must come from somewhere: a ceiling panel
        with r.at(rigid(r.width * u(0.2, 0.8), r.length * u(0.2, 0.8), h - 0.004)):
            r.light(
                "lamp", "rectangle", np.diag([u(0.1, 0.3), -u(0.1, 0.3), -1, 1]), warm(r) * u(4, 12)
            )
