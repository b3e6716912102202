"""layer_analysis against a loop of torch.autograd.grad, and what its printed table says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Case, make
from oracle import ROUNDING, RTOL, assert_free, assert_near, assert_untouched, snapshot
from torch import Tensor, nn

import gradnorm_func as gn
from gradnorm_func._tools.layers import LayerReport

D = {"dtype": torch.float64}
FORMS = ["general", "within", "function", "linear"]
CASES = [("mlp", form) for form in FORMS] + [
    ("tied", "general"),
    ("tied", "linear"),
    ("cnn", "linear"),
    ("unused", "function"),
    ("transformer", "within"),
    ("two_z", "within"),
]


def loss_of(case: Case, form: str) -> Any:
    return case.loss_fn() if form == "general" else case.seam(form)


def expected_of(case: Case, paths: list[str]) -> tuple[Tensor, Tensor]:
    """(T,) norms and (T, T) cosines at these parameters together, by autograd, task by task."""
    found = case.reference(paths).rows
    rows = torch.stack([torch.cat([g.flatten() for g in found[name]]) for name in sorted(found)])
    norms = rows.norm(dim=1)
    safe = torch.where(norms > 0, norms, 1.0)
    return norms, rows @ rows.T / safe.outer(safe)


@pytest.mark.parametrize("each", [False, True], ids=["layers", "parameters"])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_against_autograd(name: str, form: str, each: bool) -> None:
    case = make(name)
    params = case.params(requires_grad=True)
    before = snapshot(params)
    by = str if each else None
    report = gn.layer_analysis(loss_of(case, form), params, case.batch, by=by, has_aux=case.has_aux)
    assert_free(report)
    assert_untouched(before)
    layer_of = {path: path if each else path.rsplit(".", 1)[0] for path in params}
    assert list(report.norms) == list(report.cosines) == list(dict.fromkeys(layer_of.values()))  # as params define them
    assert gn.task_names(report.losses) == sorted(case.tasks)
    largest = torch.tensor(0.0, **D)
    for layer, norms in report.norms.items():
        expected, cosines = expected_of(case, [path for path in params if layer_of[path] == layer])
        largest = torch.maximum(largest, expected.max())
        assert_near(norms, expected, layer, scale=largest)
        # A gradient that is nothing but rounding (a bias before batch norm) has no direction.
        real = (expected > 1e-12 * largest) | (expected == 0)
        torch.testing.assert_close(report.cosines[layer][real][:, real], cosines[real][:, real], rtol=RTOL, atol=1e-12)
    assert largest > 0


def test_a_layer_that_a_task_does_not_reach_has_norm_and_cosine_of_exactly_zero() -> None:
    report = gn.layer_analysis(make("mlp").seam("linear"), make("mlp").params(), make("mlp").batch)
    assert report.norms["heads.a"][0] > 0
    assert report.norms["heads.a"][1:].tolist() == [0, 0]
    assert report.cosines["heads.a"].tolist() == [[pytest.approx(1), 0, 0], [0, 0, 0], [0, 0, 0]]


def test_where_and_chunks_and_loop() -> None:
    case = make("mlp")
    args = case.loss_fn(), case.params(), case.batch
    whole = gn.layer_analysis(*args)
    assert list(gn.layer_analysis(*args, where=["last", "heads.a.bias"]).norms) == ["last", "heads.a"]
    for keywords in ({"chunk_size": 2}, {"vectorize": False}, {"where": "last"}):
        found = gn.layer_analysis(*args, **keywords)
        assert_near(found.norms["last"], whole.norms["last"])
        assert_near(found.cosines["last"], whole.cosines["last"])


def test_layers_come_as_defined_not_sorted() -> None:
    """Layer 10 after layer 2, the head after the trunk."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(12)]).double()
    params = dict(model.named_parameters())
    loss_fn = lambda p, x: [torch.func.functional_call(model, p, x).sum(), p["11.weight"].square().sum()]
    assert list(gn.layer_analysis(loss_fn, params, torch.randn(2, 3, **D)).norms) == [str(i) for i in range(12)]
    nested = {"trunk": {"w": torch.ones(2), "b": torch.ones(2)}, "head": [torch.ones(2), torch.ones(2)]}
    loss_fn = lambda p, x: [(p["trunk"]["w"] * p["head"][0]).sum(), (p["trunk"]["b"] * p["head"][1]).sum()]
    assert list(gn.layer_analysis(loss_fn, nested, None).norms) == ["trunk", "head"]
    assert list(gn.layer_analysis(loss_fn, nested, None, by=str).norms) == ["trunk.w", "trunk.b", "head.0", "head.1"]


