"""Every engine × W × structure of losses against a loop of `torch.autograd.grad`, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import optree
import pytest
import torch
from models import MAKERS, STRUCTURES, WEIGHTS, Case, make
from oracle import assert_free, assert_near, assert_same_sum, assert_untouched, gradients, norm, snapshot
from torch import Tensor
from torch.nn import functional as F

import gradnorm_func as gn

LASTS = ("within", "function", "linear")
MODES = {"vectorized": {}, "loop": {"vectorize": False}, "chunk 1": {"chunk_size": 1}, "chunk 2": {"chunk_size": 2}}
TABLE = [(name, place) for name in MAKERS for place in make(name).where]
SEAMS = [(name, last, place) for name, place in TABLE for last in LASTS if make(name).last or last == "within"]


def weights_of(order: str) -> Tensor:
    return torch.tensor([WEIGHTS[name] for name in order], dtype=torch.float64)


def order_of(case: Case) -> str:
    return "".join(sorted(case.tasks))


def assert_rows(case: Case, order: str, place: str, grads: Any, at_z: bool) -> None:
    """Task gradients, a dict by path or the pytree z, against the reference's."""
    ref = case.reference(case.where[place], at_z)
    if place not in case.sparse:
        assert all(norm(ref.rows[name]) > 0 for name in order)
    assert any(norm(ref.rows[name]) > 0 for name in order)
    if not at_z:
        assert sorted(grads) == case.paths(case.where[place])
    for i, leaf in enumerate(optree.tree_leaves(grads)):
        for row, name in zip(leaf, order, strict=True):
            assert_near(row, ref.rows[name][i], f"task {name}, leaf {i}", norm(ref.rows[name]))


def assert_norms(case: Case, order: str, place: str, norms: Tensor, at_z: bool) -> None:
    ref = case.reference(case.where[place], at_z)
    assert_near(norms, torch.stack([norm(ref.rows[name]) for name in order]), "norms")


def assert_stats(case: Case, order: str, place: str, stats: gn.TaskStats, at_z: bool) -> None:
    """All of it: losses, norms, task gradients, and the gradient of the sum for all parameters."""
    ref = case.reference(None)
    assert_near(stats.losses, torch.stack([ref.losses[name] for name in order]), "losses")
    assert_norms(case, order, place, stats.grad_norms, at_z)
    if at_z:
        by_example = case.reference(None, at_z).rows
        rows = [torch.cat([g.flatten(1) for g in by_example[name]], 1).norm(dim=1).mean() for name in order]
        assert_near(stats.example_norms, torch.stack(rows), "example norms")
    else:
        assert_rows(case, order, place, stats.task_grads, at_z)
        assert stats.example_norms == ()
    assert list(stats.grads) == [name for name, _ in case.model.named_parameters()]
    assert_same_sum([stats.grads[path] for path in case.paths(None)], ref.total, "sum")
    assert_free(stats)


def assert_aux(case: Case, aux: dict[str, Tensor]) -> None:
    new = case.new_buffers()
    assert sorted(aux) == sorted(new)
    for name, buffer in new.items():
        assert_near(aux[name], buffer, name)


# ---- the general engine


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("name", "place"), [row for row in TABLE if row[0] != "unused"])
def test_general_structures(name: str, place: str, structure: str) -> None:
    case, (build, order) = make(name), STRUCTURES[structure]
    params = case.params()
    out = gn.measure(
        params,
        case.loss_fn(build),
        case.batch,
        weights=weights_of(order),
        where=case.where[place],
        has_aux=case.has_aux,
    )
    stats = out[0] if case.has_aux else out
    assert_stats(case, order, place, stats, at_z=False)
    if case.has_aux:
        assert_aux(case, out[1])
    losses, grads, *_ = gn.task_grads(
        case.loss_fn(build), params, case.batch, where=case.where[place], has_aux=case.has_aux
    )
    assert_rows(case, order, place, grads, at_z=False)
    template = build(dict.fromkeys("abc", torch.tensor(0.0)))
    assert optree.tree_structure(losses) == optree.tree_structure(template)
    names = case.reference(None).losses
    expected = build({task: names[task] for task in "cab"})
    assert optree.tree_all(optree.tree_map(lambda x, y: torch.allclose(x, y, rtol=1e-10), losses, expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "place"), TABLE)
