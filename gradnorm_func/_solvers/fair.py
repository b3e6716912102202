"""Alpha-fair weights from the Gramian: the inner problem of Nash-MTL and FairGrad."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._solvers.node import node
from gradnorm_func._solvers.units import own_units

ITERATIONS = 20
PAIR_ITERATIONS = 9  # of Newton's method for T = 2, which took seven at most over 21,000 draws
NEAR = 1e-8  # a relative step of Newton's after which there is nothing left to do
SOLVED = 1e-6
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

    v, rest = (_pair if len(theta) == 2 else _many)(units.cosines, real, a, theta)
    # G w = size² n C v in the weights v / n: their size is what solves the equations of G itself.
    weights = v * units.inverses * units.size ** (-2 * a / (1 + a))
    return weights.to(gramian.dtype), rest.to(gramian.dtype)


def _pair(matrix: Tensor, real: Tensor, a: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    r"""T = 2: v and the error of its equations, of which one number x remains to be found.

    With :math:`r = \log (v_2 / v_1)`, :math:`u = \log (s_2 / s_1)`, s = C v, it is :math:`r + \alpha u = \theta_2 -
    \theta_1`. For k the size of the cosine and :math:`\sigma(x) = \log \frac{k + e^x}{1 + k e^x}` one has u = σ(r) if
    the cosine is positive, and r = σ(u) if it is negative; x is the free one, and :math:`x + b\,\sigma(x) = t`.

    σ is odd and, for x > 0, concave and below both x and :math:`-\log k`: Newton's steps from below stay below.
    """
    scale = matrix[0, 0]  # 1, and the rounding of the Gramian
    cosine = matrix[0, 1] / scale
    opposed = cosine < 0
    k = torch.where(opposed, (-cosine).clamp(max=1 - RIDGE), cosine)
    difference = theta[1] - theta[0]
    t, b = torch.where(opposed, difference / a, difference), torch.where(opposed, 1 / a, a)
    sign, t, log_k = t.sign(), t.abs(), k.log()
    x = torch.maximum(t / (1 + b), t + b * log_k)
    one = torch.ones_like(x)
    signs = torch.stack([one, -one])
    ask = free_to_ask(x)
    for _ in range(PAIR_ITERATIONS):
        both = torch.addcmul(log_k, x, signs)
        slope = 1 + b - b * both.sigmoid().sum()
        step = ((1 + b) * x - t - b * torch.dot(_log1p_exp(both), signs)) / slope
        x = x - step
        if ask and abs(step.item()) <= NEAR * max(1.0, x.item()):
            break
    log_sum = _log1p_exp(torch.addcmul(log_k, x * sign, signs))
    log_slope = torch.where(opposed, ((1 - k) * (1 + k)).log() - log_sum, log_sum)  # log (s_i / v_i)
    v = ((theta - a * (scale.log() + log_slope)) / (1 + a)).exp()
    return v, _error(matrix, real, a, theta, v)


@node(lambda matrix, real, a, theta: (torch.empty_like(theta), theta.new_empty(())), outputs=2)
def _many(matrix: Tensor, real: Tensor, a: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """v, and the largest relative error of its equations."""
    v = _newton(matrix, a, theta)
    rest = _error(matrix, real, a, theta, v)
    if not (free_to_ask(rest) and bool(rest <= SOLVED)):
        ridge = torch.diag_embed(torch.full_like(theta, RIDGE))
        v = torch.where(rest <= SOLVED, v, _newton(matrix + ridge, a, theta))
        rest = _error(matrix, real, a, theta, v)
    return v, rest


def _log1p_exp(x: Tensor) -> Tensor:
    out: Tensor = torch.nn.functional.softplus(x, threshold=40.0)  # above that it is x, in float64
    return out


def _error(matrix: Tensor, real: Tensor, a: Tensor, theta: Tensor, v: Tensor) -> Tensor:
    equations = v.log() + a * (matrix @ v).clamp(min=1e-300).log() - theta
    return (equations * real).abs().max()


def _newton(matrix: Tensor, a: Tensor, theta: Tensor) -> Tensor:
    """v, by Newton's method in v and s = C v, both positive, from where the equations of v and s are solved.

    That is the solution if all rows of C have the same sum.
    """
    sums = matrix.sum(-1).clamp(min=0.1)
    v = ((theta - a * sums.log()) / (1 + a)).exp()
    ask = free_to_ask(v)
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
