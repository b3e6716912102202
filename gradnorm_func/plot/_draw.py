"""How curves and matrices are drawn: colours, dashes, markers, names at the curves' ends, axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gradnorm_func._tools.palette import COLOURS, DASHES
from gradnorm_func.plot._read import Array

MARKERS = "os^Dv*PX"
FONT = 9.0  # points, of names in the plot
EXTREMES = 3  # of many curves, the highest and lowest ones that get a colour and a name each
MARKS = 7  # markers along a curve
SPAN = 3  # largest over smallest number, above which an axis is logarithmic
LONGEST = 24  # characters of a name


def new_axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.0)) -> Axes:
    """The caller's axis, or that of a new figure."""
    if ax is None:
        return new_figure(size).add_subplot()
    if not isinstance(ax, Axes):
        raise ValueError(f"ax={type(ax).__name__} must be one matplotlib Axes, such as plt.subplots()[1], or None")
    return ax


def new_figure(size: tuple[float, float]) -> Figure:
    """One that pyplot knows of, so that a notebook shows it."""
    try:
        from matplotlib import pyplot

        return pyplot.figure(figsize=size, layout="constrained")
    except ImportError:  # MPLBACKEND asks for windows, and there is no display
        return Figure(figsize=size, layout="constrained")


def tidy(ax: Axes, *, x: str, y: str) -> None:
    """Labels, a faint grid, no box."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def log_axis(ax: Axes, values: Array) -> None:
    """A logarithmic y axis, if what there is to see is positive and spans more than a factor of SPAN."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if len(positive) and not (finite < 0).any() and positive.max() > SPAN * positive.min():
        ax.set_yscale("log", nonpositive="mask")
        plain_numbers(ax.yaxis, *ax.get_ylim())


def plain_numbers(axis: Axis, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, 10 of a logarithmic axis, as long as there is room for them, written without powers."""
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=10))
    if decades < 6:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axis.set_minor_formatter(NullFormatter())


def curves(ax: Axes, values: Array, names: Sequence[str], *, log: bool = False, centre: float | None = None) -> None:
    """One curve a column, named at its end; of many only the highest and lowest ends, the others pale.

    `centre` is a value to compare with, such as 0.
    """
    steps, count = values.shape
    x = np.arange(steps)
    shown = list(range(count))
    if count > len(COLOURS):
        ends = {i: end[1] for i in range(count) if (end := last_finite(x, values[:, i])) is not None}
        ordered = sorted(ends, key=lambda i: -ends[i])
        shown = list(dict.fromkeys(ordered[:EXTREMES] + ordered[-EXTREMES:]))
    for i in range(count):
        if i in shown:
            k = shown.index(i)
            ax.plot(
                x,
                values[:, i],
                color=COLOURS[k],
                linestyle=DASHES[k % len(DASHES)],
                linewidth=1.6,
                marker=MARKERS[k],
                markersize=4,
                markevery=marked(values[:, i], k / len(shown)),
                label=names[i],
                zorder=3,
            )
        else:
            ax.plot(x, values[:, i], color="0.6", linewidth=0.6, alpha=0.6, label=names[i], zorder=1)
    if centre is not None:
        ax.axhline(centre, color="0.5", linewidth=0.8, zorder=0)
    if log:
        log_axis(ax, values)
    visible = np.where(values > 0, values, np.nan) if ax.get_yscale() == "log" else values
    tags = [(names[i], last_finite(x, visible[:, i]), COLOURS[k]) for k, i in enumerate(shown)]
    missing = [name for name, end, _ in tags if end is None]
    notes = [f"grey: {count - len(shown)} others"] if len(shown) < count else []
    notes += [f"not seen, being 0 or not finite: {', '.join(missing)}"] if missing else []
    name_ends(ax, tags, (0.0, steps - 1.0), "; ".join(notes))


def marked(curve: Array, phase: float) -> list[int]:
    """Where to put markers: spread over the curve, and on points whose neighbours are gaps."""
    finite = np.isfinite(curve)
    stride = max(1, len(curve) // MARKS)
    padded = np.pad(finite, 1)
    alone = finite & ~padded[:-2] & ~padded[2:]
    spread = np.arange(len(curve)) % stride == int(phase * stride)
    return [int(i) for i in np.flatnonzero(finite & (alone | spread))]


def last_finite(x: Any, y: Array) -> tuple[float, float] | None:
    """The last point of a curve."""
    finite = np.flatnonzero(np.isfinite(y))
    return (float(x[finite[-1]]), float(y[finite[-1]])) if len(finite) else None


def name_ends(ax: Axes, tags: list[tuple[str, Any, str]], span: tuple[float, float], note: str = "") -> None:
    """Names in a margin on the right, at the height of the curves' ends, pushed apart where they would overlap."""
    dpi = ax.figure.dpi
    width, height = (max(side * 72 / dpi, 1.0) for side in (ax.bbox.width, ax.bbox.height))  # points
    tags = [(shorten(name), end, colour) for name, end, colour in tags]
    longest = max((len(name) for name, _, _ in tags), default=0)
    margin = min(0.55, (0.56 * FONT * longest + 22) / width)
    first, last = span
    extent = (last - first) or 1.0
    side = 0.02 if last > first else 0.15
    left, end_of_data = first - side * extent, last + side * extent
    ax.set_xlim(left, left + (end_of_data - left) / (1 - margin))
    ticks = MaxNLocator(5, integer=True).tick_values(first, last)
    ax.set_xticks([tick for tick in ticks if first <= tick <= last])
    ax.spines["bottom"].set_bounds(left, end_of_data)
    ax.get_ylim()  # limits first: they are found lazily, and the names stand by them
    to_axes = ax.transData + ax.transAxes.inverted()
    placed = []
    for name, end, colour in tags:
        if end is not None:
            placed.append((float(to_axes.transform(end)[1]), name, end, colour))
    placed.sort(key=lambda tag: tag[0])
    heights = spread([tag[0] for tag in placed], gap=min(1.25 * FONT / height, 1 / max(len(placed), 1)))
    start = 1 - margin + 14 / width
    for at, (_, name, end, colour) in zip(heights, placed, strict=True):
        ax.annotate(
            name,
            xy=end,
            xytext=(start, at),
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=FONT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "shrinkA": 1, "shrinkB": 1, "linewidth": 0.7, "alpha": 0.7, "color": colour},
        )
    if note:  # where no title can collide with it
        ax.set_xlabel(f"{ax.get_xlabel()}\n({note})")


