"""RotoGrad against its equations, and as a citizen of this package: purity, one graph, vmap, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradnorm_func as gn
from gradnorm_func._rotograd.rotation import MAPS, _inverse, polish, skew, tangent_gradient, turn

F64 = torch.float64
T, D, B = 3, 6, 8


def problem(dtype=F64, d=D, tasks=T):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=F64).to(dtype)
    params = {"trunk": rand(5, d), "heads": {f"t{k}": rand(d, 2) for k in range(tasks)}}
    batch = {"x": rand(B, 5), "y": rand(tasks, B, 2)}

    def head(k):
        scale = 10.0 ** (k - 1)
        return lambda p, z, batch: scale * (torch.tanh(z @ p["heads"][f"t{k}"]) - batch["y"][k]).square().mean()

    loss_fn = gn.multi_task_loss(
        lambda p, batch: torch.tanh(batch["x"] @ p["trunk"]), {f"t{k}": head(k) for k in range(tasks)}
    )
    return params, loss_fn, batch


def start(seed=1, dtype=F64, tasks=T, d=D):
    rotations = gn.random_rotations(tasks, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return rotations.to(dtype)


def by_hand(params, loss_fn, batch, rotations):
    """Losses, g̃_k and g_k of every task by a loop of torch.autograd.grad."""
    z = loss_fn.backbone(params, batch).detach()
    losses, at_heads, at_z = [], [], []
    for k, head in enumerate(loss_fn.functions):
        r = (z @ rotations[k].mT).requires_grad_()
        loss = head(params, r, batch)
        (grad,) = torch.autograd.grad(loss, r)
        losses.append(loss.detach())
        at_heads.append(grad)
        at_z.append(grad @ rotations[k])
    return torch.stack(losses), torch.stack(at_heads), torch.stack(at_z)


def flat(tree):
    return gn._core.tree.flatten(tree)[0]


# --- the paper's form, against its equations ---------------------------------------------------------------------


def test_scale_is_the_papers_equation():
    params, loss_fn, batch = problem()
    rotations = start()
    method = gn.rotograd(D, scale="rotograd", normalize=False)
    state = method.init(T, rotations=rotations, dtype=F64)
    _, state, _ = method.grad(state, params, loss_fn, batch)  # takes ‖G(0)‖
    first = by_hand(params, loss_fn, batch, rotations)[2].flatten(1).norm(dim=1)
    params = {**params, "trunk": params["trunk"] * 0.7}
    grads, _, info = method.grad(state, params, loss_fn, batch)
    losses, _, g = by_hand(params, loss_fn, batch, state.rotations)
    norms = g.flatten(1).norm(dim=1)
    alphas = (norms / first) / (norms / first).sum()
    c = (alphas * norms).sum()
    torch.testing.assert_close(info.weights, c / norms)
    torch.testing.assert_close(info.losses, losses)
    trunk = params["trunk"].clone().requires_grad_()
    z = loss_fn.backbone({**params, "trunk": trunk}, batch)
    (expected,) = torch.autograd.grad(z, trunk, c * (g / norms[:, None, None]).sum(0))
    torch.testing.assert_close(grads["trunk"], expected)


@pytest.mark.parametrize("kind", ["exp", "cayley"])
@pytest.mark.parametrize("moving", [True, False])
def test_rotations_descend_the_papers_loss(kind, moving):
    params, loss_fn, batch = problem()
    rotations = start()
    rate = 1e-2
    method = gn.rotograd(D, map=kind, moving=moving, optimizer=gn.sgd(rate))
    state, _ = method.init(T, rotations=rotations, dtype=F64), None
    _, new, info = method.grad(state, params, loss_fn, batch)
    _, at_heads, g = by_hand(params, loss_fn, batch, rotations)
    v = (g / g.flatten(1).norm(dim=1)[:, None, None]).mean(0)
    entries = torch.zeros(T, D, D, dtype=F64, requires_grad=True)
    lower = entries.tril(-1)
    turned = rotations @ MAPS[kind](lower - lower.mT)
    loss = -torch.einsum("knj,kji,ni->k", at_heads, turned, v)  # Σ_n ⟨R_kᵀ g̃_n, v_n⟩
    (grad,) = torch.autograd.grad(loss.sum(), entries)
    step = -rate * grad.tril(-1)
    torch.testing.assert_close(new.rotations, rotations @ MAPS[kind](step - step.mT), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(info.rotation_losses, loss.detach())


def test_gradnorm_weights_aim_at_the_mean_of_norms_in_the_papers_form():
    params, loss_fn, batch = problem()
    rotations, alpha, rate = start(), 0.5, 1e-2
    for form in ("paper", "0.1.6"):
        method = gn.rotograd(D, scale="gradnorm", form=form, alpha=alpha, weight_optimizer=gn.sgd(rate))
        state = method.init(T, rotations=rotations, initial_losses=[1.0, 2.0, 3.0], dtype=F64)._replace(
            weights=torch.tensor([0.5, 1.0, 1.5], dtype=F64)
        )
        state = state._replace(initial_norms=torch.ones(T, dtype=F64))
        _, new, info = method.grad(state, params, loss_fn, batch)
        losses, _, g = by_hand(params, loss_fn, batch, rotations)
        norms = g.flatten(1).norm(dim=1)
        logits = state.weights.log().requires_grad_()
        w = T * logits.softmax(0)
        rates = losses / torch.tensor([1.0, 2.0, 3.0], dtype=F64)
        rates = rates / rates.mean()
        paper = (w * norms).mean()
        published = (w[:, None, None] * g).mean(0).norm()
        target = ((paper if form == "paper" else published) * rates**alpha).detach()
        (grad,) = torch.autograd.grad((w * norms - target).abs().sum(), logits)
        torch.testing.assert_close(new.weights, T * (logits.detach() - rate * grad).softmax(0))
        torch.testing.assert_close(info.weights, state.weights)


def test_heads_get_the_gradients_of_their_own_losses():
    params, loss_fn, batch = problem()
    method = gn.rotograd(D)
    state = method.init(T, rotations=start(), dtype=F64)
    grads, _, _ = method.grad(state, params, loss_fn, batch)
    z = loss_fn.backbone(params, batch)
    for k in range(T):
        w = params["heads"][f"t{k}"].clone().requires_grad_()
        swapped = {**params, "heads": {**params["heads"], f"t{k}": w}}
        (expected,) = torch.autograd.grad(loss_fn.functions[k](swapped, z @ state.rotations[k].mT, batch), w)
        torch.testing.assert_close(grads["heads"][f"t{k}"], expected)


def test_info_tells_conflict_before_and_after():
    params, loss_fn, batch = problem()
    rotations = start()
    method = gn.rotograd(D)
    _, _, info = method.grad(method.init(T, rotations=rotations, dtype=F64), params, loss_fn, batch)
    _, at_heads, g = by_hand(params, loss_fn, batch, rotations)
    cosines = lambda x: torch.nn.functional.cosine_similarity(x.flatten(1)[:, None], x.flatten(1)[None], dim=-1)
    torch.testing.assert_close(info.head_cosines, cosines(at_heads))
    torch.testing.assert_close(info.cosines, cosines(g))
    torch.testing.assert_close(info.head_norms, at_heads.flatten(1).norm(dim=1))
    torch.testing.assert_close(info.grad_norms, info.head_norms)
    logged = gn.log_dict(info, loss_fn.heads)
    assert logged["cosines/t0-t2"] == info.cosines[0, 2]


def test_rotations_bring_the_gradients_together():
    params, loss_fn, batch = problem()
    method = gn.rotograd(D, optimizer=gn.adam(0.02))
    state, seen = method.init(T, rotations=start(), dtype=F64), []
    for _ in range(200):
        _, state, info = method.grad(state, params, loss_fn, batch)
        seen.append(info)
    off = ~torch.eye(T, dtype=torch.bool)
    assert seen[-1].cosines[off].min() > 0.3
    assert seen[0].cosines[off].mean() < 0.3
    assert seen[-1].rotation_losses.sum() < seen[0].rotation_losses.sum()


@pytest.mark.parametrize("normalize", [True, False])
def test_burn_in_takes_initial_losses_and_norms_anew(normalize):
    params, loss_fn, batch = problem()
    method = gn.rotograd(D, burn_in=2, normalize=normalize)
    state = method.init(T, dtype=F64)
    for step in range(4):
        now = {**params, "trunk": params["trunk"] * (1 - 0.1 * step)}
        _, state, info = method.grad(state, now, loss_fn, batch)
        if step in (0, 2):
            kept = info
        torch.testing.assert_close(state.initial_losses, kept.losses)
        torch.testing.assert_close(state.initial_norms, kept.grad_norms)


def test_normalised_losses_are_what_is_differentiated():
    params, loss_fn, batch = problem()
    normalized, plain = gn.rotograd(D, normalize=True, burn_in=None), gn.rotograd(D, burn_in=None)
    state = plain.init(T, rotations=start(), dtype=F64, initial_losses=[2.0, 4.0, 8.0])

    def half(k):
        return lambda p, z, b: loss_fn.functions[k](p, z, b) / 2.0 ** (k + 1)

    scaled = gn.multi_task_loss(loss_fn.backbone, {f"t{k}": half(k) for k in range(T)})
    one, _, _ = normalized.grad(state, params, loss_fn, batch)
    two, _, _ = plain.grad(state, params, scaled, batch)
    for a, b in zip(flat(one), flat(two), strict=True):
        torch.testing.assert_close(a, b)


def test_a_loss_on_the_backbone_alone():
    params, loss_fn, batch = problem()
    penalty = lambda p, z, batch: z.square().mean() + 0.3 * p["trunk"].square().sum()
    state = gn.rotograd(D).init(T, rotations=start(), dtype=F64)
    plain, _, _ = gn.rotograd(D).grad(state, params, loss_fn, batch)
    grads, new, info = gn.rotograd(D, backbone_loss=penalty).grad(state, params, loss_fn, batch)
    trunk = params["trunk"].clone().requires_grad_()
    value = penalty({"trunk": trunk}, loss_fn.backbone({"trunk": trunk}, batch), batch)
    (own,) = torch.autograd.grad(value, trunk)
    torch.testing.assert_close(grads["trunk"], plain["trunk"] + own)
    torch.testing.assert_close(grads["heads"], plain["heads"])
    torch.testing.assert_close(info.total_loss, info.losses.sum() + value.detach())
    grads, new, _ = gn.rotograd(D, backbone_loss=penalty, normalize=True).grad(state, params, loss_fn, batch)
    normalised, _, _ = gn.rotograd(D, normalize=True).grad(state, params, loss_fn, batch)
    torch.testing.assert_close(grads["trunk"], normalised["trunk"] + own / value.detach())
    torch.testing.assert_close(new.initial_backbone_loss, value.detach())


def test_a_schedule_of_the_rotation_rate():
    params, loss_fn, batch = problem()
    method = gn.rotograd(D, optimizer=gn.sgd(lambda step: 0.1 * 0.5**step), burn_in=None)
    state = method.init(T, dtype=F64)
    for step in range(3):
        alone = gn.rotograd(D, optimizer=gn.sgd(0.1 * 0.5**step), burn_in=None)
        expected = alone.update(state, params, loss_fn, batch)
        state = method.update(state, params, loss_fn, batch)
        torch.testing.assert_close(state.rotations, expected.rotations)


# --- what is rotated -----------------------------------------------------------------------------------------------


def conv_problem():
    g = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    params = {"trunk": rand(4, 2, 3, 3), "a": rand(3, 4, 1, 1), "b": rand(2, 4 * 3 * 5)}
    batch = rand(6, 2, 5, 7)
    loss_fn = gn.multi_task_loss(
        lambda p, x: nn.functional.conv2d(x, p["trunk"]),
        {
            "a": lambda p, z, x: torch.tanh(nn.functional.conv2d(z, p["a"])).square().mean(),
            "b": lambda p, z, x: torch.tanh(z.flatten(1) @ p["b"].mT).mean(),
        },
    )
    return params, loss_fn, batch


def test_folding_into_linear_and_convolutional_heads():
    params, loss_fn, batch = conv_problem()
    method = gn.rotograd(4, trailing_shape=(3, 5))
    state = method.init(2, rotations=start(tasks=2, d=4), dtype=F64)
    task_fn = gn.rotograd_task_fn(loss_fn, trailing_shape=(3, 5))
    folded = gn.fold_rotations(params, state, {"a": "a", "b": "b"}, trailing_shape=(3, 5))
    losses = loss_fn(folded, batch)
    _, _, info = method.grad(state, params, loss_fn, batch)
    for k, name in enumerate(("a", "b")):
        torch.testing.assert_close(task_fn(params, state, name)(batch), losses[name])
        torch.testing.assert_close(task_fn(params, state, k)(batch), info.losses[k])
    assert (loss_fn(params, batch)["a"] - losses["a"]).abs() > 1e-3


def test_the_first_features_alone():
    params, loss_fn, batch = problem()
    small = start(d=4)
    whole = torch.eye(D, dtype=F64).repeat(T, 1, 1)
    whole[:, :4, :4] = small
    optimizer = gn.sgd(0.05)
    one = gn.rotograd(4, optimizer=optimizer)
    two = gn.rotograd(D, optimizer=optimizer)
    grads_one, new_one, info_one = one.grad(one.init(T, rotations=small, dtype=F64), params, loss_fn, batch)
    grads_two, _, info_two = two.grad(two.init(T, rotations=whole, dtype=F64), params, loss_fn, batch)
    torch.testing.assert_close(grads_one, grads_two)
    torch.testing.assert_close(info_one.cosines, info_two.cosines)
    assert new_one.rotations.shape == (T, 4, 4)
    assert (new_one.rotations - small).abs().max() > 1e-4
    folded = gn.fold_rotations({k: v.mT for k, v in params["heads"].items()}, new_one, [f"t{k}" for k in range(T)])
    z = loss_fn.backbone(params, batch)
    back = {"trunk": params["trunk"], "heads": {k: v.mT for k, v in folded.items()}}
    task = gn.rotograd_task_fn(loss_fn)(params, new_one, "t1")
    torch.testing.assert_close(task(batch), loss_fn.heads["t1"](back, z, batch))


def test_several_axes_as_one_and_sequences():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 2, 3, generator=g, dtype=F64)  # (batch, sequence, 2, 3)
    w = torch.randn(2, 3, generator=g, dtype=F64)
    heads = [lambda w, z, x: torch.tanh(z).mean(), lambda w, z, x: (z - 1).square().mean()]
    cubes = gn.multi_task_loss(lambda w, x: x * w, heads)
    flats = gn.multi_task_loss(lambda w, x: (x * w).flatten(2), heads)
    rotations = start(tasks=2, d=6)
    one = gn.rotograd((2, 3), form="0.1.6")
    two = gn.rotograd(6, form="0.1.6")
    a = one.grad(one.init(2, rotations=rotations, dtype=F64), w, cubes, x)
    b = two.grad(two.init(2, rotations=rotations, dtype=F64), w, flats, x)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1].rotations, b[1].rotations)


def test_one_tensor_of_a_pytree():
    params, _, batch = problem()

    def backbone(p, batch):
        z = batch["x"] @ p["trunk"]
        return {"features": torch.tanh(z), "skip": z.mean(1)}

    def head(k):
        return lambda p, z, batch: ((z["features"] @ p["heads"][f"t{k}"]) * z["skip"][:, None]).square().mean()

    loss_fn = gn.multi_task_loss(backbone, [head(k) for k in range(T)])
    rotations = start()
    method = gn.rotograd(D, rotate="features")
    state = method.init(T, rotations=rotations, dtype=F64)
    grads, _, info = method.grad(state, params, loss_fn, batch)
    z = {name: leaf.detach() for name, leaf in backbone(params, batch).items()}
    rows = []
    for k in range(T):
        copies = {name: leaf.clone().requires_grad_() for name, leaf in z.items()}
        turned = {"features": copies["features"] @ rotations[k].mT, "skip": copies["skip"]}
        rows.append(torch.autograd.grad(head(k)(params, turned, batch), [copies["features"], copies["skip"]]))
    norms = torch.stack([torch.cat([a.flatten(), b.flatten()]).norm() for a, b in rows])
    torch.testing.assert_close(info.grad_norms, norms)
    trunk = params["trunk"].clone().requires_grad_()
    out = backbone({"trunk": trunk}, batch)
    sums = [sum(w * row[i] for w, row in zip(info.weights, rows, strict=True)) for i in (0, 1)]
    (expected,) = torch.autograd.grad([out["features"], out["skip"]], trunk, sums)
    torch.testing.assert_close(grads["trunk"], expected)
    with pytest.raises(ValueError, match=r"z has 2 tensors.*rotate="):
        gn.rotograd(D).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="no tensor of z"):
        gn.rotograd(D, rotate="nope").grad(state, params, loss_fn, batch)


def test_stacked_heads_equal_separate_ones():
    params, _, batch = problem()
    stacked = {"trunk": params["trunk"], "heads": {"w": torch.stack([params["heads"][f"t{k}"] for k in range(T)])}}
    backbone = lambda p, batch: torch.tanh(batch["x"] @ p["trunk"])
    head = lambda w, z, y: (z @ w - y).square().mean()

    def single(k):
        return lambda p, z, batch: head(p["heads"][f"t{k}"], z, batch["y"][k])

    heads = gn.stacked_heads(lambda p, z, batch: head(p["w"], z, batch["y"]), "heads", batch_dims={"x": None, "y": 0})
    one, two = gn.multi_task_loss(backbone, heads), gn.multi_task_loss(backbone, [single(k) for k in range(T)])
    method = gn.rotograd(D)
    state = method.init(T, rotations=start(), dtype=F64)
    a, b = method.grad(state, stacked, one, batch), method.grad(state, params, two, batch)
    torch.testing.assert_close(a[0]["trunk"], b[0]["trunk"])
    torch.testing.assert_close(a[0]["heads"]["w"], torch.stack([b[0]["heads"][f"t{k}"] for k in range(T)]))
    torch.testing.assert_close(a[1].rotations, b[1].rotations)
    folded = gn.fold_rotations({"w": stacked["heads"]["w"].mT}, state, "w")["w"].mT
    task = gn.rotograd_task_fn(one)(stacked, state, 1)
    z = backbone(params, batch)
    torch.testing.assert_close(task(batch), head(folded[1], z, batch["y"][1]))


# --- the maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exp", "cayley"])
@pytest.mark.parametrize("d", [2, 3, 17, 40])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_maps_give_rotations(kind, d, size):
    a = skew(torch.randn(4, d, d, dtype=F64, generator=torch.Generator().manual_seed(d))) * size / d
    r = MAPS[kind](a)
    eye = torch.eye(d, dtype=F64)
    torch.testing.assert_close(r.mT @ r, eye.expand(4, d, d), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(4, dtype=F64))
    base = gn.random_rotations(4, d, dtype=F64)
    torch.testing.assert_close(turn(base, a, kind), base @ r, atol=1e-10, rtol=0)
    if kind == "cayley":
        torch.testing.assert_close(_inverse(eye - a / 2), torch.linalg.inv(eye - a / 2), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("kind", ["exp", "cayley"])
@pytest.mark.parametrize("norm", [0.0, 1e-3, 3.0, 30.0])
def test_derivative_of_the_maps(kind, norm):
    g = torch.Generator().manual_seed(0)
    a = skew(torch.randn(3, 7, 7, dtype=F64, generator=g))
    a = a * norm / torch.linalg.matrix_norm(a, 2, keepdim=True)
    gradient = torch.randn(3, 7, 7, dtype=F64, generator=g)
    entries = a.tril(-1).requires_grad_()
    mapped = MAPS[kind](entries - entries.mT)
    (expected,) = torch.autograd.grad(mapped, entries, (mapped @ gradient).detach())
    torch.testing.assert_close(tangent_gradient(a, gradient, kind).tril(-1), expected.tril(-1), rtol=1e-8, atol=1e-8)


def test_polish_restores_one_matrix_at_a_time():
    r = gn.random_rotations(3, 5, dtype=F64) * 1.01
    for step in range(3):
        r = polish(r, torch.tensor(step))
    error = (r.mT @ r - torch.eye(5, dtype=F64)).abs().amax((1, 2))
    assert error.max() < 1e-3


@pytest.mark.parametrize("kind", ["exp", "cayley"])
def test_the_gradient_at_a_tangent_is_skew_to_the_bit(kind):
    a = skew(torch.randn(3, 17, 17))
    by_tangent = tangent_gradient(a, torch.randn(3, 17, 17), kind)
    assert torch.equal(by_tangent, -by_tangent.mT)
    assert by_tangent.norm() > 1


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("hyper", [{"map": "exp"}, {"map": "cayley"}, {"map": "exp", "moving": True}])
def test_rotations_stay_orthogonal_in_float32(hyper, size):
    """Adam makes a step of full size out of rounding noise, which must have no part that leaves SO(m)."""
    params, loss_fn, batch = problem(torch.float32)
    large = gn.multi_task_loss(
        loss_fn.backbone, [lambda p, z, b, head=head: size * head(p, z, b) for head in loss_fn.functions]
    )
    method = gn.rotograd(D, optimizer=gn.adam(0.02), **{"moving": False, **hyper})
    state = first = method.init(T, rotations=start(dtype=torch.float32))
    for _ in range(300):
        _, state, _ = method.grad(state, params, large, batch)
    r = state.rotations.double()
    assert (r.mT @ r - torch.eye(D, dtype=F64)).abs().max() < 1e-5
    assert (state.rotations - first.rotations).abs().max() > 0.1
    if state.tangents != ():
        assert torch.equal(state.tangents, -state.tangents.mT)


@pytest.mark.parametrize("kind", ["exp", "cayley"])
@pytest.mark.parametrize("rate", [5e-4, 5e-2])
def test_orthogonal_after_ten_thousand_updates_in_float32(kind, rate):
    torch.manual_seed(0)
    optimizer = gn.adam(rate)
    r = gn.random_rotations(3, 16)
    moments = optimizer.init(r)

    def step(r, moments, count, grad):
        move, moments = optimizer.update(skew(grad), moments, r)
        return polish(turn(r, move, kind), count), moments

    for count in range(10_000):
        r, moments = step(r, moments, torch.tensor(count), torch.randn(3, 16, 16))
    error = (r.double().mT @ r.double() - torch.eye(16, dtype=F64)).abs().max()
    assert error < 1e-5


# --- micro-batches ---------------------------------------------------------------------------------------------------


def by_example(loss_fn, batch):
    """The same loss on a batch whose targets have the example axis first, as micro_batches cuts it."""
    swap = lambda batch: {"x": batch["x"], "y": batch["y"].transpose(0, 1)}

    def head(k):
        return lambda p, z, batch: loss_fn.functions[k](p, z, swap(batch))

    heads = {f"t{k}": head(k) for k in range(T)}
    return gn.multi_task_loss(lambda p, batch: loss_fn.backbone(p, swap(batch)), heads), swap(batch)


@pytest.mark.parametrize("micro_batches", [3, 4])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"scale": "none", "normalize": True},
        {"scale": "gradnorm", "form": "0.1.6", "alpha": 0.5, "normalize": True},
        {"scale": "gradnorm", "form": "0.1.2", "alpha": 0.5, "cooperative": 1},
        {"moving": False, "map": "exp", "cooperative": 0},
        {"normalize": True, "backbone_loss": lambda p, z, b: z.square().mean()},
        {"every": 2},
    ],
)
def test_micro_batches_equal_the_whole_batch(hyper, micro_batches):
    params, loss_fn, batch = problem()
    loss_fn, batch = by_example(loss_fn, batch)
    method = gn.rotograd(D, **hyper)
    whole = parts = method.init(T, rotations=start(), dtype=F64)
    for step in range(3):
        now = {**params, "trunk": params["trunk"] * (1 - 0.2 * step)}
        grads, whole, info = method.grad(whole, now, loss_fn, batch)
        mine, parts, mine_info = method.grad(parts, now, loss_fn, batch, micro_batches=micro_batches)
        for a, b in zip(flat((grads, whole, info)), flat((mine, parts, mine_info)), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"normalize": True, "backbone_loss": lambda p, z, b: z.square().mean()},
        {"form": "0.1.2", "scale": "none", "normalize": True, "cooperative": 0},
    ],
)
def test_stats_of_unequal_parts_merge_to_those_of_the_whole(hyper):
    """As ranks do it: the stats of every part, and after them the gradients made with the factors of the whole."""
    params, loss_fn, batch = problem()
    loss_fn, batch = by_example(loss_fn, batch)
    method = gn.rotograd(D, **hyper)
    state = method.init(T, rotations=start(), dtype=F64)
    grads, expected, _ = method.grad(state, params, loss_fn, batch)
    x, y = (batch[name].split([3, 1, 4]) for name in ("x", "y"))
    parts = [{"x": x, "y": y} for x, y in zip(x, y, strict=True)]

    def rounds_of(part, answers):
        """What `reduce` sees in each round, being answered with `answers`."""
        rounds = []
        reduce = lambda stats: rounds.append(stats) or (answers[len(rounds) - 1] or stats)
        method.grad(state, params, loss_fn, part, reduce=reduce)
        return rounds

    measured = [rounds_of(part, [None, None])[0] for part in parts]
    assert [float(stats.num_examples) for stats in measured] == [3.0, 1.0, 4.0]
    merged = gn.merge(*measured)
    whole = gn.merge(rounds_of(batch, [None, None])[0])
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gn.merge(gn.merge(*measured[:2]), measured[2]), whole, rtol=1e-12, atol=1e-14)
    new, _ = method.balance(state, merged)
    torch.testing.assert_close(new, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    last = gn.merge(*(rounds_of(part, [merged, None])[1] for part in parts))
    torch.testing.assert_close(last.grads, grads, rtol=1e-10, atol=1e-12)
    wrong = gn.merge(*(rounds_of(part, [None, None])[1] for part in parts))  # every part with factors of its own
    assert "cooperative" in hyper or (wrong.grads["trunk"] - grads["trunk"]).abs().max() > 1e-4


# --- a citizen of the package ----------------------------------------------------------------------------------------

VARIANTS = {
    "rotograd": {},
    "none": {"scale": "none"},
    "gradnorm": {"scale": "gradnorm", "alpha": 1.0, "normalize": True},
    "exp": {"map": "exp"},
    "fixed base": {"map": "exp", "moving": False, "form": "0.1.6"},
    "fixed base, cayley": {"moving": False},
    "0.1.2": {"form": "0.1.2", "scale": "gradnorm", "alpha": 0.5, "cooperative": 3},
    "first features": {"rotation_shape": 4},
}


def build(name, **more):
    hyper = {"rotation_shape": D, **VARIANTS[name], **more}
    return gn.rotograd(hyper.pop("rotation_shape"), **hyper)


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_are_left_as_they_were(name):
    params, loss_fn, batch = problem()
    params = gn._core.tree.tree_map(lambda leaf: leaf.requires_grad_(), params)
    method = build(name)
    state = method.init(T, dtype=F64)
    _, state, _ = method.grad(state, params, loss_fn, batch)
    everything = (state, params, batch)
    before = [leaf.detach().clone() for leaf in flat(everything)]
    out = method.grad(state, params, loss_fn, batch)
    method.update(state, params, loss_fn, batch)
    for a, b in zip(flat(everything), before, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=0, equal_nan=True)
    assert not any(leaf.requires_grad for leaf in flat(out))
    assert all(leaf.grad is None for leaf in flat(params))


@pytest.mark.parametrize("name", VARIANTS)
def test_update_is_the_state_of_grad(name):
    params, loss_fn, batch = problem()
    method = build(name)
    one = two = method.init(T, dtype=F64)
    for _ in range(2):
        _, one, _ = method.grad(one, params, loss_fn, batch)
        two = method.update(two, params, loss_fn, batch)
    for a, b in zip(flat(one), flat(two), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", ["rotograd", "0.1.2", "fixed base", "fixed base, cayley"])
def test_one_graph_over_ten_steps_and_parity_with_eager(name):
    torch._dynamo.reset()
    params, loss_fn, batch = problem()
    method = build(name, burn_in=4)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda s, p, b: method.grad(s, p, loss_fn, b), fullgraph=True, backend=count)
    one = two = method.init(T, rotations=start(), dtype=F64)
    for _ in range(10):
        grads, one, info = compiled(one, params, batch)
        expected, two, other = method.grad(two, params, loss_fn, batch)
    assert len(graphs) == 1
    for a, b in zip(flat((grads, one, info)), flat((expected, two, other)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_inductor():
    torch._dynamo.reset()
    params, loss_fn, batch = problem(d=24)
    method = gn.rotograd(24)
    compiled = torch.compile(lambda s, p, b: method.grad(s, p, loss_fn, b), fullgraph=True)
    one = two = method.init(T, dtype=F64)
    for _ in range(3):
        grads, one, _ = compiled(one, params, batch)
        expected, two, _ = method.grad(two, params, loss_fn, batch)
    for a, b in zip(flat((grads, one)), flat((expected, two)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_vmap_over_seeds(name):
    params, loss_fn, batch = problem()
    method = build(name)
    size = VARIANTS[name].get("rotation_shape", D)
    states = [method.init(T, rotations=start(seed, d=size), dtype=F64) for seed in range(3)]
    stacked = gn._core.tree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    step = lambda s: method.grad(s, params, loss_fn, batch)
    _, stacked, _ = torch.func.vmap(step)(stacked)
    together = torch.func.vmap(step)(stacked)
    for i, state in enumerate(states):
        _, state, _ = step(state)
        alone = step(state)
        for a, b in zip(flat(together), flat(alone), strict=True):
            torch.testing.assert_close(a[i], b, equal_nan=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_permuting_tasks_permutes_everything(name):
    params, loss_fn, batch = problem()
    order = [2, 0, 1]
    method = build(name)
    rotations = start(d=VARIANTS[name].get("rotation_shape", D))
    mixed = gn.multi_task_loss(loss_fn.backbone, [loss_fn.functions[k] for k in order])
    plain = gn.multi_task_loss(loss_fn.backbone, loss_fn.functions)
    one = method.init(T, rotations=rotations, dtype=F64)
    two = method.init(T, rotations=rotations[order], dtype=F64)
    for _ in range(3):
        grads, one, info = method.grad(one, params, plain, batch)
        others, two, info_two = method.grad(two, params, mixed, batch)
        torch.testing.assert_close(grads, others)
    torch.testing.assert_close(one.rotations[order], two.rotations)
    torch.testing.assert_close(info.cosines[order][:, order], info_two.cosines)
    torch.testing.assert_close(info.weights[order], info_two.weights)


def test_absent_tasks_keep_their_rotations():
    params, loss_fn, batch = problem()
    method = gn.rotograd(D, scale="gradnorm", alpha=1.0)
    state = method.init(T, rotations=start(), dtype=F64)
    _, state, _ = method.grad(state, params, loss_fn, batch)
    mask = torch.tensor([True, False, True])
    grads, new, info = method.grad(state, params, loss_fn, batch, mask=mask)
    assert torch.equal(new.rotations[1], state.rotations[1])
    assert torch.equal(new.weights[1], state.weights[1])
    assert torch.equal(new.moments.mean[1], state.moments.mean[1])
    assert not torch.equal(new.rotations[0], state.rotations[0])
    assert not grads["heads"]["t1"].any()
    two = gn.multi_task_loss(loss_fn.backbone, [loss_fn.functions[k] for k in (0, 2)])
    pair = gn.rotograd(D)
    _, _, alone = pair.grad(pair.init(2, rotations=state.rotations[[0, 2]], dtype=F64), params, two, batch)
    torch.testing.assert_close(info.rotation_losses[[0, 2]], alone.rotation_losses)


@pytest.mark.parametrize("how", ["whole", "micro-batches"])
@pytest.mark.parametrize("name", [*VARIANTS, "cooperative"])
def test_tasks_that_come_one_after_the_other(name, how):
    """A task that has not been seen has no L(0) yet: nothing of that may reach the others, or its head."""
    params, loss_fn, batch = problem()
    loss_fn, batch = by_example(loss_fn, batch)
    method = gn.rotograd(D, scale="none", cooperative=0, normalize=True) if name == "cooperative" else build(
        name, normalize=True)  # fmt: skip
    state = method.init(T, dtype=F64)
    seen = torch.zeros(T, dtype=torch.bool)
    keywords = {"micro_batches": 3} if how == "micro-batches" else {}
    for step in range(12):
        mask = torch.arange(T) != step % 2  # the first and the second in turn, the third always
        seen |= mask
        grads, state, info = method.grad(state, params, loss_fn, batch, mask=mask, **keywords)
        assert bool(info.finite)
        assert int(state.step) == step + 1
        assert torch.equal(state.initial_losses.isfinite(), seen)
        assert all(leaf.isfinite().all() for leaf in flat((grads, state.rotations, state.moments, info)))
        for k in range(T):
            assert bool(grads["heads"][f"t{k}"].any()) == bool(mask[k])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kth_step(name):
    """Rotations, weights and L(0) move in their turn; the trunk's factors are those of every step."""
    params, loss_fn, batch = problem()
    method, always = build(name, every=3, burn_in=4), build(name, burn_in=None)
    state = method.init(T, rotations=start(d=VARIANTS[name].get("rotation_shape", D)), dtype=F64)
    for step in range(9):
        now = {**params, "trunk": params["trunk"] * (1 - 0.05 * step)}
        old = state
        grads, state, info = method.grad(old, now, loss_fn, batch)
        expected, moved, other = always.grad(old, now, loss_fn, batch)
        assert int(state.step) == step + 1
        if step == 6:  # the burn-in of step 4, in the next turn
            torch.testing.assert_close(state.initial_losses, info.losses)
            assert not torch.equal(state.initial_losses, old.initial_losses)
            continue
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(info, other)
        target = moved if step % 3 == 0 else old._replace(step=old.step + 1)
        torch.testing.assert_close(state, target, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(method.update(old, now, loss_fn, batch).rotations, state.rotations)
        assert torch.equal(state.rotations, old.rotations) == (step % 3 != 0)


@pytest.mark.parametrize("name", ["rotograd", "0.1.2"])
def test_every_kth_step_compiled_is_one_graph(name):
    torch._dynamo.reset()
    params, loss_fn, batch = problem()
    method, graphs = build(name, every=2, burn_in=3), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda s, p, b: method.grad(s, p, loss_fn, b), fullgraph=True, backend=count)
    one = two = method.init(T, rotations=start(), dtype=F64)
    for step in range(8):
        now = {**params, "trunk": params["trunk"] * (1 - 0.05 * step)}
        found = compiled(one, now, batch)
        expected = method.grad(two, now, loss_fn, batch)
        for a, b in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        one, two = found[1], expected[1]
    assert len(graphs) == 1


