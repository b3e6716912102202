"""Plain autograd: models that are not functions of their parameters. DDP, FSDP2, compiled, checkpointed, a Trainer.

Such a wrapper does its work (all-reduce, reduce-scatter, recomputation) in hooks of the autograd graph, which
torch.func does not run. But a balancer needs T numbers only, so that nothing else has to leave autograd: one copy of z
for each task makes every ∂L_i/∂z separate, and the step remains the caller's own `backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import brought, diagonal, promoted, row_norms, safe_sqrt
from gradnorm_func._core.tasks import remember_cut_off, remember_names, task_names, task_vector, weights_like
from gradnorm_func._core.tracing import inside_transform
from gradnorm_func._measure.norms import PerTask, norms_at_z, norms_by_example, stacked
from gradnorm_func._measure.plan import NEEDS, Needs, check_word
from gradnorm_func._measure.reach import cut_off
from gradnorm_func._measure.sharded import sharded, whole
from gradnorm_func._measure.tape import dense, nodes
from gradnorm_func._reduce.stats import TaskStats, gramian_of


def measure_losses(
    losses: Any,
    copies: Any = None,
    *,
    where: Any = None,
    weights: Tensor | None = None,
    needs: Needs = "example_norms",
    scale: float | Tensor = 1.0,
    num_examples: float | Tensor = 1.0,
) -> TaskStats:
    r"""TaskStats of losses that plain autograd computed, for models that are not functions of their parameters.

    ::

        copies = gn.fork(backbone(x), heads)                              # any modules: DDP, FSDP2, compiled, ...
        losses = {name: loss_of[name](head(copies[name]), y) for name, head in heads.items()}
        stats = gn.measure_losses(losses, copies, needs=balancer.needs, num_examples=len(x))  # the heads, backwards
        state, info = balancer.balance(state, reduce(stats))              # reduce: the mean over ranks
        (share * gn.weighted_sum(losses, info.weights)).backward()

    Heads that are to learn from their own losses take another last line: see `weigh_trunk`. DDP and FSDP2 average
    gradients over the R ranks: `share` is R n_r / Σ n_r, 1 for batches of one size. With micro-batches n_r is the
    size of this one, the sum goes over them all, `merge` unites their stats, and the backward passes use the
    weights from before. GradNorm always does, so it can have the norms of the step's own backward pass, and the
    heads run backwards once: take `weights = balancer.weights(state, gn.measure_losses(losses, needs="losses"))`
    (over ranks of its `all_reduce`), give them here, and call this after `backward` and before `balance`. With
    micro-batches the losses of a first step are known too late for GradNorm's invariant form: give `init` its
    `initial_losses`, or take `form="log"`. Gradients that were written for a step with `info.finite` False are to
    be dropped, not stepped on.

    Args:
        losses: T scalars with their graph: a (T,) tensor, or a pytree such as the dict of tasks.
        copies: from `fork`: then W is z. By name if the losses are, else in the order of the losses.
        where: instead of copies, W itself: a parameter, or a list or dict of them, at which each loss is
            differentiated on its own. Not the parameters of an FSDP2 module, for the graph does not end at those.
        weights: (T,) w_i, if (scale · Σ w_i L_i).backward() was called already; copies only. A task of weight 0 has
            the norm NaN.
        needs: what the rule looks at, `balancer.needs`: "norms"; "example_norms", of z, beside those; "gramian", which
            has the norms on its diagonal; or "losses", for which nothing is run backwards and copies are not needed.
        scale: what else that sum was multiplied with: `share`, or a GradScaler's scale. Without `weights`, a factor
            against underflow. The result is free of it.
        num_examples: as in `measure`.

    Returns:
        TaskStats without `grads`: those are written by the caller's `backward`. `merge` unites the stats of
        micro-batches and ranks.

    Raises:
        ValueError: if losses have no graph or do not match the copies, if a head was given another task's copy, if no
            loss, or only one, depends on `where`; or if there were no backward pass, but weights, or the other way
            round.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> trunk, head = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        >>> copies = gn.fork(trunk(torch.ones(4, 3)), ["size", "fit"])
        >>> losses = {"size": 3 * copies["size"].sum(), "fit": head(copies["fit"]).square().mean()}
        >>> stats = gn.measure_losses(losses, copies)
        >>> bool(torch.isclose(gn.by_name(losses, stats.grad_norms)["size"], torch.tensor(72.0).sqrt()))
        True
    """
    if (copies is None) == (where is None) and (needs != "losses" or copies is not None):
        raise ValueError("give either copies (of z, from gn.fork) or where (parameters), the place of the norms")
    check_word("needs", needs, NEEDS)
    if inside_transform():
        raise ValueError("measure_losses runs autograd, which torch.func does not see: use gn.measure inside of it")
    vector = whole(task_vector(losses))  # in which a number, of a task that is absent, is a loss without a graph
    stats = TaskStats(losses=vector.detach(), num_examples=torch.as_tensor(num_examples))
    remember_names(stats.losses, losses)
    if needs == "losses":
        return stats
    if not vector.requires_grad:
        raise ValueError("losses have no graph: were they computed under no_grad, or from a detached z?")
    if without := cut_off(losses):
        names = task_names(losses)
        remember_cut_off(stats.losses, [names[i] for i in without])
    if where is not None:
        if weights is not None:
            raise ValueError("weights= is for copies, which keep their gradients; at where=, call before backward()")
        if any(not isinstance(leaf, Tensor) for leaf in tree.flatten(where)[0]):
            raise ValueError(
                f"where={where!r} must be the parameters themselves here, for there are no params in which to look a "
                "path up: where=model.trunk[2].weight, or dict(model.trunk[2].named_parameters())"
            )
        return _at_parameters(stats, tree.by_key(losses), where, brought(scale, vector), needs)
    tasks = [
        [copy] if isinstance(copy, Tensor) else tree.flatten(copy)[0]
        for copy in _checked(copies, losses, vector.shape[0])
    ]
    if weights is None:
        seeds = brought(scale, vector).expand_as(vector)
        grads = _pulled(vector, tasks, seeds)
    else:
        seeds, grads = weights_like(vector, losses, weights), _written(tasks)
        seeds = seeds if isinstance(scale, float) and scale == 1.0 else seeds * brought(scale, vector)
    _require_own_copies(losses, tasks, grads)
    return _at_copies(stats, _by_leaf(tasks, grads), promoted(seeds.detach()), needs)


def _pulled(vector: Tensor, tasks: list[list[Tensor]], seeds: Tensor) -> Sequence[Tensor | None]:
    """The gradients at the copies, task by task, from a pass through the heads alone."""
    flat = [leaf for leaves in tasks for leaf in leaves]
    if not all(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in flat):
        raise ValueError(
            "the copies, or some leaves of them, have no graph: was the backbone run under no_grad, or is it frozen? "
            "What does not depend on the backbone is no part of z"
        )
    # One pass: a copy is read by its own task alone.
    grads: Sequence[Tensor | None] = _before_backward(
        lambda: torch.autograd.grad(vector, flat, seeds, retain_graph=True, allow_unused=True),
        "Give weights=, those of the sum that went backward, and the norms are those of that pass; or call",
    )
    for leaf in flat:
        leaf.grad = None  # kept from this pass too, and the backward pass of the step would add to it
    if all(grad is None for grad in grads):
        raise ValueError(
            "no loss depends on its copy of z: are the copies those that the heads were given? A wrapper may have "
            "replaced them on the way out (Accelerate does so with bfloat16: fork z.float(); DDP with "
            "find_unused_parameters)"
        )
    return grads


def _before_backward(pull: Callable[[], Any], else_: str) -> Any:
    """What is pulled through the graph of losses, which a backward pass frees."""
    try:
        return pull()
    except RuntimeError as error:
        if "a second time" not in str(error):
            raise
        raise ValueError(
            f"the graph of losses is gone: backward() has run already. {else_} measure_losses before backward()"
        ) from error


def _written(tasks: list[list[Tensor]]) -> Sequence[Tensor | None]:
    """The same, as the step's own backward pass has left them on the copies."""
    grads = [leaf.grad for leaves in tasks for leaf in leaves]
    if all(grad is None for grad in grads):
        raise ValueError("no gradient has come to the copies: call backward() first, or leave weights out")
    return grads


