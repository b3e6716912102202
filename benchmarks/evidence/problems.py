"""What is trained: a model and its losses on one data set, or a PINN, in a form that knows nothing of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import gradnorm_func as gn

from .. import equations
from . import data

WIDTH, BATCH = 64, 128
LARGE = 100.0  # by how much the one loss is larger, or smaller

Params = dict[str, Tensor]


class Problem(NamedTuple):
    """T losses, each about 1 where nothing is learned, and their errors where they were not trained."""

    name: str
    tasks: list[str]  # in the order of every per-task vector
    params: Callable[[int], Params]  # of a seed
    loss_fn: Callable[[Tensor], Any]  # scale (T,) -> the losses, each times its own
    batches: Callable[[int, int], Iterator[Any]]  # (seed, steps)
    errors: Callable[[Params], dict[str, Tensor]]  # "val" and "test", (T,) each; for a PINN (1,)
    units: list[float]  # (T,) the scale of the losses in their raw units

    def scale(self, condition: str) -> list[float]:
        """(T,) what every loss is multiplied with."""
        count = len(self.tasks)
        return {
            "normalised": [1.0] * count,
            "raw": self.units,
            "x100": [LARGE] + [1.0] * (count - 1),
            "x100last": [1.0] * (count - 1) + [LARGE],
            "x0.01": [1 / LARGE] + [1.0] * (count - 1),
            "x128": [128.0] + [1.0] * (count - 1),  # which rounds nothing
        }[condition]


CONDITIONS = ("normalised", "raw", "x100", "x100last", "x0.01", "x128")


def regression(name: str) -> Problem:
    """An MLP with a shared trunk and affine heads on a data set."""
    source = data.ALL[name]()
    tasks = sorted(source.classes)
    inputs = source.train["x"].shape[1]

    def params(seed: int) -> Params:
        torch.manual_seed(seed)
        layers = {"trunk.0": torch.nn.Linear(inputs, WIDTH), "trunk.1": torch.nn.Linear(WIDTH, WIDTH)}
        layers |= {f"heads.{task}": torch.nn.Linear(WIDTH, source.classes[task] or 1) for task in tasks}
        return {f"{layer}.{k}": v.detach() for layer, module in layers.items() for k, v in module.named_parameters()}

    def affine(params: Params, layer: str, x: Tensor) -> Tensor:
        return F.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"])

    def trunk(params: Params, batch: data.Split) -> Tensor:
        return F.gelu(affine(params, "trunk.1", F.gelu(affine(params, "trunk.0", batch["x"]))))

    def head(task: str) -> Callable[[Params, Tensor, data.Split], Tensor]:
        classes = source.classes[task]

        def loss(params: Params, z: Tensor, batch: data.Split) -> Tensor:
            out = affine(params, f"heads.{task}", z)
            if classes:
                return F.cross_entropy(out, batch[task]) / source.units[task]
            return F.mse_loss(out.squeeze(-1), batch[task])

        return loss

    heads = {task: head(task) for task in tasks}

    def loss_fn(scale: Tensor) -> Any:
        def scaled(i: int, task: str) -> Callable[[Params, Tensor, data.Split], Tensor]:
            return lambda params, z, batch: scale[i] * heads[task](params, z, batch)

        return gn.multi_task_loss(trunk, {task: scaled(i, task) for i, task in enumerate(tasks)})

    def batches(seed: int, steps: int) -> Iterator[data.Split]:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(len(source.train["x"]), (BATCH,), generator=draw)
            yield {key: column[rows] for key, column in source.train.items()}

    def errors(params: Params) -> dict[str, Tensor]:
        out = {}
        for part, split in (("val", source.val), ("test", source.test)):
            z = trunk(params, split)
            out[part] = torch.stack([heads[task](params, z, split) for task in tasks])
        return out

    return Problem(name, tasks, params, loss_fn, batches, errors, [source.units[task] for task in tasks])


def pinn(name: str) -> Problem:
    """An equation of `benchmarks/equations.py`: its one error is the relative L2 distance from the known solution."""
    equation = equations.EQUATIONS[name]()
    tasks = sorted(equation.residuals)

    def loss_fn(scale: Tensor) -> Any:
        def scaled(i: int, task: str) -> Callable[[Params, Any], Tensor]:
            factor = 1 / equation.scales[task]
            return lambda params, batch: (
                scale[i] * factor * equation.residuals[task](params, batch[task]).square().mean()
            )

        return gn.multi_task_loss(None, {task: scaled(i, task) for i, task in enumerate(tasks)})

    def batches(seed: int, steps: int) -> Iterator[Any]:
        draw = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield {task: points[0] for task, points in equation.sample(1, draw).items()}

    def errors(params: Params) -> dict[str, Tensor]:
        """On every other row of the grid, and on the rows between them."""
        out = {}
        for part, first in (("val", 0), ("test", 1)):
            truth = equation.solution[first::2]
            found = equations.field(params, equation.grid[first::2])
            out[part] = (torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))[None]
        return out

    units = [equation.scales[task] for task in tasks]
    return Problem(name, tasks, equations.init_params, loss_fn, batches, errors, units)


PINNS = tuple(equations.EQUATIONS)


def make(name: str) -> Problem:
    """A problem by its name."""
    return pinn(name) if name in PINNS else regression(name)
