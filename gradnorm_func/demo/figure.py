"""The figures of the demo. matplotlib is imported here only, without pyplot, so no display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradnorm_func._tools.palette import COLOURS, DASHES

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def smooth(values: Tensor, width: int) -> Tensor:
    """Running mean over the last `width` steps, (steps, ...)."""
    width = max(1, min(width, len(values)))
    sums = torch.cat([torch.zeros_like(values[:1]), values.double().cumsum(0)])
    ends = torch.arange(1, len(values) + 1)
    starts = (ends - width).clamp(min=0)
    return (sums[ends] - sums[starts]) / (ends - starts).reshape(-1, *[1] * (values.ndim - 1))


def digits(path: str, histories: dict[str, Any], tasks: Sequence[str], *, seed: int, width: int = 15) -> None:
    """One row a method: weights, shares of the gradient at W, and losses over training."""
    import matplotlib
    from matplotlib.figure import Figure

    width = max(1, min(width, len(next(iter(histories.values())).losses) // 10))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.4 + 2.35 * len(histories)), layout="constrained")
        axes = figure.subplots(len(histories), 3, sharex=True, sharey="col", squeeze=False)
        lines: list[Any] = []
        for row, (method, info) in zip(axes, histories.items(), strict=True):
            weighted = info.weights * info.grad_norms
            panels = [
                info.weights / info.weights.mean(1, keepdim=True),
                100 * weighted / weighted.sum(1, keepdim=True),
                info.losses / info.losses[0],
            ]
            for ax, values in zip(row, panels, strict=True):
                lines = [
                    ax.plot(curve, color=COLOURS[i], linestyle=DASHES[i % len(DASHES)])[0]
                    for i, curve in enumerate(smooth(values, width).T.numpy())
                ]
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                ax.set_xlim(0, len(values) - 1)
            row[0].set_ylabel(method, fontsize=12, fontweight="bold")
        titles = [
            "task weight $w_i$ (mean 1)",
            r"share of the gradient, $w_i\|\nabla_W L_i\|$ (%)",
            r"training loss $L_i\,/\,L_i(0)$",
        ]
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        for ax in axes[-1]:
            ax.set_xlabel(f"training step (seed {seed}, mean of {width} steps)")
        for row in axes:
            row[1].axhline(100 / len(tasks), color="0.6", linewidth=5, alpha=0.5, zorder=0)
        first = axes[0, 1]
        first.text(0.99, 0.03, "grey: equal share", transform=first.transAxes, ha="right", color="0.4", fontsize=9)
        figure.legend(lines, tasks, loc="outside upper center", ncols=len(tasks), handlelength=2.8, columnspacing=1.4)
        figure.savefig(path, dpi=130)


def toy(path: str, curves: dict[str, Any], scales: Sequence[float]) -> None:
    """Left: GradNorm's weights, coloured by the scale of the task. Right: the sum of L_i / L_i(0) of all methods."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        balanced = curves["GradNorm"]
        norm, shades = LogNorm(min(scales), 1.4 * max(scales)), matplotlib.colormaps["cividis"]
        for curve, scale in zip(balanced.weights.T, scales, strict=True):
            left.plot(balanced.steps, curve.numpy(), color=shades(float(norm(scale))))
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.set_title("GradNorm's task weights $w_i$ (mean 1)")
        left.set_xlabel("training step")
        bar = figure.colorbar(ScalarMappable(norm, shades), ax=left, label=r"scale $\sigma_i$ of the task", pad=0.02)
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter("{x:g}")
        bar.ax.minorticks_off()
        for i, (name, curve) in enumerate(curves.items()):
            values = curve.losses.sum(1).numpy()
            dash = DASHES[len(curves) - 1 - i]
            right.plot(curve.steps, values, color=COLOURS[[7, 3, 0][i]], linestyle=dash, linewidth=2.2, label=name)
        right.set_title(r"$\Sigma_i\,L_i / L_i(0)$ on test data (lower is better)")
        right.set_xlabel("training step")
        right.legend()
        figure.savefig(path, dpi=130)
