"""ReLoBRaLo: relative loss balancing with random lookback, for PINNs (Bischof & Kraus 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.rlw import check_seed, uniform
from gradnorm_func._balance.seen import Seen


class Lookback(NamedTuple):
    """The losses that this step's are compared with."""

    first: Tensor  # (T,) L_i(0)
    last: Tensor  # (T,) L_i(t - 1)
    looks: Tensor  # (T,) int64: steps in which the task was present


def relobralo(
    *,
    decay: float | Tensor = 0.999,
    keep: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    seed: int = 0,
    every: int = 1,
) -> Balancer[State, Info]:
    r"""Weights by the fall of each loss since the last step and, at random, since the first: slow losses weigh more.

    .. math:: w(t) = \alpha \big(\rho\, w(t - 1) + (1 - \rho)\, \hat w(t; 0)\big) + (1 - \alpha)\, \hat w(t; t - 1),
              \qquad \hat w(t; s) = T\, \mathrm{softmax}_i \Big(\frac{L_i(t)}{\tau L_i(s)}\Big)

    with ρ 1 at probability `keep`, else 0, drawn anew in every step; :math:`\alpha` is 1 in a task's first step, 0 in
    its second, and `decay` from then on. The weights are free of the losses' scales, the weighted sum is not.

    Args:
        decay: α.
        keep: the probability that the step does not look back to L(0). The default, that of the authors' script,
            never does; 0.999 does so in every thousandth step.
        temperature: τ.
        seed: of ρ, which is a function of it and of the number of the step, as in `rlw`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer. A loss that is compared with a loss of exactly 0 counts as unchanged.

    Raises:
        ValueError: for hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.relobralo()
        >>> state = balancer.init(2)
        >>> for losses in ([1.0, 100.0], [0.5, 100.0]):  # the first loss has halved, the second stays
        ...     state, info = balancer.balance(state, gn.TaskStats(torch.tensor(losses)))
        >>> info.weights
        tensor([0.7551, 1.2449])

    Source: Bischof & Kraus 2021 and rbischof/relative_balancing. Departures: L(0) is that of the first step, theirs of
    the second; 1e-12 is not added to the divisors.
    """
    check_seed(seed)
    for name, share in (("decay", decay), ("keep", keep)):
        if not isinstance(share, Tensor) and not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must lie in [0, 1]")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; 1.0 is the authors'")

    def rule(state: State, seen: Seen) -> tuple[Tensor, Lookback]:
        memory: Lookback = state.memory
        new = memory.looks == 0
        first, last = (torch.where(new, seen.losses, old) for old in (memory.first, memory.last))

        def target(since: Tensor) -> Tensor:
            ratio = torch.where(since == 0, 1.0, seen.losses / torch.where(since == 0, 1.0, since))
            return seen.num_active() * seen.softmax(ratio / temperature)

        mixed = torch.where(uniform(state.step, seed) < keep, state.weights, target(first))
        share = torch.where(memory.looks == 1, torch.zeros_like(seen.losses), decay)
        weights = share * mixed + (1 - share) * target(last)
        return torch.where(new, state.weights, weights), Lookback(first, seen.losses, memory.looks + 1)

    zeros = torch.zeros_like
    start = lambda weights: Lookback(zeros(weights), zeros(weights), zeros(weights, dtype=torch.int64))
    return balancer(rule, needs="losses", same_step=True, every=every, memory=start)
