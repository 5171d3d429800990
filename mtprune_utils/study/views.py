"""The panels of `explore`, as HTML and SVG: a text each, from numbers.

Drawn as text rather than by Matplotlib: that takes a few milliseconds instead of hundreds, is sharp
at any width, and what is drawn in `currentColor` follows the page's theme.
"""

import base64
import io
from html import escape

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from mtprune_utils.study.palette import RED, SEQUENTIAL, style_of

STYLE = """<style>
.explore { max-width: 1100px; }
.explore .widget-html, .explore .jupyter-widget-html { overflow: visible; height: auto; }
.explore .widget-html-content { line-height: 1.35; font-size: 13px; color: inherit; }
.explore svg { display: block; width: 100%; height: auto; overflow: visible; }
.explore svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
.explore h4 { margin: 6px 0 4px; font-size: 13px; }
.explore p { margin: 3px 0; }
.explore .row { display: flex; flex-wrap: wrap; gap: 8px; }
.explore figure { margin: 0; }
.explore figcaption { font-size: 11px; }
.explore img, .explore image { image-rendering: pixelated; }
.explore .tile { flex: 1 1 78px; max-width: 150px; }
.explore .tile img { width: 100%; display: block; margin-bottom: 2px; }
.explore .layer { flex: 0 0 52px; }
.explore .layer svg { height: 96px; }
.explore .entry { white-space: nowrap; margin-right: 10px; }
.explore .key { display: inline-block; width: 22px; height: 4px; margin: 0 5px 3px 0; }
</style>"""
CELL, LABEL = 10, 44  # pixels: a filter's square, and what stands left of a layer
PER_LINE = 32  # filters of a layer that stand side by side
WIDTH, HEIGHT, LEFT, BOTTOM = 340, 190, 42, 30  # of a plot, and its margins
FAINT = 'stroke="currentColor" stroke-opacity="0.35"'
COUNT = EngFormatter(places=0, sep="")  # 48k


def rgb(values: np.ndarray, cmap: str = SEQUENTIAL) -> np.ndarray:
    """Colours (..., 3) as bytes, of numbers from 0 to 1."""
    return matplotlib.colormaps[cmap](np.asarray(values, float), bytes=True)[..., :3]


def score_colours(ranks: np.ndarray) -> np.ndarray:
    """Of ranks from 0 to 1; the lowest is not so dark that it vanishes on a dark page."""
    return rgb(0.15 + 0.85 * ranks)


