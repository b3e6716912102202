"""RotoGrad's state, and its hyperparameters, each checked for what can be seen without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import check_every
from gradnorm_func._balance.start import NumTasks, start_vector
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
    step: Tensor  # () int64: steps so far


class Hyper(NamedTuple):
    """The hyperparameters, as `rotograd` explains them."""

    layout: Layout  # which part of z is rotated
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
    every: int


def layout_of(
    rotation_shape: int | tuple[int, ...], trailing_shape: int | tuple[int, ...], rotate: str | None
) -> Layout:
    """Which part of z is rotated."""
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
    return layout


def checked(hyper: Hyper) -> Hyper:
    """The same, once everything fits together."""
    check_every(hyper.every)
    for name, value, known in (("scale", hyper.scale, SCALES), ("form", hyper.form, FORMS), ("map", hyper.map, MAPS)):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    if hyper.form == "0.1.2" and hyper.scale == "rotograd":
        raise ValueError("form='0.1.2' had no scale part: use scale='none' or 'gradnorm', or form='0.1.6'")
    alpha = hyper.alpha
    if not isinstance(alpha, Tensor) and not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be at least 0: 0 aims at equal norms")
    if not isinstance(alpha, Tensor) and alpha and hyper.scale != "gradnorm" and hyper.form != "0.1.2":
        raise ValueError(f"alpha={alpha} is used by scale='gradnorm' and by form='0.1.2' only: leave it out")
    for name, step in (("burn_in", hyper.burn_in), ("cooperative", hyper.cooperative)):
        if step is not None and not isinstance(step, Tensor) and step < 0:
            raise ValueError(f"{name}={step} counts steps from 0 and cannot be negative; None turns it off")
    if hyper.burn_in is None:
        return hyper
    # Between its turns a state keeps its L(0), so that the burn-in waits for the next one.
    return hyper._replace(burn_in=-(-hyper.burn_in // hyper.every) * hyper.every)


def start_state(
    num_tasks: NumTasks,
    hyper: Hyper,
    rotations: Tensor | None,
    initial_losses: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> RotoGradState:
    """The state before the first step."""
    losses = start_vector("initial_losses", initial_losses, num_tasks, torch.nan, dtype, device)  # (T,)
    shape = (*losses.shape, hyper.layout.size, hyper.layout.size)
    eye = torch.eye(shape[-1], dtype=losses.dtype, device=device)
    start = eye.repeat(shape[0], 1, 1)  # (T, m, m)
    if rotations is not None:
        if rotations.shape != shape:
            raise ValueError(f"rotations has shape {tuple(rotations.shape)}; these tasks and features need {shape}")
        start = rotations.detach().to(start).clone(memory_format=torch.contiguous_format)
        if not bool(torch.linalg.matrix_norm(start.mT @ start - eye).max() < 1e-3):
            raise ValueError("rotations must be orthogonal; see gn.random_rotations")
    ones, flat = torch.ones_like(losses), torch.zeros_like(start)
    return RotoGradState(
        rotations=start,
        base=() if hyper.moving else start.clone(),
        tangents=() if hyper.moving else flat,
        moments=hyper.optimizer.init(flat),
        weights=ones,
        weight_moments=hyper.weight_optimizer.init(ones) if hyper.scale == "gradnorm" else (),
        initial_losses=losses,
        initial_norms=torch.full_like(losses, torch.nan),
        initial_backbone_loss=losses.new_full((), torch.nan),
        step=torch.zeros((), dtype=torch.int64, device=device),
    )


def check_state(state: Any) -> None:
    """Refuses what is no state of RotoGrad."""
    if not isinstance(state, RotoGradState):
        raise ValueError(
            f"state is a {type(state).__name__}, not a RotoGradState: make one with gn.rotograd(...).init(T); "
            "the order of arguments is (state, params, loss_fn, batch)"
        )


def check_moments(state: RotoGradState, hyper: Hyper) -> None:
    """Refuses a state that was made with other hyperparameters."""
    flat = torch.zeros_like(state.rotations[:, :1, :1])  # the structure is all that is compared
    expected = (
        () if hyper.moving else flat,
        hyper.optimizer.init(flat),
        hyper.weight_optimizer.init(state.weights) if hyper.scale == "gradnorm" else (),
    )
    if tree.flatten(expected)[1] != tree.flatten((state.tangents, state.moments, state.weight_moments))[1]:
        raise ValueError(
            "the state was made with another moving=, scale= or optimizer=: use the init of the same gn.rotograd(...)"
        )
