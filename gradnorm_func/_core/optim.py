"""Optimizers of the (T,) vector of task weights, as pure (init, update) pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._core.numerics import accum_dtype, column, safe_sqrt
from gradnorm_func._core.tracing import free_to_ask, traced

Schedule: TypeAlias = Callable[[Tensor], Tensor]


class Optimizer(NamedTuple):
    """A pair of pure functions; any pair of this form will do.

    `init(weights) -> opt_state`; `update(grad, opt_state, weights) -> (step, opt_state)`, where `step` is
    added to the weights. `opt_state` is a pytree of tensors.
    """

    init: Callable[[Tensor], Any]
    update: Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]


class SGDState(NamedTuple):
    """State of `sgd`."""

    step: Tensor  # () int64: updates so far


class AdamState(NamedTuple):
    """State of `adam`."""

    step: Tensor  # (T,) int64: updates so far in which the task was present, those that its moments have seen
    mean: Tensor  # (T,) first moment, in float32 at least
    square: Tensor  # (T,) second moment, likewise


def as_optimizer(optimizer: Any) -> Optimizer:
    """The pair by its names; None is GradNorm's default."""
    if optimizer is None:
        return DEFAULT
    if not (isinstance(optimizer, (tuple, list)) and len(optimizer) == 2 and all(map(callable, optimizer))):
        raise ValueError(
            f"optimizer={optimizer!r} must be gn.sgd(lr), gn.adam(lr) or another (init, update) pair of functions: "
            "it is the weights' own, not the one of the parameters"
        )
    return Optimizer(*optimizer)


def check_moments(optimizer: Optimizer, weights: Tensor, moments: Any) -> None:
    """Refuses a state that was made with another optimizer."""
    expected = _structure(optimizer, weights) if traced() else _remembered(optimizer)
    if expected != tree.flatten(moments)[1]:
        raise ValueError(
            f"the state holds {type(moments).__name__}, but this optimizer keeps "
            f"{type(optimizer.init(weights)).__name__}: "
            "give init_state and the updates the same optimizer= (None is Adam at 0.025 in both)"
        )


def _structure(optimizer: Optimizer, weights: Tensor) -> Any:
    return tree.flatten(optimizer.init(weights))[1]


@lru_cache(maxsize=64)
def _remembered(optimizer: Optimizer) -> Any:
    return _structure(optimizer, torch.ones(2))


def sgd(learning_rate: float | Tensor | Schedule) -> Optimizer:
    r"""Plain gradient descent, :math:`w \leftarrow w - \eta_t g`.

    Args:
        learning_rate: η, a number, a 0-d tensor, or a schedule that maps the 0-d int64 count of updates
            so far to η.

    Returns:
        Optimizer: an (init, update) pair.

    Raises:
        ValueError: if the learning rate is a number that is not positive.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> init, update = gn.sgd(0.5)
        >>> step, _ = update(torch.tensor([1.0, -2.0]), init(torch.ones(2)), torch.ones(2))
        >>> step
        tensor([-0.5000,  1.0000])
    """
    _check_rate(learning_rate)

    def init(weights: Tensor) -> SGDState:
        return SGDState(torch.zeros((), dtype=torch.int64, device=weights.device))

    def update(grad: Tensor, state: SGDState, _weights: Tensor) -> tuple[Tensor, SGDState]:
        return -_rate(learning_rate, state.step) * grad, SGDState(state.step + 1)

    return Optimizer(init, update)


