# ---
# jupyter:
#   jupytext:
#     formats: py:percent
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
# A PINN learns the solution of a differential equation from the equation itself. Its losses are mean squared
# residuals: of the equation inside, of the boundary condition, of the initial condition. Their gradients differ in
# size, and their weights decide what the network learns first, or at all.
#
# Here: Burgers' equation $u_t + u\,u_x = \nu\,u_{xx}$, $u(0, x) = -\sin \pi x$, $u(t, \pm 1) = 0$. A shock forms at
# $x = 0$. We take $\nu = 0.05/\pi$ and few steps, to be done in a minute: five times the usual viscosity. The exact
# solution is known, so we can see who comes closer: equal weights or GradNorm.

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
from torch.func import grad, vmap

import gradnorm_func as gn
from gradnorm_func.demo.equations import burgers_solution

torch.manual_seed(0)
torch.set_num_threads(1)  # a net this small is not worth sharing among cores
STEPS = 1000
VISCOSITY = 0.05 / math.pi

# %% [markdown]
# ## The network and its residual
#
# `u(params, t, x)` is written for **one point**, two scalars. Then `torch.func.grad` is the derivative by an argument,
# nested as often as the equation asks, and `vmap` runs it over all points.

# %%
layers = [torch.nn.Linear(2, 24), torch.nn.Tanh()]
for _ in range(2):
    layers += [torch.nn.Linear(24, 24), torch.nn.Tanh()]
model = torch.nn.Sequential(*layers, torch.nn.Linear(24, 1))
net = gn.functional(model)  # the module as a pure function of its parameters


def u(params, t, x):
    return net(params, torch.stack([t, x])).squeeze()


def residual(params, t, x):
    u_x = grad(u, 2)
    u_t, u_xx = grad(u, 1)(params, t, x), grad(u_x, 2)(params, t, x)
    return u_t + u(params, t, x) * u_x(params, t, x) - VISCOSITY * u_xx


# %% [markdown]
# ## The losses
#
# Each has points of its own; what they share are all the parameters. That is `multi_task_loss(None, ...)`: every loss
# runs once, and its gradient norm comes out of the backward pass that training needs anyway.
#
# Mind:
#
# - no `requires_grad_()` and `torch.autograd.grad` inside a loss: torch.func refuses them. Who has such a loss takes
#   the norms by `torch.autograd.grad` too and calls `gn.gradnorm_balance(state, gn.TaskStats(losses, norms))`;
# - weights that are computed from residuals (causal training, attention) must be detached: `.detach()`;
# - draw points outside of `vmap`, as here, or in the loss, but not in the function of one point.

# %%
over_points = lambda f: vmap(f, in_dims=(None, 0, 0))


def equation(params, batch):
    return over_points(residual)(params, *batch["inside"].unbind(1)).square().mean()


def boundary(params, batch):
    return over_points(u)(params, *batch["edge"].unbind(1)).square().mean()


def initial(params, batch):
    t, x = batch["start"].unbind(1)
    return (over_points(u)(params, t, x) + torch.sin(math.pi * x)).square().mean()


loss_fn = gn.multi_task_loss(None, {"equation": equation, "boundary": boundary, "initial": initial})
tasks = gn.task_names(loss_fn.heads)  # the order of weights and norms: boundary, equation, initial


def draw(generator):
    """New points for every step."""
    t, x = torch.rand(2, 300, generator=generator)
    x = 2 * x - 1
    return {
        "inside": torch.stack([t[:200], x[:200]], 1),
        "edge": torch.stack([t[200:250], x[200:250].sign()], 1),
        "start": torch.stack([torch.zeros(50), x[250:]], 1),
    }


# %% [markdown]
# ## Training
#
# One loop for any balancer. For GradNorm:
#
# - `log_space=True` lets weights span decades, and a small learning rate lets them move slowly;
# - `alpha` is how much a slow loss may catch up. 0 makes all gradients equally long, which on this equation ended near
#   the trivial solution, u = 0;
# - **give L(0)**. GradNorm asks how far each loss has come since L(0). A fresh network is nearly constant, and a
#   constant solves this equation: the first batch's L(0) of the equation is next to nothing, the loss only grows from
#   there, and GradNorm would pour weight on it. Take L(0) from the sizes of the terms instead, 1 here. Both are below.

# %%
t_grid, x_grid = torch.meshgrid(torch.linspace(0, 1, 51), torch.linspace(-1, 1, 101), indexing="ij")
exact = burgers_solution(t_grid, x_grid, viscosity=VISCOSITY).float()
points = torch.stack([t_grid, x_grid], -1)


