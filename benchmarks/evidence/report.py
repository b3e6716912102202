"""The tables and the verdict, from what was measured: `python -m benchmarks.evidence.report FILE ... > results.md`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import defaults, results
from .markdown import table
from .methods import CONTROLS, METHODS
from .problems import CONDITIONS, PINNS
from .results import REFERENCE, Key, Records

PINN_WORDS = (
    "The error is the distance from the known solution, relative to its length: a field of 0 has 100 %. It is no part "
    "of the means above: where one seed finds the solution and the next does not, they would be means of it alone."
)
DRAWS = 4000  # of the bootstrap
SEARCHED = ", searched"  # behind the name of a method with settings to choose from, as of its reference


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"

    @property
    def verdict(self) -> str:
        return "wins" if self.high < 0 else "loses" if self.low > 0 else "ties"


def changes(record: dict[str, Any], reference: dict[str, Any]) -> Tensor:
    """(seeds, tasks) log ratio of the test errors, in %: below 0 is better than the reference."""
    out: Tensor = 100 * (torch.tensor(record["test"]) / torch.tensor(reference["test"])).log()
    return out


def bootstrap(rows: Sequence[Tensor]) -> Interval:
    """The mean over data sets of (seeds,) each, both drawn anew: seeds of a data set are paired, and so drawn once."""
    draw = torch.Generator().manual_seed(0)
    means = []
    for row in rows:  # (draws, slots): the mean of this data set, for each time that it may be drawn
        chosen = torch.randint(len(row), (DRAWS, len(rows), len(row)), generator=draw)
        means.append(row[chosen].mean(-1))
    sets = torch.randint(len(rows), (DRAWS, len(rows)), generator=draw)
    drawn = torch.stack(means).gather(0, sets[None])[0].mean(-1) if len(rows) > 1 else means[0][:, 0]
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(float(torch.stack([row.mean() for row in rows]).mean()), low, high)


def ordered(names: Iterable[str]) -> list[str]:
    """Methods as the table of methods has them, others behind."""
    known = list(METHODS)
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def pairs(records: Records, optimizer: str, condition: str, method: str, against: str) -> dict[str, Tensor]:
    """(seeds, tasks) changes by data set, against equal weights or, if told so, the method itself, on normalised
    losses."""
    out = {}
    for key, record in records.items():
        if (key.optimizer, key.condition, key.method) == (optimizer, condition, method):
            reference = records.get(key._replace(condition="normalised", method=against))
            if reference is not None and len(reference["test"]) == len(record["test"]):
                out[key.data] = changes(record, reference)
    return out


def against_equal(records: Records, optimizer: str, condition: str, method: str) -> dict[str, Tensor]:
    """(seeds, tasks) changes by data set against equal weights, whose search was as long as the method's."""
    found = {}
    if method.endswith(SEARCHED) and method != REFERENCE + SEARCHED:
        found = pairs(records, optimizer, condition, method, REFERENCE + SEARCHED)
    return found or pairs(records, optimizer, condition, method, REFERENCE)


def main_table(records: Records, optimizer: str, condition: str) -> tuple[str, dict[str, Interval]]:
    """Every method in one condition, against equal weights on normalised losses; the mean of those alone that were run
    on all data sets."""
    mine = [key for key in records if (key.optimizer, key.condition) == (optimizer, condition)]
    names = sorted({key.data for key in mine})
    others = [name for name in names if name not in defaults.DEVELOPMENT]
    rows = [["", "change, %", "", "held out", "worst data set", "worst task", *names]]
    found = {}
    for method in ordered(key.method for key in mine):
        by_data = against_equal(records, optimizer, condition, method)
        if not by_data:
            continue
        worst = max(by_data, key=lambda name: float(by_data[name].mean()))
        of_tasks = {}
        for name, change in by_data.items():
            tasks = tasks_of(records, optimizer, condition, method, name)
            of_tasks |= {(name, task): float(value) for task, value in zip(tasks, change.mean(0), strict=True)}
        task = max(of_tasks, key=lambda place: of_tasks[place])
        marked = [
            f"{float(by_data[name].mean()):+.1f}" + "†" * records[Key(name, optimizer, condition, method)]["at_edge"]
            if name in by_data
            else ""
            for name in names
        ]
        pooled = ["", "", ""]
        if len(by_data) == len(names):
            found[method] = interval = bootstrap([change.mean(1) for change in by_data.values()])
            itself = (method, condition) == (REFERENCE, "normalised")
            held_out = bootstrap([by_data[name].mean(1) for name in others]) if others else None
            pooled = [str(interval), "" if itself else interval.verdict, str(held_out or "")]
        rows.append(
            [
                method,
                *pooled,
                f"{float(by_data[worst].mean()):+.1f} {worst}",
                f"{of_tasks[task]:+.0f} {task[0]}, {task[1]}",
                *marked,
            ]
        )
    return table(rows), found


