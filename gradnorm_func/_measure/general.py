"""The general engine: the task gradients of any loss_fn, by one pullback over the T basis cotangents.

Correct for everything, but each of the T cotangents runs through every head, zero or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core.numerics import promoted
from gradnorm_func._core.tasks import task_vector
from gradnorm_func._measure.norms import stats_at_leaves
from gradnorm_func._measure.plan import Measured, Plan, filled, split_aux, weighted_sum
from gradnorm_func._measure.reach import require_reached, require_tensors
from gradnorm_func._measure.tape import tape, without_graph
from gradnorm_func._reduce.stats import TaskStats


def general(plan: Plan) -> Measured:
    """All that `plan` asks for, of any loss_fn."""

    def record(leaves: list[Tensor]) -> tuple[list[Tensor], Any]:
        losses, aux = split_aux(plan.loss_fn(plan.params(leaves), plan.batch), plan.has_aux)
        require_tensors(plan, losses)
        return [task_vector(losses)], (losses, aux)

    run = tape(record, plan.leaves)
    losses, structure, aux = run.outputs[0], without_graph(run.aux[0]), run.aux[1]
    plan, decision = plan.with_losses(losses)
    assert plan.where is not None
    rows: list[Tensor] = []  # (T, ...) for each leaf of W
    reached = True
    stats = TaskStats(promoted(losses))
    if plan.needs != "losses":
        eye = plan.seeds(torch.eye(losses.shape[0], dtype=losses.dtype, device=losses.device), losses.dtype)
        pulled = run.pull_rows([eye], plan.where, vectorize=plan.vectorize, chunk_size=plan.chunk_size)
        reached = any(grad is not None for grad in pulled)
        rows = [
            leaf.new_zeros(losses.shape[0], *leaf.shape) if grad is None else grad
            for leaf, grad in zip((plan.leaves[i] for i in plan.where), pulled, strict=True)
        ]
        stats = stats_at_leaves(plan, promoted(losses), rows, None if plan.loss_scale is None else eye.diagonal())
    weights, decision = plan.decide(stats, decision)
    if weights is not None:
        if rows and len(plan.where) == len(plan.leaves):  # Σ w_i ∇L_i without a backward pass
            grads = [weighted_sum(weights, leaf) for leaf in rows]
        else:
            unfilled = run.pull([plan.seeds(weights, losses.dtype)], last=True)
            grads, reached = filled(unfilled, plan.leaves), any(grad is not None for grad in unfilled)
        require_reached(plan, reached)
        stats = stats._replace(grads=grads)
    return Measured(stats, structure, aux, decision)
