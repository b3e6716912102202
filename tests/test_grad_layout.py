"""Gradients may come transposed; fused optimizers read memory as it lies, so `.grad` must have the leaf's layout."""

from __future__ import annotations

import functools

import torch

import gradnorm_func as gn


def stacked_problem():
    """Affine heads under vmap: the gradient of their weight comes out transposed in memory."""

    def head(params, z, x):
        return torch.nn.functional.linear(z, params["w"]).sin().sum(1).square().mean()

    torch.manual_seed(0)
    params = {"trunk": torch.randn(4, 5), "heads.w": torch.randn(3, 2, 5)}
    return gn.multi_task_loss(lambda p, x: x @ p["trunk"], gn.stacked_heads(head, "heads")), params, torch.randn(7, 4)


def second_grads(loss_fn, params, x):
    """Of the second pass: the first one, which finds out what the heads own, goes another way."""
    gn.gradnorm_grad(gn.init_state(3), params, loss_fn, x)
    return gn.gradnorm_grad(gn.init_state(3), params, loss_fn, x)[0]


def test_the_case_is_the_one_meant():
    loss_fn, params, x = stacked_problem()
    grads = second_grads(loss_fn, params, x)
    assert grads["heads.w"].stride() != params["heads.w"].stride()


def test_train_with_a_fused_optimizer():
    loss_fn, params, x = stacked_problem()
    ends = [
        gn.train(
            params, loss_fn, [x] * 5, progress=False, optimizer=functools.partial(torch.optim.Adam, lr=0.1, fused=fused)
        )[0]
        for fused in (False, True)
    ]
    torch.testing.assert_close(ends[1], ends[0])


def test_write_grads_with_a_fused_optimizer():
    loss_fn, params, x = stacked_problem()
    grads = second_grads(loss_fn, params, x)
    ends = []
    for fused in (False, True):
        leaves = {name: value.clone() for name, value in params.items()}
        gn.write_grads(leaves, grads)
        assert all(torch.equal(leaf.grad, grads[name]) for name, leaf in leaves.items())
        torch.optim.Adam(list(leaves.values()), lr=0.1, fused=fused).step()
        ends.append(leaves)
    torch.testing.assert_close(ends[1], ends[0])