def _require_own_copies(losses: Any, tasks: list[list[Tensor]], grads: Sequence[Tensor | None]) -> None:
    """Refuses a head that was given another task's copy, or z; a loss that reads none, such as a penalty, is at z 0."""
    width = len(tasks[0])
    unread = [i for i in range(len(tasks)) if all(grad is None for grad in grads[i * width : (i + 1) * width])]
    if not unread or isinstance(losses, Tensor):
        return
    names, terms = task_names(losses), tree.flatten(tree.by_key(losses))[0]
    forked = [leaf.grad_fn.next_functions[0][0] for leaf in tasks[0] if leaf.grad_fn is not None]  # of z itself
    for i in unread:
        below = list(nodes([getattr(terms[i], "grad_fn", None)]))  # a number has none
        edges = {edge for node in below for edge in node.next_functions}
        for j, leaves in enumerate(tasks):
            if j != i and any((leaf.grad_fn, leaf.output_nr) in edges for leaf in leaves):
                raise ValueError(
                    f"losses[{names[i]!r}] does not read its own copy of z, but that of {names[j]!r}: give its head "
                    f"copies[{names[i]!r}]"
                )
        if not set(below).isdisjoint(forked):
            raise ValueError(
                f"losses[{names[i]!r}] does not read its own copy of z, but z: give its head copies[{names[i]!r}]"
            )


