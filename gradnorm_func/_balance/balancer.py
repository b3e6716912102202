"""balancer: a method from its one rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._balance.guard import Guarded
from gradnorm_func._balance.protocol import Balancer
from gradnorm_func._balance.seen import Seen
from gradnorm_func._balance.start import NumTasks, start_weights
from gradnorm_func._balance.weighing import Weighing
from gradnorm_func._core import tree
from gradnorm_func._core.tree import Where
from gradnorm_func._measure.plan import HEADS, NEEDS, Heads, Needs, check_word


class State(NamedTuple):
    """What a simple method needs in the next step."""

    weights: Tensor  # (T,) w_i
    step: Tensor  # () int64: steps so far
    memory: Any = ()  # what the rule remembers


class Info(NamedTuple):
    """What one would log of a step."""

    losses: Tensor  # (T,) L_i; NaN for an absent task, as all its numbers but the weight
    weights: Tensor  # (T,) w_i that this step's gradient is made with; 0 for an absent task
    grad_norms: Tensor  # (T,) ‖∇_W L_i‖, unweighted; NaN where they were not measured
    total_loss: Tensor  # () Σ w_i L_i
    memory: Any  # what the rule remembers after this step
    finite: Tensor = ()  # type: ignore[assignment]  # () bool, by the guard: False if the state was left as it was


# (state, seen) -> (weights (T,), what to remember)
SimpleRule: TypeAlias = Callable[[State, Seen], tuple[Tensor, Any]]


def balancer(
    rule: SimpleRule,
    *,
    needs: Needs | Callable[[Any, Any, Any], Any] = "norms",
    same_step: bool = False,
    heads: Heads = "weighted",
    where: Where = None,
    every: int = 1,
    weights: Callable[[Tensor], Tensor] | None = None,
    memory: Callable[[Tensor], Any] | None = None,
    named: Mapping[str, Any] | None = None,
) -> Balancer[State, Info]:
    r"""A balancing method from its one rule; everything else is the same for all of them.

    Masks, absent tasks, steps that are not finite, frozen steps, dtypes, micro-batches, ranks and the Info stand once,
    here. The rule runs once a step, and the weights that Info reports are those that the gradient was made with.

    Args:
        rule: `rule(state, seen) -> (weights, memory)`, a pure function: the next weights, (T,), and what it wants to
            find in `state.memory` next time, a pytree of tensors. `seen` holds this step's stats (`gn.Seen`), of the
            present tasks: take sums and means by `seen.sum(x)` and `seen.mean(x)`.
        needs: what the rule looks at: "losses" (then a step costs what a plain one does), "norms", "example_norms" or
            "gramian"; or a function (params, loss_fn, batch) -> means over examples, which come as `seen.extra`.
        same_step: True if this step's gradient is to use the weights that this step's stats give, not those from
            before it. With `micro_batches` or `reduce` that takes two passes: stats first, then the gradient.
        heads: what the heads of a `multi_task_loss` learn from: "weighted", the sum Σ w_i L_i, or "own", each its own
            loss at weight 1, so that only what is shared gets the combination. A rule whose weights may be negative
            needs "own". A loss without a visible seam has no heads, and gets the sum everywhere.
        where: W, as in `measure`.
        every: the weights move in every k-th step only, and nothing is measured in between; a compiled step, which
            has no branches, measures always: give `update=t % k == 0` from outside, as `gn.train` does.
        weights: from (T,) ones to the weights before the first step; None leaves them at 1.
        memory: from the (T,) weights before the first step to the memory before it; None is `()`.
        named: arguments of the method that its user may give by name, {argument: value}: names are compared with those
            of the tasks.

    Returns:
        Balancer, the state of which is `gn.State` and the Info `gn.Info`. Its `init` takes `weights`, `dtype` and
        `device`.

    Raises:
        ValueError: for an `every` that is no number of steps, or another word for `needs` or `heads`.

    Example:
        >>> import torch, gradnorm_func as gn
        >>> def inverse_norm(mix=0.1):  # weights that make all gradient norms equal, with a moving average
        ...     def rule(state, seen):
        ...         inverse = 1 / seen.norms
        ...         return torch.lerp(state.weights, inverse / seen.mean(inverse), mix), ()
        ...     return gn.balancer(rule)
        >>> mine = inverse_norm()
        >>> loss_fn = lambda w, batch: {"a": w.square().sum(), "b": 3 * w.sum()}
        >>> grads, state, info = mine.grad(mine.init(2), torch.tensor([1.5, 2.0]), loss_fn, None)
        >>> grads
        tensor([6., 7.])
    """
    check_every(every)
    check_word("heads", heads, HEADS)
    if not callable(needs):
        check_word("needs", needs, NEEDS)
    extra = needs if callable(needs) else None
    kind: Needs = "losses" if callable(needs) else needs
    default = weights

    def init(
        num_tasks: NumTasks,
        *,
        weights: Any = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        start = start_weights(num_tasks, weights, dtype, device)
        if weights is None and default is not None:
            start = default(start)
        step = torch.zeros((), dtype=torch.int64, device=start.device)
        return State(start, step, () if memory is None else memory(start))

    method = Simple(rule, kind, every, memory, same_step)
    weighing = Weighing(Guarded(method, named or {}), where, same_step, heads, extra)
    return Balancer(init, weighing, every, kind)


class Simple(NamedTuple):
    """A rule, with the State and the Info that all simple methods share."""

    rule: SimpleRule
    needs: Needs
    every: int
    memory: Callable[[Tensor], Any] | None
    same_step: bool

    def check(self, state: State) -> None:
        """A state of another method has other fields, or worse, the same with another meaning."""
        if not isinstance(state, State):
            raise ValueError(
                f"state is a {type(state).__name__}, not a State: make one with the balancer's own init(T)"
            )
        expected = () if self.memory is None else self.memory(state.weights)
        if tree.flatten(expected)[1] != tree.flatten(state.memory)[1]:
            raise ValueError("the state was made by another balancer, for its memory is not this one's: use init(T)")

    def known(self, state: State) -> Tensor:
        """The weights from before the step."""
        return state.weights

    def step(self, state: State, seen: Seen, known: Tensor) -> tuple[State, Info]:
        """The rule, once."""
        weights, memory = self.rule(state, seen)
        weights = weights.to(state.weights.dtype)
        used = weights if self.same_step else known
        return State(weights, state.step, memory), self._info(seen, used, memory)

    def report(self, state: State, seen: Seen, known: Tensor) -> Info:
        """Nothing moves."""
        return self._info(seen, known, state.memory)

    def absent(self, state: State) -> State:
        """What absent tasks keep: all of it."""
        return state

    def _info(self, seen: Seen, weights: Tensor, memory: Any) -> Info:
        return Info(seen.losses, weights, seen.norms, seen.dot(weights, seen.losses), memory)


def check_every(every: int) -> None:
    """Refuses what is no number of steps."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r} must be a number of steps, at least 1")
