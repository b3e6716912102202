"""The plots: what is drawn is what the history holds, in whatever form it comes, and bad input is answered clearly."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib")
import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

import gradnorm_func as gn
from gradnorm_func import plot

NAMES = ["depth", "normals", "segmentation"]
COURSES = [plot.weights, plot.grad_norms, plot.loss_ratios, plot.inverse_rates]
HISTORY_PLOTS = [*COURSES, plot.overview]


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def trained(steps: int = 12, balancer: Any = None, tasks: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    """A real history of tasks at three scales."""
    a = torch.randn(tasks, 4, dtype=dtype)
    scales = 10.0 ** torch.arange(tasks).remainder(3).to(dtype)
    loss_fn = lambda w, x: scales * (x * (a @ w - 1)).square() + 0.1 * scales
    batches = [1 + 0.1 * torch.randn(tasks, dtype=dtype) for _ in range(steps)]
    return gn.train(torch.zeros(4, dtype=dtype), loss_fn, batches, balancer=balancer, progress=False)[2]


def axis() -> Axes:
    return Figure().subplots()


def drawn(ax: Axes, names: list[str]) -> np.ndarray:
    """(steps, T) read back from the lines that are labelled with the tasks' names."""
    lines = {line.get_label(): line for line in ax.lines}
    return np.stack([np.asarray(lines[name].get_ydata(), dtype=float) for name in names], 1)


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def expected_of(function: Any, h: Any) -> Tensor:
    ratios = h.losses / h.losses[0]
    return {
        plot.weights: h.weights,
        plot.grad_norms: h.weights * h.grad_norms,
        plot.loss_ratios: ratios,
        plot.inverse_rates: ratios / ratios.mean(1, keepdim=True),
    }[function]


# ---- what is drawn


@pytest.mark.parametrize("function", COURSES)
def test_a_course_draws_the_numbers_of_the_history(function: Any) -> None:
    history, ax = trained(), axis()
    expected = expected_of(function, history).numpy()
    assert len(np.unique(expected)) > 20
    assert function(history, ax, names=NAMES) is ax
    np.testing.assert_allclose(drawn(ax, NAMES), expected, rtol=1e-12)
    assert ax.get_xlabel() == "training step"
    assert "_i" in ax.get_ylabel()
    assert texts(ax) and set(texts(ax)) == set(NAMES)  # noqa: PT018
    heights = {text.get_text(): text.xyann[1] for text in ax.texts}
    by_end = sorted(NAMES, key=lambda name: expected[-1][NAMES.index(name)])
    assert sorted(NAMES, key=heights.__getitem__) == by_end  # names stand in the order of the curves' ends
    ax.figure.canvas.draw()


def test_lines_differ_without_colour() -> None:
    ax = plot.weights(trained(tasks=8), axis())
    looks = {(line.get_marker(), str(line.get_linestyle()), str(line._dash_pattern)) for line in ax.lines}
    assert len(looks) == 8
    assert len({line.get_color() for line in ax.lines}) == 8


def test_targets_are_drawn_in_the_colours_of_their_tasks() -> None:
    history = trained()
    ax = plot.grad_norms(history, axis(), names=NAMES)
    targets = [line for line in ax.lines if line.get_label() == "_target"]
    np.testing.assert_allclose(np.stack([t.get_ydata() for t in targets], 1), history.targets)
    colours = {line.get_label(): line.get_color() for line in ax.lines}
    assert [t.get_color() for t in targets] == [colours[name] for name in NAMES]
    assert ax.get_yscale() == "log"
    of_static = trained(balancer=gn.static(norms=True))
    assert len(plot.grad_norms(of_static, axis()).lines) == 3  # no targets there, so none are drawn


def infos_of(history: Any) -> list[Any]:
    return [type(history)(*(field[k] for field in history)) for k in range(len(history.losses))]


