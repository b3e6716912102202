"""The seam engine: the task gradients of a `multi_task_loss` from one ordinary backward pass.

Each head gets its own copy of the representation z, so that the backward pass through the heads yields every ∂L_i/∂z
separately. What becomes of them is the crossing's affair; the one cotangent that it makes goes on into the trunk.
No forward runs twice.

Where the weights do not wait for these gradients, and autograd records, the copies stay joined to the trunk: the plain
step's own backward pass, from the losses to all parameters, leaves ∂(w_i L_i)/∂z on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import MultiTaskLoss, SharedLinear, StackedHeads
from gradnorm_func._core.tasks import are_scalars, task_vector
from gradnorm_func._core.tracing import traced
from gradnorm_func._measure.crossing import AtZ, Crossing, Trunk, Weighted, linear_leaves, stats_at_w
from gradnorm_func._measure.norms import PerTask
from gradnorm_func._measure.plan import Measured, Plan, filled, split_aux, weighted_sum
from gradnorm_func._measure.reach import applied_twice, read_by_a_head, require_reached, require_tensors
from gradnorm_func._measure.tape import WRITTEN, Grads, Tape, copy_of, gradients, leaves_of, tape

SMALL = 2**20  # entries of T copies of z that may be made to save T starts of autograd


def seam(plan: Plan, crossing_of: Callable[[Plan], Crossing] = Weighted) -> Measured:
    """All that `plan` asks for, of a loss with a backbone."""
    loss = plan.loss_fn
    assert isinstance(loss, MultiTaskLoss)
    trunk = _trunk(plan, loss, crossing_of(plan).trunk_loss())
    if crossing_of is Weighted and _joins(plan, loss, trunk):
        return _joined(plan, loss, trunk)
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
        for i in _copied(trunk):
            if by_heads.get(i) is not None:
                raise ValueError(read_by_a_head(tree.paths(plan.params(plan.leaves))[i]))
        stats = stats._replace(grads=_added(plan.leaves, trunk_grads, by_heads))
    return _measured(plan, trunk, stats, losses, heads.tape.aux, crossed.decision or decision)


def _measured(plan: Plan, trunk: Trunk, stats: Any, losses: Tensor, heads_aux: Any, decision: Any) -> Measured:
    aux = (trunk.aux, heads_aux) if plan.has_aux else ()
    return Measured(stats, losses, aux, decision, trunk.z_treedef)


def _joins(plan: Plan, loss: MultiTaskLoss, trunk: Trunk) -> bool:
    """Whether one backward pass gives all: the weights are known before it, and W is z or a small layer before it."""
    z = trunk.tape.saved
    if plan.weights is None or plan.heads == "own" or not z or not all(leaf.requires_grad for leaf in z):
        return False
    if plan.needs == "losses":
        return True
    if callable(plan.weights) or any(leaf.dtype == torch.float16 for leaf in z):
        return False
    if plan.where is None:
        return True
    return trunk.in_w is not None and 0 < len(loss.functions) * trunk.h_and_y[1].numel() <= SMALL


def _joined(plan: Plan, loss: MultiTaskLoss, trunk: Trunk) -> Measured:
    """The plain step's backward pass, and the gradients that it has come by."""
    with torch.enable_grad():
        z, seen = _joined_copies(plan, loss, trunk)
        versions = [leaf._version for leaf in trunk.tape.saved]
        vector, aux = _run_heads(plan, loss, trunk.z_treedef, plan.leaves, z)
    if versions != [leaf._version for leaf in trunk.tape.saved]:
        raise ValueError(WRITTEN)
    losses = vector.detach()
    plan, decision = plan.with_losses(losses)
    seeds = Weighted(plan).seeds(losses)

    inputs = [*plan.leaves, *trunk.layer]
    pulled = gradients([vector], [*inputs, *_flat(seen)], [seeds], last=True)
    of_seen = _nested(pulled[len(inputs) :], seen)
    at_z = AtZ(losses, seeds, of_seen, [], []) if plan.where is None else AtZ(losses, seeds, [], [], [], *of_seen)
    stats = stats_at_w(plan, trunk, at_z, seeds)
    grads = _with_layer(plan, trunk, pulled[: len(inputs)])
    require_reached(plan, any(grad is not None for grad in grads))
    stats = stats._replace(grads=filled(grads, plan.leaves))
    return _measured(plan, trunk, stats, losses, aux, decision)


