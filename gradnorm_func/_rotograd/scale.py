"""RotoGrad's arithmetic on T numbers: the common direction, and how much of each gradient the backbone gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.gradnorm import force
from gradnorm_func._core import optim, tree
from gradnorm_func._rotograd.rotation import MAPS, Layout

SCALES = ("none", "rotograd", "gradnorm")
FORMS = ("paper", "0.1.6", "0.1.2")


class RotoGradState(NamedTuple):
    """All that the next step needs, and nothing else."""

    rotations: Tensor  # (T, m, m) R_k in SO(m)
    base: Any  # (T, m, m) R_k = base_k map(A_k); () where the base point moves, for then it is R_k itself
    tangents: Any  # (T, m, m) A_k, skew; () where the base point moves
    moments: Any  # state of the rotations' optimizer
    weights: Tensor  # (T,) w_k of scale="gradnorm"; 1 otherwise
    weight_moments: Any  # state of the weights' optimizer; () unless scale="gradnorm"
    initial_losses: Tensor  # (T,) L_k(0); NaN until the task has been seen
    initial_norms: Tensor  # (T,) ‖G_k(0)‖, likewise
    initial_backbone_loss: Tensor  # () likewise
    step: Tensor  # () int64: updates so far


class Hyper(NamedTuple):
    """The hyperparameters of RotoGrad, checked."""

    layout: Layout
    scale: str
    form: str
    map: str
    moving: bool
    alpha: float | Tensor
    normalize: bool
    burn_in: int | None
    cooperative: int | Tensor | None
    optimizer: optim.Optimizer
    weight_optimizer: optim.Optimizer
    backbone_loss: Callable[[Any, Any, Any], Tensor] | None


class Numbers(NamedTuple):
    """What follows from the losses and the Gramian of one batch; (T,) where not said otherwise."""

    units: Tensor  # 1 / L_k(0), or 1
    direction: Tensor  # c_k of the common direction v = Σ c_k g_k
    weights: Tensor  # f_k of the backbone's gradient Σ f_k g_k
    norms: Tensor  # ‖g_k‖
    rates: Tensor  # r_k, NaN where unused
    initial_losses: Tensor
    initial_norms: Tensor


def hyperparameters(
    rotation_shape: int | tuple[int, ...],
    *,
    trailing_shape: int | tuple[int, ...] = (),
    rotate: str | None = None,
    scale: str = "rotograd",
    form: str = "paper",
    map: str = "cayley",
    moving: bool = True,
    alpha: float | Tensor = 0.0,
    normalize: bool = False,
    burn_in: int | None = 20,
    cooperative: int | Tensor | None = None,
    optimizer: optim.Optimizer | None = None,
    weight_optimizer: optim.Optimizer | None = None,
    backbone_loss: Callable[[Any, Any, Any], Tensor] | None = None,
) -> Hyper:
    """The hyperparameters, each checked for what can be seen without data."""
    shape = (rotation_shape,) if isinstance(rotation_shape, int) else tuple(rotation_shape)
    trailing = (trailing_shape,) if isinstance(trailing_shape, int) else tuple(trailing_shape)
    if not shape or not all(isinstance(n, int) and n > 0 for n in (*shape, *trailing)):
        raise ValueError(
            f"rotation_shape={rotation_shape!r} and trailing_shape={trailing_shape!r} must be positive integers, or "
            "tuples of them: rotation_shape=128 for features, rotation_shape=64, trailing_shape=(8, 8) for channels"
        )
    layout = Layout(shape, trailing, rotate)
    if layout.size < 2:
        raise ValueError(f"rotation_shape={rotation_shape!r} leaves nothing to rotate: it must cover two features")
    for name, value, known in (("scale", scale, SCALES), ("form", form, FORMS), ("map", map, tuple(MAPS))):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    if form == "0.1.2" and scale == "rotograd":
        raise ValueError("form='0.1.2' had no scale part: use scale='none' or 'gradnorm', or form='0.1.6'")
    if not isinstance(alpha, Tensor) and not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be at least 0: 0 aims at equal norms")
    if not isinstance(alpha, Tensor) and alpha and scale != "gradnorm" and form != "0.1.2":
        raise ValueError(f"alpha={alpha} is used by scale='gradnorm' and by form='0.1.2' only: leave it out")
    for name, step in (("burn_in", burn_in), ("cooperative", cooperative)):
        if step is not None and not isinstance(step, Tensor) and step < 0:
            raise ValueError(f"{name}={step} counts steps from 0 and cannot be negative; None turns it off")
    return Hyper(
        layout, scale, form, map, moving, alpha, normalize, burn_in, cooperative,
        optim.adam(5e-4) if optimizer is None else optimizer,
        optim.adam() if weight_optimizer is None else weight_optimizer,
        backbone_loss,
    )  # fmt: skip


def units_of(initial: Tensor, hyper: Hyper) -> Tensor:
    """1 / L(0) where losses are normalised, and 1 where they are not or L(0) is 0."""
    if not hyper.normalize:
        return torch.ones_like(initial)
    return torch.where(initial == 0, 1.0, 1 / torch.where(initial == 0, 1.0, initial))


def retaken(initial: Tensor, now: Tensor, state: RotoGradState, hyper: Hyper, here: Tensor | None = None) -> Tensor:
    """L(0), ‖G(0)‖ and the like: of the first step that saw it, and taken anew at the burn-in step."""
    fresh = initial.isnan()
    if hyper.burn_in is not None:
        fresh = fresh | (state.step == hyper.burn_in)
    return torch.where(fresh if here is None else fresh & here, now, initial)


def numbers(state: RotoGradState, losses: Tensor, gram: Tensor, here: Tensor, hyper: Hyper) -> Numbers:
    """All (T,) factors of a step, from losses and the (T, T) Gramian of the (normalised) task gradients at z."""
    count = here.sum().clamp(min=1)
    initial_losses = retaken(state.initial_losses, losses, state, hyper, here)
    square = torch.where(here, diagonal(gram), 0.0)
    norms = tree.safe_sqrt(square)
    inverse = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)
    initial_norms = retaken(state.initial_norms, norms, state, hyper, here)
    present = here.to(gram.dtype)
    ratios = torch.where(here, losses / initial_losses, 0.0)
    rates = ratios * count / ratios.sum()

    direction = inverse / count
    if hyper.form != "paper":
        direction = direction * mean_norm(gram, present, count)
    if hyper.form == "0.1.2":
        direction = direction * force(torch.where(here, rates, 1.0), hyper.alpha)

    if hyper.scale == "none":
        weights = present
    elif hyper.scale == "gradnorm":
        weights = state.weights * present
    else:
        growth = torch.where(initial_norms > 0, norms / torch.where(initial_norms > 0, initial_norms, 1.0), 0.0)
        growth = torch.where(here, growth, 0.0)
        total = growth.sum()
        shares = growth / torch.where(total > 0, total, 1.0)
        weights = (shares * norms).sum() * inverse
    units = units_of(initial_losses, hyper)
    return Numbers(units, direction, weights, norms, rates, initial_losses, initial_norms)


def diagonal(gram: Tensor) -> Tensor:
    """(T,) of (T, T); Inductor warns of the operator of this name in torch 2.13."""
    return gram.reshape(-1)[:: gram.shape[-1] + 1]


def mean_norm(gram: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """() ‖mean_k w_k g_k‖, from the Gramian; rounding can take the square of a vanishing one below zero."""
    return tree.safe_sqrt((weights @ gram @ weights).clamp(min=0)) / count


def weight_gradient(state: RotoGradState, found: Numbers, gram: Tensor, here: Tensor, hyper: Hyper) -> Tensor:
    r"""(T,) gradient of GradNorm's :math:`\sum_k |w_k n_k - \mathrm{target}_k|` by the logarithms of the weights.

    With :math:`w = K \mathrm{softmax}(\lambda)`, :math:`\partial w_k / \partial \lambda_i = w_k (\delta_{ki} - w_i/K)`;
    0.1.2 held the normalising sum constant, which leaves the diagonal alone.
    """
    w, count = state.weights, here.sum().clamp(min=1)
    weighted = torch.where(here, w * found.norms, 0.0)
    common = weighted.sum() / count if hyper.form == "paper" else mean_norm(gram, found.weights, count)
    targets = common * force(torch.where(here, found.rates, 1.0), hyper.alpha)
    pull = torch.where(here, (weighted - targets).sign() * weighted, 0.0)
    if hyper.form == "0.1.2":
        return pull
    w = torch.where(here, w, 0.0)
    return pull - w / w.sum() * pull.sum()
