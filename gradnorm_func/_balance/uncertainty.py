"""Uncertainty weighting: every task learns the variance of its own noise (Kendall, Gal, Cipolla, CVPR 2018)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core import optim


class LogVariances(NamedTuple):
    """What uncertainty weighting learns."""

    values: Tensor  # (T,) s_i
    moments: Any  # state of their optimizer


def uncertainty(
    *,
    log_variance: float = 0.0,
    optimizer: optim.Optimizer | None = None,
    temperature: float | Tensor | None = None,
    every: int = 1,
) -> Balancer[State, Info]:
    r"""Weights :math:`w_i = \tfrac12 e^{-s_i}` with learned log-variances s: losses are all that is looked at.

    .. math:: \min_s \sum_i \tfrac12 e^{-s_i} L_i + \tfrac12 s_i, \qquad
              \partial / \partial s_i = \tfrac12 (1 - e^{-s_i} L_i)

    At its optimum w_i = 1/(2 L_i), half of `geometric`, which does not depend on the scale of the losses; the way there
    does. IMTL-L, :math:`\min_s e^{s_i} L_i - s_i`, is the same with twice the weights: under Adam step by step, under
    SGD at half its rate.

    With a `temperature` nothing is learned: this step's losses give its weights (UW-SO),

    .. math:: w = \mathrm{softmax}_i \Big(\frac{1}{\tau L_i}\Big)

    which no scale of the losses leaves as they are. There a loss that is 0 or negative refuses the step.

    Args:
        log_variance: s_i before the first step.
        optimizer: of s; default: Adam at 0.025.
        temperature: τ, to be tuned for each data set; None learns s.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `state.memory.values` the log-variances s. They begin at `log_variance`, whatever `init` is told
        of the weights. With a `temperature` there is no memory.

    Raises:
        ValueError: for a `temperature` that is not positive.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.uncertainty(optimizer=gn.sgd(1.0))
        >>> state, info = balancer.balance(balancer.init(2), gn.TaskStats(torch.tensor([1.0, 3.0])))
        >>> state.memory.values, state.weights
        (tensor([0., 1.]), tensor([0.5000, 0.1839]))

    Source: Kendall et al. 2018, equation 7 in the form with log-variances; Kirchdorfer et al. 2024 for UW-SO.
    Departure: s has an optimizer of its own, in LibMTL it is the model's with its weight decay.
    """
    if temperature is not None:
        if not isinstance(temperature, Tensor) and not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive, or None to learn the variances")
        return balancer(
            lambda _state, seen: (seen.softmax((-seen.losses.log()).exp() / temperature), ()),
            needs="losses",
            same_step=True,
            every=every,
        )
    descent = optim.as_optimizer(optimizer)

    def rule(state: State, seen: Seen) -> tuple[Tensor, LogVariances]:
        s, moments = state.memory
        grad = torch.where(seen.active, 0.5 * (1 - (-s).exp() * seen.losses), 0.0)
        step, moments = descent.update(grad, moments, s)
        return 0.5 * (-(s + step)).exp(), LogVariances(s + step, moments)

    def start(weights: Tensor) -> LogVariances:
        s = torch.full_like(weights, log_variance)
        return LogVariances(s, descent.init(s))

    begin = lambda ones: 0.5 * (-log_variance * ones).exp()
    return balancer(rule, needs="losses", every=every, weights=begin, memory=start)
