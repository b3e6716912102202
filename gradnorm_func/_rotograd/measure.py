"""RotoGrad's pass over a batch: heads at R_k z, back through the rotations, and what micro-batches' passes merge to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.protocol import here_of
from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, MultiTaskLoss, StackedHeads
from gradnorm_func._measure.plan import Exchange, Measured, Plan
from gradnorm_func._measure.seam import seam
from gradnorm_func._rotograd.scale import Hyper, RotoGradState, hyperparameters, numbers, retaken, units_of


class RotoGradFactors(NamedTuple):
    """The non-linear part of a step: what the gradients of a second pass over micro-batches are multiplied by."""

    weights: Tensor  # (T,) f_k of the backbone's gradient Σ f_k g_k
    units: Tensor  # (T,) 1 / L_k(0), or 1
    backbone_unit: Tensor  # () the same of the backbone's own loss


class RotoGradStats(NamedTuple):
    """What one pass tells; g_k = ∂L_k/∂z and g̃_k = R_k g_k = ∂L_k/∂(R_k z), of losses times `units`."""

    losses: Tensor  # (T,) L_k
    backbone_loss: Any  # () or nothing
    units: Tensor  # (T,) 1 / L_k(0), or 1
    head_gram: Tensor  # (T, T) Σ_n ⟨g̃_k, g̃_j⟩: what the conflict would be without rotations
    gram: Tensor  # (T, T) Σ_n ⟨g_k, g_j⟩
    moments: Any  # (T, m, m) Σ_n g_k vᵀ with this batch's common direction v; () if cross
    square: Any  # (m, m) Σ_n v vᵀ, only where the cooperative mode needs it; () if cross
    cross: Any  # (T, T, m, m) Σ_n g_k g_jᵀ; () unless asked for
    task_moments: Any  # (T, m, m) Σ_n g_k zᵀ, only where the cooperative mode needs it
    weights: Tensor  # (T,) f_k that `grads` were made with
    grads: Any  # params: of the heads their own gradients, of the backbone that of Σ f_k g_k
    examples: Any = 0.0  # how many entries the published rotation loss is a mean over; 0 is a sum
    num_examples: Any = 1.0  # the share of this batch in a mean


def rotograd_measure(
    state: RotoGradState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    factors: RotoGradFactors | None = None,
    grads: bool = True,
    num_examples: float | Tensor = 1.0,
    has_aux: bool = False,
    **hyper: Any,
) -> Any:
    r"""One pass over a micro-batch, to be merged with others.

    The gradient by the rotations is linear in the cross moments :math:`\sum_n g_{k,n} g_{j,n}^\top`, so those of the
    whole batch are exact however it is cut. The backbone's factors f need the norms of the whole batch. Two passes
    are exact: measure every micro-batch with `grads=False`, merge, take `rotograd_factors`, and measure again with
    `factors=`. One pass with `grads=True` gives every micro-batch the factors of its own norms instead: of the
    gradient of the whole batch it is an approximation, as good as the micro-batch's norms are of the whole's.

    Args:
        state: from `rotograd_init_state`.
        params, loss_fn, batch, has_aux: as in `measure`; `loss_fn` must be a `multi_task_loss` with a backbone, its
            losses means over the examples.
        factors: from `rotograd_factors`; None takes them from this micro-batch.
        grads: False leaves the parameters' gradients and the pass through the backbone out.
        num_examples: the share of this micro-batch when stats are merged.
        **hyper: as in `rotograd`; `rotation_shape` is that of the state unless given.

    Returns:
        RotoGradStats, or (RotoGradStats, aux).

    Raises:
        ValueError: as `rotograd_grad` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(
        ...     lambda w, x: x * w, [lambda w, z, x: z.sum(-1).mean(), lambda w, z, x: z.square().sum(-1).mean()]
        ... )
        >>> state, w, x = gn.rotograd_init_state(2, 3), torch.ones(3), torch.eye(3)[:2]
        >>> parts = [gn.rotograd_measure(state, w, loss_fn, part, grads=False) for part in (x[:1], x[1:])]
        >>> whole = gn.rotograd_measure(state, w, loss_fn, x, grads=False)
        >>> torch.allclose(gn.rotograd_merge(*parts).cross, whole.cross)
        True
    """
    bound = bind(state, hyper)
    stats, aux = run(state, params, loss_fn, batch, bound, factors=factors, grads=grads, cross=True, has_aux=has_aux)
    stats = stats._replace(num_examples=num_examples)
    return (stats, aux) if has_aux else stats


def rotograd_factors(state: RotoGradState, stats: RotoGradStats, *, mask: Any = None, **hyper: Any) -> RotoGradFactors:
    r"""The backbone's factors of a whole batch, for the second pass over its micro-batches.

    Args:
        state: from `rotograd_init_state`.
        stats: from `rotograd_merge`.
        mask: as in `rotograd_grad`.
        **hyper: as in `rotograd_measure`.

    Returns:
        RotoGradFactors.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(lambda w, x: x * w, [lambda w, z, x: z.sum(), lambda w, z, x: 3 * z.sum()])
        >>> state = gn.rotograd_init_state(2, 3)
        >>> stats = gn.rotograd_measure(state, torch.ones(3), loss_fn, torch.eye(3), grads=False)
        >>> gn.rotograd_factors(state, stats).weights
        tensor([2.0000, 0.6667])
    """
    return factors_of(state, stats, here_of(state, mask), bind(state, hyper))


def bind(state: RotoGradState, hyper: dict[str, Any]) -> Hyper:
    """Hyperparameters given with a state, whose size is the default rotation shape."""
    check_state(state)
    return hyperparameters(hyper.pop("rotation_shape", state.rotations.shape[-1]), **hyper)


def check_state(state: Any) -> None:
    """Refuse what is no state of RotoGrad."""
    if not isinstance(state, RotoGradState):
        raise ValueError(
            f"state is a {type(state).__name__}, not a RotoGradState: make one with gn.rotograd_init_state(T, m); "
            "the order of arguments is (state, params, loss_fn, batch)"
        )


def factors_of(state: RotoGradState, stats: RotoGradStats, here: Tensor, hyper: Hyper) -> RotoGradFactors:
    """What `rotograd_factors` returns, hyperparameters bound."""
    units, gram = rescaled(state, stats, here, hyper)
    unit = units_of(backbone_initial(state, stats.backbone_loss, hyper), hyper)
    return RotoGradFactors(numbers(state, stats.losses, gram, here, hyper).weights, units, unit)


def rescaled(state: RotoGradState, stats: RotoGradStats, here: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """The units that this step's losses give, and the Gramian in them."""
    units = units_of(retaken(state.initial_losses, stats.losses, state, hyper, here), hyper)
    ratio = units / stats.units
    return units, stats.gram * ratio[:, None] * ratio


