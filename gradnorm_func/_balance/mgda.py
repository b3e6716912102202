"""MGDA: the shortest convex combination of the task gradients (Désidéri 2012; Sener & Koltun, NeurIPS 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.min_norm import min_norm

UNITS = ("none", "l2", "loss", "loss+")


def mgda(
    *, normalise: Literal["none", "l2", "loss", "loss+"] = "none", where: Where = None, every: int = 1
) -> Balancer[State, Info]:
    r"""The weights of the shortest vector in the convex hull of the task gradients at W.

    .. math:: v = \arg\min_{v \ge 0,\ \sum_i v_i = 1} \Big\| \sum_i v_i \nabla_W L_i / c_i \Big\|^2, \qquad
              w_i = \frac{v_i / c_i}{\sum_j v_j / c_j}

    Its negative is a direction in which no task's loss rises, or 0 where there is none. With c = 1 the smallest
    gradient weighs most: a loss that is multiplied by c gets about 1/c of the weight. With "l2" and "loss+" the
    direction does not depend on the losses' scales.

    Args:
        normalise: c_i: "none", 1; "l2", the norm of the task's gradient; "loss", its loss; "loss+", their product.
            Losses have to be positive for the last two. With "l2", two tasks are weighted by 1 / norm.
        where: W, as in `measure`. At z it is the paper's upper bound, MGDA-UB.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate of the solution: the Frank-Wolfe gap
        :math:`v^\top G v - \min_i (G v)_i`, relative to the mean of the squared norms; 0 is exact.

    Raises:
        ValueError: for an unknown `normalise`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(lambda w, x: x * w, [lambda w, z, x: z[0], lambda w, z, x: 2 * z[1]])
        >>> balancer = gn.mgda()
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.ones(2), loss_fn, torch.ones(2))
        >>> info.weights
        tensor([0.8000, 0.2000])

    Source: Sener & Koltun 2018, equation 4; the normalisations are those of its code. Departures: the problem is solved
    exactly, there by Frank-Wolfe steps; the combination is one of the normalised gradients, there the v of the
    normalised ones weigh the others; at z every example has coordinates of its own; heads learn from their own losses
    at weight 1.
    """
    if normalise not in UNITS:
        raise ValueError(f"normalise={normalise!r} must be one of {', '.join(map(repr, UNITS))}")

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        if normalise == "none":
            return min_norm(seen.gramian, seen.active)
        norms = torch.where(seen.norms > 0, seen.norms, 1.0)
        unit = {"l2": norms, "loss": seen.losses, "loss+": seen.losses * norms}[normalise]
        inverse = torch.where(unit > 0, 1 / unit, torch.nan)  # of a loss that is not positive the step is refused
        v, gap = min_norm(seen.gramian * inverse[:, None] * inverse, seen.active)
        return v * inverse / seen.sum(v * inverse), gap

    return certified(rule, where, every)
