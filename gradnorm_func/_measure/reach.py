"""What reaches what: losses without a gradient, parameters that no loss reads, a W that one task reads alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.looking import only_looking
from gradnorm_func._core.loss import MultiTaskLoss, SharedLinear
from gradnorm_func._core.numerics import asked
from gradnorm_func._core.tasks import are_scalars, task_names
from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._measure.plan import Plan, split_aux
from gradnorm_func._measure.tape import leaves_of, nodes

CLOSED_OVER = (
    "does loss_fn close over a module? Write call = gn.functional(module, prefix), and in the loss call(params, x)"
)
AUX = (
    "loss_fn returns (losses, aux): give has_aux=True or, in train, buffers=model, the module whose new buffers are "
    "in aux; a loss without buffers returns the losses alone"
)


class Reach(NamedTuple):
    """Which losses read which leaves of params."""

    tasks: list[str]
    reads: list[set[int]]  # of each task, the indices of the leaves
    dead: list[str]  # tasks whose loss is in no graph
    others: set[torch.Size]  # shapes of the parameters of modules that they read beside params


def reach_of(plan: Plan) -> Reach:
    """From the autograd graph of the losses, which are run once more."""
    leaves = leaves_of(plan.leaves)
    with only_looking(plan.loss_fn, leaves), torch.enable_grad():
        losses, _ = split_aux(plan.loss_fn(plan.params(leaves), plan.batch), plan.has_aux)
    refuse_aux(losses)
    tasks, roots = task_names(losses), _roots(losses)
    reads, others = zip(*(_ends(root, leaves) for root in roots), strict=True)
    dead = [task for task, root in zip(tasks, roots, strict=True) if root is None]
    return Reach(tasks, list(reads), dead, set().union(*others))


def refuse_aux(losses: Any) -> None:
    """Refuses two things, the first of which is already all of the losses, and no scalar."""
    if type(losses) is tuple and len(losses) == 2:
        first = losses[0]
        if first.ndim == 1 if isinstance(first, Tensor) else isinstance(first, (Mapping, list)):
            raise ValueError(AUX)


def ends_of(plan: Plan, part: Callable[[list[Tensor]], list[Tensor]]) -> set[int]:
    """Indices of the leaves of params that a part of the loss reads."""
    leaves = leaves_of(plan.leaves)
    with only_looking(plan.loss_fn, leaves), torch.enable_grad():
        outputs = part(leaves)
    return set().union(*(_ends(_node(out), leaves)[0] for out in outputs))


def _ends(root: Any, leaves: list[Tensor]) -> tuple[set[int], set[torch.Size]]:
    """Where the graph below a node ends: indices of leaves, and shapes of other parameters."""
    index = {id(leaf): i for i, leaf in enumerate(leaves)}
    ends = [node.variable for node in nodes([root]) if hasattr(node, "variable")]
    others = {end.shape for end in ends if id(end) not in index and isinstance(end, torch.nn.Parameter)}
    return {index[id(end)] for end in ends if id(end) in index}, others


def _roots(losses: Any) -> list[Any]:
    """The node of each loss in the graph; None for a loss without one."""
    if isinstance(losses, Tensor):
        if losses.grad_fn is not None and losses.grad_fn.name().startswith("StackBackward"):
            return [node for node, _ in losses.grad_fn.next_functions]
        return [_node(losses)] * losses.numel()
    terms = tree.flatten(tree.by_key(losses))[0]
    return [_node(term) if isinstance(term, Tensor) else None for term in terms]


def cut_off(losses: Any) -> list[int]:
    """Indices of the losses that are in no graph."""
    if isinstance(losses, Tensor):
        return [i for i, root in enumerate(_roots(losses)) if root is None]
    terms = losses if are_scalars(losses) else tree.flatten(tree.by_key(losses))[0]
    return [i for i, term in enumerate(terms) if not (isinstance(term, Tensor) and term.requires_grad)]


def _node(x: Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(x).node if x.requires_grad else None


def require_tensors(plan: Plan, losses: Any) -> None:
    """Refuses a loss that is a number and has no gradient, unless its task is absent."""
    if not plan.whole_step or isinstance(losses, Tensor) or (plan.active is not None and not free_to_ask(plan.active)):
        return
    terms = tree.flatten(tree.by_key(losses))[0]
    numbers = [
        f"{task_names(losses)[i]!r} ({type(term).__name__})"
        for i, term in enumerate(terms)
        if not isinstance(term, Tensor) and (plan.active is None or bool(plan.active[i]))
    ]
    if numbers:
        raise ValueError(
            f"losses without a gradient: {', '.join(numbers)}. Was it taken out of the graph by .item() or float()? "
            "Return the 0-d tensor itself; a task that is absent from this batch is left out by mask="
        )


def require_reached(plan: Plan, reached: bool) -> None:
    """Refuses a step in which autograd knows that no loss depends on any parameter."""
    if plan.whole_step and not reached:
        raise ValueError(f"no loss depends on any of params: {CLOSED_OVER}")


def require_shared(plan: Plan, norms: Tensor, step: Tensor) -> None:
    """Refuses, in a first step, a W that one task reads alone. Zeros are no proof: a head may start at zero, so that
    where they show the graph is asked."""
    if plan.by_path and asked(step, lambda step: step == 0) and asked(norms, lambda norms: (norms > 0).sum() == 1):
        private = private_where(plan, reach_of(plan))
        if private:
            raise ValueError(private)


def private_where(plan: Plan, reach: Reach) -> str:
    """What to say if at most one task reads W; nothing if more do, or no more have a gradient at all."""
    where = set(plan.where or [])
    alive = [i for i, reads in enumerate(reach.reads) if reads]
    readers = [reach.tasks[i] for i in alive if reach.reads[i] & where]
    if not plan.by_path or len(alive) < 2 or len(readers) > 1:
        return ""
    paths = [path for i, path in enumerate(tree.paths(plan.params(plan.leaves))) if i in where]
    who = f"only the task {readers[0]!r} reads it" if readers else "no task reads it"
    return (
        f"where={paths[0] if len(paths) == 1 else paths!r} is no W: {who}, and norms there are exactly 0 otherwise; "
        "give the path of the last layer that all tasks share, or None for the default"
    )


def applied_twice(plan: Plan, paths: Sequence[str] | None = None) -> str:
    """What to say of a backbone that reads the `shared_linear`, which is the last thing that happens to h."""
    loss = plan.loss_fn
    if not isinstance(loss, MultiTaskLoss) or not isinstance(loss.last_shared, SharedLinear):
        return ""
    layer = paths or [loss.last_shared.weight, *([] if loss.last_shared.bias is None else [loss.last_shared.bias])]
    names = tree.paths(plan.params(plan.leaves))

    def backbone(leaves: list[Tensor]) -> list[Tensor]:
        assert loss.backbone is not None
        out = loss.backbone(plan.params(leaves), plan.batch)
        h: list[Tensor] = tree.flatten(out[0] if loss.has_aux else out)[0]
        return h

    twice = [names[i] for i in sorted(ends_of(plan, backbone)) if names[i] in layer]
    if not twice:
        return ""
    return (
        f"the backbone reads {twice[0]!r} itself, and last_shared=gn.shared_linear({twice[0]!r}, ...) applies it once "
        "more, so that norms there miss a part: let the backbone end before this layer, or, if the layer is meant to "
        "run twice, give last_shared as a function (params, h) -> z"
    )


def read_by_a_head(path: str) -> str:
    """What to say of a `shared_linear` that a head reads past z."""
    return (
        f"a head reads {path!r} itself, and norms at last_shared=gn.shared_linear({path!r}, ...) miss what does not go "
        "by way of z: let heads read z alone, or give last_shared as a function (params, h) -> z"
    )
