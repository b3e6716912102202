"""One figure of a whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradnorm_func.plot._conflicts import conflict_course
from gradnorm_func.plot._courses import grad_norms, inverse_rates, loss_ratios, weights
from gradnorm_func.plot._draw import new_figure
from gradnorm_func.plot._read import MissingNumbers, course, field, has_fields, labels
from gradnorm_func.plot._steps import steps_of
from gradnorm_func.plot._theme import grey

PANELS: list[tuple[Callable[..., Axes], str]] = [
    (weights, "what each loss is multiplied by"),
    (grad_norms, "how hard each task pulls"),
    (loss_ratios, "what is left of each loss"),
    (inverse_rates, "which tasks are slow (above 1)"),
]


def overview(
    history: Any,
    *,
    names: Any = None,
    smooth: int = 1,
    steps: Sequence[float] | None = None,
    log_x: bool = False,
) -> Figure:
    """Weights, gradient norms, losses, and training rates of one run, or in place of rates the conflicts.

    Args:
        history: of any balancer, as `gn.train` returns it; see the module's docstring. One with cosines (RotoGrad's)
            shows conflicts in place of training rates.
        names: the T tasks' names.
        smooth, steps, log_x: as in `weights`.

    Returns:
        The figure, with four axes. A panel for which the history has no numbers says so.

    Raises:
        ValueError: for something that is not a history, or a wrong number of names.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> from gradnorm_func import plot
        >>> loss_fn = lambda w, x: {"fit": (x @ w - 1).square().mean(), "size": 100 * w.square().sum()}
        >>> history = gn.train(torch.full((3,), 0.5), loss_fn, [torch.eye(3)] * 50).history
        >>> figure = plot.overview(history, names=["fit", "size"])
        >>> len(figure.axes)
        4
    """
    if not has_fields(
        history[0] if isinstance(history, (list, tuple)) and history and not has_fields(history) else history
    ):
        raise ValueError(
            f"history={type(history).__name__} has no fields: give what gn.train returns, or a list of Infos"
        )
    panels = [*PANELS]
    if field(history, "cosines", required=False) is not None:
        panels[-1] = (conflict_course, "which tasks pull against each other (below 0)")
    for known in ("losses", "weights"):  # what is wrong is said before there is a figure
        if field(history, known, required=False) is not None:
            count, tasks = course(history, known).shape
            labels(names, tasks)
            steps_of(steps, count, log_x)
    figure = new_figure((11, 7))
    for ax, (panel, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        try:
            panel(history, ax, names=names, smooth=smooth, steps=steps, log_x=log_x)
            ax.set_title(title)
        except MissingNumbers as error:
            ax.set_axis_off()
            ax.text(0.5, 0.5, fill(f"{panel.__name__}: {error}", 45), ha="center", va="center", color=grey(ax, 0.7))
    return figure
