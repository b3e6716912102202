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
# A PINN learns the solution of a differential equation from the equation itself. Its losses are mean squared
# residuals: of the equation inside, of the boundary condition, of the initial condition. Their gradients differ in
# size, and the weights of the losses decide what the network learns first, or at all.
#
# Here: Burgers' equation $u_t + u\,u_x = \nu\,u_{xx}$, $u(0, x) = -\sin \pi x$, $u(t, \pm 1) = 0$. A shock forms at
# $x = 0$. To be done in a minute we take few steps and $\nu = 0.05/\pi$, five times the usual viscosity. The exact
# solution is known, so we can see who comes closer to it: equal weights, GradNorm, or the neural-tangent-kernel rule.

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
from numpy.polynomial.hermite import hermgauss
from torch.func import grad, vmap

import gradnorm_func as gn

torch.manual_seed(0)
torch.set_num_threads(1)  # the network is too small to be worth several cores
STEPS = 1000
VISCOSITY = 0.05 / math.pi

# %% [markdown]
# ## The network and its residuals
#
# `u(params, t, x)` is written for **one point**, two scalars. Then `torch.func.grad` is the derivative by an argument,
# nested as often as the equation asks. Every residual is a function of one point, too.

# %%
layers = [torch.nn.Linear(2, 24), torch.nn.Tanh()]
for _ in range(2):
    layers += [torch.nn.Linear(24, 24), torch.nn.Tanh()]
model = torch.nn.Sequential(*layers, torch.nn.Linear(24, 1))
net = gn.functional(model)  # the module as a pure function of its parameters


def u(params, t, x):
    return net(params, torch.stack([t, x])).squeeze()


def equation(params, point):
    t, x = point
    u_x = grad(u, 2)
    u_t, u_xx = grad(u, 1)(params, t, x), grad(u_x, 2)(params, t, x)
    return u_t + u(params, t, x) * u_x(params, t, x) - VISCOSITY * u_xx


residuals = {
    "boundary": lambda params, point: u(params, *point),
    "equation": equation,
    "initial": lambda params, point: u(params, *point) + torch.sin(math.pi * point[1]),
}

# %% [markdown]
# ## The losses
#
# A loss is the mean square of one residual over points of its own: `vmap` runs the residual over all of them. The
# losses share nothing but the parameters. That is `multi_task_loss(None, ...)`: every loss runs once, and its gradient
# norm comes out of the backward pass that training needs anyway.
#
# Mind:
#
# - `requires_grad_()` and `torch.autograd.grad(create_graph=True)` inside a loss work in eager mode, but not under
#   `torch.compile`, `vmap` and `gn.sweep`: there derivatives are taken by `torch.func`, as here.
# - Weights that are computed from residuals (causal training, attention) must be detached: `.detach()`.
# - Draw points outside of `vmap`, as here, or in the loss, but not in the function of one point.


# %%
def mean_square(name):
    return lambda params, batch: vmap(residuals[name], in_dims=(None, 0))(params, batch[name]).square().mean()


loss_fn = gn.multi_task_loss(None, {name: mean_square(name) for name in residuals})
tasks = gn.task_names(loss_fn.heads)  # the order of the weights: boundary, equation, initial


def draw(generator):
    """New points for every step."""
    t, x = torch.rand(2, 300, generator=generator)
    x = 2 * x - 1
    return {
        "equation": torch.stack([t[:200], x[:200]], 1),
        "boundary": torch.stack([t[200:250], x[200:250].sign()], 1),
        "initial": torch.stack([torch.zeros(50), x[250:]], 1),
    }


# %% [markdown]
# ## The exact solution
#
# Hopf and Cole turn Burgers' equation into the heat equation. With $f(y) = e^{-\cos(\pi y)/2\pi\nu}$,
#
# $$u(t, x) = -\frac{\int \sin(\pi (x - \eta))\, f(x - \eta)\, e^{-\eta^2/4\nu t}\, d\eta}
#                  {\int f(x - \eta)\, e^{-\eta^2/4\nu t}\, d\eta}.$$


# %%
def burgers_solution(t, x):
    """Both integrals by Gauss-Hermite quadrature, in float64."""
    nodes, weights = (torch.from_numpy(array) for array in hermgauss(200))
    y = x.double().unsqueeze(-1) - 2 * (VISCOSITY * t.double().unsqueeze(-1)).sqrt() * nodes
    # softmax, because f spans many decades, and a common factor cancels in the quotient
    share = torch.softmax(weights.log() - torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY), -1)
    return -(share * torch.sin(math.pi * y)).sum(-1)


t_grid, x_grid = torch.meshgrid(torch.linspace(0, 1, 51), torch.linspace(-1, 1, 101), indexing="ij")
exact = burgers_solution(t_grid, x_grid).float()
points = torch.stack([t_grid, x_grid], -1)

