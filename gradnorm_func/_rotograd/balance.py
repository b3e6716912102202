"""RotoGrad's balance: from what a pass has found to the next rotations and weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.protocol import choose, here_of
from gradnorm_func._core import tree
from gradnorm_func._measure.plan import quiet
from gradnorm_func._rotograd.measure import RotoGradStats, backbone_initial, check_state, rescaled
from gradnorm_func._rotograd.rotation import MAPS, polish, skew, tangent_gradient, turn
from gradnorm_func._rotograd.scale import Hyper, Numbers, RotoGradState, diagonal, numbers, weight_gradient


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
    """What `rotograd_balance` returns, hyperparameters bound."""
    check_state(state)
    _check_moments(state, hyper)
    with quiet()():
        here = here_of(state, mask)
        _, gram = rescaled(state, stats, here, hyper)
        found = numbers(state, stats.losses, gram, here, hyper)
        info = _info(stats, gram, found, here, hyper)
        if update is False:
            return state, info
        new, step = _rotated(state, _objective_gradient(state, stats, found, hyper), hyper)
        new = new._replace(
            initial_losses=found.initial_losses,
            initial_norms=found.initial_norms,
            initial_backbone_loss=backbone_initial(state, stats.backbone_loss, hyper),
            step=state.step + 1,
        )
        if hyper.scale == "gradnorm":
            by_log = weight_gradient(state, found, gram, here, hyper)
            step, moments = hyper.weight_optimizer.update(by_log, state.weight_moments, state.weights.log())
            raw = torch.where(here, state.weights * step.exp(), 0.0)
            moved = torch.where(here, raw * (torch.where(here, state.weights, 0.0).sum() / raw.sum()), state.weights)
            new = new._replace(weights=moved, weight_moments=moments)
        if mask is not None:
            new = _with_absent(here, new, state)
        # Asked of the step and not of the rotations, which follow late: what is chosen can be written at once.
        ok = info.finite & step.square().sum().isfinite() & new.weights.isfinite().all()
        info = info._replace(finite=ok)
        return choose(ok & here.any() & torch.as_tensor(update, device=here.device), new, state), info


def _objective_gradient(state: RotoGradState, stats: RotoGradStats, found: Numbers, hyper: Hyper) -> Tensor:
    """(T, m, m) R_kᵀ times the derivative of what R_k descends."""
    ratio = found.units / stats.units
    moments, square = stats.moments, stats.square
    if isinstance(stats.cross, Tensor):
        along = found.direction * ratio
        moments = torch.einsum("k,j,kjab->kab", ratio, along, stats.cross)
        square = torch.einsum("k,kab->ab", along, torch.einsum("j,kjab->kab", along, stats.cross))
    factor = 1.0 if hyper.form == "paper" else 2 / _count(stats)
    gradient: Tensor = -factor * moments
    if hyper.cooperative is None:
        return gradient
    # The published rotation loss is a square distance: its normal part moves nothing, but counts in the norm.
    if hyper.form != "paper":
        gradient = gradient + factor * square
    own = stats.task_moments * ratio[:, None, None]
    size = torch.linalg.matrix_norm((own + gradient) / 2, keepdim=True)
    return torch.where(state.step >= hyper.cooperative, _resized(own, size) + _resized(gradient, size), gradient)


def _resized(x: Tensor, size: Tensor) -> Tensor:
    """A stack of matrices, each scaled to a norm; 0 stays 0."""
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    return torch.where(norm > 0, x * (size / torch.where(norm > 0, norm, 1.0)), 0.0)


def _rotated(state: RotoGradState, gradient: Tensor, hyper: Hyper) -> tuple[RotoGradState, Tensor]:
    """The state with rotations one step further, and the step of A; `gradient` is R_kᵀ ∂/∂R_k."""
    if hyper.moving:
        step, moments = hyper.optimizer.update(skew(gradient), state.moments, torch.zeros_like(gradient))
        rotations = polish(turn(state.rotations, step, hyper.map), state.step)
        return state._replace(rotations=rotations, moments=moments), step
    by_tangent = tangent_gradient(state.tangents, gradient, hyper.map)
    step, moments = hyper.optimizer.update(by_tangent, state.moments, state.tangents)
    tangents = state.tangents + step
    rotations = state.base @ MAPS[hyper.map](tangents)
    return state._replace(rotations=rotations, tangents=tangents, moments=moments), step


def _info(stats: RotoGradStats, gram: Tensor, found: Numbers, here: Tensor, hyper: Hyper) -> RotoGradInfo:
    ratio = found.units / stats.units
    head_gram = stats.head_gram * ratio[:, None] * ratio
    head_norms = tree.safe_sqrt(diagonal(head_gram))
    agreement = gram @ found.direction
    rotation_losses = -agreement
    if hyper.form != "paper":
        distance = found.direction @ agreement + diagonal(gram) - 2 * agreement
        rotation_losses = distance / _count(stats)
    total = torch.where(here, stats.losses, 0.0).sum()
    finite = ((stats.losses.isfinite() & found.norms.isfinite()) | ~here).all() & gram.isfinite().all()
    if isinstance(stats.backbone_loss, Tensor):
        total, finite = total + stats.backbone_loss, finite & stats.backbone_loss.isfinite()
    return RotoGradInfo(
        losses=stats.losses,
        weights=found.weights,
        head_norms=head_norms,
        grad_norms=found.norms,
        head_cosines=_cosines(head_gram, head_norms),
        cosines=_cosines(gram, found.norms),
        rotation_losses=rotation_losses,
        total_loss=total,
        finite=finite,
    )


def _count(stats: RotoGradStats) -> float | Tensor:
    """Over how many entries the published loss is a mean."""
    return stats.examples.clamp(min=1) if isinstance(stats.examples, Tensor) else max(stats.examples, 1.0)


def _cosines(gram: Tensor, norms: Tensor) -> Tensor:
    """(T, T); 0 where a gradient vanishes."""
    size = norms[:, None] * norms
    return torch.where(size > 0, gram / torch.where(size > 0, size, 1.0), 0.0)


def _with_absent(here: Tensor, new: RotoGradState, old: RotoGradState) -> RotoGradState:
    """The new state, with everything of the absent tasks as it was."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(here.reshape(-1, *[1] * (a.ndim - 1)), a, b) if a.ndim else a

    return tree.tree_map(pick, new, old)  # type: ignore[no-any-return]


def _check_moments(state: RotoGradState, hyper: Hyper) -> None:
    flat = torch.zeros_like(state.rotations)
    expected = (
        () if hyper.moving else flat,
        hyper.optimizer.init(flat),
        hyper.weight_optimizer.init(state.weights) if hyper.scale == "gradnorm" else (),
    )
    if tree.flatten(expected)[1] != tree.flatten((state.tangents, state.moments, state.weight_moments))[1]:
        raise ValueError(
            "the state was made with another moving=, scale= or optimizer=: give rotograd_init_state and the updates "
            "the same (or use the init of the same gn.rotograd(...))"
        )
