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
# # Which alpha? A sweep as one program
#
# GradNorm has two numbers to choose: **alpha**, the force that helps slow tasks to catch up, and the **learning rate of
# the weights**. `gn.sweep` trains every combination of them, with several seeds, at once: the runs lie side by side
# under `vmap`, and a step of all of them is one compiled graph.
#
# The data are scikit-learn's handwritten digits, two to an image, with six tasks whose losses start four decades apart.

# %%
import itertools
import math

import torch
from matplotlib import pyplot as plt

import gradnorm_func as gn
from gradnorm_func.demo import digits

torch.set_num_threads(1)
STEPS, BATCH = 600, 64
ALPHAS, RATES, SEEDS = [0.0, 0.12, 0.5, 1.0, 1.5, 3.0], [5e-3, 2.5e-2], range(3)
TASKS = gn.task_names(digits.heads)

splits = digits.load()
validation = digits.pairs(splits["validation"], 1000, torch.Generator().manual_seed(1))


def batches():
    """The same for all runs."""
    draw = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        yield digits.pairs(splits["train"], BATCH, draw)


# %% [markdown]
# One number tells how good a run is: the geometric mean of the six validation errors. In it, halving any of the errors
# counts the same, whatever its unit.


# %%
def metric(params):
    return digits.errors(params, validation).log().mean().exp()


result = gn.sweep(
    digits.init_params,  # a function of the seed
    digits.loss_fn,
    batches(),
    grid={"alpha": ALPHAS, "lr": RATES},
    seeds=SEEDS,
    balancer=lambda alpha, lr: gn.gradnorm(alpha=alpha, optimizer=gn.adam(lr)),
    optimizer=gn.adam(3e-3),
    metric=metric,
    progress=False,
)
equal = gn.sweep(
    digits.init_params,
    digits.loss_fn,
    batches(),
    seeds=SEEDS,
    balancer=gn.static(),
    optimizer=gn.adam(3e-3),
    metric=metric,
    compile=False,
    progress=False,
)
best = {name: round(float(column[result.best]), 3) for name, column in result.runs.items()}
print(f"{len(result.metric)} runs of {STEPS} steps, history of the weights: {tuple(result.history.weights.shape)}")
print(f"best run {result.best}: {best}, error {float(result.metric[result.best]):.2f}")
print(f"equal weights, mean over seeds: {float(equal.metric.mean()):.2f}")

# %% [markdown]
# Runs are ordered as the grid is written, the last name and then the seed changing fastest, so that a table of the
# results is a reshape.

# %%
errors = result.metric.reshape(len(ALPHAS), len(RATES), len(SEEDS))
weights = result.state.weights.reshape(len(ALPHAS), len(RATES), len(SEEDS), -1).mean(2)  # over seeds
rate = int(errors.mean((0, 2)).argmin())
places = range(len(ALPHAS))
colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
for k, (lr, colour, marker) in enumerate(zip(RATES, colours, "os", strict=False)):
    left.plot(places, errors[:, k].mean(1), color=colour, marker=marker, label=f"weight learning rate {lr:g}")
    left.fill_between(places, errors[:, k].amin(1), errors[:, k].amax(1), color=colour, alpha=0.2, linewidth=0)
left.axhline(float(equal.metric.mean()), color="0.5", linestyle="--", label="equal weights")
left.axhspan(float(equal.metric.min()), float(equal.metric.max()), color="0.5", alpha=0.15, linewidth=0)
left.set(title="Validation error (lower is better)", ylabel="geometric mean over six tasks")
left.set_ylim(0)
left.legend(frameon=False, title=f"mean, and range of {len(SEEDS)} seeds", loc="lower left")
ends = weights[-1, rate].log()
order = ends.argsort()
for i in range(len(TASKS)):
    right.plot(places, weights[:, rate, i], color=colours[i], marker="o", markersize=4)
heights = ends.clone()
gap = 0.05 * math.log(weights[:, rate].max() / weights[:, rate].min())
for low, high in itertools.pairwise(order):  # labels do not overlap
    heights[high] = torch.maximum(heights[high], heights[low] + gap)
for i, task in enumerate(TASKS):
    right.annotate(
        task, (places[-1] + 0.15, float(heights[i].exp())), color=colours[i], va="center", annotation_clip=False
    )
right.set(title=f"Final task weights $w_i$, weight learning rate {RATES[rate]:g}", yscale="log")
right.yaxis.set_major_formatter("{x:g}")
for axis in (left, right):
    axis.set_xticks(places, [f"{alpha:g}" for alpha in ALPHAS])
    axis.set_xlabel("alpha")
    axis.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# What is seen, with three seeds and 600 steps:
#
# - The two numbers belong together. With fast weights, alpha of 1.5 and 3 end about a third below equal weights; with
#   slow ones alpha hardly matters, for the weights have not yet got to where alpha wants them.
# - A wrong choice costs: fast weights with a small alpha are no better than equal weights.
# - The best run is chosen on the data that its error is measured on: a report needs a test split, and more seeds.
