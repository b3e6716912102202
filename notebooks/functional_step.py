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
# # GradNorm inside your own training step
#
# Everything in `gradnorm_func` is a function of its arguments, so it goes into any training step that is one. Here
# the same three tasks on real digits are trained four times: with an optimizer written on the spot, with all of that
# as one compiled graph, with TorchOpt, and with `torch.optim`. At the end eight seeds run side by side.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.func import vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import gradnorm_func as gn
from gradnorm_func import plot

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)  # so that the runs below can be compared to many digits
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images), torch.tensor(labels)
data = {"x": x / 16, "digit": y, "even": (y % 2 == 0).double(), "ink": x.sum(1)}  # ink: 200 to 400, a large loss

# %% [markdown]
# ## The model
#
# Parameters are a dict; a trunk that all tasks share, and a head for each. `multi_task_loss` tells the library where
# one ends and the others begin, and that is what makes the task gradients free.


# %%
def init(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = {"trunk.0": (64, 64), "trunk.1": (64, 64), "digit": (64, 10), "even": (64, 1), "ink": (64, 1)}
    return {name: torch.randn(a, b, generator=draw) * (1.4 / a**0.5) for name, (a, b) in sizes.items()}


def trunk(params, batch):
    return torch.relu(torch.relu(batch["x"] @ params["trunk.0"]) @ params["trunk.1"])


loss_fn = gn.multi_task_loss(
    trunk,
    {
        "digit": lambda params, z, batch: cross_entropy(z @ params["digit"], batch["digit"]),
        "even": lambda params, z, batch: binary_cross_entropy_with_logits((z @ params["even"])[:, 0], batch["even"]),
        "ink": lambda params, z, batch: mse_loss((z @ params["ink"])[:, 0], batch["ink"]),
    },
)
balancer = gn.gradnorm(alpha=0.5, form="log", optimizer=gn.adam(0.1))


def batches(steps=200, size=128):
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (size,), generator=draw)
        yield {name: column[rows] for name, column in data.items()}


# %% [markdown]
# ## The step
#
# In go parameters, momentum, the balancer's state and a batch; out come the new ones, and what one would log. The
# gradient is that of Σ wᵢ Lᵢ, clipped here as one clips anywhere.


# %%
def step(carry, batch):
    params, momentum, state = carry
    grads, state, info = balancer.grad(state, params, loss_fn, batch)
    size = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    momentum = {name: 0.9 * momentum[name] + grads[name] / size.clamp(min=1) for name in params}
    params = {name: params[name] - 0.02 * momentum[name] for name in params}
    return (params, momentum, state), info


def start(seed):
    params = init(seed)
    return params, {name: torch.zeros_like(leaf) for name, leaf in params.items()}, balancer.init(3)


def train(step, carry):
    history = []
    for batch in batches():
        carry, info = step(carry, batch)
        history.append(info)
    return carry, history


first = start(0)
before = {name: leaf.clone() for name, leaf in first[0].items()}
carry, history = train(step, first)
print("the parameters it was given are still the same:", all(torch.equal(first[0][n], before[n]) for n in before))

# %%
names = gn.task_names(loss_fn.heads)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
plot.loss_ratios(history, names=names, ax=axes[0], smooth=10)
plot.weights(history, names=names, ax=axes[1])
axes[0].set_title("losses over training")
axes[1].set_title("what GradNorm makes of the weights")
plt.show()

# %% [markdown]
# The loss of `ink` starts tens of thousands of times larger than the others, and at first it alone moves the trunk: the
# others rise. GradNorm takes its weight down until the gradients at z have the lengths that alpha asks for, and then
# all three losses fall.
#
# ## One graph
#
# Losses, task gradients, balancing, clipping and the optimizer compile into one graph, without a break and without a
# second compilation.

# %%
compiled_carry, _ = train(torch.compile(step, fullgraph=True), start(0))
difference = (compiled_carry[2].weights - carry[2].weights).abs().max()
weights = ", ".join(f"{float(weight):.3g}" for weight in carry[2].weights)
print(f"weights {weights}; compiled, they differ by at most {float(difference):.1e}")

# %% [markdown]
# ## Somebody else's optimizer
#
# TorchOpt keeps the functional style (its Adam does not compile with `fullgraph=True`, so compile `balancer.grad` and
# leave the update outside). With `torch.optim`, `gn.write_grads` is the bridge: the one function that writes to what it
# is given.

# %%
final = {}
params, state = init(0), balancer.init(3)
tensors = {name: leaf.clone() for name, leaf in params.items()}
optimizer = torch.optim.Adam(tensors.values(), lr=1e-3)
for batch in batches():
    grads, state, info = balancer.grad(state, tensors, loss_fn, batch)
    gn.write_grads(tensors, grads)
    optimizer.step()
final["torch.optim"] = state.weights

try:
    import torchopt
except ImportError:
    print("TorchOpt is not installed: pip install torchopt")
else:
    adam, state = torchopt.adam(1e-3), balancer.init(3)
    moments = adam.init(params)
    for batch in batches():
        grads, state, info = balancer.grad(state, params, loss_fn, batch)
        updates, moments = adam.update(grads, moments, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    final["TorchOpt"] = state.weights
for name, weights in final.items():
    print(f"Adam of {name:12} weights", [round(float(w), 4) for w in weights])

# %% [markdown]
# ## Eight seeds side by side
#
# A pure step can be mapped: every tensor of the carry gets a leading axis of seeds, and the loop stays as it is.
# (`gn.sweep` does this for grids of hyperparameters, with a progress bar and the best run.)

# %%
starts = [start(seed) for seed in range(8)]
stacked = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *starts)
_, rows = train(vmap(step, in_dims=(0, None)), stacked)
over_seeds = torch.stack([info.weights for info in rows])  # (steps, seeds, tasks)
figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
plot.compare({name: over_seeds[:, :, i].T for i, name in enumerate(names)}, ax=ax)
ax.set(yscale="log", ylabel="weight", title="the weights of eight seeds agree")
plt.show()

# %% [markdown]
# The line is the median of the seeds, the band their range.
