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
# # RotoGrad on its toys: do rotations let both tasks reach their optimum?
#
# Two tasks share one point z of the plane, which a small network puts there. Their losses have their minima in
# different places, so without help z ends between the two. RotoGrad (Javaloy & Valera, ICLR 2022) gives each task
# a view of its own, $r_k = R_k z$, and turns the rotations $R_k$ until the tasks' gradients at z agree. The paper
# says that then both tasks reach their optimum. Here is the claim, over ten seeds, on a convex and on a non-convex
# pair of losses, with the published settings: SGD at 0.001, rotations by Adam at 0.05, 400 steps.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch

import gradnorm_func as gn
from gradnorm_func.demo import rotograd

torch.set_num_threads(1)
SEEDS, STEPS = 10, 400
paths = rotograd.toys(SEEDS, STEPS, chosen=rotograd.TOYS[:2], kinds=[rotograd.AS_THEY_ARE])
rotograd.figure(paths)

# %% [markdown]
# Lines are what each task saw over training (thin contours: its loss; star: its optimum; dot: the end). Above,
# without rotations, both tasks see one and the same z, and neither gets what it wants. Below, each has turned its
# view.
#
# Convex: both arrive, on every seed. Non-convex: with the published rotation rate, which hardly falls, the views do
# not stop turning, and neither task settles. The theory wants the rotations' rate to fall faster than the network's;
# the table shows what that brings (a factor of 0.99 a step in place of 0.99999).

# %%
print(rotograd.toy_table(paths))

# %% [markdown]
# ## What the rotations do to the conflict
#
# The same in your own code: any `multi_task_loss`, `gn.rotograd` in the place of `gn.gradnorm`. `info.head_cosines`
# is the angle between the task gradients as the heads see them, `info.cosines` the one after rotating back, which is
# what the trunk gets.

# %%
bowls = [lambda params, z, x, s=s: rotograd.bowl(z, s) for s in (-1.5, 1.5)]
loss_fn = gn.multi_task_loss(lambda params, x: x @ params["weight"] + params["bias"], bowls)
params = {"weight": torch.eye(2), "bias": torch.tensor([0.3, -0.4])}
method = gn.rotograd(2, scale="none", optimizer=gn.adam(0.05))
state, history = method.init(2), []
for _ in range(200):
    grads, state, info = method.grad(state, params, loss_fn, torch.zeros(1, 2))
    params = {name: value - 0.002 * grads[name] for name, value in params.items()}
    history.append((info.head_cosines[0, 1], info.cosines[0, 1]))

# %%
figure, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
seen, got = torch.tensor(history).T
ax.plot(seen, color="#D55E00", linestyle="--", label="as the heads see them")
ax.plot(got, color="#0072B2", label="rotated back: what the trunk gets")
ax.axhline(0, color="0.6", linewidth=0.8)
ax.set(xlabel="step", ylabel="cosine of the two gradients", ylim=(-1.05, 1.05), title="the conflict, turned away")
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# Negative is conflict. The rotations need some tens of steps, then the trunk is pulled in one direction by both
# tasks. Whether that helps a real model is another question: `python -m gradnorm_func.demo rotograd` compares four
# methods on six tasks over five seeds, and there GradNorm alone does better.
