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
import matplotlib.style

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import gradnorm_func as gn
from gradnorm_func import plot
from gradnorm_func.plot import _read, _theme

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


def task_lines(ax: Axes) -> list[Any]:
    """The curves themselves, without the marks at their ends and beside their names."""
    return [line for line in ax.lines if not line.get_label().startswith("_")]


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
    ax.figure.draw_without_rendering()
    heights = {text.get_text(): text.get_window_extent().y0 for text in ax.texts}
    by_end = sorted(NAMES, key=lambda name: expected[-1][NAMES.index(name)])
    assert sorted(NAMES, key=heights.__getitem__) == by_end  # names stand in the order of the curves' ends
    keys = {(line.get_color(), line.get_marker()) for line in ax.lines if line.get_label() == "_key"}
    assert keys == {(line.get_color(), line.get_marker()) for line in task_lines(ax)}
    assert sum(line.get_marker() != "None" for line in ax.lines) == 2 * len(NAMES), "one marker beside a name"


def test_lines_differ_without_colour() -> None:
    ax = plot.weights(trained(tasks=8), axis())
    looks = {(line.get_marker(), str(line.get_linestyle()), str(line._dash_pattern)) for line in task_lines(ax)}
    assert len(looks) == 8
    assert len({line.get_color() for line in task_lines(ax)}) == 8


def test_targets_are_drawn_in_the_colours_of_their_tasks() -> None:
    history = trained()
    ax = plot.grad_norms(history, axis(), names=NAMES)
    targets = [line for line in ax.lines if line.get_label() == "_target"]
    np.testing.assert_allclose(np.stack([t.get_ydata() for t in targets], 1), history.targets)
    colours = {line.get_label(): line.get_color() for line in task_lines(ax)}
    assert [t.get_color() for t in targets] == [colours[name] for name in NAMES]
    assert ax.get_yscale() == "log"
    of_static = trained(balancer=gn.static(norms=True))
    assert "_target" not in [
        line.get_label() for line in plot.grad_norms(of_static, axis()).lines
    ]  # no targets there, so none are drawn


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
    assert [line.get_label() for line in task_lines(ax)] == ["depth", "normals", "seg"]
    assert [line.get_label() for line in task_lines(plot.weights(trained(), axis()))] == ["task 0", "task 1", "task 2"]


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
        function(losses, axis()).figure.draw_without_rendering()


# ---- one step, many tasks, gaps


@pytest.mark.parametrize("function", HISTORY_PLOTS)
def test_one_step_can_be_seen(function: Any) -> None:
    history = trained(steps=1)
    for given in (history, infos_of(history), infos_of(history)[0]):
        out = function(given, names=NAMES)
        for ax in out.axes if isinstance(out, Figure) else [out]:
            lines = [line for line in ax.lines if line.get_label() in NAMES]
            assert all(line.get_marker() != "None" and line.get_markevery() == [0] for line in lines)
        (out if isinstance(out, Figure) else out.figure).draw_without_rendering()


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
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
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
    ax.figure.draw_without_rendering()


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
    ax.figure.draw_without_rendering()


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
    plot.conflict_course(cosines_of(50, steps=1)).figure.draw_without_rendering()


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
    plot.layers(torch.rand(100, 50) + 0.1).figure.draw_without_rendering()
    plot.layers(torch.ones(1, 1)).figure.draw_without_rendering()
    ax = plot.layers([[1.0, 0.0], [0.0, float("nan")]])
    assert not ax.patches
    ax.figure.draw_without_rendering()


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
        ax.figure.draw_without_rendering()


def test_compare_counts_the_runs_that_diverged() -> None:
    values = torch.ones(3, 4)
    values[1, 2:] = torch.nan
    ax = plot.compare({"GradNorm": values, "one step": torch.ones(1, 1)}, axis(), label="loss")
    assert "GradNorm (2/3 left)" in texts(ax)
    ax.figure.draw_without_rendering()


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
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("loss of a", "loss of b")
    assert texts(ax) == ["0.9", "0.7", "0.5", "0.1"]
    ax.figure.draw_without_rendering()


# ---- what the methods come to, what a sweep found, whose gradient it is