def tasks_of(records: Records, optimizer: str, condition: str, method: str, name: str) -> list[str]:
    """The columns of the errors."""
    return list(records[Key(name, optimizer, condition, method)]["tasks"])


def pinn_table(records: Records, name: str) -> str:
    """The distance from the known solution, of every seed."""
    keys = [key for key in records if key.data == name]
    columns = [(o, c) for o in sorted({key.optimizer for key in keys}) for c in CONDITIONS]
    columns = [column for column in columns if any(key[1:3] == column for key in keys)]
    rows = [[f"{name}, error of each seed, %", *(f"{optimizer}, {condition}" for optimizer, condition in columns)]]
    for method in ordered(key.method for key in keys):
        mine = [records.get(Key(name, *column, method)) for column in columns]
        rows.append([method, *("" if record is None else each_seed(record) for record in mine)])
    return table(rows)


def each_seed(record: dict[str, Any]) -> str:
    """The errors of a PINN, in %."""
    errors = [100 * row[0] for row in record["test"]]
    return ", ".join(f"{error:.0f}" if error >= 10 else f"{error:.1f}" for error in errors)


def rescaling_table(records: Records, optimizer: str) -> str:
    """What other scales of the losses do to a method: against itself on normalised losses."""
    conditions = [c for c in CONDITIONS[1:] if any(k[1:3] == (optimizer, c) for k in records)]
    rows = [["", *(f"{condition}, %, and worst data set" for condition in conditions)]]
    for method in ordered(key.method for key in records if key.optimizer == optimizer):
        cells = []
        for condition in conditions:
            by_data = pairs(records, optimizer, condition, method, method)
            means = {name: float(change.mean()) for name, change in by_data.items()}
            worst = max(means, key=lambda name: abs(means[name]), default="")
            cells.append(f"{sum(means.values()) / len(means):+.1f}, {means[worst]:+.1f} {worst}" if means else "")
        if any(cells):
            rows.append([method, *cells])
    return table(rows)


def cost_table(records: Records) -> str:
    """Time of a step, and of the whole search."""
    names = sorted({key.data for key in records})
    rows = [["", "step / step of equal weights: " + ", ".join(names), "search, minutes"]]
    for method in ordered(key.method for key in records):
        mine = {key: record for key, record in records.items() if key.method == method}
        cells = []
        for name in names:
            costs = [r["step_cost"] for k, r in mine.items() if k.data == name and r["step_cost"] is not None]
            cells.append(f"{sorted(costs)[len(costs) // 2]:.2f}" if costs else "–")
        rows.append([method, ", ".join(cells), f"{sum(r['wall_s'] for r in mine.values()) / 60:.1f}"])
    return table(rows)


def task_tables(records: Records, optimizer: str, condition: str) -> str:
    """Every task of every data set: the change in %, mean over the seeds."""
    out = []
    for name in sorted({key.data for key in records if key[1:3] == (optimizer, condition)}):
        rows: list[Sequence[str]] = []
        for method in ordered(key.method for key in records if key.data == name):
            change = against_equal(records, optimizer, condition, method).get(name)
            if change is not None:
                rows = rows or [[name, *tasks_of(records, optimizer, condition, method, name)]]
                rows.append([method, *(f"{value:+.1f}" for value in change.mean(0).tolist())])
        if rows:
            out.append(table(rows))
    return "\n\n".join(out)


