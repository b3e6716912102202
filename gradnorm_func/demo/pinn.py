"""Physics-informed networks under every balancer: how far from the known solution does each end?

For one seed all methods start from the same parameters and see the same points. What is searched is searched with the
same number of runs on a seed of its own. All seeds of a method, or all candidates of a search, train as one `vmap`.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

import gradnorm_func as gn
from gradnorm_func._core.tree import tree_map
from gradnorm_func.demo import compare, equations
from gradnorm_func.demo.progress import Progress

LEARNING_RATE, DECAY = 3e-3, 0.01  # Adam's, falling exponentially to DECAY times that
EVERY = 100  # steps between updates of jaxpi's rules, whose 1000 would leave four of them in a run
EVALUATIONS = 25
FACTORS = (1.0, 10.0, 100.0)  # of the losses on the edges; the equation's weight is 1
EQUAL, STATIC, AVERAGE = "equal weights", "tuned static", "GradNorm static"
GRADNORM, SCALED = "GradNorm", "GradNorm, L(0) given"
NORMS, KERNELS = "equal norms", "NTK"
ALPHAS = {GRADNORM: (0.0, 0.5, 1.5), SCALED: (0.5, 1.0, 2.0)}


class Method(NamedTuple):
    """A balancer, and the one hyperparameter of it that is searched."""

    name: str
    rule: str  # methods of one rule are one graph
    make: Callable[[Tensor], gn.Balancer]
    start: Callable[[Tensor], Any]  # hyperparameter -> state
    candidates: tuple[float, ...]
    every: int = 1  # steps between updates

    def setting(self, value: float) -> str:
        """The hyperparameter in words."""
        words = {
            STATIC: f"{value:g} on the edges, 1 on the equation",
            SCALED: f"alpha = {value:g}, L(0) from the sizes of the terms",
        }
        jaxpi = f"momentum 0.9, every {EVERY} steps"
        words[GRADNORM] = f"alpha = {value:g}, L(0) from the first batch"
        rest = {EQUAL: "w = 1", AVERAGE: "the time average of GradNorm's run of that seed", NORMS: jaxpi}
        return (words | rest | {KERNELS: jaxpi})[self.name]


class Run(NamedTuple):
    """What is kept of a training of S networks."""

    steps: list[int]
    errors: Tensor  # (evaluations, S) relative L2 error
    weights: Tensor  # (evaluations, S, T)
    fields: Tensor  # (S, rows, columns) what the networks say at the end


class Result(NamedTuple):
    """One method with its setting, run with every seed."""

    name: str
    setting: str
    tried: int  # search runs
    run: Run


def methods(equation: equations.Equation) -> list[Method]:
    """Those of the table, but for the time average, which needs GradNorm's run."""
    tasks = sorted(equation.residuals)
    edges = torch.tensor([float(task != "equation") for task in tasks])
    fixed = lambda hyper: gn.static()
    gradnorm = lambda alpha: gn.gradnorm(alpha=alpha, log_space=True)
    size = len(tasks)
    return [
        Method(EQUAL, "static", fixed, lambda hyper: gn.StaticState(torch.ones(size)), (0.0,)),
        Method(STATIC, "static", fixed, lambda hyper: gn.StaticState(1 + edges * (hyper - 1)), FACTORS),
        Method(GRADNORM, "gradnorm", gradnorm, lambda hyper: gn.init_state(size), ALPHAS[GRADNORM]),
        Method(SCALED, "gradnorm", gradnorm, lambda hyper: gn.init_state(size, initial_losses=equation.scales),
               ALPHAS[SCALED]),
        Method(NORMS, "norms", lambda hyper: gn.equal_norms(every=EVERY),
               lambda hyper: gn.equal_norms().init(size), (0.0,)),
        Method(KERNELS, "ntk", lambda hyper: gn.ntk(equation.residuals),
               lambda hyper: gn.ntk(equation.residuals).init(size), (0.0,), EVERY),
    ]  # fmt: skip


