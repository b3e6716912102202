"""What training moves: no frozen parameter, tied ones as one, and no gradient in the memory of another."""

import functools

import pytest
import torch
from torch import nn
from toys import leaves, same_bits

import gradnorm_func as gn

D = {"dtype": torch.float64}
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


class Tied(nn.Module):
    """A word model: the embedding is the last layer's weight, and the first norm is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 7, bias=False)
        self.last.weight = self.embedding.weight
        self.double()
        self.inner.bias.requires_grad_(False)

    def forward(self, words):
        return self.last(torch.tanh(self.inner(self.embedding(words))))


WORDS = torch.arange(14).reshape(2, 7) % 7
WEIGHTS = (0.7, 1.3)  # of the two losses


def losses_of(out):
    target = WORDS.roll(1, 1)
    return {
        "next": nn.functional.cross_entropy(out.flatten(0, 1), target.flatten()),
        "size": out.square().mean(),
    }


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Tied()


def plain_training(model, steps, optimizer=ADAM, after=lambda model: None):
    """The reference: PyTorch's own loop on the weighted sum."""
    stepper = optimizer(list(model.parameters()))
    for _ in range(steps):
        stepper.zero_grad()
        losses = losses_of(model(WORDS))
        (WEIGHTS[0] * losses["next"] + WEIGHTS[1] * losses["size"]).backward()
        after(model)
        stepper.step()
    return {name: leaf.detach().clone() for name, leaf in model.named_parameters(remove_duplicate=False)}


# Params with every name of a tied tensor: from the module, and as plain tensors that share their memory.
BOTH_NAMES = {
    "one name": lambda model: dict(model.named_parameters()),
    "two names": lambda model: dict(model.named_parameters(remove_duplicate=False)),
    "state dict": lambda model: {
        name: leaf.requires_grad_(name != "inner.bias") for name, leaf in model.state_dict().items()
    },
}


def loss_of(model, names):
    """A loss that reads the tied tensor at both of its names, if params has them."""
    parts = {name: gn.functional(getattr(model, name), name) for name in ("embedding", "inner", "last")}

    def loss_fn(params, words):
        if names == "one name":
            return losses_of(gn.functional(model)(params, words))
        return losses_of(parts["last"](params, torch.tanh(parts["inner"](params, parts["embedding"](params, words)))))

    return loss_fn


