"""Gradients of one length, in this very step: what NTKMTL, DB-MTL and ConFIG of two tasks come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.plan import Heads, check_word


def normalized(
    *,
    power: float | Tensor = 1.0,
    total: Literal["rms", "max", "mean"] = "mean",
    where: Where = None,
    heads: Heads = "own",
    every: int = 1,
) -> Balancer[State, Info]:
    r"""Weights that fall with the gradients' norms: every weighted gradient at W has the length m.

    .. math:: w_i = \Big(\frac{m}{n_i}\Big)^{p}, \qquad n_i = \|\nabla_W L_i\|, \quad
              m = \mathrm{mean}_j\, n_j,\ \max_j n_j,\ \text{or}\ (\mathrm{mean}_j\, n_j^2)^{1/2}

    At p = 1 the direction :math:`\sum_i \nabla_W L_i / n_i` is free of the losses' scales, and m is its length alone.
    A larger p turns it to the tasks whose gradients are short.

    - NTKMTL is p = 1, and 1.5 in its script for NYUv2, with gradients clipped to the norm 1, so that m is nothing.
    - DB-MTL at β = 0 is `total="max"` for a loss_fn that returns the logarithms of the losses.
    - Of two tasks it is ConFIG (`total="mean"`), and the direction of Nash-MTL, IMTL-G and MGDA of unit gradients.
    - `equal_norms` moves towards the same weights, slowly.

    Args:
        power: p.
        total: m, of the tasks that are present.
        where: W, as in `measure`.
        heads: "own", as published, or "weighted"; as in `balancer`. "weighted" takes a second pass through the heads.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer. A task whose norm is exactly 0 has the weight 0.

    Raises:
        ValueError: for another word for `total` or `heads`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(None, {"a": lambda w, x: 3 * w[0], "b": lambda w, x: w[1]})
        >>> balancer = gn.normalized()
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.zeros(2), loss_fn, None)
        >>> info.weights, grads
        (tensor([0.6667, 2.0000]), tensor([2., 2.]))

    Source: Qin et al. 2025 (NTKMTL), Lin et al. 2023 (DB-MTL), Liu et al. 2024 (ConFIG). Departures: NTKMTL's sum of
    squares is their mean here, and the clip is the caller's.
    """
    lengths: dict[str, Callable[[Seen], Tensor]] = {"rms": _rms, "max": _max, "mean": _mean}
    check_word("total", total, lengths)

    def rule(_state: State, seen: Seen) -> tuple[Tensor, tuple[()]]:
        long = seen.norms != 0
        ratio = torch.where(long, lengths[total](seen) / torch.where(long, seen.norms, 1.0), 1.0)
        return torch.where(long, ratio**power, 0.0), ()

    return balancer(rule, needs="norms", same_step=True, heads=heads, where=where, every=every)


def _mean(seen: Seen) -> Tensor:
    return seen.mean(seen.norms)


def _max(seen: Seen) -> Tensor:
    return torch.where(seen.active, seen.norms, 0.0).max()


def _rms(seen: Seen) -> Tensor:
    """In units of the largest, so that no square under- or overflows."""
    unit = _max(seen)
    unit = torch.where(unit > 0, unit, 1.0)
    return unit * seen.mean((seen.norms / unit).square()).sqrt()
