"""How matrices are drawn: names along their sides, numbers in their cells, the bar of their colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradnorm_func.plot._names import short_names
from gradnorm_func.plot._read import Array
from gradnorm_func.plot._theme import contrast, font

MOST_NUMBERS = 12  # rows and columns, up to which the cells hold their numbers
FRAME = "#D55E00"  # around what is to be noticed


def ticks_of(names: Sequence[str], most: int = 30) -> tuple[list[int], list[str]]:
    """Positions and names along the side of a matrix, thinned out until they fit."""
    stride = max(1, math.ceil(len(names) / most))
    return list(range(0, len(names), stride)), short_names(names)[::stride]


def task_ticks(ax: Axes, tasks: Sequence[str], many: bool) -> None:
    """The tasks' names under a matrix, slanted, or upright where there are many."""
    if many:
        ax.set_xticks(*ticks_of(tasks), rotation=90)
    else:
        ax.set_xticks(*ticks_of(tasks), rotation=30, ha="right", rotation_mode="anchor")
    ax.tick_params(axis="x", length=0, labelsize=font(0.7 if many else 0.9))


def number(value: float) -> str:
    """Two digits, and no exponent where it can be helped."""
    return f"{value:.0f}" if 100 <= value < 1e5 else f"{value:.2g}"


def cell_texts(ax: Axes, image: Any, values: Array, texts: Sequence[Sequence[str]]) -> None:
    """A number in every cell, dark on light and light on dark."""
    size = font(0.9 if max(values.shape) <= 8 else 0.7)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            shade = image.cmap(image.norm(value))[:3]
            colour = max("black", "white", key=lambda text: contrast(text, shade))
        else:
            colour = "black"
        ax.text(j, i, texts[i][j], ha="center", va="center", fontsize=size, color=colour)


def colour_bar(ax: Axes, image: Any, label: str, ticks: Sequence[float] | None = None) -> Any:
    """The bar of a map's colours, as high as the map itself, without a frame."""
    bar = ax.figure.colorbar(image, ax=ax, label=label, ticks=ticks, fraction=0.046, pad=0.03)
    bar.outline.set_visible(False)
    for side in ax.spines.values():
        side.set_visible(False)
    return bar
