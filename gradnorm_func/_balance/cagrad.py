"""CAGrad: the best worst case in a ball around the mean gradient (Liu et al., NeurIPS 2021)."""

from __future__ import annotations

from torch import Tensor

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified, number
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.trust import near_mean


def cagrad(*, c: float | Tensor = 0.4, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The direction near the mean gradient that is best for the task it is worst for.

    .. math:: d = \arg\max_d \min_i \langle g_i, d \rangle \quad \text{with} \quad \|d - g_0\| \le c\, \|g_0\|, \qquad
              \sum_i w_i g_i = \frac{T}{1 + c^2}\, d

    with :math:`g_i = \nabla_W L_i` and their mean :math:`g_0`. c = 0 is the sum of the losses; for c >= 1 the ball
    holds 0, and d nears the direction of MGDA. Nothing in it is scale-free: the largest gradient leads the mean.

    Args:
        c: radius of the ball, in [0, 1).
        where: W, as in `measure`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate of the dual problem over the simplex: its Frank-Wolfe gap relative
        to the square of the mean gradient's norm; 0 is exact.

    Raises:
        ValueError: for a c outside of [0, 1).

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.tensor([1.0, 1.0]), gramian=torch.eye(2))
        >>> state, info = gn.cagrad(c=0.5).balance(gn.cagrad().init(2), stats)
        >>> info.weights
        tensor([1.2000, 1.2000])

    Source: Liu et al. 2021, algorithm 1, with the factors T and 1 / (1 + c²) of its code. Departures: the dual problem
    is solved exactly, there by SLSQP with an absolute 1e-8 inside of the root; a task without a gradient at W has no
    part in the minimum; heads learn from their own losses at weight 1, as there.
    """
    if not isinstance(c, Tensor) and not 0 <= c < 1:
        raise ValueError(f"c={c} must lie in [0, 1): 0 is the mean gradient, and a ball of radius 1 holds 0")

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        weights, gap = near_mean(seen.gramian, seen.active, number(c, seen))
        return weights * seen.num_active() / (1 + c * c), gap

    return certified(rule, where, every)
