"""Projections of every task gradient onto the normal planes of the others, from the Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._solvers.node import node
from gradnorm_func._solvers.units import own_units


def project_in_turn(gramian: Tensor, active: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weights of the sum of all projected gradients, and the share of the projections in which there was a conflict.

    Every gradient meets the others in the same order, (T,) int64, and loses what points against them: in units of
    length 1, :math:`y_j \mathrel{-}= \min(0, (C y)_j)`. All T rows go together, so that a turn is a step of rank one.
    """
    units = own_units(gramian, active)
    matrix = units.cosines.index_select(0, order).index_select(1, order)
    others = 1 - torch.eye(len(order), dtype=matrix.dtype, device=matrix.device)
    rows = 1 - others - _lost(matrix, others)
    conflicts = (rows * others != 0).sum() / others.sum().clamp(min=1)
    back = torch.argsort(order)
    weights = (units.lengths.index_select(0, order) @ rows).index_select(0, back) * units.inverses
    weights = torch.where(active & ~units.real, 1.0, weights) + 0 * units.lengths
    return weights.to(gramian.dtype), conflicts.to(gramian.dtype)


@node(lambda matrix, others: torch.empty_like(matrix))
def _lost(matrix: Tensor, others: Tensor) -> Tensor:
    """(T, T) what row i loses of the j-th gradient when its turn comes."""
    against, lost = matrix, []
    for j in range(matrix.shape[-1]):
        part = against[:, j].clamp(max=0) * others[j]
        against = against - part.unsqueeze(-1) * matrix[j]
        lost.append(part)
    return torch.stack(lost, 1)
