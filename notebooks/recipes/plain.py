"""A plain loop: the parts of an nn.Module as functions, gradients written to `.grad` for any torch.optim optimizer.

python plain.py              and python plain.py --compile, where balancing and gradients are one graph"""

import sys

import torch
from toy import LOSSES, Model, batches, prove

import gradnorm_func as gn

model = Model()
trunk = gn.functional(model.trunk, "trunk")  # the prefix is the path of the part in the model
heads = {task: gn.functional(head, f"heads.{task}") for task, head in model.heads.items()}


def loss_of(task):
    return lambda params, z, batch: LOSSES[task](heads[task](params, z), batch[task])


loss_fn = gn.multi_task_loss(lambda params, batch: trunk(params, batch["x"]), {task: loss_of(task) for task in heads})
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
balancer = gn.gradnorm()
state = balancer.init(len(heads), dtype=torch.float64)
step = torch.compile(balancer.grad, fullgraph=True) if "--compile" in sys.argv else balancer.grad

for batch in batches():
    params = dict(model.named_parameters())
    grads, state, info = step(state, params, loss_fn, batch)
    if info.finite:  # otherwise the state is the old one, and the gradients are not to be stepped on
        gn.write_grads(model, grads)  # overwrites: no zero_grad() needed
        optimizer.step()

prove(state.weights, model.parameters())
