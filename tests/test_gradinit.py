"""GradInit against the gradinit package, against a transcription of the paper's algorithm, and what is scaled."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import gradinit_cases
import pytest
import torch
from gradinit_cases import CASES, first_norm, minibatches, problem, run, small, small_loss
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradnorm_func as gn
from gradnorm_func._gradinit.reinit import reinit_zeros

# The simple form, against the package.


@pytest.fixture(scope="module")
def of_the_package(tmp_path_factory):
    """(case, p) -> γ, the package's scales and its branches; all in one process, which would take seconds to start."""
    torch.set_num_threads(1)  # as in the tests; this fixture is made before theirs
    gammas = {(case, p): 0.8 * first_norm(case, p) for case in CASES for p in (1, 2)}
    script, file = Path(gradinit_cases.__file__), tmp_path_factory.mktemp("package") / "scales.pt"
    runs = [f"{case}:{p}:{gamma!r}" for (case, p), gamma in gammas.items()]
    subprocess.run([sys.executable, str(script), *runs, str(file)], check=True, timeout=300)
    return {key: (gammas[key], *outcome) for key, outcome in torch.load(file).items()}


@pytest.mark.skipif(importlib.util.find_spec("gradinit") is None, reason="needs the gradinit package")
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_gradinit_package(case, p, of_the_package):
    gamma, expected, above = of_the_package[case, p]
    params, loss_fn = problem(case)
    hyper = {"form": "simple", "p": p, "gamma": gamma, "min_bias_scale": 0.01}
    states, infos = run(params, loss_fn, minibatches(case), gn.adam(0.03), **hyper)
    assert [bool(info.above) for info in infos] == above
    assert 0 < sum(above) < len(above)
    scales = torch.stack([state.scales for state in states])
    for i, name in enumerate(sorted(params)):
        torch.testing.assert_close(scales[:, i], expected[name], rtol=0, atol=1e-8)


# The paper's form, against a transcription: parameter by parameter, scalars in Python.


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
        current_leaves = {n: current[n].clone().requires_grad_() for n in names}
        grads = torch.autograd.grad(loss_fn(current_leaves, s), [current_leaves[n] for n in names], create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        values = flat.tolist()
        norm = sum(abs(x) for x in values) if p == 1 else math.sqrt(sum(x * x for x in values))
        constraint = norm > gamma
        total = {}
        if constraint:
            factors = [(x > 0) - (x < 0) if p == 1 else x / norm for x in values]
            pulled = torch.autograd.grad(flat, [current_leaves[n] for n in names], flat.new_tensor(factors))
            total = dict(zip(names, pulled, strict=True))
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
    minis = minibatches(case, 60, 3)
    gamma, eta = 0.8 * first_norm(case, p), 0.1 if p == 2 else 1e-3
    join = lambda a, b: (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
    pairs = [(join(a, b), join(a, c)) for a, b, c in zip(minis[::3], minis[1::3], minis[2::3], strict=True)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = transcription(
            params, loss_fn, pairs, p=p, gamma=gamma, eta=eta, normalize=normalize, lr=lr, clip=clip, shared=shared
        )
    optimizer = gn.rescale_adam(lr, clip=clip, shared_square=shared)
    hyper = {"p": p, "gamma": gamma, "eta": eta, "normalize": normalize}
    _, state, history = gn.gradinit(params, loss_fn, minis, steps=20, optimizer=optimizer, progress=False, **hyper)
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
    look = [[0, 1]]  # at the first batch, before the steps: does the loss read params?
    assert seen == [*look, [0, 1], [2, 3], [4, 5], [6, 7]]
    seen.clear()
    gn.gradinit(params, loss_fn, minis, steps=2, gamma=1e9, progress=False)
    assert seen == [*look, [0, 1], [0, 2], [3, 4], [3, 5]]


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
    call = gn.functional(net, buffers=False)
    loss_fn = lambda q, batch: nn.functional.cross_entropy(call(q, batch[0]), batch[1])
    run(params, loss_fn, minibatches("cnn", 3))
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
    params = {"w": torch.ones(2), "bias": torch.zeros(2)}
    loss_fn = lambda q, x: ((q["w"] + q["bias"]) * x - 3).square().mean()
    hyper = {"reinit_std": 0.1, "gamma": 1e-3}
    out, state, _ = gn.gradinit(params, loss_fn, [torch.ones(2, 1)], steps=3, progress=False, **hyper)
    assert (out["bias"] != 0).all()
    assert (state.scales != 1).all()


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
