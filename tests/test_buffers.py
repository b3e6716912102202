"""Buffers that a module in train mode renews: never lost in silence, and as in PyTorch's own loop once written back."""

import copy
import functools

import pytest
import torch
import torch._dynamo.utils
from torch import nn
from toys import same_bits

import gradnorm_func as gn

D = {"dtype": torch.float64}
ADAM = functools.partial(torch.optim.Adam, lr=0.01)
WEIGHTS = [0.8, 1.2]


class Model(nn.Module):
    """Batch norm in the trunk and in one head, of an input that is far from normal."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 1)), "b": nn.Linear(8, 1)})
        self.double()

    def forward(self, x):
        z = self.trunk(x)
        return {name: head(z)[:, 0] for name, head in self.heads.items()}


def losses_of(outs, x):
    return {"a": (outs["a"] - x.sum(1)).square().mean(), "b": (outs["b"] - x[:, 0]).abs().mean()}


def batches(steps):
    draw = torch.Generator().manual_seed(1)
    return [5 + 2 * torch.randn(64, 3, generator=draw, **D) for _ in range(steps)]


def whole(model):
    """The loss as one function, its buffers as aux."""
    call = gn.functional(model, buffers=True)

    def loss_fn(params, x):
        outs, buffers = call(params, x)
        return losses_of(outs, x), buffers

    return loss_fn


def with_seam(model):
    """The same with its seam; the head without buffers has no aux."""
    trunk = gn.functional(model.trunk, "trunk", buffers=True)
    a, b = gn.functional(model.heads["a"], "heads.a", buffers=True), gn.functional(model.heads["b"], "heads.b")

    def head(params, z, x):
        out, buffers = a(params, z)
        return losses_of({"a": out[:, 0], "b": x[:, 0]}, x)["a"], {"buffers": buffers, "spread": out.detach().std()}

    heads = {"a": head, "b": lambda params, z, x: losses_of({"a": x.sum(1), "b": b(params, z)[:, 0]}, x)["b"]}
    return gn.multi_task_loss(lambda params, x: trunk(params, x), heads, has_aux=True)


def by_pytorch(model, data):
    stepper = ADAM(model.parameters())
    for x in data:
        stepper.zero_grad()
        losses = losses_of(model(x), x)
        (WEIGHTS[0] * losses["a"] + WEIGHTS[1] * losses["b"]).backward()
        stepper.step()


def by_hand(model, loss_fn, data, compiled):
    balancer, stepper = gn.static(WEIGHTS), ADAM(model.parameters())
    step = torch.compile(balancer.grad, fullgraph=True, backend="aot_eager") if compiled else balancer.grad
    state = balancer.init(2, **D)
    for x in data:
        params = dict(model.named_parameters())
        grads, state, _, aux = step(state, params, loss_fn, x, has_aux=True)
        gn.write_grads(model, grads)
        gn.write_buffers(model, aux)
        stepper.step()


def by_train(model, loss_fn, data, compiled):
    run = gn.train(
        dict(model.named_parameters()), loss_fn, data, balancer=gn.static(WEIGHTS), optimizer=ADAM,
        buffers=model, compile=compiled,
    )  # fmt: skip
    model.load_state_dict(run.params, strict=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("loss_of", [whole, with_seam])
@pytest.mark.parametrize("loop", [by_hand, by_train])
def test_statistics_move_as_in_pytorch(loop, loss_of, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    model = Model().train()
    reference, data = copy.deepcopy(model), batches(20 if compiled else 300)
    by_pytorch(reference, data)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    loop(model, loss_of(model), data, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == int(compiled)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-8, atol=1e-10, msg=name)
    assert model.trunk[1].num_batches_tracked == len(data)
    if not compiled:
        x = batches(301)[-1]
        loss = lambda model: float(sum(losses_of(model(x), x).values()).detach())
        trained, evaluated = loss(copy.deepcopy(model).train()), loss(model.eval())
        assert evaluated < 1.5 * trained
        model.load_state_dict(dict(Model().named_buffers()), strict=False)
        assert loss(model) > 10 * trained, "with statistics that stand still"


def test_a_step_that_is_not_finite_leaves_the_buffers():
    model = Model()
    before = copy.deepcopy(dict(model.named_buffers()))
    gn.train(dict(model.named_parameters()), whole(model), [torch.full((4, 3), torch.nan, **D)], buffers=model)
    assert same_bits(dict(model.named_buffers()), before)


def test_buffers_of_a_step_that_is_not_finite_are_not_written():
    """In a loop of one's own the statistics were NaN for ever, while the parameters were not."""
    model, balancer, aux = nn.ModuleDict({"trunk": Average(), "norm": nn.BatchNorm1d(3, **D)}), gn.static(), {}
    before, nan = copy.deepcopy(model.state_dict()), torch.full((4, 3), torch.nan, **D)
    norm = gn.functional(model["norm"], "norm", buffers=True)
    trunk = gn.functional(model["trunk"], "trunk", buffers=True)

    def loss_fn(params, x):
        z, first = norm(params, x)
        out, second = trunk(params, z)
        return list(out.square().mean(0).unbind()), [first, second]

    for x, finite in ((nan, False), (torch.randn(4, 3, **D), True)):
        params = dict(model.named_parameters())
        _, _, info, aux = balancer.grad(balancer.init(2, **D), params, loss_fn, x, has_aux=True)
        assert bool(info.finite) == finite
        gn.write_buffers(model, aux, finite=info.finite)
        assert finite or same_bits(model.state_dict(), before)
    assert model["norm"].num_batches_tracked == 1
    assert torch.equal(model["trunk"].ema, aux[1]["trunk.ema"])


