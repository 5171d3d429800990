"""Whether the criterion matters: every criterion of a profile under one protocol."""

import pandas as pd
from matplotlib.figure import Figure

from mtprune_utils.study.figures import grid_of_axes

AGREEMENT = {
    "spearman": "Spearman, all filters", "within_layers": "Spearman within layers",
    "overlap": "overlap of the lower halves",
}


def fig8_agreement(agreement: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """How far each two criteria agree on the dense network, mean over seeds.

    agreement: `stages.score`'s tables. Returns the figure and the plotted data, with spreads.
    """
    import seaborn as sns  # a second of import

    pair = ["first", "second"]
    means = agreement.groupby(pair, sort=False)[[*AGREEMENT]].agg(["mean", "std", "count"])
    names = list(dict.fromkeys([*agreement["first"], *agreement["second"]]))
    side = 1.6 + 0.28 * len(names)
    figure, axes = grid_of_axes(1, len(AGREEMENT), side, side)
    for axis, (measure, title) in zip(axes[0], AGREEMENT.items()):
        half = means[measure, "mean"].unstack().reindex(index=names, columns=names)
        both = half.fillna(half.T)
        sns.heatmap(
            both, ax=axis, square=True, cmap="RdBu", vmin=-1, vmax=1, cbar=False,
            annot=len(names) <= 24, fmt=".1f", annot_kws={"fontsize": 6},
        )
        axis.set(title=title, xlabel="", ylabel="")
        axis.tick_params(labelsize=7)
    means.columns = [f"{measure}_{what}" for measure, what in means.columns]
    return figure, means.reset_index()
