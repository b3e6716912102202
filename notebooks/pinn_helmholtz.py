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
# # A physics-informed network, balanced
#
# A PINN learns the solution of a differential equation from the equation itself. Its losses are mean squared residuals:
# of the equation inside, of the boundary condition. The equation holds second derivatives, so its residual is measured
# in far larger numbers than the boundary's, and the weights of the losses decide whether the boundary is learned at
# all.
#
# Here: Helmholtz' equation $u_{xx} + u_{yy} + u = f$ on a square, $u = 0$ on its edge, with $f$ such that
# $u = \sin \pi x \sin \pi y$. The solution is known, so we can see who comes closer to it.

# %%
import itertools
import math

import matplotlib.pyplot as plt
import torch

import gradnorm_func as gn
from gradnorm_func import plot

torch.set_num_threads(1)  # the network is too small to be worth several cores
STEPS, WIDTH, DEPTH, PI = 1200, 24, 3, math.pi

# %% [markdown]
# ## The network and its derivatives
#
# The first and second derivatives are carried along from layer to layer by the chain rule: plain tensor operations,
# faster than nested derivatives, and `torch.compile` takes them in seconds. (`torch.func.grad` of a function of one
# point, nested, works as well.)


# %%
def init_params(seed):
    draw, widths = torch.Generator().manual_seed(seed), [2] + [WIDTH] * DEPTH + [1]
    shapes = list(itertools.pairwise(widths))
    weights = {
        f"{i}.weight": torch.randn(a, b, generator=draw) * (2 / (a + b)) ** 0.5 for i, (a, b) in enumerate(shapes)
    }
    return weights | {f"{i}.bias": torch.zeros(b) for i, (_, b) in enumerate(shapes)}


def network(params, points):
    """u, and u_xx + u_yy, at points (..., 2)."""
    value = points @ params["0.weight"] + params["0.bias"]
    first = params["0.weight"].reshape(2, *[1] * (points.ndim - 1), -1).expand(2, *value.shape)
    second = torch.zeros_like(first)
    for i in range(1, DEPTH + 1):
        h = torch.tanh(value)
        slope, weight = 1 - h * h, params[f"{i}.weight"]
        second = (slope * second - 2 * h * slope * first * first) @ weight
        first, value = (slope * first) @ weight, h @ weight + params[f"{i}.bias"]
    return value[..., 0], second.sum(0)[..., 0]


def exact(points):
    return torch.sin(PI * points[..., 0]) * torch.sin(PI * points[..., 1])


def boundary(params, points):
    return network(params, points)[0]


def equation(params, points):
    u, laplacian = network(params, points)
    return laplacian + u - (1 - 2 * PI**2) * exact(points)


# %% [markdown]
# ## The losses
#
# A loss is the mean square of one residual over points of its own. The losses share nothing but the parameters: that is
# `multi_task_loss(None, ...)`. Every loss runs once, and its gradient norm comes out of the backward pass that training
# needs anyway.

# %%
residuals = {"boundary": boundary, "equation": equation}


def mean_square(name):
    return lambda params, batch: residuals[name](params, batch[name]).square().mean()


loss_fn = gn.multi_task_loss(None, {name: mean_square(name) for name in residuals})
tasks = gn.task_names(loss_fn.heads)  # the order of the weights: boundary, equation
axis = torch.linspace(-1, 1, 61)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)


