"""Every plot as a small picture, against one that somebody has looked at (`tests/pictures`).

What test_plot.py asserts of lines and texts holds for every matplotlib. A picture holds for one: fonts, ticks and
layouts move by pixels from version to version. So the pictures are thumbnails, compared block by block with a tolerance
that letters stay under and a lost name, band or colour does not, and under another matplotlib they are skipped.
`python tests/test_plot_pictures.py` draws them anew; look at them before committing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import matplotlib
import matplotlib.style

matplotlib.use("Agg")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from gradnorm_func import plot

PICTURES = Path(__file__).parent / "pictures"
VERSION = PICTURES / "matplotlib.txt"
SMALLER, BLOCK = 4, 5  # a pixel of a thumbnail is 4 x 4 of the figure, a block 5 x 5 of the thumbnail
TOLERANCE = 10.0  # of 255, on average over a block
TASKS = ["depth", "normals", "segmentation"]


def course(count: int = 3, steps: int = 80, noise: float = 0.1) -> np.ndarray:
    """(steps, count) curves that fan out."""
    draw = np.random.default_rng(count).standard_normal((steps, count))
    slopes = np.linspace(-2, 2, count)
    return np.exp(slopes * np.linspace(0, 1, steps)[:, None] + noise * draw)


def history() -> dict[str, np.ndarray]:
    return {
        "weights": course(),
        "grad_norms": course()[::-1],
        "losses": 1 / course(),
        "targets": course(noise=0) ** 0.3,
    }


def cosines(steps: int, count: int) -> np.ndarray:
    return np.stack([np.corrcoef(part) for part in np.random.default_rng(1).standard_normal((steps, count, 5)) + 0.3])


def seeds(count: int) -> np.ndarray:
    return np.exp(0.1 * np.random.default_rng(count).standard_normal((4, 3)))


DRAWN: dict[str, Callable[[], Any]] = {
    "weights": lambda: plot.weights(history(), names=TASKS),
    "grad_norms": lambda: plot.grad_norms(history(), names=TASKS, smooth=4),
    "loss_ratios": lambda: plot.loss_ratios(history(), names=TASKS, log_x=True),
    "inverse_rates": lambda: plot.inverse_rates(history(), names=TASKS),
    "overview": lambda: plot.overview(history(), names=TASKS),
    "many": lambda: plot.weights(course(40)),
    "long": lambda: plot.weights(course(3, 5000, 0.4), names=TASKS),
    "shares": lambda: plot.shares(history(), names=TASKS),
    "conflicts": lambda: plot.conflicts(cosines(1, 3)[0], names=TASKS),
    "conflict_course": lambda: plot.conflict_course(cosines(30, 6)),
    "layers": lambda: plot.layers({"trunk": [1.0, 20.0, 300.0], "head": [3.0, 0.0, 0.0]}, names=TASKS),
    "compare": lambda: plot.compare({"equal": course(9).T[:5], "GradNorm": course(9).T[:5] / 4}, label="error"),
    "pareto": lambda: plot.pareto(
        [[1, 40], [3, 9], [9, 3], [40, 1], [20, 20]],
        methods={"GradNorm": [[2, 3], [3, 4]]},
        shares=[0.9, 0.7, 0.5, 0.3, 0],
    ),
    "results": lambda: plot.results({"equal": seeds(1), "GradNorm": seeds(2) * [0.3, 0.8, 1.6]}, names=TASKS),
    "sweep": lambda: plot.sweep({"alpha": [0, 0, 1, 1, 2, 2], "lr": [1, 2] * 3, "metric": [5.0, 4, 3, 1, 4, 9]}),
}
CASES = [f"{name}-{style}" for name in DRAWN for style in ("default", "dark_background")]


def thumbnail(case: str) -> Image.Image:
    name, style = case.split("-")
    with matplotlib.style.context(["default", style]):
        out = DRAWN[name]()
        figure = getattr(out, "figure", out)
        figure.set_dpi(80)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return image.resize((image.width // SMALLER, image.height // SMALLER), Image.Resampling.BOX)


def difference(one: Image.Image, other: Image.Image) -> float:
    """The largest mean difference of a block, of 255."""
    off = np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).max(-1)
    rows, columns = (side // BLOCK for side in off.shape)
    blocks = off[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    return float(blocks.mean((1, 3)).max())


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@pytest.mark.parametrize("case", CASES)
def test_a_plot_looks_as_it_was_when_looked_at(case: str) -> None:
    drawn_with = VERSION.read_text().strip()
    if minor(drawn_with) != minor(matplotlib.__version__):
        pytest.skip(f"the pictures are of matplotlib {drawn_with}, whose fonts and layout are its own")
    found, expected = thumbnail(case), Image.open(PICTURES / f"{case}.png").convert("RGB")
    assert found.size == expected.size
    assert difference(found, expected) < TOLERANCE


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    VERSION.write_text(f"{matplotlib.__version__}\n")
    for case in CASES:
        thumbnail(case).save(PICTURES / f"{case}.png", optimize=True)