def test_results_are_changes_against_the_same_seed_of_the_baseline() -> None:
    equal, other = torch.rand(4, 3, dtype=torch.float64) + 1, torch.rand(4, 3, dtype=torch.float64) + 1
    ax = axis()
    assert plot.results({"ours": other, "equal": equal}, ax, baseline="equal", names=NAMES) is ax
    change = 100 * (other / equal - 1)
    expected = torch.cat([change, change.mean(1, keepdim=True)], 1).numpy()
    (mean,) = task_lines(ax)[:1]
    np.testing.assert_allclose(mean.get_xdata(), expected.mean(0))
    assert mean.get_label() == "ours"
    seeds = [line for line in ax.lines if line.get_label() == "_seeds"]
    np.testing.assert_allclose(sorted(np.concatenate([line.get_xdata() for line in seeds])), sorted(expected.ravel()))
    assert [label.get_text() for label in ax.get_yticklabels()] == [*NAMES, "mean of all"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first task on top
    assert ax.get_xscale() == "linear"
    assert "against equal" in ax.get_xlabel()
    ax.figure.draw_without_rendering()


def test_results_that_differ_much_put_half_and_twice_at_one_distance() -> None:
    ax = plot.results({"a": [1.0, 1.0, 1.0], "b": [0.5, 2.0, 1.0]}, axis())
    assert ax.get_xlabel() == "change of the error against a (%, log-ratio axis)"
    ax.figure.draw_without_rendering()
    half, same, twice = (ax.transData.transform((change, 0))[0] for change in (-50, 0, 100))
    assert same - half == pytest.approx(twice - same) and same - half > 10  # noqa: PT018
    shown = [label.get_text() for label in ax.get_xticklabels()]
    assert "0" in shown and "-50" in shown and "+100" in shown  # noqa: PT018
    for ends in ([1.0, 0.0], [1.0, 1e-9], [1.0, 1e9]):  # an error of 0, and ratios that no tick is ready for
        plot.results({"a": [1.0, 1.0], "b": ends}).figure.draw_without_rendering()


def test_sweep_holds_the_means_over_the_seeds_and_frames_the_best() -> None:
    result = gn.sweep(
        lambda seed: torch.full((3,), 0.1 + seed),
        lambda w, x: [(x @ w - 1).square().mean(), w.square().sum()],
        [torch.eye(3)] * 3,
        grid={"alpha": [0.0, 0.5, 1.5], "rate": [1e-3, 1e-1, 1.0]},
        seeds=(0, 1),
        balancer=lambda alpha: gn.gradnorm(alpha=alpha),
        optimizer=lambda rate: gn.adam(rate),
        metric=lambda w: (w - 1).square().sum(),
        compile=False,
        progress=False,
    )
    expected = result.metric.reshape(3, 3, 2).mean(-1).double().numpy()
    for x, y, found in (("rate", "alpha", expected), ("alpha", "rate", expected.T), (None, None, expected)):
        ax = plot.sweep(result, axis(), x=x, y=y, label="error")
        np.testing.assert_allclose(ax.images[0].get_array().filled(np.nan), found, rtol=1e-6)
        row, column = np.unravel_index(found.argmin(), found.shape)
        assert ax.patches[0].get_xy() == (column - 0.5, row - 0.5)
        assert (ax.get_xlabel().split("\n")[0], ax.get_ylabel()) == (x or "rate", y or "alpha")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.001", "0.1", "1"]
    ax.figure.draw_without_rendering()


def test_sweep_says_that_the_best_is_at_the_edge_and_counts_what_diverged() -> None:
    table = {"a": np.repeat([1, 2, 3], 3), "b": np.tile([0.1, 0.2, 0.3], 3), "metric": np.arange(9.0) + 1}
    assert "at the edge of the grid in a, b" in plot.sweep(table, axis()).get_xlabel()
    table["metric"] = np.array([5, 5, 5, 5, 1, 5, 5, 5, 5.0])
    assert "edge" not in plot.sweep(table, axis()).get_xlabel()
    assert plot.sweep(table, axis()).images[0].get_clim() == (1, 5)
    assert plot.sweep(table, axis(), limits=(0.5, 20)).images[0].get_clim() == (0.5, 20)
    nan = {"a": [1, 1, 1, 1, 2, 2, 2, 2], "b": [1, 1, 2, 2] * 2, "seed": [0, 1] * 4, "metric": [1.0] * 8}
    nan["metric"][0] = nan["metric"][6] = nan["metric"][7] = float("nan")
    cells = texts(plot.sweep(nan, axis()))
    assert cells[0] == "1 (1/2)"
    assert cells[3] == "diverged"


def test_shares_are_of_the_lengths_of_the_weighted_gradients() -> None:
    history, ax = trained(), axis()
    lengths = (history.weights * history.grad_norms).numpy()
    expected = 100 * lengths / lengths.sum(1, keepdims=True)
    assert plot.shares(history, ax, names=NAMES) is ax
    below = np.zeros(len(expected))
    for band, name, share in zip(ax.collections, NAMES, expected.T, strict=True):
        assert band.get_label() == name
        corners = band.get_paths()[0].vertices
        for at, low, high in zip(range(len(below)), below, below + share, strict=True):
            heights = corners[corners[:, 0] == at, 1]
            assert heights.min() == pytest.approx(low, abs=1e-9)
            assert heights.max() == pytest.approx(high, abs=1e-9)
        below = below + share
    np.testing.assert_allclose(below, 100)
    assert texts(ax) == [f"{name} {share:.0f} %" for name, share in zip(NAMES, expected[-1], strict=True)]
    plot.shares(trained(steps=1), axis()).figure.draw_without_rendering()
    many = plot.shares(torch.rand(9, 30) + 0.1, axis())
    assert len(many.texts) == 6
    absent = torch.tensor([[1.0, 3.0], [torch.nan, torch.nan], [torch.nan, 2.0]])
    assert texts(plot.shares(absent, axis(), names=["a", "b"])) == ["a absent", "b 100 %"]


# ---- one look a task, names, themes


@pytest.mark.parametrize("count", [3, 12, 40])
def test_a_task_has_one_colour_in_all_panels(count: int) -> None:
    looks: dict[str, set[Any]] = {}
    history = trained(tasks=count)
    axes = [*plot.overview(history).axes, plot.weights(history.losses)]
    for ax in axes:
        for line in task_lines(ax):
            looks.setdefault(line.get_label(), set()).add(line.get_color())
    for band in plot.shares(history).collections:
        looks[band.get_label()].add(matplotlib.colors.to_hex(band.get_facecolor()[0], keep_alpha=False).upper())
    found = {name: {colour.upper() for colour in colours} for name, colours in looks.items()}
    assert len(found) == count
    assert all(len(colours) == 1 for colours in found.values()), found
    assert len(set().union(*found.values())) == count  # and no two tasks share one


LONG = "encoder.transformer.layers.11.task_heads."


@pytest.mark.parametrize(
    "names",
    [
        [f"{LONG}depth", f"{LONG}segmentation"],
        [
            f"{LONG}{task}.{side}.cross_entropy_loss"
            for task in ("segmentation", "normals")
            for side in ("left", "right")
        ],
        ["x" * 60, "x" * 61, "x" * 62],
        [f"{'a' * 40}{k}{'b' * 40}" for k in range(12)],
        [f"{'long' * 9}", "short"],
    ],
    ids=["prefix", "middle", "length alone", "one letter", "mixed"],
)
def test_long_names_stay_different(names: list[str]) -> None:
    ax = plot.weights(torch.arange(1.0, len(names) + 1).expand(4, -1), names=names)
    short = texts(ax)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= 24
    ax.figure.draw_without_rendering()
    for text in ax.texts:
        assert text.get_window_extent().x1 <= ax.figure.bbox.x1
    for word in ("ation", "normals", "left", "right") if "right" in names[-1] else ():
        assert any(word in name for name in short)  # what tells them apart is what is kept
    sides = plot.conflicts(torch.eye(len(names)), names=names)
    assert len({label.get_text() for label in sides.get_yticklabels()}) == len(names)


def test_what_all_names_begin_with_is_left_out() -> None:
    ax = plot.weights(torch.tensor([[1.0, 2.0]]), axis(), names=[f"{LONG}depth", f"{LONG}segmentation"])
    assert texts(ax) == ["…depth", "…segmentation"]
    assert texts(plot.weights(torch.tensor([[1.0, 2.0]]), axis(), names=["head.a", "head.b"])) == ["head.a", "head.b"]


def test_names_follow_the_curves_when_the_limits_change() -> None:
    """As they do when panels share an axis, or somebody zooms."""
    ax = plot.weights(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), names=["a", "b"])
    for limits in ((0, 3), (0, 30), (-3, 2.5)):
        ax.set_ylim(limits)
        ax.figure.draw_without_rendering()
        low, high = ((box := text.get_window_extent()).y0 + box.y1 for text in ax.texts)
        ends = ax.transData.transform([(1, 1), (1, 2)])[:, 1]
        assert (low + high) / 4 == pytest.approx(ends.mean(), abs=3)
        assert low < high
    assert all(text.arrow_patch is None for text in ax.texts)  # no line from a curve to its name


