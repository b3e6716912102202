"""Physics-informed networks under seven ways to weight their losses: how far from the known solution does each end?

    OMP_NUM_THREADS=1 python benchmarks/pinn.py [--equation burgers|helmholtz|both] [--seeds 3] [--steps 6000] [--quick]

About six minutes for each equation on a core of its own; `--quick` takes one. `benchmarks/pinn.md` holds the tables.

For one seed all methods start from the same parameters and see the same points. What is searched is searched with the
same number of runs on a seed of its own. All seeds of a method, or all candidates of a search, train as one `vmap`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equations
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

import gradnorm_func as gn

LEARNING_RATE, DECAY = 3e-3, 0.01  # Adam's, falling exponentially to DECAY times that
EVERY = 100  # steps between updates of jaxpi's rules, whose 1000 would leave four of them in a run
FACTORS = (1.0, 10.0, 100.0)  # of the losses on the edges; the equation's weight is 1
EQUAL, STATIC, AVERAGE = "equal weights", "tuned static", "GradNorm static"
GRADNORM, SCALED = "GradNorm", "GradNorm, L(0) given"
NORMS, KERNELS = "equal norms", "NTK"


class Method(NamedTuple):
    """A balancer, and the one hyperparameter of it that is searched."""

    name: str
    rule: str  # methods of one rule are one graph
    make: Callable[[Tensor], gn.Balancer]  # hyperparameter -> balancer
    start: Callable[[Tensor], Any]  # hyperparameter -> state
    setting: Callable[[float], str]  # the hyperparameter in words
    candidates: tuple[float, ...] = (0.0,)
    every: int = 1  # steps between updates


class Run(NamedTuple):
    """What is kept of a training of S networks."""

    errors: Tensor  # (S,) relative L2 error at the end
    weights: Tensor  # (S, T) mean over the training


class Result(NamedTuple):
    """One method with its setting, run with every seed."""

    name: str
    setting: str
    tried: int  # search runs
    errors: Tensor  # (S,)


def methods(equation: equations.Equation) -> list[Method]:
    """Those of the table, except for the time average, which needs GradNorm's run."""
    tasks = sorted(equation.residuals)
    size = len(tasks)
    edges = torch.tensor([float(task != "equation") for task in tasks])

    def fixed(hyper: Tensor) -> gn.Balancer:
        return gn.static()

    def gradnorm(alpha: Tensor | float) -> gn.Balancer:
        return gn.gradnorm(alpha=alpha, form="log")

    def norms(hyper: Tensor | float) -> gn.Balancer:
        return gn.equal_norms(every=EVERY)

    def kernels(hyper: Tensor | float) -> gn.Balancer:
        return gn.ntk(equation.residuals)

    def first(alpha: Tensor) -> Any:
        return gradnorm(1.0).init(size)

    def given(alpha: Tensor) -> Any:
        return gradnorm(1.0).init(size, initial_losses=equation.scales)

    jaxpi = f"momentum 0.9, every {EVERY} steps"
    return [
        Method(EQUAL, "static", fixed, lambda hyper: gn.static().init(size), lambda hyper: "w = 1"),
        Method(
            STATIC,
            "static",
            fixed,
            lambda factor: static_state(1 + edges * (factor - 1)),
            lambda factor: f"{factor:g} on the edges, 1 on the equation",
            FACTORS,
        ),
        Method(
            GRADNORM, "gradnorm", gradnorm, first, "alpha = {:g}, L(0) from the first batch".format, (0.0, 0.5, 1.5)
        ),
        Method(
            SCALED,
            "gradnorm",
            gradnorm,
            given,
            "alpha = {:g}, L(0) from the sizes of the terms".format,
            (0.5, 1.0, 2.0),
        ),
        Method(NORMS, "norms", norms, lambda hyper: norms(hyper).init(size), lambda hyper: jaxpi),
        Method(KERNELS, "ntk", kernels, lambda hyper: kernels(hyper).init(size), lambda hyper: jaxpi, every=EVERY),
    ]


def static_state(weights: Tensor) -> gn.State:
    """The state of fixed weights, as a tensor that `vmap` may have made."""
    return gn.static().init(weights.shape[-1])._replace(weights=weights)


def average(weights: Tensor) -> Method:
    """Static weights, one row for each seed: the time average of GradNorm's."""
    words = "the time average of GradNorm's run of that seed"
    return Method(AVERAGE, "static", lambda hyper: gn.static(), static_state, lambda hyper: words)


