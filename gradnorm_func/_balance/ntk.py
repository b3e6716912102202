"""Weights under which all residuals are learned at one rate: the neural-tangent-kernel rule of PINNs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.equal_norms import check_momentum, toward_equal
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core import tree
from gradnorm_func._core.loss import MultiTaskLoss
from gradnorm_func._core.numerics import square_norms
from gradnorm_func._core.tracing import inside_transform

Residuals = Mapping[str, Callable[[Any, Any], Tensor]]


def ntk(
    residuals: Residuals,
    *,
    points: Callable[[Any], Any] | None = None,
    momentum: float = 0.9,
    chunk_size: int | None = None,
    every: int = 1,
) -> Balancer[State, Info]:
    r"""Weights by the neural tangent kernel: each residual's error is to fall at one rate.

    .. math:: w_i \leftarrow m\, w_i + (1 - m)\, \frac{\mathrm{mean}_j K_j}{K_i}, \qquad
              K_i = \mathrm{mean}_n \|\nabla_\theta r_i(x_n)\|^2

    with r_i the residual whose mean square is :math:`L_i`. Per-point gradients cost several plain steps, so that the
    weights should move in every 1000th step or so.

    Args:
        residuals: `{"name": residual(params, point) -> scalar}`, with the names of the losses.
        points: `points(batch) -> {"name": (N_i, ...)}`; None takes the batch itself for that dict.
        momentum: m, in [0, 1).
        chunk_size: gradients of at most that many points at a time, to bound memory.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer, with `info.memory` the kernels K_i, NaN before they were measured. Its `balance` takes them as
        `TaskStats(losses, extra=kernels)`. The `chunk_size` of grad and update is that of tasks, as everywhere.

    Raises:
        ValueError: for a momentum out of range, and from grad, update and balance as `ntk_kernels` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> line = lambda w, x: w[0] * x - 1
        >>> start = lambda w, x: w[1] + x
        >>> loss_fn = gn.multi_task_loss(None, {
        ...     "line": lambda w, batch: torch.func.vmap(line, (None, 0))(w, batch["line"]).square().mean(),
        ...     "start": lambda w, batch: torch.func.vmap(start, (None, 0))(w, batch["start"]).square().mean(),
        ... })
        >>> balancer = gn.ntk({"line": line, "start": start}, momentum=0.0)
        >>> batch = {"line": torch.tensor([1.0, 3.0]), "start": torch.zeros(1)}
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.ones(2), loss_fn, batch)
        >>> info.memory, state.weights
        (tensor([5., 1.]), tensor([0.6000, 3.0000]))

    Source: "ntk" of PredictiveIntelligenceLab/jaxpi, after Wang, Yu and Perdikaris 2022. Departures: a residual
    whose kernel is exactly 0 keeps its weight, which would be infinite there; a step that is not finite changes
    nothing; the kernels are of the parameters from before this batch's step, there from after it.
    """
    check_momentum(momentum)

    def kernels(params: Any, loss_fn: Any, batch: Any) -> Tensor:
        names = loss_fn.names if isinstance(loss_fn, MultiTaskLoss) else []
        if names and names != sorted(residuals):
            raise ValueError(
                f"residuals has the names {sorted(residuals)}, but the losses are {names}: give each its own"
            )
        return ntk_kernels(residuals, params, batch if points is None else points(batch), chunk_size=chunk_size)

    def rule(state: State, seen: Seen) -> tuple[Tensor, Tensor]:
        if not isinstance(seen.extra, Tensor) or seen.extra.shape != state.weights.shape:
            raise ValueError(
                "stats has no kernels, one for each task: this rule looks at them and not at gradient norms, so give "
                "TaskStats(losses, extra=kernels), or let balancer.grad measure them"
            )
        return toward_equal(state.weights, seen.extra, seen, momentum), seen.extra

    return balancer(rule, needs=kernels, every=every, memory=lambda weights: torch.full_like(weights, torch.nan))


def ntk_kernels(
    residuals: Mapping[str, Callable[[Any, Any], Tensor]], params: Any, points: Any, *, chunk_size: int | None = None
) -> Tensor:
    r"""Mean diagonal of the neural tangent kernel of each residual, exactly:

    .. math:: K_i = \frac{1}{N_i} \sum_{n=1}^{N_i} \|\nabla_\theta r_i(\theta, x_n)\|^2 .

    Args:
        residuals: `{"name": residual(params, point) -> scalar}`, at one point.
        params: pytree of floating-point tensors.
        points: `{"name": (N_i, ...) tensor, or a pytree of them}`; a point is that without its first axis.
        chunk_size: gradients of at most that many points at a time, to bound memory; None is all of them.

    Returns:
        (T,) K_i, in the order of `task_names(residuals)`.

    Raises:
        ValueError: for other names in `points`, or a residual that is not one scalar a point.

    Example:
        >>> import torch
        >>> residuals = {"line": lambda w, x: w[0] * x - 1, "start": lambda w, x: w[1] + x}
        >>> points = {"line": torch.tensor([1.0, 3.0]), "start": torch.zeros(1)}
        >>> ntk_kernels(residuals, torch.ones(2), points)
        tensor([5., 1.])
    """
    tree.check_params(params)
    leaves, treedef = tree.flatten(params)
    recorded = nullcontext() if inside_transform() else torch.no_grad()  # asked outside of the vmap below
    kernels = []
    for name in sorted(residuals):
        if not isinstance(points, Mapping) or name not in points:
            raise ValueError(
                f"points has no entry {name!r}: give points(batch) -> {{name: (N, ...)}} for each residual"
            )

        def square_norm(point: Any, name: str = name) -> Tensor:
            def residual(inputs: list[Tensor]) -> Tensor:
                out = residuals[name](tree.unflatten(treedef, inputs), point)
                if not isinstance(out, Tensor) or out.ndim != 0:
                    kind = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                    raise ValueError(
                        f"residuals[{name!r}] gave {kind} at one point; it must be a scalar: an equation with several "
                        "components is several residuals"
                    )
                return out

            with recorded:
                value, pull = vjp(residual, leaves)  # type: ignore[misc]
                return square_norms([grad.unsqueeze(0) for grad in pull(torch.ones_like(value))[0]])[0]

        kernels.append(vmap(square_norm, chunk_size=chunk_size)(points[name]).mean())
    return torch.stack(kernels)
