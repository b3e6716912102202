"""Bridges to the stateful world: `.grad` for torch.optim, checkpoints, loggers.

The one module that writes to its arguments, and only in `write_grads`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gradnorm_func._core import tree
from gradnorm_func._core.tasks import Tasks, task_names
from gradnorm_func._core.tree import Tensors

State = TypeVar("State", bound=Tensors)


class Info(Protocol):
    """What every balancer's Info has: a NamedTuple of tensors, the losses among them."""

    @property
    def losses(self) -> Any:
        """(T,)"""

    def _asdict(self) -> dict[str, Any]: ...


def write_grads(target: nn.Module | Iterable[Tensor] | Tensors, grads: Tensors) -> None:
    r"""Writes gradients into `.grad`, for any `torch.optim` optimizer to step on.

    Args:
        target: a module, the dict of its named parameters, or any pytree of leaf tensors.
        grads: gradients in the structure of the params that they were taken of; for a module, a dict by name.

    Raises:
        ValueError: if the structures or shapes differ.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> model = torch.nn.Linear(2, 1)
        >>> gn.write_grads(model, {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
        >>> model.weight.grad
        tensor([[1., 1.]])
    """
    params = dict(target.named_parameters()) if isinstance(target, nn.Module) else target
    params = list(params) if isinstance(params, Iterator) else params  # model.parameters()
    leaves, treedef = tree.flatten(params)
    grad_leaves, grad_treedef = tree.flatten(grads)
    if treedef != grad_treedef:
        raise ValueError(
            f"grads has the paths {tree.paths(grads)[:4]}..., target {tree.paths(params)[:4]}...: "
            "take the gradients of the same params"
        )
    for path, leaf, grad in zip(tree.paths(params), leaves, grad_leaves, strict=True):
        if leaf.shape != grad.shape:
            raise ValueError(f"grads[{path!r}] has shape {tuple(grad.shape)}, the parameter {tuple(leaf.shape)}")
    for leaf, grad in zip(leaves, grad_leaves, strict=True):
        new = grad.detach().to(leaf.dtype)
        # In the layout of the parameter, as autograd would write it: fused optimizers read the memory as it lies.
        leaf.grad = new if new.stride() == leaf.stride() else torch.empty_like(leaf).copy_(new)


def state_dict(state: Tensors) -> dict[str, Tensor]:
    r"""A state as a flat dict of tensors, which `torch.save` writes and `torch.load(weights_only=True)` reads.

    Args:
        state: the state of any balancer.

    Returns:
        dict from dotted path to a copy of the tensor.

    Example:
        >>> import gradnorm_func as gn
        >>> sorted(gn.state_dict(gn.init_state(2)))[:3]
        ['initial_losses', 'moments.mean', 'moments.square']
    """
    return {path: leaf.detach().clone() for path, leaf in zip(tree.paths(state), tree.flatten(state)[0], strict=True)}


def load_state(template: State, saved: Mapping[str, Tensor]) -> State:
    r"""The state that `state_dict` wrote, bit for bit.

    Args:
        template: a state of the same balancer, tasks and optimizer, such as a fresh `init_state(...)`; its device
            and dtype are those of the result.
        saved: what `state_dict` returned.

    Returns:
        A state of the type of `template`.

    Raises:
        ValueError: if names or shapes differ.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> state = gn.init_state(2, weights=[0.5, 1.5])
        >>> gn.load_state(gn.init_state(2), gn.state_dict(state)).weights
        tensor([0.5000, 1.5000])
    """
    names, (leaves, treedef) = tree.paths(template), tree.flatten(template)
    if set(names) != set(saved):
        odd = sorted(set(names) ^ set(saved))
        raise ValueError(
            f"the checkpoint and the template differ in {odd}: make the template with the same balancer and optimizer"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if saved[name].shape != leaf.shape:
            raise ValueError(
                f"checkpoint entry {name!r} has shape {tuple(saved[name].shape)}, the template {tuple(leaf.shape)}: "
                "was it made for another number of tasks?"
            )
    new = [
        saved[name].to(dtype=leaf.dtype, device=leaf.device, copy=True)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    state: State = tree.unflatten(treedef, new)
    return state


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
    len(tasks)
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
    for kind, values in (("loss", info.losses), ("gradient", getattr(info, "grad_norms", info.losses))):
        bad = [repr(task) for task, ok in zip(tasks, values.isfinite().tolist(), strict=True) if not ok]
        if bad:
            raise FloatingPointError(
                f"the {kind} of {', '.join(bad)} is not finite: the state was left as it was, so skip this step's "
                "gradients too; if it comes again, lower the learning rate, or leave the task out with mask="
            )
    raise FloatingPointError(
        "this step's update is not finite, though losses and gradients are: the state was left as it was; "
        "lower the learning rate of the rotations or weights"
    )


def _task_names(info: Info, names: Tasks | None) -> list[str]:
    count: int = info.losses.shape[0]
    if names is None:
        return task_names(info.losses)
    tasks = task_names(names)
    if len(tasks) != count:
        raise ValueError(f"names has {len(tasks)} entries, but there are {count} tasks")
    return tasks
