"""`check`: what would train wrong without a word, said before training."""

import copy
import functools
import re

import pytest
import torch
from torch import nn
from toys import make_problem

import gradnorm_func as gn

F64 = torch.float64


def model():
    torch.manual_seed(0)
    parts = {
        "trunk": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()),
        "kind": nn.Linear(4, 3),
        "price": nn.Linear(4, 1),
    }
    return nn.ModuleDict(parts).double()


X = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))


def seam(net, closed=(), end=None, **options):
    """The README's model; `closed` are the parts that the loss closes over, `end` is where the backbone ends."""

    def part(name, module):
        call = gn.functional(module, name)
        return (lambda p, x: module(x)) if name in closed else call

    trunk, kind, price = part("trunk", net["trunk"][:end]), part("kind", net["kind"]), part("price", net["price"])
    heads = {
        "kind": lambda p, z, x: nn.functional.cross_entropy(kind(p, z), torch.arange(6) % 3),
        "price": lambda p, z, x: (price(p, z) - 7).square().mean(),
    }
    return gn.multi_task_loss(trunk, heads, **options)


def refused(*messages):
    return pytest.raises(ValueError, match=".*".join(map(re.escape, messages)))


def general(loss_fn):
    return lambda p, x: loss_fn(p, x)


@pytest.mark.parametrize("form", [lambda loss_fn: loss_fn, general], ids=["seam", "general"])
def test_closed_over_modules(form):
    """Every gradient was exactly 0 with healthy norms and moving weights, and check_seam was content."""
    net = model()
    params = dict(net.named_parameters())
    assert gn.check(form(seam(net)), params, X) == []
    with refused("no loss depends on 'kind.bias', 'kind.weight', 'price.bias'", "does loss_fn close over a module?"):
        gn.check(form(seam(net, ["trunk", "kind", "price"])), params, X)
    with refused("no loss depends on 'kind.bias', 'kind.weight', but losses depend on parameters of such shapes"):
        gn.check(form(seam(net, ["kind"])), params, X)
    with refused("no loss depends on 'trunk.0.bias', 'trunk.0.weight', 'trunk.2.bias', 'trunk.2.weight'"):
        gn.check(form(seam(net, ["trunk"])), params, X)
    grads, state, _ = gn.gradnorm_grad(gn.init_state(2), params, form(seam(net)), X)
    assert all(leaf.norm() > 0 for leaf in grads.values())
    with refused("no loss depends on any of params"):
        gn.gradnorm_grad(state, params, form(seam(net, ["trunk", "kind", "price"])), X)


def test_unread_parameters_are_told():
    problem = make_problem()
    params = problem.params | {"spare": torch.ones(2), "other": torch.ones(2)}
    for loss_fn in (problem.general, problem.seam, problem.separable):
        assert gn.check(loss_fn, params, problem.batch) == ["other", "spare"]
    # Neither the points of a PINN nor a fixed network that gives features are modules that were forgotten.
    points, features = torch.ones((), requires_grad=True), nn.Linear(5, 5, dtype=F64)
    loss_fn = lambda p, b: problem.general(p, (features(b[0]) * points, b[1]))
    assert gn.check(loss_fn, params, problem.batch) == ["other", "spare"]


@pytest.mark.parametrize(
    "cut", [torch.Tensor.item, torch.Tensor.detach, lambda x: x.detach().numpy()[()]], ids=["item", "detach", "numpy"]
)
def test_losses_without_a_gradient(cut):
    problem = make_problem()
    loss_fn = lambda p, b: problem.general(p, b) | {"t1": cut(problem.general(p, b)["t1"])}
    with refused("losses without a gradient: 't1'. Return the 0-d tensor"):
        gn.check(loss_fn, problem.params, problem.batch)
    vector = lambda p, b: torch.stack([x if torch.is_tensor(x) else torch.tensor(x) for x in loss_fn(p, b).values()])
    with refused("losses without a gradient: '1'"):
        gn.check(vector, problem.params, problem.batch)


