"""The optimizer of GradInit's scales: Adam with clipping, and moments of its own for each branch of the objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core.optim import Optimizer, as_optimizer


class RescaleAdamState(NamedTuple):
    """State of `rescale_adam`; row 0 belongs to the branch that descends the norm, row 1 to that of the loss."""

    counts: Tensor  # (2, P) int64: updates of each scale so far
    mean: Tensor  # (2, P) first moment
    square: Tensor  # (2, P) second moment; with shared_square both rows are the same


class ScaleOptimizer(NamedTuple):
    """A pair of pure functions like `Optimizer`, whose update is also told the branch.

    `init(scales) -> opt_state`; `update(grad, opt_state, scales, above) -> (step, opt_state)`.
    """

    init: Callable[[Tensor], RescaleAdamState]
    update: Callable[[Tensor, RescaleAdamState, Tensor, Tensor], tuple[Tensor, RescaleAdamState]]


AnyOptimizer: TypeAlias = ScaleOptimizer | Optimizer


def pair_of(optimizer: AnyOptimizer | None) -> AnyOptimizer:
    """The optimizer of the scales by its names; None is the authors'."""
    if optimizer is None:
        return rescale_adam()
    return optimizer if isinstance(optimizer, ScaleOptimizer) else as_optimizer(optimizer)


def rescale_adam(
    learning_rate: float | Tensor = 0.01,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip: float | None = 1.0,
    shared_square: bool = True,
) -> ScaleOptimizer:
    r"""The Adam that GradInit's authors use: :math:`m \leftarrow m - \eta \hat\mu_b / (\sqrt{\hat v} + \epsilon)`.

    Each branch b of the objective (the gradient norm, the loss) has its own first moment :math:`\mu_b` and count of
    updates; the second moment v sees the gradients of both and is corrected by the sum of the counts. A scale whose
    gradient is exactly 0, since its parameter is zero or the batch does not touch it, is left alone with its moments;
    so is a scale that is 0.

    Args:
        learning_rate: η, a number or a 0-d tensor. The authors' values lie between 1e-3 and 1e-1: 1e-2 for a VGG-19
            without batch norm, 5e-2 for such a ResNet-110, 2.5e-3 for a transformer.
        b1: decay of the first moments, in [0, 1).
        b2: decay of the second moment, in [0, 1); the authors' value for transformers is 0.98.
        eps: ε, added to the root of the second moment.
        clip: every scale's gradient is clipped to ± this before it enters the moments; None clips nothing, the
            authors' choice for transformers.
        shared_square: False keeps a second moment for each branch too, as the authors' code for fairseq does.

    Returns:
        ScaleOptimizer, for `optimizer=` of `gradinit` and its kin.

    Raises:
        ValueError: if the learning rate, ε or the clip is not positive, or a decay lies outside [0, 1).

    Example:
        >>> import torch, gradnorm_func as gn
        >>> init, update = gn.rescale_adam(0.1)
        >>> scales = torch.ones(2)
        >>> step, _ = update(torch.tensor([3.0, -0.5]), init(scales), scales, torch.tensor(True))
        >>> step
        tensor([-0.1000,  0.1000])

    Source: `RescaleAdam` of zhuchen03/gradinit, its versions for images and for fairseq.
    """
    _check(learning_rate, b1, b2, eps, clip)

    def init(scales: Tensor) -> RescaleAdamState:
        rows = torch.zeros_like(scales).expand(2, -1)
        return RescaleAdamState(rows.to(torch.int64), rows.clone(), rows.clone())

    def update(grad: Tensor, state: RescaleAdamState, scales: Tensor, above: Tensor) -> tuple[Tensor, RescaleAdamState]:
        moves = (grad != 0) & (scales != 0)
        grad = grad if clip is None else grad.clamp(-clip, clip)
        active = torch.stack([above & moves, ~above & moves])
        counts = state.counts + active
        mean = torch.where(active, b1 * state.mean + (1 - b1) * grad, state.mean)
        square = b2 * state.square + (1 - b2) * grad * grad
        square = torch.where(moves if shared_square else active, square, state.square)

        updates = torch.where(above, counts[0], counts[1])
        square_updates = counts.sum(0) if shared_square else updates
        mean_hat = torch.where(above, mean[0], mean[1]) / (1 - b1 ** updates.to(grad.dtype))
        square_hat = torch.where(above, square[0], square[1]) / (1 - b2 ** square_updates.to(grad.dtype))
        step = -learning_rate * mean_hat / (square_hat.sqrt() + eps)
        # The counts of a scale that has never moved are 0, and its step 0 / 0.
        return torch.where(moves, step, 0.0), RescaleAdamState(counts, mean, square)

    return ScaleOptimizer(init, update)


def _check(learning_rate: float | Tensor, b1: float, b2: float, eps: float, clip: float | None) -> None:
    if not isinstance(learning_rate, Tensor) and not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} must be positive; 0.01 is a good first try")
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0 <= decay < 1:
            raise ValueError(f"{name}={decay} must lie in [0, 1)")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive: it keeps the step finite where the gradient is zero")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be positive; None clips nothing")
