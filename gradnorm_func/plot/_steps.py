"""The x axis: at which steps numbers were taken, and bins for more of them than a figure has room for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from gradnorm_func.plot._read import Array, array

STEP = "training step"
BINS = 300  # of a run of more than twice as many steps


class Course(NamedTuple):
    """Curves as they are drawn, each field (points,) or (points, K)."""

    x: Array
    low: Array
    middle: Array
    high: Array
    note: str  # what has become of the steps, in words


def steps_of(steps: Sequence[float] | None, count: int, log_x: bool, what: str = "history") -> Array:
    """(count,) increasing numbers. Without `steps` they count 0, 1, ..., on a logarithmic axis 1, 2, ...."""
    if steps is None:
        return np.arange(count, dtype=np.float64) + bool(log_x)
    x = array(steps, "steps")
    if x.shape != (count,):
        raise ValueError(f"steps has {x.size} entries, but {what} {count} steps")
    if not np.isfinite(x).all() or (np.diff(x) <= 0).any():
        raise ValueError("steps must be finite and increase from one to the next")
    if log_x and x[0] <= 0:
        raise ValueError(
            f"steps begins at {x[0]:g}, which has no place on a logarithmic axis: leave that step out, or log_x=False"
        )
    return x


def set_steps(ax: Axes, log_x: bool) -> None:
    """Scale and numbers of the x axis."""
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))


def binned(x: Array, middle: Array, log_x: bool, low: Array | None = None, high: Array | None = None) -> Course:
    """The curves; of long runs the median of each bin of steps, and the range of what lies in it."""
    low, high = (middle if edge is None else edge for edge in (low, high))
    if len(x) <= 2 * BINS:
        return Course(x, low, middle, high, "")
    edges = np.geomspace(x[0], x[-1], BINS + 1) if log_x else np.linspace(x[0], x[-1], BINS + 1)
    starts = np.unique(np.searchsorted(x, edges[:-1]))
    parts = np.split(middle, starts[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a bin without one finite number
        medians = np.stack([np.nanmedian(part, axis=0) for part in parts])
    centres = np.array([np.exp(np.log(part).mean()) if log_x else part.mean() for part in np.split(x, starts[1:])])
    said = "" if log_x else f" of {round(len(x) / len(starts))} steps"
    note = f"line: median, band: range, in bins{said}"
    # fmin and fmax pass over NaN.
    return Course(centres, np.fmin.reduceat(low, starts), medians, np.fmax.reduceat(high, starts), note)
