"""Alpha-fair gradients: FairGrad (Ban & Ji, ICML 2024) and, at alpha = 1, Nash-MTL (Navon et al., ICML 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified, check_positive, number
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tasks import per_task
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.plan import Heads
from gradnorm_func._solvers.fair import fair


def fairgrad(
    *, alpha: float | Tensor = 2.0, preference: Any = None, heads: Heads = "own", where: Where = None, every: int = 1
) -> Balancer[State, Info]:
    r"""The direction in which the tasks' gains are alpha-fair.

    .. math:: (G w)_i = (p_i / w_i)^{1/\alpha}, \quad w > 0, \qquad G_{ij} = \langle \nabla_W L_i, \nabla_W L_j \rangle

    which is :math:`w_i = p_i / \langle g_i, d\rangle^\alpha` with :math:`d = \sum_i w_i g_i`: alpha = 1 is proportional
    fairness, a large alpha lifts the least gain. No task is in conflict with d. Only at alpha = 1 is it scale-free.

    Args:
        alpha: exponent, positive.
        preference: p, T positive numbers in task order or a pytree like the losses; None is 1 for all. With those of
            validation scores and alpha = 2 it is PIVRG.
        heads: as in `balancer`.
        where: W, as in `measure`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the certificate: the largest relative error of the equations. It is large where no
        direction helps all tasks and the equations have no solution; the weights are those of a tiny ridge then. A
        task without a gradient has weight 0.

    Raises:
        ValueError: for an alpha or preferences that are not positive, or not T.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.tensor([1.0, 8.0]), gramian=torch.tensor([1.0, 64.0]).diag())
        >>> state, info = gn.fairgrad(alpha=2.0).balance(gn.fairgrad().init(2), stats)
        >>> info.weights
        tensor([1.0000, 0.0625])

    Source: Ban & Ji 2024, equation 9, and its code's alpha. Departures: their code solves the equations by least
    squares from 1/T without regard to the gradients' size, multiplies d by T, and clips it to norm 1.
    """
    check_positive(alpha, "alpha")
    check_positive(preference, "preference")

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        return _solved(seen, preference, alpha)

    return certified(rule, where, every, heads, named={"preference": preference})


def nash(*, preference: Any = None, where: Where = None, every: int = 1) -> Balancer[State, Info]:
    r"""The Nash bargaining solution between the tasks: `fairgrad` with alpha = 1, whose heads get the weighted sum.

    .. math:: (G w)_i = p_i / w_i, \quad w > 0, \qquad \Big\| \sum_i w_i \nabla_W L_i \Big\|^2 = \sum_i p_i

    It is scale-free: a loss that is multiplied by c gets 1/c of the weight. For T = 2 it has the direction of
    `config`, w_i in proportion to 1 / norm.

    Args:
        preference: p, as in `fairgrad`.
        where: W, as in `measure`. The paper reports faster and worse results at z.
        every: the weights move in every k-th step, as in `balancer`; the paper's speed-up.

    Returns:
        Balancer, as of `fairgrad`.

    Raises:
        ValueError: for preferences that are not positive, or not T.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.tensor([1.0, 8.0]), gramian=torch.tensor([1.0, 64.0]).diag())
        >>> state, info = gn.nash().balance(gn.nash().init(2), stats)
        >>> info.weights
        tensor([1.0000, 0.1250])

    Source: Navon et al. 2022, claim 3.1. Departures: their code runs 20 steps of a convex-concave procedure and stops
    by a test of its own, where the equations are seldom solved to more than 1e-2; their scripts clip the shared
    gradient to norm 1, which always acts, for its norm is the root of T.
    """
    check_positive(preference, "preference")

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        return _solved(seen, preference, 1.0)

    return certified(rule, where, every, "weighted", named={"preference": preference})


def _solved(seen: Seen, preference: Any, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    p = per_task(preference, "preference", seen.losses)
    return fair(seen.gramian, seen.active, p, number(alpha, seen))