def batches():
    """New points for every step: 256 inside, 64 on the edge."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        inside, edge = 2 * torch.rand(256, 2, generator=draw) - 1, 2 * torch.rand(64, 2, generator=draw) - 1
        edge[:32, 0], edge[32:, 1] = edge[:32, 0].sign(), edge[32:, 1].sign()
        yield {"equation": inside, "boundary": edge}


# %% [markdown]
# ## Training
#
# One loop for any balancer. Six ways to weight two losses:
#
# - equal weights, and **one fixed weight**, 100 for the boundary: whoever knows it needs no method;
# - GradNorm, with L(0) of the first batch, and with L(0) **given**. GradNorm asks how far each loss has come since
#   L(0). A fresh network is nearly zero on the edge, so the boundary's first loss is next to nothing; it grows from
#   there, and GradNorm takes it for a slow task. Take L(0) from the sizes of the terms instead: the mean squares of u
#   and of f;
# - `gn.equal_norms`, the rule of jaxpi, which makes all gradients equally long, and `gn.ntk` (Wang et al. 2022), whose
#   weights let all residuals fall at one rate. Both update every 20 steps.


# %%
def train(balancer, every=1, **start):
    """The field at the end, its relative L2 error in percent, and the weights over training."""
    params = {name: leaf.requires_grad_() for name, leaf in init_params(0).items()}
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / STEPS))
    state, weights = balancer.init(len(tasks), **start), []
    for step, batch in enumerate(batches()):
        grads, state, info = balancer.grad(state, params, loss_fn, batch, update=step % every == 0)
        gn.write_grads(params, grads)
        optimizer.step()
        schedule.step()
        weights.append(info.weights)
    with torch.no_grad():
        field = network(params, grid)[0]
    return field, 100 * float((field - exact(grid)).norm() / exact(grid).norm()), torch.stack(weights)


sizes = [1 / 4, (1 - 2 * PI**2) ** 2 / 4]  # the mean squares of u and of f
runs = {
    "equal weights": train(gn.static()),
    "fixed: boundary × 100": train(gn.static([100.0, 1.0])),
    "GradNorm, first L(0)": train(gn.gradnorm(alpha=0.5)),
    "GradNorm, L(0) given": train(gn.gradnorm(alpha=0.5), initial_losses=sizes),
    "equal norms": train(gn.equal_norms(), every=20),
    "neural tangent kernel": train(gn.ntk(residuals), every=20),
}
first = loss_fn(init_params(0), next(batches()))
print("first losses:", ", ".join(f"{task} {float(loss):.3f}" for task, loss in first.items()))
for name, (_, error, weights) in runs.items():
    ratio = float(weights[-1, 0] / weights[-1, 1])
    print(f"{name:22} relative L2 error {error:5.1f} %, weight of boundary / equation at the end {ratio:7.1f}")

# %% [markdown]
# ## Where are they wrong?

# %%
figure, axes = plt.subplots(1, 6, figsize=(15, 3), layout="constrained", sharey=True)
for ax, (name, (field, error, _)) in zip(axes, runs.items(), strict=True):
    image = ax.imshow(
        (field - exact(grid)).abs(), cmap="magma_r", vmin=0, vmax=0.5, origin="lower", extent=(-1, 1, -1, 1)
    )
    ax.set_title(f"{name}:\n{error:.0f} %", fontsize=10)
figure.colorbar(image, ax=axes, label="|error|, up to 0.5")
plt.show()

# %% [markdown]
# ## What did the weights do?

# %%
ratios = {name: (weights[:, 0] / weights[:, 1])[None] for name, (_, _, weights) in runs.items()}
plot.compare(ratios, label="weight of boundary / equation")
plt.show()

# %% [markdown]
# Equal weights leave the edge wrong and end at an error of 17 %. One fixed weight of 100, known beforehand, ends at 4.6
# %. GradNorm with L(0) given finds about that ratio by itself (119 at the end, 4.4 %), and so does the kernel rule (69,
# 5.5 %): one run does not tell the three apart. Equal norms ask for a ratio of 2.4 only, and end where equal weights
# end. GradNorm with L(0) of the first batch starts at a ratio of some thousands, learns the zeros of the edge and not
# the equation, and ends at 82 %: for a PINN give L(0).
#
# ## Going on
#
# - **Is it worth it?** One run shows little. `benchmarks/pinn.md` compares seven ways to weight two equations over
#   three seeds.
# - **Mind**: weights that are computed from residuals (causal training, attention) must be detached. Derivatives by
#   `torch.autograd.grad(create_graph=True)` inside a loss work in eager mode, but not under `torch.compile`, `vmap` and
#   `gn.sweep`.
# - **L-BFGS**: a line search compares values of one function, so weights must not move inside its closure: call
#   `balancer.grad(..., update=False)` there, and `state = balancer.update(state, params, loss_fn, batch)` between
#   `optimizer.step(closure)` calls.
