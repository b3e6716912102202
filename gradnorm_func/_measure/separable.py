"""The engine of `multi_task_loss(None, losses)`: the seam is the parameters themselves.

Each loss is pulled back on its own, so nothing runs T times, and Σ w_i ∇L_i needs no second backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import MultiTaskLoss, task_vector
from gradnorm_func._measure.plan import AuxBox, Measured, Plan, fresh_casts, quiet, row_norms, split_aux, vjp_aux, wide


@fresh_casts
def separable(loss: MultiTaskLoss, params: Any, batch: Any, plan: Plan) -> Measured:
    """All that `plan` asks for, of T losses that share nothing but the parameters."""
    leaves, treedef = tree.flatten(params)
    at = plan.at if plan.at is not None else list(range(len(leaves)))
    # Only what is asked for is differentiated: without weights, W alone.
    own = at if plan.weights is None else list(range(len(leaves)))
    rows: list[list[Tensor]] = []
    values, auxes = [], []
    with quiet()():
        for function in loss.functions:
            box = AuxBox()

            def evaluate(own_leaves: list[Tensor], function: Any = function, box: AuxBox = box) -> Any:
                out = function(tree.unflatten(treedef, tree.replace(leaves, own, own_leaves)), batch)
                value, aux = split_aux(out, plan.has_aux, "a loss")
                return task_vector([value]).squeeze(0), box.strip(aux)

            value, pull, kept = vjp_aux(evaluate, [leaves[i] for i in own])
            rows.append(list(pull(plan.seeds(torch.ones_like(value), value.dtype))[0]))
            values.append(value)
            auxes.append(box.fill(kept))
        vector = torch.stack(values)
        plan.check_count(vector)
        # W first: only its leaves are needed with their task axis.
        task_grads = [torch.stack([row[own.index(i)] for row in rows]) for i in at] if plan.norms else []
        norms = row_norms(task_grads) if plan.norms else ()
        grads: Any = ()
        if plan.weights is not None:
            weights = plan.weights(vector, norms, ()) if callable(plan.weights) else plan.weights
            grads = [_weighted(weights, column) for column in zip(*rows, strict=True)]
    return Measured(
        loss.structure(values),
        vector,
        norms,
        (),
        task_grads if plan.task_grads else (),
        grads,
        ((), loss.structure(auxes)) if plan.has_aux else (),
    )


def _weighted(weights: Tensor, column: tuple[Tensor, ...]) -> Tensor:
    """Σ w_i g_i, of the gradients of one leaf."""
    dtype = wide(column[0])
    first, *rest = (w * g.to(dtype) for w, g in zip(weights.to(dtype).unbind(), column, strict=True))
    total: Tensor = sum(rest, first)
    return total.to(column[0].dtype)
