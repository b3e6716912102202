"""Arithmetic that all rooms share: accumulation dtypes, safe roots, norms of rows, a choice without a branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask, traced

Tree = TypeVar("Tree")
# Devices whose queue takes a copy of pageable memory along; MPS would read it later (pytorch#189690).
QUEUES = ("cuda", "meta")


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Without the autocast that may surround us, on the device of `like`.

    A backward pass takes its dtypes from the forward pass, and our own sums are not the user's to round.
    """
    kind = like.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):  # torch 2.10 does not trace is_autocast_available
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def accum_dtype(*tensors: Tensor, least: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype to add up in: the widest of the tensors', but at least float32, or `least`."""
    dtypes = {x.dtype for x in tensors}
    return least if dtypes == {least} else reduce(torch.promote_types, dtypes, least)


def promoted(x: Tensor) -> Tensor:
    """x in the dtype to add up in."""
    return x if x.dtype == torch.float32 else x.to(accum_dtype(x))


def brought(x: Tensor | float, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x on the device of `like`, in its dtype or another. The host does not wait until the device has come to that."""
    dtype = like.dtype if dtype is None else dtype
    if not isinstance(x, Tensor):
        if not hasattr(x, "__array__"):
            return torch.full((), x, dtype=dtype, device=like.device)
        x = torch.as_tensor(x)  # numpy
    if x.device == like.device:
        return x.to(dtype)
    queued = x.device.type == "cpu" and like.device.type in QUEUES
    # What lies in pinned memory is read later, and the user may have written to it by then.
    return x.to(like.device, dtype, non_blocking=queued and (traced() or not x.is_pinned()))


def asked(x: Tensor, question: Callable[[Tensor], Tensor | bool]) -> bool:
    """The answer of a value to a question, where asking costs nothing; False where nobody may ask."""
    return free_to_ask(x) and bool(question(x))


def choose(ok: Tensor, new: Tree, old: Tree) -> Tree:
    """`new` where ok, else `old`, leaf by leaf and without waiting for a device."""
    if ok.ndim == 0 and free_to_ask(ok):
        return new if bool(ok) else old
    return optree.tree_map(lambda a, b: torch.where(ok, a, b), new, old)  # type: ignore[arg-type, return-value]


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """() bool: whether all of these are finite."""
    sound = [x.isfinite().all() for x in tensors]
    together: Tensor = torch.stack([flag.to(sound[0].device) for flag in sound]).all()
    return together


def column(x: Tensor, like: Tensor) -> Tensor:
    """x (T,) or (T, T), shaped to multiply what has more axes behind those."""
    return x if x.ndim == like.ndim else x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def safe_sqrt(square: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0, not NaN. What is NaN stays so."""
    positive = ~(square <= 0)
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def safe_inverse(x: Tensor) -> Tensor:
    """1 / x where x > 0, and 0 elsewhere."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1.0), 0.0)


def diagonal(gramian: Tensor) -> Tensor:
    """(T,) of (T, T); Inductor warns of the operator of this name in torch 2.13."""
    return gramian.reshape(-1)[:: gramian.shape[-1] + 1]


def square_norms(leaves: Iterable[Tensor]) -> Tensor:
    """(T,) sums of squares over all leaves (T, ...), in float32 at least."""
    total: Tensor | None = None
    for leaf in map(promoted, leaves):
        square = leaf.flatten(1).square().sum(-1) if leaf.ndim > 1 else leaf.square()
        total = square if total is None else total + square
    if total is None:
        raise ValueError("a norm of no tensors")
    return total


def row_norms(leaves: Sequence[Tensor]) -> Tensor:
    """(T,) norms over all leaves (T, ...), accumulated in float32 at least."""

    def norms(least: torch.dtype) -> Tensor:
        dtype = accum_dtype(*leaves, least=least)
        parts = [torch.linalg.vector_norm(leaf.reshape(leaf.shape[0], -1), dim=1, dtype=dtype) for leaf in leaves]
        together: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return together

    return of_any_size(norms)


def of_any_size(norms: Callable[[torch.dtype], Tensor]) -> Tensor:
    """(T,) norms, by a function of the least dtype to add up in: float64 where squares leave the range of float32.

    That is asked on a CPU in eager mode only; elsewhere a norm below 1e-22 is 0, and one above 1e19 infinite.
    """
    found = norms(torch.float32)
    return norms(torch.float64).to(found.dtype) if leaves_range(found) else found


def leaves_range(norms: Tensor) -> bool:
    """Whether the square of one of these norms loses digits in float32, where asking costs nothing."""
    if norms.dtype != torch.float32 or not free_to_ask(norms):
        return False
    return not all(1e-16 < norm < 1e18 for norm in norms.tolist())


def cosines(gramian: Tensor) -> Tensor:
    """(T, T) in [-1, 1]; 0 in the row and column of a gradient that is exactly zero."""
    inverse = safe_inverse(safe_sqrt(diagonal(gramian)))
    # Rounding must not make a cosine of more than 1.
    return (gramian * inverse[:, None] * inverse[None, :]).clamp(-1, 1)