def test_a_step_between_turns_measures_no_moments():
    params, loss_fn, batch = problem()
    method, stats = gn.rotograd(D, every=2), []
    state = method.init(T, dtype=F64)
    reduce = lambda part: stats.append(part) or part
    for _ in range(2):
        state = method.update(state, params, loss_fn, batch, reduce=reduce)
    assert [part.cross == () for part in stats] == [False, True]
    with pytest.raises(ValueError, match="in which nothing moves"):
        method.balance(state, stats[1])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_frozen_state_stays(name):
    params, loss_fn, batch = problem()
    method = build(name)
    state = method.init(T, dtype=F64)
    for update in (False, torch.tensor(False)):
        grads, same, _ = method.grad(state, params, loss_fn, batch, update=update)
        assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(flat(same), flat(state), strict=True))
    moving, _, _ = method.grad(state, params, loss_fn, batch)
    torch.testing.assert_close(grads, moving)


def test_float32_and_bfloat16_parameters():
    for dtype in (torch.float32, torch.bfloat16):
        params, loss_fn, batch = problem(dtype)
        method = gn.rotograd(D)
        grads, state, info = method.grad(method.init(T), params, loss_fn, batch)
        assert all(grad.dtype == dtype for grad in flat(grads))
        assert state.rotations.dtype == info.cosines.dtype == torch.float32
        assert bool(info.finite)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_scale(name):
    params, loss_fn, batch = problem()
    penalty = lambda p, z, batch: z.square().mean()
    method = build(name, backbone_loss=penalty)
    state = method.init(T, dtype=F64)
    grads, new, info = method.grad(state, params, loss_fn, batch)
    for scale in (2.0**10, torch.tensor(2.0**-3)):
        larger, same, other = method.grad(state, params, loss_fn, batch, loss_scale=scale)
        torch.testing.assert_close(larger, gn._core.tree.tree_map(lambda grad, s=scale: grad * s, grads))
        torch.testing.assert_close((same, other), (new, info), equal_nan=True)
        torch.testing.assert_close(method.update(state, params, loss_fn, batch, loss_scale=scale), new, equal_nan=True)
    _, same, info = method.grad(state, params, loss_fn, batch, loss_scale=1e308)
    assert not bool(info.finite)
    torch.testing.assert_close(same, state, rtol=0, atol=0, equal_nan=True)


