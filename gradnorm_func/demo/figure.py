"""The figures of the demo. matplotlib is imported here only, without pyplot, so no display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def digits(
    path: str, errors: Mapping[str, Tensor], histories: Mapping[str, Any], names: Mapping[str, str], *, seed: int
) -> None:
    """Left, the result: each task's test error against equal weights. Right, why: whose gradient moves the trunk.

    `errors` are (seeds, T) in the order of `names`, `histories` those of one seed, in the order of the sorted tasks.
    """
    from matplotlib.figure import Figure

    from gradnorm_func import plot

    figure = Figure(figsize=(12.5, 1.2 + 2.3 * len(histories)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    left, right = halves
    ax = plot.results(errors, left.subplots(), names=list(names.values()))
    ax.set_title("The result: test error of each task", pad=22)
    first = next(iter(histories.values()))
    width = max(1, min(15, len(first.losses) // 10))
    axes = right.subplots(len(histories), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (method, history) in zip(axes, histories.items(), strict=True):
        plot.shares(history, ax, names=[names[task] for task in sorted(names)], smooth=width)
        ax.set_title(method)
        ax.set_ylabel("share of gradient (%)")
        ax.label_outer()
    right.suptitle(f"Why: whose gradient moves the shared layers (seed {seed})")
    figure.savefig(path, dpi=130)


def toy(path: str, curves: Mapping[str, Any], scales: Sequence[float]) -> None:
    """Left: the sum of L_i / L_i(0) of all methods. Right: GradNorm's weights, which undo the scales of the tasks."""
    from matplotlib.figure import Figure

    from gradnorm_func import plot

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    balanced = curves["GradNorm"]
    sums = {name: curve.losses.sum(1)[None] for name, curve in curves.items()}
    plot.compare(sums, left, steps=balanced.steps, label=r"$\Sigma_i\,L_i / L_i(0)$ on test data")
    left.set_title("The result (lower is better)")
    plot.weights(balanced.weights, right, steps=balanced.steps, names=[f"scale {scale:.3g}" for scale in scales])
    right.set_title("GradNorm's task weights, by the scale of the task")
    figure.savefig(path, dpi=130)
