"""How a method goes over a batch: in one pass, or in parts that are united before anything is decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypedDict

from torch import Tensor

from gradnorm_func._core.loss import LossFn
from gradnorm_func._measure.plan import OfLosses
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


# What a pass is for: losses or stats alone; the gradient too, with factors that are known; with factors that the method
# is to find within the pass; or, once they were found in a first round over the parts, the gradient alone.
Goal: TypeAlias = Literal["losses", "stats", "gradient", "decide", "second"]


class Passes(Protocol):
    """How a method goes over a batch. Factors are what the trunk's gradient is made with: weights, or more."""

    def known(self, state: Any, job: Job) -> Any:
        """The factors that are known before the pass, or `OfLosses`; None if only this step's stats give them."""

    def measure(self, state: Any, job: Job, batch: Any, goal: Goal, factors: Any, examples: float | None) -> Pass:
        """One pass; `examples` is the share of this part, None if it is the whole and nothing will be merged."""

    def decide(self, state: Any, stats: Any, job: Job) -> tuple[Any, Any]:
        """The factors that the stats of the whole give, and the decision, if one was made for them."""

    def balance(self, state: Any, stats: Any, mask: Any, update: bool | Tensor, factors: Any = None) -> tuple[Any, Any]:
        """The next state, from the stats of the whole; with the factors of the pass, if they were known before it."""

    def weights(self, state: Any, stats: Any, mask: Any) -> Tensor:
        """Those of this step's gradient, from the losses of the whole."""


def over_batch(passes: Passes, state: Any, job: Job, goal: Goal, factors: Any) -> Pass:
    """The stats of the whole batch and its aux: in one pass, or of the parts here and on all ranks."""
    if job.micro_batches is None and job.reduce is None:
        return passes.measure(state, job, job.batch, goal, factors, None)
    if isinstance(factors, OfLosses):  # of the whole, and so in a round of its own, which runs forwards only
        whole = _over_parts(passes, state, job, "losses", None).stats.losses
        outcome = _over_parts(passes, state, job, goal, factors.rule(whole))
        return outcome._replace(stats=outcome.stats._replace(losses=whole))
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
