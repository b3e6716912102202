"""Fixed weights: the baseline that every balancer has to beat."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.protocol import Balancer, balancer, check_state, here_of, vectors, weighted_total
from gradnorm_func._core.loss import task_vector
from gradnorm_func._core.tree import Where
from gradnorm_func._reduce.stats import TaskStats


class StaticState(NamedTuple):
    """The weights, and nothing that changes."""

    weights: Tensor  # (T,)


class StaticInfo(NamedTuple):
    """What one would log of a step."""

    losses: Tensor  # (T,) L_i
    weights: Tensor  # (T,) w_i
    grad_norms: Tensor  # (T,) ‖∇_W L_i‖, unweighted; NaN unless asked for
    total_loss: Tensor  # () Σ w_i L_i
    finite: Tensor  # () bool


def static(weights: Any = None, *, where: Where = None, norms: bool = False) -> Balancer:
    r"""Fixed weights, :math:`\sum_i w_i L_i` with constant w.

    Args:
        weights: T finite numbers in task order, or a pytree like the losses; None is 1 for every task. A zero
            leaves a task out of the sum.
        where: W, as in `measure`; only used with `norms`.
        norms: True measures the gradient norms for the record. Without it a step costs what a plain one does.

    Returns:
        Balancer(init, update, grad, balance), `init(num_tasks, *, dtype=None, device=None)`.

    Raises:
        ValueError: from `init`, for a wrong number of weights or weights that are not finite.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.static({"b": 2.0, "a": 1.0})
        >>> loss_fn = lambda w, batch: {"a": w.sum(), "b": w.sum()}
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.ones(3), loss_fn, None)
        >>> grads
        tensor([3., 3., 3.])
    """

    def init(
        num_tasks: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> StaticState:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        given = torch.ones(num_tasks) if weights is None else task_vector(weights, "weights", dtype)
        if given.shape[0] != num_tasks:
            raise ValueError(f"weights has {given.shape[0]} entries, but num_tasks={num_tasks}")
        if not bool(given.isfinite().all()):
            raise ValueError(f"weights={weights!r} must be finite")
        return StaticState(given.detach().to(dtype=dtype, device=device, copy=True))

    def balance(
        state: StaticState, stats: TaskStats, *, mask: Any = None, update: bool | Tensor = True
    ) -> tuple[StaticState, StaticInfo]:
        check_state(state, StaticState, "gn.static(...).init(T)")
        losses, grad_norms = vectors(state, stats, needed=False)
        here = here_of(state, mask)
        total = weighted_total(state.weights, losses, here)
        return state, StaticInfo(losses, state.weights, grad_norms, total, (losses.isfinite() | ~here).all())

    return balancer(init, balance, where=where, norms=norms)


def export(weights: Any, *, start: int = 0) -> Tensor:
    r"""The time-averaged weights of a run, as static ones: the paper's "GradNorm static".

    Args:
        weights: (steps, T) weights over time, or a history (an Info stacked over time, as `train` returns it).
        start: the first step that counts, to leave a transient out.

    Returns:
        (T,) mean weights, for `static(...)` or any other code that takes fixed weights.

    Raises:
        ValueError: for something that is not (steps, T), or no step left after `start`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> gn.export(torch.tensor([[1.0, 1.0], [0.5, 1.5], [0.3, 1.7]]), start=1)
        tensor([0.4000, 1.6000])

    Source: Chen et al. 2018, section 5.4.
    """
    over_time = weights if isinstance(weights, Tensor) else getattr(weights, "weights", None)
    if not isinstance(over_time, Tensor) or over_time.ndim != 2:
        raise ValueError("weights must be (steps, T), or a history with such a field `weights`")
    if not 0 <= start < over_time.shape[0]:
        raise ValueError(f"start={start} leaves no step of {over_time.shape[0]}")
    return over_time[start:].mean(0)
