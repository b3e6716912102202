"""measure: one pass over a batch, by the engine that fits the loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, MultiTaskLoss, StackedHeads
from gradnorm_func._core.tracing import no_graph, traced
from gradnorm_func._core.trained import apart
from gradnorm_func._core.tree import Tensors, Where
from gradnorm_func._measure.general import general
from gradnorm_func._measure.plan import HEADS, NEEDS, Heads, Measured, Needs, Plan, check_word, plan_of
from gradnorm_func._measure.seam import seam
from gradnorm_func._measure.separable import separable
from gradnorm_func._measure.sharded import explain_sharded, sharded, whole_stats
from gradnorm_func._measure.tape import fresh_casts, leaves_of, without_graph
from gradnorm_func._reduce.stats import TaskStats


def measure(
    params: Tensors,
    loss_fn: LossFn,
    batch: Any,
    *,
    weights: Tensor | Callable[[TaskStats], Tensor] | None = None,
    where: Where = None,
    needs: Needs = "example_norms",
    heads: Heads = "weighted",
    norms_only: bool = False,
    num_examples: float | Tensor = 1.0,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    loss_scale: float | Tensor | None = None,
) -> Any:
    r"""One pass: the T losses, what a balancer needs of each task's gradient at W, and :math:`\nabla \sum_i w_i L_i`.

    Args:
        params: pytree of floating-point tensors. Nothing is written to it, and no autograd graph is left on it.
        loss_fn: `loss_fn(params, batch) -> losses`, a (T,) tensor or a pytree of T scalars; a `multi_task_loss`
            is measured through its seam.
        batch: anything that `loss_fn` takes.
        weights: (T,) task weights w of the sum to differentiate; None leaves the sum's gradient out. A function
            stats -> w chooses them in the same pass, at the price of a second backward pass through heads that own
            parameters.
        where: W, by dotted path prefix, a list of them, or a predicate on the path. None is z, the representation,
            for a `multi_task_loss` with a backbone, and every parameter otherwise.
        needs: what to measure of each task's gradient, `balancer.needs` for one: "norms"; "example_norms", of z, beside
            those; "gramian", which has the norms on its diagonal; or "losses", which is nothing of it: the cost is a
            plain training step's.
        heads: what the heads of a `multi_task_loss` learn from: "weighted", the sum Σ w_i L_i, or "own", each its own
            loss at weight 1, so that only what is shared gets the weighted sum.
        norms_only: at parameters, keep the norms and not the gradients. Cheaper, but such stats cannot be merged.
        num_examples: the share of this batch when stats are merged: its number of examples, or the default 1 for
            micro-batches of one size.
        has_aux: then `loss_fn` returns (losses, aux), and so does this function: (stats, aux).
        vectorize: False pulls back task by task in a loop, for operations without a batching rule.
        chunk_size: at most that many tasks at a time in the vectorised pass, to bound memory.
        loss_scale: multiplies the losses before the backward pass, so that gradients in float16 do not underflow: a
            positive number or a 0-d tensor, of which no value is asked. Norms and task gradients come without it, in
            float32; `grads` still carries it, as what `scaler.scale(loss).backward()` leaves behind does: leave it to
            `torch.amp.GradScaler`, or divide by it.

    Returns:
        TaskStats, or (TaskStats, aux). Losses and norms are at least float32, `grads` are as the parameters are.

    Raises:
        ValueError: for a path that matches nothing, parameters that are not floating point, losses that are not
            scalars, or an aux that does not come; for parameters that an FSDP2 module shards, which torch.func cannot
            differentiate (`fork` and `measure_losses` are for those).

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda params, batch: {"a": (params["w"] * batch).sum(), "b": params["w"].square().sum()}
        >>> stats = gn.measure({"w": torch.tensor([3.0, 4.0])}, loss_fn, torch.tensor([1.0, 0.0]),
        ...                    weights=torch.tensor([1.0, 0.5]))
        >>> stats.grad_norms, stats.grads
        (tensor([ 1., 10.]), {'w': tensor([4., 4.])})
    """
    check_word("needs", needs, NEEDS)
    check_word("heads", heads, HEADS)
    rule = (lambda stats: (weights(stats), ())) if callable(weights) else weights
    plan = plan_of(
        params,
        loss_fn,
        batch,
        where,
        rule,
        needs,
        heads=heads,
        merges=not norms_only,
        has_aux=has_aux,
        vectorize=vectorize,
        chunk_size=chunk_size,
        loss_scale=loss_scale,
    )
    stats, measured = stats_of(plan, torch.as_tensor(num_examples))  # vmap returns tensors only
    return (stats, measured.aux) if has_aux else stats


def stats_of(plan: Plan, num_examples: float | Tensor = 1.0) -> tuple[TaskStats, Measured]:
    """One pass: the stats as the user sees them, with trees for lists of leaves."""
    measured = run_engine(plan)
    stats: TaskStats = measured.stats
    return stats._replace(
        task_grads=as_tree(plan, measured) if isinstance(stats.task_grads, list) else (),
        grads=plan.params(stats.grads) if isinstance(stats.grads, list) else (),
        num_examples=num_examples,
    ), measured


def run_engine(plan: Plan, engine: Callable[[Plan], Measured] | None = None) -> Measured:
    """The engine that fits the loss, or another one, run once."""
    engine = _engine_for(plan) if engine is None else engine
    compiling = torch.compiler.is_compiling()
    with no_graph(), nullcontext() if compiling else fresh_casts():
        plan = plan._replace(leaves=leaves_of(plan.leaves))
        if not sharded(plan.leaves):
            measured = engine(plan)
        else:
            try:
                measured = whole_stats(engine(plan))
            except ValueError:
                raise
            except Exception as error:
                raise explain_sharded(plan, error) from error
        if isinstance(measured.stats.grads, list) and not traced():
            measured = measured._replace(stats=measured.stats._replace(grads=apart(measured.stats.grads)))
        return measured._replace(aux=without_graph(measured.aux)) if plan.has_aux else measured


def _engine_for(plan: Plan) -> Callable[[Plan], Measured]:
    loss = plan.loss_fn
    if not isinstance(loss, MultiTaskLoss):
        return general
    if loss.backbone is None:
        return separable
    if isinstance(loss.heads, StackedHeads) and plan.where is not None:
        inside = tree.select(plan.params(plan.leaves), loss.heads.path)
        if set(inside) & set(plan.where):
            return general
    return seam


def named_losses(plan: Plan, measured: Measured) -> Any:
    """The losses in the structure in which the user's function returns them."""
    loss = plan.loss_fn
    if not isinstance(loss, MultiTaskLoss) or isinstance(loss.heads, StackedHeads):
        return measured.losses
    vector: Tensor = measured.stats.losses
    return loss.structure(vector.unbind())


def tasks_of(plan: Plan, measured: Measured) -> Any:
    """What has the names of the tasks: the loss with its seam, or what another one has returned."""
    loss = plan.loss_fn
    named = isinstance(loss, MultiTaskLoss) and not isinstance(loss.heads, StackedHeads)
    return loss if named else measured.losses


def as_tree(plan: Plan, measured: Measured) -> Any:
    """Task gradients in the structure of z, of params, or, where only some leaves were named, keyed by path."""
    rows = measured.stats.task_grads
    if plan.where is None:
        return tree.unflatten(measured.z_treedef, rows)
    if not plan.by_path:
        return plan.params(rows)
    names = tree.paths(plan.params(plan.leaves))
    return {names[i]: grad for i, grad in zip(plan.where, rows, strict=True)}
