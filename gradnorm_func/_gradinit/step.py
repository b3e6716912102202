"""GradInit: learn the scale of every parameter before training starts (Zhu et al., NeurIPS 2021)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.numerics import choose
from gradnorm_func._core.tracing import no_graph
from gradnorm_func._core.tree import Where
from gradnorm_func._gradinit.leaves import bias_places, leaves_of, rescaled
from gradnorm_func._gradinit.objective import objective_of
from gradnorm_func._gradinit.problem import Problem
from gradnorm_func._gradinit.rescale_adam import AnyOptimizer, pair_of
from gradnorm_func._gradinit.scales import bounds, moved
from gradnorm_func._gradinit.settings import DEFAULT_ETA, DEFAULT_GAMMA, Form, Settings, or_default
from gradnorm_func._gradinit.state import GradInitInfo, GradInitState, check_moments, check_state
from gradnorm_func._measure.tape import fresh_casts


def gradinit_step(
    state: GradInitState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    batch_after: Any = None,
    form: Form = "paper",
    p: int = 2,
    gamma: float | Tensor | None = None,
    eta: float | Tensor | None = None,
    normalize: bool = True,
    where: Where = None,
    frozen: Where = None,
    optimizer: AnyOptimizer | None = None,
    min_scale: float = 0.01,
    min_bias_scale: float = 0.0,
    max_scale: float | None = None,
    biases: Where = None,
    weights: Any = None,
    loss_scale: float | Tensor | None = None,
) -> tuple[GradInitState, GradInitInfo]:
    r"""One step of GradInit: the scales m of :math:`\theta_m = (m_i \theta^0_i)_i` descend

    .. math:: \begin{cases}
        \|g\|_p, \quad g = \nabla L(S; \theta_m) & \text{if } \|g\|_p > \gamma \\
        L(\tilde S;\, \theta_m - \eta A) / \eta & \text{otherwise (form="paper")} \\
        L(S; \theta_m) & \text{otherwise (form="simple")}
        \end{cases}

    with A, the first step of the optimizer that training will use, held constant: :math:`g / \|g\|_2` for SGD
    (p = 2), sign(g) for Adam (p = 1). The first case needs a second derivative, :math:`H(\theta_m) A`; it is one
    pullback of the gradient, and A is its cotangent.

    Eager on a CPU, only the case that counts is run. Elsewhere both are and one is selected, so that no step waits for
    the device and any of them compiles into one graph. In the simple form the second case costs nothing, for g is there
    already; in the paper's, one more gradient (compiled for a CPU it is run only where it counts).

    Args:
        state: from `gradinit_init_state`, made with the same optimizer.
        params: pytree of floating-point tensors, :math:`\theta^0`: the same in every step. Nothing is written to it.
            A tensor that stands at several paths is one parameter with one scale (inside `vmap` it cannot be told:
            tie it in loss_fn).
        loss_fn: `loss_fn(params, batch)`, a scalar, or T losses as in `measure`. A model is evaluated as it stands:
            switch dropout off; let batch norm use the batch's statistics (train mode, through `functional`).
        batch: S.
        batch_after: S̃, the batch that judges the simulated step; the authors let it share half of its examples
            with S. None is S itself. The simple form has no use for it.
        form: "paper", or "simple", the form of the gradinit package.
        p: 2 if training will use SGD, 1 for Adam.
        gamma: the threshold γ > 0: below it the loss is minimised instead of the norm. None is 1 for p = 2 and 1000
            for p = 1, the authors' values; a 1-norm grows with the number of parameters.
        eta: η > 0, the learning rate of the simulated step. None is 0.1 for p = 2 and 1e-3 for p = 1.
        normalize: False makes A = g for p = 2.
        where: what gets a scale, by dotted path prefix, a list of them, or a predicate on the path. None is all.
        frozen: what training will not touch: it gets no scale, and its gradient does not count. None is nothing.
        optimizer: of the scales: `rescale_adam(...)`, `adam(...)`, or any (init, update) pair; None is
            `rescale_adam()`, at 0.01.
        min_scale: smallest scale of a weight, >= 0.
        min_bias_scale: smallest scale of a bias, >= 0. (The gradinit package uses 0.01 for all.)
        max_scale: largest scale of anything, or None.
        biases: what is a bias, in the form of `where`; None is every path whose last part contains "bias".
        weights: of T losses, T numbers or a pytree like the losses; None is 1 each.
        loss_scale: factor on the loss against underflow in half precision. A parameter whose scaled gradient is not
            finite is then left out of the norm.

    Returns:
        (state, info). If the loss, the norm or a scale's gradient is not finite, the state is the old one and
        `info.finite` is False. A scale whose gradient is exactly 0 is left alone with its moments, as for a
        parameter that is zero or that the batch does not touch.

    Raises:
        ValueError: for γ or η not positive, p other than 1 or 2, an unknown form or path, params that are empty or
            not floating point, a state made for other params or another optimizer, a loss that is not scalar.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> params, loss_fn = torch.full((3,), 8.0), lambda w, x: (x @ w - 1).square().mean()
        >>> state = gn.gradinit_init_state(params)
        >>> state, info = gn.gradinit_step(state, params, loss_fn, torch.eye(3))
        >>> info.above, info.grad_norm, state.scales
        (tensor(True), tensor(8.0829), tensor([0.9900]))

    Source: Zhu et al. 2021, Algorithm 1, and the code of its authors; `form="simple"` is gradinit 0.1.1. Departures:
    a zero gradient moves nothing, even with momentum; attention runs on its plain kernel, the only one of torch's
    that has a second derivative.
    """
    settings = Settings(
        form=form,
        p=p,
        gamma=or_default(gamma, DEFAULT_GAMMA, p),
        eta=or_default(eta, DEFAULT_ETA, p),
        normalize=normalize,
        min_scale=min_scale,
        min_bias_scale=min_bias_scale,
        max_scale=max_scale,
        loss_scale=loss_scale,
    ).checked()
    optimizer = pair_of(optimizer)
    leaves = leaves_of(params, where, frozen)
    check_state(state, len(leaves.initial))
    check_moments(state, optimizer)
    compiling = torch.compiler.is_compiling()
    # torch's fused attention kernels have no second derivative.
    with no_graph(), sdpa_kernel(SDPBackend.MATH), nullcontext() if compiling else fresh_casts():
        current = rescaled(leaves.initial, leaves.first, state.scales)
        problem = Problem(loss_fn, leaves, state.scales, current, weights, 1.0 if loss_scale is None else loss_scale)
        goal = objective_of(problem, batch, batch_after, settings)
        new = moved(state, goal, optimizer, *bounds(state.scales, bias_places(params, biases), settings))
        finite = (
            goal.loss.isfinite() & goal.grad_norm.isfinite() & goal.value.isfinite() & goal.scale_grads.isfinite().all()
        )
        info = GradInitInfo(goal.loss, goal.grad_norm, goal.above, goal.value, state.scales, goal.scale_grads, finite)
        return choose(finite, new, state), info