def test_loss_scale_saves_small_gradients_in_float16():
    params, loss_fn, batch = problem(torch.float16)
    tiny = gn.multi_task_loss(
        loss_fn.backbone, [lambda p, z, b, head=head: 1e-6 * head(p, z, b) for head in loss_fn.functions[:2]]
    )
    method, scale = gn.rotograd(D), 2.0**14
    state = method.init(2)
    _, _, lost = method.grad(state, params, tiny, batch)
    grads, _, info = method.grad(state, params, tiny, batch, loss_scale=scale)
    in_full = lambda tree: gn._core.tree.tree_map(lambda leaf: leaf.to(F64), tree)
    expected, _, exact = method.grad(state, in_full(params), tiny, in_full(batch))
    torch.testing.assert_close(info.grad_norms, exact.grad_norms, rtol=1e-2, atol=0)
    assert (grads["trunk"].double() / scale - expected["trunk"]).norm() < 1e-2 * expected["trunk"].norm()
    assert (lost.grad_norms / exact.grad_norms - 1).abs().max() > 0.2


@pytest.mark.parametrize("name", VARIANTS)
def test_autocast_is_for_the_loss_alone(name):
    """What lies between heads and trunk, and the step on SO(m), are not the user's to round."""
    params, loss_fn, batch = problem(torch.float32)

    def in_full(fn):
        def run(*args):
            with torch.autocast("cpu", enabled=False):
                return fn(*args)

        return run

    exact = gn.multi_task_loss(in_full(loss_fn.backbone), [in_full(head) for head in loss_fn.functions])
    method = build(name)
    state = method.init(T)
    for keywords in ({}, {"micro_batches": 1}):
        expected = method.grad(state, params, exact, batch, **keywords)
        with torch.autocast("cpu", torch.bfloat16):
            found = method.grad(state, params, exact, batch, **keywords)
        for a, b in zip(flat(found), flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_rotations_stay_orthogonal_under_autocast():
    params, loss_fn, batch = problem(torch.float32)
    method = gn.rotograd(D, optimizer=gn.adam(0.02))
    state = method.init(T, rotations=start(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            _, state, info = method.grad(state, params, loss_fn, batch)
    r = state.rotations.double()
    assert (r.mT @ r - torch.eye(D, dtype=F64)).abs().max() < 1e-5
    torch.testing.assert_close(info.grad_norms, info.head_norms, rtol=1e-2, atol=0)


def test_checkpoint_and_train():
    params, loss_fn, batch = problem(torch.float32)
    method = gn.rotograd(D)
    params, state, history = gn.train(params, loss_fn, [batch] * 5, balancer=method, progress=False)
    assert history.cosines.shape == (5, T, T)
    loaded = gn.load_state(method.init(T), gn.state_dict(state))
    assert all(torch.equal(a, b) or a.isnan().all() for a, b in zip(flat(loaded), flat(state), strict=True))


def test_aux_of_the_loss():
    params, loss_fn, batch = problem()
    keep = lambda f: lambda p, z, b: (f(p, z, b), z)
    with_aux = gn.multi_task_loss(
        lambda p, batch: (loss_fn.backbone(p, batch), "kept"),
        [keep(f) for f in loss_fn.functions],
        has_aux=True,
    )
    method = gn.rotograd(D)
    state = method.init(T, rotations=start(), dtype=F64)
    _, _, _, (kept, zs) = method.grad(state, params, with_aux, batch, has_aux=True)
    assert kept == "kept"
    torch.testing.assert_close(zs[1], loss_fn.backbone(params, batch) @ state.rotations[1].mT)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"rotation_shape": 0}, "positive integers"),
        ({"rotation_shape": 1}, "at least|two features"),
        ({"scale": "both"}, r"scale='both' must be one of none, rotograd, gradnorm"),
        ({"form": "0.2"}, "must be one of paper"),
        ({"map": "qr"}, "must be one of exp, cayley"),
        ({"form": "0.1.2"}, "no scale part"),
        ({"alpha": 1.0}, "leave it out"),
        ({"alpha": -1.0, "scale": "gradnorm"}, "at least 0"),
        ({"burn_in": -1}, "cannot be negative"),
        ({"cooperative": -1}, "cannot be negative"),
    ],
)
def test_bad_hyperparameters(hyper, message):
    with pytest.raises(ValueError, match=message):
        gn.rotograd(hyper.pop("rotation_shape", D), **hyper)


