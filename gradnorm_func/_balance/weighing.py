"""The passes of all methods that weigh the tasks: with weights from before the step, or from its own stats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from gradnorm_func._balance.guard import Guarded, due
from gradnorm_func._balance.passes import Goal, Job, Pass
from gradnorm_func._balance.seen import mask_vector, seen_of, without_absent
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.measure import stats_of, tasks_of
from gradnorm_func._measure.plan import Heads, Needs, OfLosses, Weights, plan_of
from gradnorm_func._measure.reach import require_shared
from gradnorm_func._reduce.stats import TaskStats, present


class Weighing(NamedTuple):
    """How a method that weighs the tasks goes over a batch."""

    guarded: Guarded
    where: Where
    same_step: bool
    heads: Heads
    extra: (
        Callable[[Any, Any, Any], Any] | None
    )  # (params, loss_fn, batch) -> means over examples, which no engine measures

    def known(self, state: Any, job: Job) -> Tensor | OfLosses | None:
        """The weights from before the step, if this step's stats do not choose them."""
        method = self.guarded.method
        if self.same_step and due(state, method.every, job.update) is not False:
            return None
        known = method.known(state)
        if isinstance(known, Tensor):
            return _of_active(known, job.mask)

        def of_losses(losses: Tensor) -> Tensor:
            seen = seen_of(state.weights, TaskStats(losses), job.mask)
            return _of_active(known(without_absent(seen).losses), job.mask)

        return OfLosses(of_losses)

    def weights(self, state: Any, stats: TaskStats, mask: Any) -> Tensor:
        """(T,) of this step's gradient, from its losses alone."""
        if self.same_step and (self.guarded.method.needs != "losses" or self.extra is not None):
            raise ValueError(
                "this method chooses its weights by the step's own gradients: measure those, and take info.weights of "
                "balance(state, stats)"
            )
        active = mask_vector(mask, state.weights)
        if self.same_step:
            info = self.guarded.balance(state, stats, active, True, applied=True)[1]
        else:
            info = self.guarded.balance(state, stats, active, False)[1]
        weights: Tensor = info.weights
        return weights

    def measure(self, state: Any, job: Job, batch: Any, goal: Goal, factors: Any, examples: float | None) -> Pass:
        """One pass through the engine that fits the loss."""
        still = goal == "second" or due(state, self.guarded.method.every, job.update) is False
        extra = self.extra(job.params, job.loss_fn, batch) if self.extra is not None and not still else ()

        def rule(stats: TaskStats) -> tuple[Tensor, Any]:
            decision = self.guarded.balance(state, stats._replace(extra=extra), job.mask, job.update, applied=True)
            return decision[1].weights, decision

        weights: Weights | None = rule if goal == "decide" else factors
        needs: Needs = "losses" if still or goal == "losses" else self.guarded.method.needs
        plan = plan_of(
            job.params,
            job.loss_fn,
            batch,
            self.where,
            weights,
            needs,
            heads=self.heads,
            merges=examples is not None,
            active=job.mask,
            whole_step=examples is None,
            **job.options,
        )
        stats, measured = stats_of(plan, 1.0 if examples is None else examples)
        self.guarded.check_names(tasks_of(plan, measured), state, mask=job.named_mask)
        if examples is None and present(stats.grad_norms):
            require_shared(plan, stats.grad_norms, state.step)
        return Pass(stats._replace(extra=extra), measured.aux, measured.decision)

    def decide(self, state: Any, stats: TaskStats, job: Job) -> tuple[Tensor, tuple[Any, Any]]:
        """The rule, asked once, about the whole."""
        new, info = self.guarded.balance(state, stats, job.mask, job.update, applied=True)
        return info.weights, (new, info)

    def balance(
        self, state: Any, stats: TaskStats, mask: Any, update: bool | Tensor, factors: Any = None
    ) -> tuple[Any, Any]:
        """The method itself, guarded."""
        known = factors if isinstance(factors, Tensor) and mask is None else None  # unmasked, they are the weights
        return self.guarded.balance(state, stats, mask, update, known=known)


def _of_active(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Absent tasks are no part of the sum."""
    return weights if mask is None else weights * mask
