"""The minibatches of a step: S, and S̃ that shares half of its examples with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree


def drawn(batches: Iterable[Any], *, pairs: bool, overlap: bool) -> Iterator[tuple[Any, Any]]:
    """(S, S̃) of every step; the simple form, without pairs, takes the minibatches as they come."""
    stream = _endless(batches)
    while True:
        first = next(stream)
        if not pairs:
            yield first, None
            continue
        batch = _join(first, next(stream))
        yield batch, _join(first if overlap else next(stream), next(stream))


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The minibatches again and again; the end of what can be gone through only once is an error."""
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if count == before:
            raise ValueError(
                f"batches ran out after {count}: give a list or a DataLoader, which can be gone through again, "
                "or an iterator with enough for all steps (three a step in the paper's form, four without overlap)"
            )


def _join(a: Any, b: Any) -> Any:
    def cat(x: Any, y: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise ValueError(
                "the paper's form joins minibatches along axis 0, so they must be pytrees of tensors with that axis, "
                f"not {type(x).__name__ if not isinstance(x, Tensor) else 'scalars'}: write the loop over "
                "gradinit_step(..., batch, batch_after=...) yourself"
            )
        return torch.cat([x, y])

    return tree.tree_map(cat, a, b)