def test_general_modes(name: str, place: str, mode: str) -> None:
    case = make(name)
    run = partial(
        gn.measure,
        case.params(),
        case.loss_fn(),
        case.batch,
        where=case.where[place],
        has_aux=case.has_aux,
        **MODES[mode],
    )
    order = order_of(case)
    out = run(weights=weights_of(order))
    assert_stats(case, order, place, out[0] if case.has_aux else out, at_z=False)
    out = run(norms_only=True)
    stats = out[0] if case.has_aux else out
    assert_norms(case, order, place, stats.grad_norms, at_z=False)
    assert stats.task_grads == stats.grads == ()


@pytest.mark.parametrize("engine", ["general", "seam", "separable"])
def test_aux_may_hold_anything(engine: str) -> None:
    """Tensors of any dtype, None, numbers, strings, functions: aux comes back as it was, without a graph."""
    p = {"w": torch.randn(3, dtype=torch.float64, requires_grad=True)}
    x = torch.randn(4, 3, dtype=torch.float64)

    def aux(z: Tensor) -> dict[str, Any]:
        return {"z": z, "none": None, "text": "seen", "number": 1.5, "f": len, "ints": z.argmax(), "empty": ()}

    def one(z: Tensor) -> tuple[Tensor, Any]:
        return z.sum(), aux(z)

    def two(z: Tensor) -> tuple[Tensor, Any]:
        return z.square().sum(), None

    if engine == "general":
        loss_fn = lambda p, x: ([one(x @ p["w"])[0], two(x @ p["w"])[0]], aux(x @ p["w"]))
    elif engine == "seam":
        heads = [lambda p, z, x: one(z), lambda p, z, x: two(z)]
        loss_fn = gn.multi_task_loss(lambda p, x: (x @ p["w"], (None, "deep")), heads, has_aux=True)
    else:
        losses = [lambda p, x: one(x @ p["w"]), lambda p, x: two(x @ p["w"])]
        loss_fn = gn.multi_task_loss(None, losses, has_aux=True)
    for _ in range(2):
        stats, found = gn.measure(p, loss_fn, x, weights=torch.ones(2), has_aux=True)
        if engine == "seam":
            assert found[0] == (None, "deep")
        if engine != "general":
            assert found[1][1] is None
            found = found[1][0]
        assert_free((stats, found))
        z = (x @ p["w"]).detach()
        assert_near(found.pop("z"), z)
        assert found.pop("ints") == z.argmax()
        assert found == {"none": None, "text": "seen", "number": 1.5, "f": len, "empty": ()}


# ---- the seam engine


@pytest.mark.parametrize(("name", "last", "place"), SEAMS)
def test_seam(name: str, last: str, place: str) -> None:
    """The first call finds out which part reads what; later ones rely on it. All are exact."""
    case, order = make(name), order_of(make(name))
    loss_fn, params, at_z = case.seam(last), case.params(), case.where[place] is None
    run = partial(gn.measure, params, loss_fn, case.batch, where=case.where[place], has_aux=case.has_aux)
    before = snapshot((params, case.batch))
    for call in range(3):
        out = run(weights=weights_of(order))
        stats, aux = out if case.has_aux else (out, None)
        assert_stats(case, order, place, stats, at_z)
        if case.has_aux:
            assert_aux(case, aux[0] | aux[1]["a"])
            assert aux[1]["b"] == {}
        if call == 1:  # a pass of another kind between two of one kind
            out = run(norms_only=True)
            assert_norms(case, order, place, (out[0] if case.has_aux else out).grad_norms, at_z)
            losses, grads, *_ = gn.task_grads(
                loss_fn, params, case.batch, where=case.where[place], has_aux=case.has_aux
            )
            assert list(losses) == list(case.tasks)
            assert_rows(case, order, place, grads, at_z)
    assert_untouched(before)


@pytest.mark.parametrize("structure", ["dict", "list"])
@pytest.mark.parametrize("place", make("mlp").where)
def test_seam_structures(place: str, structure: str) -> None:
    """Heads as a dict or a list; the losses come in the same."""
    case, (build, order) = make("mlp"), STRUCTURES[structure]
    loss_fn, params = case.seam("linear", build), case.params()
    stats = gn.measure(params, loss_fn, case.batch, weights=weights_of(order), where=case.where[place])
    assert_stats(case, order, place, stats, place == "z")
    losses, grads = gn.task_grads(loss_fn, params, case.batch, where=case.where[place])
    assert_rows(case, order, place, grads, place == "z")
    assert optree.tree_structure(losses) == optree.tree_structure(build(dict.fromkeys("abc", 0.0)))
    assert_near(torch.stack(optree.tree_leaves(losses)), stats.losses)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_seam_modes(name: str, mode: str) -> None:
    case = make(name)
    stats = gn.measure(
        case.params(),
        case.seam("function"),
        case.batch,
        weights=weights_of("abc"),
        where=case.where["mixed"],
        **MODES[mode],
    )
    assert_stats(case, "abc", "mixed", stats, at_z=False)


# ---- what holds of all engines

FORMS = ["general", "within", "function", "linear"]


def in_form(case: Case, form: str) -> Any:
    return case.loss_fn() if form == "general" else case.seam(form)


@pytest.mark.parametrize("place", ["z", "layer", "mixed", "all"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mlp", "tied", "cnn"])
def test_weights_from_norms(name: str, form: str, place: str) -> None:
    """Weights chosen within the pass, from the norms: the sum is that of autograd with these weights."""
    case = make(name)
    loss_fn = in_form(case, form)
    for _ in range(2):
        out = gn.measure(
            case.params(),
            loss_fn,
            case.batch,
            where=case.where[place],
            has_aux=case.has_aux,
            weights=lambda stats: stats.losses / stats.grad_norms,
        )
        stats = out[0] if case.has_aux else out
        assert_norms(case, "abc", place, stats.grad_norms, place == "z" and form != "general")
        rows, weights = case.reference(None).rows, stats.losses / stats.grad_norms
        total = [
            sum(w * g for w, g in zip(weights, leaf, strict=True))
            for leaf in zip(*(rows[t] for t in "abc"), strict=True)
        ]
        assert_same_sum([stats.grads[path] for path in case.paths(None)], total)


@pytest.mark.parametrize("place", ["z", "layer", "early", "all"])
@pytest.mark.parametrize("form", FORMS)
def test_no_norms_and_a_weight_of_zero(form: str, place: str) -> None:
    """Without norms the sum is as exact; of a task of weight 0 the seam has not measured the norm, and says so."""
    case = make("mlp")
    loss_fn, where = in_form(case, form), case.where[place]
    weights = weights_of("abc") * torch.tensor([1.0, 0.0, -1.0])
    rows = case.reference(None).rows
    total = [weights[0] * a + weights[2] * c for a, c in zip(rows["a"], rows["c"], strict=True)]
    for norms in (False, True, True):
        stats = gn.measure(
            case.params(), loss_fn, case.batch, weights=weights, where=where, needs="norms" if norms else "losses"
        )
        assert_same_sum([stats.grads[path] for path in case.paths(None)], total)
        assert isinstance(stats.grad_norms, Tensor) == norms
    at_z = place == "z" and form != "general"
    ref = case.reference(where, at_z)
    for i in (0, 2):
        assert_near(stats.grad_norms[i], norm(ref.rows["abc"[i]]))
    if not torch.isnan(stats.grad_norms[1]):
        assert form == "general"
        assert_near(stats.grad_norms[1], norm(ref.rows["b"]))


@pytest.mark.parametrize(("name", "form"), [(n, f) for n in MAKERS for f in FORMS if make(n).last or f in FORMS[:2]])
def test_parameters_that_require_grad(name: str, form: str) -> None:
    """Straight from named_parameters(): nothing is written to them, and no result holds on to their graph."""
    case = make(name)
    loss_fn, params = in_form(case, form), case.params(requires_grad=True)
    before = snapshot((params, case.batch, dict(case.model.named_buffers())))
    for place in [place for place in ("z", "weight", "mixed") if place in case.where] * 2:
        for weights in (weights_of(order_of(case)), None):
            run = partial(gn.measure, params, loss_fn, case.batch, has_aux=case.has_aux, where=case.where[place])
            assert_free(run(weights=weights))
            assert_free(run(weights=weights, norms_only=True))
        assert_free(gn.task_grads(loss_fn, params, case.batch, where=case.where[place], has_aux=case.has_aux))
    assert_untouched(before)


def test_attention_without_a_batching_rule() -> None:
    """The CPU's fused attention cannot be pulled back under vmap without a warning; a loop can do it."""
    q, x = torch.randn(1, 2, 6, 4, dtype=torch.float64), torch.randn(1, 2, 6, 4, dtype=torch.float64)

    def loss_fn(params: Tensor, x: Tensor) -> list[Tensor]:
        y = F.scaled_dot_product_attention(x @ params, x, x)
        return [y.square().mean(), y[..., 0].exp().mean()]

    w = (torch.eye(4, dtype=torch.float64) + 0.1).requires_grad_()
    expected = torch.stack([gradients(loss, [w])[0] for loss in loss_fn(w, q + x)])
    assert_near(gn.task_grads(loss_fn, w, q + x, vectorize=False)[1], expected)
