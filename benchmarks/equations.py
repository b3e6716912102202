"""Two equations with known solutions, and a network that carries its own derivatives along.

The first and second derivatives of an MLP are propagated beside its values, in plain tensor operations: exact, and
`torch.compile` takes the whole training step as one graph in seconds, which nested torch.func derivatives do not allow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gradnorm_func as gn

WIDTH, DEPTH = 32, 4
VISCOSITY = 0.01 / math.pi
WAVES = (1, 2)  # of the solution of Helmholtz' equation, along x and y
POINTS, EDGE_POINTS = 256, 64  # of a batch: inside, and on each part of the edge

Params = dict[str, Tensor]
Residual = Callable[[Params, Any], Tensor]


class Jet(NamedTuple):
    """A function at some points, with derivatives along coordinates."""

    value: Tensor  # (...)
    first: Tensor  # (2, ...) along both coordinates
    second: Tensor  # (2, ...) pure second derivatives


class Equation(NamedTuple):
    """What a PINN is to solve."""

    name: str
    residuals: dict[str, Residual]  # (params, points (..., 2)) -> (...); a loss is the mean square of one
    sample: Callable[[int, torch.Generator], dict[str, Tensor]]  # seeds -> points, each (seeds, N, 2)
    grid: Tensor  # (rows, columns, 2) where it is compared with the solution
    solution: Tensor  # (rows, columns)
    axes: tuple[str, str]
    scales: dict[str, float]  # each loss where nothing is learned, by the sizes of its terms

    def loss_fn(self) -> Any:
        """The mean squares, as losses that share nothing but the parameters."""

        def loss(name: str) -> Callable[[Params, Any], Tensor]:
            return lambda params, batch: self.residuals[name](params, batch[name]).square().mean()

        return gn.multi_task_loss(None, {name: loss(name) for name in self.residuals})

    def error(self, params: Params) -> Tensor:
        """Relative L2 error on the grid."""
        found = field(params, self.grid)
        error: Tensor = torch.linalg.vector_norm(found - self.solution) / torch.linalg.vector_norm(self.solution)
        return error


def init_params(seed: int) -> Params:
    """Glorot's normal initialisation."""
    generator = torch.Generator().manual_seed(seed)
    widths = [2] + [WIDTH] * DEPTH + [1]
    params = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        scale = math.sqrt(2 / (inputs + outputs))
        params[f"{i}.weight"] = scale * torch.randn(inputs, outputs, generator=generator)
        params[f"{i}.bias"] = torch.zeros(outputs)
    return params


def network(params: Params, points: Tensor) -> Jet:
    """The MLP with tanh, and its derivatives by the chain rule, layer by layer."""
    weight, bias = params["0.weight"], params["0.bias"]
    value = points @ weight + bias
    first = weight.reshape(2, *[1] * (points.ndim - 1), -1).expand(2, *value.shape)
    second = torch.zeros_like(first)
    for i in range(1, DEPTH + 1):
        h = torch.tanh(value)
        slope = 1 - h * h
        second = slope * second - 2 * h * slope * first * first
        weight, bias = params[f"{i}.weight"], params[f"{i}.bias"]
        value, first, second = h @ weight + bias, (slope * first) @ weight, second @ weight
    return Jet(value[..., 0], first[..., 0], second[..., 0])


def field(params: Params, points: Tensor) -> Tensor:
    """The MLP alone."""
    for i in range(DEPTH):
        points = torch.tanh(points @ params[f"{i}.weight"] + params[f"{i}.bias"])
    out: Tensor = (points @ params[f"{DEPTH}.weight"] + params[f"{DEPTH}.bias"])[..., 0]
    return out


def uniform(seeds: int, count: int, low: tuple[float, float], high: tuple[float, float], draw: Any) -> Tensor:
    """(seeds, count, 2) points in a box."""
    lowest, highest = torch.tensor(low), torch.tensor(high)
    return lowest + (highest - lowest) * torch.rand(seeds, count, 2, generator=draw)


