"""The seam engine: the task gradients of a `multi_task_loss` from one ordinary backward pass.

Each head gets its own copy of the representation z, so that the backward pass through the heads yields every ∂L_i/∂z
separately. What becomes of them is the crossing's affair; the one cotangent that it makes goes on into the trunk.
No forward runs twice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import MultiTaskLoss, StackedHeads
from gradnorm_func._core.tasks import are_scalars, task_vector
from gradnorm_func._core.tracing import traced
from gradnorm_func._measure.crossing import AtZ, Crossing, Trunk, Weighted, linear_leaves
from gradnorm_func._measure.norms import PerTask
from gradnorm_func._measure.plan import Measured, Plan, filled, split_aux, weighted_sum
from gradnorm_func._measure.reach import require_reached, require_tensors, twice_message
from gradnorm_func._measure.tape import Grads, Tape, copy_of, tape


def seam(plan: Plan, crossing_of: Callable[[Plan], Crossing] = Weighted) -> Measured:
    """All that `plan` asks for, of a loss with a backbone."""
    loss = plan.loss_fn
    assert isinstance(loss, MultiTaskLoss)
    trunk = _trunk(plan, loss, crossing_of(plan).trunk_loss())
    heads = _heads(plan, loss, trunk, crossing_of(plan))
    losses = heads.tape.outputs[0]  # (T,)
    plan, decision = plan.with_losses(losses)
    if crossing_of is Weighted and any(leaf.dtype == torch.float16 for leaf in trunk.z):
        plan = plan.weighed_afterwards()
    crossing = crossing_of(plan)
    seeds = crossing.seeds(losses)

    once = not callable(plan.weights) or plan.heads == "own"  # a rule's weights send the heads back once more
    grads, z_grads, w_grads, read = heads.pull(seeds, last=once, leaves=once and plan.weights is not None)
    crossed = crossing.cross(trunk, AtZ(losses, seeds, z_grads, heads.w_indices, w_grads))
    stats = crossed.stats
    if crossed.cotangents is not None:
        if crossed.head_seeds is not None:
            grads, _, w_grads, read = heads.pull(crossed.head_seeds, last=True, z=False)
        trunk_grads = _with_layer(plan, trunk, trunk.tape.pull(crossed.cotangents, last=True))
        require_reached(plan, read or any(grad is not None for grad in trunk_grads))
        weights = crossed.w_weights
        at_w = [rows.sum(0) if weights is None else weighted_sum(weights, rows) for rows in w_grads]
        by_heads = dict(zip([*heads.indices, *heads.w_indices], [*grads, *at_w], strict=True))
        stats = stats._replace(grads=_added(plan.leaves, trunk_grads, by_heads))
    aux = (trunk.aux, heads.tape.aux) if plan.has_aux else ()
    return Measured(stats, losses, aux, crossed.decision or decision, trunk.z_treedef)


def _trunk(plan: Plan, loss: MultiTaskLoss, trunk_loss: Callable[[Any, Any, Any], Tensor] | None) -> Trunk:
    """z, as a function of all leaves of params."""

    in_w = None if traced() else linear_leaves(plan)
    indices = [] if in_w is None else in_w.order

    def record(inputs: list[Tensor]) -> tuple[list[Tensor], Any]:
        leaves, copies = inputs[: len(plan.leaves)], inputs[len(plan.leaves) :]
        params = plan.params(leaves)
        of_layer = plan.params(tree.replace(leaves, indices, copies)) if copies else None
        z, layer, aux = loss.shared(params, plan.batch, of_layer)
        z_leaves, z_treedef = tree.flatten(z)
        for leaf in z_leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise ValueError(f"the backbone returned {type(leaf).__name__}; z must be floating-point tensors only")
        extra = [] if trunk_loss is None else [task_vector([trunk_loss(params, z, plan.batch)])[0]]
        return [*z_leaves, *extra], (z_treedef, layer, aux)

    run = tape(record, [*plan.leaves, *(copy_of(plan.leaves[i]) for i in indices)])
    z_treedef, layer, aux = run.aux
    count = z_treedef.num_leaves
    return Trunk(run, run.outputs[:count], z_treedef, layer, indices, run.outputs[count:], aux)


def _with_layer(plan: Plan, trunk: Trunk, pulled: Grads) -> Grads:
    """The trunk's gradients, those of a `shared_linear` whose norms were taken put in their place."""
    grads = pulled[: len(plan.leaves)]
    for i, grad in zip(trunk.layer_indices, pulled[len(plan.leaves) :], strict=True):
        if grads[i] is not None:  # the norms miss this part
            raise ValueError(twice_message(tree.paths(plan.params(plan.leaves))[i]))
        grads[i] = grad
    return grads


