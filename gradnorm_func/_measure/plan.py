"""What both engines share: the plan of a pass, its result, pullbacks over the task axis, norms, aux."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce, wraps
from typing import Any, NamedTuple, ParamSpec, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vjp, vmap

from gradnorm_func._core import tree
from gradnorm_func._core.loss import wrong_count
from gradnorm_func._measure import ownership

P = ParamSpec("P")

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
    loss_scale: float | Tensor | None = None  # of every cotangent of the losses

    def seeds(self, cotangents: Tensor, dtype: torch.dtype) -> Tensor:
        """The cotangents of the losses, which are of `dtype`, with the loss scale on them."""
        if self.loss_scale is not None:  # in float32: the scale alone may be too large for float16
            cotangents = cotangents.to(wide(cotangents)) * self.loss_scale
        return cotangents.to(dtype)

    def widened(self, rows: Tensor) -> Tensor:
        """Gradients in a dtype from which the loss scale can be taken."""
        return rows if self.loss_scale is None else rows.to(wide(rows))

    def unscaled(self, rows: Tensor) -> Tensor:
        """Gradients or norms that carry the loss scale, without it, in float32 at least."""
        return rows if self.loss_scale is None else self.widened(rows) / self.loss_scale

    def check_count(self, vector: Tensor) -> None:
        """There must be as many weights as losses."""
        if isinstance(self.weights, Tensor) and self.weights.shape != vector.shape:
            raise ValueError(wrong_count(vector.shape[0], self.weights.numel()))


def quiet() -> Callable[[], AbstractContextManager[Any]]:
    """What keeps autograd from recording, unless a surrounding transform is to differentiate through it.

    Without it a pullback records its own second-order graph, and parameters with requires_grad leave one behind.
    To be asked before the first vjp of our own, which is a transform too.
    """
    return nullcontext if tree.inside_transform() else torch.no_grad


def vjp_aux(fn: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any], Any]:
    """torch.func.vjp with aux: (output, pullback, aux)."""
    out, pull, aux = vjp(fn, *primals, has_aux=True)  # type: ignore[misc]
    like = tree.flatten(out)[0][0]

    def pull_as_recorded(cotangents: Any, **options: Any) -> Any:
        with full_precision(like):
            return pull(cotangents, **options)

    return out, pull_as_recorded, aux


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Without the autocast that may surround us, on the device of `like`.

    A backward pass takes its dtypes from the forward pass, and our own sums are not the user's to round.
    """
    kind = like.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # torch 2.10 does not trace is_autocast_available
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def fresh_casts(engine: Callable[P, Measured]) -> Callable[P, Measured]:
    """The engine, with nothing left of the casts of parameters that autocast remembers.

    It remembers them until the user's autocast ends, and torch.func wraps the parameters anew in every pass: under an
    autocast around a whole training loop, memory would grow by a copy of the parameters with every step.
    """

    @wraps(engine)
    def run(*args: P.args, **keywords: P.kwargs) -> Measured:
        if torch.compiler.is_compiling():
            return engine(*args, **keywords)
        torch.clear_autocast_cache()
        try:
            return engine(*args, **keywords)
        finally:
            torch.clear_autocast_cache()

    return run


def unbatchable(outputs: Any) -> bool:
    """Whether vmap cannot run the backward pass of these: eager PyTorch has no rule for a normalisation layer that
    reads an input of one dtype and parameters or buffers of another, as under autocast. A compiler has."""
    if torch.compiler.is_compiling():
        return False
    for node in ownership.nodes(outputs):
        if "Norm" in node.name():
            read = (getattr(node, f"_saved_{name}", None) for name in ("input", "weight", "running_mean"))
            if len({tensor.dtype for tensor in read if isinstance(tensor, Tensor)}) > 1:
                return True
    return False


def pull_all(pull: Callable[[Any], Any], cotangents: Any, plan: Plan, one_by_one: bool = False) -> Any:
    """The pullback over a leading task axis of the cotangents: vectorised, in chunks, or as a loop."""
    if plan.vectorize and not one_by_one:
        return vmap(pull, chunk_size=plan.chunk_size)(cotangents)
    leaves, treedef = tree.flatten(cotangents)
    pulled = [pull(tree.unflatten(treedef, [leaf[i] for leaf in leaves])) for i in range(leaves[0].shape[0])]
    return tree.tree_map(lambda *rows: torch.stack(rows), *pulled)


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


def wide(x: Tensor) -> torch.dtype:
    """float32, or the dtype of x where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def weighted_rows(weights: Tensor, rows: Tensor) -> Tensor:
    """Σ w_i rows_i, of rows (T, ...)."""
    with full_precision(rows):
        total: Tensor = torch.tensordot(weights.to(wide(rows)), rows.to(wide(rows)), 1)
    return total.to(rows.dtype)


def row_norms(leaves: list[Tensor]) -> Tensor:
    """(T,) norms of leaves (T, ...), accumulated in float32 at least."""
    dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
    parts = [torch.linalg.vector_norm(leaf.reshape(leaf.shape[0], -1), dim=1, dtype=dtype) for leaf in leaves]
    norms: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms
