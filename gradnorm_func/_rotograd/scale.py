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

    active: Tensor  # bool: the tasks that are present
    units: Tensor  # u_k: 1 / L_k(0), or 1; 0 for an absent task
    gramian: Tensor  # (T, T) of the g_k = ∂(u_k L_k)/∂z
    norms: Tensor  # ‖g_k‖; 0 for an absent task
    direction: Tensor  # c_k of the common direction v = Σ c_k g_k
    weights: Tensor  # f_k of the backbone's gradient Σ f_k g_k
    rates: Tensor  # r_k, NaN where unused
    initial_losses: Tensor  # L_k(0)
    initial_norms: Tensor  # ‖g_k(0)‖


def numbers(state: RotoGradState, losses: Tensor, gramian: Tensor, mask: Tensor | None, hyper: Hyper) -> Numbers:
    """All numbers of a step, from losses and the (T, T) Gramian of the ∂L_k/∂z."""
    active, units = active_of(state, mask), units_of(state, losses, mask, hyper)
    gramian = in_units(gramian, units, hyper)
    norms = safe_sqrt(torch.where(active, diagonal(gramian), 0.0))
    initial_losses = retaken(state.initial_losses, losses, state, hyper, active)
    initial_norms = retaken(state.initial_norms, norms, state, hyper, active)
    count = active.sum().clamp(min=1)
    ratios = torch.where(active, losses / initial_losses, 0.0)
    rates = ratios * count / ratios.sum()
    size = published.direction_size(gramian, rates, active, hyper)
    direction = safe_inverse(norms) / count * size  # v = mean_k u_k, times the size
    weights = _trunk_weights(state, norms, initial_norms, active, hyper)
    return Numbers(active, units, gramian, norms, direction, weights, rates, initial_losses, initial_norms)


def active_of(state: RotoGradState, mask: Tensor | None) -> Tensor:
    """(T,) bool: the tasks that are present in this batch."""
    return torch.ones_like(state.weights, dtype=torch.bool) if mask is None else mask


def units_of(state: RotoGradState, losses: Tensor, mask: Tensor | None, hyper: Hyper) -> Tensor:
    """(T,) what a loss is multiplied by before it is differentiated: 1 / L_k(0), or 1; 0 for an absent task."""
    active = active_of(state, mask)
    if not hyper.normalize:
        return active.to(losses.dtype)
    # L(0) of a task that has never been seen is NaN, and NaN times nothing is NaN.
    return torch.where(active, _unit(retaken(state.initial_losses, losses, state, hyper, active)), 0.0)


def backbone_unit_of(state: RotoGradState, backbone_loss: Tensor, hyper: Hyper) -> Tensor:
    """() the same of the backbone's loss."""
    if not hyper.normalize:
        return torch.ones_like(state.initial_backbone_loss)
    return _unit(retaken(state.initial_backbone_loss, backbone_loss, state, hyper))


def in_units(gramian: Tensor, units: Tensor, hyper: Hyper) -> Tensor:
    """(T, T) inner products of the ∂(u_k L_k)/∂z, from those of the ∂L_k/∂z."""
    return gramian * units[:, None] * units if hyper.normalize else gramian


def retaken(initial: Tensor, now: Tensor, state: RotoGradState, hyper: Hyper, active: Tensor | None = None) -> Tensor:
    """L(0), ‖g(0)‖ and the like: of the first step that saw it, and taken anew at the burn-in step."""
    fresh = initial.isnan()
    if hyper.burn_in is not None:
        fresh = fresh | (state.step == hyper.burn_in)
    return torch.where(fresh if active is None else fresh & active, now, initial)


def weight_gradient(result: Numbers, hyper: Hyper) -> Tensor:
    r"""(T,) gradient of GradNorm's :math:`\sum_k |w_k n_k - \mathrm{target}_k|` by the logarithms of the weights.

    With :math:`w = K \mathrm{softmax}(\lambda)`, :math:`\partial w_k / \partial \lambda_i = w_k (\delta_{ki} - w_i/K)`;
    0.1.2 held the normalising sum constant, which leaves the diagonal alone.
    """
    active, w = result.active, result.weights
    weighted = w * result.norms
    if hyper.form == "paper":
        mean = weighted.sum() / active.sum().clamp(min=1)
    else:
        mean = published.mean_norm(result.gramian, w, active)
    targets = mean * force(torch.where(active, result.rates, 1.0), hyper.alpha)
    pull = torch.where(active, (weighted - targets).sign() * weighted, 0.0)
    return pull if hyper.form == "0.1.2" else pull - w / w.sum() * pull.sum()


def _unit(initial: Tensor) -> Tensor:
    return torch.where(initial == 0, 1.0, 1 / torch.where(initial == 0, 1.0, initial))


def _trunk_weights(state: RotoGradState, norms: Tensor, initial_norms: Tensor, active: Tensor, hyper: Hyper) -> Tensor:
    """(T,) f_k: 1; or GradNorm's weights; or C / ‖g_k‖ with C = Σ α_k ‖g_k‖ and α_k ∝ ‖g_k‖ / ‖g_k(0)‖."""
    if hyper.scale == "none":
        return active.to(norms.dtype)
    if hyper.scale == "gradnorm":
        return torch.where(active, state.weights, 0.0)
    growth = torch.where(active, norms * safe_inverse(initial_norms), 0.0)
    total = growth.sum()
    shares = growth / torch.where(total > 0, total, 1.0)
    return (shares * norms).sum() * safe_inverse(norms)
