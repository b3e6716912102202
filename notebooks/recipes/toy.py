"""What all recipes train, three tasks whose losses differ by orders of magnitude, and the proof that each ends with."""

import os
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import default_collate

import gradnorm_func as gn

STEPS, BATCH = 24, 24
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # from torchrun
LOSSES = {"kind": nn.functional.cross_entropy, "price": nn.functional.mse_loss, "size": nn.functional.l1_loss}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.heads = nn.ModuleDict({"kind": nn.Linear(8, 3), "price": nn.Linear(8, 1), "size": nn.Linear(8, 2)})
        self.double()  # so that the proof can be sharp; nothing else asks for it

    def forward(self, x, **targets):
        # One z for each head: there the gradients are compared. Accelerate's mixed precision, and so the Trainer's
        # bf16=True, hands half-precision outputs out as other tensors: then fork self.trunk(x).float().
        copies = gn.fork(self.trunk(x), self.heads)
        return {task: LOSSES[task](head(copies[task]), targets[task]) for task, head in self.heads.items()}, copies


def dataset():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 6, generator=draw, dtype=torch.float64)
    columns = {"x": x, "kind": x[:, :3].argmax(-1), "price": 10 * x[:, 3:4].square(), "size": 0.1 * x[:, 4:]}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(x))]


def batches(rank=0, ranks=1):
    """This rank's part of each batch; the parts are of different sizes."""
    data, cut = dataset(), [BATCH * k * k // ranks**2 for k in range(ranks + 1)]
    return [default_collate(data[i + cut[rank] : i + cut[rank + 1]]) for i in range(0, len(data), BATCH)]


def folder():
    """For checkpoints; all ranks must have the same one, so with torchrun it must be given."""
    return sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()


def prove(weights, parameters, form="invariant"):
    """Trains once more, in one process, on whole batches, with one autograd pass for each task, and compares.

    By SGD, not Adam, for Adam would not notice gradients that are all twice as long.
    """
    found = [weights, *(p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters)]
    model, balancer = Model(), gn.gradnorm(form=form)
    optimizer, state = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), balancer.init(3, dtype=torch.float64)
    for batch in batches():
        z = model.trunk(batch["x"])
        losses = [LOSSES[task](model.heads[task](z), batch[task]) for task in sorted(LOSSES)]
        norms = [torch.autograd.grad(loss, z, retain_graph=True)[0].norm() for loss in losses]
        stats = gn.TaskStats(torch.stack(losses), torch.stack(norms))
        optimizer.zero_grad()
        gn.weighted_sum(losses, balancer.weights(state, stats)).backward()
        optimizer.step()
        state, _ = balancer.balance(state, stats)
    gap = torch.stack([(a - b).abs().max() for a, b in zip(found, [state.weights, *model.parameters()], strict=True)])
    if RANK == 0:
        shown = ", ".join(f"{w:.2f}" for w in weights)
        print(f"weights [{shown}]; largest difference from one process: {gap.max():.0e}")
    if not gap.max() < 1e-10:
        raise SystemExit("the two runs differ")
