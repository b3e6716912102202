"""TaskStats: what one pass over a batch tells of the tasks, and how those of several batches merge."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree


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


def merge(*stats: TaskStats | None) -> TaskStats:
    r"""The stats of the union of several micro-batches, exactly.

    With :math:`\pi_m` the share of micro-batch m among the examples, losses and gradients are means,
    :math:`\sum_m \pi_m x_m`, and norms are taken afterwards, for the norm of a mean is not the mean of norms.
    At z every example has its own coordinates: :math:`\|g\|^2 = \sum_m \pi_m^2 \|g_m\|^2`.

    Merging is associative, so that a running stats is all that needs to be kept of the micro-batches so far.

    Args:
        stats: results of `measure` at the same parameters and weights, their losses being means over examples. Pass
            `num_examples=` to `measure` if the micro-batches are not of one size. None is skipped: nothing yet.

    Returns:
        TaskStats of the whole batch, in float32 at least: what is summed over many micro-batches should not be rounded
        to bfloat16 after each.

    Raises:
        ValueError: for no stats, or stats with norms alone taken at parameters (`measure(..., norms_only=True)`).

    Example:
        >>> import torch, gradnorm_func as gn
        >>> a = gn.TaskStats(torch.tensor([1.0, 2.0]), task_grads=torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        >>> b = gn.TaskStats(torch.tensor([3.0, 2.0]), task_grads=torch.tensor([[0.0, 4.0], [1.0, 0.0]]))
        >>> gn.merge(a, b).grad_norms
        tensor([2.5000, 1.0000])

        From a loader, with one running stats alive:

        >>> loss_fn, w = lambda w, x: [(x * w).mean(), (x - w).square().mean()], torch.tensor(2.0)
        >>> running = None
        >>> for x in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0])):
        ...     running = gn.merge(running, gn.measure(w, loss_fn, x, num_examples=len(x)))
        >>> running.losses, running.grad_norms
        (tensor([6.0000, 4.5000]), tensor([3., 2.]))
    """
    parts = [sums_of(s) for s in stats if s is not None]
    if not parts:
        raise ValueError("merge() of nothing: give it at least one TaskStats")
    return stats_of(parts[0] if len(parts) == 1 else tree.tree_map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts))


class Sums(NamedTuple):
    """What adds up over disjoint parts of a batch, n being a part's number of examples; float32 at least."""

    examples: Tensor  # () n
    losses: Any  # (T,) n L_i
    square_norms: Any  # (T,) n² ‖g_i‖² at z; n ‖g_i‖² where the mean of the parts' squares is asked for; or ()
    example_norms: Any  # (T,) n² times the mean over examples, at z
    task_grads: Any  # n ∇_W L_i, where norms are to be taken of the mean
    grads: Any  # n ∇_θ Σ w_i L_i


def sums_of(stats: TaskStats, *, square_norms: bool = False) -> Sums:
    """The part that a batch has in the sums; `square_norms` replaces task gradients at parameters by squared norms."""
    measured = [_wide(leaf) for leaf in tree.flatten((stats.losses, stats.grads))[0]]
    # Counts as exact as what they multiply: float64 stats stay so.
    dtype = reduce(torch.promote_types, (leaf.dtype for leaf in measured), torch.float32)
    count = torch.as_tensor(stats.num_examples, device=measured[0].device, dtype=dtype)

    def times(factor: Tensor, part: Any) -> Any:
        return tree.tree_map(lambda leaf: _wide(leaf) * factor.to(_wide(leaf).dtype), part)

    losses, grads = times(count, stats.losses), times(count, stats.grads)
    has_norms = len(tree.flatten(stats.grad_norms)[0]) > 0
    if isinstance(stats.example_norms, Tensor):
        squares = tree.tree_map(torch.square, times(count, stats.grad_norms))
        return Sums(count, losses, squares, times(count.square(), stats.example_norms), (), grads)
    if square_norms and has_norms:
        squares = times(count, tree.tree_map(lambda leaf: _wide(leaf).square(), stats.grad_norms))
        return Sums(count, losses, squares, (), (), grads)
    task_grads = times(count, stats.task_grads)
    if has_norms and not tree.flatten(task_grads)[0]:
        raise ValueError(
            "these stats hold norms at parameters but no gradients, and the norm of a mean is not the mean of norms: "
            "measure with norms_only=False"
        )
    return Sums(count, losses, (), (), task_grads, grads)


def stats_of(sums: Sums) -> TaskStats:
    """The stats of the batch whose parts have been summed."""

    def divided(part: Any) -> Any:
        return tree.tree_map(lambda leaf: leaf / sums.examples.to(leaf.dtype), part)

    task_grads = divided(sums.task_grads)
    leaves = tree.flatten(task_grads)[0]
    norms: Any = tree.safe_sqrt(tree.square_norms(leaves)) if leaves else ()
    at_z = isinstance(sums.example_norms, Tensor)
    if tree.flatten(sums.square_norms)[0]:
        root = tree.tree_map(tree.safe_sqrt, sums.square_norms if at_z else divided(sums.square_norms))
        norms = divided(root) if at_z else root
    example_norms = divided(divided(sums.example_norms))
    return TaskStats(divided(sums.losses), norms, example_norms, task_grads, divided(sums.grads), sums.examples)


def _wide(leaf: Any) -> Tensor:
    tensor = torch.as_tensor(leaf)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