# ---------------------------------------------------------------------------------------------- or are refused

RENEWING = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "without counter": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)),
}


class OwnNorm(nn.Module):
    """Batch norm by the function of torch, which does not tell autograd that it writes to the statistics."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.register_buffer("other", torch.tensor([torch.nan, 1.0]))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.var, self.weight, training=self.training)


def test_a_norm_of_ones_own_is_not_lost_in_silence():
    module, x = nn.Sequential(OwnNorm()), torch.randn(4, 3)
    params, call = dict(module.named_parameters()), gn.functional(module)
    before = copy.deepcopy(module.state_dict())
    module.eval()
    call(params, x)
    module.train()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"new value for its buffer '0\.mean'.*buffers=True"):
            call(params, x)
    assert same_bits(module.state_dict(), before)
    expected = copy.deepcopy(module)
    assert torch.equal(gn.functional(module, buffers=True)(params, x)[0], expected(x))
    assert same_bits(gn.functional(module, buffers=True)(params, x)[1], dict(expected.named_buffers()))
    still = nn.Sequential(nn.Linear(3, 3), OwnNorm().eval())
    gn.functional(still)(dict(still.named_parameters()), x)


@pytest.mark.parametrize("kind", RENEWING)
def test_new_buffers_are_not_lost_in_silence(kind):
    module, x = nn.Sequential(RENEWING[kind]()).train(), torch.randn(4, 3, 5)
    params = dict(module.named_parameters())
    call, before = gn.functional(module), copy.deepcopy(module.state_dict())
    message = r"new value for its buffer '0\.\w.*buffers=True.*write_buffers\(model, aux\).*buffers=False.*eval\(\)"
    with pytest.raises(ValueError, match=message):
        call(params, x)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda params: call(params, x).sum())(params)
    assert same_bits(module.state_dict(), before)
    expected = copy.deepcopy(module)(x)
    assert torch.equal(gn.functional(module, buffers=False)(params, x), expected)
    assert same_bits(module.state_dict(), before)
    module.eval()
    call(params, x)


@pytest.mark.parametrize("kind", RENEWING)
def test_new_buffers_are_not_lost_under_a_compiler(kind):
    module, x = nn.Sequential(RENEWING[kind]()).train(), torch.randn(4, 3, 5)
    params = dict(module.named_parameters())
    step = torch.compile(gn.functional(module), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"new value for its buffer '0\.\w.*write_buffers"):
        step(params, x)
    module.eval()
    torch.testing.assert_close(step(params, x), module(x))


# ---------------------------------------------------------------------------------------------- write_buffers


def test_write_buffers_refuses_what_it_cannot_place():
    model, x = Model(), torch.randn(4, 3, **D)
    params, before = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    trunk = gn.functional(model.trunk, "trunk", buffers=True)
    _, first = trunk(params, x)
    with pytest.raises(
        ValueError, match=r"aux has two values for the buffer 'trunk.1.running_mean'.*params \| buffers"
    ):
        gn.write_buffers(model, [first, first])
    _, without_prefix = gn.functional(model.trunk, buffers=True)(
        {name.removeprefix("trunk."): leaf for name, leaf in params.items()}, x
    )
    with pytest.raises(ValueError, match=r"none of the module's buffers \['trunk.1.running_mean'.*path.*as prefix"):
        gn.write_buffers(model, without_prefix)
    assert same_bits(model.state_dict(), before)
    _, second = trunk(params | first, x)
    gn.write_buffers(model, {"metrics": {"accuracy": torch.ones(())}, "new": [second]})
    assert model.trunk[1].num_batches_tracked == 2


def test_batch_norm_by_functional_call_is_told_the_way():
    model = Model()
    loss_fn = lambda params, x: losses_of(torch.func.functional_call(model, params, (x,)), x)
    params, balancer, (x,) = dict(model.named_parameters()), gn.static(), batches(1)
    states = torch.func.vmap(lambda _: balancer.init(2, **D))(torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"writes to a tensor.*batch norm.*gn.functional\(module, prefix, buffers=True\)"
    ):
        torch.func.vmap(lambda state: balancer.grad(state, params, loss_fn, x)[2])(states)


class Average(nn.Module):
    """What it has seen, on average: a buffer that is None before the first batch."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2, **D)
        self.register_buffer("ema", None)

    def forward(self, x):
        y = self.lin(x)
        seen = y.detach().mean(0)
        self.ema = seen if self.ema is None else 0.9 * self.ema + 0.1 * seen
        return y - self.ema


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_buffer_that_is_none_at_first(compiled):
    model, twin = nn.ModuleDict({"trunk": Average()}), Average()
    twin.load_state_dict(model["trunk"].state_dict())
    params, silent = dict(model.named_parameters()), gn.functional(model["trunk"], "trunk")
    call = gn.functional(model["trunk"], "trunk", buffers=True)
    run = torch.compile(lambda params, x: call(params, x), fullgraph=True, backend="eager") if compiled else call
    for x in batches(3):
        out, buffers = run(params, x)
        old = model["trunk"].ema
        assert torch.equal(out, twin(x))
        assert torch.equal(buffers["trunk.ema"], twin.ema)
        assert model["trunk"].ema is old, "a call leaves the module as it was"
        with pytest.raises(ValueError, match=r"a new value for its buffer .trunk\.ema., which would be lost"):
            silent(params, x)
        gn.write_buffers(model, {"trunk": buffers})
        assert torch.equal(model["trunk"].ema, twin.ema)
    model["trunk"].ema = None
    once = call(params, x)[1]
    assert torch.equal(call(params | once, x)[1]["trunk.ema"], once["trunk.ema"] * 0.9 + 0.1 * once["trunk.ema"])
