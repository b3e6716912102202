"""What a rule sees of a step: T numbers of a kind, with the absent tasks out."""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import brought, promoted
from gradnorm_func._core.tasks import task_vector, wrong_count
from gradnorm_func._core.tracing import constant, free_to_ask
from gradnorm_func._reduce.stats import TaskStats, present


class Seen(NamedTuple):
    """This step's stats, in the dtype and on the device of the weights. What was not asked for is NaN or `()`.

    The numbers of an absent task are replaced by 1, its row of the Gramian by one of the identity, so that a rule may
    divide by them and take their logarithm.
    """

    losses: Tensor  # (T,) L_i
    norms: Tensor  # (T,) ‖∇_W L_i‖, unweighted
    active: Tensor  # (T,) bool: the tasks that are present (torch 2.10 does not compile sums with a property)
    example_norms: Any = ()  # (T,) mean over examples of ‖∂L_i/∂z_b‖; () unless asked for, and where W is not z
    gramian: Any = ()  # (T, T) ⟨∇_W L_i, ∇_W L_j⟩; () unless asked for
    extra: Any = ()  # what the method's own `needs` function returned
    mask: Tensor | None = None  # the same, but None if all are present
    applied: bool = False  # are the weights that the rule gives those of a gradient, as in `grad` with `same_step`?
    precision: torch.dtype | None = None  # whose rounding the Gramian has, if coarser than that of the weights

    def as_measured(self) -> Seen:
        """The same numbers in the dtype in which the Gramian was measured, so that its rounding is known by it."""
        dtype = self.precision
        if dtype is None:
            return self
        return self._replace(
            losses=self.losses.to(dtype), norms=self.norms.to(dtype), gramian=self.gramian.to(dtype), precision=None
        )

    def num_active(self) -> int | Tensor:
        """How many they are."""
        return self.losses.shape[0] if self.mask is None else self.mask.sum()

    def sum(self, x: Tensor) -> Tensor:
        """Over the tasks that are present; of the others x may be anything."""
        return x.sum() if self.mask is None else torch.where(self.mask, x, 0.0).sum()

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ x_i y_i over the tasks that are present."""
        return torch.dot(x, y) if self.mask is None else self.sum(x * y)

    def mean(self, x: Tensor) -> Tensor:
        """Over the tasks that are present."""
        return x.sum() / x.shape[0] if self.mask is None else self.sum(x) / self.mask.sum().clamp(min=1)

    def softmax(self, x: Tensor) -> Tensor:
        """Over the tasks that are present, summing to 1; 0 for the others."""
        return x.softmax(0) if self.mask is None else torch.where(self.mask, x, -torch.inf).softmax(0)

    def where(self, condition: Tensor) -> Tensor:
        """A condition on tasks, False for those that are absent."""
        return condition if self.mask is None else condition & self.mask

    def finite(self, *rows: Tensor) -> Tensor:
        """() bool: whether all of these are finite for the tasks that are present."""
        if self.mask is None and free_to_ask(rows[0]):  # a few numbers, which Python looks at sooner than torch does
            return torch.full((), all(isfinite(x) for row in rows for x in row.tolist()))
        table = rows[0] if len(rows) == 1 else torch.stack(rows)
        zero = table - table  # NaN for what is not finite, which does not equal itself
        ok = zero == zero
        return ok.all() if self.mask is None else (ok | ~self.mask).all()


def seen_of(weights: Tensor, stats: TaskStats, mask: Tensor | None) -> Seen:
    """The stats of a step as a rule may use them."""
    count = weights.shape[0]

    def vector(field: Any, name: str) -> Tensor:
        out = constant(task_vector(field, name, weights.dtype).to(weights))
        if out.shape != weights.shape:
            raise ValueError(f"{name} has {out.shape[0]} entries, but there are {count} tasks")
        return out

    losses = constant(task_vector(stats.losses, dtype=weights.dtype).to(weights))
    if losses.shape != weights.shape:
        raise ValueError(wrong_count(losses.shape[0], count))
    norms = vector(stats.grad_norms, "grad_norms") if present(stats.grad_norms) else torch.full_like(losses, torch.nan)
    example_norms = vector(stats.example_norms, "example_norms") if present(stats.example_norms) else ()
    gramian: Any = ()
    precision: torch.dtype | None = None
    if present(stats.gramian):
        if stats.gramian.shape != (count, count):
            raise ValueError(f"gramian has shape {tuple(stats.gramian.shape)}, but there are {count} tasks")
        measured = promoted(stats.gramian).dtype
        precision = measured if torch.finfo(measured).eps > torch.finfo(weights.dtype).eps else None
        gramian = constant(stats.gramian.to(weights))
        if mask is not None:
            eye = torch.eye(count, dtype=gramian.dtype, device=gramian.device)
            gramian = torch.where(mask[:, None] & mask, gramian, eye)
    extra = stats.extra
    if present(extra):
        extra = tree.tree_map(lambda leaf: constant(torch.as_tensor(leaf).to(weights)), extra)
    active = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    return Seen(losses, norms, active, example_norms, gramian, extra, mask, precision=precision)


def without_absent(seen: Seen) -> Seen:
    """With 1 for every number of an absent task, which may be anything, NaN too."""
    mask = seen.mask
    if mask is None:
        return seen
    rows = (seen.losses, seen.norms, seen.example_norms)
    losses, norms, example_norms = tree.tree_map(lambda row: torch.where(mask, row, 1.0), rows)
    return seen._replace(losses=losses, norms=norms, example_norms=example_norms)


def mask_vector(mask: Any, weights: Tensor) -> Tensor | None:
    """The tasks present in a batch as a (T,) bool tensor: from one, a sequence, or a pytree like the losses."""
    if mask is None:
        return None
    mask = tree.by_key(mask)
    if not isinstance(mask, (Tensor, dict)) and hasattr(mask, "__array__"):  # numpy
        mask = torch.as_tensor(mask)
    vector: Tensor = mask
    if isinstance(mask, (set, frozenset)):
        raise ValueError(f"mask={mask!r} has no order: give a truth value for each task, by name or in task order")
    if not isinstance(mask, Tensor):
        names = [entry for entry in tree.flatten(mask)[0] if isinstance(entry, str)]
        if names:
            raise ValueError(
                f"mask={mask!r} holds names; it takes one truth value for each task: give "
                f"{{name: name in {names!r} for name in losses}}, a dict by name"
            )
        # An entry that is a tensor is not looked at, for that would wait for the device.
        if not any(isinstance(entry, Tensor) or bool(entry) for entry in tree.flatten(mask)[0]):
            raise ValueError(f"mask={mask!r} leaves no task: skip this batch, or pass update=False")
        vector = task_vector(mask, "mask")
    if vector.shape != weights.shape:
        raise ValueError(f"mask has shape {tuple(vector.shape)}, but there are {weights.shape[0]} tasks")
    return brought(vector, weights, torch.bool)
