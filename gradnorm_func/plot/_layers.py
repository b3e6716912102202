"""Task gradients by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from gradnorm_func._core.tasks import task_names
from gradnorm_func._tools.layers import LayerReport
from gradnorm_func.plot._draw import make_room, new_axes, plain_numbers
from gradnorm_func.plot._maps import FRAME, MOST_NUMBERS, cell_texts, colour_bar, number, task_ticks, ticks_of
from gradnorm_func.plot._names import short_names
from gradnorm_func.plot._read import array, labels
from gradnorm_func.plot._theme import font


def layers(report: Any, ax: Axes | None = None, *, names: Any = None, layer_names: Sequence[str] | None = None) -> Axes:
    """The norm of every task's gradient at every layer, as a map with logarithmic shades.

    A cell is empty where a task does not reach a layer. The last layer that all tasks reach is framed: it is the W
    that GradNorm usually compares gradients at.

    Args:
        report: from `gn.layer_analysis`; or a dict from layer to (T,) norms; or (L, T) norms.
        ax: the axis to draw into; None makes one.
        names: the T tasks' names; None takes those of the report.
        layer_names: the L layers' names, for plain norms; first to last.

    Returns:
        The axis, the first layer on top.

    Raises:
        ValueError: for a wrong shape, no positive norm, or a wrong number of names.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.layers({"trunk": [1.0, 20.0], "head": [3.0, 0.0]}, Figure().subplots(), names=["depth", "seg"])
        >>> [text.get_text() for text in ax.texts]
        ['1', '20', '3', '']
    """
    norms, tasks = report, names
    if isinstance(report, LayerReport):
        norms, tasks = report.norms, task_names(report.losses) if names is None else names
    if isinstance(norms, Mapping):
        rows, norms = [str(layer) or "(params)" for layer in norms], list(norms.values())
    else:
        rows = []
    values = array(norms, "report")
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"report holds norms of shape {values.shape}; they must be (L, T): layers by tasks")
    rows = rows if layer_names is None else list(layer_names)
    rows = rows or [f"layer {i}" for i in range(len(values))]
    if len(rows) != len(values):
        raise ValueError(f"layer_names has {len(rows)} entries, but there are {len(values)} layers")
    tasks = labels(tasks, values.shape[1])
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        raise ValueError("report holds no positive norm, so there is nothing to draw")

    ax = new_axes(ax, (min(2.6 + 0.75 * len(tasks), 12), min(1.8 + 0.34 * len(rows), 12)))
    make_room(ax)
    shades = matplotlib.colormaps["cividis"].with_extremes(bad=(0, 0, 0, 0))
    low, high = float(positive.min()), float(positive.max())
    low = low if low < high else low / 2
    image = ax.imshow(np.where(values > 0, values, np.nan), cmap=shades, norm=LogNorm(low, high), aspect="auto")
    ax.grid(False)
    where, texts = ticks_of(rows, most=45)
    ax.set_yticks(where, texts)
    wide = len(tasks) > MOST_NUMBERS
    task_ticks(ax, tasks, wide)
    ax.tick_params(axis="y", length=0, labelsize=font(0.7 if len(rows) > 30 else 0.9))
    if not wide and len(rows) <= 2 * MOST_NUMBERS:
        cell_texts(ax, image, values, [[number(value) if value > 0 else "" for value in row] for row in values])
    reached = np.flatnonzero((values > 0).all(1))
    if len(reached):
        shared = int(reached[-1])
        corner = (-0.5, shared - 0.5)
        ax.add_patch(Rectangle(corner, len(tasks), 1, fill=False, edgecolor=FRAME, linewidth=2.5, clip_on=False))
        rows = short_names(rows)
        ax.set_xlabel(f"framed: {rows[shared]},\nthe last layer that all tasks reach")
    bar = colour_bar(ax, image, r"$\|\nabla_\theta L_i\|$ at the layer")
    plain_numbers(bar.ax.yaxis, low, high)
    bar.ax.minorticks_off()
    return ax
