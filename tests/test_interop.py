"""torch.optim, checkpoints and loggers."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn
from toys import BALANCERS, leaves, make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64


# ---------------------------------------------------------------------------------------------- write_grads


@pytest.mark.parametrize("kind", ["module", "dict", "list", "generator"])
def test_write_grads_lets_any_optimizer_step(kind):
    model = nn.Linear(3, 2)
    reference = copy.deepcopy(model)
    grads = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    as_list = [grads["weight"], grads["bias"]]
    target, given = {
        "module": (model, grads),
        "dict": (dict(model.named_parameters()), grads),
        "list": (list(model.parameters()), as_list),
        "generator": (model.parameters(), as_list),
    }[kind]
    gn.write_grads(target, given)
    reference.weight.grad, reference.bias.grad = grads["weight"].clone(), grads["bias"].clone()
    for module in (model, reference):
        torch.optim.AdamW(module.parameters(), lr=0.1).step()
    assert same_bits(dict(model.named_parameters()), dict(reference.named_parameters()))


def test_write_grads_refuses_other_params_and_writes_nothing():
    model = nn.Linear(3, 2)
    for grads, message in [
        ({"weight": torch.ones(2, 3)}, r"grads and target differ at \['bias'\]: take the gradients of the same"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
            r"grads\['bias'\] has shape \(3,\), the parameter \(2,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            gn.write_grads(model, grads)
    assert all(leaf.grad is None for leaf in model.parameters())


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("name", BALANCERS)
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    problem = make_problem()
    balancer = BALANCERS[name](None)

    def run(params, state, steps):
        for t in steps:
            grads, state, _ = balancer.grad(state, params, problem.seam, make_batch(t))
            params = {key: leaf - 0.02 * grads[key] for key, leaf in params.items()}
        return params, state

    straight = run(problem.params, balancer.init(3, dtype=F64), range(6))
    params, state = run(problem.params, balancer.init(3, dtype=F64), range(3))
    saved = gn.state_dict(state)
    assert all(type(value) is torch.Tensor for value in saved.values())
    torch.save({"params": params, "balancer": saved}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = gn.load_state(balancer.init(3, dtype=F64), loaded["balancer"])
    assert type(resumed) is type(state)
    assert same_bits(resumed, state)
    assert same_bits(run(loaded["params"], resumed, range(3, 6)), straight)


def test_a_state_dict_is_a_copy():
    state = gn.init_state(2)
    saved = gn.state_dict(state)
    saved["weights"].zero_()
    loaded = gn.load_state(state, saved)
    saved["weights"].fill_(7.0)
    assert state.weights.tolist() == [1.0, 1.0]
    assert loaded.weights.tolist() == [0.0, 0.0]


def test_a_checkpoint_takes_the_dtype_of_the_template():
    saved = gn.state_dict(gn.init_state(2, weights=[0.5, 1.5]))
    loaded = gn.load_state(gn.init_state(2, dtype=F64), saved)
    assert loaded.weights.dtype == F64
    assert loaded.step.dtype == torch.int64


def test_a_checkpoint_of_another_kind_is_refused():
    saved = gn.state_dict(gn.init_state(2))
    with pytest.raises(ValueError, match=r"differ in \['moments.mean', 'moments.square'\]: make the template with the"):
        gn.load_state(gn.init_state(2, optimizer=gn.sgd(0.1)), saved)
    with pytest.raises(
        ValueError, match=r"'weights' has shape \(2,\), the template \(3,\): was it made for another num"
    ):
        gn.load_state(gn.init_state(3), saved)


# ---------------------------------------------------------------------------------------------- loggers


@pytest.mark.parametrize("name", BALANCERS)
def test_log_dict_is_flat_and_complete(name):
    problem = make_problem()
    balancer = BALANCERS[name](None)
    _, _, info = balancer.grad(balancer.init(3, dtype=F64), problem.params, problem.seam, problem.batch)
    for names in (None, ["t0", "t1", "t2"], problem.seam.heads):
        flat = gn.log_dict(info, names, prefix="train/")
        assert all(key.startswith("train/") and value.ndim == 0 for key, value in flat.items())
        assert len(flat) == sum(field.numel() for field in leaves(info))
        assert flat[f"train/losses/{'1' if names is None else 't1'}"] == info.losses[1]
    with pytest.raises(ValueError, match="names has 2 entries, but there are 3 tasks"):
        gn.log_dict(info, ["a", "b"])


def test_log_dict_of_pairs_and_of_other_shapes():
    class Info(NamedTuple):
        losses: torch.Tensor
        cosines: torch.Tensor
        memory: dict

    info = Info(torch.ones(2), torch.tensor([[1.0, 3.0], [3.0, 1.0]]), {"queue": torch.tensor([[1.0, 2.0, 4.0]])})
    flat = gn.log_dict(info, ["a", "b"])
    queue = {"memory.queue/0": 1, "memory.queue/1": 2, "memory.queue/2": 4}
    expected = {"losses/a": 1, "losses/b": 1, "cosines/a-b": 3} | queue
    assert {name: float(value) for name, value in flat.items()} == expected


def test_check_finite_names_the_tasks():
    stats = gn.TaskStats([1.0, float("inf")], [1.0, 1.0])
    _, info = gn.gradnorm_balance(gn.init_state(2), stats)
    for names in (["a", "b"], ("a", "b"), {"b": 0, "a": 0}):
        with pytest.raises(FloatingPointError, match="the loss of 'b' is not finite"):
            gn.check_finite(info, names)
    with pytest.raises(ValueError, match="names has 1 entries, but there are 2 tasks"):
        gn.check_finite(info, ["a"])