FORMS = {
    "list of Infos": infos_of,
    "dict of fields": lambda h: h._asdict(),
    "list of dicts": lambda h: [info._asdict() for info in infos_of(h)],
    "requires grad": lambda h: h._replace(
        weights=h.weights.requires_grad_() * 1, grad_norms=h.grad_norms.requires_grad_() * 1
    ),
    "arrays": lambda h: {key: value.numpy() for key, value in h._asdict().items()},
    "lists": lambda h: {key: value.tolist() for key, value in h._asdict().items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", COURSES)
def test_a_history_in_any_form(function: Any, form: str) -> None:
    history = trained()
    expected = expected_of(function, history).numpy()
    ax = function(FORMS[form](history), axis(), names=NAMES)
    np.testing.assert_allclose(drawn(ax, NAMES), expected, rtol=1e-12)


def test_plain_numbers_in_any_form() -> None:
    values = trained().weights
    for given in (values, values.tolist(), values.numpy(), list(values), values.clone().requires_grad_()):
        np.testing.assert_array_equal(drawn(plot.weights(given, axis(), names=NAMES), NAMES), values.detach().numpy())
    by_task = dict(zip(NAMES, values.T, strict=True))
    np.testing.assert_array_equal(drawn(plot.weights(by_task, axis()), NAMES), values.numpy())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = values.to(dtype)
        np.testing.assert_array_equal(drawn(plot.weights(low, axis(), names=NAMES), NAMES), low.double().numpy())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_history_on_the_gpu() -> None:
    history = trained()
    on_gpu = type(history)(*(field.cuda() for field in history))
    for function in COURSES:
        found = drawn(function(on_gpu, axis(), names=NAMES), NAMES)
        np.testing.assert_array_equal(found, drawn(function(history, axis(), names=NAMES), NAMES))


def test_names_may_be_the_heads() -> None:
    ax = plot.weights(trained(), axis(), names={"seg": 0.0, "depth": 0.0, "normals": 0.0})
    assert [line.get_label() for line in ax.lines] == ["depth", "normals", "seg"]
    assert [line.get_label() for line in plot.weights(trained(), axis()).lines] == ["task 0", "task 1", "task 2"]


def test_smoothing_is_the_mean_of_the_last_steps_and_keeps_gaps() -> None:
    values = torch.tensor([[1.0, 1.0], [3.0, torch.nan], [8.0, 5.0], [1.0, 3.0]])
    ax = plot.weights(values, axis(), names=["a", "b"], smooth=2)
    expected = [[1, 1], [2, np.nan], [5.5, 5], [4.5, 4]]
    np.testing.assert_allclose(drawn(ax, ["a", "b"]), expected)
    assert "mean of 2" in ax.get_xlabel()


def test_given_initial_losses() -> None:
    losses = torch.tensor([[2.0, 3.0], [1.0, 6.0]])
    ax = plot.loss_ratios(losses, axis(), names=["a", "b"], initial_losses=[4.0, 3.0])
    np.testing.assert_allclose(drawn(ax, ["a", "b"]), [[0.5, 1], [0.25, 2]])
    ax = plot.inverse_rates(losses, axis(), names=["a", "b"], initial_losses=[4.0, 3.0])
    np.testing.assert_allclose(drawn(ax, ["a", "b"]), [[2 / 3, 4 / 3], [2 / 9, 16 / 9]])
    first_usable = torch.tensor([[0.0, torch.nan], [5.0, 2.0], [10.0, 1.0]])  # as in `gn.balance`
    found = drawn(plot.loss_ratios(first_usable, axis(), names=["a", "b"]), ["a", "b"])
    np.testing.assert_allclose(found, [[0, np.nan], [1, 1], [2, 0.5]])


@pytest.mark.parametrize("losses", [[[-1.0, 2.0], [-3.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]]], ids=["negative", "zero"])
def test_losses_that_are_negative_or_zero(losses: Any) -> None:
    for function in (plot.loss_ratios, plot.inverse_rates):
        function(losses, axis()).figure.canvas.draw()


# ---- one step, many tasks, gaps


@pytest.mark.parametrize("function", HISTORY_PLOTS)
def test_one_step_can_be_seen(function: Any) -> None:
    history = trained(steps=1)
    for given in (history, infos_of(history), infos_of(history)[0]):
        out = function(given, names=NAMES)
        for ax in out.axes if isinstance(out, Figure) else [out]:
            lines = [line for line in ax.lines if line.get_label() in NAMES]
            assert all(line.get_marker() != "None" and line.get_markevery() == [0] for line in lines)
        (out if isinstance(out, Figure) else out.figure).canvas.draw()


@pytest.mark.parametrize("function", HISTORY_PLOTS)
def test_fifty_tasks_name_their_extremes(function: Any) -> None:
    history = trained(steps=5, tasks=50)
    out = function(history)
    for ax in out.axes if isinstance(out, Figure) else [out]:
        names = [text for text in texts(ax) if text.startswith("task")]
        assert len(names) == 6
        assert "44 others" in ax.get_xlabel()
        lines = {line.get_label(): line for line in ax.lines if line.get_label().startswith("task")}
        assert len(lines) == 50
        ends = {name: line.get_ydata()[-1] for name, line in lines.items()}
        assert max(ends.values()) == max(ends[name] for name in names)
        assert min(ends.values()) == min(ends[name] for name in names)


def test_names_at_the_ends_do_not_overlap() -> None:
    ax = plot.weights(torch.ones(5, 8))
    figure = ax.figure
    figure.canvas.draw()
    boxes = sorted((Text.get_window_extent(text) for text in ax.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert all(box.x1 <= figure.bbox.width for box in boxes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gaps(bad: float) -> None:
    values = torch.arange(1.0, 41.0)[:, None].repeat(1, 3)
    values[3:5, 0] = bad
    values[:, 1] = bad
    values[1::2, 2] = bad
    ax = plot.weights(values, axis(), names=NAMES)
    found = drawn(ax, NAMES)
    np.testing.assert_array_equal(np.isnan(found), ~np.isfinite(values.numpy()))
    lines = {line.get_label(): line for line in ax.lines}
    assert lines[NAMES[2]].get_markevery() == list(range(0, 40, 2))  # points between gaps, which no line shows
    assert "normals" in ax.get_xlabel()  # nothing to see of it, and that is said
    assert set(texts(ax)) == {NAMES[0], NAMES[2]}
    ax.figure.canvas.draw()


# ---- conflicts


def cosines_of(count: int, steps: int | None = None) -> Tensor:
    rows = torch.nn.functional.normalize(torch.randn(*([] if steps is None else [steps]), count, 6), dim=-1)
    return rows @ rows.mT


def test_conflicts_hold_their_numbers_on_a_fixed_scale() -> None:
    cosines, ax = cosines_of(3), axis()
    assert plot.conflicts(cosines, ax, names=NAMES) is ax
    image = ax.images[0]
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(image.get_array().filled(np.nan)[off], cosines.double().numpy()[off])
    assert np.isnan(image.get_array().filled(np.nan)[~off]).all()
    assert image.get_clim() == (-1, 1)
    assert texts(ax)[1] == f"{cosines[0, 1]:.2f}"
    assert [label.get_text() for label in ax.get_xticklabels()] == NAMES
    assert [label.get_text() for label in ax.get_yticklabels()] == NAMES
    red, _, blue = (image.cmap(image.norm(value))[:3] for value in (-1, 0, 1))
    assert red[0] > red[2] and blue[2] > blue[0]  # noqa: PT018
    over_time = cosines_of(3, steps=4)
    last = plot.conflicts(over_time, axis()).images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(last[off], over_time[-1].double().numpy()[off])


def test_conflicts_of_many_and_of_one_and_of_nan() -> None:
    ax = plot.conflicts(cosines_of(50))
    assert not ax.texts
    assert len(ax.get_xticks()) <= 30
    assert len(plot.conflicts(cosines_of(12), axis()).texts) == 144
    cosines = cosines_of(3)
    cosines[0] = cosines[:, 0] = torch.nan
    assert texts(plot.conflicts(cosines, axis()))[1] == ""
    ax.figure.canvas.draw()


def test_conflict_course_of_few_pairs() -> None:
    cosines = cosines_of(3, steps=6)
    cosines[2] = torch.nan
    ax = plot.conflict_course(cosines, axis(), names=NAMES)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_allclose(drawn(ax, [f"{NAMES[i]} / {NAMES[j]}"])[:, 0], cosines[:, i, j].double().numpy())
    assert "cosine" in ax.get_ylabel()


def test_conflict_course_of_many_pairs_is_summed_up() -> None:
    cosines = cosines_of(6, steps=7)
    cosines[:, 1, 4] = cosines[:, 4, 1] = -0.99
    cosines[:, 0, 2] = cosines[:, 2, 0] = 0.99
    cosines[3] = torch.nan
    ax = plot.conflict_course({"cosines": cosines}, names=list("abcdef"))
    i, j = torch.triu_indices(6, 6, 1)
    pairs = cosines[:, i, j].double().numpy()
    np.testing.assert_allclose(drawn(ax, ["median"])[:, 0], np.median(pairs, axis=1))
    np.testing.assert_allclose(drawn(ax, ["b / e"])[:, 0], pairs[:, 7])
    assert pairs[0, 7] == pytest.approx(-0.99)
    assert set(texts(ax)) == {"median", "b / e", "a / c"}
    for band, low, high in zip(ax.collections, (0, 25), (100, 75), strict=True):
        y = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
        assert y.min() == pytest.approx(np.nanmin(np.nanpercentile(pairs[[0, 1, 2, 4, 5, 6]], low, axis=1)))
        assert y.max() == pytest.approx(np.nanmax(np.nanpercentile(pairs[[0, 1, 2, 4, 5, 6]], high, axis=1)))
    plot.conflict_course(cosines_of(50, steps=1)).figure.canvas.draw()


def test_conflict_course_of_a_rotograd_history() -> None:
    params = {"w": torch.eye(3), "a": torch.ones(3), "b": torch.arange(3.0)}
    heads = {name: lambda p, z, x, name=name: (z @ p[name] - 1).square().mean() for name in "ab"}
    loss_fn = gn.multi_task_loss(lambda p, x: x @ p["w"], heads)
    history = gn.train(params, loss_fn, [torch.randn(4, 3)] * 3, balancer=gn.rotograd(3), progress=False)[2]
    np.testing.assert_allclose(
        drawn(plot.conflict_course(history, axis(), names=["a", "b"]), ["a / b"])[:, 0], history.cosines[:, 0, 1]
    )
    figure = plot.overview(history, names=["a", "b"])
    assert [line.get_label() for line in figure.axes[3].lines][0] == "a / b"  # noqa: RUF015


# ---- layers


def test_layers_hold_the_norms_of_the_report() -> None:
    params = {"trunk.weight": torch.randn(4, 3), "a": torch.ones(4), "b": torch.ones(4)}
    loss_fn = lambda p, x: {n: (torch.tanh(x @ p["trunk.weight"].T) @ p[n]).square().mean() for n in "ab"}
    report, ax = gn.layer_analysis(loss_fn, params, torch.randn(5, 3)), axis()
    assert plot.layers(report, ax) is ax
    found, expected = ax.images[0].get_array().filled(0), torch.stack(list(report.norms.values())).double().numpy()
    assert (expected[0] > 0).all()
    np.testing.assert_allclose(found, expected)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["trunk", "a", "b"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert "trunk" in ax.get_xlabel()
    assert ax.patches[0].get_xy() == (-0.5, -0.5)
    (plain,) = plot.layers(torch.stack(list(report.norms.values())), axis(), layer_names=list("xyz")).images
    np.testing.assert_allclose(plain.get_array().filled(0), expected)


def test_layers_of_many_of_one_and_of_none_shared() -> None:
    plot.layers(torch.rand(100, 50) + 0.1).figure.canvas.draw()
    plot.layers(torch.ones(1, 1)).figure.canvas.draw()
    ax = plot.layers([[1.0, 0.0], [0.0, float("nan")]])
    assert not ax.patches
    ax.figure.canvas.draw()


# ---- methods


def test_compare_draws_median_and_band() -> None:
    runs = {"equal": torch.rand(5, 8) + 1, "GradNorm": torch.rand(4, 8).numpy() + 1}
    for band, low, high in (("range", 0, 100), ("quartiles", 25, 75)):
        ax = axis()
        assert plot.compare(runs, ax, steps=range(0, 80, 10), band=band, label="error (%)") is ax
        for collection, (name, values) in zip(ax.collections, runs.items(), strict=True):
            values = np.asarray(values, dtype=float)
            np.testing.assert_allclose(drawn(ax, [name])[:, 0], np.median(values, 0))
            y = np.concatenate([path.vertices[:, 1] for path in collection.get_paths()])
            assert y.min() == pytest.approx(np.percentile(values, low, axis=0).min())
            assert y.max() == pytest.approx(np.percentile(values, high, axis=0).max())
        assert ax.lines[0].get_xdata()[-1] == 70
        assert ax.get_ylabel() == "error (%)"
        assert set(texts(ax)) == set(runs)
        ax.figure.canvas.draw()


def test_compare_counts_the_runs_that_diverged() -> None:
    values = torch.ones(3, 4)
    values[1, 2:] = torch.nan
    ax = plot.compare({"GradNorm": values, "one step": torch.ones(1, 1)}, axis(), label="loss")
    assert "GradNorm (2/3 left)" in texts(ax)
    ax.figure.canvas.draw()


def test_pareto() -> None:
    sweep = torch.tensor([[1.0, 4.0], [3.0, 3.0], [2.0, 2.0], [torch.nan, 0.1], [4.0, 1.0]])
    ax = axis()
    found = plot.pareto(
        sweep,
        ax,
        methods={"GradNorm": [[1.5, 1.0], [1.6, 1.1]], "equal": [3, 2]},
        names=["a", "b"],
        shares=[0.9, 0.7, 0.5, 0.3, 0.1],
    )
    assert found is ax
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 4], [2, 2], [4, 1]])
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), [[3, 3]])
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), [[1.5, 1.0], [1.6, 1.1]])
    assert [text.get_text() for text in ax.get_legend().get_texts()][2:] == ["GradNorm", "equal"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss of a", "loss of b")
    assert texts(ax) == ["0.9", "0.7", "0.5", "0.1"]
    ax.figure.canvas.draw()


# ---- overview


def test_overview_shows_all_four_and_says_what_is_missing() -> None:
    figure = plot.overview(trained(), names=NAMES, smooth=3)
    assert all(set(texts(ax)) == set(NAMES) for ax in figure.axes)
    figure.canvas.draw()
    figure = plot.overview(trained(balancer=gn.static()))
    assert "norms=True" in texts(figure.axes[1])[0].replace("\n", " ")
    figure.canvas.draw()


def test_panels_that_share_an_axis_show_all_their_data() -> None:
    first, second = Figure().subplots(1, 2, sharex=True, sharey=True)
    plot.weights(torch.rand(5, 3) + 1, first)
    plot.weights(100 * torch.rand(9, 3) + 1, second)
    for ax in (first, second):
        for line in ax.lines:
            assert ax.get_ylim()[0] < line.get_ydata().min() <= line.get_ydata().max() < ax.get_ylim()[1]
            assert ax.get_xlim()[0] < line.get_xdata().min() <= line.get_xdata().max() < ax.get_xlim()[1]


# ---- bad input


def case(message: str, run: Any) -> Any:
    return pytest.param(run, message, id=message[:30])


H = {"weights": torch.ones(5, 3), "grad_norms": torch.ones(4, 3), "losses": torch.ones(5, 3)}
BAD = [
    case(r"history is empty", lambda: plot.weights([])),
    case(r"no 'weights', only loss, grad_norm", lambda: plot.weights(gn.GradInitInfo(*[torch.ones(())] * 7))),
    case(r"no 'cosines'", lambda: plot.conflict_course(trained(2))),
    case(r"no 'losses', only weights", lambda: plot.loss_ratios({"weights": torch.ones(5, 3)})),
    case(r"history.grad_norms has shape \(4, 3\), history.weights \(5, 3\)", lambda: plot.grad_norms(H)),
    case(r"norms=True", lambda: plot.grad_norms(trained(2, gn.static()))),
    case(r"weights has shape \(5,\).*\(steps, T\)", lambda: plot.weights(torch.ones(5))),
    case(r"draw one at a time", lambda: plot.weights(torch.ones(2, 5, 3))),
    case(r"no finite number", lambda: plot.weights(torch.full((5, 3), torch.nan))),
    case(r"weights\[1\] has shape \(2,\)", lambda: plot.weights([torch.ones(3), torch.ones(2)])),
    case(r"history.weights\[1\] has shape", lambda: plot.weights([{"weights": torch.ones(k)} for k in (3, 2)])),
    case(r"unequal length.*'a': 2, 'b': 3", lambda: plot.weights({"a": [1, 2], "b": [1, 2, 3]})),
    case(r"cannot be read as numbers", lambda: plot.weights([["a", "b"]])),
    case(r"names has 2 entries, but there are 3 tasks", lambda: plot.weights(torch.ones(5, 3), names=["a", "b"])),
    case(r"names has 2 entries", lambda: plot.overview(trained(2), names=["a", "b"])),
    case(r"smooth=0", lambda: plot.weights(torch.ones(5, 3), smooth=0)),
    case(r"ax=ndarray must be one", lambda: plot.weights(torch.ones(5, 3), Figure().subplots(2))),
    case(r"initial_losses has shape \(2,\)", lambda: plot.loss_ratios(torch.ones(5, 3), initial_losses=[1.0, 2.0])),
    case(r"must not be 0", lambda: plot.loss_ratios(torch.ones(5, 2), initial_losses=[1.0, 0.0])),
    case(r"history=Tensor has no fields", lambda: plot.overview(torch.ones(5, 3))),
    case(r"\(3, 2\); it must be \(T, T\)", lambda: plot.conflicts(torch.ones(3, 2))),
    case(r"Gramian", lambda: plot.conflicts(5 * torch.ones(3, 3))),
    case(r"cosines holds no finite", lambda: plot.conflicts(torch.full((3, 3), torch.nan))),
    case(r"no pair", lambda: plot.conflict_course(torch.ones(4, 1, 1))),
    case(r"\(L, T\)", lambda: plot.layers(torch.ones(3))),
    case(r"no positive norm", lambda: plot.layers(torch.zeros(3, 2))),
    case(r"layer_names has 1", lambda: plot.layers(torch.ones(3, 2), layer_names=["a"])),
    case(r"runs=Tensor must be a dict", lambda: plot.compare(torch.ones(3, 2))),
    case(r"of one run, x\[None\]", lambda: plot.compare({"a": torch.ones(3)})),
    case(r"'median' must be 'range'", lambda: plot.compare({"a": torch.ones(3, 2)}, band="median")),
    case(r"steps has 3 entries", lambda: plot.compare({"a": torch.ones(3, 2)}, steps=[1, 2, 3])),
    case(r"9 methods", lambda: plot.compare({str(i): torch.ones(3, 2) for i in range(9)})),
    case(r"leave it out", lambda: plot.compare({"a": torch.full((3, 2), torch.nan)})),
    case(r"\(N, 2\)", lambda: plot.pareto(torch.ones(3, 3))),
    case(r"two finite losses", lambda: plot.pareto([[torch.nan, 1.0]])),
    case(r"shares has shape", lambda: plot.pareto(torch.ones(3, 2), shares=[0.1])),
    case(r"methods\['a'\] has shape", lambda: plot.pareto(torch.ones(3, 2), methods={"a": [1.0, 2.0, 3.0]})),
]


@pytest.mark.parametrize(("run", "message"), BAD)
def test_bad_input(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


# ---- where it runs


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean | env, check=False)


@pytest.mark.parametrize("backend", ["", "tkagg"])
def test_without_a_display(backend: str, tmp_path: Any) -> None:
    """Even where the environment asks for windows."""
    ax = "import torch; from gradnorm_func import plot; ax = plot.weights(torch.ones(3, 2))"
    done = python(
        f"{ax}; ax.figure.savefig({str(tmp_path / 'a.png')!r})", **({"MPLBACKEND": backend} if backend else {})
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_where_pyplot_cannot_open_a_figure(monkeypatch: Any, tmp_path: Any) -> None:
    """As older matplotlib, where the environment asks for windows and there is no display."""

    def refuse(**_: Any) -> None:
        raise ImportError("Cannot load backend 'TkAgg' which requires the 'tk' interactive framework")

    monkeypatch.setattr(pyplot, "figure", refuse)
    plot.weights(trained(3)).figure.savefig(tmp_path / "a.png")
    assert not pyplot.get_fignums()


def test_without_matplotlib_the_package_imports_and_plot_says_what_to_install() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import gradnorm_func; import gradnorm_func.plot"
    done = python(code)
    assert done.returncode != 0
    assert "pip install 'gradnorm_func[plot]'" in done.stderr.splitlines()[-1]
    assert python("import sys, gradnorm_func; assert 'matplotlib' not in sys.modules").returncode == 0
