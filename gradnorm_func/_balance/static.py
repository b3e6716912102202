"""Fixed weights: the baseline that every balancer has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core.tasks import task_vector
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.plan import Needs


def static(weights: Any = None, *, where: Where = None, norms: bool = False) -> Balancer[State, Info]:
    r"""Fixed weights, :math:`\sum_i w_i L_i` with constant w.

    Args:
        weights: T finite numbers in task order, or a pytree like the losses; None is 1 for every task. A zero
            leaves a task out of the sum.
        where: W, as in `measure`; only used with `norms`.
        norms: True measures the gradient norms for the record, also of tasks of weight 0, at the price of a second
            backward pass through heads that own parameters. Without it a step costs what a plain one does.

    Returns:
        Balancer.

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

    def start(ones: Tensor) -> Tensor:
        vector = ones if weights is None else task_vector(weights, "weights", ones.dtype).to(ones)
        if vector.shape != ones.shape:
            raise ValueError(f"weights has {vector.shape[0]} entries, but num_tasks={ones.shape[0]}")
        if not bool(vector.isfinite().all()):
            raise ValueError(f"weights={weights!r} must be finite")
        return vector.detach().clone()

    rule = lambda state, _seen: (state.weights, ())
    # With cotangents that carry the weights, the norm of a task of weight 0 would be NaN: hence same_step for norms.
    needs: Needs = "norms" if norms else "losses"
    return balancer(rule, needs=needs, same_step=norms, where=where, weights=start, named={"weights": weights})


def mean_weights(weights: Any, *, start: int = 0) -> Tensor:
    r"""The time average of a run's weights, to be used as static ones: the paper's "GradNorm static".

    Args:
        weights: (steps, T) weights over time, or a history (an Info stacked over time, as `train` returns it); of the
            runs of a sweep, (R, steps, T). Steps in which a history has no loss of a task do not count for it.
        start: the first step that counts, to leave a transient out.

    Returns:
        (T,) mean weights, for `static(...)` or any other code that takes fixed weights; (R, T) of several runs.

    Raises:
        ValueError: for something that has no such shape, or no step left after `start`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> gn.mean_weights(torch.tensor([[1.0, 1.0], [0.5, 1.5], [0.3, 1.7]]), start=1)
        tensor([0.4000, 1.6000])

    Source: Chen et al. 2018, section 5.4.
    """
    over_time = weights if isinstance(weights, Tensor) else getattr(weights, "weights", None)
    if not isinstance(over_time, Tensor) or over_time.ndim not in (2, 3):
        raise ValueError("weights must be (steps, T), or (R, steps, T), or a history with such a field `weights`")
    steps = over_time.shape[-2]
    if not 0 <= start < steps:
        raise ValueError(f"start={start} leaves no step of {steps}")
    rows, losses = over_time[..., start:, :], getattr(weights, "losses", None)
    if not isinstance(losses, Tensor):
        return rows.mean(-2)
    there = ~losses[..., start:, :].isnan()  # a task that is absent has no loss, and no weight that counts
    mean: Tensor = torch.where(there, rows, 0.0).sum(-2) / there.sum(-2).clamp(min=1)
    return mean
