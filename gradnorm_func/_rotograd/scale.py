"""RotoGrad's arithmetic on T numbers: the common direction, and how much of each gradient the backbone gets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.algorithm1 import force
from gradnorm_func._core.numerics import diagonal, safe_inverse, safe_sqrt
from gradnorm_func._rotograd import published
from gradnorm_func._rotograd.settings import Hyper, RotoGradState


class Numbers(NamedTuple):
    """What follows from the losses and the Gramian of one batch; (T,) where not said otherwise."""

    units: Tensor  # 1 / L_k(0), or 1
    direction: Tensor  # c_k of the common direction v = Σ c_k g_k
    weights: Tensor  # f_k of the backbone's gradient Σ f_k g_k
    norms: Tensor  # ‖g_k‖
    rates: Tensor  # r_k, NaN where unused
    initial_losses: Tensor
    initial_norms: Tensor


def units_of(initial: Tensor, hyper: Hyper) -> Tensor:
    """1 / L(0) where losses are normalised, and 1 where they are not or L(0) is 0."""
    if not hyper.normalize:
        return torch.ones_like(initial)
    return torch.where(initial == 0, 1.0, 1 / torch.where(initial == 0, 1.0, initial))


def retaken(initial: Tensor, now: Tensor, state: RotoGradState, hyper: Hyper, active: Tensor | None = None) -> Tensor:
    """L(0), ‖G(0)‖ and the like: of the first step that saw it, and taken anew at the burn-in step."""
    fresh = initial.isnan()
    if hyper.burn_in is not None:
        fresh = fresh | (state.step == hyper.burn_in)
    return torch.where(fresh if active is None else fresh & active, now, initial)


def numbers(state: RotoGradState, losses: Tensor, gramian: Tensor, active: Tensor, hyper: Hyper) -> Numbers:
    """All (T,) factors of a step, from losses and the (T, T) Gramian of the (normalised) task gradients at z."""
    count = active.sum().clamp(min=1)
    initial_losses = retaken(state.initial_losses, losses, state, hyper, active)
    norms = safe_sqrt(torch.where(active, diagonal(gramian), 0.0))
    inverse = safe_inverse(norms)
    initial_norms = retaken(state.initial_norms, norms, state, hyper, active)
    ratios = torch.where(active, losses / initial_losses, 0.0)
    rates = ratios * count / ratios.sum()
    direction = inverse / count * published.direction_size(gramian, rates, active, hyper)  # v = mean_k u_k
    weights = _trunk_weights(state, norms, inverse, initial_norms, active, hyper)
    units = units_of(initial_losses, hyper)
    return Numbers(units, direction, weights, norms, rates, initial_losses, initial_norms)


def _trunk_weights(
    state: RotoGradState, norms: Tensor, inverse: Tensor, initial_norms: Tensor, active: Tensor, hyper: Hyper
) -> Tensor:
    """(T,) f_k: 1; or GradNorm's weights; or C / ‖g_k‖ with C = Σ α_k ‖g_k‖ and α_k ∝ ‖g_k‖ / ‖g_k(0)‖."""
    if hyper.scale == "none":
        return active.to(norms.dtype)
    if hyper.scale == "gradnorm":
        return torch.where(active, state.weights, 0.0)
    growth = torch.where(active, norms * safe_inverse(initial_norms), 0.0)
    total = growth.sum()
    shares = growth / torch.where(total > 0, total, 1.0)
    return (shares * norms).sum() * inverse


def weight_gradient(state: RotoGradState, result: Numbers, gramian: Tensor, active: Tensor, hyper: Hyper) -> Tensor:
    r"""(T,) gradient of GradNorm's :math:`\sum_k |w_k n_k - \mathrm{target}_k|` by the logarithms of the weights.

    With :math:`w = K \mathrm{softmax}(\lambda)`, :math:`\partial w_k / \partial \lambda_i = w_k (\delta_{ki} - w_i/K)`;
    0.1.2 held the normalising sum constant, which leaves the diagonal alone.
    """
    w, count = torch.where(active, state.weights, 0.0), active.sum().clamp(min=1)
    weighted = w * result.norms
    mean = weighted.sum() / count if hyper.form == "paper" else published.mean_norm(gramian, result.weights, active)
    targets = mean * force(torch.where(active, result.rates, 1.0), hyper.alpha)
    pull = torch.where(active, (weighted - targets).sign() * weighted, 0.0)
    return pull if hyper.form == "0.1.2" else pull - w / w.sum() * pull.sum()
