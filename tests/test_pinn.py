"""What a PINN's losses do: derivatives inside, points drawn anew, causal weights, L-BFGS, classic autograd."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from oracle import assert_near, assert_same_sum, norm, reference
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from toys import leaves, same_bits

import gradnorm_func as gn

D = {"dtype": torch.float64}
X = torch.tensor([0.0, 1.0], **D)  # points are (t, x)


def u(params: Any, point: Tensor) -> Tensor:
    hidden = torch.tanh(point @ params["in"] + params["bias"])
    return torch.tanh(hidden @ params["mid"]) @ params["out"]


def nested_grad(params: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    du = lambda x: grad(u, 1)(params, x)
    return du(x), grad(lambda x: du(x)[1])(x)[1]


def forward_over_reverse(params: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    du, along = jvp(lambda x: grad(u, 1)(params, x), (x,), (X,))
    return du, along[1]


def forward_over_forward(params: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    along = lambda x, v: jvp(lambda x: u(params, x), (x,), (v,))[1]
    u_x, u_xx = jvp(lambda x: along(x, X), (x,), (X,))
    return torch.stack([along(x, X.flip(0)), u_x]), u_xx


STYLES = {
    "grad of grad": nested_grad,
    "jvp of grad": forward_over_reverse,
    "jvp of jvp": forward_over_forward,
    "hessian": lambda p, x: (grad(u, 1)(p, x), hessian(u, 1)(p, x)[1, 1]),
    "jacrev of jacrev": lambda p, x: (jacrev(u, 1)(p, x), jacrev(jacrev(u, 1), 1)(p, x)[1, 1]),
    "jacfwd of jacfwd": lambda p, x: (jacfwd(u, 1)(p, x), jacfwd(jacfwd(u, 1), 1)(p, x)[1, 1]),
}


def squares(style: str, params: Any, points: Tensor) -> Tensor:
    """(N,) squared residuals of u_t + u u_x - u_xx."""

    def residual(point: Tensor) -> Tensor:
        du, u_xx = STYLES[style](params, point)
        return du[0] + u(params, point) * du[1] - u_xx

    return vmap(residual)(points).square()


def classic_squares(params: Any, points: Tensor) -> Tensor:
    """The same by torch.autograd.grad, as most PINN code has it."""
    at = points.clone().requires_grad_()
    value = u(params, at)
    (du,) = torch.autograd.grad(value.sum(), at, create_graph=True)
    (du_x,) = torch.autograd.grad(du[:, 1].sum(), at, create_graph=True)
    return (du[:, 0] + value * du[:, 1] - du_x[:, 1]).square()


def edge(params: Any, batch: Any) -> Tensor:
    return u(params, batch["edge"]).square().mean()


def start(params: Any, batch: Any) -> Tensor:
    return (u(params, batch["start"]) - batch["start"][:, 1].sin()).square().mean()


def loss_of(style: str) -> Any:
    inside = lambda params, batch: squares(style, params, batch["inside"]).mean()
    return gn.multi_task_loss(None, {"inside": inside, "edge": edge, "start": start})


def classic_losses(params: Any, batch: Any) -> dict[str, Tensor]:
    inside = classic_squares(params, batch["inside"]).mean()
    return {"edge": edge(params, batch), "inside": inside, "start": start(params, batch)}


def problem(seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    params = {
        "in": torch.randn(2, 6, **D),
        "bias": torch.randn(6, **D),
        "mid": torch.randn(6, 5, **D),
        "out": torch.randn(5, **D),
    }
    return params, {name: torch.rand(n, 2, **D) for name, n in (("inside", 7), ("edge", 4), ("start", 3))}


def expected(params: Any, losses: Any, weights: Any) -> Any:
    """Reference of losses(theta), a dict by sorted task name: (T,) norms and the gradient of the weighted sum."""
    theta = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    ref = reference(losses(theta), [theta[name] for name in sorted(theta)], weights)
    norms = torch.stack([norm(row) for row in ref.rows.values()])
    assert (norms > 0).all()
    return norms, ref.total


WEIGHTS = {"edge": 0.3, "inside": 1.7, "start": 0.9}
VECTOR = torch.tensor(list(WEIGHTS.values()), **D)


@pytest.mark.parametrize("form", ["separable", "plain"])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_residual(style: str, form: str) -> None:
    (params, batch), loss_fn = problem(), loss_of(style)
    norms, total = expected(params, lambda theta: classic_losses(theta, batch), WEIGHTS)
    stats = gn.measure(params, loss_fn if form == "separable" else loss_fn.__call__, batch, weights=VECTOR)
    assert_near(stats.grad_norms, norms)
    assert_same_sum(leaves(stats.grads), total)
    assert {leaf.dtype for leaf in leaves(stats.losses, stats.grad_norms, stats.grads)} == {torch.float64}


def test_float64_stays_through_a_training() -> None:
    """Parameters, weights, moments and all that is logged."""
    (params, batch), balancer = problem(), gn.gradnorm(alpha=0.5, form="log")
    optimizer = lambda tensors: torch.optim.Adam(tensors, lr=1e-2)
    params, state, history, _ = gn.train(
        params, loss_of("grad of grad"), [batch] * 3, balancer=balancer, optimizer=optimizer, progress=False
    )
    kinds = {leaf.dtype for leaf in leaves(params, state, history)}
    assert kinds == {torch.float64, torch.int64, torch.bool}


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("hessian", "jacfwd of jacfwd")])
def test_compiled_by_aot_eager(style: str) -> None:
    """One graph for fresh points at every step. With torch 2.13 jvp crashes Inductor, and jacfwd Dynamo itself."""
    (params, batch), balancer, loss_fn = problem(), gn.gradnorm(form="log"), loss_of(style)
    state, before = balancer.init(3, **D), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    step = torch.compile(lambda *a: balancer.grad(a[0], a[1], loss_fn, a[2]), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        batch = {name: torch.rand_like(points) for name, points in batch.items()}
        found, wanted = step(state, params, batch), balancer.grad(state, params, loss_fn, batch)
        for a, b in zip(leaves(found), leaves(wanted), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        state = found[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """In a process of its own, for a crash would end this one."""
    code = """