def backbone_initial(state: RotoGradState, loss: Any, hyper: Hyper) -> Tensor:
    """L(0) of the backbone's own loss."""
    if not isinstance(loss, Tensor):
        return state.initial_backbone_loss
    return retaken(state.initial_backbone_loss, loss, state, hyper)


def run(
    state: RotoGradState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    hyper: Hyper,
    *,
    mask: Any = None,
    factors: RotoGradFactors | None = None,
    grads: bool = True,
    cross: bool = False,
    moments: bool = True,
    has_aux: bool = False,
) -> tuple[RotoGradStats, Any]:
    """One pass through the seam engine."""
    check_state(state)
    loss = _with_seam(loss_fn, params, state, has_aux)
    tree.check_params(params)
    layout, dtype = hyper.layout, state.weights.dtype
    if layout.size != state.rotations.shape[-1]:
        raise ValueError(
            f"rotation_shape={layout.shape} has {layout.size} features, but the state's rotations are "
            f"{tuple(state.rotations.shape[-2:])}: give rotograd_init_state the same rotation_shape"
        )
    here = here_of(state, mask)
    chosen = [0]  # the leaf of z that is rotated

    def units(losses: Tensor) -> Tensor:
        if factors is not None:
            return factors.units
        return units_of(retaken(state.initial_losses, losses.to(dtype), state, hyper, here), hyper)

    def scale(losses: Tensor) -> Tensor:
        return units(losses) if mask is None else units(losses) * here

    def spread(z: list[Tensor], treedef: Any) -> list[Tensor]:
        chosen[0] = layout.leaf(z, treedef)
        rotations = state.rotations.to(z[chosen[0]].dtype)
        layout.blocks(z[chosen[0]])
        count = rotations.shape[0]
        return [
            layout.spread(leaf, rotations) if i == chosen[0] else leaf.expand(count, *leaf.shape)
            for i, leaf in enumerate(z)
        ]

    def gather(
        losses: Tensor, z: list[Tensor], extra: list[Tensor], found: list[Tensor]
    ) -> tuple[list[Tensor], RotoGradStats]:
        if mask is not None:  # zero times a loss that is not finite is not zero
            found = [torch.where(column(here, leaf), leaf, 0) for leaf in found]
        losses, at = losses.to(dtype), chosen[0]
        turned, others = found[at], [leaf for i, leaf in enumerate(found) if i != at]
        g = layout.back(turned, state.rotations.to(turned.dtype))
        beside = sum((_gram(leaf, dtype) for leaf in others), torch.zeros((), dtype=dtype, device=losses.device))
        head_gram, gram = _gram(turned, dtype) + beside, _gram(g, dtype) + beside
        result = numbers(state, losses, gram, here, hyper)
        weights = result.weights if factors is None else factors.weights
        unit = torch.ones((), dtype=dtype, device=losses.device)
        if extra:
            unit = units_of(backbone_initial(state, extra[0].to(dtype), hyper), hyper)
        if factors is not None:
            unit = factors.backbone_unit
        rows = torch.stack([weights, result.direction]).to(g.dtype) @ g.reshape(g.shape[0], -1)
        total, v = (row.reshape(z[at].shape) for row in rows.unbind())
        cotangents = [
            total if i == at else torch.tensordot(weights.to(leaf.dtype), leaf, 1) for i, leaf in enumerate(found)
        ]
        together = hyper.cooperative is not None and moments
        stats = RotoGradStats(
            losses=losses,
            backbone_loss=extra[0].to(dtype) if extra else (),
            units=units(losses),
            head_gram=head_gram,
            gram=gram,
            moments=layout.moments(g, v).to(dtype) if moments and not cross else (),
            square=layout.moments(v[None], v)[0].to(dtype) if together and not cross else (),
            cross=torch.stack([layout.moments(g, one) for one in g.unbind()], 1).to(dtype) if cross else (),
            task_moments=layout.moments(g, z[at]).to(dtype) if together else (),
            weights=weights,
            grads=(),
            examples=float(layout.examples(z[at], hyper.form)),
        )
        return cotangents + [unit.to(x.dtype) for x in extra], stats

    exchange = Exchange(spread, scale, gather, hyper.backbone_loss)
    # The weights of the plan only say whether gradients of the parameters are wanted.
    plan = Plan(state.weights if grads else None, None, False, False, has_aux, True, None, exchange)
    measured: Measured = seam(loss, params, batch, plan)
    stats: RotoGradStats = measured.kept
    if grads:
        stats = stats._replace(grads=tree.unflatten(tree.flatten(params)[1], measured.grads))
    return stats, measured.aux


