"""The data sets: fixed splits, standardised inputs and targets, and what every loss is in its raw unit.

Those in files (rf1, enb, adult, mnist) are looked for in the folder of `--folder`, or of the environment's
EVIDENCE_DATA, or in `../shared/data`; the others are bundled with scikit-learn or drawn from a random teacher.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CLAMP = 5.0  # standard deviations: later rows of a time series lie far outside of what was seen

Split = dict[str, Tensor]  # "x" (N, d) and every task's target (N,)


class Data(NamedTuple):
    """One multi-task data set; a normalised loss is about 1 for the best constant."""

    train: Split
    val: Split
    test: Split
    classes: dict[str, int]  # of every task: 0 for a regression, whose targets are standardised
    units: dict[str, float]  # what a normalised loss is to be multiplied with to be in its raw unit


_folder = Path(os.environ.get("EVIDENCE_DATA", Path(__file__).parents[3] / "shared" / "data"))


def use(path: str | None) -> None:
    """Takes the files from another folder."""
    global _folder
    _folder = _folder if path is None else Path(path)


def folder() -> Path:
    """Where the files are."""
    return _folder


def finished(parts: dict[str, Split], classes: dict[str, int]) -> Data:
    """Inputs and targets standardised by the training part, every loss normalised by that of the best constant."""
    x = parts["train"]["x"]
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 1e-6, std, 1.0)
    units = {}
    for task, count in classes.items():
        y = parts["train"][task]
        if count:
            share = torch.bincount(y, minlength=count) / len(y)
            units[task] = float(torch.special.entr(share).sum())
            continue
        middle, spread = y.mean(), y.std()
        units[task] = float(spread) ** 2
        for part in parts.values():
            part[task] = (part[task] - middle) / spread
    for part in parts.values():
        part["x"] = ((part["x"] - mean) / std).clamp(-CLAMP, CLAMP)
    return Data(**parts, classes=classes, units=units)


def rows_split(x: Tensor, targets: Split, classes: dict[str, int]) -> Data:
    """60/20/20 of the rows, in an order that is always the same."""
    count = len(x)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    parts = dict(zip(("train", "val", "test"), order.split(split_sizes(count)), strict=True))
    whole = {"x": x} | targets
    return finished({name: {k: v[rows] for k, v in whole.items()} for name, rows in parts.items()}, classes)


def split_sizes(count: int) -> list[int]:
    first, second = count * 3 // 5, count // 5
    return [first, second, count - first - second]


# ------------------------------------------------------------------------------------------------ from files


def arff(name: str) -> Tensor:
    """The rows of an .arff file without missing values."""
    lines = (folder() / name).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().lower() == "@data")
    cells = (line.split(",") for line in lines[start + 1 :] if line.strip())
    rows = torch.tensor([[float("nan") if cell.strip() == "?" else float(cell) for cell in row] for row in cells])
    return rows[~rows.isnan().any(1)]


def rf1(blocks: int = 20, ahead: int = 48) -> Data:
    """River flow at eight sites 48 hours ahead, split by time.

    In blocks of weeks, of which every fourth and fifth is for validation and test, without the hours that reach into
    the next one. With the last fifth of the record for the test, the weather is another one, networks are worse than a
    constant, and seeds differ by 50 %: that measures no training.
    """
    table = arff("rf1.arff")
    parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for i, block in enumerate(table.tensor_split(blocks)):
        parts[("train", "train", "train", "val", "test")[i % 5]].append(block[:-ahead])
    sites = [f"site{i}" for i in range(8)]
    splits = {}
    for name, found in parts.items():
        rows = torch.cat(found)
        splits[name] = {"x": rows[:, :64]} | {site: rows[:, 64 + i] for i, site in enumerate(sites)}
    return finished(splits, dict.fromkeys(sites, 0))


def enb() -> Data:
    """Heating and cooling load of buildings, which almost agree: a control without conflict."""
    table = arff("enb.arff")
    return rows_split(table[:, :8], {"heating": table[:, 8], "cooling": table[:, 9]}, {"heating": 0, "cooling": 0})


def adult(limit: int = 15000) -> Data:
    """Census: income, marital status (two classifications), hours per week and age (two regressions)."""
    with open(folder() / "adult.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file, skipinitialspace=True) if "?" not in row.values()][:limit]

    def codes(name: str) -> tuple[Tensor, int]:
        levels = sorted({row[name] for row in rows})
        return torch.tensor([levels.index(row[name]) for row in rows]), len(levels)

    def numbers(name: str) -> Tensor:
        return torch.tensor([float(row[name]) for row in rows])

    names = ("workclass", "education", "occupation", "race", "sex", "native-country")
    columns = [F.one_hot(*codes(name)).float() for name in names]
    columns += [numbers(name)[:, None] for name in ("education-num", "capital-gain", "capital-loss")]
    income, marital = codes("income-per-year"), codes("marital-status")
    targets = {"income": income[0], "marital": marital[0], "hours": numbers("hours-per-week"), "age": numbers("age")}
    return rows_split(torch.cat(columns, 1), targets, {"income": 2, "marital": marital[1], "hours": 0, "age": 0})


def mnist() -> Data:
    """Two digits in one image, halved in size: which, which, their sum, the parity of their product, the ink."""
    import numpy as np

    def read(kind: str, skip: int) -> Tensor:
        with gzip.open(folder() / f"mnist_t10k-{kind}-ubyte.gz") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=skip).copy())

    images = F.avg_pool2d(read("images-idx3", 16).view(-1, 1, 28, 28).float() / 255, 2)[:, 0]
    return pairs(images, read("labels-idx1", 8).long(), canvas=18, counts=(12000, 3000, 3000))


# ------------------------------------------------------------------------------------------------ bundled or drawn


def digits() -> Data:
    """The same of scikit-learn's digits, 8 x 8."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32) / 16
    return pairs(images, torch.as_tensor(raw.target).long(), canvas=12, counts=(6000, 2000, 2000))


