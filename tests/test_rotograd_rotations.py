"""Maps from skew matrices to rotations, and steps that stay on SO(m)."""

from __future__ import annotations

import pytest
import torch
from rotograd_cases import F64, D, T, problem, start

import gradnorm_func as gn
from gradnorm_func._rotograd.rotation import MAPS, _inverse, polish, skew, tangent_gradient, turn


@pytest.mark.parametrize("kind", ["exp", "cayley"])
@pytest.mark.parametrize("d", [2, 3, 17, 40])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_maps_give_rotations(kind, d, size):
    a = skew(torch.randn(4, d, d, dtype=F64, generator=torch.Generator().manual_seed(d))) * size / d
    r = MAPS[kind](a)
    eye = torch.eye(d, dtype=F64)
    torch.testing.assert_close(r.mT @ r, eye.expand(4, d, d), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(4, dtype=F64))
    base = gn.random_rotations(4, d, dtype=F64)
    torch.testing.assert_close(turn(base, a, kind), base @ r, atol=1e-10, rtol=0)
    if kind == "cayley":
        torch.testing.assert_close(_inverse(eye - a / 2), torch.linalg.inv(eye - a / 2), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", ["exp", "cayley"])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 3.0, 30.0])
def test_derivative_of_the_maps(kind, norm):
    g = torch.Generator().manual_seed(0)
    a = skew(torch.randn(3, 7, 7, dtype=F64, generator=g))
    a = a * norm / torch.linalg.matrix_norm(a, 2, keepdim=True)
    gradient = torch.randn(3, 7, 7, dtype=F64, generator=g)
    entries = a.tril(-1).requires_grad_()
    mapped = MAPS[kind](entries - entries.mT)
    (expected,) = torch.autograd.grad(mapped, entries, (mapped @ gradient).detach())
    torch.testing.assert_close(tangent_gradient(a, gradient, kind).tril(-1), expected.tril(-1), rtol=1e-8, atol=1e-8)


def test_polish_restores_one_matrix_at_a_time():
    r = gn.random_rotations(3, 5, dtype=F64) * 1.01
    for step in range(3):
        r = polish(r, torch.tensor(step))
    error = (r.mT @ r - torch.eye(5, dtype=F64)).abs().amax((1, 2))
    assert error.max() < 1e-3


@pytest.mark.parametrize("kind", ["exp", "cayley"])
def test_the_gradient_at_a_tangent_is_skew_to_the_bit(kind):
    a = skew(torch.randn(3, 17, 17))
    by_tangent = tangent_gradient(a, torch.randn(3, 17, 17), kind)
    assert torch.equal(by_tangent, -by_tangent.mT)
    assert by_tangent.norm() > 1


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("hyper", [{"map": "exp"}, {"map": "cayley"}, {"map": "exp", "moving": True}])
def test_rotations_stay_orthogonal_in_float32(hyper, size):
    """Adam makes a step of full size out of rounding noise, which must have no part that leaves SO(m)."""
    params, loss_fn, batch = problem(torch.float32)
    large = gn.multi_task_loss(
        loss_fn.backbone, [lambda p, z, b, head=head: size * head(p, z, b) for head in loss_fn.functions]
    )
    method = gn.rotograd(D, optimizer=gn.adam(0.02), **{"moving": False, **hyper})
    state = first = method.init(T, rotations=start(dtype=torch.float32))
    for _ in range(300):
        _, state, _ = method.grad(state, params, large, batch)
    r = state.rotations.double()
    assert (r.mT @ r - torch.eye(D, dtype=F64)).abs().max() < 1e-5
    assert (state.rotations - first.rotations).abs().max() > 0.1
    if state.tangents != ():
        assert torch.equal(state.tangents, -state.tangents.mT)


@pytest.mark.parametrize("kind", ["exp", "cayley"])
@pytest.mark.parametrize("rate", [5e-4, 5e-2])
def test_orthogonal_after_ten_thousand_updates_in_float32(kind, rate):
    torch.manual_seed(0)
    optimizer = gn.adam(rate)
    r = gn.random_rotations(3, 16)
    moments = optimizer.init(r)

    def step(r, moments, count, grad):
        move, moments = optimizer.update(skew(grad), moments, r)
        return polish(turn(r, move, kind), count), moments

    for count in range(10_000):
        r, moments = step(r, moments, torch.tensor(count), torch.randn(3, 16, 16))
    error = (r.double().mT @ r.double() - torch.eye(16, dtype=F64)).abs().max()
    assert error < 1e-5
