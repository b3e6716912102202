"""Six tasks with six units on real handwritten digits: data, model, loss. `compare` trains it.

Two digits share one image, the left one in the upper left corner and the right one in the lower right. Their losses
at the start lie four decades apart: that is what makes equal weights a bad idea.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import gradnorm_func as gn

SIZE, CANVAS = 8, 12  # pixels of a digit and of the image that holds two of them
PIXELS = CANVAS * CANVAS
GREY_LEVELS = 16  # of the scans; images are scaled to [0, 1]
WIDTH = 128

Batch = dict[str, Tensor]
Params = dict[str, Tensor]

# The layers: (inputs, outputs). The trunk is shared, every task has an affine head of its own.
TRUNK = {"trunk.0": (PIXELS, WIDTH), "trunk.1": (WIDTH, WIDTH)}
HEADS = {"left": 10, "right": 10, "sum": 1, "parity": 1, "active": 1, "image": PIXELS}

# What is reported of each task, all of them errors: name, unit.
METRICS = {
    "left": ("left digit", "% wrong"),
    "right": ("right digit", "% wrong"),
    "sum": ("sum of the digits", "mean abs error"),
    "parity": ("product odd or even", "% wrong"),
    "active": ("active pixels", "mean abs error, pixels"),
    "image": ("reconstruction", "RMSE, grey levels of 16"),
}


class Digits(NamedTuple):
    """Single digits. Pairs are made within a split, so no handwriting of the test set is ever trained on."""

    images: Tensor  # (N, 8, 8) in [0, 1]
    labels: Tensor  # (N,) int64


def load(seed: int = 0) -> dict[str, Digits]:
    """scikit-learn's 1797 digits, split 60/20/20 into train, validation and test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32) / GREY_LEVELS
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second = len(labels) * 3 // 5, len(labels) * 4 // 5
    parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
    return {name: Digits(images[part], labels[part]) for name, part in parts.items()}


def pairs(digits: Digits, count: int, generator: torch.Generator) -> Batch:
    """`count` random pairs, overlaid, with the six targets in their natural units."""
    left, right = torch.randint(len(digits.labels), (2, count), generator=generator)
    shift = CANVAS - SIZE
    upper_left = F.pad(digits.images[left], (0, shift, 0, shift))
    lower_right = F.pad(digits.images[right], (shift, 0, shift, 0))
    image = torch.maximum(upper_left, lower_right).flatten(1)
    a, b = digits.labels[left], digits.labels[right]
    return {
        "image": image,
        "left": a,
        "right": b,
        "sum": (a + b).float(),  # 0 ... 18
        "parity": (a * b % 2).float(),
        "active": (image > 0).sum(1).float(),  # about 60
    }


def init_params(seed: int) -> Params:
    """The parameters: a flat dict with dotted names, as `named_parameters()` of a module gives it."""
    torch.manual_seed(seed)
    layers = {name: torch.nn.Linear(*shape) for name, shape in TRUNK.items()}
    layers |= {f"heads.{task}": torch.nn.Linear(WIDTH, size) for task, size in HEADS.items()}
    return {
        f"{name}.{kind}": value.detach() for name, layer in layers.items() for kind, value in layer.named_parameters()
    }


def affine(params: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def predict(params: Params, task: str, z: Tensor) -> Tensor:
    """The output of one head: logits, or numbers in the unit of the target."""
    return affine(params, f"heads.{task}", z).squeeze(-1)


# The loss, with a visible seam: shared part, last shared layer, heads. This is all that the library needs to know.
W = "trunk.1.weight"
last_shared = gn.shared_linear(W, "trunk.1.bias", activation=F.gelu)


def backbone(params: Params, batch: Batch) -> Tensor:
    return F.gelu(affine(params, "trunk.0", batch["image"]))


heads = {
    "left": lambda params, z, batch: F.cross_entropy(predict(params, "left", z), batch["left"]),
    "right": lambda params, z, batch: F.cross_entropy(predict(params, "right", z), batch["right"]),
    "sum": lambda params, z, batch: F.mse_loss(predict(params, "sum", z), batch["sum"]),
    "parity": lambda params, z, batch: F.binary_cross_entropy_with_logits(
        predict(params, "parity", z), batch["parity"]
    ),
    "active": lambda params, z, batch: F.mse_loss(predict(params, "active", z), batch["active"]),
    "image": lambda params, z, batch: F.mse_loss(predict(params, "image", z), batch["image"]),
}
loss_fn = gn.multi_task_loss(backbone, heads, last_shared=last_shared)


@torch.no_grad()
def errors(params: Params, batch: Batch) -> Tensor:
    """Each task's error as `METRICS` says, (T,) in its order; lower is better."""
    z = last_shared(params, backbone(params, batch))
    out = {task: predict(params, task, z) for task in HEADS}
    wrong = {
        "left": out["left"].argmax(1) != batch["left"],
        "right": out["right"].argmax(1) != batch["right"],
        "parity": (out["parity"] > 0) != (batch["parity"] > 0),
    }
    found = {task: 100 * miss.float().mean() for task, miss in wrong.items()}
    found |= {task: (out[task] - batch[task]).abs().mean() for task in ("sum", "active")}
    found["image"] = GREY_LEVELS * (out["image"] - batch["image"]).square().mean().sqrt()
    return torch.stack([found[task] for task in METRICS])
