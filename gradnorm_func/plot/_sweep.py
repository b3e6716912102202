"""What a sweep found, as a map over two hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle

from gradnorm_func.plot._draw import SPAN, make_room, new_axes, plain_numbers
from gradnorm_func.plot._maps import FRAME, MOST_NUMBERS, cell_texts, colour_bar
from gradnorm_func.plot._read import Array, array
from gradnorm_func.plot._theme import font


def sweep(
    result: Any,
    ax: Axes | None = None,
    *,
    x: str | None = None,
    y: str | None = None,
    label: str = "metric",
    limits: tuple[float, float] | None = None,
) -> Axes:
    """A sweep's metric over two hyperparameters; the best cell is framed, and said to be at the edge if it is.

    A cell holds the mean over the seeds, and below it their range; (2/3) means that the metric of one seed out of three
    is not finite. A best cell at the edge of the grid tells that the grid is too small.

    Args:
        result: what `gn.sweep` returns with `metric=`, or a dict of the same columns: both hyperparameters and
            "metric", each (R,). A third hyperparameter is an error: draw one of its values at a time.
        ax: the axis to draw into; None makes one.
        x, y: the hyperparameter along each side; None takes them as the grid names them, the first upwards.
        label: what the metric is, with its unit; lower is better.
        limits: the metric where the colours begin and end, to compare two maps; None takes those of the cells.

    Returns:
        The axis, with values that grow to the right and upwards.

    Raises:
        ValueError: for a result without metric, an unknown name, or another number of hyperparameters than two.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from gradnorm_func import plot
        >>> runs = {"alpha": [0, 1, 2, 0, 1, 2], "lr": [0.1] * 3 + [0.2] * 3, "metric": [5.0, 4.0, 3.0, 4.0, 3.0, 2.0]}
        >>> ax = plot.sweep(runs, Figure().subplots(), label="error")
        >>> ax.get_xlabel()
        'lr\\n(framed: the best, at the edge of the grid in alpha)'
    """
    table = _table(result)
    rows, columns = _sides(table, x, y)
    metric = table["metric"]
    ys, xs = (np.unique(table[name]) for name in (rows, columns))
    means, texts = np.full((len(ys), len(xs)), np.nan), [["" for _ in xs] for _ in ys]
    for i, j in np.ndindex(means.shape):
        seeds = metric[(table[rows] == ys[i]) & (table[columns] == xs[j])]
        finite = seeds[np.isfinite(seeds)]
        means[i, j] = finite.mean() if len(finite) else np.nan
        texts[i][j] = _cell(seeds, finite)
    size = (min(2.8 + 1.0 * len(xs), 12), min(1.6 + 0.62 * len(ys), 10))
    ax = new_axes(ax, size)
    make_room(ax)
    low, high = (float(np.nanmin(means)), float(np.nanmax(means))) if limits is None else limits
    log = low > 0 and high > SPAN * low
    shades = matplotlib.colormaps["cividis_r"].with_extremes(bad=(0, 0, 0, 0))
    norm = LogNorm(low, high) if log else Normalize(low, high)
    norm.clip = limits is not None  # beyond them the last colour
    image = ax.imshow(means, cmap=shades, norm=norm, aspect="auto", origin="lower")
    ax.grid(False)
    ax.set_xticks(range(len(xs)), [f"{value:g}" for value in xs])
    ax.set_yticks(range(len(ys)), [f"{value:g}" for value in ys])
    ax.tick_params(length=0, labelsize=font())
    if max(means.shape) <= MOST_NUMBERS:
        cell_texts(ax, image, means, texts)
    bar = colour_bar(ax, image, f"{label} (lower is better)")
    if log:
        plain_numbers(bar.ax.yaxis, low, high)
    best = tuple(int(k) for k in np.unravel_index(int(np.nanargmin(means)), means.shape))
    ax.add_patch(
        Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor=FRAME, linewidth=3, clip_on=False)
    )
    sides = ((rows, best[0], len(ys)), (columns, best[1], len(xs)))
    edges = [name for name, k, count in sides if count > 2 and k in (0, count - 1)]
    where = f", at the edge of the grid in {', '.join(edges)}" if edges else ""
    ax.set_xlabel(f"{columns}\n(framed: the best{where})")
    ax.set_ylabel(rows)
    return ax


def _cell(seeds: Array, finite: Array) -> str:
    if not len(seeds):
        return ""
    if not len(finite):
        return "diverged"
    left = "" if len(finite) == len(seeds) else f" ({len(finite)}/{len(seeds)})"
    spread = f"\n{finite.min():.3g} to {finite.max():.3g}" if len(finite) > 1 else ""
    return f"{finite.mean():.3g}{left}{spread}"


def _table(result: Any) -> dict[str, Array]:
    """The columns (R,), without the seeds."""
    if isinstance(result, Mapping):
        columns = dict(result)
    elif isinstance(getattr(result, "runs", None), Mapping):
        columns = dict(result.runs) | {"metric": result.metric}
    else:
        raise ValueError(f"result={type(result).__name__} must be what gn.sweep returns, or a dict of columns")
    if isinstance(columns.get("metric", ()), tuple):
        raise ValueError("result has no metric to draw: pass gn.sweep(..., metric=lambda params: loss)")
    table = {str(name): array(column, f"result[{name!r}]") for name, column in columns.items() if name != "seed"}
    shapes = {name: column.shape for name, column in table.items()}
    if len(set(shapes.values())) > 1 or table["metric"].ndim != 1:
        raise ValueError(f"result has columns of shapes {shapes}; all must be (R,)")
    if not np.isfinite(table["metric"]).any():
        raise ValueError("the metric of every run is not finite, so there is nothing to draw")
    return table


def _sides(table: dict[str, Array], x: str | None, y: str | None) -> tuple[str, str]:
    """The names along y and x."""
    names = [name for name in table if name != "metric"]
    for side, name in (("x", x), ("y", y)):
        if name is not None and name not in names:
            raise ValueError(f"{side}={name!r} is none of the hyperparameters: {', '.join(names)}")
    varied = [name for name in names if name in (x, y) or len(np.unique(table[name])) > 1]
    varied += [name for name in names if name not in varied][: 2 - len(varied)] if len(varied) < 2 else []
    if len(varied) != 2 or (x is not None and x == y):
        raise ValueError(
            f"result varies {', '.join(varied) or 'nothing'}: a map has two hyperparameters; of more, draw one value "
            "of the others at a time"
        )
    rows = y if y is not None else next(name for name in varied if name != x)
    return rows, next(name for name in varied if name != rows)
