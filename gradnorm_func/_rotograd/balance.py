"""RotoGrad's balance: from what a pass has measured to the next rotations and weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.guard import accepted, due, settled
from gradnorm_func._balance.seen import mask_vector
from gradnorm_func._core.numerics import column, cosines, diagonal, full_precision, safe_sqrt
from gradnorm_func._core.tracing import no_graph
from gradnorm_func._rotograd import published
from gradnorm_func._rotograd.crossing import RotoGradStats
from gradnorm_func._rotograd.rotation import polish, skew, turn
from gradnorm_func._rotograd.scale import Numbers, in_units, numbers, retaken, weight_gradient
from gradnorm_func._rotograd.settings import Hyper, RotoGradState, check_moments, check_state


class RotoGradInfo(NamedTuple):
    """What one would log of a step; all taken before the rotations and weights moved."""

    losses: Tensor  # (T,) L_k
    weights: Tensor  # (T,) f_k: what ∂L_k/∂z is multiplied by on its way into the backbone
    head_norms: Tensor  # (T,) ‖∂L_k/∂r_k‖, at what the head sees: before the gradients are rotated back
    grad_norms: Tensor  # (T,) ‖∂L_k/∂z‖, after it: the same but for rounding
    head_cosines: Tensor  # (T, T) between the ∂L_k/∂r_k: what they would be without rotations
    cosines: Tensor  # (T, T) between the ∂L_k/∂z: negative is conflict
    rotation_losses: Tensor  # (T,) L_rot^k
    total_loss: Tensor  # () Σ L_k, with the backbone's own
    finite: Tensor  # () bool: False means that the state was left as it was; `check_finite` says why


def balance(
    state: RotoGradState, stats: RotoGradStats, hyper: Hyper, mask: Any, update: bool | Tensor
) -> tuple[RotoGradState, RotoGradInfo]:
    """The rotations' step, and the weights'; all of it or nothing."""
    check_state(state)
    check_moments(state, hyper)
    _check_stats(stats)
    vector = mask_vector(mask, state.weights)  # (T,) bool
    turn_now = due(state, hyper.every, update)
    with no_graph(), full_precision(state.weights):
        result = numbers(state, stats.losses, stats.gramian, vector, hyper)
        info = _info(stats, result, hyper)
        if update is False:
            return state, info
        new = state
        if turn_now is not False:
            _require_moments(stats)
            new, step = _moved(state, stats, result, hyper)
            # Asked of the step and not of the rotations, which follow late: what is chosen can be written at once.
            sound = step.square().sum().isfinite() & new.weights.isfinite().all()
            info = info._replace(finite=info.finite & (sound if turn_now is True else sound | ~turn_now))
        ok = accepted(info.finite, vector, update)
        return settled(new, state, ok, turn_now, vector, lambda old: _absent(old, hyper)), info


def _absent(state: RotoGradState, hyper: Hyper) -> RotoGradState:
    """What absent tasks keep: at the burn-in step no L(0) and ‖g(0)‖ from before it, but those of their next step."""
    if hyper.burn_in is None:
        return state
    now = state.step == hyper.burn_in
    initial = [torch.where(now, torch.nan, x) for x in (state.initial_losses, state.initial_norms)]
    return state._replace(initial_losses=initial[0], initial_norms=initial[1])


def _moved(state: RotoGradState, stats: RotoGradStats, result: Numbers, hyper: Hyper) -> tuple[RotoGradState, Tensor]:
    """Rotations, weights, L(0) and ‖g(0)‖ one step further; and the step of A."""
    new, step = _rotated(state, _objective_gradient(state, stats, result, hyper), hyper)
    new = new._replace(initial_losses=result.initial_losses, initial_norms=result.initial_norms)
    if isinstance(stats.backbone_loss, Tensor):
        initial = retaken(state.initial_backbone_loss, stats.backbone_loss, state, hyper)
        new = new._replace(initial_backbone_loss=initial)
    return (_with_weights(new, result, hyper) if hyper.scale == "gradnorm" else new), step


def _objective_gradient(state: RotoGradState, stats: RotoGradStats, result: Numbers, hyper: Hyper) -> Tensor:
    """(T, m, m) R_kᵀ times the derivative of what R_k descends."""
    moments, square = stats.moments, stats.square
    if isinstance(stats.cross, Tensor):  # merged stats: v is made of all of them
        along = result.direction * result.units  # (T,)
        with_v = torch.einsum("j,kjab->kab", along, stats.cross)  # (T, m, m) Σ_n ∂L_k/∂z vᵀ
        moments, square = with_v * column(result.units, with_v), torch.einsum("k,kab->ab", along, with_v)
    factor = 1.0 if hyper.form == "paper" else 2 / _count(stats)
    gradient: Tensor = -factor * moments
    if hyper.cooperative is None:
        return gradient
    # The published rotation loss is a square distance: its normal part moves nothing, but counts in the norm.
    if hyper.form != "paper":
        gradient = gradient + factor * square
    task_gradient = stats.task_moments * column(result.units, stats.task_moments)
    return published.cooperative(gradient, task_gradient, state, hyper.cooperative)


def _rotated(state: RotoGradState, gradient: Tensor, hyper: Hyper) -> tuple[RotoGradState, Tensor]:
    """The state with rotations one step further, and the step of A; `gradient` is R_kᵀ ∂/∂R_k."""
    if not hyper.moving:
        return published.rotated_about_base(state, gradient, hyper)
    step, moments = hyper.optimizer.update(skew(gradient), state.moments, torch.zeros_like(gradient))
    rotations = polish(turn(state.rotations, step, hyper.map), state.step)
    return state._replace(rotations=rotations, moments=moments), step


def _with_weights(state: RotoGradState, result: Numbers, hyper: Hyper) -> RotoGradState:
    """RotoGradNorm's weights one step further, their sum as it was."""
    gradient, before = weight_gradient(result, hyper), result.weights  # (T,), 0 for an absent task
    step, moments = hyper.weight_optimizer.update(gradient, state.weight_moments, state.weights.log())
    raw = before * step.exp()
    weights = torch.where(result.active, raw * (before.sum() / raw.sum()), state.weights)
    return state._replace(weights=weights, weight_moments=moments)


