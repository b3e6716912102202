"""Non-negative least squares from the normal equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask

ROUNDS = 16  # of guesses of the set of the w_i that are not 0, before the sure way
ITERATIONS = 24  # of the sure way
SOLVED = 1e-18  # mean of w_i s_i: further steps would follow rounding, to anywhere among minimisers that are not unique
DAMPING = 1e-12  # of directions in which A is flat
ROUNDING = 1e-14  # what a slope of 0 may look like

Right: TypeAlias = Tensor | Callable[[Tensor], Tensor]  # b, or what it is at a w


def nnls(matrix: Tensor, right: Right, start: Tensor) -> Tensor:
    r"""argmin of :math:`\tfrac12 w^\top A w - b^\top w` over w >= 0, A positive semidefinite, of order 1.

    Its conditions are :math:`s = Aw - b,\ w, s \ge 0,\ w_i s_i = 0`. Where Python may ask, the set of positive w_i is
    guessed, w solved for, and the set corrected by the signs of w and s, which ends after two to five rounds, or,
    seldom, not at all. Everywhere else, and then, an interior-point method with fixed work finds the set; nothing waits
    for the device, and vmap and compilers take it.

    Args:
        matrix: A, (T, T) float64.
        right: b, (..., T), any number of problems of the same A; or a function of w >= 0 that gives it, if w at the b
            of the solution is the solution.
        start: (..., T) a first w > 0, of the order of the solution.
    """
    if free_to_ask(matrix):
        w, settled = _by_signs(matrix, right, start)
        if bool(settled):
            return w
    w, s = _interior(matrix, right, start)
    return _polished(matrix, right, w, s)


def _at(right: Right, w: Tensor) -> Tensor:
    return right(w) if callable(right) else right


def _times(matrix: Tensor, w: Tensor) -> Tensor:
    return (matrix @ w.unsqueeze(-1)).squeeze(-1)


def _inverse(matrix: Tensor, positive: Tensor) -> Callable[[Tensor], Tensor]:
    """b -> the w that solves A w = b in the rows and columns of the positive ones, and is 0 elsewhere."""
    some = positive.to(matrix.dtype)
    block = matrix * some.unsqueeze(-1) * some.unsqueeze(-2) + torch.diag_embed(1 - some + DAMPING)
    factor = torch.linalg.cholesky_ex(block)[0]
    return lambda b: torch.cholesky_solve((b * some).unsqueeze(-1), factor).squeeze(-1)


def _by_signs(matrix: Tensor, right: Right, start: Tensor) -> tuple[Tensor, Tensor | bool]:
    """The solution by guessing its set, for Python that may ask, and whether it is one."""
    b = _at(right, start)
    positive = b > 0
    for _ in range(ROUNDS):
        solve = _inverse(matrix, positive)
        w = solve(b)
        w = w + solve(b - _times(matrix, w))  # once more, for the damping
        s = _times(matrix, w) - b
        other = torch.where(positive, w, -s) > ROUNDING
        before, b = b, _at(right, w.clamp(min=0))
        if torch.equal(other, positive) and (b is before or bool((b - before).abs().max() <= ROUNDING * b.abs().max())):
            return w.clamp(min=0), s.isfinite().all()
        positive = other
    return w, False


def _interior(matrix: Tensor, right: Right, start: Tensor) -> tuple[Tensor, Tensor]:
    """w and s by Mehrotra's predictor and corrector. An iteration is one Cholesky factor of A + diag(s / w)."""
    w = start
    s = torch.ones_like(w)
    ask = free_to_ask(matrix)
    for _ in range(ITERATIONS):
        residual = _times(matrix, w) - _at(right, w) - s
        factor = torch.linalg.cholesky_ex(matrix + torch.diag_embed(s / w + DAMPING))[0]

        def direction(
            aim: Tensor, factor: Tensor = factor, w: Tensor = w, s: Tensor = s, residual: Tensor = residual
        ) -> tuple[Tensor, Tensor]:
            """dw and ds that lead to w_i s_i + ds_i w_i + dw_i s_i = w_i s_i + aim_i, and to no residual."""
            dw = torch.cholesky_solve((aim / w - residual).unsqueeze(-1), factor).squeeze(-1)
            return dw, (aim - s * dw) / w

        product = w * s
        mu = product.mean(-1, keepdim=True)
        if ask and bool((mu <= SOLVED).all()):
            break
        dw, ds = direction(-product)
        length = _length(w, s, dw, ds)
        affine = ((w + length * dw) * (s + length * ds)).mean(-1, keepdim=True)
        centring = (affine / mu.clamp(min=1e-300)).clamp(0, 1) ** 3
        dw, ds = direction(centring * mu - product - dw * ds)
        step = torch.where(mu > SOLVED, 0.995 * _length(w, s, dw, ds), 0.0)
        w, s = (w + step * dw).clamp(min=1e-200), (s + step * ds).clamp(min=1e-200)
    return w, s


def _length(w: Tensor, s: Tensor, dw: Tensor, ds: Tensor) -> Tensor:
    """(..., 1) The longest step, at most 1, that leaves both non-negative."""
    fastest = torch.maximum((-dw / w).amax(-1, keepdim=True), (-ds / s).amax(-1, keepdim=True))
    return 1 / fastest.clamp(min=1.0)


def _polished(matrix: Tensor, right: Right, w: Tensor, s: Tensor) -> Tensor:
    """One step of Newton's in the set that was found, where it helps."""
    positive = w > s
    rough = torch.where(positive, w, 0.0)
    b = _at(right, rough)
    better = rough + _inverse(matrix, positive)(b - _times(matrix, rough))

    def error(w: Tensor) -> Tensor:
        return torch.minimum(w, _times(matrix, w) - _at(right, w.clamp(min=0))).abs().amax(-1, keepdim=True)

    return torch.where(error(better) < error(rough), better.clamp(min=0), rough)
