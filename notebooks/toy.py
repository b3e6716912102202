# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The toy of the GradNorm paper: what a scale does to a training
#
# T regressions with the same kind of target, σ_i tanh((B + ε_i) x), that differ in scale σ_i alone. Nobody should care
# in which unit a loss is written. Do equal weights and GradNorm care? Two tasks are trained three times, from the same
# start and with the same batches:
#
# - both at scale 1;
# - the same, but the second **loss** is written in a unit 10,000 times smaller, so that its numbers are larger;
# - the second **target** is 100 times larger, as in the paper. Its loss is then 10,000 times larger, too.
#
# What the paper leaves open is chosen in `gradnorm_func.demo.toy`. Runs are short, so what is seen is the first phase
# of learning; `python -m gradnorm_func.demo toy` runs longer.

# %%
import matplotlib.pyplot as plt
import torch

import gradnorm_func as gn
from gradnorm_func import plot
from gradnorm_func.demo import toy

torch.set_num_threads(1)
POINTS, STEPS, EVERY = 10_000, 250, 10
METHODS = {"equal weights": gn.static(), "GradNorm": gn.gradnorm(where=toy.W)}


# %%
def head(params, z, batch):
    """The toy's loss of one task, in a unit of its own."""
    return batch[2] * toy.head(params, z, batch)


loss_fn = gn.multi_task_loss(
    toy.backbone,
    gn.stacked_heads(head, "heads", batch_dims=(None, 1, 0)),  # the task axis of targets and units
    last_shared=gn.shared_linear(toy.W, f"trunk.{toy.DEPTH - 1}.bias", torch.relu),
)


def run(method, scales, units):
    """Test losses L_i / L_i(0) over training, which no unit changes."""
    generator = torch.Generator().manual_seed(0)
    problem = toy.make_problem(len(scales), generator)._replace(scales=torch.tensor(scales))
    data, test = problem.sample(POINTS, generator), problem.sample(500, generator)
    draw = torch.Generator().manual_seed(1)
    rows = (torch.randint(POINTS, (toy.BATCH_SIZE,), generator=draw) for _ in range(STEPS))
    batches = ((data[0][row], data[1][row], torch.tensor(units)) for row in rows)
    marks = set(range(EVERY, STEPS + 1, EVERY))
    return toy.train(METHODS[method], loss_fn, toy.init_params(len(scales), 0), batches, test, 0.0, marks)


TWO = {
    "scale 1": ([1.0, 1.0], [1.0, 1.0]),
    "loss × 10000": ([1.0, 1.0], [1.0, 1e4]),
    "target × 100": ([1.0, 100.0], [1.0, 1.0]),
}
two = {method: {other: run(method, *how) for other, how in TWO.items()} for method in METHODS}

# %% [markdown]
# ## The first task, while only the second one changes

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
for ax, (method, runs) in zip(axes, two.items(), strict=True):
    first = {f"other: {other}": curves.losses[:, 0] for other, curves in runs.items()}
    plot.compare({name: row[None] for name, row in first.items()}, ax, steps=runs["scale 1"].steps)
    ax.set(title=method, ylabel="test loss of the first task, $L / L(0)$")
plt.show()
for method, runs in two.items():
    for other, curves in runs.items():
        gap = float((curves.losses - runs["scale 1"].losses).abs().max())
        ends = " and ".join(f"{float(loss):.3f}" for loss in curves.losses[-1])
        print(f"{method:14}{other:14} both tasks at the end: {ends}; furthest from scale 1: {gap:.4f}")

# %% [markdown]
# - **The unit of a loss** does not matter to GradNorm, whose default form weighs each loss relative to its first value:
#   the run with the other unit is the run at scale 1 to four digits. With equal weights the first task ends at
#   0.81 in place of 0.79.
# - **The scale of a target** matters to both, and far more. The network's outputs themselves have to become 100 times
#   larger, and on the way the first task gets worse than at its start. GradNorm's weights soften that (0.98 against
#   1.10) and cannot undo it. So standardise the targets first, and let a balancer see to the losses.
#
# ## Ten tasks, at the scales that the paper draws

# %%
scales = toy.make_problem(10, torch.Generator().manual_seed(0)).scales.tolist()
ten = {method: run(method, scales, [1.0] * 10) for method in METHODS}

# %%
names = [f"scale {scale:.3g}" for scale in scales]
figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
plot.results({method: curves.losses[-1] for method, curves in ten.items()}, axes[0], names=names)
plot.weights(ten["GradNorm"].weights, axes[1], names=names, steps=ten["GradNorm"].steps)
axes[1].set_title("the weights of GradNorm")
plt.show()
for method, curves in ten.items():
    print(f"{method:14} sum of L_i / L_i(0): {float(curves.losses[-1].sum()):.2f} (10 at the start)")

# %% [markdown]
# GradNorm is ahead on all ten tasks, most on those of small scale, by 1 to 3.5 %. That is little: in 250 steps no
# method has learnt much. Its weights fall with the scale, over more than a decade, and stay in that order.