def test_under_vmap_and_grad() -> None:
    case = make("mlp")
    loss_fn, params = case.seam("linear"), case.params()
    stacked = {path: torch.stack([leaf, 2 * leaf]) for path, leaf in params.items()}
    both = torch.func.vmap(lambda p: gn.layer_analysis(loss_fn, p, case.batch))(stacked)
    for i in range(2):
        alone = gn.layer_analysis(loss_fn, {path: leaf[i] for path, leaf in stacked.items()}, case.batch)
        for layer in alone.norms:
            assert_near(both.norms[layer][i], alone.norms[layer])
            torch.testing.assert_close(both.cosines[layer][i], alone.cosines[layer], rtol=RTOL, atol=ROUNDING)
    assert "LayerReport(" in str(both)
    value = lambda p: gn.layer_analysis(loss_fn, p, case.batch, where="trunk").norms["trunk.0"].sum()
    found = torch.func.grad(value)(params)["last.weight"]
    expected = torch.func.grad(lambda p: gn.task_grad_norms(loss_fn, p, case.batch, where="trunk").sum())(params)
    assert expected["last.weight"].norm() > 0
    assert_near(found, expected["last.weight"])


@pytest.mark.parametrize("form", ["general", "linear"])
def test_compiled(form: str) -> None:
    case = make("mlp")
    loss_fn = loss_of(case, form)
    run = torch.compile(lambda p: gn.layer_analysis(loss_fn, p, case.batch), fullgraph=True, backend="aot_eager")
    found, expected = run(case.params()), gn.layer_analysis(loss_fn, case.params(), case.batch)
    assert list(found.norms) == list(expected.norms)
    for layer in expected.norms:
        assert_near(found.norms[layer], expected.norms[layer])
        torch.testing.assert_close(found.cosines[layer], expected.cosines[layer], rtol=RTOL, atol=ROUNDING)


# ---- the table


def report(**norms: list[float]) -> LayerReport:
    tasks = len(next(iter(norms.values())))
    cosines = torch.eye(tasks)
    cosines[0, 1] = cosines[1, 0] = -0.5
    losses = {f"t{i:02}": torch.tensor(1.0) for i in range(tasks)}
    return LayerReport(losses, {k: torch.tensor(v) for k, v in norms.items()}, dict.fromkeys(norms, cosines))


def test_table_names_tasks_layers_and_the_last_shared_one() -> None:
    lines = str(report(first=[1.0, 20.0], second=[0.5, 2.0], head=[3.0, 0.0])).splitlines()
    assert lines[0].split() == ["layer", "t00", "t01", "most", "opposed"]
    assert lines[2].split() == ["first", "1", "20", "t00", "/", "t01", "-0.50"]
    assert lines[4].split() == ["head", "3", "."]
    assert lines[5] == "last layer that every task reaches: second"
    assert str(report(head=[3.0, 0.0])).endswith("no layer that every task reaches")


def test_table_of_many_tasks_names_the_extremes() -> None:
    text = str(report(layer=[float(i + 1) for i in range(50)]))
    assert text.splitlines()[2].split()[:6] == ["layer", "50", "t49", "25", "1", "t00"]
    assert max(map(len, text.splitlines())) < 80


def test_bad_path() -> None:
    case = make("mlp")
    with pytest.raises(ValueError, match="did you mean"):
        gn.layer_analysis(case.loss_fn(), case.params(), case.batch, where="lst")