def _gram(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, T) inner products over everything but the task axis."""
    flat = rows.reshape(rows.shape[0], -1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return (flat @ flat.mT).to(dtype)


def column(x: Tensor, like: Tensor) -> Tensor:
    """(T,) or (T, T) shaped to multiply what has more axes behind those."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def _with_seam(loss_fn: Any, params: Any, state: RotoGradState, has_aux: bool) -> MultiTaskLoss:
    if not isinstance(loss_fn, MultiTaskLoss) or loss_fn.backbone is None:
        kind = "a multi_task_loss without a backbone" if isinstance(loss_fn, MultiTaskLoss) else type(loss_fn).__name__
        raise ValueError(
            f"loss_fn is {kind}: rotations act on the representation z between backbone and heads, so give it as "
            "gn.multi_task_loss(backbone, heads)"
        )
    if has_aux != loss_fn.has_aux:
        raise ValueError(
            f"has_aux={has_aux}, but multi_task_loss was made with has_aux={loss_fn.has_aux}: give both the same"
        )
    stacked = isinstance(loss_fn.heads, StackedHeads)
    heads = tree.flatten(tree.subtree(params, loss_fn.heads.path))[0][0] if stacked else loss_fn.functions
    if len(heads) != state.rotations.shape[0]:
        raise ValueError(
            f"loss_fn has {len(heads)} heads, but the state was made for {state.rotations.shape[0]} tasks: "
            f"rotograd_init_state({len(heads)}, ...) makes one for them"
        )
    return loss_fn
