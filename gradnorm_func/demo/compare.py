"""Equal weights, tuned static weights, GradNorm and fixed ratios on the six digit tasks, on equal terms.

For one seed all methods start from the same parameters and see the same batches. What is tuned is tuned on the
validation split with a seed of its own; the test split is looked at once, by the final runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradnorm_func as gn
from gradnorm_func.demo import digits, figure
from gradnorm_func.demo.progress import Progress

BATCH_SIZE = 64
LEARNING_RATE = 3e-3  # of the network, Adam's, the same for all methods
EVALUATION_PAIRS = 4000
ORDER = gn.task_names(digits.heads)  # of every per-task vector of the library
EQUAL, GRADNORM, FIXED = "equal weights", "GradNorm", "fixed ratio"
STATIC, INVERSE = "tuned static", "static 1/L(0)"  # with a search for the factors, and without one


class Settings(NamedTuple):
    """What the command line sets."""

    seeds: tuple[int, ...]
    steps: int
    trials: int  # search runs per tuned method
    alpha: float | None  # None: searched
    weight_lr: float


class Method(NamedTuple):
    """A balancer and how it starts."""

    name: str
    setting: str  # in words
    balancer: gn.Balancer[Any, Any]
    start: Callable[[gn.Balancer[Any, Any], Tensor], Any]  # (balancer, losses of the first batch) -> state


class Run(NamedTuple):
    """What is kept of one training."""

    errors: Tensor  # (T,) in the order of digits.METRICS
    history: Any  # Info over time, in the order of ORDER


class Result(NamedTuple):
    """One method, chosen on the validation split and run with every seed."""

    method: Method
    tried: int  # search runs that it took to choose the setting
    errors: Tensor  # (seeds, T) on the test split
    history: Any  # of the first seed


def fresh(balancer: gn.Balancer[Any, Any], losses: Tensor) -> Any:
    return balancer.init(len(losses))


def inverse(losses: Tensor) -> Tensor:
    """Weights 1 / L(0), scaled to a mean of 1: every weighted loss starts at the same size."""
    return len(losses) / losses / (1 / losses).sum()


def equal() -> Method:
    return Method(EQUAL, "w = 1", gn.static(where=digits.W, norms=True), fresh)  # norms: for the figure only


def static(name: str, factors: Tensor, setting: str) -> Method:
    """Weights in ratio to 1 / L(0), times a factor each."""

    def start(balancer: gn.Balancer[Any, Any], losses: Tensor) -> Any:
        return balancer.init(len(losses))._replace(weights=factors * inverse(losses))

    return Method(name, setting, gn.static(), start)


def gradnorm(alpha: float, weight_lr: float) -> Method:
    """GradNorm by its defaults, but for alpha and the rate of its weights."""
    balancer = gn.gradnorm(alpha=alpha, where=digits.W, optimizer=gn.adam(weight_lr))
    return Method(GRADNORM, f"alpha = {alpha:.3g}", balancer, fresh)


def fixed_ratio(ratios: Tensor, setting: str) -> Method:
    return Method(FIXED, setting, gn.fixed_ratio(ratios, where=digits.W), fresh)


def candidates(settings: Settings) -> list[list[Method]]:
    """For each tuned method its settings to try: the sensible guess first, then a spread around it."""
    n = settings.trials
    generator = torch.Generator().manual_seed(0)
    spread = [torch.ones(len(ORDER))] + [torch.randn(len(ORDER), generator=generator).exp() for _ in range(n - 1)]

    def say(guess: str, factors: Tensor) -> str:
        return guess if bool((factors == 1).all()) else f"{guess} x " + " ".join(f"{f:.2g}" for f in factors.tolist())

    alphas = [1.5 * (k / max(n - 1, 1)) ** 2 for k in range(n)] if settings.alpha is None else [settings.alpha]
    return [
        [static(STATIC if n > 1 else INVERSE, factors, say("1/L(0)", factors)) for factors in spread],
        [gradnorm(alpha, settings.weight_lr) for alpha in alphas],
        [fixed_ratio(factors, say("equal shares", factors)) for factors in spread],
    ]


def train(method: Method, data: digits.Digits, seed: int, steps: int, wrap: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """One training of one method: parameters, state, history. The seed alone decides over parameters and batches."""
    generator = torch.Generator().manual_seed(seed)
    params = digits.init_params(seed)
    first = digits.pairs(data, BATCH_SIZE, generator)

    def batches() -> Iterator[digits.Batch]:
        yield first
        for _ in range(steps - 1):
            yield digits.pairs(data, BATCH_SIZE, generator)

    losses = digits.loss_fn(params, first)
    state = method.start(method.balancer, torch.stack([losses[task] for task in ORDER]))
    run = gn.train(
        params,
        digits.loss_fn,
        wrap(batches()),
        balancer=method.balancer,
        state=state,
        optimizer=functools.partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True),
        progress=False,
    )
    return run.params, run.state, run.history


def change(errors: Tensor, reference: Tensor) -> Tensor:
    """Mean over the tasks of the relative change of the error, in %; below 0 is better than the reference."""
    return 100 * (errors / reference - 1).mean(-1)


def compare(settings: Settings) -> list[Result]:
    """Searches on the validation split, then runs every method with every seed and tests once."""
    data = digits.load()
    generator = torch.Generator().manual_seed(0)
    validation = digits.pairs(data["validation"], EVALUATION_PAIRS, generator)
    test = digits.pairs(data["test"], EVALUATION_PAIRS, generator)
    searches = candidates(settings)
    trials = [methods for methods in searches if len(methods) > 1]
    runs = bool(trials) + sum(map(len, trials)) + (1 + len(searches)) * len(settings.seeds)
    progress = Progress(runs, settings.steps)

    def run(method: Method, seed: int, split: digits.Batch, label: str) -> Run:
        wrap = functools.partial(progress.watch, label=f"{label}, {method.name} ({method.setting}), seed {seed}")
        params, _, history = train(method, data["train"], seed, settings.steps, wrap)
        return Run(digits.errors(params, split), history)

    try:
        chosen = [(equal(), 0)]
        if trials:
            held_out = search_seed_of(settings)
            reference = run(equal(), held_out, validation, "search").errors
        for methods in searches:
            if len(methods) == 1:
                chosen.append((methods[0], 0))
                continue
            scores = [float(change(run(m, held_out, validation, "search").errors, reference)) for m in methods]
            best = min(range(len(scores)), key=lambda k: scores[k] if math.isfinite(scores[k]) else math.inf)
            chosen.append((methods[best], len(methods)))
        results = []
        for method, tried in chosen:
            finals = [run(method, seed, test, "final") for seed in settings.seeds]
            results.append(Result(method, tried, torch.stack([r.errors for r in finals]), finals[0].history))
    finally:
        progress.close()
    return results


def search_seed_of(settings: Settings) -> int:
    """A seed that no final run uses."""
    return max(settings.seeds) + 1


def table(results: list[Result]) -> str:
    """Errors as mean ± standard deviation over the seeds, one column a method, and the change over equal weights."""
    rows = [["test error (lower is better)", "unit", *(r.method.name for r in results)]]
    for i, (name, unit) in enumerate(digits.METRICS.values()):
        rows.append([name, unit, *(spread(r.errors[:, i], ".2f") for r in results)])
    overall = [change(r.errors, results[0].errors) for r in results]
    rows.append(["overall", "mean change, %", "0", *(spread(o, "+.1f") for o in overall[1:])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded))
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def spread(values: Tensor, form: str) -> str:
    """Mean ± sample standard deviation, or the one value there is."""
    if len(values) == 1:
        return f"{float(values[0]):{form}}"
    return f"{float(values.mean()):{form}} ± {float(values.std()):{form.lstrip('+')}}"


def verdict(results: list[Result]) -> str:
    """Who won, by how much, and where a balanced method lost; from the numbers, whatever they are."""
    overall = torch.stack([change(r.errors, results[0].errors) for r in results])  # (methods, seeds)
    means = overall.mean(1)
    best = int(means.argmin())
    lines = [f"Best overall: {results[best].method.name} ({float(means[best]):+.1f} %)."]
    for i, result in enumerate(results):
        if i in (0, best):
            continue
        gap = overall[i] - overall[best]  # paired: the same seeds
        wins = int((gap < 0).sum())
        lines.append(
            f"{result.method.name}: {float(gap.mean()):.1f} points behind, ahead on {wins} of {len(gap)} seeds."
        )
    for result in results[1:]:
        worse = result.errors.mean(0) > results[0].errors.mean(0)
        names = [digits.METRICS[task][0] for task, lost in zip(digits.METRICS, worse.tolist(), strict=True) if lost]
        if names:
            lines.append(f"{result.method.name} is worse than equal weights at: {', '.join(names)}.")
    return "\n".join(lines)


def main(options: Any) -> None:
    """The command `digits`."""
    if options.quick:
        options.seeds, options.steps, options.trials = 1, min(options.steps, 150), 1
        options.alpha = 0.12 if options.alpha is None else options.alpha
    seeds = tuple(range(options.first_seed, options.first_seed + options.seeds))
    settings = Settings(seeds, options.steps, options.trials, options.alpha, options.weight_lr)
    print(
        f"Six tasks on overlaid pairs of handwritten digits. Seeds {', '.join(map(str, seeds))}; {settings.steps} steps"
    )
    print(
        f"of {BATCH_SIZE} pairs, Adam at {LEARNING_RATE:g}; same start and same batches for every method.", flush=True
    )
    results = compare(settings)
    print("\nSettings, and on how many search runs each was chosen (validation split, seed not used below):")
    for result in results:
        how = f"best of {result.tried}" if result.tried else "no search"
        print(f"  {result.method.name:14} {result.method.setting} ({how})")
    if any(" x " in result.method.setting for result in results):
        print(f"  (factors in the order {', '.join(digits.METRICS[task][0] for task in ORDER)})")
    print(f"\n{table(results)}\n")
    print(verdict(results))
    if len(seeds) > 1:
        print(f"± is the standard deviation over {len(seeds)} seeds.")
    names = {task: name for task, (name, _) in digits.METRICS.items()}
    errors = {result.method.name: result.errors for result in results}
    shown = {result.method.name: result.history for result in results if result.method.name not in (STATIC, INVERSE)}
    figure.digits(options.out, errors, shown, names, seed=seeds[0])
