"""RotoGrad against the published packages, step by step, in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from rotograd_oracle import Oracle012
from torch import nn

import gradnorm_func as gn

STEPS, D = 50, 6
ROTATION_RATE = 2e-2


@pytest.fixture(scope="module")
def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("rotograd", reason="the oracle is rotograd==0.1.6.0 with geotorch==0.3.0")


class Model(nn.Module):
    def __init__(self, trunk, heads):
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleList(heads)


def mlp(tasks):
    torch.manual_seed(tasks)
    model = Model(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, D)),
        [nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(tasks)],
    ).double()
    x = torch.randn(STEPS, 7, 5, dtype=torch.float64)
    y = [10.0**k * torch.randn(STEPS, 7, 2, dtype=torch.float64) for k in torch.linspace(-1, 1, tasks)]
    return model, x, y, D, ()


def conv(tasks):
    torch.manual_seed(10 + tasks)
    model = Model(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, D, 3)),
        [nn.Sequential(nn.Tanh(), nn.Conv2d(D, 1, 1)) for _ in range(tasks)],
    ).double()
    x = torch.randn(STEPS, 4, 2, 7, 8, dtype=torch.float64)
    y = [10.0**k * torch.randn(STEPS, 4, 1, 3, 4, dtype=torch.float64) for k in torch.linspace(-1, 1, tasks)]
    return model, x, y, D, (3, 4)


def criterion(prediction, target):
    return (prediction - target).square().mean()


def seamed(model, tasks):
    trunk = gn.functional(model.trunk, "trunk")
    heads = [gn.functional(model.heads[k], f"heads.{k}") for k in range(tasks)]

    def head(k):
        return lambda params, z, batch: criterion(heads[k](params, z), batch[1][k])

    return gn.multi_task_loss(lambda params, batch: trunk(params, batch[0]), [head(k) for k in range(tasks)])


def compare(ours_model, tasks, x, y, method, rotations, theirs, *, their_rotations, their_grads, their_weights=None):
    """Runs both for 50 steps from the same start and compares at every step."""
    loss_fn = seamed(ours_model, tasks)
    params = {name: p.detach().clone() for name, p in ours_model.named_parameters()}
    state = method.init(tasks, rotations=rotations, dtype=torch.float64)
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    for step in range(STEPS):
        batch = (x[step], [target[step] for target in y])
        theirs(batch)
        grads, state, info = method.grad(state, params, loss_fn, batch)
        assert bool(info.finite)
        for name, grad in their_grads().items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-6, atol=1e-6)
        gn.write_grads(params, grads)
        optimizer.step()
        torch.testing.assert_close(state.rotations, their_rotations(), rtol=1e-6, atol=1e-6)
        if their_weights is not None:
            torch.testing.assert_close(state.weights, their_weights(), rtol=1e-6, atol=1e-6)
    for name, p in their_grads(values=True).items():
        torch.testing.assert_close(params[name], p, rtol=1e-6, atol=1e-6)
    moved = (state.rotations - rotations).abs().max()
    assert moved > 0.05  # or the test would show nothing


@pytest.mark.parametrize(("build", "tasks"), [(mlp, 2), (mlp, 5), (conv, 2)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("variant", ["RotateOnly", "RotoGrad", "RotoGradNorm"])
def test_equals_the_package_0_1_6(package, build, tasks, normalize, variant):
    model, x, y, size, trailing = build(tasks)
    twin = copy.deepcopy(model)
    keywords = {"alpha": 0.7} if variant == "RotoGradNorm" else {}
    torch.manual_seed(3)
    roto = getattr(package, variant)(
        twin.trunk,
        list(twin.heads),
        size,
        post_shape=trailing,
        normalize_losses=normalize,
        burn_in_period=20,
        **keywords,
    ).double()
    roto.train()
    with torch.no_grad():
        bases = torch.stack([rotation.detach().clone() for rotation in roto.rotation])
    # The package converts its random bases to double after it has drawn them in float32.
    for k in range(tasks):
        q = torch.linalg.qr(bases[k])[0]
        bases[k] = q * (q * bases[k]).sum(0).sign()
        roto.parametrizations[f"rotation_{k}"][0].base.copy_(bases[k])
    net = torch.optim.Adam(twin.parameters(), lr=1e-2)
    rot = torch.optim.Adam([p for n, p in roto.named_parameters() if "rotation" in n], lr=ROTATION_RATE)
    extra = [p for n, p in roto.named_parameters() if "weight_" in n]
    weight = torch.optim.Adam(extra, lr=3e-2) if extra else None

    def theirs(batch):
        for optimizer in (net, rot, weight):
            if optimizer is not None:
                optimizer.zero_grad()
        predictions = roto(batch[0])
        roto.backward([criterion(p, t) for p, t in zip(predictions, batch[1], strict=True)])
        their.update({n: p.grad.clone() for n, p in twin.named_parameters()})
        for optimizer in (net, rot, weight):
            if optimizer is not None:
                optimizer.step()

    their: dict[str, torch.Tensor] = {}
    compare(
        model,
        tasks,
        x,
        y,
        gn.rotograd(
            size,
            trailing_shape=trailing,
            form="0.1.6",
            map="exp",
            moving=False,
            normalize=normalize,
            scale={"RotateOnly": "none", "RotoGrad": "rotograd", "RotoGradNorm": "gradnorm"}[variant],
            alpha=keywords.get("alpha", 0.0),
            optimizer=gn.adam(ROTATION_RATE),
            weight_optimizer=gn.adam(3e-2),
        ),
        bases,
        theirs,
        their_rotations=lambda: torch.stack(roto.rotation).detach(),
        their_grads=lambda values=False: dict(twin.named_parameters()) if values else their,
        their_weights=(lambda: torch.stack(list(roto.weight)).detach()) if extra else None,
    )


@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("gradnorm", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("cooperative", [None, 25])
def test_equals_the_0_1_2_form(tasks, gradnorm, normalize, cooperative):
    model, x, y, size, _ = mlp(tasks)
    twin = copy.deepcopy(model)
    bases = gn.random_rotations(tasks, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    oracle = Oracle012(bases, alpha=0.6, burn_in=20, normalize=normalize, gradnorm=gradnorm, cooperative=cooperative)
    optimizers = [
        torch.optim.Adam(twin.parameters(), lr=1e-2),
        torch.optim.Adam(oracle.entries, lr=ROTATION_RATE),
        torch.optim.Adam(oracle.logits, lr=3e-2),
    ]
    their: dict[str, torch.Tensor] = {}

    def theirs(batch):
        for optimizer in optimizers:
            optimizer.zero_grad()
        heads = [lambda r, t, head=head: criterion(head(r), t) for head in twin.heads]
        oracle.backward(twin.trunk(batch[0]), heads, batch[1])
        their.update({n: p.grad.clone() for n, p in twin.named_parameters()})
        for optimizer in optimizers:
            optimizer.step()

    compare(
        model,
        tasks,
        x,
        y,
        gn.rotograd(
            size,
            form="0.1.2",
            scale="gradnorm" if gradnorm else "none",
            alpha=0.6,
            map="exp",
            moving=False,
            normalize=normalize,
            cooperative=cooperative,
            optimizer=gn.adam(ROTATION_RATE),
            weight_optimizer=gn.adam(3e-2),
        ),
        bases,
        theirs,
        their_rotations=lambda: torch.stack([oracle.rotation(k) for k in range(tasks)]).detach(),
        their_grads=lambda values=False: dict(twin.named_parameters()) if values else their,
        their_weights=(lambda: tasks * torch.stack(oracle.logits).softmax(0).detach()) if gradnorm else None,
    )
