"""GradNorm in one call: `gradnorm(...)` bound and run for a step, Algorithm 1 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack, cast, overload

from torch import Tensor

from gradnorm_func._balance.algorithm1 import GradNormInfo, GradNormState
from gradnorm_func._balance.gradnorm import GradNormOptions, gradnorm
from gradnorm_func._balance.passes import PassOptions
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core import optim
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.tree import Params, Where


class GradNormStepOptions(PassOptions, GradNormOptions, total=False):
    """Those of a step, and the rarer hyperparameters."""


@overload
def gradnorm_grad(
    state: GradNormState,
    params: Params,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 0.12,
    optimizer: optim.Optimizer | None = None,
    has_aux: Literal[False] = False,
    **options: Unpack[GradNormStepOptions],
) -> tuple[Params, GradNormState, GradNormInfo]: ...


@overload
def gradnorm_grad(
    state: GradNormState,
    params: Params,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 0.12,
    optimizer: optim.Optimizer | None = None,
    has_aux: Literal[True],
    **options: Unpack[GradNormStepOptions],
) -> tuple[Params, GradNormState, GradNormInfo, Any]: ...


def gradnorm_grad(
    state: GradNormState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 0.12,
    optimizer: optim.Optimizer | None = None,
    has_aux: bool = False,
    **options: Unpack[GradNormStepOptions],
) -> Any:
    r"""What a training step needs, from one pass: the gradient of :math:`\sum_i w_i L_i`, and the new weights.

    Algorithm 1 of the paper: the gradient uses the weights from before this step.

    Args:
        state: from `init_state`.
        params, loss_fn, batch, has_aux: as in `Balancer.grad`.
        where: W, as in `measure`.
        alpha: restoring force α >= 0; 0 aims at equal norms.
        optimizer: of the task weights; default: Adam at 0.025.
        **options: `mask`, `update`, `micro_batches`, `reduce`, `vectorize`, `chunk_size`, `loss_scale`, as in
            `Balancer.grad`; `norm_ratios`, `form`, `floor`, `burn_in`, `initial_decay`, `every`, as in `gradnorm`.

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
    bound, of_step = _bound(where, alpha, optimizer, options)
    return bound.grad(state, params, loss_fn, batch, has_aux=cast(Literal[True], has_aux), **of_step)


@overload
def gradnorm_update(
    state: GradNormState,
    params: Params,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 0.12,
    optimizer: optim.Optimizer | None = None,
    has_aux: Literal[False] = False,
    **options: Unpack[GradNormStepOptions],
) -> GradNormState: ...


@overload
def gradnorm_update(
    state: GradNormState,
    params: Params,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 0.12,
    optimizer: optim.Optimizer | None = None,
    has_aux: Literal[True],
    **options: Unpack[GradNormStepOptions],
) -> tuple[GradNormState, Any]: ...


def gradnorm_update(
    state: GradNormState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    where: Where = None,
    alpha: float | Tensor = 0.12,
    optimizer: optim.Optimizer | None = None,
    has_aux: bool = False,
    **options: Unpack[GradNormStepOptions],
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
        tensor([0.3375, 0.0658])
    """
    bound, of_step = _bound(where, alpha, optimizer, options)
    return bound.update(state, params, loss_fn, batch, has_aux=cast(Literal[True], has_aux), **of_step)


def _bound(
    where: Where, alpha: float | Tensor, optimizer: optim.Optimizer | None, options: Mapping[str, Any]
) -> tuple[Balancer[GradNormState, GradNormInfo], PassOptions]:
    """The balancer, and the options of its step."""
    hyper = cast(GradNormOptions, {k: v for k, v in options.items() if k in GradNormOptions.__annotations__})
    of_step = cast(PassOptions, {k: v for k, v in options.items() if k not in hyper})
    return gradnorm(where=where, alpha=alpha, optimizer=optimizer, **hyper), of_step