def _info(stats: RotoGradStats, result: Numbers, hyper: Hyper) -> RotoGradInfo:
    active, gramian = result.active, result.gramian
    head_gramian = in_units(stats.head_gramian, result.units, hyper)  # (T, T)
    if hyper.form == "paper":
        rotation_losses = -gramian @ result.direction
    else:
        rotation_losses = published.squared_distances(result.direction, gramian) / _count(stats)
    total = torch.where(active, stats.losses, 0.0).sum()
    finite = ((stats.losses.isfinite() & result.norms.isfinite()) | ~active).all() & gramian.isfinite().all()
    if isinstance(stats.backbone_loss, Tensor):
        total, finite = total + stats.backbone_loss, finite & stats.backbone_loss.isfinite()
    return RotoGradInfo(
        losses=stats.losses,
        weights=result.weights,
        head_norms=safe_sqrt(diagonal(head_gramian)),
        grad_norms=result.norms,
        head_cosines=cosines(head_gramian),
        cosines=cosines(gramian),
        rotation_losses=rotation_losses,
        total_loss=total,
        finite=finite,
    )


def _count(stats: RotoGradStats) -> float | Tensor:
    """Over how many entries the published loss is a mean."""
    return stats.examples.clamp(min=1) if isinstance(stats.examples, Tensor) else max(stats.examples, 1.0)


def _check_stats(stats: Any) -> None:
    if not isinstance(stats, RotoGradStats):
        raise ValueError(
            f"stats is a {type(stats).__name__}: RotoGrad balances what its own pass has measured, so give `grad` or "
            "`update` the loss and the batch, and reduce= where stats are to be seen on the way"
        )


def _require_moments(stats: RotoGradStats) -> None:
    if not isinstance(stats.cross, Tensor) and not isinstance(stats.moments, Tensor):
        raise ValueError(
            "stats were measured in a step in which nothing moves (update=False, or between two turns of every=): "
            "balance them with update=False"
        )
