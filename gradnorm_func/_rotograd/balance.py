"""RotoGrad's balance: from what a pass has measured to the next rotations and weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.guard import accepted, due, settled
from gradnorm_func._balance.seen import mask_vector
from gradnorm_func._core import tree
from gradnorm_func._core.numerics import cosines, diagonal, safe_sqrt
from gradnorm_func._core.tracing import no_graph
from gradnorm_func._rotograd import published
from gradnorm_func._rotograd.crossing import RotoGradStats, backbone_initial, in_units
from gradnorm_func._rotograd.rotation import polish, skew, turn
from gradnorm_func._rotograd.scale import Numbers, numbers, weight_gradient
from gradnorm_func._rotograd.settings import Hyper, RotoGradState


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
    _check_moments(state, hyper)
    vector = mask_vector(mask, state.weights)
    active = torch.ones_like(state.weights, dtype=torch.bool) if vector is None else vector
    turn_of_step = due(state, hyper.every, update)
    with no_graph():
        units, gramian = in_units(state, stats, active, hyper)  # (T,), (T, T)
        result = numbers(state, stats.losses, gramian, active, hyper)
        info = _info(stats, gramian, result, active, hyper)
        if update is False:
            return state, info
        if turn_of_step is False:
            return settled(state, state, accepted(info.finite, vector, update), turn_of_step, vector), info
        new, step = _rotated(state, _objective_gradient(state, stats, result, hyper), hyper)
        new = new._replace(
            initial_losses=result.initial_losses,
            initial_norms=result.initial_norms,
            initial_backbone_loss=backbone_initial(state, stats.backbone_loss, hyper),
        )
        if hyper.scale == "gradnorm":
            new, step = _with_weights(new, state, weight_gradient(state, result, gramian, active, hyper), active, hyper)
        # Asked of the step and not of the rotations, which follow late: what is chosen can be written at once.
        info = info._replace(finite=info.finite & step.square().sum().isfinite() & new.weights.isfinite().all())
        return settled(new, state, accepted(info.finite, vector, update), turn_of_step, vector), info


def _objective_gradient(state: RotoGradState, stats: RotoGradStats, result: Numbers, hyper: Hyper) -> Tensor:
    """(T, m, m) R_kᵀ times the derivative of what R_k descends."""
    moments, square = stats.moments, stats.square
    if isinstance(stats.cross, Tensor):  # merged stats: v is made of all of them
        along = result.direction * result.units
        moments = torch.einsum("k,j,kjab->kab", result.units, along, stats.cross)
        square = torch.einsum("k,kab->ab", along, torch.einsum("j,kjab->kab", along, stats.cross))
    factor = 1.0 if hyper.form == "paper" else 2 / _count(stats)
    gradient: Tensor = -factor * moments
    if hyper.cooperative is None:
        return gradient
    # The published rotation loss is a square distance: its normal part moves nothing, but counts in the norm.
    if hyper.form != "paper":
        gradient = gradient + factor * square
    task_gradient = stats.task_moments * result.units[:, None, None]
    return published.cooperative(gradient, task_gradient, state, hyper.cooperative)


def _rotated(state: RotoGradState, gradient: Tensor, hyper: Hyper) -> tuple[RotoGradState, Tensor]:
    """The state with rotations one step further, and the step of A; `gradient` is R_kᵀ ∂/∂R_k."""
    if not hyper.moving:
        return published.rotated_about_base(state, gradient, hyper)
    step, moments = hyper.optimizer.update(skew(gradient), state.moments, torch.zeros_like(gradient))
    rotations = polish(turn(state.rotations, step, hyper.map), state.step)
    return state._replace(rotations=rotations, moments=moments), step


def _with_weights(
    new: RotoGradState, state: RotoGradState, by_log: Tensor, active: Tensor, hyper: Hyper
) -> tuple[RotoGradState, Tensor]:
    """RotoGradNorm's weights one step further, their sum as it was; and that step."""
    step, moments = hyper.weight_optimizer.update(by_log, state.weight_moments, state.weights.log())
    raw = torch.where(active, state.weights * step.exp(), 0.0)
    budget = torch.where(active, state.weights, 0.0).sum()
    moved = torch.where(active, raw * (budget / raw.sum()), state.weights)
    return new._replace(weights=moved, weight_moments=moments), step


def _info(stats: RotoGradStats, gramian: Tensor, result: Numbers, active: Tensor, hyper: Hyper) -> RotoGradInfo:
    units = torch.where(active, result.units, 0.0)
    head_gramian = stats.head_gramian * units[:, None] * units if hyper.normalize else stats.head_gramian
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


def check_state(state: Any) -> None:
    """Refuses what is no state of RotoGrad."""
    if not isinstance(state, RotoGradState):
        raise ValueError(
            f"state is a {type(state).__name__}, not a RotoGradState: make one with gn.rotograd(...).init(T); "
            "the order of arguments is (state, params, loss_fn, batch)"
        )


def _check_moments(state: RotoGradState, hyper: Hyper) -> None:
    flat = torch.zeros_like(state.rotations)
    expected = (
        () if hyper.moving else flat,
        hyper.optimizer.init(flat),
        hyper.weight_optimizer.init(state.weights) if hyper.scale == "gradnorm" else (),
    )
    if tree.flatten(expected)[1] != tree.flatten((state.tangents, state.moments, state.weight_moments))[1]:
        raise ValueError(
            "the state was made with another moving=, scale= or optimizer=: use the init of the same gn.rotograd(...)"
        )
