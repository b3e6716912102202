"""Algorithm 1 of GradNorm (Chen et al., ICML 2018): four steps, on T numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._balance.seen import Seen
from gradnorm_func._core import optim, tree
from gradnorm_func._core.numerics import asked, brought
from gradnorm_func._core.tasks import per_task
from gradnorm_func._measure.plan import Needs

Form: TypeAlias = Literal["invariant", "log", "paper"]


class GradNormState(NamedTuple):
    """All that the next step needs, and nothing else."""

    weights: Tensor  # (T,) w_i > 0
    initial_losses: Tensor  # (T,) L_i(0); NaN until the task has been seen
    step: Tensor  # () int64: updates so far
    weight_sum: Tensor  # () what the weights are conserved to
    moments: Any  # state of the weights' optimizer


class GradNormInfo(NamedTuple):
    """What one would log of a step; all taken before the weights moved, which are `state.weights` for the next one."""

    losses: Tensor  # (T,) L_i; NaN for an absent task, as all its numbers but the weight
    weights: Tensor  # (T,) w_i of this step's total loss; 0 for an absent task
    grad_norms: Tensor  # (T,) ‖∇_W L_i‖, unweighted, so G_i = weights * grad_norms; exactly 0 hints at a wrong W
    targets: Tensor  # (T,) what G_i should be
    inverse_rates: Tensor  # (T,) r_i
    balance_loss: Tensor  # () Σ |G_i - target_i|
    total_loss: Tensor  # () Σ w_i L_i
    finite: Tensor = ()  # type: ignore[assignment]  # () bool, by the guard: False if the state was left as it was


class Algorithm1(NamedTuple):
    """The paper's algorithm, its hyperparameters bound. `step` is its page; masks and guards are elsewhere."""

    alpha: float | Tensor
    optimizer: optim.Optimizer
    norm_ratios: Any
    form: Form
    floor: float | Tensor
    burn_in: int | Tensor | None
    initial_decay: float | Tensor
    every: int
    needs: Needs = "norms"

    def known(self, state: GradNormState) -> Tensor | Callable[[Tensor], Tensor]:
        """The weights from before the step; a task that is seen for the first time is put into units of its loss."""
        _check_kind(state)
        if self.form != "invariant" or _all_seen(state.initial_losses):
            return state.weights
        unset = state.initial_losses.isnan()
        return lambda losses: torch.where(unset, state.weights / units_of(losses), state.weights)

    def step(self, state: GradNormState, seen: Seen, w: Tensor) -> tuple[GradNormState, GradNormInfo]:
        """Inverse rates, targets, gradient, renormalisation; w are the weights of this step's total loss."""
        initial_losses, rates = self.inverse_rates(state, seen)  # r_i = L̃_i / mean_j L̃_j, L̃_i = L_i / L_i(0)
        norms = w * seen.norms  # G_i = w_i ‖∇_W L_i‖
        targets = self.targets(norms, rates, seen)  # mean_j G_j · r_i^α
        gaps = norms - targets
        # L_grad = Σ_i |G_i − target_i|, targets constant: by w_i it gives sign(gap_i) n_i, by log w_i sign(gap_i) G_i
        sizes = seen.norms if self.form == "paper" else norms
        grad = torch.addcmul(0 * gaps, gaps.sign(), sizes)  # the sign of NaN is 0, and must not pass for no gap
        if self.form != "invariant":
            moved, moments = self.descended(state, w, grad, seen)
        else:  # on L_i / |L_i(0)|, the weights of which are w_i |L_i(0)|; G_i is the same
            units, new_units = self.units(state, initial_losses)
            moved, moments = self.descended(state, w * units, grad, seen)
            moved = moved / new_units
        new = GradNormState(moved, initial_losses, state.step, state.weight_sum, moments)
        return new, _info(seen, w, targets, rates, gaps)

    def keeps_first(self) -> bool:
        """Is L(0) the first loss, for ever?"""
        return self.burn_in is None and not isinstance(self.initial_decay, Tensor) and self.initial_decay == 1

    def units(self, state: GradNormState, initial_losses: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) |L_i(0)| before this step and after it, which are the same but where L(0) is taken anew."""
        after = initial_losses.abs() if initial_losses is state.initial_losses else units_of(initial_losses)
        if self.keeps_first():
            return after, after
        before = torch.where(state.initial_losses.isnan(), initial_losses, state.initial_losses)
        return units_of(before), after

    def inverse_rates(self, state: GradNormState, seen: Seen) -> tuple[Tensor, Tensor]:
        """L(0), of a task's first loss that is not 0, and r. With α = 0 rates are only reported."""
        losses, initial = seen.losses, state.initial_losses
        if self.keeps_first() and _all_seen(initial):
            ratios = losses / initial
        else:
            initial = self.taken(state, losses)
            ratios = _one_for_nan(losses / initial)
        return initial, _one_for_nan(ratios / seen.mean(ratios))

    def taken(self, state: GradNormState, losses: Tensor) -> Tensor:
        """(T,) L(0), where it is taken from this step, or moves with it."""
        initial = state.initial_losses
        unset = initial.isnan()
        if self.burn_in is not None:
            unset = unset | (state.step == self.burn_in)
        if isinstance(self.initial_decay, Tensor) or self.initial_decay != 1:
            decay = brought(self.initial_decay, losses)
            initial = torch.where(losses == 0, initial, torch.lerp(losses, initial, decay))
        return torch.where(unset & (losses != 0), losses, initial)

    def targets(self, norms: Tensor, rates: Tensor, seen: Seen) -> Tensor:
        """(T,) what the norms of the weighted gradients should be."""
        targets = seen.mean(norms) * force(rates, self.alpha)
        if self.norm_ratios is None:
            return targets
        ratios = _ratios(self.norm_ratios, norms)
        return targets * ratios / seen.mean(ratios)

    def descended(self, state: GradNormState, w: Tensor, grad: Tensor, seen: Seen) -> tuple[Tensor, Any]:
        """The weights w one step of their optimizer further, of the same sum; and its moments.

        `grad` is that by w in the paper's form, by log w in the others.
        """
        if seen.mask is not None:  # a task alone has nothing to be balanced with; its gap is rounding
            grad = torch.where(seen.mask & (seen.mask.sum() > 1), grad, 0.0)
        place = w if self.form == "paper" else w.log()
        step, moments = self.optimizer.update(grad, state.moments, place)
        # Shares of the sum. exp(log w + step), scaled in one, does not overflow, however large the step is.
        shares = (place + step) / state.weight_sum if self.form == "paper" else seen.softmax(place + step)
        shares = shares.clamp(min=self.floor / w.shape[0])
        budget = state.weight_sum if seen.mask is None else seen.sum(w)
        return shares * (budget / seen.sum(shares)), moments

    def report(self, state: GradNormState, seen: Seen, w: Tensor) -> GradNormInfo:
        """What a step would have aimed at, had its norms been measured."""
        _, rates = self.inverse_rates(state, seen)
        norms = w * seen.norms
        targets = self.targets(norms, rates, seen)
        return _info(seen, w, targets, rates, norms - targets)

    def absent(self, state: GradNormState) -> GradNormState:
        """What absent tasks keep: at the burn-in step no L(0) from before it, but that of their next loss."""
        if self.burn_in is None:
            return state
        anew = state.step == self.burn_in
        initial = torch.where(anew, torch.nan, state.initial_losses)
        if self.form == "invariant":
            units = units_of(state.initial_losses)
            state = state._replace(weights=torch.where(anew, state.weights * units, state.weights))
        return state._replace(initial_losses=initial)

    def check(self, state: GradNormState) -> None:
        """Refuses a state of another balancer or optimizer."""
        _check_kind(state)
        optim.check_moments(self.optimizer, state.weights, state.moments)


