"""Alpha-fair weights from the Gramian: the inner problem of Nash-MTL and FairGrad."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._solvers.node import node
from gradnorm_func._solvers.units import own_units

ITERATIONS = 20
NEAR = 1e-8  # a relative step of Newton's after which there is nothing left to do
SOLVED = 1e-6
ROUNDING = 1e-15  # by which two weights may differ that are the same
RIDGE = 1e-12  # of the cosines, where no direction helps all tasks: the equations have no solution, and these have


def fair(gramian: Tensor, active: Tensor, preference: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    r"""w > 0 with :math:`(G w)_i = (p_i / w_i)^{1 / \alpha}`, and the largest relative error of these equations.

    With :math:`v_i = n_i w_i` they are :math:`\log v_i + \alpha \log (C v)_i = \theta_i`,
    :math:`\theta_i = \log p_i + (1 - \alpha) \log n_i`. Weights of tasks without a gradient are 0.
    """
    units = own_units(gramian, active)
    a, real = alpha.double(), units.real
    lengths = torch.where(real, units.lengths, 1.0)
    theta = torch.where(real, preference.double(), 1.0).log() + (1 - a) * lengths.log()

    v, rest = _solved(units.cosines, real, a, theta)
    # G w = size² n C v in the weights v / n: their size is what solves the equations of G itself.
    weights = v * units.inverses * units.size ** (-2 * a / (1 + a))
    return weights.to(gramian.dtype), rest.to(gramian.dtype)


@node(lambda matrix, real, a, theta: (torch.empty_like(theta), theta.new_empty(())), outputs=2)
def _solved(matrix: Tensor, real: Tensor, a: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """v, and the largest relative error of its equations."""

    def error(v: Tensor) -> Tensor:
        equations = v.log() + a * (matrix @ v).clamp(min=1e-300).log() - theta
        return (equations * real).abs().max()

    v = _newton(matrix, a, theta)
    rest = error(v)
    if not (free_to_ask(rest) and bool(rest <= SOLVED)):
        ridge = torch.diag_embed(torch.full_like(theta, RIDGE))
        v = torch.where(rest <= SOLVED, v, _newton(matrix + ridge, a, theta))
        rest = error(v)
    return v, rest


def _newton(matrix: Tensor, a: Tensor, theta: Tensor) -> Tensor:
    """v, by Newton's method in v and s = C v, both positive, from where the equations of v and s are solved.

    That is the solution if all rows of C have the same sum, as for T = 2 and alpha = 1.
    """
    exact = matrix.sum(-1)
    sums = exact.clamp(min=1e-6 if len(theta) == 2 else 0.1)
    v = ((theta - a * sums.log()) / (1 + a)).exp()
    ask = free_to_ask(v)
    if ask and len(v) == 2 and torch.equal(sums, exact) and bool((v[0] - v[1]).abs() <= ROUNDING * v[0]):
        return v
    s = v * sums
    eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
    for _ in range(ITERATIONS):
        slope = s / (a * v)
        factor = torch.linalg.cholesky_ex(torch.addcmul(matrix, eye, slope))[0]
        short, wrong = s - matrix @ v, s / a * (v.log() + a * s.log() - theta)  # the errors of both, in units of s
        dv = torch.cholesky_solve((short - wrong).unsqueeze(-1), factor).squeeze(-1)
        done = ask and bool((dv / v).abs().max() <= NEAR)
        v, s = _moved(v, dv), _moved(s, -wrong - slope * dv)
        if done:
            break
    return v


def _moved(x: Tensor, dx: Tensor) -> Tensor:
    """x + dx to first order, x exp(dx / x) to second, and positive."""
    return torch.maximum(dx + torch.hypot(x, dx), 1e-6 * x)
