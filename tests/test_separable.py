"""`multi_task_loss(None, ...)`, and losses that use torch.func derivatives themselves (a PINN)."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from models import WEIGHTS
from oracle import assert_near, assert_same_sum, assert_untouched, norm, reference, snapshot
from torch import Tensor

import gradnorm_func as gn

D = {"dtype": torch.float64}
PATHS = ["in.bias", "in.weight", "mid.weight", "out.weight"]
WHERE = {
    "default": (None, PATHS),
    "path": ("mid", ["mid.weight"]),
    "list": (["out", "in.weight"], ["in.weight", "out.weight"]),
    "predicate": (lambda path: path.endswith("weight"), PATHS[1:]),
}


def field(params: Any, points: Tensor) -> Tensor:
    """A network u(t, x) on points (N, 2)."""
    hidden = torch.tanh(points @ params["in"]["weight"] + params["in"]["bias"])
    return torch.tanh(hidden @ params["mid"]["weight"]) @ params["out"]["weight"]


def residual(params: Any, points: dict[str, Tensor]) -> Tensor:
    """u_t - u_xx + u u_x, by torch.func."""
    u = lambda t, x: field(params, torch.stack([t, x])[None])[0]
    u_x = torch.func.grad(u, 1)
    burgers = lambda t, x: torch.func.grad(u)(t, x) - torch.func.grad(u_x, 1)(t, x) + u(t, x) * u_x(t, x)
    return torch.func.vmap(burgers)(*points["inside"].unbind(1)).square().mean()


def classic_residual(params: Any, points: dict[str, Tensor]) -> Tensor:
    """The same by torch.autograd.grad."""
    at = points["inside"].clone().requires_grad_()
    u = field(params, at)
    (du,) = torch.autograd.grad(u.sum(), at, create_graph=True)
    (du_x,) = torch.autograd.grad(du[:, 1].sum(), at, create_graph=True)
    return (du[:, 0] - du_x[:, 1] + u * du[:, 1]).square().mean()


LOSSES = {
    "c": residual,
    "a": lambda params, points: field(params, points["edge"]).square().mean(),
    "b": lambda params, points: (field(params, points["start"]) - points["start"][:, 1].sin()).square().mean(),
}
FORMS = {
    "separable": lambda: gn.multi_task_loss(None, LOSSES),
    "separable list": lambda: gn.multi_task_loss(None, list(LOSSES.values())),
    "plain": lambda: lambda params, points: {name: loss(params, points) for name, loss in LOSSES.items()},
    # What is given to the heads as z is nothing but the points: all that matters, they read past it.
    "seam": lambda: gn.multi_task_loss(
        lambda params, points: points, {name: lambda p, z, _, f=f: f(p, z) for name, f in LOSSES.items()}
    ),
}


def problem() -> tuple[Any, Any]:
    params = {
        "in": {"weight": torch.randn(2, 6, **D), "bias": torch.randn(6, **D)},
        "mid": {"weight": torch.randn(6, 5, **D)},
        "out": {"weight": torch.randn(5, **D)},
    }
    return params, {"inside": torch.randn(7, 2, **D), "edge": torch.randn(4, 2, **D), "start": torch.randn(3, 2, **D)}


@pytest.mark.parametrize(("form", "place"), [(f, p) for f in FORMS for p in WHERE if (f, p) != ("seam", "default")])
def test_pinn(form: str, place: str) -> None:
    """Equation, boundary and start on different points; every parameter is shared."""
    (params, points), loss_fn, (where, paths) = problem(), FORMS[form](), WHERE[place]
    before, order = snapshot((params, points)), "cab" if form == "separable list" else "abc"
    leaves = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    losses = {name: (classic_residual if name == "c" else loss)(leaves, points) for name, loss in LOSSES.items()}
    ref = reference(losses, optree.tree_leaves(leaves), WEIGHTS)
    rows = {name: [row[PATHS.index(path)] for path in paths] for name, row in ref.rows.items()}
    expected = torch.stack([norm(rows[name]) for name in order])
    assert bool((expected > 0).all())
    weights = torch.tensor([WEIGHTS[name] for name in order], **D)
    for _ in range(2):
        stats = gn.measure(params, loss_fn, points, weights=weights, where=where)
        assert_near(stats.losses, torch.stack([ref.losses[name] for name in order]))
        assert_same_sum(optree.tree_leaves(stats.grads), ref.total)
        for tree in (stats.task_grads, gn.task_grads(loss_fn, params, points, where=where)[1]):
            for i, leaf in enumerate(optree.tree_leaves(tree)):
                assert_near(leaf, torch.stack([rows[name][i] for name in order]), paths[i])
        for norms in (stats.grad_norms, gn.task_grad_norms(loss_fn, params, points, where=where)):
            assert_near(norms, expected)
    assert_untouched(before)


def test_weights_from_norms() -> None:
    """Weights chosen within the pass need no second one."""
    (params, points), weights = problem(), lambda stats: stats.grad_norms.sum() / stats.grad_norms
    found = gn.measure(params, FORMS["separable"](), points, weights=weights)
    expected = gn.measure(params, FORMS["plain"](), points, weights=weights(found))
    assert_same_sum(optree.tree_leaves(found.grads), optree.tree_leaves(expected.grads))


def test_each_loss_runs_once() -> None:
    """Nothing runs T times: that is what the seam at the parameters is for."""
    calls = []
    losses = {name: lambda p, x, f=f, n=name: calls.append(n) or f(p, x) for name, f in LOSSES.items()}
    params, points = problem()
    gn.measure(params, gn.multi_task_loss(None, losses), points, weights=torch.ones(3, **D))
    assert sorted(calls) == ["a", "b", "c"]


def test_losses_of_disjoint_parameters() -> None:
    """A loss that does not read a parameter has a zero gradient at it, and a constant loss everywhere."""
    params = {"u": torch.randn(3, **D), "v": torch.randn(2, **D)}
    losses = [lambda p, x: p["u"].square().sum(), lambda p, x: p["v"].exp().sum(), lambda p, x: torch.ones((), **D)]
    stats = gn.measure(params, gn.multi_task_loss(None, losses), None, weights=torch.tensor([2.0, 3.0, 5.0], **D))
    u, v = 2 * params["u"], params["v"].exp()
    assert_near(stats.grad_norms, torch.stack([u.norm(), v.norm(), torch.zeros((), **D)]))
    assert_near(stats.task_grads["v"], torch.stack([torch.zeros_like(v), v, torch.zeros_like(v)]))
    assert_same_sum([stats.grads["u"], stats.grads["v"]], [2 * u, 3 * v])
