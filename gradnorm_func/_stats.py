"""TaskStats: what one pass over a batch tells of the tasks, and how the tellings of several batches merge."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func import _tree


class TaskStats(NamedTuple):
    """What a balancer may know of the T tasks. A field that was not measured is `()`.

    A caller who has losses and norms from elsewhere (classic autograd, a wrapped model, another framework)
    gives the first two: `balance(state, TaskStats(losses, grad_norms))`; both may be dicts.
    """

    losses: Any  # (T,) L_i
    grad_norms: Any = ()  # (T,) ‖∇_W L_i‖, unweighted; NaN for a task of weight 0 that was not measured
    example_norms: Any = ()  # (T,) mean over examples of ‖∂L_i/∂z_b‖, only where W is z
    task_grads: Any = ()  # W with a leading task axis: ∇_W L_i, only where W are parameters
    grads: Any = ()  # params: ∇_θ Σ w_i L_i
    num_examples: Any = 1.0  # () the share of this batch in a mean


def merge(*stats: TaskStats) -> TaskStats:
    r"""The stats of the union of several micro-batches, exactly.

    With :math:`\pi_m` the share of micro-batch m among the examples, losses and gradients are means,
    :math:`\sum_m \pi_m x_m`, and norms are taken afterwards, for the norm of a mean is not the mean of norms.
    At z every example has its own coordinates: :math:`\|g\|^2 = \sum_m \pi_m^2 \|g_m\|^2`.

    Args:
        stats: two or more results of `measure` at the same parameters and weights, their losses being means over
            examples. Pass `num_examples=` to `measure` if the micro-batches are not of one size.

    Returns:
        TaskStats of the whole batch; merging it with more stats again is exact too.

    Raises:
        ValueError: for no stats, or stats with norms alone taken at parameters (`measure(..., norms_only=True)`).

    Example:
        >>> import torch, gradnorm_func as gn
        >>> a = gn.TaskStats(torch.tensor([1.0, 2.0]), task_grads=torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        >>> b = gn.TaskStats(torch.tensor([3.0, 2.0]), task_grads=torch.tensor([[0.0, 4.0], [1.0, 0.0]]))
        >>> gn.merge(a, b).grad_norms
        tensor([2.5000, 1.0000])
    """
    if not stats:
        raise ValueError("merge() of nothing: give it at least one TaskStats")
    # The shares as exact as what they multiply: float64 stats stay so.
    measured = [leaf.dtype for leaf in _tree.flatten((stats[0].losses, stats[0].grads))[0]]
    dtype = reduce(torch.promote_types, measured, torch.float32)
    counts = [torch.as_tensor(s.num_examples, dtype=dtype) for s in stats]
    total = torch.stack(counts).sum()
    shares = [count / total for count in counts]

    def mean(*leaves: Tensor) -> Tensor:
        terms = [share.to(leaf.dtype) * leaf for share, leaf in zip(shares, leaves, strict=True)]
        return torch.stack(terms).sum(0) if len(terms) > 2 else sum(terms[1:], terms[0])

    def quadrature(*leaves: Tensor) -> Tensor:
        terms = [(share.to(leaf.dtype) * leaf).square() for share, leaf in zip(shares, leaves, strict=True)]
        return _tree.safe_sqrt(sum(terms[1:], terms[0]))

    first = stats[0]
    norms: Any
    example_norms: Any = ()
    losses, task_grads, grads = (
        _tree.tree_map(mean, *parts) for parts in zip(*((s.losses, s.task_grads, s.grads) for s in stats), strict=True)
    )
    if _tree.flatten(task_grads)[0]:
        norms = _tree.safe_sqrt(_tree.square_norms(_tree.flatten(task_grads)[0]))
    elif isinstance(first.example_norms, Tensor):
        norms = quadrature(*(s.grad_norms for s in stats))
        # Of each example's gradient the mean loss takes the share π_m, and of the examples themselves again π_m.
        example_norms = sum(
            (
                share.to(s.example_norms.dtype).square() * s.example_norms
                for share, s in zip(shares, stats, strict=True)
            ),
            torch.zeros_like(first.example_norms),
        )
    elif isinstance(first.grad_norms, Tensor):
        raise ValueError(
            "these stats hold norms at parameters but no gradients, and the norm of a mean is not the mean of norms: "
            "measure with norms_only=False"
        )
    else:
        norms = ()
    return TaskStats(losses, norms, example_norms, task_grads, grads, total)
