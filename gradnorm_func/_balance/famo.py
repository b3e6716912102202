"""FAMO: tasks that fell fast lose weight, by two looks at the losses of one batch (Liu et al., NeurIPS 2023)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._balance.start import start_vector
from gradnorm_func._core import optim
from gradnorm_func._core.numerics import choose


class Looks(NamedTuple):
    """What FAMO learns, and its last look."""

    logits: Tensor  # (T,) ξ
    moments: Any  # state of their optimizer
    before: Tensor  # (T,) log(L_i - b_i) of the last look
    pending: Tensor  # (T,) bool: whether that look waits for a second one


def famo(
    *,
    lower: Any = None,
    optimizer: optim.Optimizer | None = None,
    decay: float | Tensor = 1e-3,
    every: int = 1,
) -> Balancer[State, Info]:
    r"""Weights that let all losses fall at one relative rate, from the losses before and after a step.

    .. math:: w_i = \frac{z_i / (L_i - b_i)}{\sum_j z_j / (L_j - b_j)}, \quad z = \mathrm{softmax}(\xi), \qquad
              \partial_{\xi_i} = z_i \Big(\delta_i - \sum_j z_j \delta_j\Big) + \gamma \xi_i, \quad
              \delta = \log(L - b) - \log(L' - b)

    with L' the losses of the same batch after the parameters' step. A loss that is multiplied by a constant, as its
    bound is, changes the length of :math:`\sum_i w_i \nabla L_i` and nothing else.

    `grad` looks first. `update` on the same batch after the step is the second look, the price of which is a forward
    pass. In a loop that never calls it (`gn.train`, `gn.sweep`) the losses of the next batch are the second look, so
    that δ holds the differences of batches too. In a loop of one's own, calls of `balance` come in such pairs: with one
    call a step it would learn in every second step only. After the parameters' step, of the same batch::

        with torch.no_grad():
            state, _ = balancer.balance(state, gn.TaskStats(losses_of(batch)))

    Args:
        lower: b, T numbers in task order or a pytree like the losses; None is 0. A loss that is not above it refuses
            the step.
        optimizer: of ξ, which begins at 0; default: Adam at 0.025.
        decay: γ.
        every: the weights move in every k-th call only, as in `balancer`.

    Returns:
        Balancer, with `state.memory.logits` ξ. `state.step` counts looks.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: [(w[0] - x).square().mean(), 100 * (w[1] + x).square().mean()]
        >>> balancer, w = gn.famo(), torch.zeros(2)
        >>> state = balancer.init(2)
        >>> for x in torch.tensor([[1.0, 1.1], [0.9, 1.2]]):
        ...     grads, state, info = balancer.grad(state, w, loss_fn, x)
        ...     w = w - torch.tensor([0.1, 0.3]) * grads
        ...     state = balancer.update(state, w, loss_fn, x)  # the second look, after the step
        >>> state.memory.logits  # the second loss falls faster
        tensor([ 0.0362, -0.0362])

    Source: Liu et al. 2023, Algorithm 1, and the authors' famo.py. γ is that of the paper's second algorithm, famo.py
    has 1e-2. Departures: no 1e-8 is added to L - b; a task counts once it has had both looks.
    """
    descent = optim.as_optimizer(optimizer)

    def rule(state: State, seen: Seen) -> tuple[Tensor, Looks]:
        memory: Looks = state.memory
        bound = start_vector("lower", lower, len(seen.losses), 0.0, seen.losses.dtype, seen.losses.device)
        now = torch.where(seen.active, seen.losses - bound, 1.0).log()
        second = seen.where(memory.pending)
        z = torch.where(second, memory.logits, -1e30).softmax(0)
        delta = torch.where(second, memory.before - now, 0.0)
        slope = torch.where(second, z * (delta - torch.dot(z, delta)) + decay * memory.logits, 0.0)
        step, moments = descent.update(slope, memory.moments, memory.logits)
        moved = memory.logits + torch.where(second, step, 0.0), moments
        logits, moments = choose(second.any(), moved, (memory.logits, memory.moments))
        weights = seen.softmax(logits - now)  # z_i / (L_i - b_i), divided by their sum
        return weights, Looks(logits, moments, now, torch.ones_like(second) if seen.applied else ~memory.pending)

    def start(weights: Tensor) -> Looks:
        logits, before = torch.zeros_like(weights), torch.zeros_like(weights)
        return Looks(logits, descent.init(logits), before, torch.zeros_like(weights, dtype=torch.bool))

    return balancer(rule, needs="losses", same_step=True, every=every, memory=start, named={"lower": lower})
