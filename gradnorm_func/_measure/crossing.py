"""What lies between heads and trunk: from the T gradients at z to the one cotangent that goes on.

Methods differ in their crossing and in nothing else. This is the crossing of all that weigh the tasks; RotoGrad has one
of its own. "Norms at W" and "which weights" are two questions: `norms` and `linear` answer the first, `Plan` the
second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gradnorm_func._core.loss import MultiTaskLoss, SharedLinear
from gradnorm_func._core.numerics import promoted
from gradnorm_func._measure import linear
from gradnorm_func._measure.norms import PerTask, stacked, stats_at_leaves, stats_at_z
from gradnorm_func._measure.plan import Plan, plain_sum, weighted_sum
from gradnorm_func._measure.tape import Tape
from gradnorm_func._reduce.stats import TaskStats


class Trunk(NamedTuple):
    """The shared part, run: parameters -> z."""

    tape: Tape
    z: list[Tensor]  # leaves, the first axis of which is that of the examples
    z_treedef: Any
    h_and_y: tuple[Tensor, ...]  # of a `shared_linear`, z = activation(y); nothing otherwise
    in_w: linear.Leaves | None  # what of that layer is W; None if W is anything else
    layer: list[Tensor]  # copies of these leaves, which it reads, to tell what else reads them
    trunk_losses: list[Tensor]  # losses of the trunk alone, which no head sees
    aux: Any


class AtZ(NamedTuple):
    """What has come back from the heads."""

    losses: Tensor  # (T,)
    seeds: Tensor  # (T,) the cotangents of the losses, which all gradients here carry
    z_grads: list[PerTask]  # leaves of z, each for all tasks
    w_indices: list[int]  # leaves of W that heads may read themselves, past z
    w_grads: list[Tensor]  # (T, ...) at these
    y_grads: PerTask | None = None  # of the y of a `shared_linear`, if they have come by there


class Crossed(NamedTuple):
    """What goes on."""

    stats: Any
    cotangents: list[Tensor] | None  # of the leaves of z, and of the trunk's own losses; None: no sum is wanted
    head_seeds: Tensor | None = None  # (T,) other cotangents for the heads, which are run back once more with them
    w_weights: Tensor | None = None  # (T,) of the gradients at W that heads found past z; None: they carry them
    decision: Any = ()


class Crossing(Protocol):
    """How z becomes what the heads see, and how their gradients become the trunk's."""

    def trunk_loss(self) -> Callable[[Any, Any, Any], Tensor] | None:
        """(params, z, batch) -> a loss of the trunk alone."""

    def copies(self, trunk: Trunk, count: int) -> list[PerTask]:
        """Every leaf of z as each of the T heads is to see it: a list, of one tensor T times, or one (T, ...)."""

    def seeds(self, losses: Tensor) -> Tensor:
        """(T,) the cotangents of the losses."""

    def cross(self, trunk: Trunk, at_z: AtZ) -> Crossed:
        """From the gradients at z to the cotangent of z."""


class Weighted(NamedTuple):
    """Each head sees z, and the trunk gets Σ w_i ∂L_i/∂z."""

    plan: Plan

    def trunk_loss(self) -> None:
        """None: the trunk has no loss of its own."""
        return None

    def copies(self, trunk: Trunk, count: int) -> list[PerTask]:
        """z itself, T times. (A compiler would write T copies of the rows of an expanded tensor.)"""
        return [[leaf] * count for leaf in trunk.z]

    def seeds(self, losses: Tensor) -> Tensor:
        """The weights, if they are known and the heads are to learn from the weighted sum; else 1 for each."""
        plan = self.plan
        if isinstance(plan.weights, Tensor) and plan.heads == "weighted":
            return plan.seeds(plan.weights, losses.dtype)
        return plan.unit_seeds(losses)

    def cross(self, trunk: Trunk, at_z: AtZ) -> Crossed:
        plan = self.plan
        in_seeds = isinstance(plan.weights, Tensor) and plan.heads == "weighted"
        plain = not in_seeds and plan.loss_scale is None and plan.active is None
        if plan.needs == "gramian" and plan.where is None:
            # As a matrix, for the Gramian is a product with it, and so is the weighted sum.
            at_z = at_z._replace(z_grads=[stacked(leaf) for leaf in at_z.z_grads])
        stats = stats_at_w(plan, trunk, at_z, None if plain else at_z.seeds)
        weights, decision = plan.decide(stats, ())
        if weights is None:
            return Crossed(stats, None, decision=decision)
        if in_seeds:
            return Crossed(stats, [_sum(leaf) for leaf in at_z.z_grads], decision=decision)
        cotangents = [weighted_sum(weights, leaf) for leaf in at_z.z_grads]
        if plan.heads == "own":
            return Crossed(stats, cotangents, w_weights=weights, decision=decision)
        return Crossed(stats, cotangents, plan.seeds(weights, at_z.losses.dtype), decision=decision)


def stats_at_w(plan: Plan, trunk: Trunk, at_z: AtZ, seeds: Tensor | None) -> TaskStats:
    """Norms, Gramian or gradients at W; `seeds` are what the gradients carry, None for nothing."""
    losses, z_grads = promoted(at_z.losses), at_z.z_grads
    if plan.needs == "losses":
        return TaskStats(losses)
    if plan.where is None:
        return stats_at_z(plan, losses, z_grads, seeds)
    layer = trunk.in_w
    if layer is None:
        return stats_at_leaves(plan, losses, _pulled_to_leaves(plan, trunk, at_z), seeds)
    assert isinstance(plan.loss_fn, MultiTaskLoss)
    assert isinstance(plan.loss_fn.last_shared, SharedLinear)
    h, y = trunk.h_and_y
    y_grads = at_z.y_grads
    if y_grads is None:
        y_grads = linear.before_activation(plan.loss_fn.last_shared, y, z_grads[0])
    if plan.needs == "gramian" or plan.merges or plan.task_grads:
        rows = linear.gradients(h, stacked(y_grads), layer)
        rows = [rows[layer.order.index(i)].to(plan.leaves[i].dtype) for i in plan.where]
        return stats_at_leaves(plan, losses, rows, seeds)
    norms = linear.norms(h, y_grads, layer)
    return TaskStats(losses, norms if seeds is None else plan.without(seeds, norms))


def _pulled_to_leaves(plan: Plan, trunk: Trunk, at_z: AtZ) -> list[Tensor]:
    """(T, ...) at each leaf of W: by way of z, and past it where a head reads the leaf itself."""
    assert plan.where is not None
    cotangents = [stacked(leaf) for leaf in at_z.z_grads]
    pulled = trunk.tape.pull_rows(cotangents, plan.where, vectorize=plan.vectorize, chunk_size=plan.chunk_size)
    past = dict(zip(at_z.w_indices, at_z.w_grads, strict=True))
    rows = []
    for i, grad in zip(plan.where, pulled, strict=True):
        parts = [part for part in (grad, past.get(i)) if part is not None]
        rows.append(plain_sum(parts) if parts else plan.leaves[i].new_zeros(len(at_z.losses), *plan.leaves[i].shape))
    return rows


def linear_leaves(plan: Plan) -> linear.Leaves | None:
    """W as weight and bias of the `shared_linear`; None if it is anything else."""
    layer = plan.loss_fn.last_shared if isinstance(plan.loss_fn, MultiTaskLoss) else None
    if plan.where is None or not isinstance(layer, SharedLinear):
        return None
    return linear.leaves_of(layer, plan)


def _sum(leaf: PerTask) -> Tensor:
    return leaf.sum(0) if isinstance(leaf, Tensor) else plain_sum(leaf)
