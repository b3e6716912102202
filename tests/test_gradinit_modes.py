"""GradInit compiled, vmapped, saved, in other dtypes; and that it writes to nothing."""

import importlib.util
import sys

import pytest
import torch
from gradinit_cases import CASES, minibatches, model, problem, run, small, small_loss
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gradnorm_func as gn


@pytest.mark.parametrize(
    ("form", "p", "optimizer"),
    [
        *((form, p, None) for form in ("paper", "simple") for p in (1, 2)),
        ("paper", 2, gn.adam(0.02)),
        ("simple", 1, gn.sgd(0.003)),
    ],
)
def test_compiled_is_eager_in_one_graph(form, p, optimizer):
    params, batch = small()
    gamma = float(0.9 * run(params, small_loss, [batch], p=p)[1][0].grad_norm)
    hyper = {"form": form, "p": p, "gamma": gamma, "eta": 0.1, "optimizer": optimizer}
    step = lambda state, params, batch: gn.gradinit_step(state, params, small_loss, batch, **hyper)
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
    first, second = minibatches(case, 2)
    state = gn.gradinit_init_state(params)
    step = lambda state, params, batch, after: gn.gradinit_step(state, params, loss_fn, batch, batch_after=after)
    eager = step(state, params, first, second)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(state, params, first, second)
    torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-8)


def test_the_whole_procedure_compiles():
    """By the default compiler, so on as small a problem as there is."""
    params, loss_fn = torch.tensor([3.0, -2.0]).double(), lambda w, x: (torch.tanh(w * x) - 2).square().mean()
    minis = [torch.full((1, 2), float(k)).double() for k in range(1, 4)]
    first_norm = float(run(params, loss_fn, [torch.cat(minis[:2])])[1][0].grad_norm)
    hyper = {"steps": 6, "gamma": 0.95 * first_norm, "optimizer": gn.rescale_adam(0.1), "progress": False}
    eager = gn.gradinit(params, loss_fn, minis, **hyper)
    assert set(eager[2].above.tolist()) == {True, False}
    compiled = gn.gradinit(params, loss_fn, minis, compile=True, **hyper)
    torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-8)


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


@pytest.mark.parametrize("form", ["paper", "simple"])
def test_no_step_asks_a_device_that_is_not_the_cpu(form):
    """Meta tensors have no values, so that whatever would wait for one raises."""
    params, batch = torch.utils._pytree.tree_map(lambda leaf: leaf.to("meta"), small())
    state = gn.gradinit_init_state(params)
    hyper = {"form": form, "loss_scale": 8.0, "where": "a", "max_scale": 2.0}
    with pytest.raises(RuntimeError, match="meta tensors"):
        bool(state.scales[0])
    state, info = gn.gradinit_step(state, params, small_loss, batch, **hyper)
    assert (state.scales.device.type, state.scales.shape, info.above.shape) == ("meta", (3,), ())


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


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_dtypes_are_kept(dtype, scale_dtype):
    params = {"w": torch.ones(3, 3, dtype=dtype)}
    loss_fn = lambda q, x: (x @ q["w"] - 1).square().mean()
    out, state, history = gn.gradinit(params, loss_fn, [torch.eye(3, dtype=dtype)], steps=2, progress=False)
    assert (out["w"].dtype, state.scales.dtype, history.scale_grads.dtype) == (dtype, scale_dtype, scale_dtype)


@pytest.mark.parametrize(("form", "gamma"), [("paper", 1e-3), ("paper", 1e3), ("simple", 1e3)])
def test_leaves_of_several_dtypes(form, gamma):
    """A leaf without axes would take the dtype of its scale, or of the step's length, and the loss that of a branch."""
    params = {"gain": torch.tensor(2.0, dtype=torch.bfloat16), "w": torch.ones(2, dtype=torch.float64)}

    def loss_fn(params, x):
        assert (params["gain"].dtype, params["w"].dtype) == (torch.bfloat16, torch.float64)
        return (params["gain"] * params["w"].bfloat16().prod() * x - 1).square().mean()

    hyper = {"form": form, "gamma": gamma, "normalize": False, "eta": 0.01}
    x = torch.ones(2, dtype=torch.bfloat16)
    out, state, history = gn.gradinit(params, loss_fn, [x], steps=2, progress=False, **hyper)
    assert (out["gain"].dtype, out["w"].dtype) == (torch.bfloat16, torch.float64)
    assert (history.loss.dtype, history.objective.dtype, state.scales.dtype) == (torch.bfloat16, *[torch.float64] * 2)
    compiled = torch.compile(
        lambda state, x: gn.gradinit_step(state, params, loss_fn, x, **hyper), fullgraph=True, backend="aot_eager"
    )
    start = gn.gradinit_init_state(params)
    eager = gn.gradinit_step(start, params, loss_fn, x, **hyper)
    torch.testing.assert_close(compiled(start, x), eager, rtol=0.01, atol=0)  # bfloat16 has three digits


@pytest.mark.parametrize("form", ["paper", "simple"])
@pytest.mark.parametrize("gamma", [1e-3, 1e3])
def test_torch_func_differentiates_through_a_step(form, gamma):
    params, batch = small()
    optimizer = gn.sgd(0.003)
    state = gn.gradinit_init_state(params, optimizer=optimizer)
    hyper = {"form": form, "gamma": gamma, "optimizer": optimizer}
    scales = lambda factor: (
        gn.gradinit_step(state, params, small_loss, (factor * batch[0], batch[1]), **hyper)[0].scales
    )
    weigh = lambda factor: (scales(factor) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).sum()
    one, h = torch.ones((), dtype=torch.float64), 1e-6
    slope = (weigh(one + h) - weigh(one - h)) / (2 * h)
    assert slope.abs() > 1e-4
    torch.testing.assert_close(torch.func.grad(weigh)(one), slope, rtol=1e-5, atol=1e-8)


def test_module_in_module_out():
    net = model("cnn")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    call = gn.functional(net, buffers=False)
    loss_fn = lambda params, batch: nn.functional.cross_entropy(call(params, batch[0]), batch[1])
    params, state, _ = gn.gradinit(
        dict(net.named_parameters()), loss_fn, minibatches("cnn", 6), steps=4, progress=False
    )
    net.load_state_dict(params, strict=False)
    for scale, name in zip(state.scales, sorted(params), strict=True):
        torch.testing.assert_close(net.get_parameter(name), scale * before[name])
        assert net.get_parameter(name).requires_grad
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def test_the_progress_bar_changes_nothing(capsys, monkeypatch):
    params, batch = small()
    silent = gn.gradinit(params, small_loss, [batch], steps=2, progress=False)
    assert capsys.readouterr().err == ""
    shown = gn.gradinit(params, small_loss, [batch], steps=2, progress=True)
    if importlib.util.find_spec("tqdm") is not None:
        assert "gradinit" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # as if it were not installed
    without = gn.gradinit(params, small_loss, [batch], steps=2, progress=True)
    assert capsys.readouterr().err == ""
    for outcome in (shown, without):
        torch.testing.assert_close(outcome, silent, rtol=0, atol=0)
