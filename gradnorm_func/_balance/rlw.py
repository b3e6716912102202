"""Random loss weighting: the control that every method has to beat (Lin et al., TMLR 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen


def rlw(*, seed: int = 0, every: int = 1) -> Balancer[State, Info]:
    r"""New random weights in every step, :math:`w = T\,\mathrm{softmax}(\xi)` with :math:`\xi \sim N(0, I)`.

    Args:
        seed: of the weights. They are a function of it and of the number of the step, so that a run can be resumed, and
            all ranks draw the same.
        every: new weights in every k-th step, as in `balancer`.

    Returns:
        Balancer.

    Raises:
        ValueError: for a seed that is no whole number.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.rlw(seed=1)
        >>> state, info = balancer.balance(balancer.init(3), gn.TaskStats(torch.ones(3)))
        >>> torch.isclose(info.weights.sum(), torch.tensor(3.0)), bool((info.weights > 0).all())
        (tensor(True), True)

    Source: Lin et al. 2022, the normal distribution. Departure: the weights sum to T, there to 1.
    """

    check_seed(seed)

    def rule(state: State, seen: Seen) -> tuple[Tensor, tuple[()]]:
        return seen.num_active() * seen.softmax(_normal(seed, state.step, state.weights)), ()

    return balancer(rule, needs="losses", same_step=True, every=every)


def check_seed(seed: Any) -> None:
    """Refuses what is no whole number."""
    whole = not seed.is_floating_point() if isinstance(seed, Tensor) else hasattr(seed, "__index__")
    if not whole:
        raise ValueError(f"seed={seed!r} must be a whole number, an int")


def _normal(seed: int, step: Tensor, like: Tensor) -> Tensor:
    """(T,) independent normal numbers, by Box and Muller from two hashes of (seed, step, task)."""
    task = torch.arange(like.shape[0], device=like.device)
    first, second = (uniform(2 * (step * like.shape[0] + task) + k, seed) for k in (0, 1))
    return ((-2 * first.log()).sqrt() * (2 * torch.pi * second).cos()).to(like.dtype)


def uniform(counter: Tensor, seed: int) -> Tensor:
    """In (0, 1): an integer hash of 32 bits, kept within int64 so that nothing overflows."""
    x = (counter + 0x9E3779B9 * (seed + 1)) & 0xFFFFFFFF
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & 0xFFFFFFFF
    return (((x >> 16) ^ x).double() + 0.5) / 2**32
