"""measure: one pass over a batch, by the engine that fits the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func import _tree
from gradnorm_func._engine import Measured, Plan, Weights
from gradnorm_func._general import general
from gradnorm_func._loss import LossFn, MultiTaskLoss, StackedHeads
from gradnorm_func._seam import seam
from gradnorm_func._separable import separable
from gradnorm_func._stats import TaskStats
from gradnorm_func._tree import Where


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

    Returns:
        TaskStats, or (TaskStats, aux).

    Raises:
        ValueError: for a path that matches nothing, parameters that are not floating point, losses that are not
            scalars, or an aux that does not come.

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
    )
    stats = TaskStats(
        losses=measured.vector,
        grad_norms=measured.grad_norms,
        example_norms=measured.example_norms,
        task_grads=() if at_z or norms_only or not norms else as_tree(measured, params, where),
        grads=() if weights is None else _tree.unflatten(_tree.flatten(params)[1], measured.grads),
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
    force_general: bool = False,
) -> Measured:
    """The engine that fits `loss_fn`, run once."""
    if not callable(loss_fn):
        raise ValueError(
            f"loss_fn={type(loss_fn).__name__} must be a function (params, batch) -> losses; "
            "the order of arguments is (state, params, loss_fn, batch)"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all tasks at once")
    _tree.check_params(params)
    at = None if where is None else _tree.select(params, where)
    plan = Plan(weights, at, norms, task_grads, has_aux, vectorize, chunk_size)
    if not isinstance(loss_fn, MultiTaskLoss):
        return general(loss_fn, params, batch, plan)
    if has_aux != loss_fn.has_aux:
        raise ValueError(
            f"has_aux={has_aux}, but multi_task_loss was made with has_aux={loss_fn.has_aux}: give both the same"
        )
    if loss_fn.backbone is None:
        return (general if force_general else separable)(loss_fn, params, batch, plan)
    inside_stack = isinstance(loss_fn.heads, StackedHeads) and bool(
        set(at or ()) & set(_tree.select(params, loss_fn.heads.path))
    )
    return (general if force_general or inside_stack else seam)(loss_fn, params, batch, plan)


def as_tree(measured: Measured, params: Any, where: Where) -> Any:
    """Task gradients in the structure of z, of params, or, where only some leaves were named, keyed by path."""
    if measured.z_treedef is not None and where is None:
        return _tree.unflatten(measured.z_treedef, measured.task_grads)
    if where is None:
        return _tree.unflatten(_tree.flatten(params)[1], measured.task_grads)
    names = _tree.paths(params)
    return {names[i]: grad for i, grad in zip(_tree.select(params, where), measured.task_grads, strict=True)}
