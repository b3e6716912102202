"""Dynamic weight average: losses that fell less in the last epoch weigh more (Liu, Johns & Davison, CVPR 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen


class Epochs(NamedTuple):
    """Mean losses of the epochs so far. Each task has its own count, for it may be absent where an epoch ends."""

    epoch: Tensor  # (T,) int64: the one that is summed
    sums: Tensor  # (T,) of its losses
    counts: Tensor  # (T,) steps in which they were seen
    last: Tensor  # (T,) mean loss of the epoch before it; 0: none
    before: Tensor  # (T,) of the one before that


def dwa(steps_per_epoch: int, *, temperature: float | Tensor = 2.0) -> Balancer[State, Info]:
    r"""Weights by the rate at which each loss falls from epoch to epoch.

    .. math:: w = T\, \mathrm{softmax}(r / \tau), \qquad r_i = \frac{\bar L_i(e - 1)}{\bar L_i(e - 2)}

    with :math:`\bar L_i(e)` the mean loss of epoch e; 1 in the first two epochs. The rates are free of the losses'
    scales, the weighted sum is not: it is to be used on losses of one size.

    Args:
        steps_per_epoch: steps of one epoch, after which the means move on. Steps that were refused do not count.
        temperature: τ; the larger, the more alike the weights.

    Returns:
        Balancer. A rate of which the divisor is 0 or not yet known counts as 1.

    Raises:
        ValueError: for hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.dwa(steps_per_epoch=1)
        >>> state = balancer.init(2)
        >>> for losses in ([1.0, 1.0], [0.5, 1.0], [0.5, 1.0]):  # the first loss has halved, the second stays
        ...     state, info = balancer.balance(state, gn.TaskStats(torch.tensor(losses)))
        >>> info.weights
        tensor([0.8756, 1.1244])

    Source: Liu et al. 2019. Published code counts windows of 25 steps as epochs (nash-mtl).
    """
    if not steps_per_epoch >= 1:
        raise ValueError(f"steps_per_epoch={steps_per_epoch} must be at least 1: len(loader) of your loader")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive; 2.0 is the paper's")

    def rule(state: State, seen: Seen) -> tuple[Tensor, Epochs]:
        memory: Epochs = state.memory
        now = torch.div(state.step, steps_per_epoch, rounding_mode="floor")
        ended = memory.epoch < now
        last = torch.where(ended, memory.sums / memory.counts.clamp(min=1), memory.last)
        before = torch.where(ended, memory.last, memory.before)
        rates = torch.where(before == 0, 1.0, last / torch.where(before == 0, 1.0, before))
        weights = seen.num_active() * seen.softmax(rates / temperature)
        sums = torch.where(ended, 0.0, memory.sums) + seen.losses
        counts = torch.where(ended, 0.0, memory.counts) + 1
        return weights, Epochs(torch.maximum(now, memory.epoch), sums, counts, last, before)

    def start(weights: Tensor) -> Epochs:
        return Epochs(torch.zeros_like(weights, dtype=torch.int64), *(torch.zeros_like(weights) for _ in range(4)))

    return balancer(rule, needs="losses", same_step=True, memory=start)
