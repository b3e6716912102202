"""IMTL-G: equal projections of the step on all task gradients (Liu et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.equal import equal_projections


def imtl_g(*, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The direction with equal projections on all task gradients, with weights that sum to 1.

    .. math:: \langle \hat g_i, d \rangle \text{ equal}, \quad \sum_i w_i = 1; \qquad
              w_i = \frac{a_i / n_i}{\sum_j a_j / n_j}, \quad a = C^+ 1

    with the cosines C of the :math:`g_i = \nabla_W L_i` and their norms n. It is the direction of `config`, but for its
    sign: the sum of a_j / n_j may be negative, and then the step goes up on all tasks at once. Weights have no bound.

    Args:
        where: W, as in `measure`; the paper's is z.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate, as of `config`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.tensor([1.0, 4.0]), gramian=torch.tensor([1.0, 16.0]).diag())
        >>> state, info = gn.imtl_g().balance(gn.imtl_g().init(2), stats)
        >>> info.weights
        tensor([0.8000, 0.2000])

    Source: Liu et al. 2021, equation 8. Departures: dependent gradients, of which the paper's inverse does not exist,
    have the pseudoinverse's weights, and a task without a gradient weight 0. `config` has a length that cannot flip.
    """

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        weights, error = equal_projections(seen.gramian, seen.active)
        total = seen.sum(weights)
        return weights / torch.where(total != 0, total, 1.0), error

    return certified(rule, where, every)