import torch, test_pinn, gradnorm_func as gn
from toys import leaves
params, batch = test_pinn.problem()
balancer, loss_fn = gn.gradnorm(form="log"), test_pinn.loss_of("grad of grad")
step = lambda state: balancer.grad(state, params, loss_fn, batch)
state = balancer.init(3, dtype=torch.float64)
found, wanted = torch.compile(step, fullgraph=True)(state), step(state)
for a, b in zip(leaves(found), leaves(wanted), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rsplit("/", 1)[0])
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------- points drawn anew


def test_points_drawn_in_the_loss() -> None:
    """One draw serves the loss and its gradient, for each loss runs once."""
    params, batch = problem()

    def inside(params: Any, batch: Any) -> Tensor:
        return squares("grad of grad", params, torch.rand(7, 2, **D)).mean()

    loss_fn = gn.multi_task_loss(None, {"inside": inside, "edge": edge, "start": start})
    torch.manual_seed(5)
    stats = [gn.measure(params, loss_fn, batch, weights=VECTOR) for _ in range(2)]
    assert stats[0].losses[1] != stats[1].losses[1]
    torch.manual_seed(5)
    for found in stats:
        drawn = batch | {"inside": torch.rand(7, 2, **D)}
        norms, total = expected(params, lambda theta, drawn=drawn: classic_losses(theta, drawn), WEIGHTS)
        assert_near(found.grad_norms, norms)
        assert_same_sum(leaves(found.grads), total)


# ---------------------------------------------------------------------------------------------- causal weights


def test_causal_weights_are_constants_if_detached() -> None:
    """w_n = exp(-ε Σ_{m<n} r_m²), as in causal training; a function of the parameters, but not to be differentiated."""
    params, batch = problem()

    def causal(squared: Tensor, detach: bool) -> Tensor:
        weights = torch.exp(-0.05 * (squared.cumsum(0) - squared))
        return ((weights.detach() if detach else weights) * squared).mean()

    def loss_fn(detach: bool) -> Any:
        inside = lambda p, b: causal(squares("grad of grad", p, b["inside"]), detach)
        return gn.multi_task_loss(None, {"inside": inside, "edge": edge, "start": start})

    def classic(theta: Any) -> Any:
        return classic_losses(theta, batch) | {"inside": causal(classic_squares(theta, batch["inside"]), True)}

    norms, total = expected(params, classic, WEIGHTS)
    found = gn.measure(params, loss_fn(True), batch, weights=VECTOR)
    assert_near(found.grad_norms, norms)
    assert_same_sum(leaves(found.grads), total)
    wrong = gn.measure(params, loss_fn(False), batch, weights=VECTOR)
    assert (wrong.grad_norms[1] / norms[1] - 1).abs() > 0.1


# ---------------------------------------------------------------------------------------------- L-BFGS


