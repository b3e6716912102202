"""Task gradients, their norms and their angles, for looking at."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.tree import Tensors, Where
from gradnorm_func._measure.measure import as_tree, run_engine
from gradnorm_func._measure.plan import full_precision


@overload
def task_grads(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: Literal[False] = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> tuple[Any, Any]: ...


@overload
def task_grads(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: Literal[True],
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> tuple[Any, Any, Any]: ...


def task_grads(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
) -> Any:
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
    options: dict[str, Any] = {"has_aux": has_aux, "vectorize": vectorize, "chunk_size": chunk_size}
    measured = run_engine(loss_fn, params, batch, where=where, task_grads=True, **options)
    grads = as_tree(measured, params, where)
    return (measured.losses, grads, measured.aux) if has_aux else (measured.losses, grads)


def task_grad_norms(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
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
    measured = run_engine(
        loss_fn, params, batch, where=where, has_aux=has_aux, vectorize=vectorize, chunk_size=chunk_size
    )
    norms: Tensor = measured.grad_norms
    return norms


def task_gramian(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
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
    options: dict[str, Any] = {"has_aux": has_aux, "vectorize": vectorize, "chunk_size": chunk_size}
    measured = run_engine(loss_fn, params, batch, where=where, task_grads=True, **options)
    return gramian_of(measured.task_grads)


def task_cosine_similarity(
    loss_fn: LossFn,
    params: Tensors,
    batch: Any,
    *,
    where: Where = None,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
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
    gram = task_gramian(
        loss_fn, params, batch, where=where, has_aux=has_aux, vectorize=vectorize, chunk_size=chunk_size
    )
    return cosines_of(gram)


def gramian_of(task_grads: list[Tensor]) -> Tensor:
    """(T, T) of leaves (T, ...), in at least float32."""
    gram: Tensor | None = None
    for leaf in task_grads:
        rows = leaf.reshape(leaf.shape[0], -1).to(torch.promote_types(leaf.dtype, torch.float32))
        with full_precision(rows):
            gram = rows @ rows.mT if gram is None else gram + rows @ rows.mT
    assert gram is not None
    return gram


def cosines_of(gram: Tensor) -> Tensor:
    """(T, T) in [-1, 1]; 0 in the row and column of a gradient that is exactly zero."""
    norms = tree.safe_sqrt(gram.diagonal())
    scale = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)
    # Rounding must not make a cosine of more than 1.
    return (gram * scale[:, None] * scale[None, :]).clamp(-1, 1)
