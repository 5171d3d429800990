"""The colours of all figures, which the colour-blind can tell apart, on white and on dark pages.

Seven colours found by search: each two lie far apart in CIELAB for the normal eye and for the three
common deficiencies, and each has a contrast of 3 to white and to JupyterLab's dark page (#111),
which WCAG 2.1 asks of graphics. `tests/test_explore.py` checks both. Where more than seven things
are drawn, dashes tell them apart too.
"""

from cycler import cycler

from mtprune_utils import registry

ORANGE, BLUE, GREEN, GRAY = "#DD7700", "#3366AA", "#00AA66", "#666666"
RED, PURPLE, PINK = "#CC0022", "#8811FF", "#FF33EE"
COLOURS = (ORANGE, BLUE, GREEN, RED, PURPLE, PINK, GRAY)
SEQUENTIAL = "cividis"  # the same order to every eye (Nuñez, Anderton and Renslow, 2018)
INK = "#767676"  # text of a picture that does not know its page: 4.5 to white, 4.2 to #111
STYLE = {  # matplotlib's settings for figures without a background: see `figures.grid_of_axes`
    "axes.facecolor": "none",
    "legend.edgecolor": "inherit",
    "axes.prop_cycle": cycler(color=COLOURS),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
CRITERIA = {
    "taylor": (ORANGE, "Taylor"),
    "cosprune": (BLUE, "CosPrune"),
    "l1": (GREEN, "L1 magnitude"),
    "random": (GRAY, "random"),
    "uniform": (RED, "uniform"),
}
SPARE = (PURPLE, PINK, GREEN, RED, ORANGE, BLUE)  # of criteria that have no colour of their own
DASHES = ("", "5 3", "1.5 2.5", "7 2 1.5 2")  # as in SVG's stroke-dasharray


def style_of(criterion: str) -> tuple[str, str, str]:
    """Colour, label and dashes of a criterion; no two of up to 24 have the same colour and dashes.

    >>> style_of("taylor")
    ('#DD7700', 'Taylor', '')
    """
    if criterion in CRITERIA:
        return *CRITERIA[criterion], DASHES[0]
    others = [name for name in registry.names("criteria") if name not in CRITERIA]
    turn, at = divmod(others.index(criterion), len(SPARE))
    dashed = turn + (at > 1)  # the two first have their colour for themselves
    return SPARE[at], criterion, DASHES[dashed % len(DASHES)]