class _Heads(NamedTuple):
    """The T heads, run: leaves of params, copies of z, copies of W -> (T,) losses."""

    tape: Tape
    indices: list[int]  # of the leaves of params among the inputs
    z: list[PerTask]  # leaves of z, each as T copies or, where the heads are stacked, as one (T, ...)
    w_indices: list[int]  # of the leaves of W of which every head has a copy, to keep the tasks' gradients apart
    w: list[Tensor]  # those leaves

    def pull(
        self, seeds: Tensor, *, last: bool, leaves: bool = True, z: bool = True
    ) -> tuple[Grads, list[PerTask], list[Tensor], bool]:
        """Gradients at the leaves, unless these wait; at the leaves of z, task by task; at the copies of W, (T, ...);
        and whether a head reads any of params."""
        count = seeds.shape[0]
        inputs = len(self.indices)
        copies = sum(1 if isinstance(leaf, Tensor) else count for leaf in self.z)
        total = inputs + copies + len(self.w) * count
        of_z = range(inputs, inputs + copies) if z else ()
        wanted = [*(range(inputs) if leaves else ()), *of_z, *range(inputs + copies, total)]
        grads = iter(self.tape.pull([seeds], wanted, last=last))
        at_leaves = [next(grads) if leaves else None for _ in self.indices]
        z_grads: list[PerTask] = []
        for leaf in self.z if z else []:
            if isinstance(leaf, Tensor):
                z_grads += filled([next(grads)], [leaf])
            else:
                z_grads.append(filled([next(grads) for _ in leaf], leaf))
        at_w = [[next(grads) for _ in range(count)] for _ in self.w]
        w_grads = [torch.stack(filled(row, [leaf] * count)) for row, leaf in zip(at_w, self.w, strict=True)]
        return at_leaves, z_grads, w_grads, any(grad is not None for grad in chain(at_leaves, *at_w))


def _heads(plan: Plan, loss: MultiTaskLoss, trunk: Trunk, crossing: Crossing) -> _Heads:
    if isinstance(loss.heads, StackedHeads):
        return _stacked(plan, loss.heads, trunk, crossing)
    count = len(loss.functions)
    # Heads that learn from their own losses read copies of W even where nothing is measured at it: W gets the sum.
    at_leaves = (plan.needs != "losses" or plan.heads == "own") and plan.where is not None
    at_leaves = at_leaves and linear_leaves(plan) is None
    w_indices = list(plan.where or []) if at_leaves else []
    indices = [i for i in range(len(plan.leaves)) if i not in w_indices]
    z = [copies if isinstance(copies, list) else list(copies.unbind()) for copies in crossing.copies(trunk, count)]
    w = [plan.leaves[i] for i in w_indices]

    def record(inputs: list[Tensor]) -> tuple[list[Tensor], Any]:
        leaves = tree.replace(plan.leaves, indices, inputs[: len(indices)])
        copies = inputs[len(indices) :]  # leaf by leaf of z, then of W; T of each
        shared, outs = plan.params(leaves), []
        for i, head in enumerate(loss.functions):
            of_task = copies[i::count]
            params = plan.params(tree.replace(leaves, w_indices, of_task[len(z) :])) if w_indices else shared
            out = head(params, tree.unflatten(trunk.z_treedef, of_task[: len(z)]), plan.batch)
            outs.append(split_aux(out, plan.has_aux, "a head"))
        values = [value for value, _ in outs]
        if are_scalars(values):
            vector = torch.stack(values)
        else:  # whoever says what is wrong has to know their names
            named = loss.structure(values)
            require_tensors(plan, named)
            vector = task_vector(named)
        return [vector], loss.structure([aux for _, aux in outs]) if plan.has_aux else ()

    inputs = [*(plan.leaves[i] for i in indices), *chain(*z), *(copy_of(leaf) for leaf in w for _ in range(count))]
    return _Heads(tape(record, inputs), indices, list(z), w_indices, w)


def _stacked(plan: Plan, heads: StackedHeads, trunk: Trunk, crossing: Crossing) -> _Heads:
    """T heads of one architecture, under vmap: each sees its own parameters only."""
    indices = tree.select(plan.params(plan.leaves), heads.path)
    count = plan.leaves[indices[0]].shape[0]
    z = [  # (T, ...) each
        copies[0].expand(count, *copies[0].shape) if isinstance(copies, list) else copies
        for copies in crossing.copies(trunk, count)
    ]

    def record(inputs: list[Tensor]) -> tuple[list[Tensor], Any]:
        params = plan.params(tree.replace(plan.leaves, indices, inputs[: len(indices)]))
        copies = tree.unflatten(trunk.z_treedef, inputs[len(indices) :])
        out = heads.mapped(0)(tree.subtree(params, heads.path), copies, plan.batch)
        losses, aux = split_aux(out, plan.has_aux, "a head")
        require_tensors(plan, losses)
        return [task_vector(losses)], aux

    return _Heads(tape(record, [*(plan.leaves[i] for i in indices), *z]), indices, list(z), [], [])


def _added(leaves: list[Tensor], trunk: Grads, heads: dict[int, Tensor | None]) -> list[Tensor]:
    """∇ Σ w_i L_i, leaf by leaf: what came through the trunk, plus what the heads found themselves."""
    out = []
    for i, (leaf, by_trunk) in enumerate(zip(leaves, trunk, strict=True)):
        by_head = heads.get(i)
        if by_trunk is None or by_head is None:
            grad = by_head if by_trunk is None else by_trunk
            out.append(torch.zeros_like(leaf) if grad is None else grad)
        else:
            out.append(by_trunk + by_head)
    return out
