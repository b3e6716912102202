"""PCGrad: every task gradient loses what conflicts with the others (Yu et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State
from gradnorm_func._balance.certified import certified
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.numerics import brought
from gradnorm_func._core.tracing import free_to_ask
from gradnorm_func._core.tree import Where
from gradnorm_func._solvers.surgery import project_in_turn


def pcgrad(
    *, order: Sequence[int] | Tensor | None = None, where: Where = None, every: int = 1
) -> Balancer[State, Info]:
    r"""The sum of the task gradients, each projected onto the normal planes of those it conflicts with, in turn.

    .. math:: p_i \leftarrow p_i - \min\Big(0, \frac{\langle p_i, g_j \rangle}{\|g_j\|^2}\Big)\, g_j
              \quad \text{for } j \ne i \text{ in order}, \qquad \sum_i w_i g_i = \sum_i p_i

    from :math:`p_i = g_i = \nabla_W L_i`. For T > 2 the result depends on the order, and may be in conflict with a
    task. Weights are at least 1. The sum is not scale-free.

    Args:
        order: of the j, the numbers of all tasks, the same for every i; None is 0, 1, ..., T - 1.
        where: W, as in `measure`.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the share of the T (T - 1) projections that met a conflict.

    Raises:
        ValueError: for an order that does not name every task once.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> stats = gn.TaskStats(torch.ones(2), torch.ones(2), gramian=torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        >>> state, info = gn.pcgrad().balance(gn.pcgrad().init(2), stats)
        >>> info.weights, info.memory
        (tensor([1.5000, 1.5000]), tensor(1.))

    Source: Yu et al. 2020, algorithm 1. Departures: the paper draws an order for every i; its code means to and drops
    the shuffle's result, so that its order is the fixed one, and it projects p_i onto the plane of g_i, too, which
    matters after others. Heads learn from their own losses at weight 1.
    """
    if order is not None and (not isinstance(order, Tensor) or free_to_ask(order)):
        turns = order.tolist() if hasattr(order, "tolist") else list(order)  # of a tensor, numpy, a sequence
        if not isinstance(turns, list) or sorted(turns) != list(range(len(turns))):
            raise ValueError(f"order={order!r} must name every task from 0 to T - 1 once")

    def rule(seen: Seen) -> tuple[Tensor, Tensor]:
        count = seen.losses.shape[0]
        if order is None:
            turns = torch.arange(count, device=seen.losses.device)
        else:
            turns = brought(torch.as_tensor(order), seen.losses, torch.int64)
        if turns.shape[0] != count:
            raise ValueError(f"order has {turns.shape[0]} entries, but there are {count} tasks")
        return project_in_turn(seen.gramian, seen.active, turns)

    return certified(rule, where, every)
