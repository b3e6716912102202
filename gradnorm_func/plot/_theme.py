"""What a figure's style says, light or dark: its paper, its ink, and the tasks' looks on them."""

from __future__ import annotations

import colorsys
from typing import Any, NamedTuple, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb, to_rgba

Colour: TypeAlias = str

# Okabe & Ito's palette, which colour-blind readers can tell apart, without the yellow and the black that vanish on
# white and on dark paper. Dashes and markers tell the curves apart in grey, too.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A63C4", "#9C7A3C"]
DASHES: list[Any] = [
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
]
MARKERS = "os^Dv*PX"
GOLDEN = 0.618033988749895  # turns of the colour circle from one further task to the next: no two come close
LEAST_CONTRAST = 3.0  # of text and its background, below which it is hard to read


class Look(NamedTuple):
    """How one task or method is drawn, everywhere."""

    colour: Colour
    dash: Any
    marker: str


def look(index: int) -> Look:
    """The look of task `index`: a function of its place alone, so that it is the same in every panel."""
    return Look(_colour(index), DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)])


def _colour(index: int) -> Colour:
    if index < len(PALETTE):
        return PALETTE[index]
    further = index - len(PALETTE)
    lightness = (0.42, 0.55, 0.34)[further % 3]
    return to_hex(colorsys.hls_to_rgb((0.9 + GOLDEN * further) % 1, lightness, 0.6))


def ink(ax: Axes) -> Colour:
    """The colour of text on the axis: that of its labels, where that can be read."""
    of_labels, behind = to_hex(ax.xaxis.label.get_color()), paper(ax)
    if contrast(of_labels, behind) >= LEAST_CONTRAST:
        return of_labels
    return max("#000000", "#ffffff", key=lambda colour: contrast(colour, behind))


def paper(ax: Axes) -> Colour:
    """The colour behind the curves: the axis's face on the figure's, and under both what suits the labels."""
    behind = np.zeros(3) if luminance(ax.xaxis.label.get_color()) > 0.5 else np.ones(3)
    for face in (ax.figure.get_facecolor(), ax.get_facecolor()):
        *rgb, alpha = to_rgba(face)
        behind = (1 - alpha) * behind + alpha * np.array(rgb)
    return _hex(behind)


def grey(ax: Axes, share: float = 0.5) -> Colour:
    """Between ink (1) and paper (0)."""
    mixed = share * np.array(to_rgb(ink(ax))) + (1 - share) * np.array(to_rgb(paper(ax)))
    return _hex(mixed)


def _hex(rgb: Any) -> Colour:
    red, green, blue = rgb
    return to_hex((red, green, blue))


def font(scale: float = 0.9) -> float:
    """Points of a small text, in ratio to the style's size."""
    return scale * float(matplotlib.rcParams["font.size"])


def line_width(scale: float = 1.1) -> float:
    """Points, in ratio to the style's width."""
    return scale * float(matplotlib.rcParams["lines.linewidth"])


def luminance(colour: Any) -> float:
    """The relative luminance of WCAG, 0 black to 1 white."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: Any, other: Any) -> float:
    """The contrast ratio of WCAG, 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
