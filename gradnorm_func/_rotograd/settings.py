"""RotoGrad's state, and its hyperparameters, each checked for what can be seen without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict

from torch import Tensor

from gradnorm_func._core import optim
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


class RotoGradOptions(TypedDict, total=False):
    """The options of `rotograd`, which explains them."""

    trailing_shape: int | tuple[int, ...]
    rotate: str | None
    scale: Literal["none", "rotograd", "gradnorm"]
    form: Literal["paper", "0.1.6", "0.1.2"]
    map: Literal["cayley", "exp"]
    moving: bool
    alpha: float | Tensor
    normalize: bool
    burn_in: int | None
    cooperative: int | Tensor | None
    optimizer: optim.Optimizer | None
    weight_optimizer: optim.Optimizer | None
    backbone_loss: Callable[[Any, Any, Any], Tensor] | None
    every: int


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
    every: int


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
    every: int = 1,
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
        layout,
        scale,
        form,
        map,
        moving,
        alpha,
        normalize,
        burn_in,
        cooperative,
        optim.adam(5e-4) if optimizer is None else optimizer,
        optim.adam() if weight_optimizer is None else weight_optimizer,
        backbone_loss,
        every,
    )
