"""Balancer: measure → reduce → balance, composed once for all methods."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypedDict, Unpack, overload

import torch
from torch import Tensor

from gradnorm_func._balance.guard import I, S
from gradnorm_func._balance.seen import mask_vector
from gradnorm_func._balance.start import NumTasks
from gradnorm_func._core import tree
from gradnorm_func._core.loss import LossFn
from gradnorm_func._core.numerics import choose
from gradnorm_func._core.tree import Params
from gradnorm_func._reduce.micro import as_params, split
from gradnorm_func._reduce.stats import Stats, merge

# From the stats of a batch to those of the batches of all ranks: `all_reduce`, or any other.
Reduce = Callable[[Any], Any]


class PassOptions(TypedDict, total=False):
    """What `grad` and `update` of every balancer take."""

    mask: Any
    update: bool | Tensor
    micro_batches: int | None
    reduce: Reduce | None
    vectorize: bool
    chunk_size: int | None
    loss_scale: float | Tensor | None


class Job(NamedTuple):
    """One call of `grad` or `update`."""

    params: Any
    loss_fn: LossFn
    batch: Any
    mask: Tensor | None  # (T,) bool
    named_mask: Any  # as it was given, perhaps by name
    update: bool | Tensor
    micro_batches: int | None
    reduce: Reduce | None
    options: dict[str, Any]  # of a pass: has_aux, vectorize, chunk_size, loss_scale


class Pass(NamedTuple):
    """What a pass over a batch, or a part of it, has given."""

    stats: Any
    aux: Any
    decision: Any = ()  # (state, info), where the method's rule was asked within the pass


# What a pass is for: stats alone; the gradient too, with factors that are known; with factors that the method is to
# find within the pass; or, once they were found in a first round over the parts, the gradient alone.
Goal: TypeAlias = Literal["stats", "gradient", "decide", "second"]


class Passes(Protocol):
    """How a method goes over a batch. Factors are what the trunk's gradient is made with: weights, or more."""

    def known(self, state: Any, job: Job) -> Any:
        """The factors that are known before the pass; None if only this step's stats give them."""

    def measure(self, state: Any, job: Job, batch: Any, goal: Goal, factors: Any, examples: float | None) -> Pass:
        """One pass; `examples` is the share of this part, None if it is the whole and nothing will be merged."""

    def decide(self, state: Any, stats: Any, job: Job) -> tuple[Any, Any]:
        """The factors that the stats of the whole give, and the decision, if one was made for them."""

    def balance(self, state: Any, stats: Any, mask: Any, update: bool | Tensor) -> tuple[Any, Any]:
        """The next state, from the stats of the whole."""


class Balancer(Generic[S, I]):
    """A balancing method with its hyperparameters bound: four pure functions."""

    def __init__(self, init: Callable[..., S], passes: Passes, every: int = 1) -> None:
        self._init, self._passes = init, passes
        self.every = every  # the weights move in every k-th step; what is compiled is told by `update=`

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
            stats: from `measure`, `merge`, `all_reduce`, `measure_losses`, or made by hand.
            mask: the tasks present in this batch, (T,) bool or a pytree like the losses. Absent tasks keep their part
                of the state. A tensor that is False everywhere leaves the state as it was.
            update: False, or a 0-d bool tensor that is False, freezes the state.

        Returns:
            (state, info). If a loss, a norm or a new weight of a present task is not finite, the state is the old one,
            all of it, and `info.finite` is False.
        """
        return self._passes.balance(state, stats, mask, update)

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
        outcome = _over_batch(self._passes, state, job, "decide" if factors is None else "gradient", factors)
        stats = outcome.stats
        new: Any
        info: Any
        new, info = outcome.decision or self.balance(state, stats._replace(grads=()), mask=job.mask, update=job.update)
        if job.mask is not None or job.options.get("loss_scale") is not None:
            # An absent loss may be NaN, but then 0 * NaN may have got into the gradients; and float16 may overflow in
            # the backbone alone, where no norm shows it.
            sound = torch.stack([leaf.isfinite().all() for leaf in tree.flatten(stats.grads)[0]]).all()
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
        outcome = _over_batch(self._passes, state, job, "stats", None)
        new, _ = self.balance(state, outcome.stats, mask=job.mask, update=job.update)
        return (new, outcome.aux) if has_aux else new


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


def _over_batch(passes: Passes, state: Any, job: Job, goal: Goal, factors: Any) -> Pass:
    """The stats of the whole batch and its aux: in one pass, or of the parts here and on all ranks."""
    if job.micro_batches is None and job.reduce is None:
        return passes.measure(state, job, job.batch, goal, factors, None)
    first = _over_parts(passes, state, job, "stats" if goal == "decide" else goal, factors)
    if goal != "decide":
        return first
    # The factors are known only once all parts have been seen.
    factors, decision = passes.decide(state, first.stats, job)
    second = _over_parts(passes, state, job, "second", factors)
    return Pass(first.stats._replace(grads=second.stats.grads), second.aux, decision)


def _over_parts(passes: Passes, state: Any, job: Job, goal: Goal, factors: Any) -> Pass:
    stats: Stats | None = None
    auxes = []
    for part, examples in split(job.batch, job.micro_batches):
        one = passes.measure(state, job, part, goal, factors, examples)
        stats = merge(stats, one.stats) if job.micro_batches is not None else one.stats
        auxes.append(one.aux)
    assert stats is not None
    if job.reduce is not None:
        kind = type(stats)
        stats = job.reduce(stats)
        if not isinstance(stats, kind):
            raise ValueError(
                f"reduce returned {type(stats).__name__}; it must be a function {kind.__name__} -> {kind.__name__}"
            )
    stats = stats._replace(grads=as_params(stats.grads, job.params))
    return Pass(stats, auxes[0] if job.micro_batches is None else auxes)
