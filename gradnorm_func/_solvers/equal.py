"""The direction with equal projections on all task gradients, from their Gramian."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._solvers.node import node
from gradnorm_func._solvers.units import own_units

RIDGE, SQUARE_RIDGE = 1e-10, 1e-12
ROUNDS = 4  # of refinement; every one multiplies the error along an eigenvalue e by RIDGE / (e + RIDGE)
SOLVED = 1e-6


@node
def equal_projections(gramian: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    r"""a_i / n_i with :math:`a = C^+ 1`, and the largest error in :math:`C a = 1`.

    Where no direction has equal projections, a is the pseudoinverse's: the least squares. Of T = 2 it is 1, half of
    1 + cosine times C's own, which is 0 / 0 of opposite gradients.
    """
    units = own_units(gramian, active)
    matrix, ones = units.cosines, units.real.double()
    if gramian.shape[-1] == 2:
        a, error = ones, 0 * matrix[0, 1]
    else:
        a, error = _refined(matrix, matrix, RIDGE, ones)
        if not (free_to_ask(matrix) and bool(error <= SOLVED)):
            least, least_error = _refined(matrix, matrix @ matrix, SQUARE_RIDGE, ones)
            a, error = torch.where(error <= SOLVED, a, least), torch.where(error <= SOLVED, error, least_error)
    return (a * units.inverses / units.size + 0 * units.lengths).to(gramian.dtype), error.to(gramian.dtype)


def _refined(matrix: Tensor, left: Tensor, ridge: float, ones: Tensor) -> tuple[Tensor, Tensor]:
    """a and its error, by A = C, or A = C² and so the least squares: from A + ridge I and what it leaves of 1 - C a."""
    factor = torch.linalg.cholesky_ex(left + torch.diag_embed(torch.full_like(ones, ridge)))[0]
    a = torch.zeros_like(ones)
    for _ in range(ROUNDS):
        rest = ones - matrix @ a
        rest = rest if left is matrix else matrix @ rest
        a = a + torch.cholesky_solve(rest.unsqueeze(-1), factor).squeeze(-1)
    return a, (ones - matrix @ a).abs().max()
