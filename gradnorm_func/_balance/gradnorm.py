"""GradNorm: task weights that give every task's gradient at W a fitting size (Chen et al., ICML 2018)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_func._balance.protocol import Balancer, balancer, check_state, choose, here_of, vectors, weighted_total
from gradnorm_func._core import optim, tree
from gradnorm_func._core.loss import task_vector
from gradnorm_func._core.tree import Where
from gradnorm_func._reduce.stats import TaskStats


class GradNormState(NamedTuple):
    """All that the next step needs, and nothing else."""

    weights: Tensor  # (T,) w_i > 0
    initial_losses: Tensor  # (T,) L_i(0); NaN until the task has been seen
    step: Tensor  # () int64: updates so far
    total: Tensor  # () the conserved sum of the weights
    moments: Any  # state of the weights' optimizer


class GradNormInfo(NamedTuple):
    """What one would log of a step; all taken before the weights moved."""

    losses: Tensor  # (T,) L_i
    weights: Tensor  # (T,) w_i of this step's total loss
    grad_norms: Tensor  # (T,) ‖∇_W L_i‖, unweighted, so G_i = weights * grad_norms; exactly 0 hints at a wrong W
    targets: Tensor  # (T,) what G_i should be
    inverse_rates: Tensor  # (T,) r_i
    balance_loss: Tensor  # () Σ |G_i - target_i|
    total_loss: Tensor  # () Σ w_i L_i
    finite: Tensor  # () bool: False means that the state was left as it was


def init_state(
    num_tasks: int,
    *,
    weights: Any = None,
    initial_losses: Any = None,
    optimizer: optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> GradNormState:
    r"""The state before the first step: equal weights, :math:`w_i = 1`.

    Args:
        num_tasks: T, at least 2.
        weights: initial weights, T positive numbers in task order or a pytree like the losses (a dict needs no
            order). Their sum is conserved from then on.
        initial_losses: L(0) where theory knows better than the first batch (log C for cross-entropy over C
            classes), in the same form; a NaN entry is taken from the first batch. None takes them all from it.
        optimizer: of the weights, `gn.sgd(lr)`, `gn.adam(lr)` or any (init, update) pair; the same one must be
            given to the updates. None is Adam at 0.025.
        dtype: of the weights and all that is computed from them; the default dtype if None.
        device: where the state lives.

    Returns:
        GradNormState, every field on `device`.

    Raises:
        ValueError: for fewer than two tasks, a wrong length, or weights that are not positive and finite.

    Example:
        >>> import math, gradnorm_func as gn
        >>> state = gn.init_state(2, initial_losses={"digit": math.log(10), "parity": math.log(2)})
        >>> state.initial_losses
        tensor([2.3026, 0.6931])
    """
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 2:
        raise ValueError(f"num_tasks={num_tasks!r}: balancing needs an integer number of tasks, at least 2")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point dtype")

    def vector(name: str, given: Any, default: float) -> Tensor:
        if given is None:
            return torch.full((num_tasks,), default, dtype=dtype, device=device)
        out = task_vector(given, name, dtype).detach().to(dtype=dtype, device=device, copy=True)
        if out.shape[0] != num_tasks:
            raise ValueError(f"{name} has {out.shape[0]} entries, but num_tasks={num_tasks}")
        return out

    w = vector("weights", weights, 1.0)
    if weights is not None and not bool(((w > 0) & w.isfinite()).all()):
        raise ValueError(f"weights={weights!r} must be positive and finite; to leave a task out of a batch use mask=")
    moments = optim.as_optimizer(optimizer).init(w)
    step = torch.zeros((), dtype=torch.int64, device=device)
    return GradNormState(w, vector("initial_losses", initial_losses, torch.nan), step, w.sum(), moments)


def reset_initial_losses(state: GradNormState) -> GradNormState:
    """The state with L(0) forgotten: every task's next loss becomes its L(0).

    Args:
        state: of any step.

    Returns:
        GradNormState, otherwise the same.

    Example:
        >>> import gradnorm_func as gn
        >>> gn.reset_initial_losses(gn.init_state(2, initial_losses=[1.0, 2.0])).initial_losses
        tensor([nan, nan])
    """
    return state._replace(initial_losses=torch.full_like(state.initial_losses, torch.nan))


def balance(
    state: GradNormState,
    stats: TaskStats,
    *,
    alpha: float | Tensor = 1.5,
    optimizer: optim.Optimizer | None = None,
    norm_ratios: Any = None,
    log_space: bool = False,
    floor: float | Tensor = 1e-8,
    burn_in: int | Tensor | None = None,
    initial_decay: float | Tensor = 1.0,
    mask: Any = None,
    update: bool | Tensor = True,
) -> tuple[GradNormState, GradNormInfo]:
    r"""GradNorm's weight update, from losses and gradient norms alone.

    With :math:`n_i = \|\nabla_W L_i\|`, :math:`G_i = w_i n_i`, :math:`\tilde L_i = L_i / L_i(0)` and
    :math:`r_i = \tilde L_i / \mathrm{mean}_j \tilde L_j`, the weights descend

    .. math:: L_\mathrm{grad} = \sum_i |G_i - \bar G \rho_i r_i^\alpha|, \qquad
              \partial L_\mathrm{grad} / \partial w_i = \mathrm{sign}(G_i - \bar G \rho_i r_i^\alpha)\, n_i,

    the target being constant, and are scaled back to their sum. No second derivative is needed.

    Args:
        state: from `init_state`, made with the same optimizer.
        stats: from `measure`, `merge`, or made by the caller: `TaskStats(losses, grad_norms)`.
        alpha: restoring force α >= 0, a number or a 0-d tensor. 0 aims at equal norms, and then L(0) is not used:
            the choice for losses that may be negative.
        optimizer: of the weights; None is Adam at 0.025, the paper's.
        norm_ratios: prior ratios ρ of the norms, T positive numbers or a pytree like the losses, scaled here to a
            mean of 1. None is equal.
        log_space: descend in log w instead of w: steps are then relative, and nothing is clipped at the floor.
        floor: smallest weight after a step, relative to the mean weight: what keeps weights of the linear form
            positive.
        burn_in: the step (counted from 0) at which L(0) is taken anew, once the start-up transient is over.
        initial_decay: L(0) ← decay * L(0) + (1 - decay) * L at every step after the first: a running mean. 1 keeps
            the first.
        mask: the tasks present in this batch, (T,) bool or a pytree like the losses. Absent tasks keep weight,
            L(0) and moments; the present ones share what remains of the sum. A tensor that is False everywhere
            leaves the state as it was. The gradient of an absent loss is multiplied by 0, and 0 times NaN is NaN:
            let a missing label be any number, not NaN.
        update: False, or a 0-d bool tensor that is False, freezes the state.

    Returns:
        (state, info). If a loss, a norm, a target or a new weight of a present task is not finite, the state is the
        old one, all of it, and `info.finite` is False.

    Raises:
        ValueError: for a negative alpha, a wrong number of tasks, a state from another optimizer, and other
            mistakes that can be seen without looking at the values of tensors.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> state = gn.init_state(2, optimizer=gn.sgd(0.1))
        >>> stats = gn.TaskStats(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0]))
        >>> state, info = gn.balance(state, stats, optimizer=gn.sgd(0.1))
        >>> info.targets, state.weights
        (tensor([2., 2.]), tensor([0.7778, 1.2222]))

    Source: Chen et al. 2018, Algorithm 1 and equations 1-2. Departures: the floor, without which a weight can become
    negative; a loss that is 0 on the first batch does not become L(0), the first one after it that is not 0 does,
    and until then its ratio counts as 1.
    """
    optimizer = optim.as_optimizer(optimizer)
    _check_hyper(alpha, floor, burn_in, initial_decay)
    check_state(state, GradNormState, "gn.init_state(T)")
    _check_moments(state, optimizer)
    w = state.weights
    losses, norms = vectors(state, stats, needed=update is not False)
    here = here_of(state, mask)
    count = here.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(here, x, 0.0).sum() / count

    # Inverse training rates. With alpha = 0 they are only reported.
    usable = here & losses.isfinite() & (losses != 0)
    unset = state.initial_losses.isnan()
    initial = torch.lerp(losses, state.initial_losses, torch.as_tensor(initial_decay, dtype=w.dtype, device=w.device))
    if burn_in is not None:
        unset = unset | (state.step == burn_in)
    initial = torch.where(usable, torch.where(unset, losses, initial), state.initial_losses)
    known = ~initial.isnan()
    ratios = torch.where(known, losses / torch.where(known, initial, 1.0), 1.0)
    mean_ratio = mean(ratios)
    rates = torch.where(mean_ratio == 0, 1.0, ratios / torch.where(mean_ratio == 0, 1.0, mean_ratio))

    weighted = w * norms
    targets = mean(weighted) * force(rates, alpha)
    if norm_ratios is not None:
        rho = _ratios(norm_ratios, w)
        targets = targets * rho / mean(rho)
    gaps = weighted - targets
    finite = ((losses.isfinite() & norms.isfinite() & targets.isfinite()) | ~here).all()
    total_loss = weighted_total(w, losses, here)
    info = GradNormInfo(losses, w, norms, targets, rates, torch.where(here, gaps.abs(), 0.0).sum(), total_loss, finite)
    if update is False:
        return state, info._replace(finite=losses.isfinite().logical_or(~here).all())

    grad = torch.where(here, gaps.sign() * norms, 0.0)
    budget = state.total - torch.where(here, 0.0, w).sum()
    if log_space:
        step, moments = optimizer.update(w * grad, state.moments, w.log())
        # w exp(step) and the scaling to the budget in one: however large the step, it does not overflow.
        moved = budget * torch.where(here, w.log() + step, -torch.inf).softmax(0)
    else:
        step, moments = optimizer.update(grad, state.moments, w)
        moved = w + step
    moved = torch.maximum(moved, floor * state.total / w.shape[0])
    moved = torch.where(here, moved * (budget / torch.where(here, moved, 0.0).sum()), w)
    if mask is not None:
        moments = tree.tree_map(
            lambda a, b: torch.where(here, a, b) if a.shape == w.shape else a, moments, state.moments
        )
    new = GradNormState(moved, initial, state.step + 1, state.total, moments)
    finite = finite & (moved.isfinite() & (moved > 0) | ~here.any()).all()
    return choose(finite & here.any() & torch.as_tensor(update, device=w.device), new, state), info._replace(
        finite=finite
    )


def gradnorm(
    *,
    alpha: float | Tensor = 1.5,
    where: Where = None,
    optimizer: optim.Optimizer | None = None,
    norm_ratios: Any = None,
    log_space: bool = False,
    floor: float | Tensor = 1e-8,
    burn_in: int | Tensor | None = None,
    initial_decay: float | Tensor = 1.0,
) -> Balancer:
    r"""GradNorm with its hyperparameters bound.

    Args:
        alpha, optimizer, norm_ratios, log_space, floor, burn_in, initial_decay: as in `balance`.
        where: W, as in `measure`.

    Returns:
        Balancer(init, update, grad, balance). `init` takes what `init_state` takes, but for the optimizer.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.gradnorm(alpha=0.12, where="trunk")
        >>> state = balancer.init(2)
        >>> params = {"trunk": torch.eye(2)}
        >>> loss_fn = lambda params, x: {"a": (x @ params["trunk"]).sum(), "b": params["trunk"].square().sum()}
        >>> grads, state, info = balancer.grad(state, params, loss_fn, torch.ones(1, 2))
        >>> info.grad_norms
        tensor([2.0000, 2.8284])
    """
    _check_hyper(alpha, floor, burn_in, initial_decay)
    optimizer = optim.as_optimizer(optimizer)
    hyper: dict[str, Any] = {
        "alpha": alpha, "optimizer": optimizer, "norm_ratios": norm_ratios, "log_space": log_space,
        "floor": floor, "burn_in": burn_in, "initial_decay": initial_decay,
    }  # fmt: skip

    def init(num_tasks: int, **keywords: Any) -> GradNormState:
        return init_state(num_tasks, optimizer=optimizer, **keywords)

    def bound(
        state: GradNormState, stats: TaskStats, *, mask: Any = None, update: bool | Tensor = True
    ) -> tuple[GradNormState, GradNormInfo]:
        return balance(state, stats, mask=mask, update=update, **hyper)

    return balancer(init, bound, where=where)


def force(rates: Tensor, alpha: float | Tensor) -> Tensor:
    """r^α; with α = 0 it is 1 whatever r, which may be negative or NaN then."""
    if isinstance(alpha, Tensor):
        zero = alpha == 0
        return torch.where(zero, 1.0, torch.where(zero, 1.0, rates) ** alpha.to(rates.dtype))
    return torch.ones_like(rates) if alpha == 0 else rates**alpha


def _ratios(norm_ratios: Any, weights: Tensor) -> Tensor:
    rho = task_vector(norm_ratios, "norm_ratios", weights.dtype).to(weights)
    if rho.shape != weights.shape:
        raise ValueError(f"norm_ratios has {rho.shape[0]} entries, but there are {weights.shape[0]} tasks")
    if not isinstance(norm_ratios, Tensor) and not all(
        isinstance(x, Tensor) or x > 0 for x in tree.flatten(norm_ratios)[0]
    ):
        raise ValueError(f"norm_ratios={norm_ratios!r} must be positive")
    return rho


def _check_hyper(
    alpha: float | Tensor, floor: float | Tensor, burn_in: int | Tensor | None, initial_decay: float | Tensor
) -> None:
    if not isinstance(alpha, Tensor) and not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be at least 0: 0 aims at equal norms, 1.5 is the paper's for NYUv2")
    if not isinstance(floor, Tensor) and not 0 < floor < 1:
        raise ValueError(f"floor={floor} is relative to the mean weight and must lie in (0, 1)")
    if burn_in is not None and not isinstance(burn_in, Tensor) and burn_in < 0:
        raise ValueError(f"burn_in={burn_in} counts steps from 0 and cannot be negative")
    if not isinstance(initial_decay, Tensor) and not 0 <= initial_decay <= 1:
        raise ValueError(f"initial_decay={initial_decay} must lie in [0, 1]; 1 keeps the first losses as L(0)")


def _check_moments(state: GradNormState, optimizer: optim.Optimizer) -> None:
    expected = optimizer.init(state.weights)
    if tree.flatten(expected)[1] != tree.flatten(state.moments)[1]:
        raise ValueError(
            f"the state holds {type(state.moments).__name__}, but this optimizer keeps {type(expected).__name__}: "
            "give init_state and the updates the same optimizer= (None is Adam at 0.025 in both)"
        )
