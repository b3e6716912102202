"""What the published packages do otherwise than the paper: forms 0.1.2 and 0.1.6, cooperative mode, fixed base point.

Everything here is for agreement with rotograd 0.1.2 to 0.1.6, step by step. The paper's form needs none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradnorm_func._balance.algorithm1 import force
from gradnorm_func._core.numerics import diagonal, safe_sqrt
from gradnorm_func._rotograd.rotation import MAPS, skew_part, tangent_gradient

if TYPE_CHECKING:
    from gradnorm_func._rotograd.settings import Hyper, RotoGradState


def direction_size(gramian: Tensor, rates: Tensor, active: Tensor, hyper: Hyper) -> Tensor | float:
    """What v is longer by: ‖mean_k g_k‖, and in 0.1.2 also r_k^α for task k."""
    if hyper.form == "paper":
        return 1.0
    size = mean_norm(gramian, active.to(gramian.dtype), active)
    if hyper.form == "0.1.6":
        return size
    return size * force(torch.where(active, rates, 1.0), hyper.alpha)


def mean_norm(gramian: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    """() ‖mean_k w_k g_k‖, from the Gramian; rounding can take the square of a vanishing one below zero."""
    return safe_sqrt((weights @ gramian @ weights).clamp(min=0)) / active.sum().clamp(min=1)


def squared_distances(direction: Tensor, gramian: Tensor) -> Tensor:
    """(T,) ‖v − g_k‖² of v = Σ c_k g_k: the published rotation loss, but for its mean over entries."""
    agreement = gramian @ direction
    return direction @ agreement + diagonal(gramian) - 2 * agreement


def cooperative(gradient: Tensor, task_gradient: Tensor, state: RotoGradState, start: int | Tensor) -> Tensor:
    """(T, m, m): from step `start` on, the gradient of the task's loss is added, both at the norm of their mean."""
    size = torch.linalg.matrix_norm((task_gradient + gradient) / 2, keepdim=True)
    together = _resized(task_gradient, size) + _resized(gradient, size)
    return torch.where(state.step >= start, together, gradient)


def rotated_about_base(state: RotoGradState, gradient: Tensor, hyper: Hyper) -> tuple[RotoGradState, Tensor]:
    """R = base · map(A) with A trained, one step further; `gradient` is R_kᵀ ∂/∂R_k. Returns the step of A too."""
    by_tangent = tangent_gradient(state.tangents, gradient, hyper.map)
    step, moments = hyper.optimizer.update(by_tangent, state.moments, state.tangents)
    tangents = skew_part(state.tangents + step)  # whatever the optimizer makes of a skew gradient
    rotations = state.base @ MAPS[hyper.map](tangents)
    return state._replace(rotations=rotations, tangents=tangents, moments=moments), step


def _resized(x: Tensor, size: Tensor) -> Tensor:
    """A stack of matrices, each scaled to a norm; 0 stays 0."""
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    return torch.where(norm > 0, x * (size / torch.where(norm > 0, norm, 1.0)), 0.0)
