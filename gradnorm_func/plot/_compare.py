"""Methods side by side over training, with the spread over their seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from gradnorm_func.plot._draw import MOST_NAMED, curve, envelope, log_axis, new_axes, tidy
from gradnorm_func.plot._names import End, last_finite, name_ends
from gradnorm_func.plot._read import Array, array, quantiles
from gradnorm_func.plot._steps import STEP, binned, set_steps, steps_of
from gradnorm_func.plot._theme import look


def compare(
    runs: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
    band: Literal["range", "quartiles"] = "range",
    label: str = "",
) -> Axes:
    """Runs of several methods: the median over the seeds, and a band around it.

    Args:
        runs: from a method's name to its (seeds, steps) numbers, such as test losses.
        ax: the axis to draw into; None makes one.
        steps: at which steps the numbers were taken; None counts 0, 1, ....
        log_x: a logarithmic x axis; without `steps` it counts from 1.
        band: "range", from the lowest seed to the highest, or "quartiles", the middle half.
        label: what the numbers are, with their unit.

    Returns:
        The axis; its y axis is logarithmic where the numbers are positive and span more than a factor of 3.

    Raises:
        ValueError: for a wrong shape, more than 12 methods, or no finite number.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.compare({"GradNorm": [[3.0, 1.0], [3.0, 1.5], [3.0, 2.5]]}, Figure().subplots(), label="error")
        >>> ax.lines[0].get_ydata().tolist()
        [3.0, 1.5]
    """
    read = methods_of(runs)
    if band not in ("range", "quartiles"):
        raise ValueError(f"band={band!r} must be 'range' or 'quartiles'")
    places = {name: steps_of(steps, values.shape[1], log_x, f"runs[{name!r}]") for name, values in read.items()}
    ax = new_axes(ax)
    tidy(ax, x=STEP, y=label)
    set_steps(ax, log_x)
    ends, notes = [], [""]
    for k, (name, values) in enumerate(read.items()):
        low, lower, middle, upper, high = quantiles(values)
        edges = (low, high) if band == "range" else (lower, upper)
        drawn = binned(places[name], middle, log_x, *edges)
        if len(values) > 1 or drawn.note:
            envelope(ax, drawn.x, drawn.low, drawn.high, k, name)
        curve(ax, drawn.x, drawn.middle, k, name, phase=k / len(read))
        # A median over the seeds that are left hides those that diverged, so they are counted.
        left = int(np.isfinite(values[:, -1]).sum())
        said = name if left == len(values) else f"{name} ({left}/{len(values)} left)"
        ends.append(End(said, last_finite(drawn.x, drawn.middle), look(k)))
        notes.append(drawn.note)
    log_axis(ax, np.concatenate([values.ravel() for values in read.values()]))
    seeds = max(len(values) for values in read.values())
    spread = "lowest to highest" if band == "range" else "middle half"
    note = max(notes) if seeds == 1 else f"line: median, band: {spread} of {seeds} seeds" + (", binned" * any(notes))
    spans = [place[[0, -1]] for place in places.values()]
    name_ends(ax, ends, (float(np.min(spans)), float(np.max(spans))), note)
    return ax


def methods_of(runs: Any) -> dict[str, Array]:
    """(seeds, steps) of every method, checked."""
    if not isinstance(runs, Mapping) or not runs:
        raise ValueError(
            f"runs={type(runs).__name__} must be a dict from name to (seeds, steps) numbers, and not empty"
        )
    if len(runs) > MOST_NAMED:
        raise ValueError(f"runs has {len(runs)} methods; more than {MOST_NAMED} cannot be told apart: draw fewer")
    read = {str(name): array(values, f"runs[{name!r}]") for name, values in runs.items()}
    for name, values in read.items():
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"runs[{name!r}] has shape {values.shape}; it must be (seeds, steps): of one run, x[None]")
        if not np.isfinite(values).any():
            raise ValueError(f"runs[{name!r}] holds no finite number: leave it out")
    return read
