"""GradInit: learn the scale of every parameter before training starts (Zhu et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradnorm_func._core import optim, tree
from gradnorm_func._core.loss import LossFn, task_vector
from gradnorm_func._core.numerics import choose, full_precision
from gradnorm_func._core.tracing import inside_transform
from gradnorm_func._core.tree import Where
from gradnorm_func._gradinit.rescale_adam import ScaleOptimizer, rescale_adam


def quiet():
    from contextlib import nullcontext

    return nullcontext if inside_transform() else torch.no_grad


def vjp_aux(fn, *primals):
    out, pull, aux = torch.func.vjp(fn, *primals, has_aux=True)
    like = tree.flatten(out)[0][0]

    def pulled(cotangents, **options):
        with full_precision(like):
            return pull(cotangents, **options)

    return out, pulled, aux


AnyOptimizer: TypeAlias = ScaleOptimizer | optim.Optimizer | None


class GradInitState(NamedTuple):
    """All that the next step needs; the parameters themselves stay as they are."""

    scales: Tensor  # (P,) m_i, one for each leaf of params, in leaf order (sorted keys)
    moments: Any  # state of the scales' optimizer


class GradInitInfo(NamedTuple):
    """What one would log of a step; all taken before the scales moved."""

    loss: Tensor  # () L(S; θ_m)
    grad_norm: Tensor  # () ‖∇L(S; θ_m)‖_p
    above: Tensor  # () bool: grad_norm > γ, so the norm was descended, and not the loss
    objective: Tensor  # () what was descended
    scales: Tensor  # (P,) m_i
    scale_grads: Tensor  # (P,) ∂ objective / ∂ m_i; 0 for what is not scaled
    finite: Tensor  # () bool: False means that the state was left as it was


def gradinit_init_state(params: Any, *, optimizer: AnyOptimizer = None) -> GradInitState:
    r"""The state before the first step: every scale 1.

    Args:
        params: pytree of floating-point tensors, the initial parameters :math:`\theta^0`.
        optimizer: of the scales, as in `gradinit_step`; the same one must be given to the steps.

    Returns:
        GradInitState on the device of params, in their widest dtype, but at least float32.

    Raises:
        ValueError: for params that are empty or not floating point.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> gn.gradinit_init_state({"weight": torch.randn(3, 2), "bias": torch.zeros(3)}).scales
        tensor([1., 1.])
    """
    tree.check_params(params)
    leaves, _ = tree.flatten(params)
    dtype = reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
    scales = torch.ones(len(leaves), dtype=dtype, device=leaves[0].device)
    return GradInitState(scales, (rescale_adam() if optimizer is None else optimizer).init(scales))


def gradinit_update(state: GradInitState, params: Any, loss_fn: LossFn, batch: Any, **keywords: Any) -> GradInitState:
    r"""One step of GradInit: the new state alone.

    Args:
        state, params, loss_fn, batch, keywords: as in `gradinit_step`.

    Returns:
        The new GradInitState.

    Raises:
        ValueError: as `gradinit_step` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> params, loss_fn = torch.full((3,), 8.0), lambda w, x: (x @ w - 1).square().mean()
        >>> state = gn.gradinit_init_state(params)
        >>> gn.gradinit_update(state, params, loss_fn, torch.eye(3)).scales
        tensor([0.9900])
    """
    return gradinit_step(state, params, loss_fn, batch, **keywords)[0]


def gradinit_step(
    state: GradInitState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    batch_after: Any = None,
    form: str = "paper",
    p: int = 2,
    gamma: float | Tensor | None = None,
    eta: float | Tensor | None = None,
    normalize: bool = True,
    where: Where = None,
    frozen: Where = None,
    optimizer: AnyOptimizer = None,
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

    Both cases are computed and one is selected, so that no step waits for the device and any of them compiles into
    one graph. In the simple form the second case costs nothing, for g is there already; in the paper's, one more
    gradient.

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
        gamma: γ > 0, the largest norm that is let be. None is 1 for p = 2 and 1000 for p = 1, the authors' values;
            a 1-norm grows with the number of parameters.
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
    gamma = (1.0 if p == 2 else 1000.0) if gamma is None else gamma
    eta = (0.1 if p == 2 else 1e-3) if eta is None else eta
    optimizer = rescale_adam() if optimizer is None else optimizer
    _check(state, params, form, p, gamma, eta, optimizer, min_scale, min_bias_scale, max_scale, loss_scale)
    leaves, treedef = tree.flatten(params)
    first = _first_places(leaves)
    chosen = {first[i] for i in tree.select(params, where)}
    still = set() if frozen is None else {first[i] for i in tree.select(params, frozen)}
    at = [i for i in range(len(leaves)) if first[i] == i and i not in still]  # what training will move
    if not chosen & set(at):
        raise ValueError(f"where={where!r} and frozen={frozen!r} leave nothing to scale: name less in frozen")
    silence = quiet()
    with silence():
        scaled = [state.scales[first[i]] * leaf for i, leaf in enumerate(leaves)]
    factor = 1.0 if loss_scale is None else loss_scale

    def loss_and_grads(moving: list[Tensor], data: Any) -> tuple[list[Tensor], Tensor]:
        def loss(moving: list[Tensor]) -> tuple[Tensor, Tensor]:
            filled = tree.replace(scaled, at, moving)
            value = _scalar(loss_fn(tree.unflatten(treedef, [filled[i] for i in first]), data), weights)
            return factor * value, value

        grads, (_, value) = grad_and_value(loss, has_aux=True)(moving)
        return list(grads), value

    def per_scale(grads: Sequence[Tensor]) -> Tensor:
        """∂/∂m_i = ⟨∂/∂θ_i, θ⁰_i⟩ for every leaf; a parameter at several paths has one and the same at all of them."""
        found = {i: _dot(grad, leaves[i], state.scales.dtype) for i, grad in zip(at, grads, strict=True) if i in chosen}
        zero = torch.zeros_like(state.scales[0])
        return torch.stack([found.get(i, zero) for i in first])

    # torch's fused attention kernels have no second derivative.
    with silence(), sdpa_kernel(SDPBackend.MATH):
        moving = [scaled[i] for i in at]
        grads, pull, loss = vjp_aux(lambda moving: loss_and_grads(moving, batch), moving)
        norm, cotangent = _norm(grads, p, None if loss_scale is None else factor)
        above = norm > gamma
        norm_grads = per_scale(pull(cotangent, retain_graph=False)[0]) / factor  # once only: let it free as it goes
        if form == "simple":
            objective, objective_grads = loss, per_scale(grads) / factor
        else:
            rate = eta if normalize or p == 1 else eta * norm
            moved = [leaf - rate * part for leaf, part in zip(moving, cotangent, strict=True)]
            data = batch if batch_after is None else batch_after

            def below(*moved: Tensor) -> tuple[Tensor, Tensor]:
                grads_after, after = loss_and_grads(list(moved), data)
                return after / eta, per_scale(grads_after) / (factor * eta)

            def nothing(*moved: Tensor) -> tuple[Tensor, Tensor]:
                return torch.zeros_like(norm), torch.zeros_like(state.scales)

            # Compiled for a CPU, where asking costs nothing, the branch that is not taken is not run either.
            if torch.compiler.is_compiling() and above.device.type == "cpu" and not inside_transform():
                objective, objective_grads = torch.cond(above, nothing, below, tuple(moved))
            else:
                objective, objective_grads = below(*moved)

        objective = torch.where(above, norm, objective)
        scale_grads = torch.where(above, norm_grads, objective_grads)
        finite = loss.isfinite() & norm.isfinite() & objective.isfinite() & scale_grads.isfinite().all()
        info = GradInitInfo(loss, norm, above, objective, state.scales, scale_grads, finite)
        change, moments = _change(optimizer, scale_grads, state, above)
        low, high = _bounds(params, state.scales, min_scale, min_bias_scale, max_scale, biases)
        bounded = torch.maximum(state.scales + change, low).clamp(max=high)
        # A bound is for what is scaled: it must not move what is frozen, or not touched yet.
        scales = torch.where(scale_grads != 0, bounded, state.scales)
        return choose(finite, GradInitState(scales, moments), state), info


def gradinit_apply(state: GradInitState, params: Any) -> Any:
    r"""The rescaled parameters, :math:`m_i \theta^0_i`.

    Args:
        state: the outcome of some steps.
        params: :math:`\theta^0`, as they were given to the steps.

    Returns:
        New tensors in the structure of params, with no graph attached; a tensor that stood at several paths still
        does.

    Raises:
        ValueError: if the state was made for other params.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> params = {"a": torch.ones(2), "b": torch.ones(2)}
        >>> state = gn.gradinit_init_state(params)._replace(scales=torch.tensor([2.0, 0.5]))
        >>> gn.gradinit_apply(state, params)
        {'a': tensor([2., 2.]), 'b': tensor([0.5000, 0.5000])}
    """
    _check_state(state, params)
    leaves, treedef = tree.flatten(params)
    silence = quiet()
    with silence():
        scaled = [state.scales[i] * leaf for i, leaf in enumerate(leaves)]
    return tree.unflatten(treedef, [scaled[i] for i in _first_places(leaves)])


def _first_places(leaves: Sequence[Tensor]) -> list[int]:
    """For every leaf, the index of the first one that is the same tensor: tied parameters are one."""
    seen: dict[int, int] = {}
    return [seen.setdefault(id(leaf), i) for i, leaf in enumerate(leaves)]


def _scalar(losses: Any, weights: Any) -> Tensor:
    """The loss to differentiate: the scalar itself, or Σ w_i L_i."""
    if isinstance(losses, Tensor) and losses.ndim == 0:
        if weights is not None:
            raise ValueError("weights is for T losses, but loss_fn returned one scalar: leave weights out")
        return losses
    vector = task_vector(losses)
    if weights is None:
        return vector.sum()
    w = task_vector(weights, "weights")
    if w.shape != vector.shape:
        raise ValueError(f"weights has {w.shape[0]} entries, but loss_fn returned {vector.shape[0]} losses")
    return (w.to(vector) * vector).sum()


def _norm(grads: Sequence[Tensor], p: int, factor: float | Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """‖g‖_p of g = grads / factor, and ∂‖g‖_p/∂g: g/‖g‖₂ or sign(g). With a factor, leaves not finite count as 0."""
    dtype = reduce(torch.promote_types, (grad.dtype for grad in grads), torch.float32)
    wide = [grad.to(dtype) for grad in grads]
    if factor is not None:
        wide = [torch.where(grad.isfinite().all(), grad / factor, 0.0) for grad in wide]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad, p) for grad in wide]), p)
    if p == 1:
        return norm, [part.sign().to(grad.dtype) for part, grad in zip(wide, grads, strict=True)]
    length = torch.where(norm > 0, norm, 1.0)
    return norm, [(part / length).to(grad.dtype) for part, grad in zip(wide, grads, strict=True)]


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.dot(a.flatten().to(dtype), b.flatten().to(dtype))


def _change(
    optimizer: ScaleOptimizer | optim.Optimizer, scale_grads: Tensor, state: GradInitState, above: Tensor
) -> tuple[Tensor, Any]:
    """The optimizer's step, and its new state; any optimizer is made to leave alone what has no gradient."""
    if isinstance(optimizer, ScaleOptimizer):
        return optimizer.update(scale_grads, state.moments, state.scales, above)
    change, moments = optimizer.update(scale_grads, state.moments, state.scales)
    moves = scale_grads != 0
    keep: Callable[[Tensor, Tensor], Tensor] = lambda new, old: (
        torch.where(moves, new, old) if new.shape == moves.shape else new
    )
    return change, tree.tree_map(keep, moments, state.moments)


