"""nn.Module, torch.optim, checkpoints and loggers."""

import copy

import pytest
import torch
import torch._dynamo.utils
from torch import nn
from toys import BALANCERS, leaves, make_batch, make_problem, same_bits

import gradnorm_func as gn

F64 = torch.float64


class Model(nn.Module):
    """A trunk with batch norm, and two heads."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 2)
        self.double()

    def forward(self, x):
        z = self.trunk(x)
        return self.a(z), self.b(z)


def parts(model):
    """(params, loss_fn with its buffers as aux): the recipe of the docs."""
    trunk = gn.functional(model.trunk, "trunk", buffers=True)
    a, b = gn.functional(model.a, "a"), gn.functional(model.b, "b")
    loss_fn = gn.multi_task_loss(
        lambda params, batch: trunk(params, batch[0]),
        {
            "a": lambda params, z, batch: ((a(params, z)[:, 0] - batch[1][:, 0]).square().mean(), ()),
            "b": lambda params, z, batch: (b(params, z).square().mean(), {"spread": z.detach().std()}),
        },
        has_aux=True,
    )
    return dict(model.named_parameters()), loss_fn


def test_functional_is_the_module_and_its_parts():
    model, x = Model().eval(), torch.randn(8, 5, dtype=F64)
    params = dict(model.named_parameters())
    assert torch.equal(gn.functional(model)(params, x)[0], model(x)[0])
    assert torch.equal(gn.functional(model.trunk, "trunk")(params, x), model.trunk(x))
    out, buffers = gn.functional(model.trunk, "trunk", buffers=True)(params, x)
    assert set(buffers) == {name for name, _ in model.named_buffers()}
    doubled = {name: 2 * leaf for name, leaf in params.items()}
    assert not torch.equal(gn.functional(model.a, "a")(doubled, out), model.a(out)), "it must read params"


def test_functional_reads_buffers_from_params_if_they_are_there():
    model, x = Model().eval(), torch.randn(8, 5, dtype=F64)
    params = dict(model.named_parameters())
    shifted = params | {"trunk.1.running_mean": torch.ones(6, dtype=F64)}
    out = gn.functional(model.trunk, "trunk")(shifted, x)
    model.trunk[1].running_mean.fill_(1.0)
    assert torch.equal(out, model.trunk(x))


def test_functional_in_train_mode_leaves_the_module_as_it_was():
    model, x = Model().train(), torch.randn(8, 5, dtype=F64)
    before = copy.deepcopy(model.state_dict())
    _, buffers = gn.functional(model, buffers=True)(dict(model.named_parameters()), x)
    assert same_bits(before, model.state_dict())
    model(x)
    assert same_bits(buffers, dict(model.named_buffers()))


def test_functional_names_what_is_missing():
    model = Model()
    with pytest.raises(ValueError, match=r"params has no 'weight'.*prefix='' now"):
        gn.functional(model.a)(dict(model.named_parameters()), torch.ones(1, 4))


def test_tied_weights_are_one_parameter():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    params, x = dict(model.named_parameters()), torch.randn(2, 3, dtype=F64)
    assert list(params) == ["0.weight"]
    loss_fn = lambda params, x: [gn.functional(model)(params, x).sum(), params["0.weight"].square().sum()]
    grads, _, _ = gn.gradnorm_grad(gn.init_state(2, dtype=F64), params, loss_fn, x)
    (model(x).sum() + model[0].weight.square().sum()).backward()
    torch.testing.assert_close(grads["0.weight"], model[0].weight.grad)


@pytest.mark.parametrize("compiled", [False, True])
def test_batch_norm_in_train_mode(compiled):
    """Its new running statistics come back as aux, and the module itself stays as it was."""
    model, reference = Model().train(), None
    reference = copy.deepcopy(model)
    params, loss_fn = parts(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = copy.deepcopy(model.state_dict())

    def step(state, params, buffers, batch):
        fixed = lambda params, batch: loss_fn.backbone(params | buffers, batch)
        with_buffers = gn.multi_task_loss(fixed, loss_fn.heads, has_aux=True)
        return gn.gradnorm_grad(state, params, with_buffers, batch, has_aux=True)

    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    params = {name: leaf.detach() for name, leaf in params.items()}
    state = gn.init_state(2, dtype=F64)
    for t in range(3):
        batch = make_batch(t)
        weights = state.weights
        grads, state, _, (buffers, heads_aux) = step(state, params, buffers, batch)
        out_a, out_b = reference(batch[0])
        total = weights[0] * (out_a[:, 0] - batch[1][:, 0]).square().mean() + weights[1] * out_b.square().mean()
        expected = torch.autograd.grad(total, list(reference.parameters()))
        torch.testing.assert_close(grads, dict(zip(params, expected, strict=True)), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(buffers, dict(reference.named_buffers()))
        assert heads_aux["b"]["spread"].ndim == 0
    assert same_bits(before, model.state_dict())
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 1


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
        ({"weight": torch.ones(2, 3)}, r"grads has the paths \['weight'\]"),
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
