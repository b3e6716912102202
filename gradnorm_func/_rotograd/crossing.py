"""RotoGrad's crossing: heads at R_k z, and back through the rotations; and what it measures on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core.numerics import column, promoted
from gradnorm_func._measure.crossing import AtZ, Crossed, Trunk
from gradnorm_func._measure.norms import stacked
from gradnorm_func._rotograd.scale import numbers, retaken, units_of
from gradnorm_func._rotograd.settings import Hyper, RotoGradState


class RotoGradFactors(NamedTuple):
    """The non-linear part of a step: what the gradients of a second pass over micro-batches are multiplied by."""

    weights: Tensor  # (T,) f_k of the backbone's gradient Σ f_k g_k
    units: Tensor  # (T,) 1 / L_k(0), or 1
    backbone_unit: Tensor  # () the same of the backbone's own loss


class RotoGradStats(NamedTuple):
    """What a pass tells, with g_k = ∂L_k/∂z and g̃_k = R_k g_k = ∂L_k/∂(R_k z). What was not measured is `()`."""

    losses: Tensor  # (T,) L_k
    backbone_loss: Any  # ()
    head_gramian: Tensor  # (T, T) Σ_n ⟨g̃_k, g̃_j⟩: what the conflict would be without rotations
    gramian: Tensor  # (T, T) Σ_n ⟨g_k, g_j⟩
    cross: Any = ()  # (T, T, m, m) Σ_n g_k g_jᵀ, of what is to be merged
    moments: Any = ()  # (T, m, m) Σ_n u_k g_k vᵀ, of what is whole, with its direction v and its units u
    square: Any = ()  # (m, m) Σ_n v vᵀ, likewise, for the cooperative mode
    task_moments: Any = ()  # (T, m, m) Σ_n g_k zᵀ, for the cooperative mode
    grads: Any = ()  # params: of the heads their own gradients, of the backbone that of Σ f_k g_k
    examples: Any = 0.0  # over how many entries the published rotation loss is a mean; 0 is a sum
    num_examples: Any = 1.0  # the share of this batch in a mean

    @property
    def powers(self) -> Mapping[str, int]:
        """Losses and gradients are means over examples; every example's gradient has coordinates of its own, and what
        is a product of two adds up with the square of the share; a count just adds up."""
        means = {"losses": 1, "backbone_loss": 1, "task_moments": 1, "grads": 1}
        return {**means, "head_gramian": 2, "gramian": 2, "cross": 2, "examples": 0}

    def complete(self) -> RotoGradStats:
        """Without what belonged to a part's own direction v: it is made anew of the cross moments."""
        return self._replace(moments=(), square=())


