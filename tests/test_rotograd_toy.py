"""Two tasks on one point of the plane: rotations let both reach their optimum if these are equally far from zero."""

import torch

import gradnorm_func as gn


def ends(optima, rotate, starts=5, steps=200):
    """How far both tasks end from their optima, (starts, 2); the model is the point z alone."""

    def task(s):
        return lambda params, z, batch: ((z[0] - s).square() * torch.tensor([1.0, 4.0])).sum()

    loss_fn = gn.multi_task_loss(lambda params, batch: params["z"].unsqueeze(0), [task(s) for s in optima])
    method = gn.rotograd(2, scale="none", burn_in=None, optimizer=gn.adam(0.05))

    def step(z, state):
        grads, state, _ = method.grad(state, {"z": z}, loss_fn, torch.zeros(1), update=rotate)
        return z - 0.01 * grads["z"], state

    z, fresh = 0.5 * torch.randn(starts, 2), method.init(2)
    state = type(fresh)(*(torch.utils._pytree.tree_map(lambda x: torch.stack([x] * starts), leaf) for leaf in fresh))
    for _ in range(steps):
        z, state = torch.func.vmap(step)(z, state)
    seen = (state.rotations @ z[:, None, :, None]).squeeze(-1)
    return (seen - torch.tensor(optima)[:, None]).norm(dim=-1)


def test_both_tasks_reach_their_optimum():
    assert (ends((-1.5, 1.5), rotate=True) < 0.1).all()
    assert (ends((-1.5, 1.5), rotate=False) > 1).all()


def test_not_if_one_optimum_is_farther_from_zero():
    assert (ends((0.5, 1.5), rotate=True).amax(1) > 0.3).all()
