"""What both engines share: the plan of a pass, its result, pullbacks over the task axis, norms, aux."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vjp, vmap

from gradnorm_func import _tree
from gradnorm_func._loss import wrong_count

# One leaf of z for all tasks: T tensors, or one (T, ...) tensor where the heads are stacked.
PerTask: TypeAlias = list[Tensor] | Tensor

# of the sum to differentiate: (T,), or a function of (losses, norms, example norms) that gives them, or nothing
Weights: TypeAlias = Tensor | Callable[[Tensor, Any, Any], Tensor] | None


class Measured(NamedTuple):
    """What an engine returns. Gradients are lists of leaves; `()` is what was not asked for."""

    losses: Any  # in the structure of the user's losses
    vector: Tensor  # (T,)
    grad_norms: Any = ()  # (T,)
    example_norms: Any = ()  # (T,)
    task_grads: Any = ()  # leaves of W, each (T, ...)
    grads: Any = ()  # leaves of params
    aux: Any = ()
    z_treedef: Any = None  # structure of z, where W is z
    kept: Any = ()  # what `Exchange.gather` kept


class Exchange(NamedTuple):
    """What passes between z and the heads, where it is not z itself one way and Σ w_i ∂L_i/∂z the other."""

    spread: Callable[[list[Tensor], Any], list[Tensor]]  # leaves of z, their structure -> (T, ...): each head's own
    scale: Callable[[Tensor], Tensor]  # (T,) losses -> their cotangents
    # losses, leaves of z, ([] or [backbone_loss]), gradients at what was spread -> the cotangents of the two, to keep
    gather: Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor]], tuple[list[Tensor], Any]]
    backbone_loss: Callable[[Any, Any, Any], Tensor] | None  # (params, z, batch) -> scalar, which no head sees


class Plan(NamedTuple):
    """What to measure, and how."""

    weights: Weights  # of the sum to differentiate: (T,), or a function of (losses, norms, example norms), or None
    at: list[int] | None  # indices of the leaves of W; None is z
    norms: bool  # are the norms wanted?
    task_grads: bool  # are the task gradients themselves wanted?
    has_aux: bool
    vectorize: bool
    chunk_size: int | None
    exchange: Exchange | None = None

    def check_count(self, vector: Tensor) -> None:
        """There must be as many weights as losses."""
        if isinstance(self.weights, Tensor) and self.weights.shape != vector.shape:
            raise ValueError(wrong_count(vector.shape[0], self.weights.numel()))


def quiet() -> Callable[[], AbstractContextManager[Any]]:
    """What keeps autograd from recording, unless a surrounding transform is to differentiate through it.

    Without it a pullback records its own second-order graph, and parameters with requires_grad leave one behind.
    To be asked before the first vjp of our own, which is a transform too.
    """
    return nullcontext if _tree.inside_transform() else torch.no_grad


def vjp_aux(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any], Any]:
    """torch.func.vjp with aux: (output, pullback, aux)."""
    out: tuple[Any, Callable[..., Any], Any] = vjp(fn, *primals, has_aux=True)  # type: ignore[assignment]
    return out


def pull_all(pull: Callable[[Any], Any], cotangents: Any, plan: Plan) -> Any:
    """The pullback over a leading task axis of the cotangents: vectorised, in chunks, or as a loop."""
    if plan.vectorize:
        return vmap(pull, chunk_size=plan.chunk_size)(cotangents)
    leaves, treedef = _tree.flatten(cotangents)
    pulled = [pull(_tree.unflatten(treedef, [leaf[i] for leaf in leaves])) for i in range(leaves[0].shape[0])]
    return _tree.tree_map(lambda *rows: torch.stack(rows), *pulled)


class AuxBox:
    """Carries aux past torch.func, which takes only tensors: the rest of it stays behind and is put back.

    By torch's own pytree, for the order of leaves does not matter here, and Dynamo knows it better: of a dict with no
    leaves, which an aux may well be, optree's flatten does not trace.
    """

    def __init__(self) -> None:
        self.leaves: list[Any] = []
        self.treedef: Any = None

    def strip(self, aux: Any) -> list[Tensor]:
        """The tensors of aux; everything else is remembered."""
        self.leaves, self.treedef = pytree.tree_flatten(aux)
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in self.leaves]
        return tensors

    def fill(self, tensors: list[Tensor]) -> Any:
        """aux, with these tensors in place."""
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if leaf is None else leaf[0] for leaf in self.leaves], self.treedef)


def split_aux(out: Any, has_aux: bool, name: str = "loss_fn") -> tuple[Any, Any]:
    """(losses, aux) of what a loss_fn returned."""
    if not has_aux:
        return out, ()
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"has_aux=True, so {name} must return (losses, aux), not {type(out).__name__}")
    return out


def row_norms(leaves: list[Tensor]) -> Tensor:
    """(T,) norms of leaves (T, ...), accumulated in float32 at least."""
    dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
    parts = [torch.linalg.vector_norm(leaf.reshape(leaf.shape[0], -1), dim=1, dtype=dtype) for leaf in leaves]
    norms: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms
