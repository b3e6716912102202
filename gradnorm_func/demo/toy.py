"""The toy of the GradNorm paper (Chen et al. 2018, section 4): the same kind of task T times, at T different scales.

f_i(x) = σ_i tanh((B + ε_i) x) with x in R^250 and y in R^100, B ~ N(0, 10) shared, ε_i ~ N(0, 3.5) of each task; a
trunk of four ReLU layers of 100 and T affine heads. What the paper leaves open is chosen here: 10 and 3.5 are standard
deviations; x is a normal vector scaled to length 1; the σ_i of more than two tasks are |N(0, 50)|; batches of 200 from
up to 40 000 training points; Adam at 3e-3 for the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import gradnorm_func as gn
from gradnorm_func.demo import figure
from gradnorm_func.demo.progress import Progress

INPUTS, OUTPUTS, WIDTH, DEPTH = 250, 100, 100, 4
BATCH_SIZE, TRAIN_POINTS, TEST_POINTS = 200, 40_000, 1000
LEARNING_RATE = 3e-3
EVALUATIONS = 60
SCALE = 50.0  # of the σ_i, where the paper does not list them
W = f"trunk.{DEPTH - 1}.weight"
LOG_VARIANCES = "heads.log_variance"

Batch = tuple[Tensor, Tensor]
Params = dict[str, Tensor]


class Problem(NamedTuple):
    """The functions to learn."""

    scales: Tensor  # (T,) σ_i
    matrices: Tensor  # (INPUTS, T * OUTPUTS), transposed B + ε_i side by side

    def sample(self, count: int, generator: torch.Generator) -> Batch:
        """Inputs (count, INPUTS) and targets (count, T, OUTPUTS)."""
        x = F.normalize(torch.randn(count, INPUTS, generator=generator), dim=1)
        return x, (x @ self.matrices).tanh().reshape(count, -1, OUTPUTS) * self.scales[:, None]


class Curves(NamedTuple):
    """What is kept of one training."""

    steps: list[int]
    weights: Tensor  # (evaluations, T), as used in the sum of the losses
    losses: Tensor  # (evaluations, T) L_i / L_i(0) on test data


def make_problem(num_tasks: int, generator: torch.Generator) -> Problem:
    shared = 10 * torch.randn(INPUTS, 1, OUTPUTS, generator=generator)
    own = 3.5 * torch.randn(INPUTS, num_tasks, OUTPUTS, generator=generator)
    wide = (SCALE * torch.randn(num_tasks, generator=generator)).abs()
    scales = torch.tensor([1.0, 100.0]) if num_tasks == 2 else wide.sort().values
    return Problem(scales, (shared + own).flatten(1))


def init_params(num_tasks: int, seed: int) -> Params:
    """A flat dict; the heads are stacked, with a leading task axis."""
    torch.manual_seed(seed)
    trunk = [torch.nn.Linear(INPUTS if i == 0 else WIDTH, WIDTH) for i in range(DEPTH)]
    params = {f"trunk.{i}.{k}": v.detach() for i, layer in enumerate(trunk) for k, v in layer.named_parameters()}
    heads, _ = torch.func.stack_module_state([torch.nn.Linear(WIDTH, OUTPUTS) for _ in range(num_tasks)])
    return params | {f"heads.{name}": value.detach() for name, value in heads.items()}


def backbone(params: Params, batch: Batch) -> Tensor:
    h = batch[0]
    for i in range(DEPTH - 1):
        h = F.relu(F.linear(h, params[f"trunk.{i}.weight"], params[f"trunk.{i}.bias"]))
    return h


def head(params: Params, z: Tensor, batch: Batch) -> Tensor:
    """One task's loss; its parameters and its targets come without the task axis."""
    return F.mse_loss(F.linear(z, params["weight"], params["bias"]), batch[1])


def uncertain_head(params: Params, z: Tensor, batch: Batch) -> Tensor:
    """The same under uncertainty weighting (Kendall et al. 2018): a log-variance s, learnt like any parameter."""
    s = params["log_variance"]
    return (torch.exp(-s) * head(params, z, batch) + s) / 2


def with_heads(one_head: Any) -> Any:
    return gn.multi_task_loss(
        backbone,
        gn.stacked_heads(one_head, "heads", batch_dims=(None, 1)),
        last_shared=gn.shared_linear(W, f"trunk.{DEPTH - 1}.bias", F.relu),
    )