class Rotations(NamedTuple):
    """Head k sees R_k z, and z gets Σ_k f_k R_kᵀ g̃_k."""

    state: RotoGradState
    hyper: Hyper
    active: Tensor  # (T,) bool
    factors: RotoGradFactors | None  # None: those that this pass's own stats give
    moments: bool  # are the rotations to move?
    merged: bool  # will these stats be merged with others?
    goes_on: Any  # None: the trunk's gradient is not wanted

    @property
    def trunk_loss(self) -> Callable[[Any, Any, Any], Tensor] | None:
        """The backbone's own loss, which is neither rotated nor scaled."""
        return self.hyper.backbone_loss

    def copies(self, trunk: Trunk, count: int) -> list[Tensor]:
        """(T, ...): R_k z of the leaf that is rotated; the others as they are."""
        index = self.hyper.layout.leaf(trunk.z, trunk.z_treedef)
        rotations = self.state.rotations.to(trunk.z[index].dtype)
        return [
            self.hyper.layout.spread(leaf, rotations) if i == index else leaf.expand(count, *leaf.shape)
            for i, leaf in enumerate(trunk.z)
        ]

    def seeds(self, losses: Tensor) -> Tensor:
        """(T,) 1 / L_k(0), or 1; 0 for an absent task."""
        return torch.where(self.active, self.units(losses), 0.0).to(losses.dtype)

    def units(self, losses: Tensor) -> Tensor:
        """(T,) what the losses are differentiated in."""
        if self.factors is not None:
            return self.factors.units
        state = self.state
        initial = retaken(state.initial_losses, losses.to(state.weights.dtype), state, self.hyper, self.active)
        return units_of(initial, self.hyper)

    def cross(self, trunk: Trunk, at_z: AtZ) -> Crossed:
        """Turned back, weighed, and measured."""
        state, hyper, dtype = self.state, self.hyper, self.state.weights.dtype
        # Zero times a loss that is not finite is not zero.
        rows = [torch.where(column(self.active, leaf), leaf, 0) for leaf in map(stacked, at_z.z_grads)]  # (T, ...)
        index = hyper.layout.leaf(trunk.z, trunk.z_treedef)
        turned, z = rows[index], trunk.z[index]
        g = hyper.layout.back(turned, state.rotations.to(turned.dtype))  # (T, ...)
        others = [leaf for i, leaf in enumerate(rows) if i != index]
        beside = sum((_gramian(leaf, dtype) for leaf in others), torch.zeros((), dtype=dtype, device=g.device))
        head_gramian, gramian = _gramian(turned, dtype) + beside, _gramian(g, dtype) + beside  # (T, T)

        losses = at_z.losses.to(dtype)
        own = [loss.to(dtype) for loss in trunk.trunk_losses]
        result = numbers(state, losses, gramian, self.active, hyper)
        weights = result.weights if self.factors is None else self.factors.weights
        unit = torch.ones((), dtype=dtype, device=g.device)
        if self.factors is not None:
            unit = self.factors.backbone_unit
        elif own:
            unit = units_of(backbone_initial(state, own[0], hyper), hyper)
        sums = torch.stack([weights, result.direction]).to(g.dtype) @ g.reshape(g.shape[0], -1)
        total, v = (row.reshape(z.shape) for row in sums.unbind())
        cotangents = [
            total if i == index else torch.tensordot(weights.to(leaf.dtype), leaf, 1) for i, leaf in enumerate(rows)
        ]
        inverse = 1 / torch.where(self.active, self.units(losses), 1.0) if hyper.normalize else None
        stats = self._moments(g, v, z, inverse, dtype)._replace(
            losses=losses,
            backbone_loss=own[0] if own else (),
            head_gramian=_scaled(head_gramian, inverse),
            gramian=_scaled(gramian, inverse),
        )
        cotangents += [unit.to(loss.dtype) for loss in trunk.trunk_losses]
        return Crossed(stats, None if self.goes_on is None else cotangents)

    def _moments(self, g: Tensor, v: Tensor, z: Tensor, inverse: Tensor | None, dtype: torch.dtype) -> RotoGradStats:
        """What the rotations' gradients are made of; the other fields are filled in later."""
        layout, empty = self.hyper.layout, torch.zeros((), device=g.device)
        stats = RotoGradStats(empty, (), empty, empty, examples=float(layout.examples(z, self.hyper.form)))
        if self.merged and self.factors is None:
            cross = torch.stack([layout.moments(g, one) for one in g.unbind()], 1).to(dtype)
            stats = stats._replace(cross=_scaled(cross, inverse))
        if not self.moments:
            return stats
        if not self.merged:
            stats = stats._replace(moments=layout.moments(g, v).to(dtype))
        if self.hyper.cooperative is None:
            return stats
        task_moments = layout.moments(g, z).to(dtype)
        if inverse is not None:
            task_moments = task_moments * column(inverse, task_moments)
        square = () if self.merged else layout.moments(v[None], v)[0].to(dtype)
        return stats._replace(task_moments=task_moments, square=square)


def factors_of(state: RotoGradState, stats: RotoGradStats, active: Tensor, hyper: Hyper) -> RotoGradFactors:
    """The factors of a whole batch, for the second pass over its parts."""
    units, gramian = in_units(state, stats, active, hyper)
    unit = units_of(backbone_initial(state, stats.backbone_loss, hyper), hyper)
    return RotoGradFactors(numbers(state, stats.losses, gramian, active, hyper).weights, units, unit)


def in_units(state: RotoGradState, stats: RotoGradStats, active: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """The units that this step's losses give, and the Gramian in them."""
    units = units_of(retaken(state.initial_losses, stats.losses, state, hyper, active), hyper)
    return units, _scaled(stats.gramian, torch.where(active, units, 0.0) if hyper.normalize else None)


def backbone_initial(state: RotoGradState, loss: Any, hyper: Hyper) -> Tensor:
    """L(0) of the backbone's own loss."""
    if not isinstance(loss, Tensor):
        return state.initial_backbone_loss
    return retaken(state.initial_backbone_loss, loss, state, hyper)


def _gramian(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, T) inner products over everything but the task axis."""
    flat = promoted(rows.reshape(rows.shape[0], -1))
    return (flat @ flat.mT).to(dtype)


def _scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """(T, T, ...) with a factor for each of its two tasks."""
    return x if factors is None else x * column(factors[:, None] * factors, x)
