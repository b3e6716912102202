"""The shortest convex combination of T vectors, from their Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._solvers.nnls import nnls
from gradnorm_func._solvers.units import Units, own_units


def min_norm(gramian: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    r"""argmin of :math:`w^\top G w` over the simplex, and its Frank-Wolfe gap relative to the mean of the diagonal.

    The weight of what is not active, (T,) bool, is 0. Where some vectors are 0, they share all the weight.
    """
    units = own_units(gramian, active)
    weights = _closed_form(units) if gramian.shape[-1] == 2 else _least_squares(units)
    if not units.all_real():
        none = active & ~units.real
        weights = torch.where(none.any(), none.to(weights) / none.sum(), weights)
    weights = weights + 0 * units.lengths
    slopes = units.lengths * (units.cosines @ (units.lengths * weights))
    gap = torch.dot(weights, slopes) - slopes.masked_fill(~active, torch.inf).min()
    mean = units.lengths.square().sum() / active.sum()
    return weights.to(gramian.dtype), (gap / mean.clamp(min=1e-300)).to(gramian.dtype)


def _closed_form(units: Units) -> Tensor:
    """T = 2: the foot of the perpendicular from 0 on the line through both, if it lies between them."""
    (a, b), cosine = units.lengths.unbind(), units.cosines[0, 1]
    along = (a - b) ** 2 + 2 * a * b * (1 - cosine)  # ‖g_1 - g_2‖²
    first = torch.where(along > 0, b * (b - a * cosine) / along.clamp(min=1e-300), 0.5).clamp(0, 1)
    return units.of_pair(torch.stack([first, 1 - first]))


def _least_squares(units: Units) -> Tensor:
    r"""From non-negative least squares.

    With :math:`v_i = w_i n_i` and :math:`a_i \propto 1 / n_i` v is a multiple of the minimiser of
    :math:`\tfrac12 v^\top (C + a a^\top) v - a^\top v` over v >= 0.
    """
    inverse = units.inverses / units.inverses.max().clamp(min=1e-300)
    weights = nnls(units.cosines + inverse.unsqueeze(-1) * inverse, inverse) * inverse
    return weights / weights.sum().clamp(min=1e-300)
