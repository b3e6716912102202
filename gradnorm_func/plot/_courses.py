"""Per-task quantities over training: weights, gradient norms, losses, training rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradnorm_func.plot._draw import MOST_NAMED, curves, new_axes
from gradnorm_func.plot._read import Array, array, check_same, course, field, has_fields, labels, running_mean
from gradnorm_func.plot._steps import binned, steps_of
from gradnorm_func.plot._theme import grey, look

LOSS_RATIO = r"loss $L_i\,/\,L_i(0)$"


def weights(
    history: Any,
    ax: Axes | None = None,
    *,
    names: Any = None,
    smooth: int = 1,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
) -> Axes:
    r"""The task weights :math:`w_i` over training.

    Args:
        history: of any balancer, or (steps, T) weights; see the module's docstring.
        ax: the axis to draw into; None makes one.
        names: the T tasks' names.
        smooth: mean of that many steps.
        steps: at which steps the numbers were taken; None counts 0, 1, ....
        log_x: a logarithmic x axis; without `steps` it counts from 1.

    Returns:
        The axis.

    Raises:
        ValueError: for a wrong shape, no finite number, or a wrong number of names.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.weights(torch.tensor([[1.0, 1.0], [0.5, 1.5]]), Figure().subplots(), names=["depth", "seg"])
        >>> ax.get_ylabel()
        'task weight $w_i$'
    """
    return _course(
        course(history, "weights"), history, ax, names, "task weight $w_i$", smooth=smooth, steps=steps, log_x=log_x
    )


def loss_ratios(
    history: Any,
    ax: Axes | None = None,
    *,
    names: Any = None,
    smooth: int = 1,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
    initial_losses: Any = None,
) -> Axes:
    r"""The losses relative to their start, :math:`\tilde L_i = L_i / L_i(0)`.

    Args:
        history: of any balancer, or (steps, T) losses.
        ax, names, smooth, steps, log_x: as in `weights`.
        initial_losses: L(0), T numbers, such as `state.initial_losses`; None takes each task's first loss that is
            finite and not 0.

    Returns:
        The axis.

    Raises:
        ValueError: as `weights` does.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.loss_ratios(torch.tensor([[4.0, 10.0], [2.0, 9.0]]), Figure().subplots())
        >>> [line.get_ydata().tolist() for line in ax.lines[:2]]
        [[1.0, 0.5], [1.0, 0.9]]
    """
    ratios = _ratios(course(history, "losses"), initial_losses)
    return _course(ratios, history, ax, names, LOSS_RATIO, smooth=smooth, steps=steps, log_x=log_x)


def inverse_rates(
    history: Any,
    ax: Axes | None = None,
    *,
    names: Any = None,
    smooth: int = 1,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
    initial_losses: Any = None,
) -> Axes:
    r"""The relative inverse training rates, :math:`r_i = \tilde L_i / \mathrm{mean}_j \tilde L_j`: above 1 is slow.

    Args:
        history: of any balancer. GradNorm records r_i; of other methods, and of (steps, T) losses, they are computed.
        ax, names, smooth, steps, log_x: as in `weights`.
        initial_losses: as in `loss_ratios`, if they are computed.

    Returns:
        The axis.

    Raises:
        ValueError: as `weights` does.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> ax = plot.inverse_rates(torch.tensor([[4.0, 10.0], [1.0, 7.5]]), Figure().subplots())
        >>> [line.get_ydata().tolist() for line in ax.lines[:2]]
        [[1.0, 0.5], [1.0, 1.5]]
    """
    if initial_losses is None and field(history, "inverse_rates", required=False) is not None:
        rates = course(history, "inverse_rates")
    else:
        ratios = _ratios(course(history, "losses"), initial_losses)
        present = np.isfinite(ratios)
        count = np.maximum(present.sum(1, keepdims=True), 1)
        mean = np.where(present, ratios, 0.0).sum(1, keepdims=True) / count
        rates = np.where(mean == 0, 1.0, ratios / np.where(mean == 0, 1.0, mean))
    kept: dict[str, Any] = {"smooth": smooth, "steps": steps, "log_x": log_x, "centre": 1.0}
    return _course(rates, history, ax, names, "inverse training rate $r_i$", **kept)


def grad_norms(
    history: Any,
    ax: Axes | None = None,
    *,
    names: Any = None,
    smooth: int = 1,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
) -> Axes:
    r"""The weighted gradient norms :math:`G_i = w_i \|\nabla_W L_i\|` and, if there are any, their targets.

    A target is a wide pale band of its task's colour, so a task that is where GradNorm wants it lies on its band. Of
    many tasks, one grey area holds all targets.

    Args:
        history: of any balancer that measures norms, or (steps, T) numbers :math:`G_i`.
        ax, names, smooth, steps, log_x: as in `weights`.

    Returns:
        The axis.

    Raises:
        ValueError: as `weights` does, and for a history of `gn.static()` without `norms=True`.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> history = {"weights": torch.tensor([[2.0, 1.0]]), "grad_norms": torch.tensor([[3.0, 5.0]])}
        >>> [line.get_ydata().tolist() for line in plot.grad_norms(history, Figure().subplots()).lines[:2]]
        [[6.0], [5.0]]
    """
    values, targets = course(history, "grad_norms"), None
    fields = history[0] if isinstance(history, (list, tuple)) and not has_fields(history) else history
    if has_fields(fields):
        of_tasks = course(history, "weights")
        check_same(values, of_tasks, "history.grad_norms", "history.weights")
        values = values * of_tasks
        targets = field(history, "targets", required=False)
    if targets is not None:
        check_same(values, targets, "history.grad_norms", "history.targets")
        targets = running_mean(targets, smooth)
    x, tasks = steps_of(steps, len(values), log_x), labels(names, values.shape[1], history)
    ax = new_axes(ax)
    if targets is not None:
        _draw_targets(ax, x, targets, log_x)
    said = "" if targets is None else "\n(pale: its target)"
    y = rf"gradient norm $G_i = w_i\,\|\nabla_W L_i\|${said}"
    return _course(values, history, ax, tasks, y, smooth=smooth, steps=steps, log_x=log_x)


def _draw_targets(ax: Axes, x: Array, targets: Array, log_x: bool) -> None:
    """A wide pale band of each task's colour; of many tasks one area for all."""
    drawn = binned(x, targets, log_x)
    if targets.shape[1] > MOST_NAMED:
        low, high = _extent(drawn.middle)
        ax.fill_between(drawn.x, low, high, color=grey(ax), alpha=0.25, linewidth=0, zorder=0, label="targets")
        return
    # A single step is a dash, for a line of one point is not seen.
    dash: dict[str, Any] = {"marker": "_", "markersize": 24, "markeredgewidth": 6} if len(x) == 1 else {}
    for i, target in enumerate(drawn.middle.T):
        ax.plot(drawn.x, target, color=look(i).colour, linewidth=6, alpha=0.25, zorder=0, label="_target", **dash)


