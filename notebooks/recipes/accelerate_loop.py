"""Hugging Face Accelerate with gradient accumulation: weights change once a step, not once a micro-batch.

python accelerate_loop.py    and torchrun --nproc-per-node 2 accelerate_loop.py"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from toy import BATCH, Model, dataset, prove

import gradnorm_func as gn

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
many = accelerator.num_processes > 1
micro = BATCH // (accelerator.num_processes * accelerator.gradient_accumulation_steps)
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset(), batch_size=micro))
balancer = gn.gradnorm(form="log")  # not "invariant": L(0) of a whole step is known after its last micro-batch
state = balancer.init(3, dtype=torch.float64, device=accelerator.device)
running = None

for batch in loader:
    with accelerator.accumulate(model):
        losses, copies = model(**batch)
        # Before backward, so that nothing need be known of what Accelerate multiplies the loss with. merge gives the
        # stats of the micro-batches' union; Accelerate counts all of them alike: keep them of one size (drop_last).
        stats = gn.measure_losses(losses, copies, num_examples=len(batch["x"]))
        running = gn.merge(running, stats)
        weights = state.weights  # GradNorm's gradient uses the weights from before the step, in all micro-batches
        accelerator.backward(gn.weighted_sum(losses, weights))
        if accelerator.sync_gradients:
            state, info = balancer.balance(state, gn.all_reduce(running) if many else running)
            running = None
            if not info.finite:
                optimizer.zero_grad()  # to None: the optimizer passes over all parameters
        optimizer.step()  # Accelerate passes over both calls until the last micro-batch of a step
        optimizer.zero_grad()

prove(state.weights, model.parameters(), "log")
accelerator.end_training()
