"""The models that the benchmarks time: (params, batch, loss) with a visible seam, and the path of the last layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, linear, scaled_dot_product_attention

import gradnorm_func as gn

Params = dict[str, Tensor]


class Case(NamedTuple):
    params: Params
    batch: tuple[Tensor, Tensor]
    loss: Any  # a multi_task_loss
    last: str  # path of the last shared weight
    num_tasks: int


def mlp(num_tasks: int, width: int, batch: int, *, stacked: bool = False, outputs: int = 100, device="cpu") -> Case:
    """250 → 4 x width ReLU trunk → T affine heads, mean squared errors: the shape of the paper's toy."""
    make = _Maker(device)
    sizes = [250, width, width, width, width]
    params = make.layers("trunk", sizes)

    def backbone(p: Params, b: Any) -> Tensor:
        h = b[0]
        for i in range(3):
            h = torch.relu(linear(h, p[f"trunk.{i}.weight"], p[f"trunk.{i}.bias"]))
        return h

    params |= make.heads(num_tasks, width, outputs, stacked)
    x, y = make.normal(batch, 250), make.normal(num_tasks, batch, outputs)
    last = gn.shared_linear("trunk.3.weight", "trunk.3.bias", torch.relu)
    loss = gn.multi_task_loss(backbone, heads_of(num_tasks, stacked), last_shared=last)
    return Case(params, (x, y), loss, "trunk.3.weight", num_tasks)


