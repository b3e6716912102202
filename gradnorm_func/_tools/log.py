"""What one reads of a step: its Info as the flat dict of a logger, and whether the step was refused."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.tasks import Tasks, task_names


class Info(Protocol):
    """What every balancer's Info has: a NamedTuple of tensors, the losses among them."""

    @property
    def losses(self) -> Any:
        """(T,)"""

    def _asdict(self) -> dict[str, Any]: ...


def log_dict(info: Info, names: Tasks | None = None, *, prefix: str = "") -> dict[str, Tensor]:
    r"""An Info as a flat dict of 0-d tensors, for TensorBoard, W&B and the like.

    Args:
        info: the Info of one step of any balancer.
        names: task names: a list, or what `task_names` takes, such as the loss_fn; by default "0", "1", ....
        prefix: put before every name.

    Returns:
        dict: "weights/depth", "grad_norms/depth", ..., "total_loss", "finite", and "memory.sums/depth" of what a method
        remembers. Nothing is copied to the host here: it is the logger that waits for the device.

    Raises:
        ValueError: if there are not as many names as tasks.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> _, info = gn.gradnorm_balance(gn.init_state(2), gn.TaskStats({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 1.0}))
        >>> gn.log_dict(info, ["a", "b"])["grad_norms/a"]
        tensor(3.)
    """
    tasks = _task_names(info, names)
    flat: dict[str, Tensor] = {}
    for path, leaf in zip(tree.paths(info), tree.flatten(info)[0], strict=True):
        value, name = leaf.detach(), prefix + path
        if value.ndim == 0:
            flat[name] = value.float() if value.dtype == torch.bool else value  # loggers average, and warn of bools
        elif value.shape == (len(tasks), len(tasks)):  # between tasks: the pairs, once
            for (i, a), (j, b) in itertools.combinations(enumerate(tasks), 2):
                flat[f"{name}/{a}-{b}"] = value[i, j]
        else:  # per task, or something else that a method remembers
            labels = tasks if value.shape == (len(tasks),) else range(value.numel())
            flat |= {f"{name}/{label}": entry for label, entry in zip(labels, value.flatten().unbind(), strict=True)}
    return flat


def check_finite(info: Info, names: Tasks | None = None) -> None:
    r"""Raises if a step was refused because a loss or a gradient was not finite; the state of that step is the old one.

    It waits for the device, which the balancers themselves never do.

    Args:
        info: the Info of one step of any balancer.
        names: task names, as in `log_dict`.

    Raises:
        FloatingPointError: naming the tasks whose loss or gradient is not finite, and what to do.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> _, info = gn.gradnorm_balance(gn.init_state(2), gn.TaskStats([1.0, float("nan")], [1.0, 1.0]))
        >>> gn.check_finite(info, ["depth", "seg"])
        Traceback (most recent call last):
        FloatingPointError: the loss of 'seg' is not finite: ...
    """
    if bool(info._asdict()["finite"]):
        return
    tasks = _task_names(info, names)
    absent = (getattr(info, "weights", info.losses) == 0) & info.losses.isnan()
    for kind, values in (("loss", info.losses), ("gradient", getattr(info, "grad_norms", info.losses))):
        fine = (values.isfinite() | absent).tolist()
        bad = [repr(task) for task, ok in zip(tasks, fine, strict=True) if not ok]
        if bad:
            raise FloatingPointError(
                f"the {kind} of {', '.join(bad)} is not finite: the state was left as it was, so skip this step's "
                "gradients too; if it comes again, lower the learning rate, or leave the task out with mask="
            )
    raise FloatingPointError(
        "this step's update is not finite, though losses and norms of all present tasks are: the state was left as it "
        "was. If a mask left a task out, its loss may be any number but NaN, for 0 * NaN is NaN: replace missing "
        "labels. Else lower the learning rate of the rotations or weights"
    )


def _task_names(info: Info, names: Tasks | None) -> list[str]:
    count: int = info.losses.shape[0]
    if names is None:
        return task_names(info.losses)
    tasks = task_names(names)
    if len(tasks) != count:
        raise ValueError(f"names has {len(tasks)} entries, but there are {count} tasks")
    return tasks
