"""The general engine: per-task gradients of any loss_fn, one pullback under vmap over the T basis cotangents.

Correct for everything, but each of the T cotangents runs through every head, zero or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, task_vector
from gradnorm_func._measure.plan import (
    AuxBox,
    Measured,
    Plan,
    fresh_casts,
    pull_all,
    quiet,
    row_norms,
    split_aux,
    unbatchable,
    vjp_aux,
    weighted_rows,
    wide,
)


@fresh_casts
def general(loss_fn: LossFn, params: Any, batch: Any, plan: Plan) -> Measured:
    """All that `plan` asks for, of any loss_fn."""
    leaves, treedef = tree.flatten(params)
    at = plan.at if plan.at is not None else list(range(len(leaves)))
    box, shape = AuxBox(), AuxBox()
    one_by_one = False

    def evaluate(all_leaves: list[Tensor]) -> tuple[Tensor, Any]:
        nonlocal one_by_one
        losses, aux = split_aux(loss_fn(tree.unflatten(treedef, all_leaves), batch), plan.has_aux)
        vector = task_vector(losses)
        plan.check_count(vector)
        one_by_one = plan.norms and plan.vectorize and unbatchable([vector])
        return vector, (shape.strip(losses), box.strip(aux))

    def jacobian(pull_w: Callable[[Tensor], Any], vector: Tensor) -> list[Tensor]:
        eye = torch.eye(vector.shape[0], dtype=wide(vector), device=vector.device)
        return list(pull_all(pull_w, plan.seeds(eye, vector.dtype), plan, one_by_one)[0])

    def at_w(all_leaves: list[Tensor]) -> tuple[Tensor, Any]:
        """The losses as a function of everything, and as aux their Jacobian with respect to W alone."""
        vector, pull_w, aux = vjp_aux(lambda w: evaluate(tree.replace(all_leaves, at, w)), [all_leaves[i] for i in at])
        with silence():
            task_grads = jacobian(pull_w, vector)
        return vector, (task_grads, aux)

    silence = quiet()
    with silence():
        task_grads: list[Tensor] = []
        grads: Any = ()
        if not plan.norms:
            vector, pull, kept = vjp_aux(evaluate, leaves)
        elif plan.weights is None or len(at) == len(leaves):
            vector, pull, kept = vjp_aux(lambda w: evaluate(tree.replace(leaves, at, w)), [leaves[i] for i in at])
            task_grads = jacobian(pull, vector)
        else:
            vector, pull, (task_grads, kept) = vjp_aux(at_w, leaves)
        norms: Any = ()
        if plan.norms:
            norms = row_norms(task_grads)
        if plan.weights is not None:
            weights = plan.weights(vector, norms, ()) if callable(plan.weights) else plan.weights
            if plan.norms and len(at) == len(leaves):  # the rows are there already: Σ w_i ∇L_i without a backward
                grads = [weighted_rows(weights, rows) for rows in task_grads]
            else:
                grads = list(pull(plan.seeds(weights, vector.dtype))[0])
    structure, aux_tensors = kept
    return Measured(
        shape.fill(structure), vector, norms, (), task_grads if plan.task_grads else (), grads, box.fill(aux_tensors)
    )
