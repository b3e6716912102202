"""Norms and Gramians at W: at z, at a `shared_linear`, at any leaves. What a rule may know of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core.numerics import accum_dtype, diagonal, leaves_range, of_any_size, row_norms, safe_sqrt
from gradnorm_func._core.tracing import traced
from gradnorm_func._measure.plan import Plan
from gradnorm_func._reduce.stats import TaskStats, gramian_of

# One leaf of z for all tasks: T tensors, or one (T, ...) tensor where the heads are stacked.
PerTask: TypeAlias = list[Tensor] | Tensor


def stats_at_z(plan: Plan, losses: Tensor, z_grads: list[PerTask], seeds: Tensor | None) -> TaskStats:
    """From the gradients at z; `seeds` are the cotangents of the losses that they carry, None for ones."""
    stats = TaskStats(losses)
    if plan.task_grads:
        stats = stats._replace(task_grads=_unseeded(plan, list(map(stacked, z_grads)), seeds))
    if plan.needs == "gramian":
        gramian = gramian_of(list(map(stacked, z_grads)))
        if seeds is not None:
            gramian = plan.without(seeds, plan.without(seeds, gramian, signed=True).mT, signed=True)
        squares = diagonal(gramian)
        return stats._replace(grad_norms=safe_sqrt(squares), square_norms=squares, gramian=gramian)
    if plan.needs == "example_norms":
        norms, example_norms = norms_by_example(z_grads)
        if seeds is not None:
            example_norms = plan.without(seeds, example_norms)
        stats = stats._replace(example_norms=example_norms)
    else:
        norms = norms_at_z(z_grads)
    if seeds is not None:
        norms = plan.without(seeds, norms)
    return stats._replace(grad_norms=norms, square_norms=norms.square() if plan.merges else ())


def stats_at_leaves(plan: Plan, losses: Tensor, rows: list[Tensor], seeds: Tensor | None) -> TaskStats:
    """From the task gradients (T, ...) at the leaves of W."""
    rows = _unseeded(plan, rows, seeds)
    stats = TaskStats(losses, task_grads=rows if plan.merges or plan.task_grads else ())
    if plan.needs != "gramian":
        return stats._replace(grad_norms=row_norms(rows))
    gramian = gramian_of(rows)
    return stats._replace(grad_norms=safe_sqrt(diagonal(gramian)), gramian=gramian)


def norms_by_example(z_grads: Sequence[PerTask]) -> tuple[Tensor, Tensor]:
    """(T,) norms over the batch and z, and the mean over examples of each example's norm."""
    norms, means = _by_example(z_grads, torch.float32)
    if leaves_range(norms):
        norms, means = (row.to(norms.dtype) for row in _by_example(z_grads, torch.float64))
    return norms, means


def _by_example(z_grads: Sequence[PerTask], least: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same, added up in that dtype at least."""
    per_leaf = [_example_norms(leaf, least) for leaf in z_grads]  # (T, B) each
    # No common example axis: the batch counts as one example. (A set of shapes would make sizes static.)
    if any(norms.shape[1] != per_leaf[0].shape[1] for norms in per_leaf[1:]):
        per_leaf = [torch.linalg.vector_norm(norms, dim=1, keepdim=True) for norms in per_leaf]
    rows = per_leaf[0] if len(per_leaf) == 1 else torch.linalg.vector_norm(torch.stack(per_leaf), dim=0)
    # The mean of no examples is 0, as their norm is.
    return torch.linalg.vector_norm(rows, dim=1), rows.mean(1) if rows.shape[1] else rows.sum(1)


def norms_at_z(z_grads: list[PerTask]) -> Tensor:
    """(T,) norms over the batch and z."""
    if any(isinstance(leaf, Tensor) for leaf in z_grads):
        return row_norms([stacked(leaf) for leaf in z_grads])
    tensors = [grad for leaf in z_grads for grad in leaf]  # leaf by leaf, T of each

    def norms(least: torch.dtype) -> Tensor:
        dtype = accum_dtype(*tensors, least=least)
        if traced():
            table = torch.stack([torch.linalg.vector_norm(grad, dtype=dtype) for grad in tensors])
        else:  # one call for all of them
            table = torch.stack(torch._foreach_norm(tensors, 2, dtype))
        return table if len(z_grads) == 1 else torch.linalg.vector_norm(table.reshape(len(z_grads), -1), dim=0)

    return of_any_size(norms)


def stacked(leaf: PerTask) -> Tensor:
    """(T, ...), the tasks along the first axis."""
    return leaf if isinstance(leaf, Tensor) else torch.stack(leaf)


def _example_norms(leaf: PerTask, least: torch.dtype) -> Tensor:
    """(T, B) norms of one leaf of z; the leading axis of z is the example axis."""
    if isinstance(leaf, Tensor):
        by_example = leaf.flatten(2) if leaf.ndim > 2 else leaf.reshape(leaf.shape[0], -1, 1)
        norms: Tensor = torch.linalg.vector_norm(by_example, dim=2, dtype=accum_dtype(leaf, least=least))
        return norms
    rows = [grad.flatten(1) if grad.ndim > 1 else grad.reshape(-1, 1) for grad in leaf]
    return torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=accum_dtype(row, least=least)) for row in rows])


def _unseeded(plan: Plan, rows: list[Tensor], seeds: Tensor | None) -> list[Tensor]:
    if seeds is None:
        return rows
    bare = [plan.without(seeds, leaf, signed=True) for leaf in rows]
    # A loss scale may have kept them from underflow, so that without it they stay in the wider dtype.
    return bare if plan.loss_scale is not None else [x.to(leaf.dtype) for x, leaf in zip(bare, rows, strict=True)]