def assert_same(params, expected):
    assert not torch.equal(expected["last.weight"], expected["inner.weight"].new_zeros(7, 4))
    for name, leaf in params.items():
        torch.testing.assert_close(leaf.detach(), expected[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("names", BOTH_NAMES)
@pytest.mark.parametrize("loop", ["write_grads", "train", "sweep"])
def test_frozen_stays_and_tied_stays_tied(model, names, loop):
    params, loss_fn = BOTH_NAMES[names](model), loss_of(model, names)
    balancer, before = gn.static(list(WEIGHTS)), model.inner.bias.detach().clone()
    if loop == "write_grads":
        stepper, state = ADAM(list(dict.fromkeys(params.values()))), balancer.init(2, **D)
        for _ in range(20):
            grads, state, _ = balancer.grad(state, params, loss_fn, WORDS)
            gn.write_grads(params, grads)
            stepper.step()
        found = {name: leaf.detach().clone() for name, leaf in params.items()}
    elif loop == "train":
        found = gn.train(params, loss_fn, [WORDS] * 20, balancer=balancer, optimizer=ADAM).params
        assert {name: leaf.requires_grad for name, leaf in found.items()} == {
            name: leaf.requires_grad for name, leaf in params.items()
        }
    else:
        result = gn.sweep(
            params, loss_fn, [WORDS] * 20, balancer=balancer, optimizer=gn.adam(0.05), compile=False, progress=False
        )
        found = result.run(0)[0]
    torch.manual_seed(3)
    expected = plain_training(Tied(), 20)
    assert_same(found, expected)
    assert torch.equal(found["inner.bias"], before)
    assert not torch.equal(found["inner.weight"], Tied().inner.weight)


def test_write_grads_to_a_module_with_gradients_under_all_names(model):
    params = dict(model.named_parameters(remove_duplicate=False))
    grads = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    model.inner.bias.grad = torch.ones(4, **D)  # from before it was frozen
    gn.write_grads(model, grads)
    assert (model.last.weight.grad == 2).all()
    assert (model.inner.weight.grad == 1).all()
    assert model.inner.bias.grad is None


def test_all_frozen_is_an_error(model):
    model.requires_grad_(False)
    params = dict(model.named_parameters())
    run = functools.partial(gn.train, loss_fn=loss_of(model, "one name"), batches=[WORDS])
    for call in (
        lambda: run(params),
        lambda: gn.write_grads(model, {name: torch.ones_like(leaf) for name, leaf in params.items()}),
    ):
        with pytest.raises(ValueError, match=r"every parameter is frozen.*requires_grad_\(\)"):
            call()
    plain = {name: leaf.detach() for name, leaf in params.items()}
    assert not same_bits(run(plain).params, plain), "plain tensors say nothing, and are trained"


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("names", ["two names", "state dict"])
def test_gradinit_keeps_tied_parameters_tied(model, names, compile, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    params, call = BOTH_NAMES[names](model), loss_of(model, names)
    loss_fn = lambda params, batch: call(params, batch)["size"]
    new, _, _ = gn.gradinit(params, loss_fn, [WORDS], steps=5, form="simple", compile=compile)
    assert torch.equal(new["embedding.weight"], new["last.weight"])
    assert not torch.equal(new["last.weight"], params["last.weight"])
    once, _, _ = gn.gradinit(
        dict(model.named_parameters()),
        lambda params, batch: loss_of(model, "one name")(params, batch)["size"],
        [WORDS],
        steps=5,
        form="simple",
    )
    assert_same(once, {name: leaf.detach() for name, leaf in new.items()})


# ---------------------------------------------------------------------------------------------- memory of one's own


def added(params, x):
    """Three parameters whose gradients are one tensor to autograd, and one that is a loss by itself."""
    z = torch.tanh(x + (params["pos"] + params["typ"]) @ (params["w"] + params["delta"].mT))
    return {"a": z.square().mean(), "b": (z - 1).abs().mean(), "c": params["number"]}


def start():
    torch.manual_seed(0)
    shapes = {"pos": (4, 4), "typ": (4, 4), "w": (4, 4), "delta": (4, 4), "number": ()}
    return {name: torch.randn(shape, **D).requires_grad_() for name, shape in shapes.items()}


def seam(params, x):
    return torch.tanh(x + (params["pos"] + params["typ"]) @ (params["w"] + params["delta"].mT))


SEAM = gn.multi_task_loss(
    seam,
    {
        "a": lambda params, z, x: z.square().mean(),
        "b": lambda params, z, x: (z - 1).abs().mean(),
        "c": lambda params, z, x: params["number"],
    },
)


def in_place(leaves):
    """What writes to `.grad`: a scaler's unscaling, then clipping."""
    for leaf in leaves:
        leaf.grad.mul_(0.5)
    nn.utils.clip_grad_norm_(leaves, 0.5)


@pytest.mark.parametrize("loss_fn", [added, SEAM], ids=["general", "seam"])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_writes_to_a_gradient_writes_to_no_other(loss_fn, compiled):
    params, twin, x = start(), start(), torch.randn(4, 4, **D)
    balancer = gn.static([1.0, 2.0, 0.5])
    state = balancer.init(3, **D)
    step = torch.compile(balancer.grad, fullgraph=True, backend="aot_eager") if compiled else balancer.grad
    grads, new, info = step(state, params, loss_fn, x)
    weights = info.weights.clone()
    gn.write_grads(params, grads)
    losses = added(twin, x)
    (losses["a"] + 2 * losses["b"] + 0.5 * losses["c"]).backward()
    in_place(params.values())
    in_place(twin.values())
    for name, leaf in twin.items():
        torch.testing.assert_close(params[name].grad, leaf.grad, rtol=1e-10, atol=1e-14, msg=name)
    assert same_bits(state, balancer.init(3, **D)), "nor to the weights"
    assert same_bits((new.weights, info.weights), (weights, weights))


def test_gradients_come_in_memory_of_their_own():
    """Also before `write_grads`, for those who set `.grad` themselves."""
    params = start()
    balancer = gn.static()
    grads, _, info = balancer.grad(balancer.init(3, **D), params, SEAM, torch.ones(4, 4, **D))
    memory = [leaf.untyped_storage().data_ptr() for leaf in leaves(grads, info.weights)]
    assert len(set(memory)) == len(memory) == 6


def test_train_with_an_optimizer_that_writes_to_the_gradients():
    """Foreach Nesterov momentum adds to `.grad`."""
    run = functools.partial(gn.train, start(), added, [torch.ones(4, 4, **D)] * 20, balancer=gn.static())
    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
    one, many = (run(optimizer=functools.partial(sgd, foreach=foreach)).params for foreach in (False, True))
    for name, leaf in one.items():
        torch.testing.assert_close(many[name], leaf, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------- not finite


def test_write_grads_of_a_step_that_is_not_finite():
    model = nn.Linear(2, 1)
    nan = {name: torch.full_like(leaf, torch.nan) for name, leaf in model.named_parameters()}
    gn.write_grads(model, nan, finite=torch.tensor(False))
    assert all((leaf.grad == 0).all() for leaf in model.parameters())
    ones = {name: torch.ones_like(leaf) for name, leaf in model.named_parameters()}
    gn.write_grads(model, ones, finite=torch.tensor(True))
    assert all((leaf.grad == 1).all() for leaf in model.parameters())


def test_the_loop_of_the_readme_survives_a_nan(model):
    """A NaN in a batch moves the parameters by what Adam remembers, and by no NaN."""
    loss_fn, balancer, stepper = loss_of(model, "one name"), gn.gradnorm(), ADAM(model.parameters())
    state = balancer.init(2, **D)
    for step in range(6):
        scaled = lambda params, words, bad=step == 3: {
            name: loss * (torch.nan if bad else 1.0) for name, loss in loss_fn(params, words).items()
        }
        grads, state, info = balancer.grad(state, dict(model.named_parameters()), scaled, WORDS)
        assert bool(info.finite) == (step != 3)
        gn.write_grads(model, grads, finite=info.finite)
        stepper.step()
    assert all(leaf.isfinite().all() for leaf in model.parameters())


def nan_behind_w(params, x):
    """The gradient of `root` is NaN, that of z is not: the root of 0, times 0."""
    return x @ params["w"] + 0 * params["root"].square().sum().sqrt()


BEHIND = gn.multi_task_loss(
    nan_behind_w, [lambda params, z, x: z.square().mean(), lambda params, z, x: (z - 1).square().mean()]
)


@pytest.mark.parametrize("loop", ["write_grads", "train"])
def test_a_gradient_that_is_nan_behind_w(loop):
    """No loss and no norm at z shows it, and the step was taken."""
    params = {"w": torch.ones(3, 2, **D), "root": torch.zeros(2, **D)}
    x, balancer = torch.ones(4, 3, **D), gn.gradnorm()
    if loop == "train":
        run = gn.train(params, BEHIND, [x] * 3, progress=False)
        assert not run.history.finite.any()
        assert same_bits(run.params, params)
        assert run.state.step == 0
        frozen = {"w": params["w"].clone().requires_grad_(), "root": params["root"]}
        assert gn.train(frozen, BEHIND, [x] * 3, progress=False).history.finite.all(), "of what moves alone"
        return
    grads, _, info = balancer.grad(balancer.init(2, **D), params, BEHIND, x)
    assert grads["root"].isnan().all()
    gn.write_grads(params, grads, finite=info.finite)
    assert not any(leaf.grad.any() for leaf in params.values())
