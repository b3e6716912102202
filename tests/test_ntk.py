"""The neural-tangent-kernel rule against a loop of torch.autograd.grad over the points."""

import functools

import pytest
import torch
from toys import leaves, make_batch, make_problem, ntk, residual_at, same_bits

import gradnorm_func as gn
from gradnorm_func._balance.ntk import ntk_kernels

F64 = torch.float64


def kernels_by_loop(residuals, params, points):
    """K_i = mean over points of ‖∇_θ r_i‖², one backward pass a point."""
    out = []
    for name in sorted(residuals):
        squares = []
        for n in range(len(leaves(points[name])[0])):
            theta = {key: leaf.clone().requires_grad_() for key, leaf in params.items()}
            point = points[name]
            point = tuple(x[n] for x in point) if isinstance(point, tuple) else point[n]
            rows = torch.autograd.grad(residuals[name](theta, point), list(theta.values()), allow_unused=True)
            squares.append(sum(float(row.square().sum()) for row in rows if row is not None))
        out.append(sum(squares) / len(squares))
    return torch.tensor(out, dtype=F64)


RESIDUALS = {f"t{task}": residual_at(task) for task in range(3)}


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_five_steps_equal_the_rule(chunk_size):
    problem, balancer = make_problem(), ntk(momentum=0.7, chunk_size=chunk_size)
    state, params, w = balancer.init(3, dtype=F64), problem.params, torch.ones(3, dtype=F64)
    for t in range(5):
        batch = make_batch(t)
        expected = kernels_by_loop(RESIDUALS, params, dict.fromkeys(RESIDUALS, batch))
        assert (expected > 0).all()
        grads, state, info = balancer.grad(state, params, problem.seam, batch)
        torch.testing.assert_close(info.memory, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(info.weights, w, rtol=1e-10, atol=0)
        plain = gn.measure(params, problem.general, batch, weights=w, needs="losses")
        torch.testing.assert_close(grads, plain.grads, rtol=1e-10, atol=1e-13)
        w = 0.7 * w + 0.3 * expected.mean() / expected
        torch.testing.assert_close(state.weights, w, rtol=1e-10, atol=0)
        params = {name: leaf - 0.02 * grads[name] for name, leaf in params.items()}


def u(params, point):
    return torch.tanh(point @ params["a"] + params["b"]) @ params["c"]


def burgers(params, point):
    """u_t + u u_x - u_xx, forward over reverse."""
    du = torch.func.grad(u, 1)
    gradient, row = torch.func.jvp(lambda x: du(params, x), (point,), (torch.tensor([0.0, 1.0], dtype=F64),))
    return gradient[0] + u(params, point) * gradient[1] - row[1]


def pinn():
    params = {name: torch.randn(*shape, dtype=F64) for name, shape in (("a", (2, 5)), ("b", (5,)), ("c", (5,)))}
    residuals = {"equation": burgers, "edge": u, "start": lambda p, x: u(p, x[0]) - x[1]}
    points = {
        "equation": torch.rand(7, 2, dtype=F64),
        "edge": torch.rand(4, 2, dtype=F64),
        "start": (torch.rand(3, 2, dtype=F64), torch.rand(3, dtype=F64)),
    }
    return params, residuals, points


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_residuals_with_derivatives_on_different_points(chunk_size):
    params, residuals, points = pinn()
    found = ntk_kernels(residuals, params, points, chunk_size=chunk_size)
    expected = kernels_by_loop(residuals, params, points)
    assert (expected > 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_micro_batches_average():
    """K is a mean over points, so no norm stands between it and the mean over micro-batches."""
    params, residuals, points = pinn()
    whole = {"equation": points["equation"][:6], "edge": points["edge"]}
    residuals = {name: residuals[name] for name in whole}
    halves = [{name: x[s::2] for name, x in whole.items()} for s in range(2)]
    mean = sum(ntk_kernels(residuals, params, half) for half in halves) / 2
    torch.testing.assert_close(mean, ntk_kernels(residuals, params, whole), rtol=1e-12, atol=0)
    state = gn.ntk(residuals).init(2, dtype=F64)
    new, info = gn.ntk(residuals).balance(state, gn.TaskStats([1.0, 2.0], extra=mean))
    torch.testing.assert_close(new.weights, 0.9 + 0.1 * mean.mean() / mean)
    assert info.total_loss == 3


def test_no_graph_is_left_on_parameters_that_require_grad():
    params, residuals, points = pinn()
    params = {name: leaf.requires_grad_() for name, leaf in params.items()}
    before = [leaf.detach().clone() for leaf in leaves(params, points)]
    found = ntk_kernels(residuals, params, points)
    assert not found.requires_grad
    assert same_bits(before, leaves(params, points))
    assert all(leaf.grad is None for leaf in params.values())


def test_a_residual_without_gradient_keeps_its_weight():
    balancer = ntk(2, momentum=0.0)
    state = balancer.init(2, dtype=F64, weights=[0.7, 1.0])
    new, info = balancer.balance(state, gn.TaskStats([1.0, 1.0], extra=torch.tensor([0.0, 4.0])))
    assert info.finite
    assert new.weights.tolist() == [0.7, 0.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_kernel_that_is_not_finite_changes_nothing(bad):
    balancer = ntk(2)
    state = balancer.init(2, dtype=F64)
    new, info = balancer.balance(state, gn.TaskStats([1.0, 1.0], extra=torch.tensor([bad, 4.0])))
    assert not info.finite
    assert same_bits(new, state)


def test_update_false_measures_no_kernel():
    calls = []
    problem = make_problem()
    counted = {name: lambda p, x, f=f: calls.append(0) or f(p, x) for name, f in RESIDUALS.items()}
    balancer = gn.ntk(counted, points=lambda batch: dict.fromkeys(RESIDUALS, batch))
    state = balancer.init(3, dtype=F64)
    _, new, info = balancer.grad(state, problem.params, problem.seam, problem.batch, update=False)
    assert not calls
    assert same_bits(new, state)
    assert info.memory.isnan().all()
    balancer.update(state, problem.params, problem.seam, problem.batch)
    assert calls


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(ntk, momentum=-0.1), r"momentum=-0.1 must lie in \[0, 1\)"),
        (
            lambda: ntk_kernels({"a": lambda p, x: p * x}, torch.ones(2), {"a": torch.ones(3)}),
            r"residuals\['a'\] gave shape \(2,\) at one point; it must be a scalar",
        ),
        (
            lambda: ntk_kernels({"a": u}, torch.ones(2), {"b": torch.ones(3)}),
            r"points has no entry 'a': give points\(batch\)",
        ),
        (
            lambda: ntk(2).balance(ntk(2).init(2), gn.TaskStats([1.0, 1.0], [1.0, 1.0])),
            r"stats has no kernels, one for each task: this rule looks at them and not at gradient norms",
        ),
        (
            lambda: ntk(2).balance(ntk(2).init(2), gn.TaskStats([1.0, 1.0], extra=torch.ones(3))),
            r"stats has no kernels, one for each task",
        ),
        (
            lambda: ntk(2).grad(ntk(2).init(3), make_problem().params, make_problem().seam, make_batch()),
            r"residuals has the names \['t0', 't1'\], but the losses are \['t0', 't1', 't2'\]",
        ),
        (
            lambda: ntk(2).balance(ntk(2).init(2), gn.TaskStats([1.0, 1.0], extra=[1.0, 1.0])),
            r"give TaskStats\(losses, extra=kernels\)",
        ),
        (
            lambda: ntk(2).balance(gn.init_state(2), gn.TaskStats([1.0, 1.0], extra=torch.ones(2))),
            r"is a GradNormState, not a State",
        ),
    ],
)
def test_mistakes_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
