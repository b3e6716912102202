"""Weights under which all gradients are equally long, moved slowly: the "grad_norm" rule of jaxpi."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_func._balance.balancer import Info, State, balancer
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._core.tree import Where


def equal_norms(*, where: Where = None, momentum: float = 0.9, every: int = 10) -> Balancer[State, Info]:
    r"""Every weighted gradient gets the mean length, by a moving average: a PINN's usual loss weights.

    .. math:: w_i \leftarrow m\, w_i + (1 - m)\, \frac{\mathrm{mean}_j \|\nabla_W L_j\|}{\|\nabla_W L_i\|}

    in the steps 0, `every`, 2 `every`, .... There is no L(0) and no alpha, and the sum of the weights is free: it
    grows as the norms drift apart, and with it the step of an optimizer that does not normalise.

    Nothing is measured in between, unless the step is compiled: a graph without branches measures always, so give it
    `update=t % 10 == 0`, which costs a plain step wherever it is False.

    Args:
        where: W, as in `measure`. None is every parameter for a PINN, as in the source.
        momentum: m, in [0, 1).
        every: steps from one update to the next. What is not finite in the step of an update lets the next one update.

    Returns:
        Balancer.

    Raises:
        ValueError: for hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.equal_norms(momentum=0.0)
        >>> loss_fn = gn.multi_task_loss(None, {"a": lambda w, x: 3 * w.sum(), "b": lambda w, x: w.sum()})
        >>> grads, state, info = balancer.grad(balancer.init(2), torch.zeros(4), loss_fn, None)
        >>> info.grad_norms, state.weights
        (tensor([6., 2.]), tensor([0.6667, 2.0000]))

    Source: "grad_norm" of PredictiveIntelligenceLab/jaxpi. Departures: `every` is 1000 there, for runs of a hundred
    thousand steps; with 10 the weights follow the norms within a hundred steps, in short runs as in long ones. A task
    whose norm is exactly 0 keeps its weight, which would be infinite there; a step that is not finite changes nothing;
    the norms are of the parameters from before this batch's step, there from after it; over devices gradients are
    averaged (`gn.merge`), not weights.
    """
    check_momentum(momentum)

    def rule(state: State, seen: Seen) -> tuple[Tensor, tuple[()]]:
        return toward_equal(state.weights, seen.norms, seen, momentum), ()

    return balancer(rule, where=where, every=every)


def toward_equal(weights: Tensor, sizes: Tensor, seen: Seen, momentum: float) -> Tensor:
    """Weights moved towards mean(sizes) / sizes; those of tasks without a size stay."""
    moves = sizes != 0
    goal = seen.mean(sizes) / torch.where(moves, sizes, 1.0)
    return torch.where(moves, momentum * weights + (1 - momentum) * goal, weights)


def check_momentum(momentum: float) -> None:
    """Refuses what would not be a moving average."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1); 0 goes all the way at once")