def cnn(num_tasks: int, width: int, batch: int, device="cpu") -> Case:
    """Three convolutions on 16 x 16 images, pooled, one linear layer shared by T affine heads."""
    make = _Maker(device)
    channels = [3, width // 4, width // 2, width]
    params = {
        f"trunk.{i}.weight": make.normal(channels[i + 1], channels[i], 3, 3) / (3 * channels[i] ** 0.5)
        for i in range(3)
    } | make.layers("last", [width, width])

    def backbone(p: Params, b: Any) -> Tensor:
        h = b[0]
        for i in range(3):
            h = torch.relu(conv2d(h, p[f"trunk.{i}.weight"], padding=1, stride=1 if i == 0 else 2))
        return h.mean((2, 3))

    params |= make.heads(num_tasks, width, 100, False)
    x, y = make.normal(batch, 3, 16, 16), make.normal(num_tasks, batch, 100)
    last = gn.shared_linear("last.0.weight", "last.0.bias", torch.relu)
    loss = gn.multi_task_loss(backbone, heads_of(num_tasks, False), last_shared=last)
    return Case(params, (x, y), loss, "last.0.weight", num_tasks)


def transformer(num_tasks: int, width: int, batch: int, *, length: int = 16, device="cpu") -> Case:
    """Two pre-norm blocks of four heads; the last shared layer is linear at every position; heads read the mean."""
    make = _Maker(device)
    params: Params = make.layers("embed", [32, width]) | make.layers("last", [width, width])
    for i in range(2):
        params |= make.layers(f"block{i}.qkv", [width, 3 * width]) | make.layers(f"block{i}.out", [width, width])
        params |= make.layers(f"block{i}.mlp", [width, 2 * width, width])

    def norm(h: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(h, h.shape[-1:])

    def backbone(p: Params, b: Any) -> Tensor:
        def affine(name: str, h: Tensor) -> Tensor:
            return linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

        h = affine("embed.0", b[0])
        for i in range(2):
            q, k, v = (
                t.unflatten(-1, (4, -1)).transpose(1, 2) for t in affine(f"block{i}.qkv.0", norm(h)).chunk(3, -1)
            )
            mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + affine(f"block{i}.out.0", mixed)
            h = h + affine(f"block{i}.mlp.1", torch.nn.functional.gelu(affine(f"block{i}.mlp.0", norm(h))))
        return norm(h)

    params |= make.heads(num_tasks, width, 10, False)
    x, y = make.normal(batch, length, 32), make.normal(num_tasks, batch, 10)
    last = gn.shared_linear("last.0.weight", "last.0.bias", torch.nn.functional.gelu)
    loss = gn.multi_task_loss(backbone, heads_of(num_tasks, False, pool=True), last_shared=last)
    return Case(params, (x, y), loss, "last.0.weight", num_tasks)


def dense(num_tasks: int, width: int, batch: int, *, size: int = 32, device="cpu") -> Case:
    """Dense prediction: a residual convolutional trunk with batch norm, and a convolutional decoder for each task."""
    make = _Maker(device)
    params: Params = {"stem": make.normal(width, 3, 3, 3) / 27**0.5}
    for i in range(4):
        params[f"block{i}.conv"] = make.normal(width, width, 3, 3) / (9 * width) ** 0.5
        params |= {f"block{i}.scale": torch.ones(width, device=device), f"block{i}.shift": make.normal(width) / 10}
    for i in range(num_tasks):
        params[f"heads.{i}.inner"] = make.normal(width // 2, width, 3, 3) / (9 * width) ** 0.5
        params[f"heads.{i}.outer"] = make.normal(1, width // 2, 1, 1) / (width // 2) ** 0.5

    def backbone(p: Params, b: Any) -> Tensor:
        h = conv2d(b[0], p["stem"], padding=1)
        for i in range(4):
            normed = batch_norm(h, None, None, p[f"block{i}.scale"], p[f"block{i}.shift"], training=True)
            h = h + conv2d(torch.relu(normed), p[f"block{i}.conv"], padding=1)
        return h

    def head(i: int) -> Callable[[Params, Tensor, Any], Tensor]:
        def one(p: Params, z: Tensor, b: Any) -> Tensor:
            inner = torch.relu(conv2d(z, p[f"heads.{i}.inner"], padding=1))
            return (conv2d(inner, p[f"heads.{i}.outer"]) - b[1][i]).square().mean()

        return one

    x, y = make.normal(batch, 3, size, size), make.normal(num_tasks, batch, 1, size, size)
    loss = gn.multi_task_loss(backbone, [head(i) for i in range(num_tasks)])
    return Case(params, (x, y), loss, "block3.conv", num_tasks)


def heads_of(num_tasks: int, stacked: bool, pool: bool = False) -> Any:
    """T affine heads with mean squared errors; every one has its own target."""
    if stacked:
        return gn.stacked_heads(
            lambda p, z, b: (linear(z, p["weight"], p["bias"]) - b[1]).square().mean(), "heads", batch_dims=(None, 0)
        )

    def head(i: int) -> Callable[[Params, Tensor, Any], Tensor]:
        def one(p: Params, z: Tensor, b: Any) -> Tensor:
            pooled = z.mean(1) if pool else z
            return (linear(pooled, p[f"heads.{i}.weight"], p[f"heads.{i}.bias"]) - b[1][i]).square().mean()

        return one

    return [head(i) for i in range(num_tasks)]


class _Maker:
    """Seeded parameters and data."""

    def __init__(self, device: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def layers(self, name: str, sizes: list[int]) -> Params:
        out: Params = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
            out[f"{name}.{i}.weight"] = self.normal(fan_out, fan_in) / fan_in**0.5
            out[f"{name}.{i}.bias"] = torch.zeros(fan_out, device=self.device)
        return out

    def heads(self, num_tasks: int, width: int, outputs: int, stacked: bool) -> Params:
        if stacked:
            weight = self.normal(num_tasks, outputs, width) / width**0.5
            return {"heads.weight": weight, "heads.bias": torch.zeros(num_tasks, outputs, device=self.device)}
        return {
            name: leaf
            for i in range(num_tasks)
            for name, leaf in (
                (f"heads.{i}.weight", self.normal(outputs, width) / width**0.5),
                (f"heads.{i}.bias", torch.zeros(outputs, device=self.device)),
            )
        }
