"""Fixed shares of the gradient: EnCodec's loss balancer (Défossez et al. 2022)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tasks import per_task
from gradnorm_func._core.tree import Where


class NormAverages(NamedTuple):
    """Moving averages of the gradient norms."""

    sums: Tensor  # (T,) Σ_t β^(now - t) n_i(t)
    counts: Tensor  # (T,) Σ_t β^(now - t), over the steps in which the task was present


def fixed_ratio(
    ratios: Any = None,
    *,
    where: Where = None,
    budget: float | Tensor = 1.0,
    decay: float | Tensor = 0.999,
    per_example: bool = True,
    eps: float = 1e-12,
    every: int = 1,
) -> Balancer[State, Info]:
    r"""Every task gets a fixed share of the gradient at W.

    .. math:: \sum_i g_i \; \frac{\rho_i}{\sum_j \rho_j} \frac{R}{\epsilon + \bar n_i}, \qquad
              \bar n_i = \frac{\sum_t \beta^{-t} n_i(t)}{\sum_t \beta^{-t}}

    with :math:`n_i` the norm of :math:`g_i = \nabla_W L_i`, this step's included: the weights are chosen between the
    backward pass through the heads and the one through the backbone, so they are exact in the same step. If heads
    own parameters, those get the weighted gradient too, at the price of a second backward pass through the heads.

    Args:
        ratios: shares ρ, T numbers >= 0 in task order or a pytree like the losses; None is equal.
        where: W, as in `measure`; None is z for a `multi_task_loss`, EnCodec's generator output.
        budget: R, the norm that the shares add up to.
        decay: β of the moving average, in [0, 1).
        per_example: at z, n_i is the mean over the batch of each example's norm; otherwise, and wherever W are
            parameters, the norm of the whole.
        eps: ε.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `state.memory` the moving averages. A state that has seen no step has the weights R ρ_i / Σ ρ_j,
        which only matter where weights from before the step are used (`measure(..., weights=state.weights)`). With
        `micro_batches` or `reduce` a step takes two passes over the batch, the first for the norms of the whole; what
        is random in the loss is drawn anew in the second.

    Raises:
        ValueError: for ratios that are negative, all zero or not T, or other hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.fixed_ratio([1.0, 3.0])
        >>> loss_fn = lambda w, batch: [10 * w[0], 0.1 * w[1]]
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.ones(2), loss_fn, None)
        >>> grads
        tensor([0.2500, 0.7500])

    Source: `Balancer` of facebookresearch/encodec. Departures: the moving averages are state, the device is never
    asked, and a step with a loss or norm that is not finite changes nothing.
    """
    if not isinstance(budget, Tensor) and not budget > 0:
        raise ValueError(f"budget={budget} must be positive")
    if not isinstance(decay, Tensor) and not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must lie in [0, 1); 0 uses this step's norms alone")
    if not eps >= 0:
        raise ValueError(f"eps={eps} must not be negative")

    def rule(state: State, seen: Seen) -> tuple[Tensor, NormAverages]:
        norms = seen.example_norms if isinstance(seen.example_norms, Tensor) else seen.norms
        sums, counts = decay * state.memory.sums + norms, decay * state.memory.counts + 1
        shares = per_task(ratios, "ratios", norms)
        return budget * shares / seen.sum(shares) / (eps + sums / counts), NormAverages(sums, counts)

    def start(ones: Tensor) -> Tensor:
        shares = per_task(ratios, "ratios", ones)
        if not bool(((shares >= 0) & shares.isfinite()).all() & (shares.sum() > 0)):
            raise ValueError(f"ratios={ratios!r} must be finite, at least 0, and not all 0")
        return budget * shares / shares.sum()

    return balancer(
        rule,
        needs="example_norms" if per_example else "norms",
        same_step=True,
        where=where,
        every=every,
        weights=start,
        memory=lambda weights: NormAverages(torch.zeros_like(weights), torch.zeros_like(weights)),
        named={"ratios": ratios},
    )
