"""The engine of `multi_task_loss(None, losses)`: the seam is the parameters themselves.

Each loss is pulled back on its own, so nothing runs T times, and Σ w_i ∇L_i needs no second backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core.loss import MultiTaskLoss
from gradnorm_func._core.numerics import promoted
from gradnorm_func._core.tasks import task_vector
from gradnorm_func._measure.norms import stats_at_leaves
from gradnorm_func._measure.plan import Measured, Plan, filled, split_aux, weighted_sum
from gradnorm_func._measure.reach import require_reached, require_tensors
from gradnorm_func._measure.tape import Tape, tape
from gradnorm_func._reduce.stats import TaskStats


def separable(plan: Plan) -> Measured:
    """All that `plan` asks for, of T losses that share nothing but the parameters."""
    loss = plan.loss_fn
    assert isinstance(loss, MultiTaskLoss)
    runs = [_recorded(plan, function) for function in loss.functions]
    values = [run.outputs[0] for run in runs]
    numbers = [run.aux[0] for run in runs]
    require_tensors(plan, loss.structure([v if x is None else x for v, x in zip(values, numbers, strict=True)]))
    losses = torch.stack(values)
    aux = ((), loss.structure([run.aux[1] for run in runs])) if plan.has_aux else ()
    plan, decision = plan.with_losses(losses)
    where = plan.where or []
    # Only what is asked for is differentiated: without weights, W alone.
    indices = where if plan.weights is None else list(range(len(plan.leaves)))
    stats = TaskStats(promoted(losses))
    grads: list[list[Tensor]] = []  # of each task, the leaves
    if plan.needs != "losses" or plan.weights is not None:
        seeds = plan.unit_seeds(losses)
        leaves = [plan.leaves[i] for i in indices]
        pulled = zip(runs, seeds.to(losses.dtype).unbind(), values, strict=True)
        unfilled = [run.pull([seed.to(value.dtype)], indices, last=True) for run, seed, value in pulled]
        require_reached(plan, any(grad is not None for task in unfilled for grad in task))
        grads = [filled(task, leaves) for task in unfilled]
        if plan.needs != "losses":
            rows = [torch.stack([task[indices.index(i)] for task in grads]) for i in where]
            plain = plan.loss_scale is None and plan.active is None
            stats = stats_at_leaves(plan, promoted(losses), rows, None if plain else seeds)
    weights, decision = plan.decide(stats, decision)
    if weights is not None:
        stats = stats._replace(grads=[weighted_sum(weights, column) for column in zip(*grads, strict=True)])
    return Measured(stats, losses, aux, decision)


def _recorded(plan: Plan, function: Callable[..., Any]) -> Tape:
    """One loss, from all leaves to a scalar; its aux is (the loss if it was a number, its own aux)."""

    def record(leaves: list[Tensor]) -> tuple[list[Tensor], Any]:
        value, aux = split_aux(function(plan.params(leaves), plan.batch), plan.has_aux, "a loss")
        return [task_vector([value]).squeeze(0)], (None if isinstance(value, Tensor) else value, aux)

    return tape(record, plan.leaves)
