"""Weights under which all residuals are learned at one rate: the neural-tangent-kernel rule of PINNs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from gradnorm_func._balance.equal_norms import check_momentum, start_weights, toward_equal
from gradnorm_func._balance.protocol import (
    Balancer,
    Reduce,
    balancer,
    check_state,
    choose,
    constant,
    here_of,
    vectors,
    weighted_total,
)
from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn, MultiTaskLoss, task_vector
from gradnorm_func._measure.plan import quiet
from gradnorm_func._reduce.micro import split
from gradnorm_func._reduce.stats import TaskStats


class NTKState(NamedTuple):
    """The weights, and nothing else."""

    weights: Tensor  # (T,) w_i > 0


class NTKInfo(NamedTuple):
    """What one would log of a step; all taken before the weights moved."""

    losses: Tensor  # (T,) L_i
    weights: Tensor  # (T,) w_i of this step's total loss
    kernels: Tensor  # (T,) K_i; NaN where it was not measured
    total_loss: Tensor  # () Σ w_i L_i
    finite: Tensor  # () bool: False means that the state was left as it was


class NTKStats(NamedTuple):
    """What the rule looks at. A mean over points, so that of micro-batches of one size is the mean of theirs."""

    losses: Any  # (T,) L_i
    kernels: Any  # (T,) K_i


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
        >>> import torch, gradnorm_func as gn
        >>> residuals = {"line": lambda w, x: w[0] * x - 1, "start": lambda w, x: w[1] + x}
        >>> points = {"line": torch.tensor([1.0, 3.0]), "start": torch.zeros(1)}
        >>> gn.ntk_kernels(residuals, torch.ones(2), points)
        tensor([5., 1.])
    """
    tree.check_params(params)
    leaves, treedef = tree.flatten(params)
    silence = quiet()
    kernels = []
    for name in sorted(residuals):
        if not isinstance(points, Mapping) or name not in points:
            raise ValueError(
                f"points has no entry {name!r}: give points(batch) -> {{name: (N, ...)}} for each residual"
            )

        def square_norm(point: Any, name: str = name) -> Tensor:
            def residual(own: list[Tensor]) -> Tensor:
                out = residuals[name](tree.unflatten(treedef, own), point)
                if not isinstance(out, Tensor) or out.ndim != 0:
                    kind = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                    raise ValueError(
                        f"residuals[{name!r}] gave {kind} at one point; it must be a scalar: an equation with several "
                        "components is several residuals"
                    )
                return out

            value, pull = vjp(residual, leaves)  # type: ignore[misc]
            with silence():
                return tree.square_norms([grad.unsqueeze(0) for grad in pull(torch.ones_like(value))[0]])[0]

        kernels.append(vmap(square_norm, chunk_size=chunk_size)(points[name]).mean())
    return torch.stack(kernels)


