"""RotoGrad: one rotation of the representation per task, so that the task gradients agree (Javaloy & Valera 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._core.loss import LossFn, task_vector
from gradnorm_func._reduce.micro import split
from gradnorm_func._rotograd.balance import RotoGradInfo
from gradnorm_func._rotograd.balance import balance as balanced
from gradnorm_func._rotograd.measure import RotoGradStats, bind, check_state, run
from gradnorm_func._rotograd.merge import in_parts
from gradnorm_func._rotograd.scale import Hyper, RotoGradState, hyperparameters


def rotograd_init_state(
    num_tasks: int,
    rotation_shape: int | tuple[int, ...],
    *,
    rotations: Tensor | None = None,
    initial_losses: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **hyper: Any,
) -> RotoGradState:
    r"""The state before the first step.

    Args:
        num_tasks: T, at least 2.
        rotation_shape: as in `rotograd`.
        rotations: (T, m, m) to start from, such as `random_rotations(T, m)`; None is the identity for all tasks.
        initial_losses: L(0), T numbers or a pytree like the losses; None takes them from the first batch.
        dtype: of the rotations and all that is computed from the gradients; the default dtype if None.
        device: where the state lives.
        **hyper: those of `rotograd`; what matters here is `scale`, `moving` and the optimizers.

    Returns:
        RotoGradState.

    Raises:
        ValueError: for fewer than two tasks, rotations of a wrong shape or not orthogonal, or bad hyperparameters.

    Example:
        >>> import gradnorm_func as gn
        >>> gn.rotograd_init_state(3, 16).rotations.shape
        torch.Size([3, 16, 16])
    """
    return _init(num_tasks, hyperparameters(rotation_shape, **hyper), rotations, initial_losses, dtype, device)


def rotograd_balance(
    state: RotoGradState, stats: RotoGradStats, *, mask: Any = None, update: bool | Tensor = True, **hyper: Any
) -> tuple[RotoGradState, RotoGradInfo]:
    r"""The rotations' step, and the weights', from what a pass or several merged ones have found.

    Args:
        state: from `rotograd_init_state`.
        stats: from `rotograd_measure` or `rotograd_merge`.
        mask, update: as in `rotograd_grad`.
        **hyper: as in `rotograd`; `rotation_shape` is that of the state unless given.

    Returns:
        (state, info). If a loss or gradient of a present task is not finite, the state is the old one, all of it, and
        `info.finite` is False.

    Raises:
        ValueError: as `rotograd` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(lambda w, x: x * w, [lambda w, z, x: z[0, 0], lambda w, z, x: z[0, 1]])
        >>> state = gn.rotograd_init_state(2, 2)
        >>> stats = gn.rotograd_measure(state, torch.ones(2), loss_fn, torch.ones(1, 2))
        >>> state, info = gn.rotograd_balance(state, stats)
        >>> info.cosines
        tensor([[1., 0.],
                [0., 1.]])
    """
    return balanced(state, stats, bind(state, hyper), mask, update)


def rotograd(rotation_shape: int | tuple[int, ...], **hyper: Any) -> Balancer:
    r"""RotoGrad with its hyperparameters bound: rotate, scale, or both.

    Head k sees :math:`r_k = R_k z`. With :math:`g_k = \partial L_k / \partial z = R_k^\top \partial L_k/\partial r_k`
    over the whole batch and :math:`u_k = g_k / \|g_k\|`, the rotations descend

    .. math:: L_\mathrm{rot}^k = -\sum_n \langle R_k^\top \tilde g_{n,k}, v_n \rangle, \qquad
              \tilde g_k = \partial L_k / \partial r_k, \quad v = \tfrac1K \sum_k u_k,

    both constant; never a task's loss. Heads get the gradients of their own losses, and the backbone that of
    :math:`\sum_k f_k g_k`, where `scale` chooses f:

    - `"none"`, rotations only: :math:`f_k = 1`.
    - `"rotograd"`, the ICLR paper's: :math:`C \sum_k u_k` with :math:`C = \sum_k \alpha_k \|g_k\|` and
      :math:`\alpha_k \propto \|g_k\| / \|g_k(0)\|`, summing to 1.
    - `"gradnorm"`, RotoGradNorm: learned weights :math:`w = K\,\mathrm{softmax}(\lambda)` that descend
      :math:`\sum_k |w_k \|g_k\| - \bar G r_k^\alpha|` with :math:`\bar G = \mathrm{mean}_k w_k \|g_k\|`.

    Args:
        rotation_shape: the axes of z that are rotated, before the trailing ones: one number m for the first m
            features of one axis (all of them, or m ≪ d), or several for axes that are rotated as one.
        trailing_shape: the axes behind them, each position of which is rotated alike:
            `rotograd(64, trailing_shape=(8, 8))` for the channels of an image.
        rotate: the path of the tensor to rotate, where z is a pytree of several. The others reach every head as they
            are, and their gradients count in all norms.
        scale: "rotograd", "none" or "gradnorm".
        form: "paper", or a published version to agree with step by step. "0.1.6" (and 0.1.5): v times
            :math:`2 \|\mathrm{mean}_k g_k\|`, and :math:`\bar G = \|\mathrm{mean}_k w_k g_k\|`. "0.1.2": also
            :math:`v = \tfrac1K \sum_k u_k \|\bar g\| r_k^\alpha`, the loss a mean over the batch, and in
            RotoGradNorm the softmax's sum held constant; it had no "rotograd" scale, and normalised losses by default.
        map: "cayley", :math:`(I + A/2)(I - A/2)^{-1}`, or "exp", from skew matrices to rotations.
        moving: True moves the base point along, :math:`R \leftarrow R\,\mathrm{map}(A)`: the gradient at A = 0 is the
            skew part, and no derivative of the map is needed. False is the published :math:`R = R(0)\,\mathrm{map}(A)`
            with A trained. Both start alike, and Adam's moments are those of A in either.
        alpha: GradNorm's restoring force, for `scale="gradnorm"`, and that of form "0.1.2".
        normalize: differentiate L_k / L_k(0) in place of L_k. Rates r_k always use it.
        burn_in: the step (counted from 0) at which L(0) and ‖g(0)‖ are taken anew; None is never.
        cooperative: from this step on (a number or a 0-d tensor) the rotations also descend their task's loss: both
            gradients, each scaled to the norm of their mean, added. None is never. From 0.1.2 to 0.1.4.
        optimizer: of the rotations; None is Adam at 5e-4, the paper's best on MNIST. Its learning rate may be a
            schedule: the theory asks for one that falls faster than the network's.
        weight_optimizer: of λ; None is Adam at 0.025.
        backbone_loss: `backbone_loss(params, z, batch) -> scalar`, a loss on the backbone alone, which is neither
            rotated nor scaled, but normalised if `normalize`.

    Returns:
        Balancer(init, update, grad, balance). `init(num_tasks, *, rotations=None, initial_losses=None, dtype=None,
        device=None)`; `balance` takes RotoGradStats.

    Raises:
        ValueError: for hyperparameters out of range.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(  # two heads that want opposite things of z
        ...     lambda w, x: x * w, [lambda w, z, x: (z - 1).square().sum(), lambda w, z, x: (z + 1).square().sum()]
        ... )
        >>> method, w, x = gn.rotograd(2, optimizer=gn.adam(0.05)), torch.ones(2), torch.tensor([[0.2, 0.1]])
        >>> state = method.init(2)
        >>> for _ in range(100):
        ...     grads, state, info = method.grad(state, w, loss_fn, x)
        >>> bool(info.head_cosines[0, 1] < 0), bool(info.cosines[0, 1] > 0.9)
        (True, True)

    Source: Javaloy & Valera, "RotoGrad: Gradient Homogenization in Multitask Learning", ICLR 2022, and the package
    rotograd 0.1.2 and 0.1.6. Departures: rotations start at the identity, those of the package at
    `random_rotations`; a task without gradient counts as 0 where it is divided by.
    """
    bound = hyperparameters(rotation_shape, **hyper)

    def init(
        num_tasks: int,
        *,
        rotations: Tensor | None = None,
        initial_losses: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> RotoGradState:
        return _init(num_tasks, bound, rotations, initial_losses, dtype, device)

    def measured(
        state: RotoGradState, params: Any, loss_fn: LossFn, batch: Any, *, micro_batches: int | None, reduce: Any,
        update: bool | Tensor, **options: Any,
    ) -> tuple[RotoGradStats, Any]:  # fmt: skip
        if micro_batches is None and reduce is None:
            return run(state, params, loss_fn, batch, bound, moments=update is not False, **options)
        check_state(state)
        stats, aux = in_parts(state, params, loss_fn, split(batch, micro_batches), bound, reduce=reduce, **options)
        return stats, aux[0] if micro_batches is None else aux

    def grad(
        state: RotoGradState, params: Any, loss_fn: LossFn, batch: Any, *, mask: Any = None,
        update: bool | Tensor = True, micro_batches: int | None = None, reduce: Any = None, has_aux: bool = False,
    ) -> Any:  # fmt: skip
        stats, aux = measured(
            state, params, loss_fn, batch,
            micro_batches=micro_batches, reduce=reduce, update=update, mask=mask, has_aux=has_aux,
        )  # fmt: skip
        state, info = balanced(state, stats, bound, mask, update)
        return (stats.grads, state, info, aux) if has_aux else (stats.grads, state, info)

    def update(
        state: RotoGradState, params: Any, loss_fn: LossFn, batch: Any, *, mask: Any = None,
        update: bool | Tensor = True, micro_batches: int | None = None, reduce: Any = None, has_aux: bool = False,
    ) -> Any:  # fmt: skip
        check_state(state)
        if update is False and not has_aux:
            return state
        stats, aux = measured(
            state, params, loss_fn, batch,
            micro_batches=micro_batches, reduce=reduce, update=update, mask=mask, has_aux=has_aux, grads=False,
        )  # fmt: skip
        state, _ = balanced(state, stats, bound, mask, update)
        return (state, aux) if has_aux else state

    def balance(
        state: RotoGradState, stats: RotoGradStats, *, mask: Any = None, update: bool | Tensor = True
    ) -> tuple[RotoGradState, RotoGradInfo]:
        return balanced(state, stats, bound, mask, update)

    return Balancer(init, update, grad, balance)


def rotograd_grad(
    state: RotoGradState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    mask: Any = None,
    update: bool | Tensor = True,
    micro_batches: int | None = None,
    reduce: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
    **hyper: Any,
) -> Any:
    r"""What a training step needs, from one pass: the gradients of all parameters, and the new rotations.

    The gradients are those at the rotations of the state, from before this step.

    Args:
        state: from `rotograd_init_state`.
        params, batch, has_aux: as in `measure`.
        loss_fn: a `multi_task_loss` with a backbone; its heads get R_k z for z.
        mask: the tasks present in this batch, (T,) bool or a pytree like the losses. The others keep their rotations
            and weights, and do not count in the mean.
        update: False, or a 0-d bool tensor that is False, freezes the state.
        micro_batches, reduce: as in `gradnorm_grad`. Every part is run twice then, for the backbone's factors need the
            norms of the whole batch; `reduce` is applied to the RotoGradStats of the first run and to TaskStats that
            hold the gradients of the second, both of which `gn.all_reduce` takes.
        **hyper: as in `rotograd`; `rotation_shape` is that of the state unless given.

    Returns:
        (grads, state, info): gradients in the structure of params, the new RotoGradState, and RotoGradInfo.
        With `has_aux`, (grads, state, info, aux).

    Raises:
        ValueError: for a loss_fn without a seam, a rotation_shape that does not fit z, a wrong number of tasks, a
            state from other hyperparameters, and as `rotograd` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(lambda w, x: x * w, [lambda w, z, x: z[0, 0], lambda w, z, x: 3 * z[0, 1]])
        >>> grads, state, info = gn.rotograd_grad(
        ...     gn.rotograd_init_state(2, 2), torch.ones(2), loss_fn, torch.ones(1, 2), scale="none")
        >>> grads
        tensor([1., 3.])
    """
    method = rotograd(hyper.pop("rotation_shape", _size(state)), **hyper)
    return method.grad(
        state, params, loss_fn, batch,
        mask=mask, update=update, micro_batches=micro_batches, reduce=reduce, has_aux=has_aux,
    )  # fmt: skip


def rotograd_update(
    state: RotoGradState,
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    *,
    mask: Any = None,
    update: bool | Tensor = True,
    micro_batches: int | None = None,
    reduce: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
    **hyper: Any,
) -> Any:
    r"""The new state alone, without the pass through the backbone.

    Args:
        As in `rotograd_grad`.

    Returns:
        RotoGradState; with `has_aux`, (state, aux).

    Raises:
        ValueError: as `rotograd_grad` does.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(lambda w, x: x * w, [lambda w, z, x: z[0, 0], lambda w, z, x: 3 * z[0, 1]])
        >>> int(gn.rotograd_update(gn.rotograd_init_state(2, 2), torch.ones(2), loss_fn, torch.ones(1, 2)).step)
        1
    """
    method = rotograd(hyper.pop("rotation_shape", _size(state)), **hyper)
    return method.update(
        state, params, loss_fn, batch,
        mask=mask, update=update, micro_batches=micro_batches, reduce=reduce, has_aux=has_aux,
    )  # fmt: skip


def rotograd_accumulate(
    state: RotoGradState,
    params: Any,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    exact: bool = True,
    num_examples: Iterable[float] | None = None,
    mask: Any = None,
    update: bool | Tensor = True,
    **hyper: Any,
) -> tuple[Any, RotoGradState, RotoGradInfo]:
    r"""One step from several micro-batches.

    The rotations move as on the whole batch in either form, for their gradient is linear in the cross moments. The
    backbone's factors f are not: `exact` takes them from the norms of the whole batch and runs every micro-batch a
    second time; otherwise every micro-batch uses the factors of its own norms. Without scale (`scale="none"`) and
    with the learned weights of "gradnorm" both are the same, but for `normalize` at the steps that take L(0).

    Args:
        state, params, loss_fn, mask, update: as in `rotograd_grad`.
        batches: the micro-batches; losses must be means over examples.
        exact: two passes; False is one.
        num_examples: of each micro-batch, if they are not of one size.
        **hyper: as in `rotograd_grad`.

    Returns:
        (grads, state, info), as `rotograd_grad` on the whole batch.

    Raises:
        ValueError: as `rotograd_grad` does, and for no micro-batches.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> loss_fn = gn.multi_task_loss(
        ...     lambda w, x: x * w, [lambda w, z, x: z.sum(-1).mean(), lambda w, z, x: z.square().sum(-1).mean()]
        ... )
        >>> state, w, x = gn.rotograd_init_state(2, 3), torch.ones(3), torch.eye(3)
        >>> whole = gn.rotograd_grad(state, w, loss_fn, x)
        >>> parts = gn.rotograd_accumulate(state, w, loss_fn, [x[:1], x[1:]], num_examples=[1, 2])
        >>> torch.allclose(whole[0], parts[0]), torch.allclose(whole[1].rotations, parts[1].rotations)
        (True, True)
    """
    parts = list(batches)
    counts = [1.0] * len(parts) if num_examples is None else list(num_examples)
    bound = bind(state, hyper)
    pairs = list(zip(parts, counts, strict=True))
    stats, _ = in_parts(state, params, loss_fn, pairs, bound, mask=mask, exact=exact)
    return (stats.grads, *balanced(state, stats, bound, mask, update))


def _size(state: Any) -> int:
    check_state(state)
    return int(state.rotations.shape[-1])


def _init(
    num_tasks: int,
    hyper: Hyper,
    rotations: Tensor | None,
    initial_losses: Any,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> RotoGradState:
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 2:
        raise ValueError(f"num_tasks={num_tasks!r}: there is nothing to align with fewer than two tasks")
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point dtype")
    shape = (num_tasks, hyper.layout.size, hyper.layout.size)
    eye = torch.eye(shape[-1], dtype=dtype, device=device)
    if rotations is None:
        start = eye.repeat(num_tasks, 1, 1)
    else:
        if rotations.shape != shape:
            raise ValueError(f"rotations has shape {tuple(rotations.shape)}; these tasks and features need {shape}")
        start = rotations.detach().to(dtype=dtype, device=device).clone(memory_format=torch.contiguous_format)
        if not bool(torch.linalg.matrix_norm(start.mT @ start - eye).max() < 1e-3):
            raise ValueError("rotations must be orthogonal; see gn.random_rotations")
    losses = torch.full((num_tasks,), torch.nan, dtype=dtype, device=device)
    if initial_losses is not None:
        losses = task_vector(initial_losses, "initial_losses").detach().to(dtype=dtype, device=device, copy=True)
        if losses.shape[0] != num_tasks:
            raise ValueError(f"initial_losses has {losses.shape[0]} entries, but num_tasks={num_tasks}")
    ones, nan = torch.ones_like(losses), torch.full((), torch.nan, dtype=dtype, device=device)
    flat = torch.zeros_like(start)
    return RotoGradState(
        rotations=start,
        base=() if hyper.moving else start.clone(),
        tangents=() if hyper.moving else flat,
        moments=hyper.optimizer.init(flat),
        weights=ones,
        weight_moments=hyper.weight_optimizer.init(ones) if hyper.scale == "gradnorm" else (),
        initial_losses=losses,
        initial_norms=torch.full_like(losses, torch.nan),
        initial_backbone_loss=nan,
        step=torch.zeros((), dtype=torch.int64, device=device),
    )