def _joined_copies(plan: Plan, loss: MultiTaskLoss, trunk: Trunk) -> tuple[list[PerTask], list[PerTask]]:
    """z as the heads see it, on the trunk's graph; and where the tasks' gradients are looked at on their way, which is
    before the activation of a `shared_linear`, if that is W."""
    if plan.needs == "losses":
        return _copies(plan, loss, trunk._replace(z=trunk.tape.saved), Weighted(plan)), []
    if plan.where is not None:
        assert isinstance(loss.last_shared, SharedLinear)
        y = trunk.h_and_y[1]
        views = [y.view_as(y) for _ in loss.functions]
        return [[loss.last_shared.activate(view) for view in views]], [views]
    z = _copies(plan, loss, trunk._replace(z=trunk.tape.saved), Weighted(plan))
    z = [copies if isinstance(copies, Tensor) else [x.view_as(x) for x in copies] for copies in z]
    return z, z


def _trunk(plan: Plan, loss: MultiTaskLoss, trunk_loss: Callable[[Any, Any, Any], Tensor] | None) -> Trunk:
    """z, as a function of all leaves of params."""

    in_w = linear_leaves(plan)
    indices = [] if in_w is None or traced() else in_w.order

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

    layer = leaves_of([plan.leaves[i] for i in indices])
    run = tape(record, [*plan.leaves, *layer])
    z_treedef, h_and_y, aux = run.aux
    count = z_treedef.num_leaves
    return Trunk(run, run.outputs[:count], z_treedef, h_and_y, in_w, layer, run.outputs[count:], aux)


def _copied(trunk: Trunk) -> list[int]:
    """The leaves of a `shared_linear` of which it has copies."""
    return trunk.in_w.order if trunk.layer and trunk.in_w is not None else []


def _with_layer(plan: Plan, trunk: Trunk, pulled: Grads) -> Grads:
    """Gradients of params and of the layer's copies, the latter put in their place, where nothing else has come to."""
    grads = pulled[: len(plan.leaves)]
    for i, grad in zip(_copied(trunk), pulled[len(plan.leaves) :], strict=True):
        if grads[i] is not None:  # the norms miss this part
            path = tree.paths(plan.params(plan.leaves))[i]
            raise ValueError(applied_twice(plan, [path]) or read_by_a_head(path))
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
        copies = len(_flat(self.z))
        total = inputs + copies + len(self.w) * count
        of_z = range(inputs, inputs + copies) if z else ()
        wanted = [*(range(inputs) if leaves else ()), *of_z, *range(inputs + copies, total)]
        grads = iter(self.tape.pull([seeds], wanted, last=last))
        at_leaves = [next(grads) if leaves else None for _ in self.indices]
        z_grads = _nested([next(grads) for _ in of_z], self.z) if z else []
        at_w = [[next(grads) for _ in range(count)] for _ in self.w]
        w_grads = [torch.stack(filled(row, [leaf] * count)) for row, leaf in zip(at_w, self.w, strict=True)]
        return at_leaves, z_grads, w_grads, any(grad is not None for grad in chain(at_leaves, *at_w))


