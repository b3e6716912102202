"""FSDP2: trunk and heads sharded, and the norms taken from the step's own backward pass, for nothing.

torchrun --nproc-per-node 2 fsdp2.py"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from toy import Model, batches, prove

import gradnorm_func as gn

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (ranks,))
model = Model()
# Not the module around them, which hands out the copies: they are views, of which FSDP2 warns.
for part in (*model.trunk[::2], model.trunk, *model.heads.values()):
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)  # after sharding: these are other parameters
balancer = gn.gradnorm()
state = balancer.init(3, dtype=torch.float64)

for batch in batches(rank, ranks):
    losses, copies = model(**batch)
    n = len(batch["x"])
    total = torch.tensor(n, dtype=torch.float64)
    dist.all_reduce(total)
    share = ranks * n / total  # FSDP2 takes the mean over ranks, not over examples; 1 for batches of one size
    # GradNorm's gradient uses the weights from before the step; those of the first are in units of its losses.
    weights = balancer.weights(state, gn.all_reduce(gn.measure_losses(losses, needs="losses", num_examples=n)))
    optimizer.zero_grad()
    (share * gn.weighted_sum(losses, weights)).backward()
    # After backward, with what it was multiplied by, and before balance: the copies have kept their gradients.
    stats = gn.measure_losses(losses, copies, weights=weights, scale=share, num_examples=n)
    state, info = balancer.balance(state, gn.all_reduce(stats))
    if info.finite:
        optimizer.step()

prove(state.weights, model.parameters())
dist.destroy_process_group()