def stack(trees: Sequence[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def stepper(equation: equations.Equation, method: Method, steps: int, update: bool, eager: bool) -> Callable[..., Any]:
    """The whole training step of S networks, Adam included, as one function."""
    loss_fn = equation.loss_fn()
    optimizer = gn.adam(lambda t: LEARNING_RATE * DECAY ** (t / steps))

    def step(hyper: Tensor, params: Any, moments: Any, state: Any, batch: Any) -> Any:
        grads, state, info = method.make(hyper).grad(state, params, loss_fn, batch, update=update)
        moved = {name: optimizer.update(grads[name], moments[name], leaf) for name, leaf in params.items()}
        params = {name: leaf + moved[name][0] for name, leaf in params.items()}
        return params, {name: new for name, (_, new) in moved.items()}, state, info.weights

    return vmap(step) if eager else torch.compile(vmap(step), fullgraph=True, dynamic=False)


def train(
    equation: equations.Equation, method: Method, hyper: Tensor, seeds: Sequence[int], steps: int,
    graphs: dict[Any, Callable[..., Any]], eager: bool, wrap: Callable[..., Any],
) -> Run:  # fmt: skip
    """S networks from these seeds, with these hyperparameters (S, ...)."""
    params = stack([equations.init_params(seed) for seed in seeds])
    moments = {name: stack([gn.adam().init(leaf) for leaf in rows]) for name, rows in params.items()}
    state = stack([method.start(value) for value in hyper])
    # Points of one seed are the same whatever the other seeds of the run, and whatever the method.
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    evaluate = vmap(equation.error)
    at, errors, weights = [], [], []
    for t in wrap(range(steps)):
        batch = {key: torch.cat(rows) for key, rows in _transpose([equation.sample(1, draw) for draw in draws])}
        update = t % method.every == 0
        key = (method.rule, update)
        if key not in graphs:
            graphs[key] = stepper(equation, method, steps, update, eager)
        params, moments, state, w = graphs[key](hyper, params, moments, state, batch)
        if t % max(1, steps // EVALUATIONS) == 0 or t == steps - 1:
            at.append(t + 1)
            errors.append(evaluate(params))
            weights.append(w)
    fields = vmap(lambda params: equations.field(params, equation.grid))(params)
    return Run(at, torch.stack(errors), torch.stack(weights), fields)


def _transpose(batches: list[dict[str, Tensor]]) -> list[tuple[str, list[Tensor]]]:
    return [(key, [batch[key] for batch in batches]) for key in batches[0]]


def compare_methods(
    equation: equations.Equation, seeds: Sequence[int], steps: int, search: bool, eager: bool, progress: Progress
) -> list[Result]:
    """Searches first, then every method with every seed."""
    graphs: dict[Any, Callable[..., Any]] = {}
    held_out = max(seeds) + 1

    def run(method: Method, hyper: Tensor, at: Sequence[int], label: str) -> Run:
        wrap = functools.partial(progress.watch, label=f"{equation.name}, {method.name}, {label}")
        return train(equation, method, hyper, at, steps, graphs, eager, wrap)

    results = []
    for method in methods(equation):
        middle = method.candidates[len(method.candidates) // 2]
        value, tried = middle, 0
        if search and len(method.candidates) > 1:
            trial = run(method, torch.tensor(method.candidates), [held_out] * len(method.candidates), "search")
            final = trial.errors[-1].nan_to_num(math.inf)
            value, tried = method.candidates[int(final.argmin())], len(final)
        found = run(method, torch.full((len(seeds),), value), seeds, "all seeds")
        results.append(Result(method.name, method.setting(value), tried, found))
        if method.name == SCALED:
            average = Method(AVERAGE, "static", lambda hyper: gn.static(), gn.StaticState, (0.0,))
            found = run(average, found.weights.mean(0), seeds, "all seeds")
            results.append(Result(AVERAGE, average.setting(0.0), 0, found))
    torch.compiler.reset()  # the next equation's graphs are others
    return results


def table(name: str, results: list[Result]) -> str:
    """Relative L2 errors, mean ± standard deviation over the seeds, and the ratio to equal weights, seed by seed."""
    rows = [[name, "relative L2 error, %", "/ equal", "each seed"]]
    for result in results:
        final = result.run.errors[-1]
        ratio = (final / results[0].run.errors[-1]).log().mean().exp()
        each = ", ".join(f"{100 * error:.1f}" for error in final.tolist())
        rows.append([result.name, compare.spread(100 * final, ".2f"), f"{float(ratio):.2f}", each])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def verdict(name: str, results: list[Result]) -> str:
    """Who came closest, and GradNorm against the rest seed by seed; from the numbers, whatever they are."""
    finals = {result.name: result.run.errors[-1] for result in results}
    best = min(finals, key=lambda key: float(finals[key].mean().nan_to_num(math.inf)))
    own = finals[SCALED]
    duels = [f"{other} on {int((own < error).sum())}" for other, error in finals.items() if other != SCALED]
    return (
        f"{name}: the smallest mean error is that of {best}. Of {len(own)} seeds {SCALED}, is nearer than "
        + ", ".join(duels)
        + "."
    )


def add_arguments(parser: argparse.ArgumentParser, figure_path: Callable[[str], str]) -> None:
    """The options of the command; `figure_path` converts and checks the path of the figure."""
    choices = [*equations.EQUATIONS, "both"]
    parser.add_argument("--equation", choices=choices, default="both", help="which to solve (default: both)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per method (default: 3)")
    parser.add_argument("--steps", type=int, default=6000, help="training steps a run (default: 6000)")
    parser.add_argument("--no-search", action="store_true", help="the middle candidate of every search, unsearched")
    parser.add_argument("--eager", action="store_true", help="do not compile the step: slower, but starts at once")
    parser.add_argument("--quick", action="store_true", help="one seed, 300 steps, eager, no search: a look")
    default = "gradnorm_pinn.png"
    parser.add_argument(
        "--out", type=figure_path, default=default, metavar="FILE", help=f"the figure (default: {default})"
    )


def run(args: argparse.Namespace) -> None:
    """The command `pinn`."""
    if args.quick:
        args.seeds, args.steps, args.eager, args.no_search = 1, min(args.steps, 300), True, True
    for name in ("seeds", "steps"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1")
    chosen = [args.equation] if args.equation != "both" else list(equations.EQUATIONS)
    print(
        f"PINNs of {equations.DEPTH} x {equations.WIDTH} tanh; seeds 0 ... {args.seeds - 1}; {args.steps} steps of "
        f"{equations.POINTS} new points inside and\n{equations.EDGE_POINTS} on each part of the edge; Adam from "
        f"{LEARNING_RATE:g} to {LEARNING_RATE * DECAY:g}; same start and points for every method.",
        flush=True,
    )
    searches = 0 if args.no_search else 3
    progress = Progress((7 + searches) * len(chosen), args.steps)
    results = {}
    try:
        for name in chosen:
            equation = equations.EQUATIONS[name]()
            found = compare_methods(equation, range(args.seeds), args.steps, not args.no_search, args.eager, progress)
            results[equation.name] = found
            print(f"\n{equation.name}: on how many runs each setting was chosen (seed {args.seeds}, not used below)")
            for result in found:
                how = f"best of {result.tried}" if result.tried else "no search"
                print(f"  {result.name:20} {result.setting} ({how})")
            print(f"\n{table(equation.name, found)}\n\n{verdict(equation.name, found)}", flush=True)
    finally:
        progress.close()
    print('± is the standard deviation over the seeds; "/ equal" the geometric mean of each seed\'s ratio.')
    figure(args.out, results)


def figure(out: str, results: dict[str, list[Result]]) -> None:
    """A row an equation: the solution, the error of every method over training, and three methods' weights."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from gradnorm_func._tools.palette import COLOURS, DASHES
    from gradnorm_func.demo.figure import STYLE

    by_name = {equation.name: equation for equation in (make() for make in equations.EQUATIONS.values())}
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(14, 0.8 + 3.9 * len(results)), layout="constrained")
        axes = fig.subplots(len(results), 3, squeeze=False, width_ratios=[0.85, 1.15, 1])
        for row, (name, found) in zip(axes, results.items(), strict=True):
            equation = by_name[name]
            first, second = equation.grid[:, 0, 0].numpy(), equation.grid[0, :, 1].numpy()
            u = equation.solution.T.numpy()
            image = row[0].pcolormesh(first, second, u, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
            fig.colorbar(image, ax=row[0], pad=0.02)
            row[0].set(title=f"{name}: exact solution u", xlabel=equation.axes[0], ylabel=equation.axes[1])
            row[0].grid(False)
            lines = []
            for i, result in enumerate(found):
                line = {"color": COLOURS[i], "linestyle": DASHES[i % len(DASHES)]}
                errors, last = 100 * result.run.errors, result.run.steps[-1]
                lines += row[1].plot(result.run.steps, errors.log().mean(1).exp().numpy(), **line)
                at = [last * (1.03 + 0.025 * i)] * errors.shape[1]
                row[1].plot(at, errors[-1].numpy(), "o", color=COLOURS[i], markersize=4, alpha=0.8)
            row[1].set(title="relative L2 error, % (line: mean; dots: each seed at the end)", yscale="log",
                       xlabel="training step")  # fmt: skip
            row[1].yaxis.set_major_formatter("{x:g}")
            row[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            row[1].minorticks_off()
            tasks = sorted(equation.residuals)
            edges = [i for i, task in enumerate(tasks) if task != "equation"]
            for result, dash in ((r, d) for n, d in ((SCALED, "-"), (NORMS, DASHES[1]), (KERNELS, DASHES[2]))
                                 for r in found if r.name == n):  # fmt: skip
                w = result.run.weights[:, 0]
                for i in edges:
                    ratio = w[:, i] / w[:, tasks.index("equation")]
                    row[2].plot(result.run.steps, ratio.numpy(), color=COLOURS[i + 3], linestyle=dash,
                                label=f"{tasks[i]}, {result.name}")  # fmt: skip
            row[2].axhline(1, color="0.6", linewidth=5, alpha=0.5, zorder=0)
            row[2].set(title="weight / weight of the equation (seed 0)", yscale="log",
                       xlabel="training step")  # fmt: skip
            row[2].legend(fontsize=8.5)
        fig.legend(lines, [result.name for result in found], loc="outside upper center", ncols=len(found))
        fig.savefig(out, dpi=120)
