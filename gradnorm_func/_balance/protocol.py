"""measure → reduce → balance, composed once for all balancers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core.loss import LossFn, task_vector, wrong_count
from gradnorm_func._core.tree import Where, flatten, inside_transform, tree_map
from gradnorm_func._measure.measure import measure
from gradnorm_func._measure.plan import Weights
from gradnorm_func._reduce.micro import as_params, split
from gradnorm_func._reduce.stats import TaskStats, merge

# from the stats of a batch to those of the batches of all ranks: `all_reduce`, or any other
Reduce: TypeAlias = Callable[[TaskStats], TaskStats]


class Balancer(NamedTuple):
    """A balancing method with its hyperparameters bound: four pure functions."""

    init: Callable[..., Any]  # init(num_tasks, ...) -> state
    # `...` are micro_batches, reduce, has_aux, vectorize and chunk_size, as in `gradnorm_grad`.
    update: Callable[..., Any]  # update(state, params, loss_fn, batch, *, mask, update, ...) -> state
    grad: Callable[..., Any]  # grad(state, params, loss_fn, batch, *, mask, update, ...) -> (grads, state, info)
    balance: Callable[..., Any]  # balance(state, stats, *, mask, update) -> (state, info)


def balancer(
    init: Callable[..., Any],
    balance: Callable[..., Any],
    *,
    where: Where = None,
    norms: bool = True,
    same_step: bool = False,
) -> Balancer:
    r"""A balancing method from its two pure functions; everything else is the same for all of them.

    Args:
        init: `init(num_tasks, *, dtype=None, device=None) -> state`, a NamedTuple of tensors with a field `weights`,
            (T,).
        balance: `balance(state, stats, *, mask=None, update=True) -> (state, info)`; `info` is a NamedTuple of
            tensors with a field `weights`. See `mask_vector` for what `mask` may be.
        where: W, as in `measure`.
        norms: False if the method looks at losses only: then a step costs what a plain one does.
        same_step: True if this step's gradient is to use the weights that this step's stats give, not those from
            before it. With `micro_batches` or `reduce` that takes two passes: norms first, then the gradient.

    Returns:
        Balancer(init, update, grad, balance).

    Example:
        >>> import torch, gradnorm_func as gn
        >>> from typing import NamedTuple
        >>> class State(NamedTuple):
        ...     weights: torch.Tensor  # (T,)
        >>> class Info(NamedTuple):
        ...     losses: torch.Tensor  # (T,)
        ...     weights: torch.Tensor  # (T,)
        >>> def inverse_norm(mix=0.1):  # weights that make all gradient norms equal, with a moving average
        ...     def init(num_tasks, *, dtype=None, device=None):
        ...         return State(torch.ones(num_tasks, dtype=dtype, device=device))
        ...     def balance(state, stats, *, mask=None, update=True):
        ...         inverse = 1 / stats.grad_norms
        ...         goal = inverse * len(inverse) / inverse.sum()
        ...         new = State(state.weights + mix * (goal - state.weights))
        ...         return (new if update else state), Info(stats.losses, state.weights)
        ...     return gn.balancer(init, balance)
        >>> mine = inverse_norm()
        >>> loss_fn = lambda w, batch: {"a": w.square().sum(), "b": 3 * w.sum()}
        >>> grads, state, info = mine.grad(mine.init(2), torch.tensor([1.5, 2.0]), loss_fn, None)
        >>> grads
        tensor([6., 7.])
    """

    def grad(
        state: Any, params: Any, loss_fn: LossFn, batch: Any, *, mask: Any = None, update: bool | Tensor = True,
        micro_batches: int | None = None, reduce: Reduce | None = None, has_aux: bool = False,
        loss_scale: float | Tensor | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        _check_order(state)
        present = mask_vector(mask, state.weights)
        wanted = norms and update is not False

        def effective(weights: Tensor) -> Tensor:
            return weights if present is None else weights * present

        def weights_now(losses: Tensor, grad_norms: Any, example_norms: Any) -> Tensor:
            seen = TaskStats(losses, grad_norms, example_norms)
            return effective(balance(state, seen, mask=mask, update=update)[1].weights)

        def over_batch(weights: Weights, norms: bool) -> tuple[TaskStats, Any]:
            return _measured(
                params, loss_fn, batch, micro_batches, reduce, weights=weights, where=where, norms=norms,
                has_aux=has_aux, loss_scale=loss_scale, **keywords,
            )  # fmt: skip

        if not (same_step and wanted):
            stats, aux = over_batch(effective(state.weights), wanted)
        elif micro_batches is None and reduce is None:
            stats, aux = over_batch(weights_now, True)
        else:  # the weights are known only once all parts have been seen
            stats, _ = over_batch(None, True)
            second, aux = over_batch(weights_now(stats.losses, stats.grad_norms, stats.example_norms), False)
            stats = stats._replace(grads=second.grads)
        new, info = balance(state, stats._replace(grads=()), mask=mask, update=update)
        if present is not None or loss_scale is not None:
            # An absent loss may be NaN, but then 0 * NaN may have got into the gradients; and float16 may overflow in
            # the backbone alone, where no norm shows it.
            sound = torch.stack([leaf.isfinite().all() for leaf in flatten(stats.grads)[0]]).all()
            new = choose(sound, new, state)
            info = info._replace(finite=info.finite & sound) if hasattr(info, "finite") else info
        return (stats.grads, new, info, aux) if has_aux else (stats.grads, new, info)

    def update(
        state: Any, params: Any, loss_fn: LossFn, batch: Any, *, mask: Any = None, update: bool | Tensor = True,
        micro_batches: int | None = None, reduce: Reduce | None = None, has_aux: bool = False,
        loss_scale: float | Tensor | None = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        _check_order(state)
        if update is False and not has_aux:
            return state
        stats, aux = _measured(
            params, loss_fn, batch, micro_batches, reduce, where=where, norms=norms and update is not False,
            has_aux=has_aux, loss_scale=loss_scale, **keywords,
        )  # fmt: skip
        state, _ = balance(state, stats, mask=mask, update=update)
        return (state, aux) if has_aux else state

    return Balancer(init, update, grad, balance)


def _measured(
    params: Any,
    loss_fn: LossFn,
    batch: Any,
    micro_batches: int | None,
    reduce: Reduce | None,
    *,
    has_aux: bool,
    **plan: Any,
) -> tuple[TaskStats, Any]:
    """The stats of the whole batch and its aux: in one pass, or of the parts here and on all ranks."""

    def one(part: Any, **keywords: Any) -> tuple[TaskStats, Any]:
        out = measure(params, loss_fn, part, has_aux=has_aux, **plan, **keywords)
        return out if has_aux else (out, ())

    if micro_batches is None and reduce is None:
        return one(batch, norms_only=True)
    stats, auxes = None, []
    for part, examples in split(batch, micro_batches):
        found, aux = one(part, num_examples=examples)
        stats = found if stats is None else merge(stats, found)
        auxes.append(aux)
    assert stats is not None
    if reduce is not None:
        stats = reduce(stats)
        if not isinstance(stats, TaskStats):
            raise ValueError(f"reduce returned {type(stats).__name__}; it must be a function TaskStats -> TaskStats")
    stats = stats._replace(grads=as_params(stats.grads, params))
    return stats, auxes[0] if micro_batches is None else auxes


def mask_vector(mask: Any, weights: Tensor) -> Tensor | None:
    """The tasks present in a batch as a (T,) bool tensor: from one, a sequence, or a pytree like the losses."""
    if mask is None:
        return None
    vector: Tensor = mask
    if not isinstance(mask, Tensor):
        # An entry that is a tensor is not looked at, for that would wait for the device.
        if not any(isinstance(entry, Tensor) or bool(entry) for entry in flatten(mask)[0]):
            raise ValueError(f"mask={mask!r} leaves no task: skip this batch, or pass update=False")
        vector = task_vector(mask, "mask")
    if vector.shape != weights.shape:
        raise ValueError(f"mask has shape {tuple(vector.shape)}, but there are {weights.shape[0]} tasks")
    return vector.to(device=weights.device, dtype=torch.bool)


def here_of(state: Any, mask: Any) -> Tensor:
    """(T,) bool: the tasks present, all of them without a mask."""
    present = mask_vector(mask, state.weights)
    return torch.ones_like(state.weights, dtype=torch.bool) if present is None else present


def weighted_total(weights: Tensor, losses: Tensor, here: Tensor) -> Tensor:
    """Σ w_i L_i over the tasks that are here; an absent loss may be NaN."""
    return torch.where(here, weights * losses, 0.0).sum()


def vectors(state: Any, stats: TaskStats, *, needed: bool) -> tuple[Tensor, Tensor]:
    """Losses and gradient norms of stats as (T,), as the weights are; NaN for norms not measured, if not needed."""
    weights: Tensor = state.weights
    losses = constant(task_vector(stats.losses, dtype=weights.dtype).to(weights))
    if losses.shape != weights.shape:
        raise ValueError(wrong_count(losses.shape[0], weights.shape[0]))
    if isinstance(stats.grad_norms, tuple) and stats.grad_norms == ():
        if needed:
            raise ValueError("stats has no grad_norms: measure(..., norms=True) takes them, update=False needs none")
        return losses, torch.full_like(losses, torch.nan)
    norms = constant(task_vector(stats.grad_norms, "grad_norms", weights.dtype).to(weights))
    if norms.shape != weights.shape:
        raise ValueError(f"grad_norms has {norms.shape[0]} entries, but there are {weights.shape[0]} tasks")
    return losses, norms


def constant(x: Tensor) -> Tensor:
    """Without the graph that a caller's own losses may hang on, which L(0) would keep alive for ever."""
    return x if inside_transform() else x.detach()


def check_state(state: Any, kind: type, maker: str) -> None:
    """A state of another balancer has other fields, or worse, the same with another meaning."""
    if not isinstance(state, kind):
        raise ValueError(f"state is a {type(state).__name__}, not a {kind.__name__}: make one with {maker}")


def _check_order(state: Any) -> None:
    if not isinstance(getattr(state, "weights", None), Tensor):
        raise ValueError(
            f"state={type(state).__name__} has no weights: the order of arguments is (state, params, loss_fn, batch)"
        )


def choose(ok: Tensor, new: Any, old: Any) -> Any:
    """`new` where ok, else `old`, leaf by leaf and without asking the device."""
    return tree_map(lambda a, b: torch.where(ok, a, b), new, old)
