"""MGDA: the shortest convex combination of the task gradients (Désidéri 2012; Sener & Koltun, NeurIPS 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.min_norm import min_norm


def mgda(*, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The weights of the shortest vector in the convex hull of the task gradients at W.

    .. math:: w = \arg\min_{w \ge 0,\ \sum_i w_i = 1} \Big\| \sum_i w_i \nabla_W L_i \Big\|^2

    Its negative is a direction in which no task's loss rises, or 0 where there is none. The smallest gradient weighs
    most: a loss that is multiplied by c gets about 1/c of the weight.

    Args:
        where: W, as in `measure`. At z it is the paper's upper bound, MGDA-UB.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate of the solution: the Frank-Wolfe gap
        :math:`w^\top G w - \min_i (G w)_i`, relative to the mean of the squared norms; 0 is exact.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(lambda w, x: x * w, [lambda w, z, x: z[0], lambda w, z, x: 2 * z[1]])
        >>> balancer = gn.mgda()
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.ones(2), loss_fn, torch.ones(2))
        >>> info.weights
        tensor([0.8000, 0.2000])

    Source: Sener & Koltun 2018, equation 4. Departures: the problem is solved exactly, theirs by Frank-Wolfe steps; at
    z every example has coordinates of its own; heads learn from their own losses at weight 1.
    """

    def rule(_state: State, seen: Seen) -> tuple[Tensor, Tensor]:
        weights, gap = min_norm(seen.gramian, seen.active)
        return weights, gap

    gap = lambda weights: torch.zeros_like(weights[0])
    return balancer(rule, needs="gramian", same_step=True, heads="own", where=where, every=every, memory=gap)
