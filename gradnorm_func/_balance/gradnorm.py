"""GradNorm: task weights that give every task's gradient at W a fitting size (Chen et al., ICML 2018)."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from gradnorm_func._balance.algorithm1 import Algorithm1, Form, GradNormInfo, GradNormState, units_of
from gradnorm_func._balance.balancer import check_every
from gradnorm_func._balance.guard import Guarded
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.start import NumTasks, start_vector, start_weights
from gradnorm_func._balance.weighing import Weighing
from gradnorm_func._core import optim
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.plan import check_word
from gradnorm_func._reduce.stats import TaskStats


class GradNormOptions(TypedDict, total=False):
    """The rarer hyperparameters, of all functions of GradNorm; `gradnorm` explains them."""

    norm_ratios: Any
    form: Form
    floor: float | Tensor
    burn_in: int | Tensor | None
    initial_decay: float | Tensor
    every: int


def init_state(
    num_tasks: NumTasks,
    *,
    weights: Any = None,
    initial_losses: Any = None,
    optimizer: optim.Optimizer | None = None,
    form: Form = "invariant",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> GradNormState:
    r"""The state before the first step: equal weights, :math:`w_i = 1`.

    Args:
        num_tasks: T, at least 2; or what says so and names the tasks: a `multi_task_loss`, the losses, the heads, a
            list of names.
        weights: initial weights, T positive numbers in task order or a dict by name, compared with the names of
            `num_tasks`, or else with those of the first step. Their sum is conserved from then on.
        initial_losses: L(0) where theory knows better than the first batch (log C for cross-entropy over C
            classes), in the same form; a NaN entry is taken from the first batch. None takes them all from it.
        form: as in `gradnorm`. In the invariant form `weights` are those of the losses in units of L(0).
        optimizer: of the weights, `gn.sgd(lr)`, `gn.adam(lr)` or any (init, update) pair; the same one must be
            given to the updates. None is Adam at 0.025.
        dtype: of the weights and all that is computed from them, float32 at least; the default dtype if None.
        device: where the state lives.

    Returns:
        GradNormState, every field on `device`.

    Raises:
        ValueError: for fewer than two tasks, a wrong length, names that are not those of the tasks, or weights that
            are not positive and finite.

    Example:
        >>> import math, gradnorm_func as gn
        >>> start = {"digit": math.log(10), "parity": math.log(2)}
        >>> state = gn.init_state(["digit", "parity"], initial_losses=start)
        >>> state.initial_losses
        tensor([2.3026, 0.6931])
    """
    check_word("form", form, get_args(Form))
    w = start_weights(num_tasks, weights, dtype, device)
    initial = start_vector("initial_losses", initial_losses, num_tasks, torch.nan, dtype, device)
    moments = optim.as_optimizer(optimizer).init(w)
    raw = w / units_of(initial) if form == "invariant" and initial_losses is not None else w
    return GradNormState(raw, initial, torch.zeros((), dtype=torch.int64, device=device), w.sum(), moments)


def gradnorm(
    *,
    alpha: float | Tensor = 0.12,
    where: Where = None,
    optimizer: optim.Optimizer | None = None,
    norm_ratios: Any = None,
    form: Form = "invariant",
    floor: float | Tensor = 1e-8,
    burn_in: int | Tensor | None = None,
    initial_decay: float | Tensor = 1.0,
    every: int = 1,
) -> Balancer[GradNormState, GradNormInfo]:
    r"""GradNorm with its hyperparameters bound.

    With :math:`n_i = \|\nabla_W L_i\|`, :math:`G_i = w_i n_i`, :math:`\tilde L_i = L_i / L_i(0)` and
    :math:`r_i = \tilde L_i / \mathrm{mean}_j \tilde L_j`, the weights descend

    .. math:: L_\mathrm{grad} = \sum_i |G_i - \bar G \rho_i r_i^\alpha|, \qquad
              \partial L_\mathrm{grad} / \partial w_i = \mathrm{sign}(G_i - \bar G \rho_i r_i^\alpha)\, n_i,

    the target being constant, and are scaled back to their sum. No second derivative is needed. `form` says what of:

    - "invariant": of :math:`L_i / |L_i(0)|`, by relative steps. With :math:`v_i = w_i |L_i(0)|` it is
      :math:`\log v` that descends, along :math:`\mathrm{sign}(\cdot)\, G_i`, and :math:`\sum_i v_i` is conserved; every
      v is 1 at the start. Multiplying a loss by c > 0 multiplies L_i(0) and n_i by c, so that G, r and v stay as they
      are, and w_i is divided by c: the trajectory of the parameters is the same from the first step on, in which w_i
      is :math:`v_i / |L_i|` already.
    - "log": the same relative steps on the losses as they are, with :math:`\sum_i w_i` conserved.
    - "paper": Algorithm 1 to the letter, w itself descends. From w = 1 a loss 100 times the others gets its weight
      down to 0.01 and the whole gradient with it, which an optimizer's second moment remembers for long.

    Args:
        alpha: restoring force α >= 0, a number or a 0-d tensor. 0 aims at equal norms, the choice for losses that may
            be negative; more lets slow tasks catch up. The paper has 0.12 for symmetric tasks and 1.5 for NYUv2. The
            default was chosen by validation errors on four data sets (benchmarks/evidence).
        optimizer: of the weights; None is Adam at 0.025, the paper's.
        norm_ratios: prior ratios ρ of the norms, T positive numbers or a pytree like the losses, scaled here to a
            mean of 1. None is equal.
        form: see above. `state.weights` multiply the raw losses in all of them.
        floor: smallest weight after a step, relative to the mean weight (in the invariant form, of v): what keeps the
            weights of the paper's form positive.
        burn_in: the step (counted from 0), or the next turn of `every`, at which L(0) is taken anew, once the start-up
            transient is over.
        initial_decay: L(0) ← decay * L(0) + (1 - decay) * L at every step after the first: a running mean. 1 keeps
            the first.
        where: W, as in `measure`. In a loop of one's own it is what `measure_losses` is given that counts.
        every: the weights move in every k-th step, as in `balancer`.

    Returns:
        Balancer. Its `init` takes what `init_state` takes, but for the optimizer.

    Raises:
        ValueError: for hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> balancer = gn.gradnorm(alpha=0.12, where="trunk")
        >>> state = balancer.init(2)
        >>> params = {"trunk": torch.eye(2)}
        >>> loss_fn = lambda params, x: {"a": (x @ params["trunk"]).sum(), "b": params["trunk"].square().sum()}
        >>> grads, state, info = balancer.grad(state, params, loss_fn, torch.ones(1, 2))
        >>> info.grad_norms
        tensor([2.0000, 2.8284])

    A loss that is 0 on the first batch does not become L(0), the first one after it that is not 0 does; until then its
    ratio and its unit are 1. Of a negative one the unit is its size. A loss that is nearly solved at the start, such as
    a PINN's residual, would get a huge weight: give `init(initial_losses=...)` what is usual for it. With
    `micro_batches` or `reduce`, a step that may see a task for the first time runs the losses of all parts forwards
    before it weighs them; on a CPU in eager mode it is known whether it may.

    Source: Chen et al. 2018, Algorithm 1 and equations 1-2. Departures: the forms "invariant" and "log"; the floor,
    without which a weight of the paper's form can become negative; L(0) of a first loss that is 0.
    """
    method = _method(
        alpha,
        optimizer,
        norm_ratios=norm_ratios,
        form=form,
        floor=floor,
        burn_in=burn_in,
        initial_decay=initial_decay,
        every=every,
    )

    def init(num_tasks: NumTasks, **start: Any) -> GradNormState:
        return init_state(num_tasks, optimizer=method.optimizer, form=form, **start)

    guarded = Guarded(method, {"norm_ratios": norm_ratios})
    return Balancer(init, Weighing(guarded, where, False, "weighted", None), every, method.needs)


def gradnorm_balance(
    state: GradNormState,
    stats: TaskStats,
    *,
    alpha: float | Tensor = 0.12,
    optimizer: optim.Optimizer | None = None,
    mask: Any = None,
    update: bool | Tensor = True,
    **hyper: Unpack[GradNormOptions],
) -> tuple[GradNormState, GradNormInfo]:
    r"""GradNorm's weight update, from losses and gradient norms alone.

    Args:
        state: from `init_state`, made with the same optimizer.
        stats: from `measure`, `merge`, or made by the caller: `TaskStats(losses, grad_norms)`.
        alpha, optimizer, hyper: as in `gradnorm`.
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
        >>> state, info = gn.gradnorm_balance(state, stats, optimizer=gn.sgd(0.1), form="paper")
        >>> info.targets, state.weights
        (tensor([2., 2.]), tensor([0.7778, 1.2222]))
    """
    method = Guarded(_method(alpha, optimizer, **hyper), {"norm_ratios": hyper.get("norm_ratios")})
    return method.balance(state, stats, mask, update)


def _method(
    alpha: float | Tensor,
    optimizer: optim.Optimizer | None,
    *,
    norm_ratios: Any = None,
    form: Form = "invariant",
    floor: float | Tensor = 1e-8,
    burn_in: int | Tensor | None = None,
    initial_decay: float | Tensor = 1.0,
    every: int = 1,
) -> Algorithm1:
    """Algorithm 1, its hyperparameters checked."""
    if not isinstance(alpha, Tensor) and not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha={alpha} must be at least 0: 0 aims at equal norms, 1.5 is the paper's for NYUv2")
    if not isinstance(floor, Tensor) and not 0 < floor < 1:
        raise ValueError(f"floor={floor} is relative to the mean weight and must lie in (0, 1)")
    if burn_in is not None and not isinstance(burn_in, Tensor) and not (burn_in >= 0 and burn_in % 1 == 0):
        raise ValueError(f"burn_in={burn_in} counts steps from 0: give a whole number, at least 0")
    if not isinstance(initial_decay, Tensor) and not 0 <= initial_decay <= 1:
        raise ValueError(f"initial_decay={initial_decay} must lie in [0, 1]; 1 keeps the first losses as L(0)")
    check_word("form", form, get_args(Form))
    check_every(every)
    if burn_in is not None:  # between its turns a state stays, so that the burn-in waits for the next one
        burn_in = -(-burn_in // every) * every
    return Algorithm1(alpha, optim.as_optimizer(optimizer), norm_ratios, form, floor, burn_in, initial_decay, every)