def png(pixels: np.ndarray) -> str:
    """An image (H, W, 3 or 4) of bytes as an address that holds it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _svg(width: float, height: float, label: str, parts: list[str], more: str = "") -> str:
    box = f'viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}" {more}>{"".join(parts)}</svg>'


# --- filters ---


def filter_map(dense: list[int], widths: list[int], filters=None) -> str:
    """Every layer as a line of squares, one for each filter of the dense network.

    filters: an `explore.Filters`, which knows the scores; without it squares only count.
    """
    parts, y = [], 0.0
    for layer, (whole, width) in enumerate(zip(dense, widths, strict=True)):
        words = f"{layer + 1}: {width}/{whole}"
        parts.append(f'<text x="{LABEL + 8}" y="{y + 9:g}" text-anchor="end">{words}</text>')
        cells = _counted(width) if filters is None else _scored(layer, filters)
        for unit in range(whole):
            line, column = divmod(unit, PER_LINE)
            look, title = cells.get(unit, ('fill="currentColor" fill-opacity="0.35"', "gone"))
            side = 8.5 if unit in cells else 2
            corner = (8.5 - side) / 2
            where = f'x="{LABEL + 14 + CELL * column + corner}" y="{y + CELL * line + corner:g}"'
            said = f"<title>layer {layer + 1}, filter {unit + 1}: {title}</title>"
            parts.append(f'<rect {where} width="{side}" height="{side}" {look}>{said}</rect>')
        y += CELL * -(-whole // PER_LINE) + 3
    columns = min(max(dense), PER_LINE)
    return _svg(LABEL + 16 + CELL * columns, y, "filters left in each layer", parts)


def _counted(width: int) -> dict[int, tuple[str, str]]:
    return dict.fromkeys(range(width), ('fill="currentColor" fill-opacity="0.55"', "left"))


def _scored(layer: int, filters) -> dict[int, tuple[str, str]]:
    kept, scores, ranks = filters.kept[layer], filters.scores[layer], filters.ranks[layer]
    goes, cells = set(filters.goes[layer].tolist()), {}
    for unit, score, rank, colour in zip(kept.tolist(), scores, ranks, score_colours(ranks)):
        fill = "#{:02x}{:02x}{:02x}".format(*colour)
        marked, plain = f'stroke="{RED}" stroke-width="2.5"', FAINT
        edge, more = (marked, "; goes next") if unit in goes else (plain, "")
        cells[unit] = f'fill="{fill}" {edge}', f"score {score:.3g}, above {rank:.0%}{more}"
    return cells


def score_key() -> str:
    """What the colours and marks of `filter_map` and `score_maps` mean."""
    ramp = png(np.broadcast_to(score_colours(np.linspace(0, 1, 64)), (1, 64, 3)).copy())
    bar = f'<img src="{ramp}" alt="" style="width:70px;height:9px;vertical-align:-1px">'
    red = f'<span style="border:2px solid {RED};padding:0 4px;font-size:9px">&nbsp;</span>'
    scores = f"lowest score {bar} highest, of all that are left"
    return f"<p>{scores} · {red} goes next · dot: gone</p>"


def score_pictures(dense: list[int], by_removal: dict) -> list[str]:
    """One image per layer: a row per filter, a column per network, dark where the score is low."""
    pictures = [np.zeros((whole, len(by_removal), 4), np.uint8) for whole in dense]
    for x, at in enumerate(sorted(by_removal)):
        for pixels, kept, ranks in zip(pictures, by_removal[at].kept, by_removal[at].ranks):
            pixels[kept, x, :3], pixels[kept, x, 3] = score_colours(ranks), 255
    return [png(pixels) for pixels in pictures]


def score_maps(pictures: list[str], dense: list[int], columns: list[int], removal: int) -> str:
    """`score_pictures` of a run's removals side by side, with a frame around the one shown."""
    figures = []
    for layer, (picture, whole) in enumerate(zip(pictures, dense)):
        size = f'width="{len(columns)}" height="{whole}"'
        frame = 'fill="none" stroke="currentColor" vector-effect="non-scaling-stroke"'
        parts = [
            f'<image href="{picture}" {size} preserveAspectRatio="none"/>',
            f'<rect {size} {frame} stroke-opacity="0.3"/>',
            f'<rect x="{columns.index(removal)}" width="1" height="{whole}" {frame} '
            'stroke-width="2"/>',
        ]
        drawn = _svg(
            len(columns), whole, f"scores of layer {layer + 1}", parts, 'preserveAspectRatio="none"'
        )
        figures.append(
            f'<figure class="layer">{drawn}<figcaption>layer {layer + 1}</figcaption></figure>'
        )
    return f'<div class="row">{"".join(figures)}</div>'


def cosine_map(layers: pd.DataFrame, removal: int) -> str:
    """What tables hold of every layer over a run: how far the tasks' gradients agree."""
    table = layers.pivot(index="layer", columns="removal", values="cosine")
    limit = max(table.abs().max().max(), 1e-9)
    colours = rgb(table.to_numpy() / limit / 2 + 0.5, "RdBu")
    rows, columns = table.shape
    wide, tall = (WIDTH - LEFT) / columns, 11
    x = LEFT + wide * list(table.columns).index(removal)
    parts = [
        f'<image href="{png(colours)}" x="{LEFT}" width="{WIDTH - LEFT}" height="{tall * rows}" '
        'preserveAspectRatio="none"/>',
        f'<rect x="{x:g}" width="{wide:g}" height="{tall * rows}" fill="none" '
        'stroke="currentColor" stroke-width="2"/>',
        *(
            f'<text x="{LEFT - 6}" y="{tall * i + 9}" text-anchor="end">{layer + 1}</text>'
            for i, layer in enumerate(table.index)
        ),
    ]
    drawn = _svg(WIDTH, tall * rows + 2, "cosine of the tasks' gradients", parts)
    words = f"blue: the tasks' gradients agree (up to {limit:.2f}) · red: they pull apart"
    return f"{drawn}<p>{words}</p>"


# --- metrics ---


