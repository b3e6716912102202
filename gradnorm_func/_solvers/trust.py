"""The best worst case near the mean gradient, from the Gramian: CAGrad's inner problem."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._solvers.nnls import ROUNDING, ROUNDS, interior, inverse_on
from gradnorm_func._solvers.node import node
from gradnorm_func._solvers.units import Units, own_units

TINY = 1e-300
CORRECTIONS = 8


def near_mean(gramian: Tensor, active: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weights of the d that maximises :math:`\min_i \langle g_i, d\rangle` with :math:`\|d - g_0\| \le c \|g_0\|`.

    g_0 is the mean gradient, and d is :math:`g_0 + c \|g_0\| g_w / \|g_w\|` with the w of the simplex that minimises
    :math:`\langle g_w, g_0\rangle + c \|g_0\| \|g_w\|`. The Frank-Wolfe gap of that, relative to :math:`\|g_0\|^2`, is
    the certificate. Tasks without a gradient have no part in w.
    """
    units = own_units(gramian, active)
    even = active.double() / active.sum()
    mean = units.lengths * even
    length = (mean @ (units.cosines @ mean)).clamp(min=0).sqrt()
    mean = mean / length.clamp(min=TINY)  # from here on ‖g_0‖ is 1
    c = radius.double()
    y = _two(units, mean, c) if gramian.shape[-1] == 2 else _many(mean, c.clamp(min=1e-6), *units)
    y, gap = _judged(units, mean, c, y)
    weights = even + c * length * units.inverses * y
    return weights.to(gramian.dtype), (gap / length.clamp(min=TINY)).to(gramian.dtype)


def _judged(units: Units, mean: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of g_w, in units of length 1, and its Frank-Wolfe gap."""
    all_real = units.all_real()
    y = y if all_real else y * units.real
    y = y / torch.dot(y, units.cosines @ y).clamp(min=TINY).sqrt()
    slopes = units.lengths * (units.cosines @ (mean + c * y))
    w = y * units.inverses
    least = (slopes if all_real else torch.where(units.real, slopes, slopes.max())).min()
    return y, torch.dot(w, slopes) / w.sum().clamp(min=TINY) - least


def _two(units: Units, mean: Tensor, c: Tensor) -> Tensor:
    """T = 2: the root of the derivative along the line from g_2 to g_1, if it lies between them."""
    (a, b), cosine = units.lengths.unbind(), units.cosines[0, 1]
    slopes = units.lengths * (units.cosines @ mean)
    difference = ((a - b) ** 2 + 2 * a * b * (1 - cosine)).clamp(min=TINY)  # ‖e‖² of e = g_1 - g_2
    along = b * (a * cosine - b)  # ⟨e, g_2⟩
    sine = -(slopes[0] - slopes[1]) / (c * difference.sqrt()).clamp(min=TINY)
    apart = a * b * ((1 - cosine) * (1 + cosine)).clamp(min=0).sqrt()  # ‖e‖ times the distance of the line from 0
    x = apart * sine / ((1 - sine) * (1 + sine)).clamp(min=TINY).sqrt()
    first = torch.where(sine.abs() < 1, (x - along) / difference, (sine > 0).to(x)).clamp(0, 1)
    return units.of_pair(units.lengths * torch.stack([first, 1 - first]))


@node(lambda mean, *_: torch.empty_like(mean))
def _many(
    mean: Tensor,
    c: Tensor,
    cosines: Tensor,
    lengths: Tensor,
    inverses: Tensor,
    size: Tensor,
    real: Tensor,
    active: Tensor,
) -> Tensor:
    r"""A multiple of :math:`y_i = w_i n_i`, which minimises :math:`m^\top C y + c \sqrt{y^\top C y}` on a plane.

    The plane is :math:`a^\top y = 1`, with :math:`a_i \propto 1 / n_i`.
    """
    units = Units(cosines, lengths, inverses, size, real, active)
    a = inverses / inverses.max().clamp(min=TINY)
    slope = cosines @ mean
    alone = ((slope + c) / a).masked_fill(~units.real, torch.inf).min()  # t if d had to serve one task only
    if free_to_ask(mean):
        positive = (alone * a > slope) & units.real
        for _ in range(ROUNDS):
            y, s, solved = _guess(units, a, slope, c, positive)
            before, positive = positive, (torch.where(positive, y, -s) > ROUNDING) & units.real
            if torch.equal(positive, before) and bool(solved):
                return y.clamp(min=0)

    def bound(y: Tensor) -> Tensor:
        y = y * units.real
        value = 0.5 * (y @ (units.cosines @ y)) + y @ slope + 0.5 * c * c
        return value / (a @ y).clamp(min=TINY) * a - slope

    y, s = interior(units.cosines, alone * a - slope, bound)
    positive = (y > s) & units.real
    best, gap = _judged(units, mean, c, torch.where(positive, y, 0.0))
    for _ in range(CORRECTIONS):  # of the set; where C is singular, one of a thousand draws needs more than one
        y, s, solved = _guess(units, a, slope, c, positive)
        other, less = _judged(units, mean, c, y.clamp(min=0))
        better = solved & ((less < gap) | (gap != gap))
        best, gap = torch.where(better, other, best), torch.where(better, less, gap)
        positive = (torch.where(positive, y, -s) > ROUNDING) & units.real
    return best


def _guess(units: Units, a: Tensor, slope: Tensor, c: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""y if these were the positive ones, its slopes s, and whether there is one.

    Scaled to :math:`y^\top C y = c^2` it solves :math:`C y = t a - C m` in that set. t is the larger root of that
    quadratic equation.
    """
    solve = inverse_on(units.cosines, positive)
    sides = torch.stack([a, slope])
    both = solve(sides)
    p, q = (both + solve(sides - both @ units.cosines)).unbind()  # once more, for the damping
    square, half, rest = a @ p, a @ q, slope @ q - c * c
    root = half * half - square * rest
    t = (half + root.clamp(min=0).sqrt()) / square
    y = t * p - q
    s = units.cosines @ y - t * a + slope
    return y, s, (root >= 0) & (s * 0 == 0).all()