def train(balancer, **start):
    """The field at the end, the relative L2 error over time, and the Info over time."""
    trained, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(trained.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / STEPS))
    params, state = dict(trained.named_parameters()), balancer.init(len(tasks), **start)
    errors, history = [], []
    for step in range(STEPS):
        grads, state, info = balancer.grad(state, params, loss_fn, draw(generator))
        gn.write_grads(params, grads)
        optimizer.step()
        schedule.step()
        history.append(info)
        if step % 50 == 49:
            with torch.no_grad():
                field = trained(points).squeeze(-1)
            errors.append(float((field - exact).norm() / exact.norm()))
    return field, errors, history


slow = gn.gradnorm(alpha=2.0, log_space=True, optimizer=gn.adam(0.0025))
runs = {
    "equal weights": train(gn.static(norms=True)),  # norms=True: only for the figure
    "GradNorm, first L(0)": train(slow),
    "GradNorm, L(0) = 1": train(slow, initial_losses=[1.0, 1.0, 1.0]),
}
for name, (_, errors, _) in runs.items():
    print(f"{name:14} relative L2 error {100 * errors[-1]:.1f} %")

# %% [markdown]
# ## Where are they wrong?

# %%
fig, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained", sharey=True)
image = axes[0].pcolormesh(t_grid[:, 0], x_grid[0], exact.T, cmap="RdBu_r", vmin=-1, vmax=1, rasterized=True)
axes[0].set(title="exact solution\nu", xlabel="t", ylabel="x")
fig.colorbar(image, ax=axes[0])
worst = max(float((field - exact).abs().max()) for field, _, _ in runs.values())
for ax, (name, (field, errors, _)) in zip(axes[1:], runs.items(), strict=True):
    image = ax.pcolormesh(
        t_grid[:, 0], x_grid[0], (field - exact).abs().T, cmap="magma_r", vmin=0, vmax=worst, rasterized=True
    )
    ax.set(title=f"{name}\n|error|, {100 * errors[-1]:.0f} % in all", xlabel="t")
fig.colorbar(image, ax=axes[1:])

# %% [markdown]
# ## What did GradNorm do?
#
# Left: the error over training. Middle: GradNorm's weights with L(0) = 1 (solid) and with that of the first batch
# (dotted), where the initial condition is starved. Right: the length of each weighted gradient as a share of all,
# under equal weights (dashed) and under GradNorm with L(0) = 1 (solid).

# %%
COLOURS = {"boundary": "#0072B2", "equation": "#E69F00", "initial": "#009E73"}
DASHES = dict(zip(runs, [(0, (4, 1.5)), ":", "-"], strict=True))


def smooth(values, width=50):
    """Running mean over steps, (steps, T)."""
    sums = torch.cat([torch.zeros_like(values[:1]), values]).cumsum(0)
    return (sums[width:] - sums[:-width]) / width


fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
for name, (_, errors, history) in runs.items():
    left.plot(range(50, STEPS + 1, 50), [100 * error for error in errors], "k", linestyle=DASHES[name], label=name)
    weights = torch.stack([info.weights for info in history])
    lengths = weights * torch.stack([info.grad_norms for info in history])
    shares = smooth(100 * lengths / lengths.sum(1, keepdim=True))
    for i, task in enumerate(tasks):
        style = {"color": COLOURS[task], "linestyle": DASHES[name]}
        if name.startswith("GradNorm"):
            middle.semilogy(weights[:, i], label=task if name.endswith("1") else None, **style)
        if not name.endswith("first L(0)"):
            right.plot(range(50, STEPS + 1), shares[:, i], **style)
left.set(title="relative L2 error (%)", xlabel="training step", ylim=(0, None))
left.legend()
middle.set(title="GradNorm's weights", xlabel="training step")
middle.legend()
right.set(title="share of the gradient (%)", xlabel="training step", ylim=(0, 60))

# %% [markdown]
# ## Going on
#
# - **L-BFGS**: a line search compares values of one function, so weights must not move inside its closure: call
#   `balancer.grad(..., update=False)` there, and `state = balancer.update(state, params, loss_fn, batch)` between
#   `optimizer.step(closure)` calls.
# - **Other rules**: `gn.equal_norms()` and `gn.ntk(...)` are those of jaxpi; `gn.static(gn.mean_weights(weights))` retrains
#   with the time average of a run's weights.
# - **Speed**: nested derivatives take `torch.compile` a minute. `gradnorm_func.demo.equations` propagates them by hand,
#   and compiles in seconds.
# - **Is it worth it?** Not here: GradNorm ties with equal weights, which suit this equation well. Where the losses
#   differ by orders of magnitude it is another matter. One run shows little either way: `python -m gradnorm_func.demo
#   pinn` compares seven ways to weight two equations over several seeds.
