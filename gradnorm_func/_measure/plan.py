"""The plan of a pass: what is measured, and how. It goes from the door to the engine and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, get_args

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, MultiTaskLoss
from gradnorm_func._core.numerics import accum_dtype, column, full_precision, promoted
from gradnorm_func._core.tasks import wrong_count
from gradnorm_func._core.tracing import traced
from gradnorm_func._core.tree import Where
from gradnorm_func._reduce.stats import TaskStats

Needs: TypeAlias = Literal["losses", "norms", "example_norms", "gramian"]
Heads: TypeAlias = Literal["weighted", "own"]
NEEDS, HEADS = get_args(Needs), get_args(Heads)
# This step's weights from this step's stats, (T,), and anything else that is to come out of the pass.
Rule: TypeAlias = Callable[[TaskStats], tuple[Tensor, Any]]


class OfLosses(NamedTuple):
    """Weights that this step's losses give alone, before anything is pulled back."""

    rule: Callable[[Tensor], Tensor]  # (T,) losses -> (T,) weights


# Of the sum to differentiate: known, of the losses, or of all stats of this step.
Weights: TypeAlias = Tensor | OfLosses | Rule


class EngineOptions(TypedDict, total=False):
    """How task gradients are pulled back: all at once, at most some at a time, or one by one."""

    vectorize: bool
    chunk_size: int | None


class Measured(NamedTuple):
    """What an engine returns."""

    stats: Any  # TaskStats; its task_grads are a list of leaves of W, its grads one of leaves of params
    losses: Any  # as the user's function returned them, where the engine has seen that
    aux: Any
    decision: Any = ()  # what the rule returned beside the weights
    z_treedef: Any = None  # structure of z, where W is z


class Plan(NamedTuple):
    """One pass over one batch."""

    loss_fn: LossFn
    batch: Any
    leaves: list[Tensor]  # of params
    treedef: Any
    where: list[int] | None  # indices of the leaves of W; None is z
    by_path: bool  # was W named, so that its gradients come as a dict by path?
    weights: Weights | None  # None: no sum is wanted
    needs: Needs
    heads: Heads = "weighted"  # what they learn from: the weighted sum, or each its own loss
    merges: bool = False  # is all wanted that merging needs: at parameters, the task gradients themselves?
    task_grads: bool = False  # are they wanted for their own sake?
    active: Tensor | None = None  # (T,) bool: the tasks that are present; None is all of them
    has_aux: bool = False
    vectorize: bool = True
    chunk_size: int | None = None
    loss_scale: float | Tensor | None = None  # of every cotangent of the losses
    whole_step: bool = False  # is this all of a training step, so that every present task must have a gradient?

    def params(self, leaves: Sequence[Tensor]) -> Any:
        """Leaves in the user's structure."""
        return tree.unflatten(self.treedef, leaves)

    def with_losses(self, losses: Tensor) -> tuple[Plan, Any]:
        """The plan, once the losses are known: what needs nothing else is asked before any pullback."""
        if isinstance(self.weights, OfLosses):
            return self._replace(weights=self.weights.rule(promoted(losses))), ()
        if isinstance(self.weights, Tensor) and self.weights.shape != losses.shape:
            raise ValueError(wrong_count(losses.shape[0], self.weights.numel()))
        if callable(self.weights) and self.needs == "losses":
            weights, decision = self.weights(TaskStats(promoted(losses)))
            return self._replace(weights=weights), decision
        return self, ()

    def decide(self, stats: TaskStats, decision: Any) -> tuple[Tensor | None, Any]:
        """The weights of this step: those that came with the plan, or what the rule makes of the stats."""
        if callable(self.weights):
            return self.weights(stats)
        assert not isinstance(self.weights, OfLosses), "with_losses has asked it"
        return self.weights, decision

    def weighed_afterwards(self) -> Plan:
        """The plan whose weights are no part of the cotangents: in float16 a small one underflows with its norm, and
        would never grow again. The heads run back twice for it, unless there is a loss scale."""
        weights = self.weights
        if not isinstance(weights, Tensor) or self.needs == "losses" or self.heads == "own":
            return self
        if self.loss_scale is not None:
            return self
        return self._replace(weights=lambda _stats: (weights, ()))

    def seeds(self, cotangents: Tensor, dtype: torch.dtype) -> Tensor:
        """The cotangents of the losses, which are of `dtype`, with the loss scale on them."""
        if self.loss_scale is not None:  # in float32: the scale alone may be too large for float16
            cotangents = promoted(cotangents) * self.loss_scale
        return cotangents.to(dtype)

    def unit_seeds(self, losses: Tensor) -> Tensor:
        """(T,) cotangents of one of every loss; of none of an absent one, which may be anything."""
        ones = torch.ones_like(losses) if self.active is None else self.active
        return self.seeds(ones, losses.dtype)

    def without(self, seeds: Tensor, rows: Tensor, *, signed: bool = False) -> Tensor:
        """Gradients or norms (T, ...) that carry the seeds, without them, in float32 at least; NaN for a seed of 0."""
        rows, size = promoted(rows), promoted(seeds)
        size = size if signed else size.abs()
        if rows.ndim > 1 or size.dtype != rows.dtype:
            size = column(size, rows).to(rows.dtype)
        if not traced():
            return rows / size
        used = size != 0  # NaN where it was 0, but with a derivative that is not
        return torch.where(used, rows / torch.where(used, size, 1.0), torch.nan)


