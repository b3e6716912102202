"""From the derivative of the objective to the next scales: the optimizer's step, and the bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._gradinit.objective import Objective
from gradnorm_func._gradinit.rescale_adam import AnyOptimizer, ScaleOptimizer
from gradnorm_func._gradinit.settings import Settings
from gradnorm_func._gradinit.state import GradInitState


def moved(state: GradInitState, goal: Objective, optimizer: AnyOptimizer, low: Tensor, high: float) -> GradInitState:
    """The state with its scales moved, and then kept between the bounds."""
    change, moments = _change(state, goal, optimizer)
    bounded = torch.maximum(state.scales + change, low).clamp(max=high)
    # A bound is for what is scaled: it must not move what is frozen, or not touched yet.
    return GradInitState(torch.where(goal.scale_grads != 0, bounded, state.scales), moments)


def bounds(scales: Tensor, biases: set[int], settings: Settings) -> tuple[Tensor, float]:
    """(P,) least scales, and the greatest."""
    # Filled on the device: a tensor made of a Python list would be a copy from the host that the host waits for.
    of_bias, of_weight = scales.new_full((), settings.min_bias_scale), scales.new_full((), settings.min_scale)
    low = torch.stack([of_bias if i in biases else of_weight for i in range(scales.shape[0])])
    return low, float("inf") if settings.max_scale is None else settings.max_scale


def _change(state: GradInitState, goal: Objective, optimizer: AnyOptimizer) -> tuple[Tensor, Any]:
    """The optimizer's step, and its new state; any optimizer is made to leave alone what has no gradient."""
    if isinstance(optimizer, ScaleOptimizer):
        return optimizer.update(goal.scale_grads, state.moments, state.scales, goal.above)
    change, moments = optimizer.update(goal.scale_grads, state.moments, state.scales)
    moves = goal.scale_grads != 0

    def unless_still(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(moves, new, old) if new.shape == moves.shape else new

    return change, tree.tree_map(unless_still, moments, state.moments)