def pairs(images: Tensor, labels: Tensor, canvas: int, counts: tuple[int, int, int]) -> Data:
    """Overlaid pairs, made within a split, so that no handwriting of the test part is ever trained on."""
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=draw)
    shift = canvas - images.shape[-1]

    def make(rows: Tensor, count: int) -> Split:
        a, b = rows[torch.randint(len(rows), (2, count), generator=draw)]
        x = torch.maximum(F.pad(images[a], (0, shift, 0, shift)), F.pad(images[b], (shift, 0, shift, 0))).flatten(1)
        left, right = labels[a], labels[b]
        ink = (x > 0.1).sum(1).float()
        return {
            "x": x,
            "left": left,
            "right": right,
            "sum": (left + right).float(),
            "parity": left * right % 2,
            "ink": ink,
        }

    parts = [make(*part) for part in zip(order.split(split_sizes(len(labels))), counts, strict=True)]
    classes = {"left": 10, "right": 10, "sum": 0, "parity": 2, "ink": 0}
    return finished(dict(zip(("train", "val", "test"), parts, strict=True)), classes)


def diabetes() -> Data:
    """442 patients: the disease's progression, and three of the ten measurements from the other seven."""
    from sklearn.datasets import load_diabetes

    raw = load_diabetes(scaled=False)
    table, names = torch.as_tensor(raw.data).float(), list(raw.feature_names)
    hidden = ("bmi", "bp", "s6")
    kept = [i for i, name in enumerate(names) if name not in hidden]
    targets = {name: table[:, names.index(name)] for name in hidden} | {
        "progression": torch.as_tensor(raw.target).float()
    }
    return rows_split(table[:, kept], targets, dict.fromkeys(targets, 0))


def teacher(count: int = 6000, tasks: int = 8) -> Data:
    """Regressions of a random network with noise, in units over four decades and of unequal difficulty."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, 16, generator=draw)
    hidden = torch.tanh(x @ torch.randn(16, 32, generator=draw) / 2)
    clean = hidden @ torch.randn(32, tasks, generator=draw) / 32**0.5
    noise = torch.logspace(-1.5, 0.5, tasks) * torch.randn(count, tasks, generator=draw)
    y = (clean + noise) * torch.logspace(-1, 1, tasks).flip(0)
    targets = {f"y{i}": y[:, i] for i in range(tasks)}
    return rows_split(x, targets, dict.fromkeys(targets, 0))


FILES: dict[str, Callable[[], Data]] = {"rf1": rf1, "enb": enb, "adult": adult, "mnist": mnist}
BUNDLED: dict[str, Callable[[], Data]] = {"digits": digits, "diabetes": diabetes, "teacher": teacher}
ALL = FILES | BUNDLED


def available() -> list[str]:
    """The data sets that can be had here."""
    return [*(FILES if (folder() / "rf1.arff").exists() else ()), *BUNDLED]
