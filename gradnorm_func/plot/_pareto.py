"""Methods and static weights in the plane of two losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradnorm_func.plot._draw import log_axis, make_room, new_axes, tidy
from gradnorm_func.plot._read import Array, array, labels
from gradnorm_func.plot._theme import font, grey, ink, look, paper


def pareto(
    sweep: Any,
    ax: Axes | None = None,
    *,
    methods: Mapping[str, Any] | None = None,
    shares: Any = None,
    names: Any = None,
) -> Axes:
    """Two losses against each other: a sweep of static weights, and where the methods come to lie.

    Args:
        sweep: (N, 2), the final losses of N runs with static weights.
        ax: the axis to draw into; None makes one.
        methods: from a method's name to its two losses, or (seeds, 2).
        shares: (N,) the first task's share of the weights in every run of the sweep, written at its point.
        names: the two tasks' names.

    Returns:
        The axis, logarithmic where the losses are positive. Points that no other static weights beat at both tasks are
        filled and joined by a line; lower left of it is better than any static weights.

    Raises:
        ValueError: for a wrong shape, or no finite point.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> sweep = [[1.0, 4.0], [2.0, 2.0], [3.0, 3.0], [4.0, 1.0]]
        >>> ax = plot.pareto(sweep, Figure().subplots(), methods={"GradNorm": [1.5, 2.0]}, names=["depth", "seg"])
        >>> ax.lines[0].get_xdata().tolist()  # (3, 3) is beaten by (2, 2)
        [1.0, 2.0, 4.0]
    """
    points, tasks = array(sweep, "sweep"), labels(names, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"sweep has shape {points.shape}; it must be (N, 2): N runs, two losses")
    finite = np.isfinite(points).all(1)
    if not finite.any():
        raise ValueError("sweep holds no point of two finite losses, so there is nothing to draw")
    spots = {str(name): _spots(name, losses) for name, losses in (methods or {}).items()}
    written = None if shares is None else array(shares, "shares")
    if written is not None and written.shape != (len(points),):
        raise ValueError(f"shares has shape {written.shape}, but sweep has {len(points)} points")
    beaten = np.array([bool(((points <= p).all(1) & (points < p).any(1)).any()) for p in points])
    best = np.flatnonzero(finite & ~beaten)
    best = best[np.lexsort((-points[best, 1], points[best, 0]))]
    ax = new_axes(ax, (6.6, 4.4))
    make_room(ax)
    tidy(ax, x=f"loss of {tasks[0]}", y=f"loss of {tasks[1]}")
    dots: dict[str, Any] = {"color": grey(ax, 0.7), "marker": "o", "markersize": 5, "linewidth": 1, "zorder": 2}
    ax.plot(*points[best].T, **dots, label="static weights,\nnot beaten")
    if (finite & beaten).any():
        dots |= {"linestyle": "none", "markerfacecolor": paper(ax)}
        ax.plot(*points[finite & beaten].T, **dots, label="static weights,\nbeaten")
    if written is not None:
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": font(0.8), "color": grey(ax, 0.7)}
        for share, point in zip(written[finite], points[finite], strict=True):
            ax.annotate(f"{share:.2g}", point, (4, 4), **style)
    for k, (name, losses) in enumerate(spots.items()):
        colour, _, marker = look(k)
        style = {"s": 70, "color": colour, "marker": marker, "edgecolor": ink(ax), "linewidth": 0.8, "zorder": 4}
        ax.scatter(losses[:, 0], losses[:, 1], **style, label=name)
    together = np.concatenate([points[finite], *spots.values()])
    log_axis(ax, together[:, 0], "x", span=1)
    log_axis(ax, together[:, 1], "y", span=1)
    # Beside the axis: wherever it stood inside, it would hide points of some run.
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, frameon=False, fontsize=font())
    return ax


def _spots(name: str, losses: Any) -> Array:
    """(seeds, 2)."""
    spots = array(losses, f"methods[{name!r}]")
    spots = spots[None] if spots.ndim == 1 else spots
    if spots.ndim != 2 or spots.shape[1] != 2:
        raise ValueError(f"methods[{name!r}] has shape {spots.shape}; it must be two losses, or (seeds, 2)")
    return spots
