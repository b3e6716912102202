"""functional: the module itself, on other tensors, whoever else is at work."""

import copy

import pytest
import torch
import torch._dynamo.utils
from functional_cases import assert_unchanged, other_params, tensors_of, with_params
from oracle import assert_near, gradients
from torch import nn
from toys import make_batch, same_bits

import gradnorm_func as gn

F64 = torch.float64
D = {"dtype": F64}


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


# ---------------------------------------------------------------------------------------------- values


def test_it_is_the_module_and_its_parts():
    model, x = Model().eval(), torch.randn(8, 5, dtype=F64)
    params = dict(model.named_parameters())
    assert torch.equal(gn.functional(model)(params, x)[0], model(x)[0])
    assert torch.equal(gn.functional(model.trunk, "trunk")(params, x), model.trunk(x))
    out, buffers = gn.functional(model.trunk, "trunk", buffers=True)(params, x)
    assert set(buffers) == {name for name, _ in model.named_buffers()}
    doubled = {name: 2 * leaf for name, leaf in params.items()}
    assert not torch.equal(gn.functional(model.a, "a")(doubled, out), model.a(out)), "it must read params"


MODULES = {
    "linear": lambda: (nn.Linear(5, 4, bias=False), 2),
    "trunk": lambda: (Model().trunk.eval(), 2),
    "lstm": lambda: (nn.LSTM(5, 4, num_layers=2, batch_first=True), 3),
    "attention": lambda: (nn.TransformerEncoderLayer(5, 1, 8, batch_first=True, dropout=0.0), 3),
    "weight norm": lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), 2),
    "compiled": lambda: (torch.compile(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), backend="eager"), 2),
}


@pytest.mark.parametrize("kind", MODULES)
def test_values_and_gradients_are_those_of_a_module_with_these_parameters(kind):
    module, ndim = MODULES[kind]()
    module.double()
    params = {name: leaf.requires_grad_() for name, leaf in other_params(module, "net.").items()}
    x = torch.randn((8, 5) if ndim == 2 else (8, 3, 5), dtype=F64)
    twin = with_params(module, {name.removeprefix("net."): leaf.detach() for name, leaf in params.items()})
    before, first = tensors_of(module), lambda out: out[0] if isinstance(out, tuple) else out
    call = gn.functional(module, "net")
    for _ in range(2):
        out, expected = first(call(params, x)), first(twin(x))
        assert torch.equal(out, expected)
        found = gradients(out.square().sum(), list(params.values()))
        for ours, theirs in zip(found, gradients(expected.square().sum(), list(twin.parameters())), strict=True):
            assert_near(ours, theirs)
    assert_unchanged(module, before)
    assert torch.equal(first(module(x)), first(copy.deepcopy(module)(x))), "its own parameters are in use again"


def test_what_is_untied_or_tied_after_the_first_call():
    a, b = nn.Linear(3, 3, **D), nn.Linear(3, 3, **D)
    model, x = nn.Sequential(a, b), torch.randn(4, 3, **D)
    b.weight = a.weight
    call = gn.functional(model)
    for weight in (a.weight, nn.Parameter(torch.randn(3, 3, **D)), a.weight):
        b.weight = weight
        params = dict(model.named_parameters())
        assert torch.equal(call(params, x), model(x))
        doubled = {name: 2 * leaf for name, leaf in params.items()}
        assert torch.equal(call(doubled, x), with_params(model, doubled)(x))


def test_under_vmap_and_grad():
    model, x = Model().eval(), torch.randn(8, 5, dtype=F64)
    each = [other_params(model) for _ in range(3)]
    stacked = {name: torch.stack([params[name] for params in each]) for name in each[0]}
    value = lambda params: gn.functional(model)(params, x)[0].square().sum()
    found = torch.func.vmap(torch.func.grad(value))(stacked)
    for i, params in enumerate(each):
        twin = with_params(model, params)
        expected = gradients(twin(x)[0].square().sum(), list(twin.parameters()))
        for name, gradient in zip(params, expected, strict=True):
            assert_near(found[name][i], gradient, name, scale=gradient.abs().max())


