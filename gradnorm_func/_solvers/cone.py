"""Projections onto the directions that conflict with no task, from the Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._core.numerics import diagonal
from gradnorm_func._solvers.nnls import nnls
from gradnorm_func._solvers.units import own_units


def project_mean(gramian: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    r"""argmin of :math:`v^\top G v` over v >= u, u the even weights, and the largest error in its conditions.

    With :math:`y_i = T n_i (v_i - u_i)` it is non-negative least squares with C and -C n.
    """
    units = own_units(gramian, active)
    slope = units.cosines @ units.lengths
    y = _lift(units.cosines, -slope)
    error = torch.minimum(y, units.cosines @ y + slope).abs().max()
    weights = (active + units.inverses * y) / active.sum()
    return weights.to(gramian.dtype), error.to(gramian.dtype)


def project_each(gramian: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean over k of argmin of :math:`v^\top G v` over :math:`v \ge e_k`, and the largest error in their conditions.

    Again least squares, with C and the rows of -C, all of order 1 whatever the gradients' lengths.
    """
    units = own_units(gramian, active)
    y = _lift(units.cosines, -units.cosines)
    error = torch.minimum(y, y @ units.cosines + units.cosines).abs().max()
    weights = (1 + units.inverses * (units.lengths @ y)) * active / active.sum()
    return weights.to(gramian.dtype), error.to(gramian.dtype)


def _lift(cosines: Tensor, right: Tensor) -> Tensor:
    """The y of `nnls`, of right sides (..., T). Of two tasks that conflict one alone has to be lifted."""
    return right.clamp(min=0) / diagonal(cosines) if cosines.shape[-1] == 2 else nnls(cosines, right)