def stack(trees: Sequence[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


class Trainer:
    """Trains S networks at once; keeps the compiled steps, so that methods of one rule share them."""

    def __init__(self, equation: equations.Equation, steps: int, eager: bool) -> None:
        self.equation, self.steps, self.eager = equation, steps, eager
        self.graphs: dict[tuple[str, bool], Callable[..., Any]] = {}

    def step_of(self, method: Method, update: bool) -> Callable[..., Any]:
        """The compiled step of this method's rule."""
        key = method.rule, update
        if key not in self.graphs:
            step = vmap(self.make_step(method, update))
            self.graphs[key] = step if self.eager else torch.compile(step, fullgraph=True, dynamic=False)
        return self.graphs[key]

    def make_step(self, method: Method, update: bool) -> Callable[..., Any]:
        """The whole training step of one network, Adam included, as one function."""
        loss_fn = self.equation.loss_fn()
        optimizer = gn.adam(lambda t: LEARNING_RATE * DECAY ** (t / self.steps))

        def step(hyper: Tensor, params: Any, moments: Any, state: Any, batch: Any) -> Any:
            grads, state, info = method.make(hyper).grad(state, params, loss_fn, batch, update=update)
            moved = {name: optimizer.update(grads[name], moments[name], leaf) for name, leaf in params.items()}
            params = {name: leaf + moved[name][0] for name, leaf in params.items()}
            return params, {name: new for name, (_, new) in moved.items()}, state, info.weights

        return step

    def train(self, method: Method, hyper: Tensor, seeds: Sequence[int]) -> Run:
        """One network for each of these seeds, with these hyperparameters (S, ...)."""
        params = stack([equations.init_params(seed) for seed in seeds])
        moments = {name: stack([gn.adam().init(leaf) for leaf in rows]) for name, rows in params.items()}
        state = stack([method.start(value) for value in hyper])
        # The points of a seed are the same whatever the other seeds, and whatever the method.
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        weight_sum = torch.zeros(())
        for t in range(self.steps):
            samples = [self.equation.sample(1, draw) for draw in draws]
            batch = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
            step = self.step_of(method, t % method.every == 0)
            params, moments, state, weights = step(hyper, params, moments, state, batch)
            weight_sum = weight_sum + weights
        return Run(vmap(self.equation.error)(params), weight_sum / self.steps)


def report(start: float, label: str) -> None:
    print(f"[{time.perf_counter() - start:4.0f} s] {label}", file=sys.stderr, flush=True)


def compare(equation: equations.Equation, seeds: Sequence[int], steps: int, search: bool, eager: bool) -> list[Result]:
    """Every method with every seed; a method with several candidates is searched first, on a seed of its own."""
    trainer, start, results = Trainer(equation, steps, eager), time.perf_counter(), []

    def add(method: Method, hyper: Tensor, setting: str, tried: int) -> Run:
        run = trainer.train(method, hyper, seeds)
        report(start, f"{equation.name}, {method.name}: all seeds")
        results.append(Result(method.name, setting, tried, run.errors))
        return run

    for method in methods(equation):
        count = len(method.candidates)
        value, tried = method.candidates[count // 2], 0
        if search and count > 1:
            trial = trainer.train(method, torch.tensor(method.candidates), [max(seeds) + 1] * count)
            report(start, f"{equation.name}, {method.name}: search")
            value, tried = method.candidates[int(trial.errors.nan_to_num(math.inf).argmin())], count
        run = add(method, torch.full((len(seeds),), value), method.setting(value), tried)
        if method.name == SCALED:
            add(average(run.weights), run.weights, average(run.weights).setting(0.0), 0)
    torch.compiler.reset()  # the next equation's graphs are others
    return results


def spread(values: Tensor) -> str:
    """Mean ± sample standard deviation, or the one value there is."""
    return f"{float(values.mean()):.2f}" + (f" ± {float(values.std()):.2f}" if len(values) > 1 else "")


def table(name: str, results: list[Result]) -> str:
    """Relative L2 errors, mean ± standard deviation over the seeds, and the ratio to equal weights, seed by seed."""
    rows = [[name, "relative L2 error, %", "/ equal", "each seed"]]
    for result in results:
        ratio = float((result.errors / results[0].errors).log().mean().exp())
        each = ", ".join(f"{100 * error:.1f}" for error in result.errors.tolist())
        rows.append([result.name, spread(100 * result.errors), f"{ratio:.2f}", each])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "-" * (widths[0] + 2) + "|" + "|".join("-" * (width + 1) + ":" for width in widths[1:]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def verdict(name: str, results: list[Result]) -> str:
    """Which method came closest, and GradNorm against the others seed by seed; from the numbers, whatever they are."""
    finals = {result.name: result.errors for result in results}
    best = min(finals, key=lambda key: float(finals[key].mean().nan_to_num(math.inf)))
    ours = finals[SCALED]
    duels = [f"{other} on {int((ours < errors).sum())}" for other, errors in finals.items() if other != SCALED]
    return (
        f"{name}: the smallest mean error is that of {best}. Of {len(ours)} seeds {SCALED}, is nearer than "
        f"{', '.join(duels)}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*equations.EQUATIONS, "both"]
    parser.add_argument("--equation", choices=choices, default="both", help="which to solve (default: both)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per method (default: 3)")
    parser.add_argument("--steps", type=int, default=6000, help="training steps a run (default: 6000)")
    parser.add_argument("--eager", action="store_true", help="do not compile the step: slower, but starts at once")
    parser.add_argument("--quick", action="store_true", help="one seed, 300 steps, eager, no search: a look")
    args = parser.parse_args(argv)
    if min(args.seeds, args.steps) < 1:
        parser.error("--seeds and --steps must be at least 1")
    if args.quick:
        args.seeds, args.steps, args.eager = 1, min(args.steps, 300), True
    torch.set_num_threads(1)
    print(
        f"PINNs of {equations.DEPTH} x {equations.WIDTH} tanh; seeds 0 ... {args.seeds - 1}; {args.steps} steps of "
        f"{equations.POINTS} new points inside and\n{equations.EDGE_POINTS} on each part of the edge; Adam from "
        f"{LEARNING_RATE:g} to {LEARNING_RATE * DECAY:g}; same start and points for every method.",
        flush=True,
    )
    for name in [args.equation] if args.equation != "both" else list(equations.EQUATIONS):
        equation = equations.EQUATIONS[name]()
        results = compare(equation, range(args.seeds), args.steps, not args.quick, args.eager)
        print(f"\n{equation.name}: on how many runs each setting was chosen (seed {args.seeds}, not used below)")
        for result in results:
            how = f"best of {result.tried}" if result.tried else "no search"
            print(f"  {result.name:20} {result.setting} ({how})")
        print(f"\n{table(equation.name, results)}\n\n{verdict(equation.name, results)}", flush=True)
    print('± is the standard deviation over the seeds; "/ equal" the geometric mean of each seed\'s ratio.')


if __name__ == "__main__":
    main()