def test_a_layer_that_is_applied_twice():
    """The README's snippet with the README's advice: shapes match, and it trains, but another model."""
    net = model()
    params, last = dict(net.named_parameters()), gn.shared_linear("trunk.2.weight", "trunk.2.bias", torch.relu)
    gn.check(seam(net, end=2, last_shared=last), params, X)
    gn.check(seam(net, end=2, last_shared=last), params, X, where="trunk.2")
    doubled = seam(net, last_shared=last)
    for where in (None, "trunk.2.weight", "trunk.0"):
        with refused("the backbone reads 'trunk.2.bias' itself, and last_shared=gn.shared_linear(", "once more"):
            gn.check(doubled, params, X, where=where)
    with refused("the backbone reads 'trunk.2.weight' itself"):
        gn.gradnorm_grad(gn.init_state(2), params, doubled, X, where="trunk.2.weight")


def test_a_layer_that_is_meant_to_run_twice():
    """As a function it may be read anywhere, and the norms are those of all its uses."""
    p = {"w": torch.randn(3, 3, dtype=F64), "v": torch.randn(3, dtype=F64)}
    layer = lambda p, h: torch.tanh(h @ p["w"].T)
    heads = [lambda p, z, x: z.square().mean(), lambda p, z, x: (z @ p["v"]).square().mean()]
    loss_fn = gn.multi_task_loss(layer, heads, last_shared=layer)
    gn.check(loss_fn, p, X, where="w")
    w = p["w"].clone().requires_grad_()
    values = [head(p, layer({"w": w}, layer({"w": w}, X)), X) for head in heads]
    expected = torch.stack([torch.autograd.grad(x, w, retain_graph=True)[0].norm() for x in values])
    assert (expected > 0).all()
    torch.testing.assert_close(gn.task_grad_norms(loss_fn, p, X, where="w"), expected)


@pytest.mark.parametrize("kind", ["general", "seam", "separable"])
def test_a_head_taken_for_w(kind):
    problem = make_problem()
    loss_fn = getattr(problem, kind)
    with refused("where='head.1' is no W: only the task 't1' reads it, and norms there are exactly 0"):
        gn.check(loss_fn, problem.params, problem.batch, where="head.1")
    with refused("where='spare' is no W: no task reads it"):
        gn.check(loss_fn, problem.params | {"spare": torch.ones(1)}, problem.batch, where="spare")
    gn.check(loss_fn, problem.params, problem.batch, where=["head.1", "head.2"])
    gn.check(loss_fn, problem.params, problem.batch, where="trunk.1.weight")
    with refused("only the task '1' reads it"):
        gn.check(
            lambda p, b: torch.stack(list(problem.general(p, b).values())),
            problem.params,
            problem.batch,
            where="head.1",
        )


def test_dropout_is_said_first_and_alone():
    """It was a wall of differences, with advice about the shared_linear."""
    net = model()
    net["trunk"].insert(2, nn.Dropout(0.5))
    params, loss_fn = dict(net.named_parameters()), seam(net)
    said = r"^the loss of 'kind', 'price' is random \(dropout\?\), or keeps a .* model\.train\(\) after it$"
    with pytest.raises(ValueError, match=said):
        gn.check(loss_fn, params, X)
    net.eval()
    gn.check(loss_fn, params, X)