# %% [markdown]
# ## Training
#
# One loop for any balancer. For GradNorm:
#
# - `form="log"` lets weights span decades, and a small learning rate lets them move slowly.
# - `alpha` says how far a slow loss may catch up; 0 makes all gradients equally long.
# - **Give L(0).** GradNorm asks how far each loss has come since L(0). A fresh network is nearly zero, and zero solves
#   the equation and fits the boundary: their first losses, printed below, are next to nothing. They grow from there, so
#   GradNorm takes them for slow tasks, and the initial condition for a fast one. Take L(0) from the sizes of the terms
#   instead, 1 here. Both choices are tried.
#
# The neural-tangent-kernel rule (`gn.ntk`, Wang et al. 2022) needs no L(0): its weights let all residuals fall at one
# rate. It looks at the gradient of every point, which is expensive, so it updates its weights only every 20 steps.


# %%
def train(balancer, every=1, **start):
    """The field at the end, its relative L2 error in percent, and the weights over training."""
    trained, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(trained.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.02 ** (1 / STEPS))
    params, state = dict(trained.named_parameters()), balancer.init(len(tasks), **start)
    weights = []
    for step in range(STEPS):
        grads, state, info = balancer.grad(state, params, loss_fn, draw(generator), update=step % every == 0)
        gn.write_grads(params, grads)
        optimizer.step()
        schedule.step()
        weights.append(info.weights)
    with torch.no_grad():
        field = trained(points).squeeze(-1)
    return field, 100 * float((field - exact).norm() / exact.norm()), torch.stack(weights)


slow = gn.gradnorm(alpha=2.0, form="log", optimizer=gn.adam(0.0025))
runs = {
    "equal weights": train(gn.static()),
    "GradNorm, L(0) of the first batch": train(slow),
    "GradNorm, L(0) = 1": train(slow, initial_losses=[1.0, 1.0, 1.0]),
    "neural tangent kernel": train(gn.ntk(residuals), every=20),
}
first = loss_fn(dict(model.named_parameters()), draw(torch.Generator().manual_seed(0)))
print("losses of the first batch:", ", ".join(f"{name} {float(loss.detach()):.3f}" for name, loss in first.items()))
for name, (_, error, _) in runs.items():
    print(f"{name:34} relative L2 error {error:.1f} %")

# %% [markdown]
# ## Where are they wrong?

# %%
figure, axes = plt.subplots(1, 5, figsize=(15, 3.4), layout="constrained", sharey=True)
box = {"origin": "lower", "extent": (0, 1, -1, 1), "aspect": "auto"}
image = axes[0].imshow(exact.T, cmap="RdBu_r", vmin=-1, vmax=1, **box)
axes[0].set(title="exact solution u", ylabel="x")
figure.colorbar(image, ax=axes[0])
worst = max(float((field - exact).abs().max()) for field, _, _ in runs.values())
for ax, (name, (field, error, _)) in zip(axes[1:], runs.items(), strict=True):
    image = ax.imshow((field - exact).abs().T, cmap="magma_r", vmin=0, vmax=worst, **box)
    ax.set_title(f"{name}:\n{error:.0f} % error", fontsize=11)
for ax in axes:
    ax.set_xlabel("t")
figure.colorbar(image, ax=axes[1:], label="|error|")
plt.show()

# %% [markdown]
# ## What did the weights do?

# %%
COLOURS = {"boundary": "#0072B2", "equation": "#E69F00", "initial": "#009E73"}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained", sharey=True)
for ax, name in zip(axes, list(runs)[1:], strict=True):
    for i, task in enumerate(tasks):
        ax.semilogy(runs[name][2][:, i], color=COLOURS[task], label=task)
    ax.axhline(1, color="0.6", linewidth=0.8)
    ax.set(title=name, xlabel="training step")
axes[0].set(ylabel="weight of the loss", yticks=[0.1, 0.2, 0.5, 1, 2])
axes[0].yaxis.set_major_formatter("{x:g}")
axes[0].minorticks_off()
axes[0].legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# With the first batch's L(0), GradNorm takes the initial condition's weight down to a tenth, and the error at t = 0 is
# large. With L(0) = 1 it lowers the boundary's weight instead, and ends where equal weights end. The kernel rule comes
# closest: in the end it gives the initial condition and the boundary four times the weight of the equation.
#
# ## Going on
#
# - **Is it worth it?** One run shows little. `benchmarks/pinn.md` compares seven ways to weight two equations over
#   three seeds. On Burgers' equation with its usual viscosity, GradNorm with L(0) given beats equal weights on every
#   seed, and the kernel rule does as well. On Helmholtz' equation, where the losses differ by orders of magnitude,
#   equal weights end at an error of 27 %, GradNorm at 4 %, the kernel rule at 2 %, and one well chosen fixed weight
#   at 3 %.
# - **L-BFGS**: a line search compares values of one function, so weights must not move inside its closure: call
#   `balancer.grad(..., update=False)` there, and `state = balancer.update(state, params, loss_fn, batch)` between
#   `optimizer.step(closure)` calls.
# - **Other rules**: `gn.equal_norms()` is jaxpi's; `gn.static(gn.mean_weights(weights))` trains again with the time
#   average of a run's weights.
# - **Speed**: `torch.compile` takes long over nested derivatives. `benchmarks/equations.py` propagates the derivatives
#   layer by layer instead, and compiles in seconds.