def pixels(figure: Figure) -> np.ndarray:
    """(height, width) luminance, the first row on top."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgb = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    return rgb @ [0.2126, 0.7152, 0.0722]


STYLES = ["default", "dark_background", "ggplot", "Solarize_Light2", "black axis", "transparent"]


@pytest.mark.parametrize("style", STYLES)
def test_every_name_can_be_read_in_every_style(style: str) -> None:
    with matplotlib.style.context(
        "dark_background" if style == "transparent" else style if style in STYLES[:4] else []
    ):
        figure = Figure(figsize=(6, 4))
        ax = figure.subplots()
        if style == "black axis":
            ax.set_facecolor("black")
        if style == "transparent":  # as it is saved to be put on a dark slide
            figure.set_facecolor("none")
            ax.set_facecolor("none")
        plot.grad_norms(trained(), ax, names=NAMES)
        if style == "transparent":
            figure.set_facecolor("black")
        seen = pixels(figure)
        for text in ax.texts:
            box = text.get_window_extent()
            part = seen[int(len(seen) - box.y1) : int(len(seen) - box.y0), int(box.x0) : int(box.x1)]
            assert part.size > 100
            assert part.max() - part.min() > 0.25, text.get_text()
        for line in task_lines(ax):
            face = _theme.paper(ax)
            assert _theme.contrast(line.get_color(), face) > (1.4 if style in ("ggplot", "Solarize_Light2") else 2)


def test_sizes_follow_the_style() -> None:
    sizes = []
    for size in (10, 20):
        with matplotlib.rc_context({"font.size": size, "lines.linewidth": size / 5}):
            ax = plot.weights(trained(3), axis(), names=NAMES)
            sizes.append((ax.texts[0].get_fontsize(), task_lines(ax)[0].get_linewidth()))
    np.testing.assert_allclose(np.array(sizes[1]), 2 * np.array(sizes[0]))


# ---- long runs, steps


STEPPED = {
    "weights": (plot.weights, lambda n: torch.rand(n, 2) + 1),
    "grad_norms": (plot.grad_norms, lambda n: torch.rand(n, 2) + 1),
    "loss_ratios": (plot.loss_ratios, lambda n: torch.rand(n, 2) + 1),
    "inverse_rates": (plot.inverse_rates, lambda n: torch.rand(n, 2) + 1),
    "shares": (plot.shares, lambda n: torch.rand(n, 2) + 1),
    "compare": (plot.compare, lambda n: {"a": torch.rand(2, n) + 1}),
    "conflict_course": (plot.conflict_course, lambda n: torch.eye(2).expand(n, 2, 2)),
    "conflict_course of many": (plot.conflict_course, lambda n: torch.eye(6).expand(n, 6, 6)),
    "overview": (plot.overview, lambda n: {"weights": torch.rand(n, 2) + 1, "losses": torch.rand(n, 2) + 1}),
}


@pytest.mark.parametrize("case", STEPPED)
def test_steps_and_a_logarithmic_x_axis_everywhere(case: str) -> None:
    function, make = STEPPED[case]
    for options, x in (
        ({}, [0, 4]),
        ({"log_x": True}, [1, 5]),
        ({"steps": [2, 10, 50, 60, 300], "log_x": True}, [2, 300]),
    ):
        out = function(make(5), **options)
        ax = out.axes[0] if isinstance(out, Figure) else out
        assert ax.get_xscale() == ("log" if "log_x" in options else "linear")
        drawn_x = [line.get_xdata()[[0, -1]] for line in task_lines(ax) if len(line.get_xdata()) == 5]
        edges = [
            (band.get_paths()[0].vertices[:, 0].min(), band.get_paths()[0].vertices[:, 0].max())
            for band in ax.collections
        ]
        for found in [*drawn_x, *edges]:
            np.testing.assert_allclose(found, x)
        assert drawn_x or edges
        assert all(x[0] <= tick <= x[1] for tick in ax.get_xticks())
        ax.figure.draw_without_rendering()
    with pytest.raises(ValueError, match="steps has 3 entries"):
        function(make(5), steps=[1, 2, 3])
    with pytest.raises(ValueError, match="increase"):
        function(make(3), steps=[1, 3, 2])
    with pytest.raises(ValueError, match=r"begins at 0.*log_x=False"):
        function(make(3), steps=[0, 1, 2], log_x=True)


@pytest.mark.parametrize("log_x", [False, True])
def test_a_long_run_is_drawn_in_bins_with_their_range(log_x: bool) -> None:
    values = torch.rand(20_000, 2, dtype=torch.float64).numpy() + 1
    values[12_345, 0], values[777, 1], values[300:900, 1] = 50.0, np.inf, np.nan
    ax = plot.weights(values, axis(), names=["a", "b"], log_x=log_x)
    assert "in bins" in ax.get_xlabel()
    finite = np.where(np.isfinite(values), values, np.nan)
    steps = np.arange(20_000.0) + log_x
    for name, column, band in zip("ab", finite.T, ax.collections, strict=True):
        (line,) = (line for line in ax.lines if line.get_label() == name)
        x, y = line.get_data()
        assert 200 < len(x) <= 300
        edges = np.geomspace(1, 20_000, 301) if log_x else np.linspace(0, 19_999, 301)
        part = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, 299)
        for k in np.unique(part):
            member = column[part == k]
            at = np.abs(x - (np.exp(np.log(steps[part == k]).mean()) if log_x else steps[part == k].mean())).argmin()
            if np.isfinite(member).any():
                assert y[at] == pytest.approx(np.nanmedian(member))
            else:
                assert np.isnan(y[at])
        corners = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
        assert corners.max() == np.nanmax(column)  # not even the one spike is lost
        assert corners.min() == np.nanmin(column)


def test_long_runs_of_many_seeds_are_drawn_in_bins() -> None:
    runs = torch.rand(5, 5000).double().numpy()
    runs[2, 400:] = np.nan
    ax = plot.compare({"a": runs}, axis())
    corners = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    assert len(corners) < 1300
    assert corners[:, 1].max() == pytest.approx(np.nanmax(runs))
    assert len(task_lines(ax)[0].get_xdata()) == 300
    assert texts(ax) == ["a (4/5 left)"]


def test_running_mean_and_quantiles_against_loops() -> None:
    values = 10.0 ** np.linspace(8, -8, 40)[:, None] * np.random.default_rng(0).random((40, 3))
    values[5:9, 1], values[20, 2] = np.nan, np.inf
    for width in (1, 2, 3, 7, 39, 40, 1000):
        found = _read.running_mean(values, width)
        for i, k in np.ndindex(values.shape):
            window = values[max(0, i + 1 - width) : i + 1, k]
            window = window[np.isfinite(window)]
            expected = window.mean() if np.isfinite(values[i, k]) else np.nan
            np.testing.assert_allclose(found[i, k], expected, rtol=1e-12)
    samples = np.where(np.isfinite(values), values, np.nan).T.copy()
    samples[:, 3] = np.nan
    expected = np.full((5, 40), np.nan)
    for k in range(40):
        column = samples[np.isfinite(samples[:, k]), k]
        expected[:, k] = np.percentile(column, [0, 25, 50, 75, 100]) if len(column) else np.nan
    np.testing.assert_allclose(_read.quantiles(samples), expected, rtol=1e-12)


# ---- figures


BESIDE = {
    "conflicts": lambda ax, names: plot.conflicts(torch.eye(3), ax, names=names),
    "layers": lambda ax, names: plot.layers(torch.rand(3, 3) + 0.1, ax, names=names, layer_names=names),
    "pareto": lambda ax, names: plot.pareto(torch.rand(5, 2), ax, methods={name: [0.5, 0.5] for name in names}),
    "results": lambda ax, names: plot.results(dict(zip("ab", torch.rand(2, 4, 3) + 1, strict=True)), ax, names=names),
    "sweep": lambda ax, names: plot.sweep({"a": [1, 2], "b": [3, 4], "metric": [1e9, 2e9]}, ax),
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", BESIDE)
def test_nothing_is_cut_off_when_saved(kind: str, own: bool) -> None:
    """In a figure of the library, and in one of the user's without a layout."""
    figure = BESIDE[kind](
        Figure(figsize=(5, 4)).subplots() if own else None, [f"{n} of the left eye" for n in NAMES]
    ).figure
    figure.draw_without_rendering()
    box, whole = figure.get_tightbbox(), figure.bbox_inches
    assert box.x0 >= whole.x0 - 0.02 and box.y0 >= whole.y0 - 0.02  # noqa: PT018
    assert box.x1 <= whole.x1 + 0.02 and box.y1 <= whole.y1 + 0.02  # noqa: PT018