def test_tied_weights_are_one_parameter():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    model[2].weight = model[0].weight
    params, x = dict(model.named_parameters()), torch.randn(2, 3, dtype=F64)
    assert list(params) == ["0.weight"]
    loss_fn = lambda params, x: [gn.functional(model)(params, x).sum(), params["0.weight"].square().sum()]
    grads, _, _ = gn.gradnorm_grad(gn.init_state(2, dtype=F64), params, loss_fn, x, form="paper")
    (model(x).sum() + model[0].weight.square().sum()).backward()
    torch.testing.assert_close(grads["0.weight"], model[0].weight.grad)


def test_what_is_missing_is_named():
    model = Model()
    with pytest.raises(ValueError, match=r"params has no 'weight'.*prefix='' now"):
        gn.functional(model.a)(dict(model.named_parameters()), torch.ones(1, 4))


def test_a_part_whose_parameter_is_tied_to_another_part():
    """It is in params under the first of its names only, or under all of them if one asks for that."""
    model = nn.ModuleDict({"words": nn.Embedding(5, 3), "last": nn.Linear(3, 5, bias=False)}).double()
    model["last"].weight = model["words"].weight
    last, z = gn.functional(model["last"], "last"), torch.randn(2, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"no 'last.weight'.*tied.*named_parameters\(remove_duplicate=False\)"):
        last(dict(model.named_parameters()), z)
    assert torch.equal(last(dict(model.named_parameters(remove_duplicate=False)), z), model["last"](z))


def test_params_that_are_no_dict():
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    for params, kind in (
        (model, "Linear"),
        (model.parameters(), "generator"),
        (x, "Tensor"),
        (list(model.parameters()), "list"),
    ):
        with pytest.raises(ValueError, match=rf"params={kind}: the function of a module takes the dict"):
            gn.functional(model)(params, x)


def test_a_key_error_of_the_module_is_its_own():
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda module, args: {}["of the hook"])
    with pytest.raises(KeyError, match="of the hook"):
        gn.functional(module)(dict(module.named_parameters()), torch.ones(1, 2))
    assert all(type(leaf) is nn.Parameter for leaf in module.parameters()), "put back all the same"


def test_a_part_that_is_exchanged_later():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), torch.randn(2, 3, dtype=F64)
    call = gn.functional(model)
    call(other_params(model), x)
    model[0] = nn.Linear(3, 3).double()
    params = other_params(model)
    assert torch.equal(call(params, x), with_params(model, params)(x))
    nn.utils.parametrizations.weight_norm(model[0])
    params = other_params(model)
    assert "0.parametrizations.weight.original0" in params
    assert torch.equal(call(params, x), with_params(model, params)(x))


# ---------------------------------------------------------------------------------------------- buffers


def test_buffers_are_read_from_params_if_they_are_there():
    model, x = Model().eval(), torch.randn(8, 5, dtype=F64)
    params = dict(model.named_parameters())
    shifted = params | {"trunk.1.running_mean": torch.ones(6, dtype=F64)}
    out = gn.functional(model.trunk, "trunk")(shifted, x)
    model.trunk[1].running_mean.fill_(1.0)
    assert torch.equal(out, model.trunk(x))


def test_in_train_mode_the_module_stays_as_it_was():
    model, x = Model().train(), torch.randn(8, 5, dtype=F64)
    before = copy.deepcopy(model.state_dict())
    _, buffers = gn.functional(model, buffers=True)(dict(model.named_parameters()), x)
    assert same_bits(before, model.state_dict())
    model(x)
    assert same_bits(buffers, dict(model.named_buffers()))


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
        return gn.gradnorm_grad(state, params, with_buffers, batch, has_aux=True, form="paper")

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


class Counter(nn.Module):
    """Buffers that are replaced, not written to; one of them begins as None, and two are one tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=F64))
        self.register_buffer("same", self.count)
        self.register_buffer("last", None)

    def forward(self, x):
        self.count.add_(1)
        assert self.same is self.count
        self.count = self.same = self.count + 1
        self.last = x
        return x * self.count


@pytest.mark.parametrize("compiled", [False, True])
def test_buffers_that_the_module_replaces(compiled):
    module, x = Counter(), torch.ones(2, dtype=F64)
    call = gn.functional(module, "net", buffers=True)
    step = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
    out, buffers = step({}, x)
    assert out.tolist() == [2, 2]
    assert list(buffers) == ["net.count", "net.last"]
    assert torch.equal(buffers["net.last"], x)
    assert buffers["net.count"] == 2
    assert step(buffers, x)[0].tolist() == [4, 4]
    assert module.count == 0
    assert module.last is None
    assert module.count is module.same