@pytest.mark.parametrize("form", [lambda loss_fn: loss_fn, general], ids=["seam", "general"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said_first_and_alone(form, bad):
    net = model()
    loss_fn = seam(net, closed=["kind"])
    loss_fn.functions[1] = lambda p, z, x: (z.sum() - bad).square()
    with pytest.raises(ValueError, match=r"^the loss of 'price' is not finite: look .* division by 0$"):
        gn.check(form(loss_fn), dict(net.named_parameters()), X)


def test_nothing_is_drawn_and_nothing_changed():
    problem = make_problem()
    noisy = lambda p, b: {name: loss * torch.rand(()) for name, loss in problem.general(p, b).items()}
    before = torch.get_rng_state()
    gn.check(noisy, problem.params, problem.batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in problem.params.values())


def test_train_says_it_at_its_first_step():
    """Closed-over modules are refused; what may be meant is warned of, once."""
    net = model()
    params, batches = dict(net.named_parameters()), [X] * 3
    gn.train(params, seam(net), batches, progress=False)
    with refused("no loss depends on 'trunk.0.bias'", "does loss_fn close over a module?"):
        gn.train(params, seam(net, ["trunk"]), batches, progress=False)
    spare = params | {"spare": torch.ones(2, dtype=F64)}
    with pytest.warns(UserWarning, match="no loss depends on the parameters 'spare': they will not be trained") as said:
        gn.train(spare, seam(net), batches, progress=False)
    assert len(said) == 1
    heads = seam(net).heads | {"price": lambda p, z, x: z.mean().detach()}
    loss_fn = gn.multi_task_loss(seam(net).backbone, heads)
    with pytest.warns(UserWarning, match=r"losses without a gradient: 'price'\. Return the 0-d tensor"):
        gn.train({k: v for k, v in params.items() if "price" not in k}, loss_fn, batches, progress=False)
    gn.train(params, loss_fn, batches, progress=False, mask=lambda batch: {"kind": True, "price": False})


def test_train_refuses_a_layer_that_is_applied_twice():
    """At z nothing showed it."""
    net = model()
    doubled = seam(net, last_shared=gn.shared_linear("trunk.2.weight", "trunk.2.bias", torch.relu))
    with refused("the backbone reads 'trunk.2.bias' itself", "once more"):
        gn.train(dict(net.named_parameters()), doubled, [X], progress=False)


@pytest.mark.parametrize("closed", [["trunk", "kind", "price"], ["trunk"], ["kind"]])
@pytest.mark.parametrize("form", [lambda loss_fn: loss_fn, general], ids=["seam", "general"])
def test_sweep_and_gradinit_refuse_closed_over_modules(form, closed):
    """Under `vmap` nobody sees it: all runs kept the parameters that they had."""
    net = model()
    params, loss_fn = dict(net.named_parameters()), form(seam(net, closed))
    for run in (
        lambda loss_fn: gn.sweep(params, loss_fn, [X], compile=False, progress=False),
        lambda loss_fn: gn.gradinit(params, loss_fn, [X], steps=1, form="simple", progress=False),
    ):
        with refused("no loss depends on", "does loss_fn close over a module?"):
            run(loss_fn)
        run(form(seam(net)))


def test_sweep_refuses_the_w_of_one_task():
    net = model()
    with refused("where='kind.weight' is no W: only the task 'kind' reads it"):
        gn.sweep(
            dict(net.named_parameters()), seam(net), [X], balancer=gn.gradnorm(where="kind.weight"),
            compile=False, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("closed", ["closure", "partial", "method", "global"])
def test_looks_change_no_buffer(closed):
    """Batch norm by `torch.func.functional_call` renews the statistics of the module itself: once a step."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    twin = copy.deepcopy(net)
    params, batches = dict(net.named_parameters()), [X + i for i in range(3)]

    def losses(module, params, x):
        out = torch.func.functional_call(module, params, (x,))
        return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}

    class Loss:
        def __init__(self, module):
            self.module = module

        def of(self, params, x):
            return losses(self.module, params, x)

    globals()["a_module"] = net
    loss_fn = {
        "closure": lambda params, x: losses(net, params, x),
        "partial": functools.partial(losses, net),
        "method": Loss(net).of,
        "global": of_a_global,
    }[closed]
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    gn.check(loss_fn, params, X)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    gn.train(
        params,
        loss_fn,
        batches,
        balancer=gn.static(),
        progress=False,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
    )
    stepper = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x in batches:
        stepper.zero_grad()
        sum(losses(twin, dict(twin.named_parameters()), x).values()).backward()
        stepper.step()
    assert net[1].num_batches_tracked == 3
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(net.named_buffers())[name], buffer)


def test_a_look_passes_buffers_by_that_have_no_values():
    """Of lazy modules and on meta; of a module that the loss can reach and does not call."""
    net = model()
    spare = [nn.LazyBatchNorm1d(), nn.BatchNorm1d(3, device="meta")]
    loss_fn = seam(net)
    run = lambda p, x, modules=tuple(spare): loss_fn(p, x)
    assert gn.check(run, dict(net.named_parameters()), X) == []


def of_a_global(params, x):
    out = torch.func.functional_call(a_module, params, (x,))  # noqa: F821
    return {"a": out[:, 0].square().mean(), "b": (out[:, 1] - 1).square().mean()}
