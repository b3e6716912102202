"""Names: shortened so that they still differ, and written at the ends of the curves."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, IdentityTransform

from gradnorm_func.plot._read import Array
from gradnorm_func.plot._theme import Look, font, ink, paper

LONGEST = 24  # characters of a name
SEPARATOR = re.compile(r".*[._/\-: ]", re.DOTALL)
KEY, GAP = 9.0, 8.0  # points from the end of the data to a name's key, and on to the name


class End(NamedTuple):
    """A curve's name, and where it ends."""

    name: str
    spot: tuple[float, float] | None  # None: nothing of it is seen
    look: Look


def short_names(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Names of at most `longest` characters: without what all begin with, cut in the middle, never two alike."""
    if all(len(name) <= longest for name in names):
        return list(names)
    common = SEPARATOR.match(_common_start(names)) if len(set(names)) > 1 else None
    start = common.end() if common else 0
    own = [f"…{name[start:]}" if start > 1 else name for name in names]
    short = {name: _cut(text, longest) for name, text in zip(names, own, strict=True)}
    alike = Counter(short.values())
    for text in [text for text, count in alike.items() if count > 1]:
        group = [name for name in short if short[name] == text]
        short |= zip(group, _around_differences(group, longest), strict=True)
    alike = Counter(short.values())
    for k, name in enumerate(short):  # what differs is itself longer than the room: then by number
        if alike[short[name]] > 1:
            short[name] = f"{short[name][: longest - 4]}… {k}"
    return [short[name] for name in names]


def _cut(name: str, longest: int) -> str:
    tail = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def _common_start(names: Sequence[str]) -> str:
    return os.path.commonprefix(list(names))  # noqa: RUF071 (letter by letter is what is wanted)


def _around_differences(names: Sequence[str], longest: int) -> list[str]:
    """The part in which the names differ, and as much of what is around it as there is room for."""
    start = len(_common_start(names))
    stop = min(len(_common_start([name[start:][::-1] for name in names])), min(map(len, names)) - start)
    out = []
    for name in names:
        end = len(name) - stop
        room = max(0, longest - 2 - (end - start))
        left = max(0, start - (room - min(room // 2, stop)))
        right = min(len(name), end + room - (start - left))
        text = f"{'…' if left else ''}{name[left:right]}{'…' if right < len(name) else ''}"
        out.append(_cut(text, longest))
    return out


def last_finite(x: Array, y: Array) -> tuple[float, float] | None:
    """The last point of a curve."""
    finite = np.flatnonzero(np.isfinite(y))
    return (float(x[finite[-1]]), float(y[finite[-1]])) if len(finite) else None


def name_ends(ax: Axes, ends: Sequence[End], span: tuple[float, float], note: str = "") -> None:
    """Names in a margin on the right, in the order and near the height of the curves' ends, each after the
    marker of its curve."""
    seen = [(end.name, end.spot, end.look) for end in ends if end.spot is not None]
    width = max(ax.bbox.width * 72 / ax.figure.dpi, 1.0)  # points
    longest = min(LONGEST, max(8, int(0.4 * width / (0.56 * font()))))
    texts = short_names([name for name, _, _ in seen], longest)
    room = KEY + GAP + 0.58 * font() * max(map(len, texts), default=0) + 4
    last = _widen(ax, span, min(0.55, room / width))
    names = _Names(ax, [spot for _, spot, _ in seen], last)
    for i, (text, (_, spot, look)) in enumerate(zip(texts, seen, strict=True)):
        ax.annotate(
            text,
            xy=spot,
            xytext=(0, 0),
            textcoords=partial(names.place, i, KEY + GAP),
            va="center",
            ha="left",
            fontsize=font(),
            color=ink(ax),
            annotation_clip=False,
            bbox={"facecolor": paper(ax), "edgecolor": "none", "pad": 0.5},
        )
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": "none", "zorder": 4}
        ax.add_artist(_Key(partial(names.place, i, KEY), markersize=5, label="_key", **style))
    if note:  # where no title can collide with it
        ax.set_xlabel(f"{ax.get_xlabel()}\n({note})")


class _Names:
    """Where the names stand. Found anew at every drawing, for limits and sizes change until then."""

    def __init__(self, ax: Axes, spots: Sequence[tuple[float, float]], last: float) -> None:
        self.ax, self.spots, self.last = ax, spots, last

    def place(self, index: int, right: float, _renderer: Any) -> Affine2D:
        """The transform that takes (0, 0) to a spot `right` points right of the data, level with curve `index`."""
        box, point = self.ax.bbox, self.ax.figure.dpi / 72
        pixels = self.ax.transData.transform(self.spots)
        heights = np.clip((pixels[:, 1] - box.y0) / box.height, 0, 1)
        order = np.argsort(heights, kind="stable")
        gap = min(1.25 * font() * point / box.height, 1 / len(order))
        level = spread([float(heights[i]) for i in order], gap)[int(np.flatnonzero(order == index)[0])]
        left = self.ax.transData.transform((self.last, self.spots[index][1]))[0]
        return Affine2D().translate(left + right * point, box.y0 + level * box.height)


class _Key(Line2D):
    """The marker beside a name."""

    def __init__(self, place: Any, **style: Any) -> None:
        super().__init__([0.0], [0.0], transform=IdentityTransform(), **style)
        self.place = place
        self.set_in_layout(False)

    def draw(self, renderer: Any) -> None:
        self.set_data(*self.place(renderer).transform([[0.0, 0.0]]).T)
        super().draw(renderer)


def _widen(ax: Axes, span: tuple[float, float], margin: float) -> float:
    """Leaves the share `margin` of the axis free on its right; returns where the data end."""
    for other in ax.get_shared_x_axes().get_siblings(ax):  # panels of unequal length
        if other is not ax and other.lines:
            span = min(span[0], other.dataLim.x0), max(span[1], other.dataLim.x1)
    log = ax.get_xscale() == "log"
    first, last = np.log10(span) if log else span
    extent = (last - first) or 1.0
    side = 0.02 if last > first else 0.15
    left, right = first - side * extent, last + side * extent
    limits = np.array([left, right, left + (right - left) / (1 - margin)])
    left, right, far = 10.0**limits if log else limits
    ax.set_xlim(left, far)
    ax.set_xticks(_ticks(*span, log))
    ax.spines["bottom"].set_bounds(left, right)
    return float(right)


def _ticks(first: float, last: float, log: bool) -> list[float]:
    """Round numbers within the data."""
    if log:
        decades = range(int(np.floor(np.log10(first))), int(np.ceil(np.log10(last))) + 1)
        subs = (1, 2, 5) if last < 300 * first else (1,)
        ticks = [sub * 10.0**decade for decade in decades for sub in subs]
    else:
        ticks = list(
            MaxNLocator(5, steps=[1, 2, 5, 10], integer=last - first >= 5 or last == first).tick_values(first, last)
        )
    return [float(tick) for tick in ticks if first <= tick <= last] or [first]


def spread(heights: list[float], gap: float) -> list[float]:
    """Sorted heights in [0, 1], moved as little as it takes to be `gap` apart."""
    groups: list[list[float]] = []  # [middle, members]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (m, k), (n, j) = groups.pop(), groups.pop()
            groups.append([(m * k + n * j) / (k + j), k + j])
        half = gap * groups[-1][1] / 2
        groups[-1][0] = min(max(groups[-1][0], half), max(1 - half, half))
    out = [middle + (i - (size - 1) / 2) * gap for middle, size in groups for i in range(int(size))]
    for i in range(len(out) - 2, -1, -1):  # groups pushed down from the top
        out[i] = min(out[i], out[i + 1] - gap)
    return out
