"""Task gradients, their norms and their angles, for looking at."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.numerics import cosines
from gradnorm_func._core.tree import Tensors, Where
from gradnorm_func._measure.measure import as_tree, named_losses, run_engine
from gradnorm_func._measure.plan import EngineOptions, plan_of


def task_grads(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    **options: Unpack[EngineOptions],
) -> tuple[Any, ...]:
    r"""The losses and every task's gradient at W, :math:`\nabla_W L_i`, in one vectorised pass.

    Args:
        loss_fn, params, batch, where, has_aux, vectorize, chunk_size: as in `measure`.

    Returns:
        (losses, grads): the losses as `loss_fn` returned them, and the gradients with a leading task axis, (T, ...):
        in the structure of params, or of z where W is z; if `where` names parameters, a dict keyed by their paths.
        With `has_aux`, (losses, grads, aux).

    Raises:
        ValueError: as `measure` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda params, x: {"a": (x * params["w"]).sum(), "b": params["w"].square().sum()}
        >>> losses, grads = gn.task_grads(loss_fn, {"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 4.0]))
        >>> grads["w"]
        tensor([[3., 4.],
                [2., 4.]])
    """
    plan = plan_of(params, loss_fn, batch, where, None, "norms", task_grads=True, has_aux=has_aux, **options)
    measured = run_engine(plan)
    grads = as_tree(plan, measured)
    return (named_losses(plan, measured), grads, measured.aux) if has_aux else (named_losses(plan, measured), grads)


def task_grad_norms(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    **options: Unpack[EngineOptions],
) -> Tensor:
    r"""Every task's gradient norm at W, :math:`\|\nabla_W L_i\|_2`, unweighted.

    Args:
        loss_fn, params, batch, where, vectorize, chunk_size: as in `measure`.
        has_aux: then `loss_fn` returns (losses, aux), and the aux is dropped.

    Returns:
        (T,) in task order (`gn.task_names`), at least float32.

    Raises:
        ValueError: as `measure` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: [(3 * w[0] + 4 * w[1]) * x, w.sum() * 0]
        >>> gn.task_grad_norms(loss_fn, torch.ones(2), 2.0)
        tensor([10.,  0.])
    """
    plan = plan_of(params, loss_fn, batch, where, None, "norms", has_aux=has_aux, **options)
    norms: Tensor = run_engine(plan).stats.grad_norms
    return norms


def task_gramian(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    **options: Unpack[EngineOptions],
) -> Tensor:
    r"""The Gramian of the task gradients at W, :math:`M_{ij} = \langle \nabla_W L_i, \nabla_W L_j \rangle`.

    Args:
        loss_fn, params, batch, where, vectorize, chunk_size: as in `measure`.
        has_aux: then `loss_fn` returns (losses, aux), and the aux is dropped.

    Returns:
        (T, T), symmetric, at least float32.

    Raises:
        ValueError: as `measure` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: [w[0], w[0] + w[1]]
        >>> gn.task_gramian(loss_fn, torch.ones(2), None)
        tensor([[1., 1.],
                [1., 2.]])
    """
    plan = plan_of(params, loss_fn, batch, where, None, "gramian", has_aux=has_aux, **options)
    gramian: Tensor = run_engine(plan).stats.gramian
    return gramian


def task_cosine_similarity(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    **options: Unpack[EngineOptions],
) -> Tensor:
    r"""Cosines between the task gradients at W; a negative one is a conflict.

    Args:
        loss_fn, params, batch, where, vectorize, chunk_size: as in `measure`.
        has_aux: then `loss_fn` returns (losses, aux), and the aux is dropped.

    Returns:
        (T, T) in [-1, 1], ones on the diagonal; 0 in the row and column of a task whose gradient is exactly zero.

    Raises:
        ValueError: as `measure` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: [w[0], -2 * w[0]]
        >>> gn.task_cosine_similarity(loss_fn, torch.ones(2), None)
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    return cosines(task_gramian(loss_fn, params, batch, where=where, has_aux=has_aux, **options))
