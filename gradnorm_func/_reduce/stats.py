"""TaskStats: what one pass over a batch tells of the tasks, and how the stats of several batches become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import (
    accum_dtype,
    brought,
    diagonal,
    full_precision,
    promoted,
    safe_sqrt,
    square_norms,
)
from gradnorm_func._core.tasks import keep_memory


class Stats(Protocol):
    """What a pass over a batch has measured. All of them merge in one way, whatever the method."""

    @property
    def num_examples(self) -> Any:
        """The share of this batch in a mean."""

    @property
    def grads(self) -> Any:
        """The gradients of the parameters; `()` where they were not asked for."""

    def powers(self) -> Mapping[str, int]:
        """Fields that add up over disjoint parts of a batch, each with the power of the part's share it is due."""

    def complete(self: S) -> S:
        """The same with the other fields, which do not add up, computed from those that do."""

    @property
    def _replace(self) -> Callable[..., Any]: ...


S = TypeVar("S", bound=Stats)


class TaskStats(NamedTuple):
    """What a balancer may know of the T tasks. A field that was not measured is `()`.

    A caller who has losses and norms from elsewhere (classic autograd, a wrapped model, another framework)
    gives the first two: `gradnorm_balance(state, TaskStats(losses, grad_norms))`; both may be dicts.
    """

    losses: Any  # (T,) L_i
    grad_norms: Any = ()  # (T,) ‖∇_W L_i‖, unweighted; NaN for a task of weight 0 that was not measured
    example_norms: Any = ()  # (T,) mean over examples of ‖∂L_i/∂z_b‖, only where W is z
    square_norms: Any = ()  # (T,) ‖∂L_i/∂z‖², only where W is z: there they add up
    gramian: Any = ()  # (T, T) ⟨∇_W L_i, ∇_W L_j⟩
    task_grads: Any = ()  # W with a leading task axis: ∇_W L_i, only where W are parameters
    grads: Any = ()  # params: ∇_θ Σ w_i L_i
    extra: Any = ()  # what a method has measured by itself: means over examples
    num_examples: Any = 1.0  # () the share of this batch in a mean

    def powers(self) -> Mapping[str, int]:
        """At z every example has coordinates of its own, so that squares and Gramians add up; at parameters the
        gradients themselves do, and what is quadratic in them is computed afterwards."""
        at_z = {"square_norms": 2, "example_norms": 2, "gramian": 2} if present(self.square_norms) else {}
        return {"losses": 1, "task_grads": 1, "grads": 1, "extra": 1, **at_z}

    def complete(self) -> TaskStats:
        """With norms, and at parameters the Gramian, of the gradients of the whole."""
        if present(self.square_norms):
            return self._replace(grad_norms=tree.tree_map(safe_sqrt, self.square_norms))
        rows = tree.flatten(self.task_grads)[0]
        if not rows:
            if present(self.grad_norms):
                raise ValueError(
                    "these stats hold norms at parameters but no gradients, and the norm of a mean is not the mean of "
                    "norms: measure with norms_only=False"
                )
            return self
        if not present(self.gramian):
            return self._replace(grad_norms=safe_sqrt(square_norms(rows)))
        gramian = gramian_of(rows)
        return self._replace(gramian=gramian, grad_norms=safe_sqrt(diagonal(gramian)))


def merge(*stats: S | None) -> S:
    r"""The stats of the union of several micro-batches, exactly.

    With :math:`\pi_m` the share of micro-batch m among the examples, losses and gradients are means,
    :math:`\sum_m \pi_m x_m`, and norms are taken afterwards, for the norm of a mean is not the mean of norms.
    At z every example has its own coordinates: :math:`G = \sum_m \pi_m^2 G_m`, for the Gramian and for squared norms.

    Merging is associative, so that a running stats is all that needs to be kept of the micro-batches so far.

    Args:
        stats: results of `measure` at the same parameters and weights, their losses being means over examples. Pass
            `num_examples=` to `measure` if the micro-batches are not of one size. None is skipped: nothing yet.

    Returns:
        Stats of the whole batch, in float32 at least: what is summed over many micro-batches should not be rounded
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
    parts = [part for part in stats if part is not None]
    if not parts:
        raise ValueError("merge() of nothing: give it at least one TaskStats")
    sums = [sums_of(part) for part in parts]
    total = sums[0] if len(sums) == 1 else tree.tree_map(lambda *leaves: sum(leaves[1:], leaves[0]), *sums)
    merged = mean_of(parts[0], total)
    keep_memory(getattr(merged, "losses", None), [getattr(part, "losses", None) for part in parts])
    return merged


def sums_of(stats: Stats) -> dict[str, Any]:
    """The part that a batch has in the sums: each field times n to its power, n being the number of examples."""
    fields = {name: getattr(stats, name) for name in stats.powers()}
    measured = [torch.as_tensor(leaf) for leaf in tree.flatten(fields)[0]]
    # Counts as exact as what they multiply: float64 stats stay so.
    count = brought(stats.num_examples, measured[0], accum_dtype(*measured))
    sums = {name: _times(count**power, fields[name]) for name, power in stats.powers().items()}
    return {**sums, "num_examples": count}


def mean_of(like: S, sums: Mapping[str, Any]) -> S:
    """The stats of the batch whose parts have been added up; `like` are those of any part."""
    count = sums["num_examples"]
    means = {name: _times(1 / count**power, sums[name]) for name, power in like.powers().items()}
    mean: S = like._replace(**means, num_examples=count)
    return mean.complete()


def gramian_of(rows: list[Tensor]) -> Tensor:
    """(T, T) inner products over all leaves (T, ...), in float32 at least; of complex ones those of their two parts."""
    parts = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in rows]
    flat = [promoted(leaf.reshape(leaf.shape[0], -1)) for leaf in parts]
    with full_precision(flat[0]):
        return sum((leaf @ leaf.mT for leaf in flat[1:]), flat[0] @ flat[0].mT)


def present(field: Any) -> bool:
    """Whether a field of stats was measured."""
    return not (isinstance(field, tuple) and field == ())


def _times(factor: Tensor, field: Any) -> Any:
    def scaled(leaf: Any) -> Tensor:
        x = promoted(torch.as_tensor(leaf))
        return x * factor.to(x.dtype)

    return tree.tree_map(scaled, field)
