"""RotoGrad's crossing: heads at R_k z, and back through the rotations; and what it measures on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import column, full_precision, promoted
from gradnorm_func._measure.crossing import AtZ, Crossed, Trunk
from gradnorm_func._measure.norms import PerTask, stacked
from gradnorm_func._measure.plan import Plan, weighted_sum
from gradnorm_func._reduce.stats import gramian_of
from gradnorm_func._rotograd.scale import Numbers, backbone_unit_of, numbers, units_of
from gradnorm_func._rotograd.settings import Hyper, RotoGradState


class RotoGradFactors(NamedTuple):
    """The non-linear part of a step: what the gradients of a second pass over micro-batches are multiplied by."""

    weights: Tensor  # (T,) f_k of the backbone's gradient Σ f_k g_k
    units: Tensor  # (T,) 1 / L_k(0), or 1; 0 for an absent task
    backbone_unit: Any  # () the same of the backbone's own loss; () if it has none


class RotoGradStats(NamedTuple):
    """What a pass tells, with g_k = ∂L_k/∂z and g̃_k = R_k g_k = ∂L_k/∂(R_k z). What was not measured is `()`."""

    losses: Tensor  # (T,) L_k
    backbone_loss: Any = ()  # ()
    head_gramian: Any = ()  # (T, T) Σ_n ⟨g̃_k, g̃_j⟩: what the conflict would be without rotations
    gramian: Any = ()  # (T, T) Σ_n ⟨g_k, g_j⟩
    cross: Any = ()  # (T, T, m, m) Σ_n g_k g_jᵀ, of what is to be merged
    moments: Any = ()  # (T, m, m) Σ_n u_k g_k vᵀ, of what is whole, with its direction v and its units u
    square: Any = ()  # (m, m) Σ_n v vᵀ, likewise, for the cooperative mode
    task_moments: Any = ()  # (T, m, m) Σ_n g_k zᵀ, for the cooperative mode
    grads: Any = ()  # params: of the heads their own gradients, of the backbone that of Σ f_k g_k
    examples: Any = 0.0  # over how many entries the published rotation loss is a mean; 0 is a sum
    num_examples: Any = 1.0  # the share of this batch in a mean

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

    plan: Plan
    state: RotoGradState
    hyper: Hyper
    factors: RotoGradFactors | None  # None: those that this pass's stats give
    moves: bool  # is this a step in which rotations move?
    merged: bool  # will these stats be merged with others?

    def trunk_loss(self) -> Callable[[Any, Any, Any], Tensor] | None:
        """The backbone's own loss, which is neither rotated nor scaled."""
        return self.hyper.backbone_loss

    def copies(self, trunk: Trunk, count: int) -> list[PerTask]:
        """(T, ...) R_k z of the leaf that is rotated; the others as they are."""
        index, z = self._rotated_leaf(trunk)
        out: list[PerTask] = [[leaf] * count for leaf in trunk.z]
        with full_precision(z):
            out[index] = self.hyper.layout.spread(z, self.state.rotations.to(z.dtype))
        return out

    def seeds(self, losses: Tensor) -> Tensor:
        """(T,) 1 / L_k(0), or 1; 0 for an absent task."""
        return self.plan.seeds(self._units(losses), losses.dtype)

    def cross(self, trunk: Trunk, at_z: AtZ) -> Crossed:
        """Turned back, measured and weighed."""
        index, z = self._rotated_leaf(trunk)
        losses = at_z.losses.to(self.state.weights.dtype)
        stats = RotoGradStats(losses, *(loss.to(losses.dtype) for loss in trunk.trunk_losses))
        stats = stats._replace(examples=float(self.hyper.layout.examples(z, self.hyper.form)))
        with full_precision(z):
            head_rows = [self._bare(stacked(leaf)) for leaf in at_z.z_grads]  # leaf by leaf of z: (T, ...)
            g = self.hyper.layout.back(head_rows[index], self.state.rotations.to(head_rows[index].dtype))  # (T, ...)
            rows = tree.replace(head_rows, [index], [g])
            factors, direction = self.factors, None
            if factors is None:
                stats, factors, direction = self._measured(stats, head_rows, rows)
            total, v = _sums(g, None if self.plan.weights is None else factors.weights, direction)  # as z
            v = None if v is None else v.to(g.dtype)
            if self.moves and self.factors is None:
                stats = self._with_moments(stats, g, v, z, factors.units)
            if total is None:
                return Crossed(stats, None)
            sums = [total if leaf is g else weighted_sum(factors.weights, leaf) for leaf in rows]  # leaf by leaf of z
            cotangents = sums + [factors.backbone_unit for _ in trunk.trunk_losses]
        return Crossed(
            stats, [self.plan.seeds(c, x.dtype) for c, x in zip(cotangents, trunk.tape.outputs, strict=True)]
        )

    def _rotated_leaf(self, trunk: Trunk) -> tuple[int, Tensor]:
        index = self.hyper.layout.leaf(trunk.z, trunk.z_treedef)
        return index, trunk.z[index]

    def _units(self, losses: Tensor) -> Tensor:
        if self.factors is not None:
            return self.factors.units
        return units_of(self.state, losses.to(self.state.weights.dtype), self.plan.active, self.hyper)

    def _bare(self, rows: Tensor) -> Tensor:
        """Gradients without the loss scale, and none of an absent task: zero times a loss that is NaN is not zero."""
        if self.plan.active is not None:
            rows = torch.where(column(self.plan.active, rows), rows, 0)
        return rows if self.plan.loss_scale is None else promoted(rows) / self.plan.loss_scale

    def _measured(
        self, stats: RotoGradStats, head_rows: list[Tensor], rows: list[Tensor]
    ) -> tuple[RotoGradStats, RotoGradFactors, Tensor | None]:
        """The Gramians; the trunk's factors that follow from them; and the c of v = Σ c_k g_k, where v is needed."""
        losses, units = stats.losses, self._units(stats.losses)  # (T,) each
        head_gramian, gramian = (gramian_of(leaves).to(losses.dtype) for leaves in (head_rows, rows))  # (T, T)
        stats = stats._replace(head_gramian=self._raw(head_gramian, units), gramian=self._raw(gramian, units))
        result = numbers(self.state, losses, stats.gramian, self.plan.active, self.hyper)
        direction = result.direction if self.moves and not self.merged else None
        return stats, _factors(self.state, stats, result, self.hyper), direction

    def _with_moments(
        self, stats: RotoGradStats, g: Tensor, v: Tensor | None, z: Tensor, units: Tensor
    ) -> RotoGradStats:
        """What the rotations' gradients are made of."""
        layout, dtype = self.hyper.layout, stats.losses.dtype
        cooperative = self.hyper.cooperative is not None
        if v is None:
            cross = torch.stack([layout.moments(g, one) for one in g.unbind()], 1).to(dtype)  # (T, T, m, m)
            stats = stats._replace(cross=self._raw(cross, units))
        else:
            stats = stats._replace(moments=layout.moments(g, v).to(dtype))  # (T, m, m)
            if cooperative:
                stats = stats._replace(square=layout.moments(v[None], v)[0].to(dtype))  # (m, m)
        if not cooperative:
            return stats
        task_moments = layout.moments(g, z.to(g.dtype)).to(dtype)  # (T, m, m)
        return stats._replace(task_moments=self._raw(task_moments, units, pairs=False))

    def _raw(self, x: Tensor, units: Tensor, *, pairs: bool = True) -> Tensor:
        """x (T, ...) of tasks, or (T, T, ...) of pairs of them, for the losses as they are."""
        if not self.hyper.normalize:
            return x
        inverse = 1 / torch.where(units == 0, 1.0, units)  # of an absent task x is 0
        return x * column(inverse[:, None] * inverse if pairs else inverse, x)


def factors_of(state: RotoGradState, stats: RotoGradStats, mask: Tensor | None, hyper: Hyper) -> RotoGradFactors:
    """The factors of a whole batch, for the second pass over its parts."""
    return _factors(state, stats, numbers(state, stats.losses, stats.gramian, mask, hyper), hyper)


def _factors(state: RotoGradState, stats: RotoGradStats, result: Numbers, hyper: Hyper) -> RotoGradFactors:
    loss = stats.backbone_loss
    unit = backbone_unit_of(state, loss, hyper) if isinstance(loss, Tensor) else ()
    return RotoGradFactors(result.weights, result.units, unit)


def _sums(g: Tensor, *coefficients: Tensor | None) -> list[Tensor | None]:
    """Σ c_k g_k for each c, in one product, in float32 at least: c is as large as 1 / ‖g_k‖."""
    vectors = [c for c in coefficients if c is not None]
    if not vectors:
        return [None for _ in coefficients]
    flat = promoted(g.reshape(g.shape[0], -1))
    sums = torch.stack(vectors).to(flat.dtype) @ flat  # (number of vectors, size of z)
    rows = iter(sums.unbind())
    return [None if c is None else next(rows).reshape(g.shape[1:]) for c in coefficients]