def ntk(
    residuals: Mapping[str, Callable[[Any, Any], Tensor]],
    *,
    points: Callable[[Any], Any] | None = None,
    momentum: float = 0.9,
    chunk_size: int | None = None,
) -> Balancer:
    r"""Weights by the neural tangent kernel: each residual's error is to fall at one rate.

    .. math:: w_i \leftarrow m\, w_i + (1 - m)\, \frac{\mathrm{mean}_j K_j}{K_i}, \qquad
              K_i = \mathrm{mean}_n \|\nabla_\theta r_i(x_n)\|^2

    with r_i the residual whose mean square is :math:`L_i`. Per-point gradients cost several plain steps, so let the
    caller say when: `balancer.grad(..., update=t % 1000 == 0)` costs a plain step wherever `update` is False. `reduce`
    is applied to the kernels as well, which makes a second collective.

    Args:
        residuals: `{"name": residual(params, point) -> scalar}`, with the names of the losses.
        points: `points(batch) -> {"name": (N_i, ...)}`; None takes the batch itself for that dict.
        momentum: m, in [0, 1).
        chunk_size: gradients of at most that many points at a time, to bound memory.

    Returns:
        Balancer(init, update, grad, balance), `init(num_tasks, *, weights=None, dtype=None, device=None)`. Its
        `balance` takes `NTKStats(losses, kernels)`, both (T,), for it needs kernels and not norms; `ntk_kernels`
        measures them. The `chunk_size` of grad and update is, as with all balancers, that of tasks.

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
        >>> info.kernels, state.weights
        (tensor([5., 1.]), tensor([0.6000, 3.0000]))

    Source: "ntk" of PredictiveIntelligenceLab/jaxpi, after Wang, Yu and Perdikaris 2022. Departures: a residual
    whose kernel is exactly 0 keeps its weight, which would be infinite there; a step that is not finite changes
    nothing; the kernels are of the parameters from before this batch's step, there from after it.
    """
    check_momentum(momentum)

    def init(
        num_tasks: int,
        *,
        weights: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> NTKState:
        return NTKState(start_weights(num_tasks, weights, dtype, device))

    def balance(
        state: NTKState, stats: NTKStats, *, mask: Any = None, update: bool | Tensor = True
    ) -> tuple[NTKState, NTKInfo]:
        check_state(state, NTKState, "gn.ntk(...).init(T)")
        if not isinstance(stats, NTKStats) and update is not False:
            raise ValueError(
                f"stats is a {type(stats).__name__}, but this rule looks at kernels, not at gradient norms: give it "
                "gn.NTKStats(losses, gn.ntk_kernels(residuals, params, points))"
            )
        w = state.weights
        losses, _ = vectors(state, TaskStats(stats.losses), needed=False)
        here = here_of(state, mask)
        info = NTKInfo(
            losses, w, torch.full_like(w, torch.nan), weighted_total(w, losses, here),
            (losses.isfinite() | ~here).all(),
        )  # fmt: skip
        if update is False:
            return state, info
        kernels = constant(task_vector(stats.kernels, "kernels", w.dtype).to(w))
        if kernels.shape != w.shape:
            raise ValueError(f"kernels has {kernels.shape[0]} entries, but there are {w.shape[0]} tasks")
        moved = toward_equal(w, kernels, here, momentum)
        finite = info.finite & ((kernels.isfinite() & moved.isfinite()) | ~here).all()
        ok = finite & here.any() & torch.as_tensor(update, device=w.device)
        return choose(ok, NTKState(moved), state), info._replace(kernels=kernels, finite=finite)

    def measured(
        params: Any, loss_fn: LossFn, batch: Any, update: bool | Tensor, reduce: Reduce | None = None, **_: Any
    ) -> Balancer:
        """The plain balancer of one step, its kernels measured."""
        names = loss_fn.names if isinstance(loss_fn, MultiTaskLoss) else []
        if names and names != sorted(residuals):
            raise ValueError(
                f"residuals has the names {sorted(residuals)}, but the losses are {names}: give each its own"
            )
        if update is False:
            return balancer(init, balance, norms=False)
        at = batch if points is None else points(batch)
        kernels = ntk_kernels(residuals, params, at, chunk_size=chunk_size)
        if reduce is not None:  # means over points, as losses are
            kernels = reduce(TaskStats(kernels, num_examples=split(batch, None)[0][1])).losses

        def bound(state: NTKState, stats: TaskStats, **keywords: Any) -> tuple[NTKState, NTKInfo]:
            return balance(state, NTKStats(stats.losses, kernels), **keywords)

        return balancer(init, bound, norms=False)

    def grad(
        state: Any, params: Any, loss_fn: LossFn, batch: Any, *, update: bool | Tensor = True, **options: Any
    ) -> Any:
        bound = measured(params, loss_fn, batch, update, **options)
        return bound.grad(state, params, loss_fn, batch, update=update, **options)

    def update(
        state: Any, params: Any, loss_fn: LossFn, batch: Any, *, update: bool | Tensor = True, **options: Any
    ) -> Any:
        bound = measured(params, loss_fn, batch, update, **options)
        return bound.update(state, params, loss_fn, batch, update=update, **options)

    return Balancer(init, update, grad, balance)
