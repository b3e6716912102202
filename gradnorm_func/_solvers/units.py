"""A Gramian in its own units: cosines and lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core.numerics import asked, diagonal


class Units(NamedTuple):
    """G_ij = size² n_i C_ij n_j, in float64. In these units the shortest gradient is not lost beside the longest."""

    cosines: Tensor  # (T, T) C; the row of a task that is absent or has no gradient is one of the identity
    lengths: Tensor  # (T,) n_i, of which the longest is 1; 0 of such a task
    inverses: Tensor  # (T,) 1 / n_i; 0 of such a task
    size: Tensor  # () the longest length; 1 if all are 0
    real: Tensor  # (T,) bool: the tasks that are present and have a gradient
    active: Tensor  # (T,) bool: the tasks that are present

    def all_real(self) -> bool:
        """Whether all tasks are known to be real: where nobody may ask, they are not."""
        return asked(self.real, torch.all)

    def of_pair(self, both: Tensor) -> Tensor:
        """T = 2: `both`, or 1 for the real task, if there is one only."""
        return both if self.all_real() else torch.where(self.real.all(), both, self.real.to(both))


def own_units(gramian: Tensor, active: Tensor, *, lifted: bool = True) -> Units:
    """The Gramian's cosines and lengths. If it is not finite, all lengths are NaN.

    A Gramian in float32 may have negative eigenvalues by its rounding; as much is added to the cosines' diagonal, if
    they are to be lifted. Who looks for the directions in which C is zero wants them as they are.
    """
    exact = gramian.double()
    square = diagonal(exact)
    real = active & (square != 0)
    none = ~real
    lengths = square.sqrt().masked_fill(none, 0.0)
    inverses = lengths.reciprocal().masked_fill(none, 0.0)
    noise = gramian.shape[-1] * torch.finfo(gramian.dtype).eps if lifted and gramian.dtype != torch.float64 else 0.0
    cosines = exact * inverses.unsqueeze(-1) * inverses + torch.diag_embed(none + noise)
    size = lengths.max()
    size = size + (size == 0) + 0 * cosines.sum()  # NaN, if anything is
    return Units(cosines, lengths / size, inverses * size, size, real, active)
