"""DistributedDataParallel with one all-reduce of a few numbers; the ranks' batches are of different sizes.

torchrun --nproc-per-node 2 ddp.py"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy import Model, batches, prove

import gradnorm_func as gn

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model = DistributedDataParallel(Model())  # forks inside: see Model.forward
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
balancer = gn.gradnorm()
state = balancer.init(3, dtype=torch.float64)

for batch in batches(rank, ranks):
    losses, copies = model(**batch)
    n = len(batch["x"])
    # Runs the heads backwards and no further. Reduce before balancing, never the weights after it: the norm of the
    # mean gradient is not the mean of the norms.
    stats = gn.all_reduce(gn.measure_losses(losses, copies, num_examples=n))
    state, info = balancer.balance(state, stats)  # the same bits on all ranks, and so is info.finite
    # DDP takes the mean over ranks, which is that over examples only if each rank counts by its share of them.
    share = ranks * n / stats.num_examples
    optimizer.zero_grad()
    # info.weights are those for this step, in the order of task_names, which sorts; state.weights are for the next.
    (share * gn.weighted_sum(losses, info.weights)).backward()
    if info.finite:
        optimizer.step()

prove(state.weights, model.parameters())
dist.destroy_process_group()
