"""What the methods come to: every task's change against a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gradnorm_func.plot._draw import MOST_NAMED, SPAN, make_room, new_axes, tidy
from gradnorm_func.plot._names import short_names
from gradnorm_func.plot._read import Array, array, labels
from gradnorm_func.plot._theme import font, grey, ink, look, paper

# Of the error over the baseline's; half and double are equally far from 1.
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
APART = 0.62  # of the room between two tasks, which the methods share


def results(
    errors: Mapping[str, Any], ax: Axes | None = None, *, baseline: str | None = None, names: Any = None
) -> Axes:
    """The change of every task's error against a baseline, in %: left is better.

    A large mark is the mean over the seeds, a small one a seed. A seed is compared with the same seed of the baseline,
    so what both share (the data, the start) does not count.

    Args:
        errors: from a method's name to its (seeds, T) errors, or (T,) of one run; lower is better.
        ax: the axis to draw into; None makes one.
        baseline: the method to compare with; None takes the first.
        names: the T tasks' names.

    Returns:
        The axis. Its last row is the mean change over the tasks. Changes that differ much stand on a logarithmic axis,
        where half the error (-50 %) and twice the error (+100 %) are equally far from 0.

    Raises:
        ValueError: for a wrong shape, seeds that the baseline lacks, a baseline that is unknown or not positive, or a
            single method.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> errors = {"equal": [[4.0, 1.0], [2.0, 1.0]], "GradNorm": [[2.0, 1.5], [1.0, 1.0]]}
        >>> ax = plot.results(errors, Figure().subplots(), names=["depth", "seg"])
        >>> [round(x) for x in ax.lines[0].get_xdata()]  # depth, seg, and their mean
        [-50, 25, -12]
    """
    read, against = _errors_of(errors, baseline)
    tasks = labels(names, read[against].shape[1])
    changes = {name: _changes(values, read[against]) for name, values in read.items() if name != against}
    rows = [*short_names(tasks), "mean of all"]
    ax = new_axes(ax, (6.8, 1.5 + 0.42 * len(rows)))
    make_room(ax)
    tidy(ax, x=f"change of the error against {against} (%)", y="")
    together = np.concatenate([change.ravel() for change in changes.values()])
    together = together[np.isfinite(together)]
    log = len(together) and together.min() > -100 and 100 + together.max() > SPAN * (100 + together.min())
    for k, (name, change) in enumerate(changes.items()):
        colour, _, marker = look(k)
        y = np.arange(len(rows)) + APART * ((k + 0.5) / len(changes) - 0.5)
        style: dict[str, Any] = {"linestyle": "none", "marker": marker, "color": colour}
        ax.plot(change.mean(0), y, **style, markersize=8, markeredgecolor=paper(ax), zorder=4, label=name)
        if len(change) > 1:
            small = {"markersize": 3.5, "alpha": 0.55, "zorder": 3, "label": "_seeds"}
            ax.plot(change.T, np.repeat(y[:, None], len(change), 1), **style | small)
    if log:
        ax.set_xlabel(f"change of the error against {against} (%, log-ratio axis)")
    _percent_axis(ax, log, together)
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, -1), max(right, 1))
    ax.axvspan(ax.get_xlim()[0], 0, color=look(2).colour, alpha=0.1, linewidth=0, zorder=0)
    ax.axvline(0, color=grey(ax, 0.8), linewidth=1.2, zorder=1)
    ax.axhline(len(tasks) - 0.5, color=grey(ax), linewidth=0.8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    for place, side, text in ((0, "left", "← better"), (1, "right", "worse →")):
        style = {"fontsize": font(), "color": ink(ax), "va": "bottom", "ha": side}
        ax.text(place, 1.01, text, transform=ax.transAxes, **style)
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, frameon=False, fontsize=font())
    seeds = max(map(len, changes.values()))
    if seeds > 1:
        ax.set_xlabel(f"{ax.get_xlabel()}\n(large: mean, small: each of {seeds} seeds)")
    return ax


def _changes(values: Array, reference: Array) -> Array:
    """(seeds, T + 1) in %, the last column their mean."""
    by_task = 100 * (values / reference - 1)
    return np.concatenate([by_task, by_task.mean(1, keepdims=True)], 1)


def _percent_axis(ax: Axes, log: Any, values: Array) -> None:
    """Signed percents; where they differ much, as the logarithm of the ratio that they stand for."""
    if log:
        forward = lambda change: np.log(np.maximum(100 + np.asarray(change, dtype=float), 1e-6) / 100)
        ax.set_xscale("function", functions=(forward, lambda place: 100 * (np.exp(place) - 1)))
        low, high = 1 + values.min() / 100, 1 + values.max() / 100
        ticks = [1.0]
        for ratio in sorted(RATIOS, key=lambda ratio: abs(np.log(ratio))):  # from the baseline outwards, as fits
            apart = min(abs(np.log(ratio / tick)) for tick in ticks)
            if 0.8 * low < ratio < 1.25 * high and apart > 0.09 * np.log(high / low):
                ticks.append(ratio)
        ax.xaxis.set_major_locator(FixedLocator([100 * (ratio - 1) for ratio in ticks]))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if abs(value) < 1e-9 else f"{value:+.0f}"))


def _errors_of(errors: Any, baseline: str | None) -> tuple[dict[str, Array], str]:
    """(seeds, T) of every method, and the name of the baseline, checked."""
    if not isinstance(errors, Mapping) or len(errors) < 2:
        raise ValueError(f"errors={type(errors).__name__} must be a dict of at least two methods, from name to errors")
    if len(errors) > MOST_NAMED + 1:
        raise ValueError(f"errors has {len(errors)} methods; more than {MOST_NAMED + 1} cannot be told apart")
    read = {str(name): np.atleast_2d(array(values, f"errors[{name!r}]")) for name, values in errors.items()}
    against = next(iter(read)) if baseline is None else baseline
    if against not in read:
        raise ValueError(f"baseline={against!r} is none of the methods: {', '.join(read)}")
    for name, values in read.items():
        if values.ndim != 2 or 0 in values.shape or values.shape != read[against].shape:
            raise ValueError(
                f"errors[{name!r}] has shape {values.shape}, the baseline's {read[against].shape}: "
                "both must be (seeds, T), of the same seeds"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"errors[{name!r}] is not finite in some run: leave these seeds out of all methods")
    if (read[against] <= 0).any():
        raise ValueError(f"errors[{against!r}], the baseline, must be positive: a change is relative to it")
    return read, against
