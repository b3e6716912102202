"""What the methods that solve a small problem of the Gramian have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tasks import task_vector
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.plan import Heads


def certified(
    rule: Callable[[Seen], tuple[Tensor, Tensor]],
    where: Where,
    every: int,
    heads: Heads = "own",
    named: Mapping[str, Any] | None = None,
) -> Balancer[State, Info]:
    """A balancer from `rule(seen) -> (weights (T,), certificate ())`, of this step's own Gramian; `named` as in
    `balancer`."""

    @functools.wraps(rule)  # whose name tells the method
    def as_measured(_state: Any, seen: Seen) -> tuple[Tensor, Any]:
        weights, certificate = rule(seen.as_measured())
        return weights, certificate.to(seen.losses.dtype)

    return balancer(
        as_measured,
        needs="gramian",
        same_step=True,
        heads=heads,
        where=where,
        every=every,
        memory=lambda weights: torch.zeros_like(weights[0]),
        named=named,
    )


def number(x: float | Tensor, seen: Seen) -> Tensor:
    """() float64, on the device."""
    return x.to(seen.losses.device) if isinstance(x, Tensor) else seen.losses.new_full((), x, dtype=torch.float64)


def check_positive(x: Any, name: str) -> None:
    """Refuses numbers of which one is not positive, where Python has them."""
    if x is not None and not isinstance(x, Tensor) and not bool((task_vector(x, name) > 0).all()):
        raise ValueError(f"{name}={x!r} must be positive")