def metric_plot(
    title: str, curves: dict[str, pd.DataFrame], size: float, point: tuple[str, float]
) -> str:
    """One metric over the parameters, of every criterion: mean over seeds and standard deviation.

    curves: `statistics.curve_over_seeds`. size: where the cursor stands, and where the numbers of
    the legend are read. point: the criterion and the metric of the network that is shown.
    """
    every = pd.concat(curves.values())
    spread = every["sd"].fillna(0)
    values = [(every["mean"] - spread).min(), (every["mean"] + spread).max(), point[1]]
    low, high = min(values), max(values)
    largest, smallest = max(every["x"].max(), size), min(every["x"].min(), size)

    def x(parameters):
        share = np.log(largest / np.asarray(parameters)) / np.log(largest / smallest)
        return LEFT + share * (WIDTH - LEFT - 8)

    def y(value):
        share = (np.asarray(value) - low) / (high - low or 1)
        return 6 + (1 - share) * (HEIGHT - BOTTOM - 6)

    parts = [*_axes(x, y, (low, high), (smallest, largest))]
    legend = []
    for criterion, curve in curves.items():
        colour, label, dashes = style_of(criterion)
        if curve["sd"].notna().all():
            low_edge, high_edge = curve["mean"] - curve["sd"], curve["mean"] + curve["sd"]
            across = x(curve["x"])
            there, back = zip(across, y(high_edge)), zip(across[::-1], y(low_edge)[::-1])
            points = _points([*there, *back])
            parts.append(f'<polygon points="{points}" fill="{colour}" fill-opacity="0.2"/>')
        points = _points(zip(x(curve["x"]), y(curve["mean"])))
        look = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}" fill="none"'
        parts.append(f'<polyline points="{points}" {look}/>')
        legend.append(_read_off(curve, size, colour, label))
    at, of = x(size), style_of(point[0])[0]
    parts.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{HEIGHT - BOTTOM}" stroke="currentColor" '
        'stroke-opacity="0.6" stroke-dasharray="2 2"/>'
        f'<circle cx="{at:.1f}" cy="{y(point[1]):.1f}" r="5" fill="{of}" stroke="currentColor" '
        'stroke-width="1.5"/>'
    )
    drawn = _svg(WIDTH, HEIGHT, title, parts)
    return f"<h4>{escape(title)}</h4>{drawn}<p>{' '.join(legend)}</p>"


def _points(pairs) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _read_off(curve: pd.DataFrame, size: float, colour: str, label: str) -> str:
    """A criterion's entry in the legend, with its mean at a size, if it passed through that."""
    logs = np.log(curve["x"])
    inside = curve["x"].min() * 0.999 <= size <= curve["x"].max() * 1.001
    value = f" {np.interp(np.log(size), logs, curve['mean']):.3g}" if inside else " –"
    spread = np.interp(np.log(size), logs, curve["sd"]) if inside else np.nan
    band = "" if np.isnan(spread) else f" ± {spread:.2g}"
    key = f'<span class="key" style="background:{colour}"></span>'
    return f'<span class="entry">{key}{escape(label)}{value}{band}</span>'


def _axes(x, y, values: tuple[float, float], sizes: tuple[float, float]) -> list[str]:
    foot = HEIGHT - BOTTOM
    parts = [
        f'<path d="M{LEFT} 6V{foot}H{WIDTH - 8}" fill="none" {FAINT}/>',
        f'<text x="{(LEFT + WIDTH) / 2:g}" y="{HEIGHT - 2}" text-anchor="middle">parameters</text>',
    ]
    for value in MaxNLocator(4).tick_values(*values):
        if values[0] <= value <= values[1]:
            parts.append(
                f'<text x="{LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
                f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - 8}" {FAINT} stroke-dasharray="1 3"/>'
            )
    steps = [m * 10.0**power for power in range(2, 10) for m in (1, 2, 5)]
    for size in steps:
        if sizes[0] <= size <= sizes[1]:
            parts.append(
                f'<text x="{x(size):.1f}" y="{foot + 14}" text-anchor="middle">{COUNT(size)}</text>'
                f'<path d="M{x(size):.1f} {foot}v4" {FAINT}/>'
            )
    return parts


# --- images ---


def tile(title: str, pictures: dict[str, np.ndarray], words: str = "") -> str:
    """A column of pictures {what it is: (H, W, 3) bytes}, with a title above and words below."""
    drawn = "".join(
        f'<figcaption>{escape(name)}</figcaption><img src="{png(pixels)}" alt="{escape(name)}">'
        for name, pixels in pictures.items()
    )
    head = f"<strong>{escape(title)}</strong>"
    return f'<figure class="tile">{head}{drawn}<figcaption>{escape(words)}</figcaption></figure>'


def row(tiles: list[str]) -> str:
    """Tiles side by side."""
    return f'<div class="row">{"".join(tiles)}</div>'
