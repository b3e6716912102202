"""GradInit on whatever plain PyTorch can train and differentiate twice, against a loop of torch.autograd.grad."""

import gc
import math

import pytest
import torch
from gradinit_cases import run, small, small_loss
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradnorm_func as gn


class Softsign(torch.autograd.Function):
    """An autograd.Function of the old style, which torch.func cannot run."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()).square()


def layered(draw, activate):
    """Two linear layers with something between them."""
    params = {"in.weight": draw(5, 3), "in.bias": draw(5), "out.weight": draw(2, 5)}

    def loss_fn(params, x):
        h = activate(lambda x: torch.tanh(x @ params["in.weight"].T + params["in.bias"]), x)
        return (h @ params["out.weight"].T - 1).square().mean()

    return params, loss_fn, lambda: draw(6, 3)


def old_style_function(draw):
    return layered(draw, lambda layer, x: Softsign.apply(layer(x)))


def checkpointed(draw):
    return layered(draw, lambda layer, x: checkpoint(layer, x, use_reentrant=False))


def residual_by_autograd(draw):
    """u' = -u by the derivative of a network by its input, as in the notebooks of PINN libraries."""
    params = {"in.weight": draw(5, 1), "in.bias": draw(5), "out.weight": draw(1, 5)}

    def loss_fn(params, x):
        x = x.clone().requires_grad_()
        u = torch.tanh(x @ params["in.weight"].T + params["in.bias"]) @ params["out.weight"].T
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (du + u).square().mean()

    return params, loss_fn, lambda: draw(6, 1)


def lstm(draw):
    """In float32, where torch has a fused kernel on a CPU."""
    net = nn.LSTM(3, 4)
    call = gn.functional(net)
    params = {name: draw(*p.shape).float() for name, p in net.named_parameters()}
    return params, lambda q, x: (call(q, x)[0] - 1).square().mean(), lambda: draw(5, 2, 3).float()


def attention(draw):
    """torch's fused kernels of attention have no second derivative, so that the plain one must be taken."""
    params = {name: draw(4, 4) for name in ("q", "k", "v")}

    def loss_fn(params, x):
        q, k, v = (x @ params[name] for name in ("q", "k", "v"))
        return (nn.functional.scaled_dot_product_attention(q, k, v) - 1).square().mean()

    return params, loss_fn, lambda: draw(2, 1, 5, 4)


def partly_read(draw):
    """A parameter that the loss does not read, and one whose gradient is constant."""
    params = {"unread": draw(3), "linear": draw(2), "square": draw(2)}
    return params, lambda q, x: x.sum() * q["linear"].sum() + q["square"].square().sum(), lambda: draw(2)


def by_autograd(params, loss_fn, batch, after, *, p, gamma, eta, form):
    """(norm, objective, its derivative by the scales), as a user of plain PyTorch would write them."""
    scales = {name: torch.ones((), dtype=leaf.dtype, requires_grad=True) for name, leaf in params.items()}
    theta = {name: scales[name] * leaf for name, leaf in params.items()}
    loss = loss_fn(theta, batch)
    grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
    flat = torch.cat([grad.flatten() for grad in grads])
    norm = flat.abs().sum() if p == 1 else flat.square().sum().sqrt()
    if norm > gamma:
        objective = norm
    elif form == "simple":
        objective = loss
    else:
        steps = [grad.detach().sign() if p == 1 else grad.detach() / norm.detach() for grad in grads]
        moved = {name: leaf - eta * step for (name, leaf), step in zip(theta.items(), steps, strict=True)}
        objective = loss_fn(moved, after) / eta
    scale_grads = torch.autograd.grad(objective, list(scales.values()), materialize_grads=True)
    return norm, objective, dict(zip(scales, scale_grads, strict=True))


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize(("form", "p"), [("paper", 1), ("paper", 2), ("simple", 2)])
@pytest.mark.parametrize("case", [old_style_function, checkpointed, residual_by_autograd, lstm, attention, partly_read])
def test_equals_a_loop_of_autograd(case, form, p, above):
    make = torch.Generator().manual_seed(4)
    params, loss_fn, batch = case(lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64))
    first, second, hyper = batch(), batch(), {"p": p, "gamma": 1e-3 if above else 1e9, "eta": 0.01, "form": form}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        norm, objective, scale_grads = by_autograd(params, loss_fn, first, second, **hyper)
    state = gn.gradinit_init_state(params)
    _, info = gn.gradinit_step(state, params, loss_fn, first, batch_after=second, **hyper)
    assert bool(info.above) is above
    assert info.finite
    torch.testing.assert_close(info.grad_norm, norm.detach())
    torch.testing.assert_close(info.objective, objective.detach())
    torch.testing.assert_close(info.scale_grads, torch.stack([scale_grads[name] for name in sorted(params)]))
    assert info.scale_grads.any()


