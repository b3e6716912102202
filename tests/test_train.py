"""train: the loop, against the same loop by hand."""

import functools
import sys
import time

import pytest
import torch
import torch._dynamo.utils
from toys import BALANCERS, inverse_norm, leaves, make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64
SGD = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
BATCHES = [make_batch(t) for t in range(6)]


def by_hand(balancer, params, loss_fn, batches, optimizer=SGD, masks=None):
    params = {name: leaf.detach().clone() for name, leaf in params.items()}
    stepper = optimizer(list(params.values()))
    state, infos = balancer.init(3, dtype=F64), []
    for t, batch in enumerate(batches):
        grads, state, info = balancer.grad(state, params, loss_fn, batch, mask=None if masks is None else masks[t])
        gn.write_grads(params, grads)
        stepper.step()
        infos.append(info)
    return params, state, infos


@pytest.mark.parametrize("name", BALANCERS)
def test_it_is_the_loop_by_hand(name):
    problem = make_problem()
    balancer = BALANCERS[name](None)
    expected, expected_state, infos = by_hand(balancer, problem.params, problem.seam, BATCHES)
    params, state, history, _ = gn.train(
        problem.params, problem.seam, iter(BATCHES), balancer=balancer, optimizer=SGD, progress=False
    )
    assert same_bits(params, expected)
    assert same_bits(state, expected_state)
    assert type(history) is type(infos[0])
    stacked = [torch.stack(rows) for rows in zip(*map(leaves, infos), strict=True)]
    assert same_bits(history, stacked)


def test_defaults_are_gradnorm_and_adam():
    problem = make_problem()
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    expected, expected_state, _ = by_hand(gn.gradnorm(), problem.params, problem.general, BATCHES, adam)
    params, state, _, _ = gn.train(problem.params, problem.general, BATCHES, progress=False)
    assert same_bits((params, state), (expected, expected_state))


def test_a_schedule_is_a_hook():
    """As the docstring says: it steps with the optimizer, and not in a step that is refused."""
    problem, rates = make_problem(), []

    def optimizer(tensors):
        stepper = SGD(tensors)
        schedule = torch.optim.lr_scheduler.ExponentialLR(stepper, 0.5)
        stepper.register_step_post_hook(lambda *_: schedule.step())
        stepper.register_step_pre_hook(lambda *_: rates.append(stepper.param_groups[0]["lr"]))
        return stepper

    bad = (BATCHES[0][0], BATCHES[0][1] * torch.nan)
    run = gn.train(problem.params, problem.seam, [*BATCHES[:2], bad, BATCHES[2]], optimizer=optimizer, progress=False)
    assert rates == [0.02, 0.01, 0.005]
    assert run.optimizer_state["param_groups"][0]["lr"] == 0.0025


def test_a_model_is_as_it_was_until_it_takes_the_result():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    before, call = [leaf.clone() for leaf in model.state_dict().values()], gn.functional(model)
    loss_fn = lambda params, x: list((call(params, x) - 1).square().mean(0))
    run = gn.train(dict(model.named_parameters()), loss_fn, [torch.randn(5, 3)] * 2, progress=False)
    assert same_bits(before, list(model.state_dict().values()))
    assert not model.load_state_dict(run.params, strict=False).unexpected_keys
    assert same_bits(dict(model.named_parameters()), run.params)
    assert not same_bits(before[0], model[0].weight)


def test_nothing_given_is_written_to():
    problem = make_problem()
    params = {name: leaf.requires_grad_() for name, leaf in problem.params.items()}
    state = gn.init_state(3, dtype=F64)
    before = [leaf.detach().clone() for leaf in leaves(params, state, BATCHES)]
    trained, new, history, _ = gn.train(params, problem.seam, BATCHES, state=state, progress=False)
    assert same_bits(before, leaves(params, state, BATCHES))
    assert all(leaf.grad is None for leaf in params.values())
    assert all(leaf.requires_grad and leaf.grad is None for leaf in leaves(trained)), "to be trained again"
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in leaves(new, history))
    assert not same_bits(trained, params)


