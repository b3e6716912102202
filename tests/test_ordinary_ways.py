"""The ordinary ways of PyTorch: each loop trains to the parameters of PyTorch's own loop, or refuses with a message.

One table: the rows are ways, the columns are loops. The weights are fixed, so that the reference needs no balancer.
"""

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradnorm_func as gn

WEIGHTS = {"a": 0.7, "b": 1.6}
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = functools.partial(torch.optim.Adam, lr=0.02)


class Net(nn.Module):
    """A trunk and two heads."""

    def __init__(self, *trunk, heads=None, dtype=torch.float64):
        super().__init__()
        self.trunk = nn.Sequential(*trunk)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 2) for name in WEIGHTS} if heads is None else heads)
        self.to(dtype)


class First(nn.Module):
    """The output of a module that has several: an LSTM's last hidden state."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.unflatten(1, (3, 1)))[0][:, -1]


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Tanh()), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Added(nn.Module):
    """What is added to one another: the gradients of all of it are one tensor to autograd."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4, bias=False)
        self.position, self.kind = (nn.Parameter(torch.randn(4)) for _ in range(2))
        self.delta = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        weight = self.inner.weight + self.delta
        return torch.tanh(nn.functional.linear(x, weight) + (self.position + self.kind))


def words(sparse=False):
    return Net(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 4), nn.Tanh())


def tied():
    """Both heads share their weight with one another and with the trunk's last layer."""
    net = Net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), heads={name: nn.Linear(4, 4) for name in WEIGHTS})
    for head in net.heads.values():
        head.weight = net.trunk[2].weight
    return net


def frozen():
    net = plain_net()
    net.trunk[0].requires_grad_(False)
    net.heads["b"].bias.requires_grad_(False)
    return net


def eval_norm():
    net = Net(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh())
    net.trunk[1].eval()
    return net


def with_compiled_part():
    return Net(torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), backend="eager"))


def plain_net(dtype=torch.float64):
    return Net(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), dtype=dtype)


class Way(NamedTuple):
    """An ordinary way to train, and what is said where a loop refuses it."""

    make: Any = plain_net
    optimizer: Any = SGD
    sizes: tuple[int, ...] = (6, 6, 6, 6)
    integer: bool = False
    clip: float | None = None
    scale: float | None = None  # of a GradScaler
    autocast: bool = False
    renews: bool = False  # buffers, which are to be as in PyTorch, too
    missing: bool = False
    rtol: float = 1e-10
    refused: dict[str, str] = {}  # loop -> message  # noqa: RUF012


REENTRANT, HOOKS = "use_reentrant=False", "saved tensor hooks"  # the second is torch.func's own word
WAYS = {
    "plain": Way(),
    "frozen parts": Way(frozen, ADAM),
    "tied parts": Way(tied, ADAM),
    "batch norm": Way(lambda: Net(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh()), renews=True),
    "batch norm, frozen": Way(eval_norm),
    "spectral norm": Way(lambda: Net(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh()), renews=True),
    "weight norm": Way(lambda: Net(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh())),
    "dropout": Way(lambda: Net(nn.Linear(3, 4), nn.Dropout(0.4), nn.Tanh())),
    "embedding": Way(words, ADAM, integer=True),
    "sparse embedding": Way(
        functools.partial(words, sparse=True),
        functools.partial(torch.optim.SGD, lr=0.1),
        integer=True,
        refused={"compiled": "sparse"},
    ),
    "LSTM": Way(lambda: Net(First(nn.LSTM(1, 4, batch_first=True))), refused={"compiled": "LSTM|Unsupported"}),
    "checkpointing": Way(lambda: Net(Checkpointed(), nn.Linear(4, 4)), refused={"compiled": HOOKS}),
    "reentrant checkpointing": Way(
        lambda: Net(nn.Linear(3, 3), Checkpointed(True), nn.Linear(4, 4)),
        refused={"seam": REENTRANT, "general": REENTRANT, "train": "requires_grad=True", "compiled": HOOKS},
    ),
    "compiled part": Way(with_compiled_part, refused={"compiled": "compiled on its own"}),
    "added parameters, clipped": Way(lambda: Net(Added()), ADAM, clip=0.5),
    "clipping": Way(clip=0.3),
    "GradScaler": Way(scale=2.0**10),
    "GradScaler, clipping": Way(lambda: Net(Added()), scale=2.0**10, clip=0.5),
    "autocast": Way(functools.partial(plain_net, torch.float32), autocast=True, rtol=2e-2),
    "foreach": Way(lambda: Net(Added()), functools.partial(SGD, nesterov=True, foreach=True)),
    "fused": Way(lambda: Net(Added()), functools.partial(torch.optim.AdamW, lr=0.02, fused=True)),
    "changing batch sizes": Way(sizes=(6, 3, 7, 2)),
    "missing labels": Way(missing=True),
}


