"""Smooth Tchebycheff scalarization: mostly the loss that is worst (Lin et al., ICML 2024)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, SimpleRule, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._balance.start import start_vector


class Nadir(NamedTuple):
    """The mean losses of the last epoch of the warm-up."""

    sums: Tensor  # (T,) of the losses
    counts: Tensor  # (T,) steps in which they were seen


def stch(
    steps_per_epoch: int | None = None,
    *,
    mu: float | Tensor = 1.0,
    warmup: int = 4,
    preference: Any = None,
    ideal: Any = None,
    every: int = 1,
) -> Balancer[State, Info]:
    r"""The gradient of a smooth maximum of the losses; the smaller μ, the more the worst one alone is trained.

    .. math:: \mu \log \sum_i e^{\lambda_i (L_i - z_i) / \mu}, \qquad
              w_i = \lambda_i\, \mathrm{softmax}_i(\lambda (L - z) / \mu)

    That is the paper's equation. Its experiments in deep learning use another, which is free of the losses' scales and
    is taken if `steps_per_epoch` is given. With N the mean losses of one epoch,

    .. math:: T \mu \log \sum_i \Big(\frac{L_i}{N_i}\Big)^{1 / \mu}, \qquad
              w_i = \frac{T}{L_i}\, \mathrm{softmax}_i\Big(\frac{\log (L_i / N_i)}{\mu}\Big)

    after `warmup` epochs of `geometric`, :math:`w_i = 1 / L_i`, and one more in which N is taken. At the default μ = 1
    these weights are constant but for a common factor: :math:`T (1/N_i) / \sum_j L_j / N_j`. A loss that is 0 or
    negative has no logarithm, and refuses the step.

    Args:
        steps_per_epoch: of the warm-up; None is the paper's equation, on the losses themselves.
        mu: μ, positive.
        warmup: epochs before that of N.
        preference: λ of the paper's equation, T numbers in task order or a pytree like the losses; None is 1/T for
            each of the T that are present.
        ideal: z, likewise; None is 0.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer.

    Raises:
        ValueError: for hyperparameters out of range, or those of one form with the other.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.stch(mu=0.1)
        >>> balancer.balance(balancer.init(2), gn.TaskStats(torch.tensor([1.0, 1.2])))[1].weights
        tensor([0.1345, 0.3655])

    Source: Lin et al. 2024, and STCH_MTL of Xi-L/STCH. Departure: 1e-20 is not added to the losses.
    """
    if not isinstance(mu, Tensor) and not mu > 0:
        raise ValueError(f"mu={mu} must be positive; a small one, such as 0.01, comes near to the maximum")
    if steps_per_epoch is None:
        named = {"preference": preference, "ideal": ideal}
        return balancer(_paper(mu, preference, ideal), needs="losses", same_step=True, every=every, named=named)
    if preference is not None or ideal is not None:
        raise ValueError("preference and ideal are those of the paper's equation: leave steps_per_epoch out")
    if not (steps_per_epoch >= 1 and warmup >= 0):
        raise ValueError(f"steps_per_epoch={steps_per_epoch} must be at least 1, and warmup={warmup} at least 0")
    first, last = warmup * steps_per_epoch, (warmup + 1) * steps_per_epoch

    def rule(state: State, seen: Seen) -> tuple[Tensor, Nadir]:
        sums, counts = state.memory
        taken = (state.step >= first) & ((state.step < last) | (counts == 0))  # late, if a task was absent then
        sums, counts = sums + torch.where(taken, seen.losses, 0.0), counts + taken
        logs = seen.losses.log()
        nadir = torch.where(counts > 0, sums / counts.clamp(min=1), 1.0)
        shares = seen.num_active() * seen.softmax((logs - nadir.log()) / mu)
        return torch.where(state.step < last, 1.0, shares) * (-logs).exp(), Nadir(sums, counts)

    zeros = lambda weights: Nadir(torch.zeros_like(weights), torch.zeros_like(weights))
    return balancer(rule, needs="losses", same_step=True, every=every, memory=zeros)


def _paper(mu: float | Tensor, preference: Any, ideal: Any) -> SimpleRule:
    """The rule on the losses themselves."""

    def rule(_state: State, seen: Seen) -> tuple[Tensor, tuple[()]]:
        count, like = seen.losses.shape[0], (seen.losses.dtype, seen.losses.device)
        above = seen.losses - start_vector("ideal", ideal, count, 0.0, *like)
        factors = start_vector("preference", preference, count, 1.0, *like)
        factors = factors / seen.num_active() if preference is None else factors
        return factors * seen.softmax(factors * above / mu), ()

    return rule
