"""Non-negative least squares from the normal equations, by an interior-point method with fixed work."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 24
SOLVED = 1e-18  # mean of w_i s_i: further steps would follow rounding, to anywhere among minimisers that are not unique
DAMPING = 1e-12  # of directions in which A is flat


def nnls(matrix: Tensor, right: Tensor) -> Tensor:
    r"""argmin of :math:`\tfrac12 w^\top A w - b^\top w` over w >= 0, A positive semidefinite, of order 1.

    Mehrotra's predictor and corrector on the conditions :math:`Aw - b = s,\ w, s \ge 0,\ w_i s_i = 0`. Every iteration
    is one Cholesky factor of A + diag(s / w), and their number is fixed: nothing waits for the device, and vmap and
    compilers take it. Float64 in, float64 out.
    """
    count = matrix.shape[-1]
    w = torch.ones_like(right) / count
    s = torch.ones_like(right)
    for _ in range(ITERATIONS):
        residual = matrix @ w - right - s
        factor = torch.linalg.cholesky_ex(matrix + torch.diag_embed(s / w + DAMPING))[0]

        def direction(
            complementarity: Tensor, factor: Tensor = factor, w: Tensor = w, s: Tensor = s, residual: Tensor = residual
        ) -> tuple[Tensor, Tensor]:
            rhs = complementarity / w - residual
            dw = torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)
            return dw, (complementarity - s * dw) / w

        mu = (w * s).mean()
        dw, ds = direction(-w * s)
        affine = ((w + _length(w, s, dw, ds) * dw) * (s + _length(w, s, dw, ds) * ds)).mean()
        centring = (affine / mu.clamp(min=1e-300)).clamp(0, 1) ** 3
        dw, ds = direction(centring * mu - w * s - dw * ds)
        step = torch.where(mu > SOLVED, 0.995 * _length(w, s, dw, ds), 0.0)
        w, s = (w + step * dw).clamp(min=1e-200), (s + step * ds).clamp(min=1e-200)
    return torch.where(w > s, w, 0.0)


def _length(w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Tensor:
    """The longest step, at most 1, that leaves both non-negative."""
    both, moves = torch.cat([w, s]), torch.cat([dw, ds])
    falls = moves < 0
    limits = torch.where(falls, -both / torch.where(falls, moves, -1.0), 1.0)
    return limits.min().clamp(max=1.0)
