"""What a history is: the numbers of one field over the steps, out of whatever form they come in."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradnorm_func._core.tasks import task_names

Array: TypeAlias = npt.NDArray[np.float64]

FIELDS = {"losses", "weights", "grad_norms", "targets", "inverse_rates", "cosines", "total_loss", "finite"}
DIMS = {"cosines": 2}  # axes of a field in one step; 1, the tasks, for all others


class MissingNumbers(ValueError):
    """The history of a method that has no such quantity, or did not measure it."""


def array(value: Any, what: str) -> Array:
    """Numbers of any kind, dtype and device in float64 on the host, without a graph."""
    if isinstance(value, Tensor):
        out: Array = value.detach().cpu().double().numpy()
        return out
    if isinstance(value, (list, tuple)) and any(isinstance(row, (Tensor, np.ndarray)) for row in value):
        rows = [array(row, what) for row in value]
        for i, row in enumerate(rows):
            if row.shape != rows[0].shape:
                raise ValueError(
                    f"{what}[{i}] has shape {row.shape}, {what}[0] {rows[0].shape}: all must have one shape"
                )
        return np.stack(rows)
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be read as numbers: {error}") from None


def has_fields(value: Any) -> bool:
    """Whether this is an Info, or a dict like one, and not plain numbers."""
    if isinstance(value, dict):
        return bool(FIELDS & set(value))
    return not isinstance(value, (Tensor, np.ndarray)) and hasattr(value, "_fields")


def field(history: Any, name: str, required: bool = True) -> Array | None:
    """One field, (steps, ...); None if the history has no such field and it is not required."""
    many = isinstance(history, (list, tuple)) and not has_fields(history)
    if many and len(history) == 0:
        raise ValueError("history is empty: there is no step to draw")
    if has_fields(history[0] if many else history):
        infos = list(history) if many else [history]
        if any(_get(info, name) is None for info in infos):
            if not required:
                return None
            there = [key for key in _keys(infos[0]) if _get(infos[0], key) is not None]
            raise MissingNumbers(
                f"history has no {name!r}, only {', '.join(there)}: it comes from a method that does not measure it; "
                "draw one of these, or give the numbers themselves"
            )
        values = array([_get(info, name) for info in infos] if many else _get(history, name), f"history.{name}")
        return values[None] if not many and values.ndim == DIMS.get(name, 1) else values
    if not required:
        return None
    if isinstance(history, dict):  # task name -> curve
        curves = {str(task): array(curve, f"history[{task!r}]") for task, curve in history.items()}
        if not curves or any(curve.ndim != 1 for curve in curves.values()):
            raise MissingNumbers(f"history has no {name!r}, only the keys {list(curves)}")
        lengths = {task: len(curve) for task, curve in curves.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"history has curves of unequal length, {lengths}: fill missing steps with NaN")
        return np.stack(list(curves.values()), 1)
    return array(history, name)


def course(history: Any, name: str) -> Array:
    """One per-task field over the steps, (steps, T), with something in it to see."""
    values = field(history, name)
    assert values is not None
    if values.ndim != 2 or 0 in values.shape:
        more = "; of runs stacked by vmap draw one at a time" if values.ndim == 3 else ""
        raise ValueError(f"{name} has shape {values.shape}; it must be (steps, T), with at least one of each{more}")
    if not np.isfinite(values).any():
        why = ": gn.static measures them only with norms=True" if name == "grad_norms" else ""
        raise MissingNumbers(f"{name} holds no finite number, so there is nothing to draw{why}")
    return values


def check_same(values: Array, other: Array, name: str, other_name: str) -> None:
    """Fields that are combined must be of one run."""
    if values.shape != other.shape:
        raise ValueError(
            f"{name} has shape {values.shape}, {other_name} {other.shape}: both must be (steps, T) of one history"
        )


def labels(names: Any, count: int, history: Any = None) -> list[str]:
    """The tasks' names, as many as there are tasks."""
    if names is None:
        is_curves = isinstance(history, dict) and not has_fields(history)
        return [str(task) for task in history] if is_curves else [f"task {i}" for i in range(count)]
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    out = list(names) if is_list else task_names(names)
    if len(out) != count:
        raise ValueError(f"names has {len(out)} entries, but there are {count} tasks")
    return out


def running_mean(values: Array, width: int) -> Array:
    """Mean of the finite values among the last `width` steps; a step that has none of its own stays a gap."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"smooth={width!r} must be a whole number of steps, at least 1 (no smoothing)")
    finite = np.where(np.isfinite(values), values, np.nan)
    if width == 1:
        return finite
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0.0), known.astype(np.float64)
    total, count = np.zeros_like(sums), np.zeros_like(counts)
    # Sums over windows of 1, 2, 4, ... steps, and of those the ones whose lengths add to the width: exact over decades,
    # which a difference of running sums is not.
    length, covered = 1, 0
    width = min(width, len(values))
    while length <= width:
        if width & length:
            total, count = total + _later(sums, covered), count + _later(counts, covered)
            covered += length
        sums, counts = sums + _later(sums, length), counts + _later(counts, length)
        length *= 2
    return np.where(known, total / np.maximum(count, 1), np.nan)


def _later(values: Array, steps: int) -> Array:
    """The same, that many steps later, after zeros."""
    return np.concatenate([np.zeros_like(values[:steps]), values[: len(values) - steps]])


def quantiles(samples: Array) -> Array:
    """(5, steps) of (samples, steps): lowest, lower quartile, median, upper quartile, highest of the finite ones."""
    ordered = np.sort(np.where(np.isfinite(samples), samples, np.nan), axis=0)  # NaN last
    last = np.isfinite(ordered).sum(0) - 1
    place = np.array([0, 0.25, 0.5, 0.75, 1])[:, None] * np.maximum(last, 0)
    below = np.floor(place).astype(np.int64)
    low, high = (np.take_along_axis(ordered, at, 0) for at in (below, np.minimum(below + 1, np.maximum(last, 0))))
    out: Array = low + (place - below) * (high - low)
    return out


def _keys(info: Any) -> list[str]:
    return [str(key) for key in (info if isinstance(info, dict) else info._fields)]


def _get(info: Any, name: str) -> Any:
    value = info.get(name) if isinstance(info, dict) else getattr(info, name, None)
    return None if isinstance(value, tuple) and value == () else value