def test_it_goes_on_from_a_state():
    problem = make_problem()
    run = functools.partial(gn.train, loss_fn=problem.seam, optimizer=functools.partial(torch.optim.SGD, lr=0.02))
    whole, whole_state, _, _ = run(problem.params, batches=BATCHES, progress=False)
    half, state, _, _ = run(problem.params, batches=BATCHES[:3], progress=False)
    rest, state, _, _ = run(half, batches=BATCHES[3:], state=state, progress=False)
    assert same_bits((rest, state), (whole, whole_state))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_it_goes_on_bit_for_bit(kind, tmp_path):
    """By its documented use; dropout in the loss draws what it would have drawn, and the bar changes nothing."""
    problem = make_problem()
    loss_fn = lambda params, batch: problem.seam(params, (torch.nn.functional.dropout(batch[0], 0.2), batch[1]))
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    run = functools.partial(gn.train, loss_fn=loss_fn, optimizer=functools.partial(kind, lr=0.02, **options))
    frozen = {name: leaf.requires_grad_(name != "trunk.0") for name, leaf in problem.params.items()}
    torch.manual_seed(5)
    whole = run(frozen, batches=BATCHES)
    torch.manual_seed(5)
    half = run(frozen, batches=BATCHES[:3])
    torch.save({"optimizer": half.optimizer_state, "state": gn.state_dict(half.state)}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    random = torch.get_rng_state()
    for progress in (None, True):  # twice: going on writes to nothing that it was given
        torch.set_rng_state(random)
        rest = run(
            half.params,
            batches=BATCHES[3:],
            state=gn.load_state(half.state, saved["state"]),
            optimizer_state=half.optimizer_state if progress else saved["optimizer"],
            progress=progress,
        )
        assert same_bits((rest.params, rest.state), (whole.params, whole.state))
        assert same_bits(rest.optimizer_state, whole.optimizer_state)
    assert torch.equal(rest.params["trunk.0"], frozen["trunk.0"])
    assert not same_bits(half.params, whole.params)
    fresh = run(half.params, batches=BATCHES[3:], state=half.state)
    assert not same_bits(fresh.params, whole.params), "a fresh optimizer has forgotten its moments"


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("name", ["gradnorm-adam", "gradnorm-log", "fixed-ratio", "static"])
def test_a_nan_batch_is_skipped(name, at):
    """As if it had not been there; the momentum of the optimizer included."""
    problem = make_problem()
    balancer = BALANCERS[name](None)
    bad = (BATCHES[0][0], BATCHES[0][1] * torch.nan)
    run = functools.partial(gn.train, loss_fn=problem.seam, balancer=balancer, optimizer=SGD, progress=False)
    params, state, history, _ = run(problem.params, batches=[*BATCHES[:at], bad, *BATCHES[at:]])
    expected, expected_state, _, _ = run(problem.params, batches=BATCHES)
    assert same_bits((params, state), (expected, expected_state))
    assert history.finite.tolist() == [t != at for t in range(7)]


def test_a_mask_of_the_batch():
    problem = make_problem()
    masks = [[True, t % 2 == 0, t != 3] for t in range(6)]
    batches = [(*batch, t) for t, batch in enumerate(BATCHES)]
    balancer = gn.gradnorm()
    expected, expected_state, _ = by_hand(balancer, problem.params, problem.seam, batches, masks=masks)
    params, state, history, _ = gn.train(
        problem.params,
        problem.seam,
        batches,
        balancer=balancer,
        optimizer=SGD,
        mask=lambda batch: torch.tensor(masks[batch[2]]),
        progress=False,
    )
    assert same_bits((params, state), (expected, expected_state))
    assert (history.weights[:, 1] > 0).tolist() == [t % 2 == 0 for t in range(6)], "0 where it is absent"


def test_compile_is_one_graph_and_the_same_run():
    problem = make_problem()
    run = functools.partial(gn.train, problem.params, problem.seam, BATCHES[:4], optimizer=SGD, progress=False)
    plain = run()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compile_ = torch.compile
    torch.compile = functools.partial(compile_, backend="aot_eager")  # Inductor would take a minute to say the same
    try:
        compiled = run(compile=True)
    finally:
        torch.compile = compile_
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 1
    for ours, theirs in zip(leaves(compiled), leaves(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_bfloat16_parameters_get_float32_weights():
    problem = make_problem(dtype=torch.bfloat16)
    batches = [tuple(x.bfloat16() for x in batch) for batch in BATCHES]
    params, state, _, _ = gn.train(problem.params, problem.seam, batches, progress=False)
    assert {leaf.dtype for leaf in params.values()} == {torch.bfloat16}
    assert state.weights.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::Warning:tqdm")
@pytest.mark.parametrize("installed", [False, True])
def test_progress_with_and_without_tqdm(installed, monkeypatch, capsys):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    problem = make_problem()
    slow = (time.sleep(0.05) or batch for batch in BATCHES)  # or the bar is drawn once only
    shown = gn.train(problem.params, problem.seam, slow, progress=True)
    said = capsys.readouterr().err
    assert ("train" in said) == installed
    assert ("t2=" in said) == installed, "each task's loss and weight"
    assert same_bits(shown, gn.train(problem.params, problem.seam, BATCHES))
    assert not capsys.readouterr().err, "a log is no terminal"


def test_the_users_own_balancer_trains():
    problem = make_problem()
    _, state, history, _ = gn.train(problem.params, problem.seam, BATCHES, balancer=inverse_norm(0.5), progress=False)
    assert history.weights.shape == (6, 3)
    assert state.weights.dtype == F64


def test_what_is_no_function_to_an_optimizer_is_an_error():
    model = torch.nn.Linear(2, 1)
    params, loss_fn = dict(model.named_parameters()), lambda params, x: [params["weight"].sum(), params["bias"].sum()]
    for optimizer, message in [
        (torch.optim.Adam(model.parameters()), r"optimizer=Adam must be a function.*copies of params: functools.part"),
        (gn.adam(0.1), r"optimizer=Optimizer must be a function"),
        (lambda leaves: leaves, r"optimizer returned list: it must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            gn.train(params, loss_fn, [None], optimizer=optimizer)
    with pytest.raises(ValueError, match="params"):
        gn.train(model, loss_fn, [None])


def test_no_batches_is_an_error():
    problem = make_problem()
    used = iter(BATCHES)
    gn.train(problem.params, problem.seam, used, progress=False)
    with pytest.raises(ValueError, match=r"batches is empty.*a generator can be used only once"):
        gn.train(problem.params, problem.seam, used, progress=False)


def test_a_wrong_w_is_reported():
    """W that no loss depends on: gradients of exactly zero, said once and by name of the remedy."""
    params = {"used": torch.ones(2), "unused": torch.ones(2)}
    loss_fn = lambda p, batch: {"a": p["used"].sum(), "b": p["used"].square().sum()}
    with pytest.warns(UserWarning, match=r"tasks \[0, 1\].*exactly zero at W.*`where`") as caught:
        gn.train(params, loss_fn, [None] * 3, balancer=gn.gradnorm(where="unused", alpha=0.0), progress=False)
    assert len(caught) == 1


@torch._dynamo.config.patch(recompile_limit=1)
def test_many_compiled_loops_in_one_session(monkeypatch):
    """Dynamo refuses one program too many of one code object."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for k in range(3):
        loss_fn = lambda w, x, k=k: {"a": (k + 1) * (w * x).sum(), "b": w.square().sum()}
        compiled, plain = (
            gn.train(torch.ones(3), loss_fn, [torch.ones(3)], progress=False, compile=c)[0] for c in (True, False)
        )
        torch.testing.assert_close(compiled, plain)
        objective = lambda w, x, k=k: (k + 1) * (w * x).square().sum()
        gn.gradinit(torch.ones(3), objective, [torch.ones(3)], steps=1, form="simple", progress=False, compile=True)
