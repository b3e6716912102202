"""RotoGrad on the paper's two toys, and on the digits: do rotations let every task reach its optimum?

The toys have a trunk of 2 -> 10 -> 2 and no heads; task k sees r_k = R_k z and its loss has its minimum at a point of
its own. A rotation keeps the length of z, so both can be reached only if they are equally far from the origin: the
third toy is a control where they are not.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradnorm_func as gn
from gradnorm_func._tools.palette import COLOURS
from gradnorm_func.demo import compare, digits
from gradnorm_func.demo.progress import Progress

HIDDEN, LEARNING_RATE, ROTATION_RATE = 10, 1e-3, 0.05
DECAYS = {"with rotations": 0.99999, "rotation rate falls": 0.99}  # per step: the published one, and one that counts
REACHED = 0.1  # distance from the optimum that counts as having reached it
PLAIN, ROTATED, DECAYING = "without rotations", "with rotations", "rotation rate falls"
KINDS = AS_THEY_ARE, NORMALISED = "L", "L / L(0)"


class Toy(NamedTuple):
    """Two tasks on one point z of the plane."""

    name: str
    loss: Callable[[Tensor, float], Tensor]  # (point, where its minimum lies on the diagonal) -> scalar
    optima: tuple[float, float]


def bowl(r: Tensor, s: float) -> Tensor:
    """A long convex valley with its minimum at (s, s)."""
    height: Tensor = (r[..., 0] - s).square().mean() + 25 * (r[..., 1] - s).square().mean()
    return height


def ripples(r: Tensor, s: float) -> Tensor:
    """Local minima all around, the global one at (s, s)."""
    d = r - s
    height: Tensor = (d.abs() - 3 * torch.sinc(3 * d / torch.pi)).sum(-1).mean()
    return height


TOYS = (
    Toy("convex", bowl, (-1.5, 1.5)),
    Toy("non-convex", ripples, (-1.5, 1.5)),
    Toy("control: optima not equally far", bowl, (0.0, 1.5)),
)


class Path(NamedTuple):
    """Where the two tasks' points were, and what their losses were."""

    points: Tensor  # (steps, seeds, 2, 2) r_k
    losses: Tensor  # (steps, seeds, 2)

    def distances(self, toy: Toy) -> Tensor:
        """(seeds, 2) from the optima at the end."""
        distances: Tensor = (self.points[-1] - torch.tensor(toy.optima)[:, None]).norm(dim=-1)
        return distances


