"""Non-negative least squares from the normal equations, and the interior-point method behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._solvers.node import node

ROUNDS = 16  # of guesses of the set of the w_i that are not 0, before the sure way
ITERATIONS, MORE = 30, 40  # of the sure way; and where b is not known
SOLVED = 1e-22  # mean of w_i s_i: further steps would follow rounding, to anywhere among minimisers that are not unique
POLISHES = 3  # steps of Newton's in the set that was found, where they help
DAMPING = 1e-12  # of directions in which A is flat
ROUNDING = 1e-14  # what a slope of 0 may look like


@node(lambda matrix, right: torch.empty_like(right))
def nnls(matrix: Tensor, right: Tensor) -> Tensor:
    r"""argmin of :math:`\tfrac12 w^\top A w - b^\top w` over w >= 0, A positive semidefinite, of order 1.

    Its conditions are :math:`s = Aw - b,\ w, s \ge 0,\ w_i s_i = 0`. Where Python may ask, the set of positive w_i is
    guessed, w solved for, and the set corrected by the signs of w and s, which ends after two to five rounds, or,
    seldom, not at all. Then, and everywhere else, an interior-point method with fixed work finds the set; nothing waits
    for the device, and vmap and compilers take it.

    Args:
        matrix: A, (T, T) float64.
        right: b, (..., T): any number of problems with the same A.
    """
    if free_to_ask(matrix):
        w, settled = _by_signs(matrix, right)
        if settled:
            return w
    w, s = interior(matrix, right)
    w = torch.where(w > s, w, 0.0)

    def error(w: Tensor) -> Tensor:
        return torch.minimum(w, times(matrix, w) - right).abs().amax(-1, keepdim=True)

    for _ in range(POLISHES):
        s = times(matrix, w) - right
        better = (w - inverse_on(matrix, w > s)(s)).clamp(min=0)
        w = torch.where(error(better) < error(w), better, w)
    return w


def times(matrix: Tensor, w: Tensor) -> Tensor:
    """A w, of (..., T)."""
    return (matrix @ w.unsqueeze(-1)).squeeze(-1)


def inverse_on(matrix: Tensor, positive: Tensor) -> Callable[[Tensor], Tensor]:
    """b -> the w that solves A w = b in the rows and columns of the positive ones, and is 0 elsewhere."""
    some = positive.to(matrix.dtype)
    block = matrix * some.unsqueeze(-1) * some.unsqueeze(-2) + torch.diag_embed(1 - some + DAMPING)
    factor = torch.linalg.cholesky_ex(block)[0]
    return lambda b: torch.cholesky_solve((b * some).unsqueeze(-1), factor).squeeze(-1)


def _by_signs(matrix: Tensor, right: Tensor) -> tuple[Tensor, bool]:
    """The solution by guessing its set, and whether it is one."""
    positive = right > 0
    for _ in range(ROUNDS):
        solve = inverse_on(matrix, positive)
        w = solve(right)
        w = w + solve(right - times(matrix, w))  # once more, for the damping
        s = times(matrix, w) - right
        other = torch.where(positive, w, -s) > ROUNDING
        if torch.equal(other, positive):
            return w.clamp(min=0), bool(s.isfinite().all())
        positive = other
    return w, False


def interior(matrix: Tensor, right: Tensor, bound: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """w and s by Mehrotra's predictor and corrector, an interior-point method.

    An iteration is one Cholesky factor of A + diag(s / w), and their number is fixed, but on a CPU that may be asked.

    Args:
        matrix: A.
        right: b, or where b is only known by the bound, something above it.
        bound: a function of w > 0 that b is nowhere above, and that has b as its minimum, at the solution.
    """
    b, w, s = right, torch.ones_like(right), torch.ones_like(right)
    ask = free_to_ask(matrix)
    for _ in range(ITERATIONS if bound is None else MORE):
        product = w * s
        mu = product.mean(-1, keepdim=True)
        if ask and bool((mu <= SOLVED).all()):
            break
        floor: Tensor | float = 0.0
        if bound is not None:  # while b moves, w has to stay free to follow
            before, b = b, torch.minimum(b, bound(w))
            floor = 0.03 * (w * (before - b)).mean(-1, keepdim=True)
        residual = times(matrix, w) - b - s
        factor = torch.linalg.cholesky_ex(matrix + torch.diag_embed(s / w + DAMPING))[0]

        def direction(
            aim: Tensor, factor: Tensor = factor, w: Tensor = w, s: Tensor = s, residual: Tensor = residual
        ) -> tuple[Tensor, Tensor]:
            """dw and ds that lead to no residual, and from w_i s_i to w_i s_i + aim_i."""
            dw = torch.cholesky_solve((aim / w - residual).unsqueeze(-1), factor).squeeze(-1)
            return dw, (aim - s * dw) / w

        dw, ds = direction(-product)
        length = _length(w, s, dw, ds)
        affine = ((w + length * dw) * (s + length * ds)).mean(-1, keepdim=True)
        centring = (affine / mu.clamp(min=1e-300)).clamp(0, 1) ** 3
        dw, ds = direction(centring * mu + floor - product - dw * ds)
        step = torch.where(mu > SOLVED, 0.995 * _length(w, s, dw, ds), 0.0)
        w, s = (w + step * dw).clamp(min=1e-200), (s + step * ds).clamp(min=1e-200)
    return w, s


def _length(w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Tensor:
    """(..., 1) The longest step, at most 1, that leaves both non-negative."""
    fastest = torch.maximum((-dw / w).amax(-1, keepdim=True), (-ds / s).amax(-1, keepdim=True))
    return 1 / fastest.clamp(min=1.0)
