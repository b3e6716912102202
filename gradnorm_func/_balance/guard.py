"""What surrounds every method's mathematics: masks, frozen steps, turns, and steps that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from gradnorm_func._balance.seen import Seen, mask_vector, seen_of, without_absent
from gradnorm_func._balance.start import given_by_name
from gradnorm_func._core import tree
from gradnorm_func._core.numerics import brought, choose, column, full_precision
from gradnorm_func._core.tasks import check_named, refuse_cut_off, remembered_names
from gradnorm_func._core.tracing import free_to_ask, no_graph
from gradnorm_func._measure.plan import Needs
from gradnorm_func._reduce.stats import TaskStats, present

# A method's State, a NamedTuple with at least `weights` (T,) and `step`, and its Info, one with at least `losses`,
# `weights`, `grad_norms`, `total_loss` and `finite`.
S = TypeVar("S", bound=tuple[Any, ...])
I = TypeVar("I", bound=tuple[Any, ...])  # noqa: E741


class Method(Protocol):
    """A method's own part: pure functions of its state and of T numbers, and what it wants to know."""

    @property
    def needs(self) -> Needs:
        """What it looks at."""

    @property
    def every(self) -> int:
        """Its weights move in every k-th step."""

    def check(self, state: Any) -> None:
        """Refuses a state of another method or optimizer."""

    def known(self, state: Any) -> Tensor | Callable[[Tensor], Tensor]:
        """(T,) the weights of a gradient that the step's norms do not choose; or what makes them of its losses."""

    def step(self, state: Any, seen: Seen, known: Tensor) -> tuple[Any, Any]:
        """The next state but for its count of steps, and what to log."""

    def report(self, state: Any, seen: Seen, known: Tensor) -> Any:
        """What to log of a step in which nothing moves."""

    def absent(self, state: Any) -> Any:
        """The state before the step, as far as absent tasks keep it."""


class Guarded(NamedTuple):
    """A method, guarded."""

    method: Method
    named: Mapping[str, Any] = {}  # its arguments that may be given by name, which are compared with the tasks

    def balance(
        self,
        state: Any,
        stats: TaskStats,
        mask: Any,
        update: bool | Tensor,
        *,
        applied: bool = False,
        known: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """One step: all of it, or nothing of it where something is not finite.

        `applied`: are the weights that the rule gives those of a gradient? `known`: those of the gradient, where they
        have been asked for already.
        """
        method = self.method
        method.check(state)
        tasks = stats.losses if isinstance(stats.losses, Mapping) else remembered_names(stats.losses)
        if tasks is not None:
            self.check_names(tasks, state, grad_norms=stats.grad_norms, mask=mask)
        active = mask_vector(mask, state.weights)
        refuse_cut_off(stats.losses, active)
        with no_graph(), full_precision(state.weights):
            raw = seen_of(state.weights, stats, active)._replace(applied=applied)
            seen = without_absent(raw)
            turn = due(state, method.every, update)
            if known is None:
                weights = method.known(state)
                known = weights if isinstance(weights, Tensor) else weights(seen.losses)
            if turn is False:
                info = method.report(state, seen, known)
                new, ok = state, raw.finite(raw.losses)
            else:
                self._require(stats)
                new, info = method.step(state, seen, known)
                ok = raw.finite(*([raw.losses] if method.needs == "losses" else [raw.losses, raw.norms]), new.weights)
                if isinstance(turn, Tensor):  # a step whose turn it is not needs finite losses only
                    unmeasured = seen._replace(norms=torch.full_like(seen.norms, torch.nan))
                    ok = torch.where(turn, ok, raw.finite(raw.losses))
                    info = choose(turn, info, method.report(state, unmeasured, known))
            info = info._replace(finite=ok)
            if update is False:
                return state, shown(info, active)
            ok = accepted(ok, active, update)
            if info.weights is not known:  # a step that is refused, and an absent task, keep the old weights
                moves = ok if turn is True else ok & turn
                used = torch.where(moves if active is None else moves & active, info.weights, known)
                info = info._replace(weights=used, total_loss=seen.dot(used, seen.losses))
            return settled(new, state, ok, turn, active, method.absent), shown(info, active)

    def check_names(self, tasks: Any, state: Any, **of_step: Any) -> None:
        """Compares all that was given by name with the tasks: in this step, to the method, to a fresh state."""
        check_named(tasks, **of_step, **self.named)
        check_named(tasks, **given_by_name(state))

    def _require(self, stats: TaskStats) -> None:
        field = {"norms": "grad_norms", "example_norms": "grad_norms", "gramian": "gramian"}.get(self.method.needs)
        if self.method.needs == "example_norms" and present(stats.square_norms):  # at z, where there are some
            field = "example_norms"
        if field is not None and not present(getattr(stats, field)):
            raise ValueError(
                f"stats has no {field}: take them by measure(..., needs={self.method.needs!r}) or "
                "measure_losses(losses, z, needs=balancer.needs), or give update=False, which needs none"
            )


def due(state: Any, every: int, update: bool | Tensor) -> bool | Tensor:
    """Whether weights move in this step: known beforehand or, where asking would cost something, a tensor."""
    if update is False or every == 1:
        return update is not False
    turn = state.step % every == 0
    return bool(turn) if free_to_ask(turn) else turn


def accepted(finite: Tensor, active: Tensor | None, update: bool | Tensor) -> Tensor:
    """() bool: whether the state may become another."""
    ok = finite if active is None else finite & active.any()
    return ok if isinstance(update, bool) else ok & brought(update, ok)


def settled(
    new: Any, old: Any, ok: Tensor, turn: bool | Tensor, active: Tensor | None, absent: Callable[[Any], Any]
) -> Any:
    """The new state with its step counted, absent tasks as in `absent(old)`; all of the old one if it is refused."""
    if active is not None and turn is not False:
        new = _without_absent(active, new, absent(old))
    if isinstance(turn, Tensor):
        new = choose(turn, new, old)
    return choose(ok, new._replace(step=old.step + 1), old)


def shown(info: Any, active: Tensor | None) -> Any:
    """The Info, in which an absent task has the weight 0 and no other number."""
    if active is None:
        return info
    per_task = {
        name: torch.where(active, value, 0.0 if name == "weights" else torch.nan)
        for name, value in info._asdict().items()
        if name != "memory" and isinstance(value, Tensor) and value.shape == active.shape
    }
    return info._replace(**per_task)


def _without_absent(active: Tensor, new: Any, old: Any) -> Any:
    """The new state, with everything of the absent tasks as it was."""
    count = active.shape[0]

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(column(active, a), a, b) if a.ndim and a.shape[0] == count and a is not b else a

    return tree.tree_map(pick, new, old)
