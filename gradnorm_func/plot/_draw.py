"""How curves are drawn: figures, axes, lines and their envelopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gradnorm_func.plot._names import End, last_finite, name_ends
from gradnorm_func.plot._read import Array
from gradnorm_func.plot._steps import STEP, binned, set_steps, steps_of
from gradnorm_func.plot._theme import grey, line_width, look

MOST_NAMED = 12  # curves, up to which each has a name
EXTREMES = 3  # of more curves, the highest and lowest ones that are named
MARKS = 7  # markers along a curve
SPAN = 3  # largest over smallest number, above which an axis is logarithmic
WITHOUT_WINDOWS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


def new_axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.0)) -> Axes:
    """The caller's axis, or that of a new figure."""
    if ax is None:
        return new_figure(size).add_subplot()
    if not isinstance(ax, Axes):
        raise ValueError(f"ax={type(ax).__name__} must be one matplotlib Axes, such as plt.subplots()[1], or None")
    return ax


def new_figure(size: tuple[float, float]) -> Figure:
    """One that pyplot shows, in a notebook or a window; where it can show nothing, one that is not left open in it."""
    try:
        from matplotlib import pyplot

        if matplotlib.get_backend().lower() not in WITHOUT_WINDOWS:
            return pyplot.figure(figsize=size, layout="constrained")
    except ImportError:  # MPLBACKEND asks for windows, and there is no display
        pass
    return Figure(figsize=size, layout="constrained")


def make_room(ax: Axes) -> None:
    """What stands beside an axis is cut off in a figure without a layout, so it gets one."""
    figure = ax.figure
    if isinstance(figure, Figure) and figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")


def tidy(ax: Axes, *, x: str, y: str) -> None:
    """Labels, a faint grid, no box."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)


def log_axis(ax: Axes, values: Array, which: Literal["x", "y"] = "y", span: float = SPAN) -> None:
    """A logarithmic axis, if what there is to see is positive and its ends differ by more than a factor of `span`."""
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    if len(positive) and not (finite < 0).any() and positive.max() > span * positive.min():
        ax.set(**{f"{which}scale": "log"})
        axis = ax.yaxis if which == "y" else ax.xaxis
        plain_numbers(axis, *sorted(ax.get_ylim() if which == "y" else ax.get_xlim()))


def plain_numbers(axis: Axis, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, 10 of a logarithmic axis, as long as there is room for them, written without powers."""
    decades = math.log10(high / low)
    subs = (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=tuple(range(1, 10)) if decades < 0.7 else subs, numticks=10))
    if decades < 6:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axis.set_minor_formatter(NullFormatter())


def curves(
    ax: Axes,
    values: Array,
    names: Sequence[str],
    y: str,
    *,
    steps: Sequence[float] | None,
    log_x: bool,
    smooth: int,
    log: bool = False,
    centre: float | None = None,
) -> None:
    """One curve a column of (steps, T), named at its end; of many only the highest and lowest ends, the others pale.

    `centre` is a value to compare with, such as 0.
    """
    x = steps_of(steps, len(values), log_x)
    tidy(ax, x=STEP if smooth == 1 else f"{STEP} (mean of {smooth})", y=y)
    set_steps(ax, log_x)
    course = binned(x, values, log_x)
    shown = named_of(course.x, course.middle)
    for i in range(len(names)):
        if i in shown:
            curve(ax, course.x, course.middle[:, i], i, names[i], phase=shown.index(i) / len(shown))
            if course.note:
                envelope(ax, course.x, course.low[:, i], course.high[:, i], i, names[i], alpha=0.13)
        else:
            pale: dict[str, Any] = {"color": look(i).colour, "linewidth": line_width(0.4), "alpha": 0.3, "zorder": 1}
            ax.plot(course.x, course.middle[:, i], label=names[i], **pale)
    if centre is not None:
        ax.axhline(centre, color=grey(ax), linewidth=0.8, zorder=0)
    if log:
        log_axis(ax, np.stack([course.low, course.high]))
    visible = np.where(course.middle > 0, course.middle, np.nan) if ax.get_yscale() == "log" else course.middle
    ends = [End(names[i], last_finite(course.x, visible[:, i]), look(i)) for i in shown]
    missing = [end.name for end in ends if end.spot is None]
    notes = [course.note] if course.note else []
    notes += [f"pale: {len(names) - len(shown)} others"] if len(shown) < len(names) else []
    notes += [f"not seen, being 0 or not finite: {', '.join(missing)}"] if missing else []
    name_ends(ax, ends, (float(x[0]), float(x[-1])), "; ".join(notes))


def named_of(x: Array, values: Array) -> list[int]:
    """The curves that get a name: all of a dozen, of more the highest and the lowest ends."""
    count = values.shape[1]
    if count <= MOST_NAMED:
        return list(range(count))
    ends = {i: end[1] for i in range(count) if (end := last_finite(x, values[:, i])) is not None}
    ordered = sorted(ends, key=lambda i: -ends[i])
    return list(dict.fromkeys(ordered[:EXTREMES] + ordered[-EXTREMES:]))


def curve(ax: Axes, x: Array, y: Array, index: int, name: str, *, phase: float) -> None:
    """One line in the look of its task or method."""
    colour, dash, marker = look(index)
    ax.plot(
        x,
        y,
        color=colour,
        linestyle=dash,
        linewidth=line_width(),
        marker=marker,
        markersize=4,
        markevery=marked(y, phase),
        label=name,
        zorder=3,
    )


def envelope(ax: Axes, x: Array, low: Array, high: Array, index: int, name: str, alpha: float = 0.2) -> None:
    """The range around a line."""
    ax.fill_between(x, low, high, color=look(index).colour, alpha=alpha, linewidth=0, zorder=2, label=f"_{name}")


def marked(curve: Array, phase: float) -> list[int]:
    """Where to put markers: spread over the curve, and on points whose neighbours are gaps."""
    finite = np.isfinite(curve)
    stride = max(1, len(curve) // MARKS)
    padded = np.pad(finite, 1)
    alone = finite & ~padded[:-2] & ~padded[2:]
    spread = np.arange(len(curve)) % stride == int(phase * stride)
    return [int(i) for i in np.flatnonzero(finite & (alone | spread))]
