"""Angles between the task gradients: who pulls against whom, and when."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from gradnorm_func._tools.palette import COLOURS, DASHES
from gradnorm_func.plot._courses import STEP
from gradnorm_func.plot._draw import (
    cell_texts,
    curves,
    last_finite,
    name_ends,
    new_axes,
    task_ticks,
    ticks_of,
    tidy,
)
from gradnorm_func.plot._read import Array, field, labels, quantiles, running_mean

MOST_NUMBERS = 12  # tasks, up to which the cells hold their numbers


def conflicts(cosines: Any, ax: Axes | None = None, *, names: Any = None) -> Axes:
    """The cosines between the task gradients as a map: red is conflict, white is unrelated, blue is agreement.

    Args:
        cosines: (T, T), from `gn.task_cosine_similarity` or a `gn.layer_analysis`; of a history with cosines over
            time, (steps, T, T), the last step is drawn. The diagonal is left grey.
        ax: the axis to draw into; None makes one.
        names: the T tasks' names.

    Returns:
        The axis; colours run from -1 to 1. Up to 12 tasks, every cell holds its number.

    Raises:
        ValueError: for a wrong shape, cosines beyond ±1, or a wrong number of names.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.conflicts(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), Figure().subplots(), names=["depth", "seg"])
        >>> [text.get_text() for text in ax.texts]
        ['', '-0.50', '-0.50', '']
    """
    values = _matrices(cosines)[-1]
    count = len(values)
    tasks = labels(names, count)
    ax = new_axes(ax, (5.6, 4.6))
    shades = matplotlib.colormaps["RdBu"].with_extremes(bad="0.85")
    image = ax.imshow(np.where(np.eye(count, dtype=bool), np.nan, values), cmap=shades, vmin=-1, vmax=1)
    ax.set_yticks(*ticks_of(tasks))
    ax.tick_params(axis="y", length=0, labelsize=9 if count <= MOST_NUMBERS else 7)
    task_ticks(ax, tasks, count > MOST_NUMBERS)
    if count <= MOST_NUMBERS:
        texts = [
            ["" if i == j or np.isnan(c) else f"{round(c, 2) + 0.0:.2f}" for j, c in enumerate(row)]
            for i, row in enumerate(values)
        ]
        cell_texts(ax, image, values, texts)
    ax.figure.colorbar(image, ax=ax, label="cosine of the task gradients", ticks=[-1, -0.5, 0, 0.5, 1])
    return ax


def conflict_course(history: Any, ax: Axes | None = None, *, names: Any = None, smooth: int = 1) -> Axes:
    """The cosines between the task gradients over training; below 0, two tasks pull against each other.

    Args:
        history: one with cosines, such as RotoGrad's, or (steps, T, T): what `gn.task_cosine_similarity` gave at some
            steps, stacked.
        ax: the axis to draw into; None makes one.
        names: the T tasks' names.
        smooth: mean of that many steps.

    Returns:
        The axis. More than 8 pairs are summed up: their median, middle half and range, and the two pairs that are on
        average the most opposed and the most aligned.

    Raises:
        ValueError: as `conflicts` does.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.conflict_course(torch.eye(2).expand(5, 2, 2), Figure().subplots(), names=["depth", "seg"])
        >>> ax.lines[0].get_label()
        'depth / seg'
    """
    values = _matrices(history)
    tasks = labels(names, values.shape[1])
    pairs = list(combinations(range(len(tasks)), 2))
    if not pairs:
        raise ValueError("cosines of one task alone: there is no pair to draw")
    of_pairs = running_mean(np.stack([values[:, i, j] for i, j in pairs], 1), smooth)
    texts = [f"{tasks[i]} / {tasks[j]}" for i, j in pairs]
    ax = new_axes(ax)
    tidy(ax, x=STEP if smooth == 1 else f"{STEP} (mean of {smooth})", y="cosine of the task gradients")
    if len(pairs) <= len(COLOURS):
        curves(ax, of_pairs, texts, centre=0.0)
        return ax
    ax.axhline(0.0, color="0.5", linewidth=0.8, zorder=0)
    x = np.arange(len(values))
    low, lower, middle, upper, high = quantiles(of_pairs.T)
    ax.fill_between(x, low, high, color="0.5", alpha=0.18, linewidth=0, label="all pairs")
    ax.fill_between(x, lower, upper, color="0.5", alpha=0.35, linewidth=0, label="half of the pairs")
    count = np.isfinite(of_pairs).sum(0)
    means = np.where(count > 0, np.nansum(of_pairs, 0) / np.maximum(count, 1), np.nan)
    ends = int(np.nanargmax(means)), int(np.nanargmin(means))
    chosen = [(texts[k], of_pairs[:, k]) for k in ends]
    tags = []
    looks = zip(("#000000", "#0072B2", "#D55E00"), DASHES[:3], strict=True)
    for (text, curve), (colour, dash) in zip([("median", middle), *chosen], looks, strict=True):
        marker = "o" if len(x) == 1 else None
        ax.plot(x, curve, color=colour, linestyle=dash, linewidth=1.6, label=text, marker=marker, markersize=4)
        tags.append((text, last_finite(x, curve), colour))
    name_ends(ax, tags, (0.0, len(x) - 1.0), f"grey: all {len(pairs)} pairs, darker: half of them")
    return ax


def _matrices(cosines: Any) -> Array:
    """(steps, T, T)."""
    values = field(cosines, "cosines")
    assert values is not None
    if values.ndim not in (2, 3) or values.shape[-1] != values.shape[-2] or 0 in values.shape:
        raise ValueError(f"cosines has shape {values.shape}; it must be (T, T) or (steps, T, T)")
    if not np.isfinite(values).any():
        raise ValueError("cosines holds no finite number, so there is nothing to draw")
    if np.nanmax(np.abs(values)) > 1.001:
        raise ValueError(
            f"cosines reaches {np.nanmax(np.abs(values)):.3g}, beyond ±1: "
            "is it a Gramian? gn.task_cosine_similarity gives cosines"
        )
    return values[None] if values.ndim == 2 else values