def plan_of(
    params: Any, loss_fn: LossFn, batch: Any, where: Where, weights: Weights | None, needs: Needs, **options: Any
) -> Plan:
    """The plan of a pass, with all that can be checked before it."""
    if not callable(loss_fn):
        raise ValueError(
            f"loss_fn={type(loss_fn).__name__} must be a function (params, batch) -> losses; "
            "the order of arguments is (state, params, loss_fn, batch)"
        )
    chunk_size, loss_scale = options.get("chunk_size"), options.get("loss_scale")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all tasks at once")
    if loss_scale is not None and (
        loss_scale.ndim != 0 if isinstance(loss_scale, Tensor) else not 0 < loss_scale < float("inf")
    ):
        raise ValueError(f"loss_scale={loss_scale} must be a positive number or a 0-d tensor; 2.0**16 is a usual start")
    has_aux = options.get("has_aux", False)
    if isinstance(loss_fn, MultiTaskLoss) and has_aux != loss_fn.has_aux:
        raise ValueError(
            f"has_aux={has_aux}, but multi_task_loss was made with has_aux={loss_fn.has_aux}: give both the same"
        )
    leaves, treedef = tree.flatten(params)
    tree.check_leaves(leaves, params)
    at_z = where is None and isinstance(loss_fn, MultiTaskLoss) and loss_fn.backbone is not None
    indices = None if at_z else list(range(len(leaves))) if where is None else selected(params, treedef, where)
    return Plan(loss_fn, batch, leaves, treedef, indices, where is not None, weights, needs, **options)


def check_word(name: str, word: Any, allowed: Iterable[str]) -> None:
    """A misspelt word would be taken for another one."""
    if word not in tuple(allowed):
        raise ValueError(f"{name}={word!r} must be one of {', '.join(map(repr, allowed))}")


def selected(params: Any, treedef: Any, where: Where) -> list[int]:
    """Indices of the leaves that `where` names; names are looked up once for one structure of params."""
    if where is not None and not isinstance(where, str):
        if torch.compiler.is_compiling() or not all(isinstance(path, str) for path in _entries(where)):
            return tree.select(params, where)
        where = tuple(_entries(where))
    return tree.select(params, where) if torch.compiler.is_compiling() else list(_selected(treedef, where))


def _entries(where: Any) -> Sequence[Any]:
    """The paths that `where` lists; itself, if it is no list."""
    return where if isinstance(where, (list, tuple)) else [where]


@lru_cache(maxsize=64)
def _selected(treedef: Any, where: str | tuple[str, ...] | None) -> tuple[int, ...]:
    return tuple(tree.select(tree.unflatten(treedef, range(treedef.num_leaves)), where))


def split_aux(out: Any, has_aux: bool, name: str = "loss_fn") -> tuple[Any, Any]:
    """(losses, aux) of what a loss_fn returned."""
    if not has_aux:
        return out, ()
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"has_aux=True, so {name} must return (losses, aux), not {type(out).__name__}")
    return out


def filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, with zeros for what nobody reads."""
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, like, strict=True)]


def weighted_sum(weights: Tensor, rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Σ w_i rows_i, added up in float32 at least; rows are (T, ...), or T tensors (...)."""
    dtype = accum_dtype(rows[0])
    w = weights.to(dtype)
    if isinstance(rows, Tensor):
        with full_precision(rows):
            total: Tensor = torch.tensordot(w, rows.to(dtype), 1)
        return total.to(rows.dtype)
    first, *rest = zip(w.unbind(), rows, strict=True)
    total = first[0] * first[1].to(dtype)
    for weight, row in rest:
        row = row.to(dtype)
        total = torch.addcmul(total, weight, row) if traced() else total.addcmul_(weight, row)
    return total.to(rows[0].dtype)


def plain_sum(rows: Sequence[Tensor]) -> Tensor:
    """The sum of some tensors, the first two of which make the buffer that the others are added to."""
    if len(rows) == 1:
        return rows[0]
    total = rows[0] + rows[1]
    for row in rows[2:]:
        total = total + row if traced() else total.add_(row)
    return total