def _by_leaf(tasks: list[list[Tensor]], grads: Sequence[Tensor | None]) -> list[PerTask]:
    width, flat = len(tasks[0]), [leaf for leaves in tasks for leaf in leaves]
    zeros = [whole(torch.zeros_like(x) if grad is None else grad) for x, grad in zip(flat, grads, strict=True)]
    return [zeros[k::width] for k in range(width)]


def _at_copies(stats: TaskStats, z_grads: list[PerTask], seeds: Tensor, needs: str) -> TaskStats:
    """Norms or Gramian of gradients that carry the seeds, without them; NaN for a weight of 0."""
    if needs == "gramian":
        gramian = gramian_of([stacked(leaf) for leaf in z_grads]) / seeds[:, None] / seeds
        squares = diagonal(gramian)
        return stats._replace(grad_norms=safe_sqrt(squares), square_norms=squares, gramian=gramian)
    if needs == "example_norms":
        norms, example_norms = (row / seeds.abs() for row in norms_by_example(z_grads))
        stats = stats._replace(example_norms=example_norms)
    else:
        norms = norms_at_z(z_grads) / seeds.abs()
    return stats._replace(grad_norms=norms, square_norms=norms.square())


def _checked(copies: Any, losses: Any, count: int) -> list[Any]:
    """The copies in task order."""
    if isinstance(copies, Mapping):
        names, by_task = task_names(losses), {str(name): copy for name, copy in copies.items()}
        if sorted(by_task) != sorted(names):
            raise ValueError(f"the copies are for the tasks {sorted(by_task)}, but the losses are {names}")
        return [by_task[name] for name in names]
    if isinstance(losses, Mapping) and not isinstance(copies, Tensor):
        raise ValueError(
            "losses have names, and copies are a list, so that nobody knows whose copy is whose: "
            "gn.fork(z, losses.keys()), or the dict of heads, makes copies with names"
        )
    if isinstance(copies, Tensor) or len(copies) != count:
        size = "one tensor" if isinstance(copies, Tensor) else f"{len(copies)} of them"
        raise ValueError(f"copies: {size}, for {count} losses; they are what gn.fork(z, {count}) returned")
    return list(copies)


def _pulled_to(loss: Tensor, leaves: list[Tensor], seed: Tensor) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, leaves, seed, retain_graph=True, allow_unused=True)


def _at_parameters(stats: TaskStats, losses: Any, where: Any, scale: Tensor, needs: str) -> TaskStats:
    """One task after the other: each pass goes through its own head and what lies between that and W."""
    terms = losses.unbind() if isinstance(losses, Tensor) else tree.flatten(losses)[0]
    terms = [whole(torch.as_tensor(loss)) for loss in terms]
    leaves, treedef = tree.flatten(where)
    rows = [
        dense(_before_backward(functools.partial(_pulled_to, loss, leaves, scale.to(loss.dtype)), "Call"))
        if loss.requires_grad
        else [None] * len(leaves)
        for loss in terms
    ]
    names, readers = task_names(losses), [i for i, row in enumerate(rows) if any(grad is not None for grad in row)]
    if len(readers) == 1 and sum(term.requires_grad for term in terms) > 1:
        raise ValueError(
            f"only the task {names[readers[0]]!r} reads where=, and the norms of the others are exactly 0 there: give "
            "the weight of the last layer that all tasks share"
        )
    unread = [all(row[k] is None for row in rows) for k in range(len(leaves))]
    if all(unread) or any(unread[k] for k in sharded(leaves)):
        raise ValueError(
            f"no loss depends on where[{tree.paths(where)[unread.index(True)]!r}]: if that is a parameter of an FSDP2 "
            "module, the graph does not end at it, so keep W outside of the wrapper, or take the norms at z (gn.fork)"
        )
    filled = []
    for k, leaf in enumerate(leaves):
        column = [torch.zeros_like(leaf) if grad is None else grad for grad in (row[k] for row in rows)]
        filled.append(torch.stack([whole(grad) / scale for grad in column]))
    gramian = gramian_of(filled) if needs == "gramian" else ()
    return stats._replace(grad_norms=row_norms(filled), gramian=gramian, task_grads=tree.unflatten(treedef, filled))