def _extent(targets: Array) -> tuple[Array, Array]:
    """The smallest and largest target of every step."""
    empty = ~np.isfinite(targets).any(1)
    low, high = (np.where(np.isfinite(targets), targets, fill) for fill in (np.inf, -np.inf))
    return np.where(empty, np.nan, low.min(1)), np.where(empty, np.nan, high.max(1))


def _ratios(losses: Array, initial_losses: Any) -> Array:
    if initial_losses is None:
        usable = np.isfinite(losses) & (losses != 0)
        first = usable.argmax(0)
        initial = np.where(usable.any(0), losses[first, np.arange(losses.shape[1])], np.nan)
    else:
        initial = array(initial_losses, "initial_losses")
        if initial.shape != losses.shape[1:]:
            raise ValueError(f"initial_losses has shape {initial.shape}, but there are {losses.shape[1]} tasks")
        if (initial == 0).any():
            raise ValueError(f"initial_losses={initial.tolist()} must not be 0: losses are divided by them")
    return losses / initial


def _course(
    values: Array,
    history: Any,
    ax: Axes | None,
    names: Any,
    y: str,
    *,
    smooth: int,
    steps: Sequence[float] | None,
    log_x: bool,
    centre: float | None = None,
) -> Axes:
    """What all four have in common."""
    tasks, values = labels(names, values.shape[1], history), running_mean(values, smooth)
    steps_of(steps, len(values), log_x)  # before there is a figure
    ax = new_axes(ax)
    curves(ax, values, tasks, y, steps=steps, log_x=log_x, smooth=smooth, log=True, centre=centre)
    return ax
