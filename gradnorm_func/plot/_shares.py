"""Whose gradient it is that moves what is shared."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradnorm_func.plot._draw import MOST_NAMED, new_axes, tidy
from gradnorm_func.plot._names import End, name_ends
from gradnorm_func.plot._read import Array, check_same, course, field, has_fields, labels, running_mean
from gradnorm_func.plot._steps import BINS, STEP, set_steps, steps_of
from gradnorm_func.plot._theme import look, paper

LARGEST = 6  # of more than a dozen tasks, those with the largest shares are named


def shares(
    history: Any,
    ax: Axes | None = None,
    *,
    names: Any = None,
    smooth: int = 1,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
) -> Axes:
    r"""Each task's share of the gradient at W, :math:`w_i \|\nabla_W L_i\| / \sum_j w_j \|\nabla_W L_j\|`, stacked.

    Lengths alone are compared: gradients that oppose each other count like those that agree (`conflict_course`). Of a
    run of more than 600 steps, the mean of each of 300 bins is drawn.

    Args:
        history: of any balancer that measures norms, or (steps, T) numbers :math:`G_i`.
        ax, names, smooth, steps, log_x: as in `weights`.

    Returns:
        The axis, in %. The first task lies lowest.

    Raises:
        ValueError: as `grad_norms` does, and for a negative number.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.shares([[1.0, 3.0], [1.0, 1.0]], Figure().subplots(), names=["depth", "seg"])
        >>> [text.get_text() for text in ax.texts]
        ['depth 50 %', 'seg 50 %']
    """
    values, tasks, x = _shares_of(history, names, smooth, steps, log_x)
    ax = new_axes(ax)
    tidy(ax, x=STEP if smooth == 1 else f"{STEP} (mean of {smooth})", y="share of the gradient at W (%)")
    set_steps(ax, log_x)
    tops = np.cumsum(np.nan_to_num(values), axis=1)
    seen: Any = np.isfinite(values).any(1)
    tops = np.where(seen[:, None], tops, np.nan)
    if len(x) == 1:  # an area of one step has no width
        x, tops = x[0] + np.array([0.0, 0.1]), np.repeat(tops, 2, axis=0)
    for i, task in enumerate(tasks):
        low = tops[:, i - 1] if i else np.zeros(len(x)) + 0 * tops[:, 0]
        style: dict[str, Any] = {"color": look(i).colour, "edgecolor": paper(ax), "linewidth": 0.4, "zorder": 2}
        ax.fill_between(x, low, tops[:, i], **style, label=task)
    ax.set_ylim(0, 100)
    ax.grid(False)
    last = np.flatnonzero(seen)[-1]
    order = np.argsort(-np.nan_to_num(values[last]))
    named = sorted(order[: len(tasks) if len(tasks) <= MOST_NAMED else LARGEST])
    middles = [float(tops[last, i] - np.nan_to_num(values[last, i]) / 2) for i in named]
    texts = [f"{tasks[i]} {_percent(values[last, i])}" for i in named]
    ends = [
        End(text, (float(x[-1]), at), look(i)._replace(marker="s"))
        for text, at, i in zip(texts, middles, named, strict=True)
    ]
    left = len(tasks) - len(named)
    note = f"the {LARGEST} largest are named, {left} are not" if left else ""
    name_ends(ax, ends, (float(x[0]), float(x[-1])), note)
    return ax


def _percent(value: float) -> str:
    if not np.isfinite(value):
        return "absent"
    return "< 1 %" if 0 < value < 0.5 else f"{value:.0f} %"


def _shares_of(
    history: Any, names: Any, smooth: int, steps: Sequence[float] | None, log_x: bool
) -> tuple[Array, list[str], Array]:
    """Shares in % (points, T), the names, and the steps (points,)."""
    values = course(history, "grad_norms")
    if has_fields(history[0] if isinstance(history, (list, tuple)) and not has_fields(history) else history):
        of_tasks = field(history, "weights")
        assert of_tasks is not None
        check_same(values, of_tasks, "history.grad_norms", "history.weights")
        values = np.abs(of_tasks) * values  # the length of what a task adds, with a negative weight too
    if (values < 0).any():
        raise ValueError("history has a negative number: a share is one of lengths, which are 0 or more")
    values, tasks = running_mean(values, smooth), labels(names, values.shape[1], history)
    x = steps_of(steps, len(values), log_x)
    total = np.nansum(values, axis=1, keepdims=True)
    values = 100 * np.divide(values, total, where=total > 0, out=np.full_like(values, np.nan))
    if not np.isfinite(values).any():
        raise ValueError("history has no gradient that is not 0, so there is nothing to share")
    if len(x) > 2 * BINS:
        edges = np.geomspace(x[0], x[-1], BINS + 1) if log_x else np.linspace(x[0], x[-1], BINS + 1)
        starts = np.unique(np.searchsorted(x, edges[:-1]))[1:]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a bin without one finite number
            values = np.stack([np.nanmean(part, axis=0) for part in np.split(values, starts)])
        x = np.array([part.mean() for part in np.split(x, starts)])
    return values, tasks, x
