"""The defaults of GradNorm, by the rule in README.md."""

from __future__ import annotations

import torch

from .markdown import table
from .results import REFERENCE, Key, Records

DEVELOPMENT = ("digits", "diabetes", "enb", "teacher")
# What stands for them in the records -> (alpha, learning rate)
CANDIDATES = {f"gn.gradnorm(alpha={alpha})": (alpha, 0.025) for alpha in (0.0, 0.12, 0.5, 1.0, 1.5)}
CANDIDATES |= {f"gn.gradnorm(alpha={alpha}, optimizer=gn.adam(0.1))": (alpha, 0.1) for alpha in (0.12, 0.5, 1.5)}
UNTIL_THEN = (0.5, 0.025)
WORST = 1.0  # % above equal weights that the worst data set may be
TIE = 0.5  # % between two means


def validation(records: Records, method: str) -> dict[str, float]:
    """The mean change of the validation errors against equal weights, in %, by data set."""
    out = {}
    for name in DEVELOPMENT:
        mine, even = (records[Key(name, "adam", "normalised", which)]["val"] for which in (method, REFERENCE))
        out[name] = float(100 * (torch.tensor(mine) / torch.tensor(even)).log().mean())
    return out


def chosen(changes: dict[str, dict[str, float]]) -> str:
    """The candidate that the rule takes."""
    mean = {method: sum(row.values()) / len(row) for method, row in changes.items()}
    worst = {method: max(row.values()) for method, row in changes.items()}
    standing = [method for method in changes if worst[method] <= WORST]
    if not standing:
        return min(worst, key=lambda method: worst[method])
    best = min(mean[method] for method in standing)
    return min((method for method in standing if mean[method] - best < TIE), key=distance)


def distance(method: str) -> float:
    """From the default until then: another learning rate is farther than any alpha."""
    alpha, rate = CANDIDATES[method]
    return abs(alpha - UNTIL_THEN[0]) + 10 * (rate != UNTIL_THEN[1])


def page(records: Records) -> str:
    """The table and the choice; nothing, if not all candidates were run."""
    keys = [Key(name, "adam", "normalised", method) for name in DEVELOPMENT for method in [REFERENCE, *CANDIDATES]]
    if not all(key in records for key in keys):
        return ""
    changes = {method: validation(records, method) for method in CANDIDATES}
    rows = [["validation errors against equal weights, %", "mean", "worst", *DEVELOPMENT]]
    for method, row in changes.items():
        numbers = [sum(row.values()) / len(row), max(row.values()), *(row[name] for name in DEVELOPMENT)]
        rows.append([f"`{method}`", *(f"{number:+.1f}" for number in numbers)])
    return f"{table(rows)}\n\nThe rule, written down before the runs, takes `{chosen(changes)}`."