def test_bad_states_and_losses():
    params, loss_fn, batch = problem()
    method = gn.rotograd(D)
    state = method.init(T, dtype=F64)
    with pytest.raises(ValueError, match="at least 2"):
        method.init(1)
    with pytest.raises(ValueError, match="need"):
        method.init(T, rotations=torch.eye(D))
    with pytest.raises(ValueError, match="orthogonal"):
        method.init(T, rotations=torch.ones(T, D, D))
    with pytest.raises(ValueError, match="initial_losses has 2"):
        method.init(T, initial_losses=[1.0, 2.0])
    with pytest.raises(ValueError, match="multi_task_loss"):
        method.grad(state, params, lambda p, b: torch.ones(3), batch)
    with pytest.raises(ValueError, match="without a backbone"):
        method.grad(state, params, gn.multi_task_loss(None, [lambda p, b: 0.0] * 3), batch)
    with pytest.raises(ValueError, match="3 heads, but the state was made for 2"):
        method.grad(method.init(2, dtype=F64), params, loss_fn, batch)
    seven = gn.rotograd(7)
    with pytest.raises(ValueError, match=r"rotation_shape=\(7,\).*do not fit z of shape \(8, 6\)"):
        seven.grad(seven.init(T, dtype=F64), params, loss_fn, batch)
    with pytest.raises(ValueError, match="do not fit z"):
        gn.rotograd(D, trailing_shape=3).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="init of the same"):
        gn.rotograd(4).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="not a RotoGradState"):
        method.grad(gn.init_state(3), params, loss_fn, batch)
    with pytest.raises(ValueError, match="another moving="):
        gn.rotograd(D, moving=False).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="another moving="):
        gn.rotograd(D, optimizer=gn.sgd(0.1)).grad(state, params, loss_fn, batch)
    with pytest.raises(ValueError, match="none of the tasks"):
        gn.rotograd_task_fn(loss_fn)(params, state, "depth")
    with pytest.raises(ValueError, match="2 paths, but there are 3"):
        gn.fold_rotations(params, state, ["trunk", "trunk"])
    with pytest.raises(ValueError, match="features of z"):
        gn.fold_rotations(params, state, ["heads.t0", "heads.t1", "heads.t2"])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_leave_the_state(name, bad):
    params, loss_fn, batch = problem()
    method = build(name)
    state = method.init(T, dtype=F64)
    _, state, _ = method.grad(state, params, loss_fn, batch)
    broken = {**params, "heads": {**params["heads"], "t1": params["heads"]["t1"] * bad}}
    _, new, info = method.grad(state, broken, loss_fn, batch)
    assert not bool(info.finite)
    for a, b in zip(flat(new), flat(state), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(FloatingPointError, match=r"'t1'.*skip this step"):
        gn.check_finite(info, loss_fn.heads)


def test_a_task_without_gradient_is_harmless():
    params, loss_fn, batch = problem()
    dead = gn.multi_task_loss(loss_fn.backbone, [*loss_fn.functions[:2], lambda p, z, b: 0.0 * z.sum() + 1.0])
    for name in VARIANTS:
        method = build(name)
        state = method.init(T, dtype=F64)
        for _ in range(3):
            grads, state, info = method.grad(state, params, dead, batch)
        assert bool(info.finite)
        assert all(leaf.isfinite().all() for leaf in flat((grads, state.rotations, info)))
