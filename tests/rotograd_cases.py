"""Problems and variants of RotoGrad for its tests."""

from __future__ import annotations

import torch

import gradnorm_func as gn

F64 = torch.float64
T, D, B = 3, 6, 8

VARIANTS = {
    "rotograd": {},
    "none": {"scale": "none"},
    "gradnorm": {"scale": "gradnorm", "alpha": 1.0, "normalize": True},
    "exp": {"map": "exp"},
    "fixed base": {"map": "exp", "moving": False, "form": "0.1.6"},
    "fixed base, cayley": {"moving": False},
    "0.1.2": {"form": "0.1.2", "scale": "gradnorm", "alpha": 0.5, "cooperative": 3},
    "first features": {"rotation_shape": 4},
}


def problem(dtype=F64, d=D, tasks=T):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=F64).to(dtype)
    params = {"trunk": rand(5, d), "heads": {f"t{k}": rand(d, 2) for k in range(tasks)}}
    batch = {"x": rand(B, 5), "y": rand(tasks, B, 2)}

    def head(k):
        scale = 10.0 ** (k - 1)
        return lambda p, z, batch: scale * (torch.tanh(z @ p["heads"][f"t{k}"]) - batch["y"][k]).square().mean()

    loss_fn = gn.multi_task_loss(
        lambda p, batch: torch.tanh(batch["x"] @ p["trunk"]), {f"t{k}": head(k) for k in range(tasks)}
    )
    return params, loss_fn, batch


def start(seed=1, dtype=F64, tasks=T, d=D):
    rotations = gn.random_rotations(tasks, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return rotations.to(dtype)


def by_hand(params, loss_fn, batch, rotations):
    """Losses, g̃_k and g_k of every task by a loop of torch.autograd.grad."""
    z = loss_fn.backbone(params, batch).detach()
    losses, at_heads, at_z = [], [], []
    for k, head in enumerate(loss_fn.functions):
        r = (z @ rotations[k].mT).requires_grad_()
        loss = head(params, r, batch)
        (grad,) = torch.autograd.grad(loss, r)
        losses.append(loss.detach())
        at_heads.append(grad)
        at_z.append(grad @ rotations[k])
    return torch.stack(losses), torch.stack(at_heads), torch.stack(at_z)


def by_example(loss_fn, batch):
    """The same loss on a batch whose targets have the example axis first, as micro_batches cuts it."""
    swap = lambda batch: {"x": batch["x"], "y": batch["y"].transpose(0, 1)}

    def head(k):
        return lambda p, z, batch: loss_fn.functions[k](p, z, swap(batch))

    heads = {f"t{k}": head(k) for k in range(T)}
    return gn.multi_task_loss(lambda p, batch: loss_fn.backbone(p, swap(batch)), heads), swap(batch)


def build(name, **more):
    hyper = {"rotation_shape": D, **VARIANTS[name], **more}
    return gn.rotograd(hyper.pop("rotation_shape"), **hyper)


def flat(tree):
    return gn._core.tree.flatten(tree)[0]