def descend(toy: Toy, seeds: int, steps: int, name: str, normalize: bool) -> Path:
    """All seeds as one vmap."""

    def backbone(params: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(x @ params["w1"].mT + params["b1"])
        out: Tensor = hidden @ params["w2"].mT + params["b2"]
        return out

    def head(s: float) -> Callable[..., Tensor]:
        return lambda params, z, x: toy.loss(z, s)

    loss_fn = gn.multi_task_loss(backbone, [head(s) for s in toy.optima])
    rotate = name in DECAYS
    schedule = lambda step: ROTATION_RATE * DECAYS.get(name, 1.0) ** step
    method = gn.rotograd(2, scale="none", normalize=normalize, burn_in=None, optimizer=gn.adam(schedule))
    x = torch.zeros(1, 2)  # every input is (0, 0): z depends on the biases alone
    fresh = [method.init(2) for _ in range(seeds)]
    state = gn._core.tree.tree_map(lambda *leaves: torch.stack(leaves), *fresh)
    params = {name: torch.stack(rows) for name, rows in _initial(seeds).items()}

    def step(params: Any, state: Any) -> Any:
        grads, new, info = method.grad(state, params, loss_fn, x, update=rotate)
        if not rotate:  # L(0) of the first step is part of the state, so of the frozen one too
            new = state._replace(initial_losses=torch.where(state.step == 0, info.losses, state.initial_losses),
                                 step=state.step + 1)  # fmt: skip
        points = state.rotations @ backbone(params, x)[0]
        params = {name: p - LEARNING_RATE * grads[name] for name, p in params.items()}
        return params, new, points, info.losses

    points, losses = [], []
    for _ in range(steps):
        params, state, now, loss = torch.func.vmap(step)(params, state)
        points.append(now)
        losses.append(loss)
    return Path(torch.stack(points), torch.stack(losses))


def _initial(seeds: int) -> dict[str, list[Tensor]]:
    rows: dict[str, list[Tensor]] = {"w1": [], "b1": [], "w2": [], "b2": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        first, second = torch.nn.Linear(2, HIDDEN), torch.nn.Linear(HIDDEN, 2)
        for name, value in zip(rows, (first.weight, first.bias, second.weight, second.bias), strict=True):
            rows[name].append(value.detach())
    return rows


Paths = dict[tuple[str, str, str], Path]  # by toy, kind of loss, and without or with rotations


def toys(seeds: int, steps: int, *, chosen: Sequence[Toy] = TOYS, kinds: Sequence[str] = KINDS) -> Paths:
    """Every toy without and with rotations, from the same start, on losses as they are and divided by L(0)."""
    return {
        (toy.name, kind, name): descend(toy, seeds, steps, name, kind == NORMALISED)
        for toy in chosen
        for kind in kinds
        for name in (PLAIN, ROTATED, DECAYING)
    }


def toy_table(paths: Paths) -> str:
    """On how many seeds each task, and both, ended at their optimum."""
    lines = [f"{'toy':33}{'loss':10}{'':21}{'task 1':>7}{'task 2':>8}{'both':>8}   median distances"]
    by_name = {toy.name: toy for toy in TOYS}
    for (toy, kind, name), path in paths.items():
        distances = path.distances(by_name[toy])
        near = distances < REACHED
        counts = [int(near[:, 0].sum()), int(near[:, 1].sum()), int(near.all(1).sum())]
        row = "".join(f"{count:>5}/{len(near):<2}" for count in counts)
        spread = "  ".join(f"{float(d):.2f}" for d in distances.median(0).values)
        lines.append(f"{toy:33}{kind:10}{name:20}{row}     {spread}")
    return "\n".join(lines)


def methods(alpha: float) -> list[compare.Method]:
    """The four of the table; RotoGrad's two with losses divided by L(0), as in the paper."""
    fresh = compare.fresh
    roto = functools.partial(gn.rotograd, digits.WIDTH, normalize=True)
    return [
        compare.equal()._replace(name="plain"),
        compare.gradnorm(alpha, 0.025),
        compare.Method("RotoGrad", "scale='rotograd'", roto(), fresh),
        compare.Method("RotoGradNorm", f"alpha = {alpha:.3g}", roto(scale="gradnorm", alpha=alpha), fresh),
    ]


def digit_errors(method: compare.Method, data: digits.Digits, test: Any, seed: int, steps: int, wrap: Any) -> Any:
    """Test errors of one training, and its history; rotations are folded into the heads first."""
    generator = torch.Generator().manual_seed(seed)
    first = digits.pairs(data, compare.BATCH_SIZE, generator)

    def batches() -> Iterator[digits.Batch]:
        yield first
        for _ in range(steps - 1):
            yield digits.pairs(data, compare.BATCH_SIZE, generator)

    params = digits.init_params(seed)
    losses = digits.loss_fn(params, first)
    state = method.start(method.balancer, torch.stack([losses[task] for task in compare.ORDER]))
    params, state, history = gn.train(
        params, digits.loss_fn, wrap(batches()), balancer=method.balancer, state=state,
        optimizer=functools.partial(torch.optim.Adam, lr=compare.LEARNING_RATE), progress=False,
    )  # fmt: skip
    if isinstance(state, gn.RotoGradState):
        params = gn.fold_rotations(params, state, {task: f"heads.{task}.weight" for task in digits.HEADS})
    return digits.errors(params, test), history


def add_arguments(parser: argparse.ArgumentParser, figure_path: Callable[[str], str]) -> None:
    """The options of the command; `figure_path` converts and checks the path of the figure."""
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="runs of every toy (default: 10)")
    parser.add_argument("--toy-steps", type=int, default=400, metavar="N", help="steps of a toy (default: 400)")
    parser.add_argument("--digit-seeds", type=int, default=5, metavar="N", help="runs per method on the digits")
    parser.add_argument("--steps", type=int, default=500, help="training steps of a digits run (default: 500)")
    parser.add_argument("--alpha", type=float, default=0.12, help="GradNorm's and RotoGradNorm's (default: 0.12)")
    default = "gradnorm_rotograd.png"
    parser.add_argument(
        "--out", type=figure_path, default=default, metavar="FILE", help=f"the figure (default: {default})"
    )


def run(args: argparse.Namespace) -> None:
    """The command `rotograd`."""
    for name in ("seeds", "toy_steps", "steps"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1")
    print(f"Toys: SGD at {LEARNING_RATE:g} for {args.toy_steps} steps, rotations by Adam at {ROTATION_RATE:g}; reached")
    print(f"means within {REACHED:g} of the optimum. Seeds 0 ... {args.seeds - 1}.\n", flush=True)
    paths = toys(args.seeds, args.toy_steps)
    print(toy_table(paths), flush=True)
    figure(paths).savefig(args.out, dpi=130)
    if not args.digit_seeds:
        return
    data, generator = digits.load(), torch.Generator().manual_seed(0)
    test = digits.pairs(data["test"], compare.EVALUATION_PAIRS, generator)
    chosen = methods(args.alpha)
    progress = Progress(len(chosen) * args.digit_seeds, args.steps)
    results = []
    try:
        for method in chosen:
            found = []
            for seed in range(args.digit_seeds):
                wrap = functools.partial(progress.watch, label=f"{method.name}, seed {seed}")
                found.append(digit_errors(method, data["train"], test, seed, args.steps, wrap))
            results.append(compare.Result(method, 0, torch.stack([errors for errors, _ in found]), found[0][1]))
    finally:
        progress.close()
    print(f"\nDigit pairs, six tasks: {args.steps} steps, seeds 0 ... {args.digit_seeds - 1}, nothing tuned:\n")
    print(compare.table(results))
    for result in results:
        if isinstance(result.history, gn.RotoGradInfo):
            pairs = torch.triu(torch.ones_like(result.history.cosines[0], dtype=torch.bool), 1)
            last = slice(-max(1, args.steps // 5), None)
            before, after = (
                float(c[last][:, pairs].mean()) for c in (result.history.head_cosines, result.history.cosines)
            )
            print(f"{result.method.name}: mean cosine of the task gradients at the end {before:+.2f} as the heads see "
                  f"them, {after:+.2f} after rotating back.")  # fmt: skip


def figure(paths: Paths) -> Any:
    """The points of both tasks over training, on the contours of their losses; of the toys and losses in `paths`."""
    from matplotlib.figure import Figure

    shown = [toy for toy in TOYS if (toy.name, AS_THEY_ARE, PLAIN) in paths]
    drawn = Figure(figsize=(4.2 * len(shown), 8.4), layout="constrained")
    axes = drawn.subplots(2, len(shown), sharex=True, sharey=True, squeeze=False)
    grid = torch.linspace(-3, 3, 161)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    for column, toy in enumerate(shown):
        for row, name in enumerate((PLAIN, ROTATED)):
            ax, path = axes[row, column], paths[toy.name, AS_THEY_ARE, name]
            for k, s in enumerate(toy.optima):
                _draw_task(ax, toy, k, s, path, torch.stack([x, y], -1))
            starts = path.points[0, :, 0]
            ax.scatter(starts[:, 0], starts[:, 1], s=10, color="black", zorder=5, label="start")
            near = (path.distances(toy) < REACHED).all(1)
            ax.text(0.03, 0.97, f"both optima: {int(near.sum())} of {len(near)} seeds", va="top",
                    transform=ax.transAxes, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8})  # fmt: skip
            ax.set_aspect("equal")
            ax.set_title(f"{toy.name}\n{name}" if row == 0 else name, fontsize=10)
    axes[0, 0].legend(loc="lower right", fontsize=8, framealpha=0.9)
    drawn.supxlabel("first coordinate of what the task sees")
    drawn.supylabel("second coordinate")
    return drawn


def _draw_task(ax: Any, toy: Toy, k: int, s: float, path: Path, grid: Tensor) -> None:
    """One task's loss as contours, its optimum, and where training took its point."""
    height = torch.func.vmap(torch.func.vmap(toy.loss, in_dims=(0, None)), in_dims=(0, None))(grid, s)
    levels = torch.quantile(height.flatten(), torch.tensor([0.02, 0.07, 0.15, 0.3])).tolist()
    colour = COLOURS[(0, 3)[k]]
    ax.contour(grid[..., 0], grid[..., 1], height, levels=levels, colors=colour, linewidths=0.6, alpha=0.45)
    track = path.points[:, :, k]
    ax.plot(track[:, :, 0], track[:, :, 1], color=colour, linewidth=1, alpha=0.6)
    ax.scatter(track[-1, :, 0], track[-1, :, 1], s=26, color=colour, zorder=4, label=f"task {k + 1}: end")
    star = {"marker": "*", "s": 190, "edgecolors": "black", "linewidths": 0.8, "zorder": 3}
    ax.scatter([s], [s], color=colour, label=f"task {k + 1}: optimum", **star)
