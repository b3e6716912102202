"""The shortest convex combination of T vectors, from their Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._core.numerics import diagonal, safe_sqrt
from gradnorm_func._solvers.nnls import nnls


def min_norm(gramian: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    r"""argmin of :math:`w^\top G w` over the simplex, and its Frank-Wolfe gap relative to the mean of the diagonal.

    What is not active, (T,) bool, has a row and column of the identity, and its weight is 0.
    """
    dtype = gramian.dtype
    ones = active.double()
    square = torch.where(active, diagonal(gramian), 0.0).double()
    size = square.sum() / ones.sum().clamp(min=1)
    scaled = gramian.double() / torch.where(active & (size > 0), size, 1.0)
    weights = _closed_form(scaled, ones) if gramian.shape[0] == 2 else _in_own_units(scaled, active)
    total = weights.sum()
    weights = weights / torch.where(total > 0, total, 1.0)
    slopes = scaled @ weights
    gap = (weights * slopes).sum() - torch.where(active, slopes, torch.inf).min()
    return weights.to(dtype), gap.to(dtype)


def _closed_form(gramian: Tensor, active: Tensor) -> Tensor:
    """T = 2: the foot of the perpendicular from 0 on the line through both, if it lies between them."""
    (a, b), c = diagonal(gramian).unbind(), gramian[0, 1]
    along = a + b - 2 * c  # ‖g_1 - g_2‖²
    first = torch.where(along > 0, (b - c) / torch.where(along > 0, along, 1.0), 0.5).clamp(0, 1)
    both = torch.stack([first, 1 - first])
    return torch.where(active.prod() > 0, both, active)


def _in_own_units(gramian: Tensor, active: Tensor) -> Tensor:
    r"""A multiple of the solution, from non-negative least squares.

    With :math:`v_i = w_i \|g_i\|`, cosines C and :math:`a_i \propto 1 / \|g_i\|` it is the minimiser of
    :math:`\tfrac12 v^\top (C + a a^\top) v - a^\top v` over v >= 0. In these units vectors of very different lengths
    are all of order 1, and the shortest of them, which decides, is not lost in rounding.
    """
    length = torch.where(active, safe_sqrt(diagonal(gramian)), 1.0).clamp(min=1e-100)
    inverse = torch.where(active, torch.where(active, length, torch.inf).min() / length, 0.0)
    cosines = gramian / (length[:, None] * length)
    return nnls(cosines + inverse[:, None] * inverse, inverse) * inverse
