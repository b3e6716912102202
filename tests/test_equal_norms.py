"""jaxpi's "grad_norm" rule against a transcription of it with classic autograd."""

import functools

import pytest
import torch
from toys import make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64


def classic(params, problem, batch):
    """(T,) norms over all parameters, one backward pass a task."""
    theta = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    losses = problem.general(theta, batch)
    norms = []
    for task in sorted(losses):
        rows = torch.autograd.grad(losses[task], list(theta.values()), retain_graph=True, allow_unused=True)
        norms.append(torch.cat([row.flatten() for row in rows if row is not None]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize(("momentum", "every"), [(0.9, 1), (0.9, 3), (0.0, 2)])
def test_ten_steps_equal_the_rule(momentum, every):
    """Weights move in the steps 0, every, 2 every, ..., and the gradient is that of the weights from before."""
    problem = make_problem()
    everywhere = lambda path: True
    balancer = gn.equal_norms(where=everywhere, momentum=momentum, every=every)
    state, params, w = balancer.init(3, dtype=F64), problem.params, [1.0, 1.0, 1.0]
    for t in range(10):
        batch = make_batch(t)
        norms = classic(params, problem, batch).tolist()
        assert min(norms) > 0
        grads, state, info = balancer.grad(state, params, problem.seam, batch)
        torch.testing.assert_close(info.weights, torch.tensor(w, dtype=F64), rtol=1e-10, atol=0)
        if t % every == 0:
            torch.testing.assert_close(info.grad_norms, torch.tensor(norms, dtype=F64), rtol=1e-10, atol=0)
        else:
            assert info.grad_norms.isnan().all(), "nothing is measured in between"
        plain = gn.measure(params, problem.general, batch, weights=torch.tensor(w, dtype=F64), needs="losses")
        torch.testing.assert_close(grads, plain.grads, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(info.total_loss, (info.weights * info.losses).sum())
        if t % every == 0:
            w = [momentum * w[i] + (1 - momentum) * (sum(norms) / 3) / norms[i] for i in range(3)]
        torch.testing.assert_close(state.weights, torch.tensor(w, dtype=F64), rtol=1e-10, atol=0)
        assert state.step == t + 1
        params = {name: leaf - 0.02 * grads[name] for name, leaf in params.items()}


def stats(losses, norms):
    return gn.TaskStats(torch.tensor(losses, dtype=F64), torch.tensor(norms, dtype=F64))


def test_by_hand():
    balancer = gn.equal_norms(momentum=0.5)
    state = balancer.init(3, dtype=F64, weights=[1.0, 2.0, 4.0])
    new, info = balancer.balance(state, stats([1.0, 1.0, 1.0], [1.0, 2.0, 6.0]))  # mean 3: the goal is 3, 1.5, 0.5
    assert new.weights.tolist() == [2.0, 1.75, 2.25]
    assert info.total_loss == 7
    frozen, info = balancer.balance(new, stats([1.0, 1.0, 1.0], [1.0, 2.0, 6.0]))
    assert torch.equal(frozen.weights, new.weights), "the next update is a thousand steps away"
    assert frozen.step == 2


def test_without_memory_the_weighted_norms_are_their_mean():
    balancer = gn.equal_norms(momentum=0.0, every=1)
    norms = [0.1, 30.0, 2.9]
    state, _ = balancer.balance(balancer.init(3, dtype=F64), stats([1.0, 2.0, 3.0], norms))
    torch.testing.assert_close(state.weights * torch.tensor(norms, dtype=F64), torch.full((3,), 11.0, dtype=F64))


def test_a_task_without_gradient_keeps_its_weight():
    balancer = gn.equal_norms(momentum=0.0)
    state = balancer.init(2, dtype=F64, weights=[0.7, 1.0])
    new, info = balancer.balance(state, stats([0.0, 1.0], [0.0, 4.0]))
    assert info.finite
    assert new.weights.tolist() == [0.7, 0.5]  # the mean is 2, of both


def test_an_absent_task_keeps_its_weight_and_does_not_count():
    balancer = gn.equal_norms(momentum=0.0)
    state = balancer.init(3, dtype=F64, weights=[0.7, 1.0, 1.0])
    nan = float("nan")
    new, info = balancer.balance(state, stats([nan, 1.0, 1.0], [nan, 4.0, 2.0]), mask=[False, True, True])
    assert info.finite
    assert new.weights.tolist() == [0.7, 0.75, 1.5]


@pytest.mark.parametrize("norms", [[float("nan"), 1.0], [float("inf"), 1.0], [5e-324, 1e300]])
def test_a_broken_step_does_not_use_up_the_update(norms):
    """Otherwise the next chance would be `every` steps away."""
    balancer = gn.equal_norms()
    state = balancer.init(2, dtype=F64)
    same, info = balancer.balance(state, stats([1.0, 1.0], norms))
    assert not info.finite
    assert same_bits(same, state)
    new, info = balancer.balance(same, stats([1.0, 1.0], [1.0, 3.0]))
    assert info.finite
    assert not torch.equal(new.weights, state.weights)


@pytest.mark.parametrize("update", [False, torch.tensor(False)])
def test_update_false_freezes_everything(update):
    problem, balancer = make_problem(), gn.equal_norms()
    state = balancer.init(3, dtype=F64)
    _, new, info = balancer.grad(state, problem.params, problem.seam, problem.batch, update=update)
    assert same_bits(new, state)
    assert info.grad_norms.isnan().all() == (update is False), "then a step costs what a plain one does"
    assert torch.equal(balancer.update(state, problem.params, problem.seam, problem.batch).step, torch.tensor(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(gn.equal_norms, momentum=1.0), r"momentum=1.0 must lie in \[0, 1\)"),
        (functools.partial(gn.equal_norms, momentum=float("nan")), r"momentum=nan must lie"),
        (functools.partial(gn.equal_norms, every=0), r"every=0 must be a number of steps, at least 1"),
        (functools.partial(gn.equal_norms, every=1.5), r"every=1.5 must be"),
        (lambda: gn.equal_norms().init(2, weights=[1.0]), r"weights has 1 entries, but num_tasks=2"),
        (lambda: gn.equal_norms().init(2, weights=[1.0, 0.0]), r"weights=\[1.0, 0.0\] must be positive and finite"),
        (
            lambda: gn.equal_norms().balance(gn.init_state(2), stats([1.0, 1.0], [1.0, 1.0])),
            r"is a GradNormState, not a State",
        ),
        (
            lambda: gn.equal_norms().balance(gn.fixed_ratio().init(2), stats([1.0, 1.0], [1.0, 1.0])),
            r"made by another balancer",
        ),
        (lambda: gn.equal_norms().balance(gn.equal_norms().init(2), gn.TaskStats([1.0, 1.0])), r"has no grad_norms"),
    ],
)
def test_mistakes_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