def _bounds(
    params: Any, scales: Tensor, min_scale: float, min_bias_scale: float, max_scale: float | None, biases: Where
) -> tuple[Tensor, float]:
    """(P,) least scales, and the greatest."""
    if biases is None:
        at = [i for i, path in enumerate(tree.paths(params)) if "bias" in path.rsplit(".", 1)[-1]]
    else:
        at = tree.select(params, biases)
    # Filled on the device: a tensor made of a Python list would be a copy from the host that the host waits for.
    low = [torch.full_like(scales[0], min_bias_scale if i in at else min_scale) for i in range(scales.shape[0])]
    return torch.stack(low), float("inf") if max_scale is None else max_scale


def _check_state(state: Any, params: Any) -> None:
    if not isinstance(state, GradInitState):
        raise ValueError(f"state is a {type(state).__name__}, not a GradInitState: make one with gradinit_init_state")
    tree.check_params(params)
    count = len(tree.flatten(params)[0])
    if state.scales.shape != (count,):
        raise ValueError(
            f"state has {state.scales.shape[0]} scales, but params has {count} leaves: "
            "the state must come from gradinit_init_state(params) with the same params"
        )


def _check(
    state: Any,
    params: Any,
    form: str,
    p: int,
    gamma: float | Tensor,
    eta: float | Tensor,
    optimizer: ScaleOptimizer | optim.Optimizer,
    min_scale: float,
    min_bias_scale: float,
    max_scale: float | None,
    loss_scale: float | Tensor | None,
) -> None:
    _check_state(state, params)
    if form not in ("paper", "simple"):
        raise ValueError(f"form={form!r} must be 'paper' or 'simple'")
    if p not in (1, 2):
        raise ValueError(f"p={p!r} must be 2, if training will use SGD, or 1, for Adam")
    if not isinstance(gamma, Tensor) and not gamma > 0:
        raise ValueError(f"gamma={gamma} must be positive: it is the largest gradient norm that is let be")
    if not isinstance(eta, Tensor) and not eta > 0:
        raise ValueError(f"eta={eta} must be positive: it is the learning rate of the simulated step")
    if loss_scale is not None and not isinstance(loss_scale, Tensor) and not loss_scale > 0:
        raise ValueError(f"loss_scale={loss_scale} must be positive; None leaves it out")
    for name, value in (("min_scale", min_scale), ("min_bias_scale", min_bias_scale)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1]: every scale starts at 1")
    if max_scale is not None and not max_scale >= 1:
        raise ValueError(f"max_scale={max_scale} must be at least 1: every scale starts at 1; None sets no bound")
    expected = optimizer.init(state.scales)
    if tree.flatten(expected)[1] != tree.flatten(state.moments)[1]:
        raise ValueError(
            f"the state holds {type(state.moments).__name__}, but this optimizer keeps {type(expected).__name__}: "
            "give gradinit_init_state and the steps the same optimizer= (None is rescale_adam() in both)"
        )
