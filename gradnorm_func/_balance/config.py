"""The direction with equal cosines to all task gradients: ConFIG (Liu et al., ICLR 2025)."""

from __future__ import annotations

from torch import Tensor

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.equal import equal_projections


def config(*, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The direction that is at the same angle to all task gradients, as long as their projections on it together.

    .. math:: d = \Big( \sum_i \langle g_i, \hat d \rangle \Big) \hat d, \quad
              \langle \hat g_i, \hat d \rangle \text{ equal}; \qquad
              w_i = \frac{\sum_j n_j (C a)_j}{\sum_j a_j} \frac{a_i}{n_i}, \quad a = C^+ 1

    with the cosines C of the :math:`g_i = \nabla_W L_i` and their norms n. Where C is regular no task is in conflict
    with d. Its direction is scale-free. For T = 2 it is :math:`w_i = \bar n / n_i`, the goal of `equal_norms` and of
    `normalized`, and has the direction of `nash`. Weights may be negative for T > 2. `imtl_g` has another length.

    Args:
        where: W, as in `measure`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate: the largest error in C a = 1. It is of order 1 where no direction
        has equal projections, as with a total among the tasks, and that of the least squares is taken. Eigenvalues of C
        below 16 T eps of the gradients' dtype count as 0. A task without a gradient has weight 0.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.tensor([1.0, 8.0]), gramian=torch.tensor([1.0, 64.0]).diag())
        >>> state, info = gn.config().balance(gn.config().init(2), stats)
        >>> info.weights
        tensor([4.5000, 0.5625])

    Source: Liu et al. 2025, equations 2 and 3. Departure: heads learn from their own losses at weight 1, where the
    paper takes W to be all parameters.
    """

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        return equal_projections(seen.gramian, seen.active)

    return certified(rule, where, every)