def batches(way):
    draw = torch.Generator().manual_seed(2)
    dtype = torch.float32 if way.autocast else torch.float64
    for step, size in enumerate(way.sizes):
        x = torch.randint(5, (size, 3), generator=draw) if way.integer else torch.randn(size, 3, generator=draw)
        y = torch.randn(size, 2, generator=draw)
        present = {"a": True, "b": not way.missing or step % 2 == 0}
        torch.manual_seed(step)  # of dropout
        yield (x if way.integer else x.to(dtype), y.to(dtype)), present


def loss_of(name, out, batch):
    """Of one task; large enough for both to matter."""
    gap = out[:, :2] - batch[1]
    return 3 * gap.square().mean() if name == "a" else gap.abs().mean()


# ---------------------------------------------------------------------------------------------- the loops


def classic(net, way, forked, moving=None):
    """PyTorch's own loop; forked, with the stats of a balancer measured on the way. `moving`: the weights of each step,
    if they are not `WEIGHTS`."""
    stepper, scaler = way.optimizer(net.parameters()), scaler_of(way)
    state = BALANCER.init(2, dtype=torch.float64)
    for step, (batch, present) in enumerate(batches(way)):
        stepper.zero_grad()
        with autocast(way):
            z = net.trunk(batch[0])
            copies = gn.fork(z, net.heads) if forked else dict.fromkeys(WEIGHTS, z)
            losses = {name: loss_of(name, head(copies[name]), batch) for name, head in net.heads.items()}
        weights = WEIGHTS if moving is None else moving[step]
        if forked:
            stats = gn.measure_losses(losses, copies)
            mask = present if way.missing else None
            state, info = BALANCER.balance(state, stats, mask=mask)
            weights = dict(zip(gn.task_names(losses), info.weights.to(z), strict=True))
            assert (stats.grad_norms > 0).all()
        # Without a label the head has a gradient of zero, not none: momentum still moves it.
        total = sum(weights[name] * present[name] * loss for name, loss in losses.items())
        scaler.scale(total).backward()
        finish(net, way, stepper, scaler)


def functional(net, way, general=False, compiled=False, balancer=None):
    """A balancer's `grad`, as the README writes it; the weights of each step."""
    params = dict(net.named_parameters(remove_duplicate=general))
    stepper, scaler = way.optimizer(net.parameters()), scaler_of(way)
    loss_fn = general_loss(net, way) if general else seam_loss(net, way)
    # Norms too, where there is no seam: by T pullbacks at once.
    balancer = balancer or (gn.static(WEIGHTS, norms=True) if general else BALANCER)
    step = torch.compile(balancer.grad, fullgraph=True, backend="eager") if compiled else balancer.grad
    state, used = balancer.init(2, dtype=torch.float64), []
    for batch, present in batches(way):
        scale = scaler.scale(torch.ones(())) if way.scale else None
        with autocast(way):
            grads, state, info, *aux = step(
                state,
                params,
                loss_fn,
                batch,
                mask=torch.tensor(list(present.values())) if way.missing else None,
                loss_scale=scale,
                has_aux=way.renews,
            )
        assert bool(info.finite)
        gn.write_grads(net, grads)
        if way.renews:
            gn.write_buffers(net, aux)
        finish(net, way, stepper, scaler)
        used.append({name: float(weight) for name, weight in gn.by_name(WEIGHTS, info.weights).items()})
    return used


def trained(net, way):
    """The loop written for you; clipping and scaling are left to loops of one's own."""
    params = dict(net.named_parameters(remove_duplicate=False))
    data = [(*batch, present) for batch, present in batches(way)]
    states = iter(range(len(data)))

    def seeded():
        for item in data:
            torch.manual_seed(next(states))
            yield item

    run = gn.train(
        params,
        seam_loss(net, way),
        seeded(),
        balancer=BALANCER,
        optimizer=way.optimizer,
        mask=(lambda item: item[2]) if way.missing else None,
        buffers=net if way.renews else None,
    )
    with torch.no_grad():
        for name, leaf in params.items():
            leaf.copy_(run.params[name])