def train(
    balancer: gn.Balancer[Any, Any],
    loss_fn: Any,
    params: Params,
    batches: Iterable[Batch],
    test: Batch,
    weight_lr: float,
    marks: set[int],
) -> Curves:
    """The loop that `gn.train` is, written out: gradients and new weights from one pass, then any optimizer."""
    params = {name: value.clone() for name, value in params.items()}
    network = [value for name, value in params.items() if name != LOG_VARIANCES]
    optimizer = torch.optim.Adam(network, lr=LEARNING_RATE, fused=True)
    if LOG_VARIANCES in params:  # they learn at the rate of GradNorm's weights
        optimizer.add_param_group({"params": [params[LOG_VARIANCES]], "lr": weight_lr})
    num_tasks = test[1].shape[1]
    state = balancer.init(num_tasks)
    measured = with_heads(head)
    initial = measured(params, test)
    steps, weights, losses = [0], [], [torch.ones(num_tasks)]
    for step, batch in enumerate(batches, start=1):
        grads, state, info = balancer.grad(state, params, loss_fn, batch)
        gn.write_grads(params, grads)
        optimizer.step()
        used = torch.exp(-params[LOG_VARIANCES]) / 2 if LOG_VARIANCES in params else info.weights
        if step == 1:
            weights.append(used)
        if step in marks:
            steps.append(step)
            weights.append(used)
            losses.append(measured(params, test) / initial)
    return Curves(steps, torch.stack(weights), torch.stack(losses))


def main(options: Any) -> None:
    """The command `toy`."""
    num_tasks, seed = options.tasks, options.seed
    generator = torch.Generator().manual_seed(seed)
    problem = make_problem(num_tasks, generator)
    points = min(TRAIN_POINTS, 10 * TRAIN_POINTS // num_tasks)
    print(f"The toy of the GradNorm paper: {num_tasks} tasks, seed {seed}, scales of the tasks:")
    print("  " + " ".join(f"{scale:.3g}" for scale in problem.scales.tolist()))
    print(
        f"{options.steps} steps of {BATCH_SIZE} out of {points} points, Adam at {LEARNING_RATE:g} for the network and"
    )
    print(
        f"{options.weight_lr:g} for the weights, alpha = {options.alpha:g}; same start and batches for all.", flush=True
    )
    data, test = problem.sample(points, generator), problem.sample(TEST_POINTS, generator)
    params = init_params(num_tasks, seed)
    plain, uncertain = with_heads(head), with_heads(uncertain_head)
    optimizer = gn.adam(options.weight_lr)
    methods: dict[str, tuple[gn.Balancer[Any, Any], Any, Params]] = {
        "equal weights": (gn.static(), plain, params),
        "uncertainty weighting": (gn.static(), uncertain, params | {LOG_VARIANCES: torch.zeros(num_tasks)}),
        "GradNorm": (gn.gradnorm(alpha=options.alpha, where=W, optimizer=optimizer), plain, params),
    }
    progress = Progress(len(methods), options.steps)
    marks = set(torch.linspace(1, options.steps, min(options.steps, EVALUATIONS)).round().int().tolist())
    curves = {}
    try:
        for name, (balancer, loss_fn, start) in methods.items():
            order = torch.Generator().manual_seed(seed + 1)
            rows = (torch.randint(points, (BATCH_SIZE,), generator=order) for _ in range(options.steps))
            batches = ((data[0][row], data[1][row]) for row in progress.watch(rows, name))
            curves[name] = train(balancer, loss_fn, start, batches, test, options.weight_lr, marks)
    finally:
        progress.close()
    print(f"\n{table(curves)}\n")
    print("Final weights, scaled to a mean of 1, by task:")
    for name, curve in curves.items():
        final = curve.weights[-1] / curve.weights[-1].mean()
        print(f"  {name:22}" + " ".join(f"{weight:.3g}" for weight in final.tolist()))
    figure.toy(options.out, curves, problem.scales.tolist())


def table(curves: dict[str, Curves]) -> str:
    """The paper's measure, the sum over the tasks of L_i / L_i(0) on test data, and how evenly the tasks learn."""
    lines = [f"{'test data':24}{'sum of L_i / L_i(0)':>20}{'best task':>12}{'worst task':>12}"]
    lines.append("-" * len(lines[0]))
    for name, curve in curves.items():
        last = curve.losses[-1]
        lines.append(f"{name:24}{float(last.sum()):20.3f}{float(last.min()):12.3f}{float(last.max()):12.3f}")
    return "\n".join([*lines, f"(at the start: {curves[name].losses.shape[1]}, the number of tasks; lower is better)"])
