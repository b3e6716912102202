"""GradInit against the gradinit package, against a transcription of the paper's algorithm, and at its edges."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import gradinit_cases
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradnorm_func as gn
from gradnorm_func._gradinit.reinit import reinit_zeros

CASES = gradinit_cases.CASES


def problem(case):
    net = gradinit_cases.model(case)
    call = gn.functional(net)
    loss_fn = lambda params, batch: nn.functional.cross_entropy(call(params, batch[0]), batch[1])
    return dict(net.named_parameters()), loss_fn


def small():
    """Two weights, a bias, and a target that no scale reaches."""
    make = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)
    params = {"a": {"weight": draw(3, 4), "bias": draw(3)}, "b": {"weight": draw(2, 3)}}
    batch = (draw(7, 4), draw(7, 2))
    return params, batch


def small_loss(params, batch):
    hidden = torch.tanh(nn.functional.linear(batch[0], params["a"]["weight"], params["a"]["bias"]))
    return (nn.functional.linear(hidden, params["b"]["weight"]) - batch[1]).square().mean()


def run(params, loss_fn, batches, optimizer=None, **hyper):
    state = gn.gradinit_init_state(params, optimizer=optimizer)
    states, infos = [], []
    for batch in batches:
        state, info = gn.gradinit_step(state, params, loss_fn, batch, optimizer=optimizer, **hyper)
        states.append(state)
        infos.append(info)
    return states, infos


def first_norms(case, p):
    params, loss_fn = problem(case)
    _, infos = run(params, loss_fn, gradinit_cases.minibatches(case, 3), p=p, gamma=1.0)
    return float(infos[0].grad_norm)


# The simple form, against the package.


@pytest.mark.skipif(importlib.util.find_spec("gradinit") is None, reason="needs the gradinit package")
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_gradinit_package(case, p, tmp_path):
    gamma = 0.8 * first_norms(case, p)
    script, file = Path(gradinit_cases.__file__), tmp_path / "package.pt"
    subprocess.run([sys.executable, str(script), case, str(p), str(gamma), str(file)], check=True, timeout=300)
    expected, above = torch.load(file)
    params, loss_fn = problem(case)
    states, infos = run(
        params, loss_fn, gradinit_cases.minibatches(case), gn.adam(0.03), form="simple", p=p, gamma=gamma,
        min_bias_scale=0.01,
    )  # fmt: skip
    assert [bool(info.above) for info in infos] == above
    assert 0 < sum(above) < len(above)
    scales = torch.stack([state.scales for state in states])
    for i, name in enumerate(sorted(params)):
        torch.testing.assert_close(scales[:, i], expected[name], rtol=0, atol=1e-8)


# The paper's form, against a transcription: one Hessian entry at a time, scalars in Python.


def transcription(params, loss_fn, batches, *, p, gamma, eta, normalize, lr, clip, shared, betas=(0.9, 0.999)):
    names = sorted(params)
    origin = {n: params[n].detach().clone() for n in names}
    current = {n: params[n].detach().clone() for n in names}
    memory = {
        n: {"alpha": 1.0, "n0": math.sqrt(float((origin[n] ** 2).sum())), "t": [0, 0], "m": [0.0, 0.0], "v": [0.0, 0.0]}
        for n in names
    }
    b1, b2 = betas
    history = []
    for s, s_tilde in batches:
        here = {n: current[n].clone().requires_grad_() for n in names}
        grads = torch.autograd.grad(loss_fn(here, s), [here[n] for n in names], create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        values = flat.tolist()
        norm = sum(abs(x) for x in values) if p == 1 else math.sqrt(sum(x * x for x in values))
        constraint = norm > gamma
        total = {n: torch.zeros_like(current[n]) for n in names}
        if constraint:
            for k, x in enumerate(values):
                factor = (x > 0) - (x < 0) if p == 1 else x / norm
                rows = torch.autograd.grad(flat[k], [here[n] for n in names], retain_graph=True, allow_unused=True)
                for n, row in zip(names, rows, strict=True):
                    total[n] += 0 if row is None else factor * row
        else:
            moved = {}
            for n, g in zip(names, grads, strict=True):
                direction = g.detach().sign() if p == 1 else g.detach() / norm if normalize else g.detach()
                moved[n] = (current[n] - eta * direction).requires_grad_()
            objective = loss_fn(moved, s_tilde) / eta
            for n, g in zip(names, torch.autograd.grad(objective, [moved[n] for n in names]), strict=True):
                total[n] = g
        row = 0 if constraint else 1
        for n in names:
            m = memory[n]
            length = math.sqrt(float((current[n] ** 2).sum()))
            if m["n0"] == 0 or length == 0:
                continue
            d = float((total[n] * current[n]).sum()) * m["n0"] / length
            d = max(min(d, clip), -clip) if clip else d
            m["t"][row] += 1
            m["m"][row] = b1 * m["m"][row] + (1 - b1) * d
            slot, seen = (0, sum(m["t"])) if shared else (row, m["t"][row])
            m["v"][slot] = b2 * m["v"][slot] + (1 - b2) * d * d
            step = lr * (m["m"][row] / (1 - b1 ** m["t"][row]))
            m["alpha"] -= step / (math.sqrt(m["v"][slot] / (1 - b2**seen)) + 1e-8)
            m["alpha"] = max(m["alpha"], 0.0 if "bias" in n else 0.01)
            current[n] = origin[n] * m["alpha"]
        history.append((constraint, [memory[n]["alpha"] for n in names]))
    return history


@pytest.mark.parametrize(
    ("p", "normalize", "clip", "shared", "lr"),
    [(2, True, 1.0, True, 0.03), (2, False, None, False, 0.03), (1, True, 1.0, True, 0.03), (2, True, 0.05, True, 0.3)],
)
@pytest.mark.parametrize("case", CASES)
def test_equals_a_transcription_of_the_paper(case, p, normalize, clip, shared, lr):
    params, loss_fn = problem(case)
    params["0.bias"] = torch.zeros_like(params["0.bias"])  # a parameter without scale
    minis = gradinit_cases.minibatches(case, 60, 3)
    gamma, eta = 0.8 * first_norms(case, p), 0.1 if p == 2 else 1e-3
    join = lambda a, b: (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
    pairs = [(join(a, b), join(a, c)) for a, b, c in zip(minis[::3], minis[1::3], minis[2::3], strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = transcription(
            params, loss_fn, pairs, p=p, gamma=gamma, eta=eta, normalize=normalize, lr=lr, clip=clip, shared=shared
        )
    optimizer = gn.rescale_adam(lr, clip=clip, shared_square=shared)
    _, state, history = gn.gradinit(
        params, loss_fn, minis, steps=20, p=p, gamma=gamma, eta=eta, normalize=normalize, optimizer=optimizer,
        progress=False,
    )  # fmt: skip
    assert history.above.tolist() == [constraint for constraint, _ in expected]
    assert 0 < history.above.sum() < 20
    after = torch.cat([history.scales[1:], state.scales[None]])
    torch.testing.assert_close(after, torch.tensor([row for _, row in expected], dtype=after.dtype), rtol=0, atol=1e-8)


def test_without_overlap_the_second_batch_shares_nothing_with_the_first():
    params, _ = small()
    seen = []

    def loss_fn(params, batch):
        seen.append(batch[:, 0].tolist())
        return (params["a"]["weight"].sum() * batch).square().mean() + sum(p.sum() for p in params["a"].values())

    minis = [torch.full((1, 2), float(k)) for k in range(8)]
    params = {"a": params["a"]}
    gn.gradinit(params, loss_fn, minis, steps=2, overlap=False, gamma=1e9, progress=False)
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]]
    seen.clear()
    gn.gradinit(params, loss_fn, minis, steps=2, gamma=1e9, progress=False)
    assert seen == [[0, 1], [0, 2], [3, 4], [3, 5]]


# What is scaled.


def test_where_and_frozen():
    params, batch = small()
    (state,), (info,) = run(params, small_loss, [batch], gamma=1e-3, where="a.weight")
    assert (state.scales != 1).tolist() == [False, True, False]
    (_,), (everything,) = run(params, small_loss, [batch], gamma=1e-3)
    torch.testing.assert_close(info.grad_norm, everything.grad_norm)  # what is not scaled still trains
    torch.testing.assert_close(info.scale_grads[1], everything.scale_grads[1])

    # Frozen is as if closed over.
    (state,), (info,) = run(params, small_loss, [batch], gamma=1e-3, frozen="a")
    rest = {"b": params["b"]}
    (other,), (expected,) = run(rest, lambda q, batch: small_loss({**params, **q}, batch), [batch], gamma=1e-3)
    torch.testing.assert_close(info.grad_norm, expected.grad_norm)
    torch.testing.assert_close(state.scales, torch.cat([torch.ones(2).double(), other.scales]))


@pytest.mark.parametrize("form", ["paper", "simple"])
@pytest.mark.parametrize("gamma", [1e-3, 1e3])
def test_a_tied_parameter_is_one(form, gamma):
    make = torch.Generator().manual_seed(3)
    w, x = torch.randn(4, 4, generator=make).double(), torch.randn(5, 4, generator=make).double()
    two = lambda q, x: (torch.tanh(x @ q["in"]) @ q["out"].T - 1).square().mean()
    one = lambda q, x: two({"in": q["in"], "out": q["in"]}, x)
    states, infos = run({"in": w, "out": w}, two, [x] * 5, form=form, gamma=gamma)
    expected, expected_infos = run({"in": w}, one, [x] * 5, form=form, gamma=gamma)
    torch.testing.assert_close(infos[-1].grad_norm, expected_infos[-1].grad_norm)
    torch.testing.assert_close(states[-1].scales, expected[-1].scales.expand(2))
    applied = gn.gradinit_apply(states[-1], {"in": w, "out": w})
    assert applied["in"] is applied["out"]


def test_a_parameter_that_the_batch_does_not_touch_is_left_alone():
    params = {"a": torch.tensor([3.0]), "b": torch.tensor([2.0])}
    loss_fn = lambda q, batch: (q[batch] * 5).square().sum()
    for optimizer in (gn.rescale_adam(0.1), gn.adam(0.1)):
        states, _ = run(params, loss_fn, ["a", "a", "b", "a"], optimizer, gamma=1e-3)
        scales = torch.stack([state.scales for state in states])
        assert scales[1, 1] == 1
        assert scales[2, 0] == scales[1, 0]
        assert scales[3, 1] == scales[2, 1]
    # With counts of its own, a scale does not notice the steps that pass it by.
    only, _ = run(params, loss_fn, ["a", "a", "a"], gn.rescale_adam(0.1), gamma=1e-3)
    states, _ = run(params, loss_fn, ["a", "b", "a", "b", "a"], gn.rescale_adam(0.1), gamma=1e-3)
    torch.testing.assert_close(states[-1].scales[0], only[-1].scales[0])


def test_bounds():
    params, batch = small()
    fast = gn.rescale_adam(0.5, clip=None)
    states, _ = run(params, small_loss, [batch] * 12, fast, gamma=1e-6, min_scale=0.2, max_scale=1.1)
    scales = torch.stack([state.scales for state in states])
    assert scales.min() == 0
    assert scales[:, 1:].min() == 0.2
    assert scales.max() <= 1.1
    assert (scales[:, 0] == 0).nonzero()[0] < 11
    assert scales[-1, 0] == 0  # and there it stays, for the parameter has no length left
    states, _ = run(params, small_loss, [batch] * 12, fast, gamma=1e-6, min_scale=0.2, biases="b")
    assert torch.stack([state.scales for state in states])[:, 0].min() == 0.2


def test_buffers_stay_as_they_are():
    params, loss_fn = problem("cnn")
    net = gradinit_cases.model("cnn")
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    call = gn.functional(net)
    loss_fn = lambda q, batch: nn.functional.cross_entropy(call(q, batch[0]), batch[1])
    run(params, loss_fn, gradinit_cases.minibatches("cnn", 3))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def test_reinit_draws_for_zeros_only():
    params = {"w": torch.ones(3), "bias": torch.zeros(1000), "tied": torch.zeros(4)}
    params["again"] = params["tied"]
    new = reinit_zeros(params, 0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(new["w"], params["w"])
    assert abs(float(new["bias"].std()) - 0.5) < 0.05
    assert new["again"] is new["tied"]
    assert torch.equal(params["bias"], torch.zeros(1000))
    assert torch.equal(reinit_zeros(params, 0.01, where="w")["bias"], params["bias"])
    out, state, _ = gn.gradinit(
        {"w": torch.ones(2), "bias": torch.zeros(2)}, lambda q, x: ((q["w"] + q["bias"]) * x - 3).square().mean(),
        [torch.ones(2, 1)], steps=3, reinit_std=0.1, gamma=1e-3, progress=False,
    )  # fmt: skip
    assert (out["bias"] != 0).all()
    assert (state.scales != 1).all()


# Losses.


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
        [lambda q, z, batch: z.square().mean(), lambda q, z, batch: (z @ q["b"]["weight"].T).square().mean()],
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
    loss_fn = lambda q, x: q["fine"].square().sum() + 1e30 * q["huge"].sum()
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
            torch.zeros(2) + 0.0, lambda w, x: w.abs().sqrt().sum(), [torch.ones(1)] * 9, steps=2, progress=False
        )


# Conformance.


@pytest.mark.parametrize("optimizer", [None, gn.adam(0.02), gn.sgd(0.003)])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("form", ["paper", "simple"])
def test_compiled_is_eager_in_one_graph(form, p, optimizer):
    params, batch = small()
    gamma = float(0.9 * run(params, small_loss, [batch], p=p)[1][0].grad_norm)
    step = lambda state, params, batch: gn.gradinit_step(
        state, params, small_loss, batch, form=form, p=p, gamma=gamma, eta=0.1, optimizer=optimizer
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    state = other = gn.gradinit_init_state(params, optimizer=optimizer)
    above = []
    for k in range(10):
        scaled = (batch[0] * (1.5 if k % 2 else 0.5), batch[1])
        state, info = step(state, params, scaled)
        other, other_info = compiled(other, params, scaled)
        torch.testing.assert_close(other, state, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other_info.objective, info.objective)
        above.append(bool(info.above))
    assert counter.frame_count == 1
    assert {True, False} == set(above)


@pytest.mark.parametrize("case", CASES)
def test_models_compile(case):
    params, loss_fn = problem(case)
    first, second = gradinit_cases.minibatches(case, 2)
    state = gn.gradinit_init_state(params)
    step = lambda state, params, batch, after: gn.gradinit_step(state, params, loss_fn, batch, batch_after=after)
    eager = step(state, params, first, second)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(state, params, first, second)
    torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-8)


def test_the_whole_procedure_compiles():
    params, batch = small()
    halves = [(batch[0][:3], batch[1][:3]), (batch[0][3:6], batch[1][3:6])]
    eager = gn.gradinit(params, small_loss, halves, steps=3, progress=False)
    compiled = gn.gradinit(params, small_loss, halves, steps=3, progress=False, compile=True)
    torch.testing.assert_close(compiled[2], eager[2], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", ["paper", "simple"])
def test_vmap_over_states_and_gammas(form):
    params, batch = small()
    gammas = torch.tensor([1e-3, 0.3, 1.0, 1e3], dtype=torch.float64)
    state = gn.gradinit_init_state(params)
    stacked = gn.GradInitState(*torch.utils._pytree.tree_map(lambda t: torch.stack([t] * 4), tuple(state)))
    stacked = stacked._replace(moments=type(state.moments)(*stacked.moments))
    step = lambda state, gamma: gn.gradinit_step(state, params, small_loss, batch, form=form, gamma=gamma)
    many, infos = torch.func.vmap(step)(stacked, gammas)
    assert set(infos.above.tolist()) == {True, False}
    compiled, _ = torch.compile(torch.func.vmap(step), fullgraph=True, backend="aot_eager")(stacked, gammas)
    torch.testing.assert_close(compiled, many)
    for k, gamma in enumerate(gammas):
        one, _ = gn.gradinit_step(state, params, small_loss, batch, form=form, gamma=float(gamma))
        torch.testing.assert_close(many.scales[k], one.scales)


def test_nothing_is_written_and_no_graph_is_left():
    params, batch = small()
    leaves = [leaf.requires_grad_() for group in params.values() for leaf in group.values()]
    copies = [leaf.detach().clone() for leaf in (*leaves, *batch)]
    state = gn.gradinit_init_state(params)
    saved = gn.state_dict(state)
    new, info = gn.gradinit_step(state, params, small_loss, batch)
    applied = gn.gradinit_apply(new, params)
    for now, before in zip((*leaves, *batch), copies, strict=True):
        assert torch.equal(now, before)
        assert now.grad is None
    for path, leaf in gn.state_dict(state).items():
        assert torch.equal(leaf, saved[path])
    for tensor in (*info, new.scales, *new.moments, applied["a"]["bias"]):
        assert not tensor.requires_grad


def test_the_state_is_saved_and_loaded(tmp_path):
    params, batch = small()
    states, _ = run(params, small_loss, [batch] * 2)
    torch.save(gn.state_dict(states[-1]), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    back = gn.load_state(gn.gradinit_init_state(params), saved)
    torch.testing.assert_close(back, states[-1], rtol=0, atol=0)


def test_dtypes_are_kept():
    for dtype, wide in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        params = {"w": torch.ones(3, 3, dtype=dtype)}
        loss_fn = lambda q, x: (x @ q["w"] - 1).square().mean()
        out, state, history = gn.gradinit(params, loss_fn, [torch.eye(3, dtype=dtype)], steps=2, progress=False)
        assert (out["w"].dtype, state.scales.dtype, history.scale_grads.dtype) == (dtype, wide, wide)


def test_module_in_module_out():
    net = gradinit_cases.model("cnn")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    call = gn.functional(net)
    loss_fn = lambda params, batch: nn.functional.cross_entropy(call(params, batch[0]), batch[1])
    params, state, _ = gn.gradinit(
        dict(net.named_parameters()), loss_fn, gradinit_cases.minibatches("cnn", 6), steps=4, progress=False
    )
    net.load_state_dict(params, strict=False)
    for scale, name in zip(state.scales, sorted(params), strict=True):
        torch.testing.assert_close(net.get_parameter(name), scale * before[name])
        assert net.get_parameter(name).requires_grad
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def test_an_exploding_network_is_mended():
    """What it is for: twenty layers whose gradient is far too large come out trainable."""
    make = torch.Generator().manual_seed(2)
    params = {f"{i:02}.weight": torch.randn(16, 16, generator=make) * 0.6 for i in range(20)}
    x = torch.randn(64, 16, generator=make)

    def loss_fn(params, x):
        h = x
        for _, w in sorted(params.items()):
            h = torch.relu(h @ w)
        return (h - x.relu()).square().mean()

    _, _, history = gn.gradinit(
        params, loss_fn, [x[:32], x[32:]], steps=150, optimizer=gn.rescale_adam(0.02), progress=False
    )
    assert history.grad_norm[0] > 100
    assert history.grad_norm[-20:].max() < 2
    assert history.finite.all()


# Bad input.


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"gamma": 0.0}, r"gamma=0.0 must be positive"),
        ({"gamma": -1.0}, r"gamma=-1.0 must be positive"),
        ({"gamma": math.nan}, r"gamma=nan must be positive"),
        ({"p": 3}, r"p=3 must be 2, if training will use SGD, or 1"),
        ({"eta": 0.0}, r"eta=0.0 must be positive"),
        ({"form": "papr"}, r"form='papr' must be 'paper' or 'simple'"),
        ({"where": "a.weigth"}, r"where='a.weigth' matches no parameter; did you mean one of 'a.weight'"),
        ({"frozen": "c"}, r"'c' matches no parameter"),
        ({"biases": "c"}, r"'c' matches no parameter"),
        ({"where": "a", "frozen": "a"}, r"leave nothing to scale"),
        ({"min_scale": -0.1}, r"min_scale=-0.1 must lie in \[0, 1\]"),
        ({"min_bias_scale": 2.0}, r"min_bias_scale=2.0 must lie in"),
        ({"max_scale": 0.5}, r"max_scale=0.5 must be at least 1"),
        ({"loss_scale": 0.0}, r"loss_scale=0.0 must be positive"),
        ({"weights": [1.0]}, r"weights is for T losses"),
        ({"optimizer": gn.sgd(0.1)}, r"the state holds RescaleAdamState, but this optimizer keeps SGDState"),
    ],
)
def test_bad_hyperparameters(hyper, message):
    params, batch = small()
    state = gn.gradinit_init_state(params)
    saved = gn.state_dict(state)
    with pytest.raises(ValueError, match=message):
        gn.gradinit_step(state, params, small_loss, batch, **hyper)
    assert all(torch.equal(leaf, saved[path]) for path, leaf in gn.state_dict(state).items())


def test_bad_params_states_and_losses():
    params, batch = small()
    state = gn.gradinit_init_state(params)
    with pytest.raises(ValueError, match=r"'n' is torch.int64; only floating-point"):
        gn.gradinit_init_state({"n": torch.arange(3)})
    with pytest.raises(ValueError, match="params has no leaves"):
        gn.gradinit_init_state({})
    with pytest.raises(ValueError, match=r"state has 3 scales, but params has 1 leaves"):
        gn.gradinit_step(state, params["b"], small_loss, batch)
    with pytest.raises(ValueError, match=r"state has 3 scales"):
        gn.gradinit_apply(state, params["b"])
    with pytest.raises(ValueError, match=r"not a GradInitState"):
        gn.gradinit_step(gn.init_state(2), params, small_loss, batch)
    with pytest.raises(ValueError, match=r"shape \(7, 3\): reduce it"):
        gn.gradinit_step(state, params, lambda q, b: b[0] @ q["a"]["weight"].T, batch)
    with pytest.raises(ValueError, match="weights has 3 entries, but loss_fn returned 2 losses"):
        gn.gradinit_step(
            state, params, lambda q, b: torch.stack([small_loss(q, b)] * 2), batch, weights=[1.0, 2.0, 3.0]
        )


def test_bad_procedures():
    params, batch = small()
    with pytest.raises(ValueError, match="steps=0 must be an integer, at least 1"):
        gn.gradinit(params, small_loss, [batch], steps=0)
    with pytest.raises(ValueError, match="batches ran out after 4: give a list or a DataLoader"):
        gn.gradinit(params, small_loss, iter([batch] * 4), steps=2, progress=False)
    with pytest.raises(ValueError, match="batches ran out after 0"):
        gn.gradinit(params, small_loss, [], steps=2, progress=False)
    with pytest.raises(ValueError, match="joins minibatches along axis 0"):
        gn.gradinit(params, lambda q, b: small_loss(q, batch), [1.0], steps=1, progress=False)
    with pytest.raises(ValueError, match=r"std=0.0 must be positive"):
        reinit_zeros(params, 0.0)
    for keywords in ({"learning_rate": 0.0}, {"b1": 1.0}, {"eps": 0.0}, {"clip": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(keywords))}="):
            gn.rescale_adam(**keywords)