def verdict(found: dict[str, Interval], condition: str) -> str:
    """Who wins, ties and loses, in those words."""
    balanced = {name: interval for name, interval in found.items() if name not in CONTROLS}
    lines = []
    for word in ("wins", "ties", "loses"):
        rows = sorted((interval.mean, name) for name, interval in balanced.items() if interval.verdict == word)
        listed = ", ".join(f"{name} ({mean:+.1f})" for mean, name in rows)
        lines.append(f"- {word}: {listed or 'none'}")
    controls = ", ".join(f"{name} ({interval})" for name, interval in found.items() if name in CONTROLS)
    what = "equal weights on normalised losses"
    return f"On {condition} losses, balancing against {what}:\n\n" + "\n".join(lines) + f"\n- controls: {controls}"


def optimizers_table(records: Records) -> str:
    """SGD against Adam, both with equal weights on normalised losses."""
    rows = [["equal weights, normalised losses", "SGD against Adam, %"]]
    for key in sorted(records):
        if key[1:] == ("sgd", "normalised", REFERENCE):
            other = records.get(key._replace(optimizer="adam"))
            if other is not None:
                rows.append([key.data, str(bootstrap([changes(records[key], other).mean(1)]))])
    return table(rows) if len(rows) > 1 else ""


def report(records: Records) -> str:
    """The whole page."""
    if not records:
        return "Nothing was measured."
    sample = next(iter(records.values()))
    of = lambda field: ", ".join(sorted({str(record[field]) for record in records.values()}))
    parts = [
        "# Tables",
        "Made by `python -m benchmarks.evidence.report` of what `python -m benchmarks.evidence` measured.",
        f"Steps: {of('steps')}; paired seeds: {of('seeds')}, of initialisation and batches; "
        f"{', '.join(f'{name} {version}' for name, version in sample['versions'].items())}.",
        "A change is the mean over tasks of the log ratio of test errors to those of equal weights on normalised "
        "losses, in %, below 0 is better; with its 95 % bootstrap interval over data sets and seeds. A method wins or "
        "loses if its interval does not hold 0, and ties otherwise. The learning rate is tuned for every row on the "
        "validation part, on a grid that grows until the best is not at its edge († where it ended there). Rows named "
        '"searched" have four settings beside it, and are compared with "equal, searched". A method that was not run '
        "on all data sets has no mean. Held out are the data sets on which no default was chosen.",
    ]
    pinns = {key: record for key, record in records.items() if key.data in PINNS}
    records = {key: record for key, record in records.items() if key.data not in PINNS}
    for optimizer in sorted({key.optimizer for key in records}):
        present = {key.condition for key in records if key.optimizer == optimizer}
        conditions = [condition for condition in CONDITIONS if condition in present]
        for condition in conditions:
            shown, found = main_table(records, optimizer, condition)
            parts += [f"## {optimizer}, {condition}", verdict(found, condition), shown]
        if len(conditions) > 1:
            parts += [
                f"## {optimizer}: what the scale of the losses does",
                "Against the same method on normalised losses; the data set where it differs most.",
                rescaling_table(records, optimizer),
            ]
        for condition in conditions:
            parts += [f"## {optimizer}, {condition}: every task", task_tables(records, optimizer, condition)]
    if pinns:
        parts += ["## PINN", PINN_WORDS, *(pinn_table(pinns, name) for name in sorted({key.data for key in pinns}))]
    if candidates := defaults.page(records):
        parts += ["## How the defaults were chosen", candidates]
    if optimizers := optimizers_table(records):
        parts += ["## Adam and SGD", optimizers]
    parts += ["## Time", "Eager steps of one run; the search beside other work.", cost_table(records)]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    print(report(results.load(*parser.parse_args(argv).files)))


if __name__ == "__main__":
    main()
