"""What every state starts with: a number of tasks, and a vector for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core.loss import task_vector


def check_num_tasks(num_tasks: int) -> None:
    """Balancing needs two tasks."""
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 2:
        raise ValueError(f"num_tasks={num_tasks!r}: balancing needs an integer number of tasks, at least 2")


def start_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a state; None is the default one."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point dtype")
    return dtype


def start_vector(
    name: str, entries: Any, num_tasks: int, default: float, dtype: torch.dtype | None, device: Any
) -> Tensor:
    """(T,) of the user's own memory: T numbers in task order, a pytree like the losses, or a default for all."""
    check_num_tasks(num_tasks)
    dtype = start_dtype(dtype)
    if entries is None:
        return torch.full((num_tasks,), default, dtype=dtype, device=device)
    vector = task_vector(entries, name, dtype).detach().to(dtype=dtype, device=device, copy=True)
    if vector.shape[0] != num_tasks:
        raise ValueError(f"{name} has {vector.shape[0]} entries, but num_tasks={num_tasks}")
    return vector


def start_weights(num_tasks: int, weights: Any, dtype: torch.dtype | None, device: Any) -> Tensor:
    """(T,) positive weights, 1 for each task unless they are given."""
    vector = start_vector("weights", weights, num_tasks, 1.0, dtype, device)
    if weights is not None and not bool(((vector > 0) & vector.isfinite()).all()):
        raise ValueError(f"weights={weights!r} must be positive and finite; to leave a task out of a batch use mask=")
    return vector
