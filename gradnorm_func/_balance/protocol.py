"""Balancer: measure → reduce → balance, composed once for all methods."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, Unpack, overload

from torch import Tensor

from gradnorm_func._balance.guard import I, S
from gradnorm_func._balance.passes import Job, Passes, PassOptions, over_batch
from gradnorm_func._balance.seen import mask_vector
from gradnorm_func._balance.start import NumTasks
from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.numerics import all_finite, choose
from gradnorm_func._core.tree import Params
from gradnorm_func._measure.plan import Needs


class Balancer(Generic[S, I]):
    """A balancing method with its hyperparameters bound: four pure functions."""

    def __init__(self, init: Callable[..., S], passes: Passes, every: int = 1, needs: Needs = "norms") -> None:
        self._init, self._passes = init, passes
        self.needs: Needs = needs  # what its rule looks at: for `measure` and `measure_losses`, before `balance`
        self.every = every  # the weights move in every k-th step; what is compiled is told by `update=`

    def __repr__(self) -> str:
        guarded = getattr(self._passes, "guarded", None)
        maker = getattr(getattr(guarded, "method", None), "rule", self._init)  # what the method's function has defined
        *_, method = getattr(maker, "__qualname__", type(maker).__name__).split(".<locals>.")[:-1] or ["a rule"]
        method = maker.__module__.rpartition(".")[2] if method.startswith("_") else method
        where = getattr(self._passes, "where", None)
        shown = getattr(where, "__name__", type(where).__name__) if callable(where) else repr(where)
        return f"Balancer({method}, needs={self.needs!r}, where={shown}, every={self.every})"

    def init(self, num_tasks: NumTasks, **start: Any) -> S:
        """The state before the first step.

        Args:
            num_tasks: T, at least 2; or what says so and names the tasks: a `multi_task_loss`, the losses, the heads, a
                list of names.
            **start: what the method's own page says; for all of them `weights`, T positive numbers in task order or a
                dict by name, compared with the names of `num_tasks`, or else with those of the first step; `dtype`, the
                default one, made float32 if it is coarser; and `device`.

        Returns:
            The method's state, a NamedTuple of tensors.
        """
        return self._init(num_tasks, **start)

    def balance(self, state: S, stats: Any, *, mask: Any = None, update: bool | Tensor = True) -> tuple[S, I]:
        """The next state, from stats that were measured elsewhere: the last of measure → reduce → balance.

        Args:
            state: from `init`, or from the step before.
            stats: from `measure` or `measure_losses` with `needs=balancer.needs`, `merge`, `all_reduce`, or by hand.
            mask: the tasks present in this batch, (T,) bool or a pytree like the losses. Absent tasks keep their part
                of the state. A tensor that is False everywhere leaves the state as it was.
            update: False, or a 0-d bool tensor that is False, freezes the state.

        Returns:
            (state, info). If a loss, a norm or a new weight of a present task is not finite, the state is the old one,
            all of it, and `info.finite` is False.
        """
        _check_stats(state, stats)
        return self._passes.balance(state, stats, mask, update)

    def weights(self, state: S, stats: Any, *, mask: Any = None) -> Tensor:
        """The weights of this step's gradient, where its losses are enough to know them: for a loop with `backward()`.

        They are those of the state, but for methods that need the losses only, and for a task that GradNorm sees for
        the first time, whose weight is in units of its first loss.

        Args:
            state: from `init`, or from the step before.
            stats: the losses: `gn.measure_losses(losses, needs="losses")`, united over ranks by `all_reduce`.
            mask: as in `balance`.

        Returns:
            (T,) weights, 0 for absent tasks.

        Raises:
            ValueError: for a method whose weights are chosen by this step's gradients: `balance` has them.
        """
        _check_stats(state, stats)
        return self._passes.weights(state, stats, mask)

    @overload
    def grad(
        self,
        state: S,
        params: Params,
        loss_fn: LossFn,
        batch: Any,
        *,
        has_aux: Literal[False] = False,
        **options: Unpack[PassOptions],
    ) -> tuple[Params, S, I]: ...

    @overload
    def grad(
        self,
        state: S,
        params: Params,
        loss_fn: LossFn,
        batch: Any,
        *,
        has_aux: Literal[True],
        **options: Unpack[PassOptions],
    ) -> tuple[Params, S, I, Any]: ...

    def grad(
        self,
        state: S,
        params: Any,
        loss_fn: LossFn,
        batch: Any,
        *,
        has_aux: bool = False,
        **options: Unpack[PassOptions],
    ) -> Any:
        """What a training step needs, from one pass: the gradients of all parameters, and the next state.

        Args:
            state: from `init`, or from the step before.
            params: pytree of floating-point tensors. Nothing is written to it, and no graph is left on it.
            loss_fn: `loss_fn(params, batch) -> losses`, a (T,) tensor or a pytree of T scalars; a `multi_task_loss` is
                measured through its seam.
            batch: anything that `loss_fn` takes.
            has_aux: then `loss_fn` returns (losses, aux), and aux comes last in what this function returns.
            mask, update: as in `balance`. `update=False` costs what a plain step costs.
            micro_batches: cut every tensor of the batch along its first axis into that many parts, measure one at a
                time, and balance once: exact if the losses are means over examples and no layer looks across them
                (batch norm). Parts may differ by one example; if the tensors are of several lengths (a PINN's points),
                the number must divide them all. Other leaves and 0-d tensors go into every part. aux is then a list,
                one entry for each part.
            reduce: stats -> stats, applied once before balancing: `gn.all_reduce` for data parallelism, and
                `partial(gn.all_reduce, group=group)` for a process group. Every rank weighs as much as it has examples,
                the tensors of its batch being of one length; otherwise all weigh the same. `mask` is that of the whole.
            vectorize, chunk_size, loss_scale: as in `measure`. With a `loss_scale` the gradients come back multiplied
                by it, and a step in which any of them is not finite changes nothing.

        Returns:
            (grads, state, info): gradients in the structure of params, the next state, and what one would log. With
            `has_aux`, (grads, state, info, aux).

        Raises:
            ValueError: as `measure` and `balance` do.
        """
        job = _job(state, params, loss_fn, batch, has_aux, options)
        factors = self._passes.known(state, job)
        outcome = over_batch(self._passes, state, job, "decide" if factors is None else "gradient", factors)
        stats = outcome.stats
        new: Any
        info: Any
        new, info = outcome.decision or self._passes.balance(
            state, stats._replace(grads=()), job.mask, job.update, factors
        )
        if job.mask is not None or job.options.get("loss_scale") is not None:
            # An absent loss may be NaN, but then 0 * NaN may have got into the gradients; and float16 may overflow in
            # the backbone alone, where no norm shows it.
            sound = all_finite(tree.flatten(stats.grads)[0])
            new, info = choose(sound, new, state), info._replace(finite=info.finite & sound)
        return (stats.grads, new, info, outcome.aux) if has_aux else (stats.grads, new, info)

    @overload
    def update(
        self,
        state: S,
        params: Params,
        loss_fn: LossFn,
        batch: Any,
        *,
        has_aux: Literal[False] = False,
        **options: Unpack[PassOptions],
    ) -> S: ...

    @overload
    def update(
        self,
        state: S,
        params: Params,
        loss_fn: LossFn,
        batch: Any,
        *,
        has_aux: Literal[True],
        **options: Unpack[PassOptions],
    ) -> tuple[S, Any]: ...

    def update(
        self,
        state: S,
        params: Any,
        loss_fn: LossFn,
        batch: Any,
        *,
        has_aux: bool = False,
        **options: Unpack[PassOptions],
    ) -> Any:
        """The next state alone, for those who take the gradient of Σ w_i L_i themselves.

        Args:
            state, params, loss_fn, batch, has_aux: as in `grad`.
            **options: those of `grad`.

        Returns:
            The next state; with `has_aux`, (state, aux).

        Raises:
            ValueError: as `measure` and `balance` do.
        """
        job = _job(state, params, loss_fn, batch, has_aux, options)
        if job.update is False and not has_aux:
            return state
        outcome = over_batch(self._passes, state, job, "stats", None)
        new, _ = self.balance(state, outcome.stats, mask=job.mask, update=job.update)
        return (new, outcome.aux) if has_aux else new


def _check_stats(state: Any, stats: Any) -> None:
    """Refuses what is no state, and what is no stats."""
    if hasattr(state, "losses") and hasattr(stats, "weights"):
        raise ValueError(f"state={type(state).__name__}, stats={type(stats).__name__}: the order is (state, stats)")
    if not hasattr(stats, "losses"):
        raise ValueError(f"stats={type(stats).__name__}: give gn.measure_losses(losses, z, needs=balancer.needs)")
    if not hasattr(state, "weights"):
        raise ValueError(f"state={type(state).__name__} has no weights: the order is (state, stats)")


def _job(state: Any, params: Any, loss_fn: LossFn, batch: Any, has_aux: bool, options: Mapping[str, Any]) -> Job:
    """The arguments of a step, sorted."""
    if not isinstance(getattr(state, "weights", None), Tensor):
        raise ValueError(
            f"state={type(state).__name__} has no weights: the order of arguments is (state, params, loss_fn, batch)"
        )
    unknown = [name for name in options if name not in PassOptions.__annotations__]
    if unknown:
        near = difflib.get_close_matches(unknown[0], PassOptions.__annotations__, n=1) or sorted(
            PassOptions.__annotations__
        )
        raise TypeError(f"{unknown[0]!r} is no option of a step; did you mean {' or '.join(map(repr, near))}?")
    of_pass = {name: options[name] for name in ("vectorize", "chunk_size", "loss_scale") if name in options}
    return Job(
        params,
        loss_fn,
        batch,
        mask_vector(options.get("mask"), state.weights),
        options.get("mask"),
        options.get("update", True),
        options.get("micro_batches"),
        options.get("reduce"),
        {"has_aux": has_aux, **of_pass},
    )
