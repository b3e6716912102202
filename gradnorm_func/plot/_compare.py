"""Methods side by side: with the spread over their seeds, and in the plane of two losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from gradnorm_func._tools.palette import COLOURS, DASHES
from gradnorm_func.plot._courses import STEP
from gradnorm_func.plot._draw import (
    MARKERS,
    last_finite,
    log_axis,
    marked,
    name_ends,
    new_axes,
    shorten,
    tidy,
)
from gradnorm_func.plot._read import array, labels, quantiles


def compare(
    runs: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    steps: Sequence[float] | None = None,
    band: Literal["range", "quartiles"] = "range",
    label: str = "",
) -> Axes:
    """Runs of several methods: the median over the seeds, and a band around it.

    Args:
        runs: from a method's name to its (seeds, steps) numbers, such as test losses.
        ax: the axis to draw into; None makes one.
        steps: at which steps the numbers were taken; None counts 0, 1, ....
        band: "range", from the lowest seed to the highest, or "quartiles", the middle half.
        label: what the numbers are, with their unit.

    Returns:
        The axis; its y axis is logarithmic where the numbers are positive and span more than a factor of 3.

    Raises:
        ValueError: for a wrong shape, more than 8 methods, or no finite number.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.compare({"GradNorm": [[3.0, 1.0], [3.0, 1.5], [3.0, 2.5]]}, Figure().subplots(), label="error")
        >>> ax.lines[0].get_ydata().tolist()
        [3.0, 1.5]
    """
    if not isinstance(runs, Mapping) or not runs:
        raise ValueError(
            f"runs={type(runs).__name__} must be a dict from name to (seeds, steps) numbers, and not empty"
        )
    if len(runs) > len(COLOURS):
        raise ValueError(f"runs has {len(runs)} methods; more than {len(COLOURS)} cannot be told apart: draw fewer")
    if band not in ("range", "quartiles"):
        raise ValueError(f"band={band!r} must be 'range' or 'quartiles'")
    read = {name: array(values, f"runs[{name!r}]") for name, values in runs.items()}
    for name, values in read.items():
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"runs[{name!r}] has shape {values.shape}; it must be (seeds, steps): of one run, x[None]")
        if not np.isfinite(values).any():
            raise ValueError(f"runs[{name!r}] holds no finite number: leave it out")
        if steps is not None and len(steps) != values.shape[1]:
            raise ValueError(f"steps has {len(steps)} entries, but runs[{name!r}] {values.shape[1]} steps")
    ax = new_axes(ax)
    tidy(ax, x=STEP, y=label)
    tags, ends = [], []
    for k, (name, values) in enumerate(read.items()):
        x = np.arange(values.shape[1]) if steps is None else np.asarray(steps, dtype=np.float64)
        low, lower, middle, upper, high = quantiles(values)
        style: dict[str, Any] = {"color": COLOURS[k], "linestyle": DASHES[k % len(DASHES)]}
        if len(values) > 1:
            edges = (low, high) if band == "range" else (lower, upper)
            ax.fill_between(x, *edges, color=COLOURS[k], alpha=0.2, linewidth=0, label=f"_{name}")
        ax.plot(
            x,
            middle,
            **style,
            linewidth=1.8,
            marker=MARKERS[k],
            markersize=4.5,
            label=name,
            markevery=marked(middle, k / len(read)),
            zorder=3,
        )
        # A median over the seeds that are left hides those that diverged, so they are counted.
        left = int(np.isfinite(values[:, -1]).sum())
        said = name if left == len(values) else f"{shorten(name)[:14]} ({left}/{len(values)} left)"
        tags.append((said, last_finite(x, middle), COLOURS[k]))
        ends += [x[0], x[-1]]
    together = np.concatenate([values.ravel() for values in read.values()])
    log_axis(ax, together)
    seeds = max(len(values) for values in read.values())
    spread = "lowest to highest" if band == "range" else "middle half"
    note = "" if seeds == 1 else f"line: median, band: {spread} of {seeds} seeds"
    name_ends(ax, tags, (float(min(ends)), float(max(ends))), note)
    return ax


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
        The axis. Points that no other static weights beat at both tasks are filled and joined by a line; lower left
        of it is better than any static weights.

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
    points = array(sweep, "sweep")
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"sweep has shape {points.shape}; it must be (N, 2): N runs, two losses")
    tasks = labels(names, 2)
    finite = np.isfinite(points).all(1)
    if not finite.any():
        raise ValueError("sweep holds no point of two finite losses, so there is nothing to draw")
    beaten = [bool(((points <= p).all(1) & (points < p).any(1)).any()) for p in points]
    best = np.flatnonzero(finite & ~np.array(beaten))
    best = best[np.lexsort((-points[best, 1], points[best, 0]))]
    rest = np.flatnonzero(finite & np.array(beaten))
    ax = new_axes(ax, (5.6, 4.6))
    tidy(ax, x=f"loss of {tasks[0]}", y=f"loss of {tasks[1]}")
    dots: dict[str, Any] = {"color": "0.35", "marker": "o", "markersize": 5, "linewidth": 1, "zorder": 2}
    ax.plot(*points[best].T, **dots, label="static weights, not beaten")
    if len(rest):
        dots |= {"linestyle": "none", "markerfacecolor": "white"}
        ax.plot(*points[rest].T, **dots, label="static weights, beaten")
    if shares is not None:
        given = array(shares, "shares")
        if given.shape != (len(points),):
            raise ValueError(f"shares has shape {given.shape}, but sweep has {len(points)} points")
        for share, point in zip(given[finite], points[finite], strict=True):
            ax.annotate(f"{share:.2g}", point, (4, 4), textcoords="offset points", fontsize=8, color="0.35")
    for k, (name, found) in enumerate((methods or {}).items()):
        spots = array(found, f"methods[{name!r}]")
        spots = spots[None] if spots.ndim == 1 else spots
        if spots.ndim != 2 or spots.shape[1] != 2:
            raise ValueError(f"methods[{name!r}] has shape {spots.shape}; it must be two losses, or (seeds, 2)")
        ax.scatter(
            spots[:, 0],
            spots[:, 1],
            s=70,
            color=COLOURS[k % len(COLOURS)],
            marker="s^DvP*Xo"[k % 8],
            edgecolor="black",
            linewidth=0.8,
            label=name,
            zorder=4,
        )
    ax.legend(fontsize=9, framealpha=0.9)
    return ax