def spread(heights: list[float], gap: float) -> list[float]:
    """Sorted heights in [0, 1], moved as little as it takes to be `gap` apart."""
    groups: list[list[float]] = []  # [middle, members]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (m, k), (n, j) = groups.pop(), groups.pop()
            groups.append([(m * k + n * j) / (k + j), k + j])
        half = gap * groups[-1][1] / 2
        groups[-1][0] = min(max(groups[-1][0], half), max(1 - half, half))
    out = [middle + (i - (size - 1) / 2) * gap for middle, size in groups for i in range(int(size))]
    for i in range(len(out) - 2, -1, -1):  # groups pushed down from the top
        out[i] = min(out[i], out[i + 1] - gap)
    return out


def shorten(name: str) -> str:
    """A name that fits beside a plot."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def ticks_of(names: Sequence[str], most: int = 30) -> tuple[list[int], list[str]]:
    """Positions and names along the side of a matrix, thinned out until they fit."""
    stride = max(1, math.ceil(len(names) / most))
    return list(range(0, len(names), stride)), [shorten(name) for name in names[::stride]]


def task_ticks(ax: Axes, tasks: Sequence[str], many: bool) -> None:
    """The tasks' names under a matrix, slanted, or upright where there are many."""
    if many:
        ax.set_xticks(*ticks_of(tasks), rotation=90)
    else:
        ax.set_xticks(*ticks_of(tasks), rotation=30, ha="right", rotation_mode="anchor")
    ax.tick_params(axis="x", length=0, labelsize=7 if many else 9)


def number(value: float) -> str:
    """Two digits, and no exponent where it can be helped."""
    return f"{value:.0f}" if 100 <= value < 1e5 else f"{value:.2g}"


def cell_texts(ax: Axes, image: Any, values: Array, texts: Sequence[Sequence[str]]) -> None:
    """A number in every cell, dark on light and light on dark."""
    size = FONT if max(values.shape) <= 8 else 7
    for (i, j), value in np.ndenumerate(values):
        r, g, b, _ = image.cmap(image.norm(value)) if np.isfinite(value) else (1.0,) * 4
        colour = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 0.5 else "white"
        ax.text(j, i, texts[i][j], ha="center", va="center", fontsize=size, color=colour)