BALANCER = gn.static(WEIGHTS)
LOOPS = {
    "seam": functional,
    "general": functools.partial(functional, general=True),
    "compiled": functools.partial(functional, compiled=True),
    "train": trained,
    "fork": functools.partial(classic, forked=True),
}


def scaler_of(way):
    return torch.amp.GradScaler("cpu", init_scale=way.scale or 1.0, enabled=way.scale is not None)


def autocast(way):
    return torch.autocast("cpu", dtype=torch.bfloat16) if way.autocast else nullcontext()


def finish(net, way, stepper, scaler):
    if way.clip is not None:
        scaler.unscale_(stepper)
        nn.utils.clip_grad_norm_(net.parameters(), way.clip)
    scaler.step(stepper)
    scaler.update()


def seam_loss(net, way):
    """Through parts of the model."""
    trunk = gn.functional(net.trunk, "trunk", buffers=way.renews or None)
    heads = {name: gn.functional(head, f"heads.{name}") for name, head in net.heads.items()}

    def head(name):
        return lambda params, z, batch: loss_of(name, heads[name](params, z), batch)

    return gn.multi_task_loss(
        lambda params, batch: trunk(params, batch[0]), {name: head(name) for name in heads}, has_aux=way.renews
    )


def general_loss(net, way):
    """Through the model as a whole."""
    net.forward = lambda x: (lambda z: {name: head(z) for name, head in net.heads.items()})(net.trunk(x))
    call = gn.functional(net, buffers=way.renews or None)

    def loss_fn(params, batch):
        out = call(params, batch[0])
        outs, buffers = out if way.renews else (out, None)
        losses = {name: loss_of(name, outs[name], batch) for name in outs}
        return (losses, buffers) if way.renews else losses

    return loss_fn


# ---------------------------------------------------------------------------------------------- the table


@functools.cache
def reference(name):
    """The parameters and buffers before and after PyTorch's own loop."""
    torch.manual_seed(0)
    net = WAYS[name].make()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    classic(net, WAYS[name], forked=False)
    still = {key for key, leaf in net.named_parameters() if not leaf.requires_grad}
    still |= set() if WAYS[name].renews else dict(net.named_buffers()).keys()
    return before, net.state_dict(), still


def stands(way, loop):
    """Whether a loop has a place for what is special about a way."""
    return loop != "train" or (way.clip is None and way.scale is None and not way.autocast)


@pytest.mark.parametrize(
    ("name", "loop"), [(name, loop) for name in WAYS for loop in LOOPS if stands(WAYS[name], loop)]
)
def test_the_ways_of_pytorch(name, loop):
    way = WAYS[name]
    before, after, still = reference(name)
    torch.manual_seed(0)
    net = way.make()
    if loop in way.refused:
        with pytest.raises(Exception, match=way.refused[loop]):
            LOOPS[loop](net, way)
        torch._C._autograd._saved_tensors_hooks_enable()  # which torch forgets when a compilation ends in an error
        return
    LOOPS[loop](net, way)
    assert_as(net, way, before, after, still)


METHODS = {  # weights of the steps before, and of this very step, with which the heads are run back once more
    "gradnorm": gn.gradnorm(optimizer=gn.adam(0.2)),
    "own": gn.balancer(lambda state, seen: (1 / seen.gramian.diagonal().sqrt(), ()), needs="gramian", same_step=True),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in WAYS if "seam" not in WAYS[name].refused])
def test_weights_that_move(name, method):
    """With norms and Gramian taken on the way, and PyTorch's own loop with the weights that came out."""
    way = WAYS[name]
    before, _, still = reference(name)
    torch.manual_seed(0)
    net, twin = way.make(), way.make()
    twin.load_state_dict(net.state_dict())
    used = functional(net, way, balancer=METHODS[method])
    assert len({row["a"] for row in used}) > 1, "they move"
    classic(twin, way, forked=False, moving=used)
    assert_as(net, way, before, twin.state_dict(), still)


def assert_as(net, way, before, after, still):
    """Parameters and buffers as they are `after`; those that are to move have moved."""
    for key, value in net.state_dict().items():
        moved = (after[key] - before[key]).double().norm()
        assert moved == 0 if key in still else moved > 1e-3 or not value.is_floating_point(), key
        gap = (value - after[key]).double().norm()
        assert gap <= way.rtol * moved, f"{key} moved by {float(moved):.3g}, and is off by {float(gap):.3g}"