def adam(
    learning_rate: float | Tensor | Schedule = 0.025,
    *,
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
) -> Optimizer:
    r"""Adam with bias correction, :math:`w \leftarrow w - \eta_t (\hat m / (\sqrt{\hat v} + \epsilon) + \lambda w)`.

    Args:
        learning_rate: η, a number, a 0-d tensor, or a schedule that maps the 0-d int64 count of updates so far (of
            the task that was in most of them) to η. The default is GradNorm's authors' for the task weights.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: ε, added to the root of the second moment.
        weight_decay: λ, decoupled from the gradient: AdamW, for the parameters of a model. Leave it at 0 for weights of
            tasks.

    Returns:
        Optimizer: an (init, update) pair. Moments and step are float32 at least. The bias of each task is corrected by
        the number of updates in which it was present.

    Raises:
        ValueError: if the learning rate or ε is a number that is not positive, a decay b1 or b2 lies outside [0, 1), or
            `weight_decay` is negative.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> init, update = gn.adam(0.1)
        >>> step, _ = update(torch.tensor([3.0, -7.0]), init(torch.ones(2)), torch.ones(2))
        >>> step
        tensor([-0.1000,  0.1000])

    Source: Kingma & Ba 2015, Algorithm 1; the decay: Loshchilov & Hutter 2019, Algorithm 2.
    """
    _check_rate(learning_rate)
    for name, decay in (("b1", b1), ("b2", b2)):
        if not isinstance(decay, Tensor) and not 0 <= decay < 1:
            raise ValueError(f"{name}={decay} must lie in [0, 1)")
    if not isinstance(eps, Tensor) and not eps > 0:
        raise ValueError(f"eps={eps} must be positive: it keeps the step finite where the gradient is zero")
    decays = isinstance(weight_decay, Tensor) or weight_decay != 0
    if not isinstance(weight_decay, Tensor) and not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay={weight_decay} must be at least 0, which is none")

    def init(weights: Tensor) -> AdamState:
        count = torch.zeros(weights.shape[:1], dtype=torch.int64, device=weights.device)
        zeros = torch.zeros_like(weights, dtype=accum_dtype(weights))  # 0.999 is 1 in bfloat16
        return AdamState(count, zeros, zeros.clone())

    def update(grad: Tensor, state: AdamState, weights: Tensor) -> tuple[Tensor, AdamState]:
        grad, count = grad.to(state.mean.dtype), state.step + 1
        mean = _mixed(grad, state.mean, b1)
        square = _mixed(grad * grad, state.square, b2)
        mean_part, square_part = _parts_seen(count, grad, b1, b2)
        size = square / square_part
        rate = _rate(learning_rate, state.step)
        step = mean * (-rate / mean_part) / ((safe_sqrt(size) if traced() else size.sqrt()) + eps)
        if decays:
            step = step - rate * weight_decay * weights
        return step, AdamState(count, mean, square)

    return Optimizer(init, update)


def _parts_seen(count: Tensor, like: Tensor, b1: float | Tensor, b2: float | Tensor) -> tuple[Any, Any]:
    """1 - b^t of both moments, which are too small by that; numbers, where t is known to be the same for all."""
    if traced():  # stacked, or a compiler would inline the powers and take them again for every element
        power = column(count.to(like.dtype), like)
        mean_part, square_part = (1 - torch.stack([b1**power, b2**power])).unbind()
        return mean_part, square_part
    if count.numel() <= 128 and free_to_ask(count) and len(counts := set(count.view(-1).tolist())) == 1:
        power = counts.pop()
    else:
        power = column(count.to(like.dtype), like)
    return 1 - b1**power, 1 - b2**power


def _mixed(new: Tensor, old: Tensor, decay: float | Tensor) -> Tensor:
    """decay · old + (1 − decay) · new."""
    return decay * old + (1 - decay) * new if isinstance(decay, Tensor) else torch.lerp(new, old, decay)


def _rate(learning_rate: float | Tensor | Schedule, count: Tensor) -> float | Tensor:
    return learning_rate(count.max()) if callable(learning_rate) else learning_rate


def _check_rate(learning_rate: float | Tensor | Schedule) -> None:
    if isinstance(learning_rate, (int, float)) and not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} must be positive; to freeze the weights pass update=False")


DEFAULT = adam()  # of the task weights; one for all, so that what is remembered of it is found again
