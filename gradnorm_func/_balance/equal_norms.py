"""Weights under which all gradients are equally long, moved slowly: the "grad_norm" rule of jaxpi."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.protocol import Balancer, balancer, check_state, choose, here_of, vectors, weighted_total
from gradnorm_func._core.loss import task_vector
from gradnorm_func._core.tree import Where
from gradnorm_func._reduce.stats import TaskStats


class EqualNormsState(NamedTuple):
    """The weights, and how many steps there were, for they move in some of them only."""

    weights: Tensor  # (T,) w_i > 0
    step: Tensor  # () int64: steps so far


class EqualNormsInfo(NamedTuple):
    """What one would log of a step; all taken before the weights moved."""

    losses: Tensor  # (T,) L_i
    weights: Tensor  # (T,) w_i of this step's total loss
    grad_norms: Tensor  # (T,) ‖∇_W L_i‖, unweighted
    total_loss: Tensor  # () Σ w_i L_i
    finite: Tensor  # () bool: False means that the state was left as it was


def equal_norms(*, where: Where = None, momentum: float = 0.9, every: int = 1000) -> Balancer:
    r"""Every weighted gradient gets the mean length, by a moving average: a PINN's usual loss weights.

    .. math:: w_i \leftarrow m\, w_i + (1 - m)\, \frac{\mathrm{mean}_j \|\nabla_W L_j\|}{\|\nabla_W L_i\|}

    in the steps 0, `every`, 2 `every`, .... There is no L(0) and no alpha, and the sum of the weights is free: it
    grows as the norms drift apart, and with it the step of an optimizer that does not normalise.

    The norms are measured in every step, used or not, for a graph without branches cannot know. That is nearly free
    for `multi_task_loss(None, ...)`. Where it is not, give `every=1` and let the caller say when:
    `balancer.grad(..., update=t % 1000 == 0)` costs a plain step wherever `update` is False.

    Args:
        where: W, as in `measure`. None is every parameter for a PINN, as in the source.
        momentum: m, in [0, 1).
        every: steps from one update to the next. What is not finite in the step of an update lets the next one update.

    Returns:
        Balancer(init, update, grad, balance), `init(num_tasks, *, weights=None, dtype=None, device=None)`.

    Raises:
        ValueError: for hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.equal_norms(momentum=0.0)
        >>> loss_fn = gn.multi_task_loss(None, {"a": lambda w, x: 3 * w.sum(), "b": lambda w, x: w.sum()})
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.zeros(4), loss_fn, None)
        >>> info.grad_norms, state.weights
        (tensor([6., 2.]), tensor([0.6667, 2.0000]))

    Source: "grad_norm" of PredictiveIntelligenceLab/jaxpi. Departures: a task whose norm is exactly 0 keeps its
    weight, which would be infinite there; a step that is not finite changes nothing; the norms are of the parameters
    from before this batch's step, there from after it; over devices gradients are averaged (`gn.merge`), not weights.
    """
    check_momentum(momentum)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r} must be a number of steps, at least 1")

    def init(
        num_tasks: int,
        *,
        weights: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> EqualNormsState:
        step = torch.zeros((), dtype=torch.int64, device=device)
        return EqualNormsState(start_weights(num_tasks, weights, dtype, device), step)

    def balance(
        state: EqualNormsState, stats: TaskStats, *, mask: Any = None, update: bool | Tensor = True
    ) -> tuple[EqualNormsState, EqualNormsInfo]:
        check_state(state, EqualNormsState, "gn.equal_norms(...).init(T)")
        w = state.weights
        losses, norms = vectors(state, stats, needed=update is not False)
        here = here_of(state, mask)
        info = EqualNormsInfo(
            losses, w, norms, weighted_total(w, losses, here), (losses.isfinite() | ~here).all()
        )  # fmt: skip
        if update is False:
            return state, info
        moved = toward_equal(w, norms, here, momentum)
        finite = info.finite & ((norms.isfinite() & moved.isfinite()) | ~here).all()
        moved = torch.where(state.step % every == 0, moved, w)
        ok = finite & here.any() & torch.as_tensor(update, device=w.device)
        return choose(ok, EqualNormsState(moved, state.step + 1), state), info._replace(finite=finite)

    return balancer(init, balance, where=where)


def toward_equal(weights: Tensor, sizes: Tensor, here: Tensor, momentum: float) -> Tensor:
    """Weights moved towards mean(sizes) / sizes, of the tasks that are here and have a size."""
    mean = torch.where(here, sizes, 0.0).sum() / here.sum().clamp(min=1)
    moves = here & (sizes != 0)
    goal = mean / torch.where(moves, sizes, 1.0)
    return torch.where(moves, momentum * weights + (1 - momentum) * goal, weights)


def check_momentum(momentum: float) -> None:
    """Refuses what would not be a moving average."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1); 0 goes all the way at once")


def start_weights(num_tasks: int, weights: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """(T,) initial weights, 1 for each task unless they are given."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if weights is None:
        return torch.ones(num_tasks, dtype=dtype, device=device)
    given = task_vector(weights, "weights", dtype).detach().to(dtype=dtype, device=device, copy=True)
    if given.shape[0] != num_tasks:
        raise ValueError(f"weights has {given.shape[0]} entries, but num_tasks={num_tasks}")
    if not bool(((given > 0) & given.isfinite()).all()):
        raise ValueError(f"weights={weights!r} must be positive and finite")
    return given
