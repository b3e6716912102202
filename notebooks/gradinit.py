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
# # GradInit: a deep network that will not start, and what its scales want to be
#
# A residual network of 34 layers without normalisation, He's initialisation, real digits. Its gradient at the start
# is so large that SGD diverges. GradInit (Zhu et al., NeurIPS 2021) keeps the random values and learns one factor
# for each parameter tensor, so that the first steps of training lower the loss as much as they can while the
# gradient stays below γ.

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import gradnorm_func as gn
from gradnorm_func.demo import gradinit

torch.set_num_threads(1)
data, _, test = gradinit.load()
torch.manual_seed(0)
model = gradinit.Residual()
call = gn.functional(model)


def loss_fn(params, batch):
    return cross_entropy(call(params, batch[0]), batch[1])


def minibatches(seed, size=32):
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
    return [(data.x[rows], data.y[rows]) for rows in order.split(size) if len(rows) == size]


start = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
learned, state, history = gn.gradinit(start, loss_fn, minibatches(0), steps=100, optimizer=gn.rescale_adam(0.01),
                                      progress=False)  # fmt: skip
print(f"gradient norm: {float(history.grad_norm[0]):.0f} at the start, {float(history.grad_norm[-1]):.2f} at the end")

# %%
figure, (norm, scales) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
norm.plot(history.grad_norm, color="#0072B2")
norm.axhline(1, color="0.4", linestyle="--")
norm.text(1, 0.8, "γ = 1; below it, the loss after a step is lowered", va="top")
norm.set(
    yscale="log", ylim=(0.3, None), xlabel="GradInit step", ylabel="gradient norm", title="the gradient comes down to γ"
)
weights = [(name, m) for name, m in zip(gn.task_names(start), state.scales.tolist(), strict=True) if "weight" in name]
inside = [(int(name.split(".")[1]), m) for name, m in weights if name.startswith("inner")]
for first, (colour, marker, label) in enumerate((("#0072B2", "o", "first of the block"), ("#D55E00", "s", "second"))):
    x, y = zip(*sorted((i // 2 + 1, m) for i, m in inside if i % 2 == first), strict=True)
    scales.plot(x, y, marker=marker, color=colour, markersize=4, label=label)
scales.axhline(1, color="0.4", linestyle="--", linewidth=1)
scales.set(xlabel="residual block", ylabel="learned factor of the weight", title="what it changes", ylim=(0, None))
scales.legend(frameon=False)
plt.show()

# %% [markdown]
# Left: from a gradient that no learning rate survives down to γ. Right: the residual branches are shrunk. Nobody told
# it about residual networks: that is the remedy that people found by hand for this architecture.
#
# Now train, from both, with plain SGD at three learning rates.


# %%
def train(params, rate, epochs=4):
    params = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = torch.optim.SGD(params.values(), lr=rate, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        for batch in minibatches(1 + epoch):
            optimizer.zero_grad()
            loss = loss_fn(params, batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    correct = call(params, test.x).argmax(-1) == test.y
    return torch.tensor(losses), 100 * float(correct.float().mean())


results = {
    (name, rate): train(params, rate)
    for name, params in (("default", start), ("GradInit", learned))
    for rate in (0.01, 0.03, 0.1)
}
for (name, rate), (losses, accuracy) in results.items():
    last = float(losses[-20:].mean())
    print(f"{name:9} lr {rate:<5} loss at the end {last:9.3f}   test accuracy {accuracy:5.1f} %")

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
for ax, rate in zip(axes, (0.01, 0.03, 0.1), strict=True):
    for name, colour, line in (("default", "#D55E00", "--"), ("GradInit", "#0072B2", "-")):
        losses, accuracy = results[name, rate]
        label = f"{name}: {accuracy:.0f} %" + ("" if losses[-1].isfinite() else " (diverged)")
        ax.plot(losses.nan_to_num(1e9).clamp(max=500), color=colour, linestyle=line, linewidth=2, label=label)
    ax.axhline(2.303, color="0.5", linewidth=0.8)
    ax.set(yscale="log", ylim=(5e-3, 1e3), xlabel="training step", title=f"SGD, learning rate {rate:g}")
    ax.legend(frameon=False, title="test accuracy", loc="upper right", bbox_to_anchor=(1, 0.9))
ax.text(124, 2.6, "guessing", ha="right", fontsize=8)
axes[0].set_ylabel("training loss, cut at 500")
plt.show()

# %% [markdown]
# One seed, for the picture; `python -m gradnorm_func.demo gradinit` does five, with Adam and a Post-LN transformer
# besides, where it brings no real gain.
