"""measure: one pass over a batch, by the engine that fits the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, MultiTaskLoss, StackedHeads
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.general import general
from gradnorm_func._measure.plan import Measured, Plan, Weights, wide
from gradnorm_func._measure.seam import seam
from gradnorm_func._measure.separable import separable
from gradnorm_func._measure.sharded import run_sharded, sharded
from gradnorm_func._reduce.stats import TaskStats

# What torch says of torch.autograd inside torch.func: of a leaf made in the loss, and of one that came with the batch.
AUTOGRAD_INSIDE = ("call Tensor.requires_grad_()", "to not have been used in the graph")


def measure(
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    weights: Weights = None,
    where: Where = None,
    norms: bool = True,
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
        weights: (T,) task weights w of the sum to differentiate; None leaves the sum's gradient out.
            A function (losses, grad_norms, example_norms) -> w chooses them in the same pass, at the price of a
            second backward pass through heads that own parameters.
        where: W, by dotted path prefix, a list of them, or a predicate on the path. None is z, the representation,
            for a `multi_task_loss` with a backbone, and every parameter otherwise.
        norms: False leaves the per-task gradients out: the cost is a plain training step's.
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
    at_z = where is None and isinstance(loss_fn, MultiTaskLoss) and loss_fn.backbone is not None
    measured = run_engine(
        loss_fn,
        params,
        batch,
        weights=weights,
        where=where,
        norms=norms,
        task_grads=not (norms_only or at_z),
        has_aux=has_aux,
        vectorize=vectorize,
        chunk_size=chunk_size,
        loss_scale=loss_scale,
    )
    stats = TaskStats(
        losses=measured.vector,
        grad_norms=measured.grad_norms,
        example_norms=measured.example_norms,
        task_grads=() if at_z or norms_only or not norms else as_tree(measured, params, where),
        grads=() if weights is None else tree.unflatten(tree.flatten(params)[1], measured.grads),
        num_examples=torch.as_tensor(num_examples),  # vmap returns tensors only
    )
    return (stats, measured.aux) if has_aux else stats


def run_engine(
    loss_fn: LossFn,
    params: Any,
    batch: Any,
    *,
    where: Where,
    weights: Weights = None,
    norms: bool = True,
    task_grads: bool = False,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    loss_scale: float | Tensor | None = None,
    force_general: bool = False,
) -> Measured:
    """The engine that fits `loss_fn`, run once. Only `grads` still carry the loss scale."""
    if not callable(loss_fn):
        raise ValueError(
            f"loss_fn={type(loss_fn).__name__} must be a function (params, batch) -> losses; "
            "the order of arguments is (state, params, loss_fn, batch)"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all tasks at once")
    if loss_scale is not None and (
        loss_scale.ndim != 0 if isinstance(loss_scale, Tensor) else not 0 < loss_scale < float("inf")
    ):
        raise ValueError(f"loss_scale={loss_scale} must be a positive number or a 0-d tensor; 2.0**16 is a usual start")
    tree.check_params(params)
    at = None if where is None else tree.select(params, where)
    plan = Plan(weights, at, norms, task_grads, has_aux, vectorize, chunk_size, loss_scale=loss_scale)
    if callable(weights):
        choose = weights

        def choose_unscaled(losses: Tensor, *norms: Any) -> Tensor:
            return choose(losses.to(wide(losses)), *tree.tree_map(plan.unscaled, norms))

        plan = plan._replace(weights=choose_unscaled)
    engine = _engine_for(loss_fn, params, plan, force_general)

    def run() -> Measured:
        if sharded(tree.flatten(params)[0]):
            return run_sharded(engine, loss_fn, params, batch, plan)
        return engine(loss_fn, params, batch, plan)

    measured = run() if torch.compiler.is_compiling() else _explained(run)
    norms_and_grads = (measured.grad_norms, measured.example_norms, measured.task_grads)
    unscaled = tree.tree_map(plan.unscaled, norms_and_grads)
    vector = measured.vector.to(wide(measured.vector))
    return measured._replace(vector=vector, grad_norms=unscaled[0], example_norms=unscaled[1], task_grads=unscaled[2])


def _explained(run: Callable[[], Measured]) -> Measured:
    """What `run` returns; if it fails as classic autograd inside torch.func does, with what to do about it."""
    try:
        return run()
    except RuntimeError as error:
        if any(sign in str(error) for sign in AUTOGRAD_INSIDE):
            raise RuntimeError(
                "the loss seems to use requires_grad_() and torch.autograd.grad, which do not work inside torch.func. "
                "Differentiate with respect to inputs by torch.func.grad, jvp or jacrev, under vmap over the points; "
                "or keep the loss, take the norms by torch.autograd.grad too, and give them to "
                "balance(state, gn.TaskStats(losses, grad_norms)): see help(gn.multi_task_loss)"
            ) from error
        raise


def _engine_for(loss_fn: LossFn, params: Any, plan: Plan, force_general: bool) -> Callable[..., Measured]:
    if not isinstance(loss_fn, MultiTaskLoss):
        return general
    if plan.has_aux != loss_fn.has_aux:
        raise ValueError(
            f"has_aux={plan.has_aux}, but multi_task_loss was made with has_aux={loss_fn.has_aux}: give both the same"
        )
    if loss_fn.backbone is None:
        return general if force_general else separable
    inside_stack = isinstance(loss_fn.heads, StackedHeads) and bool(
        set(plan.at or ()) & set(tree.select(params, loss_fn.heads.path))
    )
    return general if force_general or inside_stack else seam


def as_tree(measured: Measured, params: Any, where: Where) -> Any:
    """Task gradients in the structure of z, of params, or, where only some leaves were named, keyed by path."""
    if measured.z_treedef is not None and where is None:
        return tree.unflatten(measured.z_treedef, measured.task_grads)
    if where is None:
        return tree.unflatten(tree.flatten(params)[1], measured.task_grads)
    names = tree.paths(params)
    return {names[i]: grad for i, grad in zip(tree.select(params, where), measured.task_grads, strict=True)}
