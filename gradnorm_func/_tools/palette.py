"""The colours and dashes of every figure; without matplotlib, so that importing them needs nothing."""

from __future__ import annotations

from typing import Any

# Okabe & Ito's palette, which colour-blind readers can tell apart; dashes do so in grey, too.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999"]
DASHES: list[Any] = [
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
]
