"""GradNorm in one call: `gradnorm(...)` bound and run for a step, Algorithm 1 of the paper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradnorm_func._balance.gradnorm import GradNormState, gradnorm
from gradnorm_func._balance.protocol import Reduce
from gradnorm_func._core import optim
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.tree import Where


def gradnorm_grad(
    state: GradNormState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 1.5,
    optimizer: optim.Optimizer | None = None,
    mask: Any = None,
    update: bool | Tensor = True,
    micro_batches: int | None = None,
    reduce: Reduce | None = None,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    loss_scale: float | Tensor | None = None,
    **hyper: Any,
) -> Any:
    r"""What a training step needs, from one pass: the gradient of :math:`\sum_i w_i L_i`, and the new weights.

    Algorithm 1 of the paper: the gradient uses the weights from before this step.

    Args:
        state: from `init_state`.
        params, loss_fn, batch, where, has_aux, vectorize, chunk_size, loss_scale: as in `measure`. With a `loss_scale`
            the gradients come back multiplied by it, and a step in which any of them is not finite changes nothing.
        alpha, optimizer, mask, update: as in `balance`; so are the remaining keywords, `norm_ratios`, `log_space`,
            `floor`, `burn_in`, `initial_decay`. `update=False` costs what a plain step costs.
        micro_batches: cut every tensor of the batch along its first axis into that many parts, measure one at a
            time, and balance once: exact if the losses are means over examples and no layer looks across them (batch
            norm). Parts may differ by one example; if the tensors are of several lengths (a PINN's points), the number
            must divide them all. Other leaves and 0-d tensors go into every part. aux is then a list, one per part.
        reduce: stats -> stats, applied once before balancing: `gn.all_reduce` for data parallelism, and
            `partial(gn.all_reduce, group=group)` for a process group. Every rank weighs as much as it has examples,
            the tensors of its batch being of one length; otherwise all weigh the same. `mask` is that of the whole.

    Returns:
        (grads, state, info): gradients in the structure of params, the new GradNormState, and GradNormInfo.
        With `has_aux`, (grads, state, info, aux).

    Raises:
        ValueError: as `measure` and `balance` do.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, x: {"fit": (x @ w - 1).square().mean(), "size": 100 * w.square().sum()}
        >>> w, state = torch.full((3,), 0.5), gn.init_state(2)
        >>> for _ in range(200):
        ...     grads, state, info = gn.gradnorm_grad(state, w, loss_fn, torch.eye(3), alpha=0.0)
        ...     w = w - 1e-3 * grads
        >>> bool(state.weights[0] > state.weights[1])  # tasks in the order of gn.task_names: fit, size
        True
    """
    bound = gradnorm(alpha=alpha, where=where, optimizer=optimizer, **hyper)
    return bound.grad(
        state, params, loss_fn, batch,
        mask=mask, update=update, micro_batches=micro_batches, reduce=reduce,
        has_aux=has_aux, vectorize=vectorize, chunk_size=chunk_size, loss_scale=loss_scale,
    )  # fmt: skip


def gradnorm_update(
    state: GradNormState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 1.5,
    optimizer: optim.Optimizer | None = None,
    mask: Any = None,
    update: bool | Tensor = True,
    micro_batches: int | None = None,
    reduce: Reduce | None = None,
    has_aux: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    loss_scale: float | Tensor | None = None,
    **hyper: Any,
) -> Any:
    r"""The new weight state alone, for those who take the gradient of :math:`\sum_i w_i L_i` themselves.

    Args:
        As in `gradnorm_grad`.

    Returns:
        GradNormState; with `has_aux`, (state, aux).

    Raises:
        ValueError: as `measure` and `balance` do.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = lambda w, batch: torch.stack([w.sum(), 5 * w.sum()])
        >>> state = gn.init_state(2)
        >>> gn.gradnorm_update(state, torch.ones(3), loss_fn, None).weights
        tensor([1.0250, 0.9750])
    """
    bound = gradnorm(alpha=alpha, where=where, optimizer=optimizer, **hyper)
    return bound.update(
        state, params, loss_fn, batch,
        mask=mask, update=update, micro_batches=micro_batches, reduce=reduce,
        has_aux=has_aux, vectorize=vectorize, chunk_size=chunk_size, loss_scale=loss_scale,
    )  # fmt: skip