def test_the_legend_of_pareto_hides_no_point() -> None:
    ax = plot.pareto(torch.rand(20, 2) + 0.1, methods={"GradNorm": [0.5, 0.5], "equal": [0.2, 1.0]})
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().x0 >= ax.bbox.x1


def test_no_figure_stays_open() -> None:
    for function, make in STEPPED.values():
        function(make(4))
    for draw in BESIDE.values():
        draw(None, NAMES)
    assert not pyplot.get_fignums()


def test_where_pyplot_shows_figures_it_has_them_and_bad_input_leaves_none(monkeypatch: Any) -> None:
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    figure = plot.weights(trained(3)).figure
    assert pyplot.figure(figure.number) is figure
    pyplot.close("all")
    for bad in BAD:
        with pytest.raises(ValueError, match=bad.values[1]):
            bad.values[0]()
        assert not pyplot.get_fignums(), bad.id


# ---- overview


def test_overview_shows_all_four_and_says_what_is_missing() -> None:
    figure = plot.overview(trained(), names=NAMES, smooth=3)
    assert all(set(texts(ax)) == set(NAMES) for ax in figure.axes)
    assert len({ax.get_title() for ax in figure.axes} - {""}) == 4
    figure.draw_without_rendering()
    figure = plot.overview(trained(balancer=gn.static()))
    assert "norms=True" in texts(figure.axes[1])[0].replace("\n", " ")
    figure.draw_without_rendering()


