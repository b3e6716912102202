"""RotoGrad against its equations: the paper's form, and what of z is rotated."""

from __future__ import annotations

import pytest
import torch
from rotograd_cases import F64, D, T, by_hand, flat, problem, start
from torch import nn

import gradnorm_func as gn
from gradnorm_func._rotograd.rotation import MAPS


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
            taken = info
        torch.testing.assert_close(state.initial_losses, taken.losses)
        torch.testing.assert_close(state.initial_norms, taken.grad_norms)


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
    (grad,) = torch.autograd.grad(value, trunk)
    torch.testing.assert_close(grads["trunk"], plain["trunk"] + grad)
    torch.testing.assert_close(grads["heads"], plain["heads"])
    torch.testing.assert_close(info.total_loss, info.losses.sum() + value.detach())
    grads, new, _ = gn.rotograd(D, backbone_loss=penalty, normalize=True).grad(state, params, loss_fn, batch)
    normalised, _, _ = gn.rotograd(D, normalize=True).grad(state, params, loss_fn, batch)
    torch.testing.assert_close(grads["trunk"], normalised["trunk"] + grad / value.detach())
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