def burgers_solution(t: Tensor, x: Tensor, *, viscosity: float = VISCOSITY, nodes: int = 200) -> Tensor:
    r"""Burgers' equation solved by Hopf and Cole for u(0, x) = -sin πx, in float64.

    .. math:: u = -\frac{\int \sin \pi(x-\eta) f(x-\eta) e^{-\eta^2/4\nu t} d\eta}
                        {\int f(x-\eta) e^{-\eta^2/4\nu t} d\eta},
              \qquad f(y) = e^{-\cos(\pi y) / 2\pi\nu}

    by Gauss-Hermite quadrature.

    Args:
        t, x: broadcastable, t >= 0.
        viscosity: ν.
        nodes: of the quadrature.
    """
    from numpy.polynomial.hermite import hermgauss

    at, weights = (torch.from_numpy(array) for array in hermgauss(nodes))
    t, x = t.double().unsqueeze(-1), x.double().unsqueeze(-1)
    y = x - 2 * (viscosity * t).sqrt() * at
    # softmax: f spans e^100, and the quotient does not mind a factor.
    share = torch.softmax(weights.log() - torch.cos(math.pi * y) / (2 * math.pi * viscosity), -1)
    u: Tensor = -(share * torch.sin(math.pi * y)).sum(-1)
    return u


def burgers() -> Equation:
    """u_t + u u_x = ν u_xx with ν = 0.01/π, u(0, x) = -sin πx, u(t, ±1) = 0: a shock forms at x = 0."""

    def equation(params: Params, points: Tensor) -> Tensor:
        u = network(params, points)
        return u.first[0] + u.value * u.first[1] - VISCOSITY * u.second[1]

    def sample(seeds: int, draw: torch.Generator) -> dict[str, Tensor]:
        edge = uniform(seeds, EDGE_POINTS, (0, -1), (1, 1), draw)
        return {
            "equation": uniform(seeds, POINTS, (0, -1), (1, 1), draw),
            "boundary": torch.stack([edge[..., 0], edge[..., 1].sign()], -1),
            "initial": uniform(seeds, EDGE_POINTS, (0, -1), (0, 1), draw),
        }

    t, x = torch.meshgrid(torch.linspace(0, 1, 101), torch.linspace(-1, 1, 201), indexing="ij")
    residuals: dict[str, Residual] = {
        "equation": equation,
        "boundary": lambda params, points: network(params, points).value,
        "initial": lambda params, points: network(params, points).value + torch.sin(math.pi * points[..., 1]),
    }
    grid = torch.stack([t, x], -1)
    scales = dict.fromkeys(residuals, 1.0)
    return Equation("Burgers", residuals, sample, grid, burgers_solution(t, x).float(), ("t", "x"), scales)


def helmholtz() -> Equation:
    """u_xx + u_yy + u = f with u = sin(πx) sin(2πy) the solution, and 0 on the edge of the square."""
    a, b = (math.pi * waves for waves in WAVES)

    def exact(points: Tensor) -> Tensor:
        return torch.sin(a * points[..., 0]) * torch.sin(b * points[..., 1])

    def equation(params: Params, points: Tensor) -> Tensor:
        u = network(params, points)
        return u.second[0] + u.second[1] + u.value - (1 - a * a - b * b) * exact(points)

    def sample(seeds: int, draw: torch.Generator) -> dict[str, Tensor]:
        edge = uniform(seeds, EDGE_POINTS, (-1, -1), (1, 1), draw)
        upright = torch.stack([edge[:, ::2, 0].sign(), edge[:, ::2, 1]], -1)
        level = torch.stack([edge[:, 1::2, 0], edge[:, 1::2, 1].sign()], -1)
        return {
            "equation": uniform(seeds, POINTS, (-1, -1), (1, 1), draw),
            "boundary": torch.cat([upright, level], 1),
        }

    x, y = torch.meshgrid(torch.linspace(-1, 1, 101), torch.linspace(-1, 1, 201), indexing="ij")
    grid = torch.stack([x, y], -1)
    residuals: dict[str, Residual] = {
        "equation": equation,
        "boundary": lambda params, points: network(params, points).value,
    }
    scales = {"equation": (1 - a * a - b * b) ** 2 / 4, "boundary": 0.25}
    return Equation("Helmholtz", residuals, sample, grid, exact(grid.double()).float(), ("x", "y"), scales)


EQUATIONS = {"burgers": burgers, "helmholtz": helmholtz}