def _check_kind(state: Any) -> None:
    if not isinstance(state, GradNormState):
        raise ValueError(f"state is a {type(state).__name__}, not a GradNormState: make one with gn.init_state(T)")


def _all_seen(initial_losses: Tensor) -> bool:
    """Whether every task is known to have an L(0), and one that is not 0: where nobody may ask, none is."""
    return asked(initial_losses, lambda initial: all(abs(loss) > 0 for loss in initial.tolist()))


def units_of(losses: Tensor) -> Tensor:
    """|L|; a loss that is 0 or NaN has no unit, and counts as it is."""
    size = losses.abs()
    return torch.where(size > 0, size, 1.0)


def _one_for_nan(x: Tensor) -> Tensor:
    """Where nothing is known yet, or all tasks are solved, a ratio counts as 1."""
    return x.nan_to_num(1.0, torch.inf, -torch.inf)


def _info(seen: Seen, weights: Tensor, targets: Tensor, rates: Tensor, gaps: Tensor) -> GradNormInfo:
    balance_loss, total_loss = seen.sum(gaps.abs()), seen.dot(weights, seen.losses)
    return GradNormInfo(seen.losses, weights, seen.norms, targets, rates, balance_loss, total_loss)


def force(rates: Tensor, alpha: float | Tensor) -> Tensor:
    """r^α; with α = 0 it is 1 whatever r, which may be negative or NaN then."""
    if isinstance(alpha, Tensor):
        zero = alpha == 0
        return torch.where(zero, 1.0, torch.where(zero, 1.0, rates) ** alpha.to(rates.dtype))
    return torch.ones_like(rates) if alpha == 0 else rates**alpha


def _ratios(norm_ratios: Any, weights: Tensor) -> Tensor:
    rho = per_task(norm_ratios, "norm_ratios", weights)
    if not isinstance(norm_ratios, Tensor) and not all(
        isinstance(x, Tensor) or x > 0 for x in tree.flatten(tree.by_key(norm_ratios))[0]
    ):
        raise ValueError(f"norm_ratios={norm_ratios!r} must be positive")
    return rho
