"""Alpha-fair weights from the Gramian: the inner problem of Nash-MTL and FairGrad."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._solvers.node import node
from gradnorm_func._solvers.units import own_units

ITERATIONS = 20
NEAR = 1e-8  # an error from which one step of Newton's is enough
RIDGE = 1e-14  # of the cosines: where no direction helps all tasks, the equation has no solution, and this one has


@node
def fair(gramian: Tensor, active: Tensor, preference: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    r"""w > 0 with :math:`(G w)_i = (p_i / w_i)^{1 / \alpha}`, and the largest relative error of these equations.

    With :math:`v_i = n_i w_i` they are :math:`\log v_i + \alpha \log (C v)_i = \theta_i`,
    :math:`\theta_i = \log p_i + (1 - \alpha) \log n_i`. Newton's method in v and s = C v from v = s, which has no error
    but s - C v: that falls by as much as a step is long, and a step leaves both positive. Weights of tasks without a
    gradient are 0.
    """
    units = own_units(gramian, active)
    a, real = alpha.double(), units.real
    lengths = torch.where(real, units.lengths, 1.0)
    theta = torch.where(real, preference.double(), 1.0).log() + (1 - a) * lengths.log()
    matrix = units.cosines + torch.diag_embed(torch.full_like(theta, RIDGE))
    sums = matrix.sum(-1).clamp(min=1e-6 if gramian.shape[-1] == 2 else 0.1)
    v = ((theta - a * sums.log()) / (1 + a)).exp()
    s = v * sums
    ask, done = free_to_ask(gramian), False
    for _ in range(ITERATIONS):
        residual = matrix @ v - s
        error = v.log() + a * s.log() - theta
        if done:
            break
        done = ask and bool(((residual / s).abs() + error.abs()).max() <= NEAR)
        slope = s / (a * v)
        factor = torch.linalg.cholesky_ex(matrix + torch.diag_embed(slope))[0]
        dv = torch.cholesky_solve((-residual - s * error / a).unsqueeze(-1), factor).squeeze(-1)
        ds = -s * error / a - slope * dv
        v, s = _moved(v, dv), _moved(s, ds)
    error = torch.where(real, v.log() + a * (units.cosines @ v).clamp(min=1e-300).log() - theta, 0.0).abs().max()
    # G w = size² n C v in the weights v / n: their size is what solves the equations of G itself.
    weights = v * units.inverses * units.size ** (-2 * a / (1 + a))
    return weights.to(gramian.dtype), (error + 0 * weights.sum()).to(gramian.dtype)


def _moved(x: Tensor, dx: Tensor) -> Tensor:
    """x + dx to first order, and positive."""
    up, down = (dx / x).clamp(min=0), (dx / x).clamp(max=0)
    return x * (1 + up) / (1 - down)
