"""Task-gradient norms at the weight of a linear layer, from the gradients at its output."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from gradnorm_func._core import tree
from gradnorm_func._core.loss import SharedLinear
from gradnorm_func._core.numerics import accum_dtype, asked, diagonal, full_precision, leaves_range, safe_sqrt
from gradnorm_func._measure.norms import PerTask, stacked
from gradnorm_func._measure.plan import Plan, filled
from gradnorm_func._measure.tape import tape

WORTH = 2**22  # multiplications that must be saved, or the longer way of the Gram identity does not pay


class Leaves(NamedTuple):
    """What of the layer is in W."""

    weight: bool
    bias: bool
    order: list[int]  # the indices of these leaves in params, the weight first


def leaves_of(layer: SharedLinear, plan: Plan) -> Leaves | None:
    """W as leaves of the layer; None if there is anything else in it. Names are looked up once for one structure."""
    assert plan.where is not None
    compiling = torch.compiler.is_compiling()  # which makes a constant of a tree without tensors
    names = tuple(tree.paths(plan.params(plan.leaves))) if compiling else _names(plan.treedef)
    of_layer = [names.index(path) for path in (layer.weight, layer.bias) if path in names]
    if not set(plan.where) <= set(of_layer):
        return None
    in_w = [i for i in of_layer if i in plan.where]
    paths = [names[i] for i in in_w]
    return Leaves(layer.weight in paths, layer.bias in paths, in_w)


@lru_cache(maxsize=64)
def _names(treedef: Any) -> tuple[str, ...]:
    return tuple(tree.paths(tree.unflatten(treedef, range(treedef.num_leaves))))


def before_activation(layer: SharedLinear, y: Tensor, z_grads: PerTask) -> PerTask:
    """∂L_i/∂y from ∂L_i/∂z, z = activation(y), task by task."""
    activation = layer.activation
    if activation is None:
        return z_grads
    run = tape(lambda leaves: ([activation(leaves[0])], ()), [y])
    if isinstance(z_grads, Tensor):
        pulled = run.pull_rows([z_grads], None, vectorize=True, chunk_size=None)[0]
        return torch.zeros_like(z_grads) if pulled is None else pulled
    return filled([run.pull([grad])[0] for grad in z_grads], [y] * len(z_grads))


def each(fn: Callable[[Tensor], Tensor], per_task: PerTask) -> PerTask:
    """`fn` of every task: under vmap where the tasks are stacked, else one by one, while each is in the cache."""
    if isinstance(per_task, Tensor):
        out: Tensor = vmap(fn)(per_task)
        return out
    return [fn(entry) for entry in per_task]


def gradients(h: Tensor, y_grads: Tensor, leaves: Leaves) -> list[Tensor]:
    """The gradients themselves, (T, out, in) of the weight and (T, out) of the bias, those of the two that are in W."""
    rows = h.reshape(-1, h.shape[-1]).to(y_grads.dtype)  # in what the layer was computed in
    cotangents = y_grads.reshape(y_grads.shape[0], -1, y_grads.shape[-1])
    with full_precision(h):
        # The transposed product with the view turned back: bmm is a fifth faster that way round.
        weight = torch.bmm(rows.mT.expand(cotangents.shape[0], -1, -1), cotangents).mT if leaves.weight else None
    bias = cotangents.sum(1) if leaves.bias else None
    return [grad for grad in (weight, bias) if grad is not None]


def norms(h: Tensor, y_grads: PerTask, leaves: Leaves) -> Tensor:
    r"""(T,) norms over weight and bias together, by whichever way takes fewer multiplications.

    The gradient at the weight is :math:`B_i^\top H` (B_i of shape (N, out), H of shape (N, in)); by the Gram
    identity its square norm is :math:`\langle B_i B_i^\top, H H^\top\rangle`, which needs no (out, in) matrix.
    The bias is one more column of ones in H.
    """
    rows = h.reshape(-1, h.shape[-1]).to(y_grads[0].dtype)
    (n, d_in), d_out, num_tasks = rows.shape, y_grads[0].shape[-1], len(y_grads)
    saved = num_tasks * n * d_out * d_in - (num_tasks * n * n * d_out + n * n * d_in)
    by_gram = leaves.weight and saved > WORTH
    with full_precision(h):
        if by_gram:
            inputs = _products(rows) + float(leaves.bias)
            # Rounding can take the square of a vanishing norm below zero.
            by_task = each(lambda g: (_products(g.reshape(n, d_out)) * inputs).sum().clamp(min=0), y_grads)
            squares = stacked(by_task)
            found = safe_sqrt(squares)
            if not (leaves_range(found) or asked(squares, lambda squares: _cancelled(squares, y_grads, inputs))):
                return found
        found = stacked(each(lambda y_grad: _norm(rows, y_grad.reshape(n, d_out), leaves), y_grads))
        if not leaves_range(found):
            return found
        exact = [_norm(rows.double(), y_grad.reshape(n, d_out).double(), leaves) for y_grad in y_grads]
    return torch.stack(exact).to(found.dtype)


def _cancelled(squares: Tensor, y_grads: PerTask, inputs: Tensor) -> Tensor:
    """Whether the Gram identity has lost most digits of a norm: near a stationary point its terms cancel."""
    sizes = torch.stack([torch.linalg.vector_norm(y_grad, dtype=squares.dtype) for y_grad in y_grads]).square()
    return (squares < 2**10 * torch.finfo(squares.dtype).eps * sizes * diagonal(inputs).sum()).any()


def _products(x: Tensor) -> Tensor:
    """X Xᵀ, in float32 at least: squares leave the range of float16, and in their sum much may cancel."""
    x = x.to(accum_dtype(x))
    return x @ x.mT


def _norm(rows: Tensor, cotangent: Tensor, leaves: Leaves) -> Tensor:
    """The norm of one task at weight and bias."""
    parts = [rows.mT @ cotangent] if leaves.weight else []
    parts += [cotangent.sum(0, dtype=accum_dtype(cotangent))] if leaves.bias else []
    norms = [torch.linalg.vector_norm(part, dtype=accum_dtype(part)) for part in parts]
    both: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    return both
