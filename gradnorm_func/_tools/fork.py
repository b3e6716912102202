"""Plain autograd: one copy of the representation for each task, which makes every ∂L_i/∂z separate.

The step remains the caller's own `backward`, in the hooks of which a wrapper such as DDP or FSDP2 does its work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.tasks import in_task_order, task_vector
from gradnorm_func._core.tracing import inside_transform
from gradnorm_func._measure.plan import plain_sum


class _Fork(torch.autograd.Function):
    """T views of a tensor, whose gradients add up; unlike plain views, they refuse to be written to."""

    @staticmethod
    def forward(leaf: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(leaf.view_as(leaf) for _ in range(count))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)  # no zeros for a task that does not read z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        parts = [grad for grad in grads if grad is not None]
        return (plain_sum(parts) if parts else None), None


_Fork.forward.__signature__ = signature(_Fork.forward)  # type: ignore[attr-defined]  # torch asks for it at every call


def fork(z: Any, tasks: int | Mapping[str, Any] | Iterable[Any]) -> Any:
    r"""One copy of the representation z for each task, in the autograd graph, so that every ∂L_i/∂z can be seen.

    The values are those of z, and so are all gradients: a model forked inside or outside of its DDP or FSDP2 wrapper
    trains as before. The copies are views; to write to one in place (`ReLU(inplace=True)` first in a head) is an error.
    Inside a compiled model the graph breaks here: fork between compiled parts. A wrapper that returns other tensors
    than its module does (DDP with find_unused_parameters or static_graph; FSDP2 warns of views) must not be what hands
    the copies out: wrap trunk and heads, and fork between them.

    Args:
        z: what the tasks share: a tensor, or a pytree of tensors.
        tasks: the number of tasks; or what has an entry for each: a dict or ModuleDict of heads, their names, a list.

    Returns:
        A dict of copies by name, for names or what has keys; else a list. Their gradients are kept by the backward
        pass.

    Raises:
        ValueError: for fewer than two tasks, or what says no number of them.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> z = torch.ones(2, requires_grad=True)
        >>> a, b = gn.fork(z, 2)
        >>> (a.sum() + 3 * b.sum()).backward()
        >>> b.grad, z.grad
        (tensor([3., 3.]), tensor([4., 4.]))

        A method whose heads learn from their own losses, and whose weights are of this very step:

        >>> trunk, heads = torch.nn.Linear(3, 2), torch.nn.ModuleDict({k: torch.nn.Linear(2, 1) for k in ("a", "b")})
        >>> balancer = gn.mgda()
        >>> state, x = balancer.init(2), torch.ones(4, 3)
        >>> copies = gn.fork(trunk(x), heads)
        >>> losses = {name: (head(copies[name]) - 1).square().mean() for name, head in heads.items()}
        >>> stats = gn.measure_losses(losses, copies, needs=balancer.needs)
        >>> state, info = balancer.balance(state, stats)
        >>> gn.weigh_trunk(copies, info.weights)
        >>> sum(losses.values()).backward()

        For heads that learn from the weighted sum, the last two lines are
        `gn.weighted_sum(losses, info.weights).backward()`. With a mask, the last one is
        `gn.weighted_sum(losses, mask).backward()`, so that the head of an absent task learns nothing.
    """
    count, names = _entries(tasks)
    if count < 2:
        raise ValueError(f"tasks={tasks!r} makes {count} copies; balancing needs at least two tasks")
    leaves, treedef = tree.flatten(z)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            f"z={type(z).__name__} is no tensor or pytree of tensors; the order of arguments is (z, tasks)"
        )
    by_leaf = [_Fork.apply(leaf, count) for leaf in leaves]  # type: ignore[no-untyped-call]
    if not inside_transform():
        for copy in (copy for row in by_leaf for copy in row if copy.requires_grad):
            copy.retain_grad()
    single = isinstance(z, Tensor)
    copies = [by_leaf[0][i] if single else tree.unflatten(treedef, [row[i] for row in by_leaf]) for i in range(count)]
    return copies if names is None else dict(zip(names, copies, strict=True))


def _entries(tasks: Any) -> tuple[int, list[Any] | None]:
    """How many tasks there are, and their names, if they have some."""
    if isinstance(tasks, int):
        return tasks, None
    if isinstance(tasks, (str, Tensor)) or not isinstance(tasks, Iterable):
        raise ValueError(
            f"tasks={type(tasks).__name__} says no number of tasks: the order of arguments is (z, tasks), and tasks a "
            "number, the heads, or a list of names"
        )
    entries = list(tasks.keys() if hasattr(tasks, "keys") else tasks)  # a ModuleDict is no Mapping
    return len(entries), entries if hasattr(tasks, "keys") or all(isinstance(x, str) for x in entries) else None


def weigh_trunk(copies: Any, weights: Tensor | Mapping[str, Any]) -> None:
    r"""Weighs the tasks between heads and trunk, which gets :math:`\sum_i w_i \, \partial L_i / \partial z`.

    Call it before the backward pass of :math:`\sum_i L_i`, over the tasks that are present: each head then learns from
    its own loss at weight 1, as most gradient methods are published, and as weights that may be negative need.

    Args:
        copies: from `fork`, of a forward pass whose backward pass is still to come.
        weights: (T,) in task order, such as `info.weights`; or by the names of the copies.

    Raises:
        ValueError: for another number of weights than of copies, other names, or losses in place of copies.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> z, head = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> a, b = gn.fork(z, 2)
        >>> gn.weigh_trunk([a, b], torch.tensor([0.5, -2.0]))
        >>> (head @ a + b.sum()).backward()
        >>> z.grad, head.grad
        (tensor([-1.5000, -1.5000]), tensor([1., 1.]))
    """
    tasks = [copies[name] for name in sorted(copies)] if isinstance(copies, Mapping) else list(copies)
    if any(isinstance(copy, Tensor) and copy.ndim == 0 for copy in tasks):
        raise ValueError("copies are scalars: give the copies of z that gn.fork has made, not the losses")
    named = dict.fromkeys(copies, 0.0) if isinstance(copies, Mapping) else [0.0] * len(tasks)
    weights = task_vector(in_task_order(named, "weights", weights), "weights")
    if weights.shape != (len(tasks),):
        raise ValueError(f"weights has shape {tuple(weights.shape)}, but there are {len(tasks)} copies")
    for copy, weight in zip(tasks, weights.detach().unbind(), strict=True):
        for leaf in tree.flatten(copy)[0]:
            if leaf.requires_grad:  # no gradient comes from a task that does not read z
                leaf.register_hook(lambda grad, weight=weight: None if grad is None else (weight * grad).to(grad.dtype))