def test_lbfgs_with_weights_frozen_inside_its_closure() -> None:
    """A line search compares values of one function: weights move between its steps, not inside."""
    (params, batch), balancer, loss_fn = problem(), gn.gradnorm(alpha=0.5, form="log"), loss_of("jvp of grad")
    state, closures = balancer.init(3, **D), []
    optimizer = torch.optim.LBFGS(list(params.values()), max_iter=5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        grads, same, info = balancer.grad(state, params, loss_fn, batch, update=False)
        assert same_bits(same, state)
        closures.append(info.weights)
        gn.write_grads(params, grads)
        return info.total_loss

    first = sum(classic_losses(params, batch).values())
    moved = []
    for _ in range(4):
        optimizer.step(closure)
        moved.append(state.weights)
        state = balancer.update(state, params, loss_fn, batch)
    assert len(closures) > 12
    assert {tuple(w.tolist()) for w in closures} == {tuple(w.tolist()) for w in moved}
    assert len({tuple(w.tolist()) for w in moved}) == 4
    last = sum(classic_losses(params, batch).values())
    assert last < 0.2 * first


# ---------------------------------------------------------------------------------------------- classic autograd

in_the_loss = lambda p, b: classic_squares(p, b["inside"]).mean()
with_the_batch = lambda p, b: torch.autograd.grad(u(p, b["inside"]).sum(), b["inside"], create_graph=True)[0].norm()


@pytest.mark.parametrize("where", ["mid", None])
@pytest.mark.parametrize("form", ["separable", "plain", "seam"])
@pytest.mark.parametrize("loss", [in_the_loss, with_the_batch])
def test_classic_residual_within_a_loss(loss: Any, form: str, where: Any) -> None:
    """By requires_grad_() and torch.autograd.grad, on a copy of the points or on the batch itself."""
    params, batch = problem()
    batch["inside"].requires_grad_(loss is with_the_batch)
    losses = {"inside": loss, "edge": edge, "start": start}
    if form == "seam" and where is None:
        # The trunk holds the residual, and z is made of it.
        residual = lambda p, b: loss(p, b).reshape(1, 1)
        loss_fn = gn.multi_task_loss(
            residual,
            {
                "inside": lambda p, z, b: z.sum(),
                "edge": lambda p, z, b: edge(p, b) + 0 * z.sum() + z.square().sum(),
                "start": lambda p, z, b: start(p, b) * z.sum(),
            },
        )
        values = lambda theta: loss_fn(theta, batch)
    else:
        values = lambda theta: {name: losses[name](theta, batch) for name in sorted(losses)}
        loss_fn = {
            "separable": lambda: gn.multi_task_loss(None, losses),
            "plain": lambda: lambda p, b: {name: f(p, b) for name, f in losses.items()},
            "seam": lambda: gn.multi_task_loss(
                lambda p, b: b["edge"] @ p["in"], {name: lambda p, z, b, f=f: f(p, b) for name, f in losses.items()}
            ),
        }[form]()
    state = gn.init_state(3, weights=WEIGHTS, **D)
    before = [leaf.detach().clone() for leaf in leaves(params, batch)]
    grads, new, info = gn.gradnorm_grad(state, params, loss_fn, batch, where=where, form="paper")
    assert same_bits(before, leaves(params, batch))
    assert batch["inside"].grad is None
    assert not any(leaf.requires_grad for leaf in leaves(grads, new, info))
    theta = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    ref = reference(values(theta), [theta[name] for name in sorted(theta)], WEIGHTS)
    assert_same_sum([grads[name] for name in sorted(grads)], ref.total)
    if form == "seam" and where is None:
        z = loss_fn.backbone(params, batch).detach().requires_grad_()
        ones = {name: head(params, z, batch) for name, head in loss_fn.heads.items()}
        norms = torch.stack([norm(torch.autograd.grad(ones[name], z)) for name in sorted(ones)])
    else:
        k = sorted(params).index("mid")
        rows = ref.rows.values() if where is None else ([row[k]] for row in ref.rows.values())
        norms = torch.stack([norm(row) for row in rows])
    assert (norms > 0).all()
    assert_near(info.grad_norms, norms)


def test_other_errors_of_the_loss_come_through() -> None:
    params, batch = problem()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        gn.measure(params, lambda p, b: [p["in"] @ p["mid"], p["mid"] @ p["in"]], batch)


def test_classic_residual_by_way_of_its_own_norms() -> None:
    """Ten steps of a training in classic autograd, weighted by `balance`, equal those of the functional one."""
    (params, batch), optimizer = problem(), gn.sgd(0.02)
    theta = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    state = classic_state = gn.init_state(3, optimizer=optimizer, **D)
    loss_fn = loss_of("grad of grad")
    for _ in range(10):
        grads, state, _ = gn.gradnorm_grad(state, params, loss_fn, batch, alpha=0.5, optimizer=optimizer, form="paper")
        params = {name: leaf - 1e-3 * grads[name] for name, leaf in params.items()}

        losses, leaves_ = classic_losses(theta, batch), list(theta.values())
        rows = {name: torch.autograd.grad(loss, leaves_, retain_graph=True) for name, loss in losses.items()}
        norms = {name: torch.cat([g.flatten() for g in row]).norm() for name, row in rows.items()}
        w = dict(zip(gn.task_names(losses), classic_state.weights, strict=True))
        classic_state, _ = gn.gradnorm_balance(
            classic_state, gn.TaskStats(losses, norms), alpha=0.5, optimizer=optimizer, form="paper"
        )
        with torch.no_grad():
            for i, leaf in enumerate(leaves_):
                leaf -= 1e-3 * sum(w[name] * rows[name][i] for name in rows)
    assert (state.weights - 1).abs().min() > 1e-3
    torch.testing.assert_close(classic_state.weights, state.weights, rtol=1e-9, atol=0)
    torch.testing.assert_close({k: v.detach() for k, v in theta.items()}, params, rtol=1e-9, atol=1e-11)