def _heads(plan: Plan, loss: MultiTaskLoss, trunk: Trunk, crossing: Crossing) -> _Heads:
    z = _copies(plan, loss, trunk, crossing)
    count, w_indices = len(z[0]), _read_apart(plan, loss, trunk)
    indices = [i for i in range(len(plan.leaves)) if i not in w_indices]
    if isinstance(loss.heads, StackedHeads):
        indices = tree.select(plan.params(plan.leaves), loss.heads.path)
    w = [plan.leaves[i] for i in w_indices]

    def record(inputs: list[Tensor]) -> tuple[list[Tensor], Any]:
        leaves, copies = tree.replace(plan.leaves, indices, inputs[: len(indices)]), inputs[len(indices) :]
        of_z, of_w = copies[: len(copies) - count * len(w)], copies[len(copies) - count * len(w) :]
        vector, aux = _run_heads(plan, loss, trunk.z_treedef, leaves, _nested(of_z, z), w_indices, of_w)
        return [vector], aux

    inputs = [*(plan.leaves[i] for i in indices), *_flat(z), *(copy_of(leaf) for leaf in w for _ in range(count))]
    return _Heads(tape(record, inputs), indices, z, w_indices, w)


def _read_apart(plan: Plan, loss: MultiTaskLoss, trunk: Trunk) -> list[int]:
    """The leaves of W of which every head reads a copy of its own."""
    # Heads that learn from their own losses read copies of W even where nothing is measured at it: W gets the sum.
    at_leaves = (plan.needs != "losses" or plan.heads == "own") and plan.where is not None
    stacked = isinstance(loss.heads, StackedHeads)
    return list(plan.where or []) if at_leaves and not stacked and trunk.in_w is None else []


def _copies(plan: Plan, loss: MultiTaskLoss, trunk: Trunk, crossing: Crossing) -> list[PerTask]:
    """z as the heads see it, leaf by leaf: T copies or, where the heads are stacked, one (T, ...)."""
    if isinstance(loss.heads, StackedHeads):
        first = tree.select(plan.params(plan.leaves), loss.heads.path)[0]
        count = plan.leaves[first].shape[0]
        copies = crossing.copies(trunk, count)
        return [x[0].expand(count, *x[0].shape) if isinstance(x, list) else x for x in copies]
    return [x if isinstance(x, list) else list(x.unbind()) for x in crossing.copies(trunk, len(loss.functions))]


def _flat(z: list[PerTask]) -> list[Tensor]:
    return list(chain(*([x] if isinstance(x, Tensor) else x for x in z)))


def _nested(flat: Sequence[Tensor | None], z: list[PerTask]) -> list[PerTask]:
    """What `_flat` has made flat, or gradients of that, in the form of z; zeros for what nobody has read."""
    rest = iter(flat)
    return [filled([next(rest)], [x])[0] if isinstance(x, Tensor) else filled([next(rest) for _ in x], x) for x in z]


def _run_heads(
    plan: Plan,
    loss: MultiTaskLoss,
    z_treedef: Any,
    leaves: list[Tensor],
    z: list[PerTask],
    w_indices: Sequence[int] = (),
    w: Sequence[Tensor] = (),
) -> tuple[Tensor, Any]:
    """(T,) losses and the heads' aux; `w` are copies of the leaves `w_indices`, T of each."""
    params = plan.params(leaves)
    if isinstance(loss.heads, StackedHeads):  # under vmap: each sees its own parameters only
        out = loss.heads.mapped(0)(tree.subtree(params, loss.heads.path), tree.unflatten(z_treedef, z), plan.batch)
        losses, aux = split_aux(out, plan.has_aux, "a head")
        require_tensors(plan, losses)
        return task_vector(losses), aux
    outs = []
    for i, head in enumerate(loss.functions):
        if w_indices:
            params = plan.params(tree.replace(leaves, w_indices, w[i :: len(loss.functions)]))
        out = head(params, tree.unflatten(z_treedef, [copies[i] for copies in z]), plan.batch)
        outs.append(split_aux(out, plan.has_aux, "a head"))
    aux = loss.structure([aux for _, aux in outs]) if plan.has_aux else ()
    values = [value for value, _ in outs]
    if are_scalars(values):
        return torch.stack(values), aux
    named = loss.structure(values)  # whoever says what is wrong has to know their names
    require_tensors(plan, named)
    return task_vector(named), aux


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
