"""What of RotoGrad's state moves in a step: masks, turns, frozen and refused steps."""

from __future__ import annotations

import math

import pytest
import torch
from rotograd_cases import F64, VARIANTS, D, T, build, by_example, flat, problem, start

import gradnorm_func as gn


def test_absent_tasks_keep_their_rotations():
    params, loss_fn, batch = problem()
    method = gn.rotograd(D, scale="gradnorm", alpha=1.0)
    state = method.init(T, rotations=start(), dtype=F64)
    _, state, _ = method.grad(state, params, loss_fn, batch)
    mask = torch.tensor([True, False, True])
    grads, new, info = method.grad(state, params, loss_fn, batch, mask=mask)
    assert torch.equal(new.rotations[1], state.rotations[1])
    assert torch.equal(new.weights[1], state.weights[1])
    assert torch.equal(new.moments.mean[1], state.moments.mean[1])
    assert not torch.equal(new.rotations[0], state.rotations[0])
    assert not grads["heads"]["t1"].any()
    two = gn.multi_task_loss(loss_fn.backbone, [loss_fn.functions[k] for k in (0, 2)])
    pair = gn.rotograd(D)
    _, _, alone = pair.grad(pair.init(2, rotations=state.rotations[[0, 2]], dtype=F64), params, two, batch)
    torch.testing.assert_close(info.rotation_losses[[0, 2]], alone.rotation_losses)


@pytest.mark.parametrize("how", ["whole", "micro-batches"])
@pytest.mark.parametrize("name", [*VARIANTS, "cooperative"])
def test_tasks_that_come_one_after_the_other(name, how):
    """A task that has not been seen has no L(0) yet: nothing of that may reach the others, or its head."""
    params, loss_fn, batch = problem()
    loss_fn, batch = by_example(loss_fn, batch)
    if name == "cooperative":
        method = gn.rotograd(D, scale="none", cooperative=0, normalize=True)
    else:
        method = build(name, normalize=True)
    state = method.init(T, dtype=F64)
    seen = torch.zeros(T, dtype=torch.bool)
    keywords = {"micro_batches": 3} if how == "micro-batches" else {}
    for step in range(12):
        mask = torch.arange(T) != step % 2  # the first and the second in turn, the third always
        seen |= mask
        grads, state, info = method.grad(state, params, loss_fn, batch, mask=mask, **keywords)
        assert bool(info.finite)
        assert int(state.step) == step + 1
        assert torch.equal(state.initial_losses.isfinite(), seen)
        assert all(leaf.isfinite().all() for leaf in flat((grads, state.rotations, state.moments, info)))
        for k in range(T):
            assert bool(grads["heads"][f"t{k}"].any()) == bool(mask[k])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kth_step(name):
    """Rotations, weights and L(0) move in their turn; the trunk's factors are those of every step."""
    params, loss_fn, batch = problem()
    method, always = build(name, every=3, burn_in=4), build(name, burn_in=None)
    state = method.init(T, rotations=start(d=VARIANTS[name].get("rotation_shape", D)), dtype=F64)
    for step in range(9):
        now = {**params, "trunk": params["trunk"] * (1 - 0.05 * step)}
        old = state
        grads, state, info = method.grad(old, now, loss_fn, batch)
        expected, moved, other = always.grad(old, now, loss_fn, batch)
        assert int(state.step) == step + 1
        if step == 6:  # the burn-in of step 4, in the next turn
            torch.testing.assert_close(state.initial_losses, info.losses)
            assert not torch.equal(state.initial_losses, old.initial_losses)
            continue
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(info, other)
        target = moved if step % 3 == 0 else old._replace(step=old.step + 1)
        torch.testing.assert_close(state, target, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(method.update(old, now, loss_fn, batch).rotations, state.rotations)
        assert torch.equal(state.rotations, old.rotations) == (step % 3 != 0)


@pytest.mark.parametrize("name", ["rotograd", "0.1.2"])
def test_every_kth_step_compiled_is_one_graph(name):
    torch._dynamo.reset()
    params, loss_fn, batch = problem()
    method, graphs = build(name, every=2, burn_in=3), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda s, p, b: method.grad(s, p, loss_fn, b), fullgraph=True, backend=count)
    one = two = method.init(T, rotations=start(), dtype=F64)
    for step in range(8):
        now = {**params, "trunk": params["trunk"] * (1 - 0.05 * step)}
        result = compiled(one, now, batch)
        expected = method.grad(two, now, loss_fn, batch)
        for a, b in zip(flat(result), flat(expected), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        one, two = result[1], expected[1]
    assert len(graphs) == 1


def test_a_step_between_turns_measures_no_moments():
    params, loss_fn, batch = problem()
    method, stats = gn.rotograd(D, every=2), []
    state = method.init(T, dtype=F64)
    reduce = lambda part: stats.append(part) or part
    for _ in range(2):
        state = method.update(state, params, loss_fn, batch, reduce=reduce)
    assert [part.cross == () for part in stats] == [False, True]
    with pytest.raises(ValueError, match="in which nothing moves"):
        method.balance(state, stats[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_frozen_state_stays(name):
    params, loss_fn, batch = problem()
    method = build(name)
    state = method.init(T, dtype=F64)
    for update in (False, torch.tensor(False)):
        grads, same, _ = method.grad(state, params, loss_fn, batch, update=update)
        assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(flat(same), flat(state), strict=True))
    moving, _, _ = method.grad(state, params, loss_fn, batch)
    torch.testing.assert_close(grads, moving)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_leave_the_state(name, bad):
    params, loss_fn, batch = problem()
    method = build(name)
    state = method.init(T, dtype=F64)
    _, state, _ = method.grad(state, params, loss_fn, batch)
    broken = {**params, "heads": {**params["heads"], "t1": params["heads"]["t1"] * bad}}
    _, new, info = method.grad(state, broken, loss_fn, batch)
    assert not bool(info.finite)
    for a, b in zip(flat(new), flat(state), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(FloatingPointError, match=r"'t1'.*skip this step"):
        gn.check_finite(info, loss_fn.heads)


def test_a_task_without_gradient_is_harmless():
    params, loss_fn, batch = problem()
    dead = gn.multi_task_loss(loss_fn.backbone, [*loss_fn.functions[:2], lambda p, z, b: 0.0 * z.sum() + 1.0])
    for name in VARIANTS:
        method = build(name)
        state = method.init(T, dtype=F64)
        for _ in range(3):
            grads, state, info = method.grad(state, params, dead, batch)
        assert bool(info.finite)
        assert all(leaf.isfinite().all() for leaf in flat((grads, state.rotations, info)))
