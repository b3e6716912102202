"""Aligned-MTL: task gradients made orthogonal and of one length (Senushkin et al., CVPR 2023)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tasks import per_task
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.aligned import align


def aligned(*, preference: Any = None, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The sum of the task gradients after they are made orthogonal, each as long as the smallest singular value.

    .. math:: w = \sigma_{\min} G^{-1/2} p, \qquad \Big\| \sum_i w_i \nabla_W L_i \Big\| = \sigma_{\min} \|p\|, \qquad
              G_{ij} = \langle \nabla_W L_i, \nabla_W L_j \rangle

    sigma_min is the smallest singular value of the task gradients that is not 0 but for rounding. It shrinks, and the
    step with it, where two tasks are almost the same, or one is much smaller than the others. Weights may be negative.

    Args:
        preference: p, T numbers in task order or a pytree like the losses; None is 1 for all.
        where: W, as in `measure`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate: the largest error in :math:`B G B = \sigma_{\min}^2 I`, in units
        of its right side.

    Raises:
        ValueError: for preferences that are not T.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.tensor([1.0, 8.0]), gramian=torch.tensor([1.0, 64.0]).diag())
        >>> state, info = gn.aligned().balance(gn.aligned().init(2), stats)
        >>> info.weights
        tensor([1.0000, 0.1250])

    Source: Senushkin et al. 2023, algorithm 1, and the scale "min" of its code. Heads learn from their own losses at
    weight 1, as there.
    """

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        return align(seen.gramian, seen.active, per_task(preference, "preference", seen.losses))

    return certified(rule, where, every, named={"preference": preference})
