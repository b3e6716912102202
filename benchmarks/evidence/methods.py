"""The rows of the tables: every method of the library, and the controls that a sceptic asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradnorm_func as gn

from .problems import Problem

TRIALS = 4  # settings of a method that is searched; the others have the search of the learning rate alone


class Setting(NamedTuple):
    """Hyperparameters of one trial, which may differ by seed."""

    words: str
    of_seed: list[dict[str, Any]]  # one for every seed


class Case(NamedTuple):
    """Where a method is to be run."""

    problem: Problem
    condition: str
    seeds: list[int]
    weights_of: Callable[[str], list[list[float]]]  # a method -> the mean weights of its run, (seeds, T)

    def same(self, words: str, **hyper: Any) -> Setting:
        """The same hyperparameters for every seed."""
        return Setting(words, [hyper] * len(self.seeds))


class Method(NamedTuple):
    """A balancer, and the settings among which the validation part chooses."""

    balancer: Any  # a Balancer, or a function of the hyperparameters of the settings
    settings: Callable[[Case], list[Setting]] = lambda case: [case.same("")]
    alone: bool = False  # is setting i for task i alone?


def equal_total() -> Any:
    """Equal weights, with the length of their sum's gradient at W held at 1: it balances nothing."""

    def rule(state: gn.State, seen: gn.Seen) -> tuple[Tensor, tuple[()]]:
        square = seen.sum(seen.gramian.sum(0))
        return torch.ones_like(state.weights) / (square.clamp(min=0).sqrt() + 1e-12), ()

    return gn.balancer(rule, needs="gramian", same_step=True)


def inverse_initial() -> Any:
    """Static weights 1 / L(0), of each run's first batch."""

    def rule(state: gn.State, seen: gn.Seen) -> tuple[Tensor, Tensor]:
        first = torch.where(state.memory.isnan(), seen.losses, state.memory)
        return 1 / first, first

    return gn.balancer(rule, needs="losses", same_step=True, memory=lambda w: torch.full_like(w, torch.nan))


def one_hot(case: Case) -> list[Setting]:
    count = len(case.problem.tasks)
    return [
        case.same(f"{task} alone", w=[float(i == j) for j in range(count)]) for i, task in enumerate(case.problem.tasks)
    ]


def finer_rates(case: Case) -> list[Setting]:
    """As many trials as a searched method has, all of them learning rates."""
    factors = [3 ** (i / TRIALS / 2) for i in range(TRIALS)]
    return [case.same(f"learning rate x {factor:.2f}", lr_factor=factor) for factor in factors]


def random_weights(case: Case) -> list[Setting]:
    draw = torch.Generator().manual_seed(0)
    count = len(case.problem.tasks)
    rows = [torch.ones(count)] + [(1.5 * torch.randn(count, generator=draw)).exp() for _ in range(TRIALS - 1)]
    return [case.same("w = " + " ".join(f"{w:.2g}" for w in row.tolist()), w=row.tolist()) for row in rows]


def inverse_variance(case: Case) -> list[Setting]:
    return [case.same("w = 1 / variance", w=[1 / scale for scale in case.problem.scale(case.condition)])]


def exported(name: str) -> Method:
    """Static weights, the mean of those that a method had in the run of the same seed."""

    def settings(case: Case) -> list[Setting]:
        return [Setting(f"mean weights of {name}", [{"w": row} for row in case.weights_of(name)])]

    return Method(static_of, settings)


def static_of(w: Tensor) -> Any:
    return gn.static(w)


def searched(name: str, values: list[float]) -> Callable[[Case], list[Setting]]:
    return lambda case: [case.same(f"{name} = {value:g}", **{name: value}) for value in values]


def sizes(case: Case) -> list[Setting]:
    """What a loss is where nothing is learned: 1, times its scale."""
    return [case.same("L(0) = the losses' sizes", sizes=case.problem.scale(case.condition))]


def with_sizes(sizes: Tensor) -> Any:
    """GradNorm that takes these for L(0), not the losses of the first batch."""
    balancer = gn.gradnorm()

    def init(num_tasks: Any, **start: Any) -> gn.GradNormState:
        return balancer.init(num_tasks, initial_losses=sizes, **start)

    return gn.Balancer(init, balancer._passes, balancer.every, balancer.needs)


EXPORT = "static from "  # and the name of a method

CONTROLS = {
    "single task": Method(static_of, one_hot, alone=True),
    "equal": Method(gn.static()),
    "equal, searched": Method(gn.static(), finer_rates),
    "equal, total held": Method(equal_total()),
    "1 / variance": Method(static_of, inverse_variance),
    "1 / L(0)": Method(inverse_initial()),
    "static, searched": Method(static_of, random_weights),
    "rlw": Method(gn.rlw()),
}
ALPHAS = searched("alpha", [0.0, 0.12, 0.5, 1.5])
GRADNORMS = {
    "gradnorm": Method(gn.gradnorm()),  # the default, whatever it is
    "gradnorm, L(0) given": Method(with_sizes, sizes),
    "gradnorm, as published": Method(gn.gradnorm(alpha=1.5, form="paper")),
    "gradnorm, searched": Method(lambda alpha: gn.gradnorm(alpha=alpha), ALPHAS),
    "gradnorm, as published, searched": Method(lambda alpha: gn.gradnorm(alpha=alpha, form="paper"), ALPHAS),
}
# Every other method of the library that weighs losses, by its defaults. RotoGrad's heads see a rotated representation
# and `ntk` takes residuals: they have benchmarks of their own.
OTHERS = ("fixed_ratio", "equal_norms", "uncertainty", "normalized", "geometric", "famo", "stch", "relobralo", "dwa")
OTHERS += ("mgda", "cagrad", "nash", "fairgrad", "aligned", "config", "imtl_g", "upgrad", "dualproj", "pcgrad")
EPOCH = {"dwa": 25, "stch": 25}  # steps whose losses count as one epoch, for methods that know epochs
METHODS = CONTROLS | GRADNORMS
for _name in OTHERS:
    if hasattr(gn, _name):
        METHODS[_name] = Method(getattr(gn, _name)(*([EPOCH[_name]] if _name in EPOCH else [])))


def method_of(name: str) -> Method:
    """A row by its name: of the table, "static from NAME", or an expression such as "gn.gradnorm(alpha=0.5)"."""
    if name in METHODS:
        return METHODS[name]
    if name.startswith(EXPORT):
        return exported(name.removeprefix(EXPORT))
    if "(" in name:
        return Method(eval(name, {"gn": gn, "torch": torch}))
    raise SystemExit(f"no method {name!r}: one of {', '.join(METHODS)}, {EXPORT}NAME, or 'gn.NAME(...)'")
