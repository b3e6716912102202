"""Angles between the task gradients: who pulls against whom, and when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from gradnorm_func.plot._draw import curves, make_room, new_axes, tidy
from gradnorm_func.plot._maps import MOST_NUMBERS, cell_texts, colour_bar, task_ticks, ticks_of
from gradnorm_func.plot._names import End, last_finite, name_ends
from gradnorm_func.plot._read import Array, field, labels, quantiles, running_mean
from gradnorm_func.plot._steps import STEP, binned, set_steps, steps_of
from gradnorm_func.plot._theme import Look, font, grey, ink, line_width, look

MOST_PAIRS = 8  # up to which each pair has a curve


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
    make_room(ax)
    shades = matplotlib.colormaps["RdBu"].with_extremes(bad=grey(ax, 0.2))
    image = ax.imshow(np.where(np.eye(count, dtype=bool), np.nan, values), cmap=shades, vmin=-1, vmax=1)
    ax.grid(False)
    ax.set_yticks(*ticks_of(tasks))
    many = count > MOST_NUMBERS
    ax.tick_params(axis="y", length=0, labelsize=font(0.7 if many else 0.9))
    task_ticks(ax, tasks, many)
    if not many:
        texts = [
            ["" if i == j or np.isnan(c) else f"{round(c, 2) + 0.0:.2f}" for j, c in enumerate(row)]
            for i, row in enumerate(values)
        ]
        cell_texts(ax, image, values, texts)
    colour_bar(ax, image, "cosine of the task gradients", [-1, -0.5, 0, 0.5, 1])
    return ax


def conflict_course(
    history: Any,
    ax: Axes | None = None,
    *,
    names: Any = None,
    smooth: int = 1,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
) -> Axes:
    """The cosines between the task gradients over training; below 0, two tasks pull against each other.

    Args:
        history: one with cosines, such as RotoGrad's, or (steps, T, T): what `gn.task_cosine_similarity` gave at some
            steps, stacked.
        ax: the axis to draw into; None makes one.
        names: the T tasks' names.
        smooth, steps, log_x: as in `weights`.

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
    x = steps_of(steps, len(values), log_x)
    ax = new_axes(ax)
    y = "cosine of the task gradients"
    if len(pairs) <= MOST_PAIRS:
        curves(ax, of_pairs, texts, y, steps=steps, log_x=log_x, smooth=smooth, centre=0.0)
        return ax
    tidy(ax, x=STEP if smooth == 1 else f"{STEP} (mean of {smooth})", y=y)
    set_steps(ax, log_x)
    ax.axhline(0.0, color=grey(ax), linewidth=0.8, zorder=0)
    low, lower, middle, upper, high = quantiles(of_pairs.T)
    outer, inner = binned(x, middle, log_x, low, high), binned(x, middle, log_x, lower, upper)
    ax.fill_between(outer.x, outer.low, outer.high, color=grey(ax), alpha=0.18, linewidth=0, label="all pairs")
    ax.fill_between(inner.x, inner.low, inner.high, color=grey(ax), alpha=0.35, linewidth=0, label="half of the pairs")
    count = np.isfinite(of_pairs).sum(0)
    means = np.where(count > 0, np.nansum(of_pairs, 0) / np.maximum(count, 1), np.nan)
    chosen = {texts[k]: of_pairs[:, k] for k in (int(np.nanargmax(means)), int(np.nanargmin(means)))}
    looks = Look(ink(ax), "-", "o"), look(0), look(3)
    ends = []
    for (text, curve), (colour, dash, marker) in zip(({"median": middle} | chosen).items(), looks, strict=False):
        drawn = binned(x, curve, log_x)
        alone = marker if len(x) == 1 else None
        style: dict[str, Any] = {"color": colour, "linestyle": dash, "linewidth": line_width(), "marker": alone}
        ax.plot(drawn.x, drawn.middle, **style, markersize=4, label=text)
        ends.append(End(text, last_finite(drawn.x, drawn.middle), Look(colour, dash, marker)))
    name_ends(ax, ends, (float(x[0]), float(x[-1])), f"grey: all {len(pairs)} pairs, darker: half of them")
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
