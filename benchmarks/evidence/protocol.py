"""The protocol, the same for every method: a learning rate that is not at the edge of its grid, five paired seeds."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradnorm_func as gn

from .methods import Case, Method, Setting
from .problems import Problem

EVALUATIONS = 10  # during a run: its errors are those where the validation part's are lowest
DECAY = 0.01  # AdamW's, of weights but not of biases
FACTOR = 3.0  # from one learning rate to the next
FIRST_RATES = {"adam": [1e-3, 3e-3, 9e-3, 2.7e-2], "sgd": [1e-2, 3e-2, 9e-2, 0.27]}
EXTENSIONS = 6  # of the grid, by two learning rates each
WORST = 1e6  # an error that is larger, or NaN, counts as this


class Protocol(NamedTuple):
    """What is the same for all methods."""

    steps: int = 2000
    seeds: int = 5
    optimizer: str = "adam"
    compile: bool = False
    chunk_size: int | None = None


class Trials(NamedTuple):
    """Every run of a method: learning rates x settings x seeds."""

    rates: list[float]
    errors: dict[str, Tensor]  # "val", "test": (L, settings, seeds, evaluations, columns)
    weights: Tensor  # (L, settings, seeds, T) mean over the run


class Choice(NamedTuple):
    """One learning rate and one setting."""

    rate: int
    setting: int
    val: Tensor  # (seeds, columns)
    test: Tensor  # (seeds, columns)


def adamw(steps: int, lr: Any, path: str) -> gn.Optimizer:
    """AdamW whose learning rate falls to 0 as a cosine."""
    return gn.adam(cosine(steps, lr), weight_decay=DECAY if path.endswith("weight") else 0.0)


def sgd(steps: int, lr: Any, path: str) -> gn.Optimizer:
    """Plain gradient descent with the same schedule."""
    return gn.sgd(cosine(steps, lr))


def cosine(steps: int, lr: Any) -> Callable[[Tensor], Tensor]:
    return lambda t: lr * 0.5 * (1 + torch.cos(math.pi * t / steps))


def train(case: Case, method: Method, settings: list[Setting], rates: list[float], protocol: Protocol) -> Trials:
    """Runs every setting with every learning rate and seed, as one sweep."""
    problem, steps = case.problem, protocol.steps
    scale = problem.scale(case.condition)
    grid = [
        {"lr": rate * hyper.get("lr_factor", 1.0), "scale": scale, "seed": seed}
        | {name: value for name, value in hyper.items() if name != "lr_factor"}
        for rate in rates
        for setting in settings
        for seed, hyper in zip(case.seeds, setting.of_seed, strict=True)
    ]
    result: Any = gn.sweep(
        problem.params,
        problem.loss_fn,
        functools.partial(_batches, problem, steps),
        grid=grid,
        balancer=method.balancer,
        optimizer=functools.partial({"adam": adamw, "sgd": sgd}[protocol.optimizer], steps),
        metric=_columns(problem),
        metric_every=max(1, steps // EVALUATIONS),
        chunk_size=protocol.chunk_size,
        compile=protocol.compile,
        progress=False,
    )
    shape = (len(rates), len(settings), len(case.seeds))
    errors = {
        part: torch.stack(list(rows.values()), -1).nan_to_num(WORST).clamp(1e-12, WORST).unflatten(0, shape)
        for part, rows in result.metric_history.items()
    }
    return Trials(rates, errors, gn.mean_weights(result.history).unflatten(0, shape))


def _batches(problem: Problem, steps: int, seed: int) -> Any:
    return problem.batches(seed, steps)


def _columns(problem: Problem) -> Callable[[Any], Any]:
    """The errors as scalars, which is what a metric is made of."""
    return lambda params: {
        part: {f"{i:03}": row for i, row in enumerate(rows.unbind())} for part, rows in problem.errors(params).items()
    }


def choose(trials: Trials, setting: int | None, column: int | None) -> Choice:
    """The learning rate and the setting with the lowest mean log error on the validation part, over tasks and seeds;
    each run at its best evaluation. `setting` and `column` look at one of them alone."""
    val, test = trials.errors["val"], trials.errors["test"]
    if column is not None:
        val, test = val[..., column : column + 1], test[..., column : column + 1]
    at = val.log().mean(-1).argmin(-1)[..., None, None].expand(*val.shape[:3], 1, val.shape[-1])
    val, test = val.gather(3, at).squeeze(3), test.gather(3, at).squeeze(3)
    score = val.log().mean((-1, -2))  # (L, settings)
    if setting is not None:
        score = torch.where(torch.arange(score.shape[1]) == setting, score, math.inf)
    rate, best = divmod(int(score.argmin()), score.shape[1])
    return Choice(rate, best, val[rate, best], test[rate, best])


def choices(trials: Trials, method: Method) -> list[Choice]:
    """One for all tasks, or one for each task if they are trained alone."""
    if not method.alone:
        return [choose(trials, None, None)]
    return [choose(trials, i, i) for i in range(trials.weights.shape[-1])]


def joined(parts: list[Trials]) -> Trials:
    """All trials in the order of their learning rates."""
    rates = [rate for part in parts for rate in part.rates]
    order = sorted(range(len(rates)), key=rates.__getitem__)
    errors = {name: torch.cat([part.errors[name] for part in parts])[order] for name in ("val", "test")}
    return Trials([rates[i] for i in order], errors, torch.cat([part.weights for part in parts])[order])


def measure(case: Case, method: Method, protocol: Protocol) -> dict[str, Any]:
    """The record of one method in one case."""
    begin = time.perf_counter()
    settings = method.settings(case)
    trials = train(case, method, settings, FIRST_RATES[protocol.optimizer], protocol)
    for _ in range(EXTENSIONS):
        chosen = {choice.rate for choice in choices(trials, method)}
        low, high = min(trials.rates), max(trials.rates)
        more = [low / FACTOR**2, low / FACTOR] if 0 in chosen else []
        more += [high * FACTOR, high * FACTOR**2] if len(trials.rates) - 1 in chosen else []
        if not more:
            break
        trials = joined([trials, train(case, method, settings, more, protocol)])
    found = choices(trials, method)
    edges = {0, len(trials.rates) - 1}
    return {
        "tasks": case.problem.tasks,
        "settings": [settings[choice.setting].words for choice in found],
        "rates": [trials.rates[choice.rate] for choice in found],
        "at_edge": any(choice.rate in edges for choice in found),
        "trials": len(trials.rates) * len(settings),
        "val": torch.cat([choice.val for choice in found], 1).tolist(),
        "test": torch.cat([choice.test for choice in found], 1).tolist(),
        "weights": trials.weights[found[0].rate, found[0].setting].tolist(),
        "step_cost": None if method.alone else step_cost(case, method, settings[0]),
        "wall_s": round(time.perf_counter() - begin, 1),
    } | protocol._asdict()


def step_cost(case: Case, method: Method, setting: Setting, rounds: int = 7, steps: int = 5) -> float:
    """Time of an eager step of one run, without the optimizer, by that of equal weights, in turn in one process."""
    problem = case.problem
    params, batch = problem.params(0), next(problem.batches(0, 1))
    loss_fn = problem.loss_fn(torch.tensor(problem.scale(case.condition)))
    hyper = {name: torch.tensor(value) for name, value in setting.of_seed[0].items() if name != "lr_factor"}
    balancer = method.balancer if isinstance(method.balancer, gn.Balancer) else method.balancer(**hyper)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for equal in times:
            one: Any = gn.static() if equal else balancer
            state = one.init(len(problem.tasks))
            begin = time.process_time()
            for _ in range(steps):
                _, state, _ = one.grad(state, params, loss_fn, batch)
            times[equal].append(time.process_time() - begin)
    return round(statistics.median(times[False]) / statistics.median(times[True]), 2)
