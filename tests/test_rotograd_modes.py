"""RotoGrad as a citizen of this package: purity, one graph, vmap, dtypes, loops."""

from __future__ import annotations

import pytest
import torch
from rotograd_cases import F64, VARIANTS, D, T, build, flat, problem, start

import gradnorm_func as gn


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_are_left_as_they_were(name):
    params, loss_fn, batch = problem()
    params = gn._core.tree.tree_map(lambda leaf: leaf.requires_grad_(), params)
    method = build(name)
    state = method.init(T, dtype=F64)
    _, state, _ = method.grad(state, params, loss_fn, batch)
    everything = (state, params, batch)
    before = [leaf.detach().clone() for leaf in flat(everything)]
    out = method.grad(state, params, loss_fn, batch)
    method.update(state, params, loss_fn, batch)
    for a, b in zip(flat(everything), before, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=0, equal_nan=True)
    assert not any(leaf.requires_grad for leaf in flat(out))
    assert all(leaf.grad is None for leaf in flat(params))


@pytest.mark.parametrize("name", VARIANTS)
def test_update_is_the_state_of_grad(name):
    params, loss_fn, batch = problem()
    method = build(name)
    one = two = method.init(T, dtype=F64)
    for _ in range(2):
        _, one, _ = method.grad(one, params, loss_fn, batch)
        two = method.update(two, params, loss_fn, batch)
    for a, b in zip(flat(one), flat(two), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", ["rotograd", "0.1.2", "fixed base", "fixed base, cayley"])
def test_one_graph_over_ten_steps_and_parity_with_eager(name):
    torch._dynamo.reset()
    params, loss_fn, batch = problem()
    method = build(name, burn_in=4)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda s, p, b: method.grad(s, p, loss_fn, b), fullgraph=True, backend=count)
    one = two = method.init(T, rotations=start(), dtype=F64)
    for _ in range(10):
        grads, one, info = compiled(one, params, batch)
        expected, two, other = method.grad(two, params, loss_fn, batch)
    assert len(graphs) == 1
    for a, b in zip(flat((grads, one, info)), flat((expected, two, other)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_inductor():
    torch._dynamo.reset()
    params, loss_fn, batch = problem(d=24)
    method = gn.rotograd(24)
    compiled = torch.compile(lambda s, p, b: method.grad(s, p, loss_fn, b), fullgraph=True)
    one = two = method.init(T, dtype=F64)
    for _ in range(3):
        grads, one, _ = compiled(one, params, batch)
        expected, two, _ = method.grad(two, params, loss_fn, batch)
    for a, b in zip(flat((grads, one)), flat((expected, two)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_vmap_over_seeds(name):
    params, loss_fn, batch = problem()
    method = build(name)
    size = VARIANTS[name].get("rotation_shape", D)
    states = [method.init(T, rotations=start(seed, d=size), dtype=F64) for seed in range(3)]
    stacked = gn._core.tree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    step = lambda s: method.grad(s, params, loss_fn, batch)
    _, stacked, _ = torch.func.vmap(step)(stacked)
    together = torch.func.vmap(step)(stacked)
    for i, state in enumerate(states):
        _, state, _ = step(state)
        alone = step(state)
        for a, b in zip(flat(together), flat(alone), strict=True):
            torch.testing.assert_close(a[i], b, equal_nan=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_permuting_tasks_permutes_everything(name):
    params, loss_fn, batch = problem()
    order = [2, 0, 1]
    method = build(name)
    rotations = start(d=VARIANTS[name].get("rotation_shape", D))
    mixed = gn.multi_task_loss(loss_fn.backbone, [loss_fn.functions[k] for k in order])
    plain = gn.multi_task_loss(loss_fn.backbone, loss_fn.functions)
    one = method.init(T, rotations=rotations, dtype=F64)
    two = method.init(T, rotations=rotations[order], dtype=F64)
    for _ in range(3):
        grads, one, info = method.grad(one, params, plain, batch)
        others, two, info_two = method.grad(two, params, mixed, batch)
        torch.testing.assert_close(grads, others)
    torch.testing.assert_close(one.rotations[order], two.rotations)
    torch.testing.assert_close(info.cosines[order][:, order], info_two.cosines)
    torch.testing.assert_close(info.weights[order], info_two.weights)


def test_float32_and_bfloat16_parameters():
    for dtype in (torch.float32, torch.bfloat16):
        params, loss_fn, batch = problem(dtype)
        method = gn.rotograd(D)
        grads, state, info = method.grad(method.init(T), params, loss_fn, batch)
        assert all(grad.dtype == dtype for grad in flat(grads))
        assert state.rotations.dtype == info.cosines.dtype == torch.float32
        assert bool(info.finite)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_scale(name):
    params, loss_fn, batch = problem()
    penalty = lambda p, z, batch: z.square().mean()
    method = build(name, backbone_loss=penalty)
    state = method.init(T, dtype=F64)
    grads, new, info = method.grad(state, params, loss_fn, batch)
    for scale in (2.0**10, torch.tensor(2.0**-3)):
        larger, same, other = method.grad(state, params, loss_fn, batch, loss_scale=scale)
        torch.testing.assert_close(larger, gn._core.tree.tree_map(lambda grad, s=scale: grad * s, grads))
        torch.testing.assert_close((same, other), (new, info), equal_nan=True)
        torch.testing.assert_close(method.update(state, params, loss_fn, batch, loss_scale=scale), new, equal_nan=True)
    _, same, info = method.grad(state, params, loss_fn, batch, loss_scale=1e308)
    assert not bool(info.finite)
    torch.testing.assert_close(same, state, rtol=0, atol=0, equal_nan=True)


def test_loss_scale_saves_small_gradients_in_float16():
    params, loss_fn, batch = problem(torch.float16)
    tiny = gn.multi_task_loss(
        loss_fn.backbone, [lambda p, z, b, head=head: 1e-6 * head(p, z, b) for head in loss_fn.functions[:2]]
    )
    method, scale = gn.rotograd(D), 2.0**14
    state = method.init(2)
    _, _, lost = method.grad(state, params, tiny, batch)
    grads, _, info = method.grad(state, params, tiny, batch, loss_scale=scale)
    in_full = lambda tree: gn._core.tree.tree_map(lambda leaf: leaf.to(F64), tree)
    expected, _, exact = method.grad(state, in_full(params), tiny, in_full(batch))
    torch.testing.assert_close(info.grad_norms, exact.grad_norms, rtol=1e-2, atol=0)
    assert (grads["trunk"].double() / scale - expected["trunk"]).norm() < 1e-2 * expected["trunk"].norm()
    assert (lost.grad_norms / exact.grad_norms - 1).abs().max() > 0.2


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_is_for_the_loss_alone(name):
    """What lies between heads and trunk, and the step on SO(m), are not the user's to round."""
    params, loss_fn, batch = problem(torch.float32)

    def in_full(fn):
        def run(*args):
            with torch.autocast("cpu", enabled=False):
                return fn(*args)

        return run

    exact = gn.multi_task_loss(in_full(loss_fn.backbone), [in_full(head) for head in loss_fn.functions])
    method = build(name)
    state = method.init(T)
    for keywords in ({}, {"micro_batches": 1}):
        expected = method.grad(state, params, exact, batch, **keywords)
        with torch.autocast("cpu", torch.bfloat16):
            result = method.grad(state, params, exact, batch, **keywords)
        for a, b in zip(flat(result), flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_rotations_stay_orthogonal_under_autocast():
    params, loss_fn, batch = problem(torch.float32)
    method = gn.rotograd(D, optimizer=gn.adam(0.02))
    state = method.init(T, rotations=start(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            _, state, info = method.grad(state, params, loss_fn, batch)
    r = state.rotations.double()
    assert (r.mT @ r - torch.eye(D, dtype=F64)).abs().max() < 1e-5
    torch.testing.assert_close(info.grad_norms, info.head_norms, rtol=1e-2, atol=0)


def test_checkpoint_and_train():
    params, loss_fn, batch = problem(torch.float32)
    method = gn.rotograd(D)
    params, state, history, _ = gn.train(params, loss_fn, [batch] * 5, balancer=method, progress=False)
    assert history.cosines.shape == (5, T, T)
    loaded = gn.load_state(method.init(T), gn.state_dict(state))
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(flat(loaded), flat(state), strict=True))


def test_aux_of_the_loss():
    params, loss_fn, batch = problem()
    keep = lambda f: lambda p, z, b: (f(p, z, b), z)
    with_aux = gn.multi_task_loss(
        lambda p, batch: (loss_fn.backbone(p, batch), "note"),
        [keep(f) for f in loss_fn.functions],
        has_aux=True,
    )
    method = gn.rotograd(D)
    state = method.init(T, rotations=start(), dtype=F64)
    _, _, _, (note, zs) = method.grad(state, params, with_aux, batch, has_aux=True)
    assert note == "note"
    torch.testing.assert_close(zs[1], loss_fn.backbone(params, batch) @ state.rotations[1].mT)