@pytest.mark.parametrize("above", [True, False])
def test_under_autocast(above):
    """The forward passes round as the user's do; our own sums do not."""
    make = torch.Generator().manual_seed(4)
    params, loss_fn, batch = layered(lambda *shape: torch.randn(*shape, generator=make), lambda layer, x: layer(x))
    x, hyper = batch(), {"p": 2, "gamma": 1e-3 if above else 1e9, "eta": 0.01, "form": "paper"}
    state = gn.gradinit_init_state(params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm, objective, scale_grads = by_autograd(params, loss_fn, x, x, **hyper)
        _, info = gn.gradinit_step(state, params, loss_fn, x, **hyper)
    assert (info.grad_norm.dtype, info.objective.dtype, info.scale_grads.dtype) == (torch.float32,) * 3
    assert info.grad_norm != gn.gradinit_step(state, params, loss_fn, x, **hyper)[1].grad_norm
    torch.testing.assert_close(info.grad_norm, norm.detach())
    torch.testing.assert_close(info.objective, objective.detach().float())
    expected = torch.stack([scale_grads[name] for name in sorted(params)])
    torch.testing.assert_close(info.scale_grads, expected, rtol=0, atol=0.01 * float(expected.norm()))


@pytest.mark.parametrize("wrap", [lambda step: step, torch.func.vmap], ids=["plain", "vmap"])
def test_a_long_autocast_keeps_nothing_of_a_step(wrap):
    """Autocast remembers its casts of leaves until it ends, and every step has leaves of its own."""
    params = torch.randn(32, 32)
    state = gn.gradinit_init_state(params)
    step = wrap(lambda x: gn.gradinit_step(state, params, lambda w, x: (x @ w).float().square().mean(), x)[1].loss)
    x = torch.randn(2, 4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(x)
            gc.collect()
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(sizes) > 0
    assert sum(sizes) == 0


def test_a_reentrant_checkpoint_is_refused():
    layer = lambda weight, x: torch.tanh(x @ weight)
    loss_fn = lambda w, x: checkpoint(layer, w, x, use_reentrant=True).sum()
    params = torch.ones(3, 2)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gn.gradinit_step(gn.gradinit_init_state(params), params, loss_fn, torch.ones(4, 3))


def test_on_a_cpu_only_the_branch_that_counts_is_run():
    params, batch = small()
    after = (batch[0] + 1, batch[1])
    seen = []

    def loss_fn(params, batch):
        seen.append(batch)
        return small_loss(params, batch)

    state = gn.gradinit_init_state(params)
    gn.gradinit_step(state, params, loss_fn, batch, batch_after=after, gamma=1e-3)
    assert [b is batch for b in seen] == [True]
    seen.clear()
    gn.gradinit_step(state, params, loss_fn, batch, batch_after=after, gamma=1e3)
    assert [b is after for b in seen] == [False, True]


def test_a_loss_that_reads_nothing_moves_nothing():
    params, batch = small()
    for form in ("paper", "simple"):
        (state,), (info,) = run(params, lambda _, b: b[0].square().mean(), [batch], form=form)
        assert info.finite
        assert info.grad_norm == 0
        assert (state.scales == 1).all()


def test_losses_of_several_tasks():
    params, batch = small()
    two = lambda q, batch: {"fit": small_loss(q, batch), "size": q["a"]["weight"].square().sum()}
    total = lambda q, batch: 2 * small_loss(q, batch) + 0.5 * q["a"]["weight"].square().sum()
    for gamma in (1e-3, 1e3):
        (expected,), _ = run(params, total, [batch], gamma=gamma)
        (state,), _ = run(params, two, [batch], gamma=gamma, weights={"size": 0.5, "fit": 2.0})
        torch.testing.assert_close(state, expected)
        (state,), (info,) = run(params, two, [batch], gamma=gamma)
        torch.testing.assert_close(info.loss, sum(two(params, batch).values()))
    seam = gn.multi_task_loss(
        lambda q, batch: torch.tanh(batch[0] @ q["a"]["weight"].T),
        [lambda _q, z, _: z.square().mean(), lambda q, z, _: (z @ q["b"]["weight"].T).square().mean()],
    )
    assert run(params, seam, [batch], weights=torch.tensor([1.0, 2.0]))[1][0].finite


@pytest.mark.parametrize("form", ["paper", "simple"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("gamma", [1e-3, 1e3])
def test_loss_scaling(form, p, gamma):
    params, batch = small()
    _, plain = run(params, small_loss, [batch] * 3, form=form, p=p, gamma=gamma)
    _, scaled = run(params, small_loss, [batch] * 3, form=form, p=p, gamma=gamma, loss_scale=1024.0)
    torch.testing.assert_close(scaled[-1], plain[-1])


def test_half_precision_needs_loss_scaling():
    params = {"w": torch.full((4, 4), 0.25, dtype=torch.float16)}
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).half()
    loss_fn = lambda q, x: ((x @ q["w"]).float().square().mean()) * 1e-7
    _, (info,) = run(params, loss_fn, [x], gamma=1e-9)
    assert info.grad_norm == 0
    (state,), (info,) = run(params, loss_fn, [x], gamma=1e-9, loss_scale=2.0**16)
    exact = torch.func.grad(lambda w: (x.double() @ w).square().mean() * 1e-7)(params["w"].double())
    assert info.grad_norm.item() == pytest.approx(exact.norm().item(), rel=0.02)
    assert state.scales.dtype == torch.float32
    assert 0.98 < state.scales.item() < 1


def test_a_gradient_that_overflows_is_left_out_of_the_norm():
    params = {"fine": torch.ones(2), "huge": torch.ones(2)}
    loss_fn = lambda q, _: q["fine"].square().sum() + 1e30 * q["huge"].sum()
    (state,), (info,) = run(params, loss_fn, [None], gamma=1e-3, loss_scale=1e10)
    torch.testing.assert_close(info.grad_norm, torch.tensor(8.0).sqrt())
    assert state.scales[0] < 1
    assert state.scales[1] == 1
    for form in ("paper", "simple"):  # but there is no descending the loss itself
        (state,), (info,) = run(params, loss_fn, [None], gamma=1e3, loss_scale=1e10, form=form)
        assert not info.finite
        assert (state.scales == 1).all()


@pytest.mark.parametrize("form", ["paper", "simple"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(form, bad):
    params, batch = small()
    states, _ = run(params, small_loss, [batch] * 2, form=form)
    broken = (batch[0].clone(), batch[1].clone())
    broken[1][0, 0] = bad
    state, info = gn.gradinit_step(states[-1], params, small_loss, broken, form=form)
    assert not info.finite
    for new, old in zip(gn.state_dict(state).values(), gn.state_dict(states[-1]).values(), strict=True):
        assert torch.equal(new, old)
    with pytest.raises(ValueError, match=r"loss_fn returned (nan|inf) in step 1: look for invalid"):
        gn.gradinit(params, small_loss, [batch, broken], steps=4, form="simple", progress=False)


def test_no_finite_gradient_is_an_error():
    with pytest.raises(ValueError, match="in none of the 2 steps was the gradient finite"):
        gn.gradinit(
            torch.zeros(2) + 0.0, lambda w, _: w.abs().sqrt().sum(), [torch.ones(1)] * 9, steps=2, progress=False
        )