def test_panels_that_share_an_axis_show_all_their_data() -> None:
    first, second = Figure().subplots(1, 2, sharex=True, sharey=True)
    plot.weights(torch.rand(5, 3) + 1, first)
    plot.weights(100 * torch.rand(9, 3) + 1, second)
    for ax in (first, second):
        for line in task_lines(ax):
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
    case(r"13 methods", lambda: plot.compare({str(i): torch.ones(3, 2) for i in range(13)})),
    case(r"leave it out", lambda: plot.compare({"a": torch.full((3, 2), torch.nan)})),
    case(r"\(N, 2\)", lambda: plot.pareto(torch.ones(3, 3))),
    case(r"two finite losses", lambda: plot.pareto([[torch.nan, 1.0]])),
    case(r"shares has shape", lambda: plot.pareto(torch.ones(3, 2), shares=[0.1])),
    case(r"at least two methods", lambda: plot.results({"a": [1.0, 2.0]})),
    case(r"baseline='c' is none of", lambda: plot.results({"a": [1.0], "b": [1.0]}, baseline="c")),
    case(r"of the same seeds", lambda: plot.results({"a": torch.ones(3, 2), "b": torch.ones(2, 2)})),
    case(r"must be positive", lambda: plot.results({"a": [0.0, 1.0], "b": [1.0, 1.0]})),
    case(r"leave these seeds out", lambda: plot.results({"a": [1.0, 1.0], "b": [torch.nan, 1.0]})),
    case(r"pass gn.sweep\(..., metric=", lambda: plot.sweep({"a": [1.0, 2.0]})),
    case(r"x='c' is none of the hyper", lambda: plot.sweep({"a": [1], "b": [2], "metric": [1.0]}, x="c")),
    case(r"varies a: a map has two", lambda: plot.sweep({"a": [1, 2], "metric": [1.0, 2.0]})),
    case(r"columns of shapes", lambda: plot.sweep({"a": [1, 2], "b": [1], "metric": [1.0, 2.0]})),
    case(r"every run is not finite", lambda: plot.sweep({"a": [1], "b": [1], "metric": [torch.nan]})),
    case(r"negative number", lambda: plot.shares([[1.0, -1.0]])),
    case(r"nothing to share", lambda: plot.shares([[0.0, 0.0]])),
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
