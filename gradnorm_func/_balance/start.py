"""What every state starts with: a number of tasks, and a vector for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core.loss import MultiTaskLoss
from gradnorm_func._core.tasks import Tasks, in_task_order, task_names, task_vector

NumTasks: TypeAlias = int | Tasks  # how many tasks there are, or what says so and names them


def task_count(num_tasks: NumTasks) -> int:
    """T, for balancing needs two tasks."""
    if isinstance(num_tasks, FunctionType):
        raise ValueError(
            f"num_tasks={num_tasks.__name__}: a plain function does not tell its tasks: give their number, "
            "init(2), or their names, init(['depth', 'seg'])"
        )
    known = isinstance(num_tasks, (MultiTaskLoss, Mapping, torch.nn.ModuleDict, list, tuple, Tensor))
    count = len(task_names(num_tasks)) if known else num_tasks
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        value = repr(num_tasks) if isinstance(num_tasks, (str, int, float)) else type(num_tasks).__name__
        raise ValueError(f"num_tasks={value}: balancing needs an integer number of tasks, at least 2")
    return count


def start_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a state, float32 at least: in bfloat16 most steps round to none. None is the default one."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point dtype")
    return torch.promote_types(dtype, torch.float32)


def start_vector(
    name: str, entries: Any, num_tasks: NumTasks, default: float, dtype: torch.dtype | None, device: Any
) -> Tensor:
    """(T,) of the user's own memory: T numbers in task order, a pytree like the losses, or a default for all."""
    count, dtype = task_count(num_tasks), start_dtype(dtype)
    if entries is None:
        return torch.full((count,), default, dtype=dtype, device=device)
    ordered = entries if isinstance(num_tasks, int) else in_task_order(num_tasks, name, entries)
    vector = task_vector(ordered, name, dtype).detach().to(dtype=dtype, device=device, copy=True)
    if vector.shape[0] != count:
        raise ValueError(f"{name} has {vector.shape[0]} entries, but num_tasks={count}")
    if isinstance(num_tasks, int) and not torch.compiler.is_compiling():
        setattr(vector, GIVEN, entries)  # nothing to compare the names with yet: the first step does
    return vector


# A state is tensors alone, so what was given by name waits as an attribute of its own tensor, gone after one step.
GIVEN = "_given_by_name"


def given_by_name(state: Any) -> dict[str, Any]:
    """What a fresh state was told by name, for a comparison with the tasks; a compiler does not ask."""
    if torch.compiler.is_compiling():
        return {}
    fields = ("weights", "initial_losses")
    return {name: getattr(getattr(state, name, None), GIVEN, None) for name in fields}


def start_weights(num_tasks: NumTasks, weights: Any, dtype: torch.dtype | None, device: Any) -> Tensor:
    """(T,) positive weights, 1 for each task unless they are given."""
    vector = start_vector("weights", weights, num_tasks, 1.0, dtype, device)
    if weights is not None and not bool(((vector > 0) & vector.isfinite()).all()):
        raise ValueError(f"weights={weights!r} must be positive and finite; to leave a task out of a batch use mask=")
    return vector
