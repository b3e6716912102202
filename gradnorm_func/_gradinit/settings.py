"""The hyperparameters of a step, together and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from torch import Tensor

from gradnorm_func._core.tree import Where
from gradnorm_func._gradinit.rescale_adam import AnyOptimizer

Form: TypeAlias = Literal["paper", "simple"]

# The authors' values, by p; a 1-norm grows with the number of parameters.
DEFAULT_GAMMA = {1: 1000.0, 2: 1.0}
DEFAULT_ETA = {1: 1e-3, 2: 0.1}


class Settings(NamedTuple):
    """How a step is made; `gradinit_step` explains each."""

    form: Form
    p: int
    gamma: float | Tensor
    eta: float | Tensor
    normalize: bool
    min_scale: float
    min_bias_scale: float
    max_scale: float | None
    loss_scale: float | Tensor | None

    def checked(self) -> Settings:
        """The same; raises for what cannot be right. Tensors are not looked at: that would wait for the device."""
        if self.form not in ("paper", "simple"):
            raise ValueError(f"form={self.form!r} must be 'paper' or 'simple'")
        if self.p not in (1, 2):
            raise ValueError(f"p={self.p!r} must be 2, if training will use SGD, or 1, for Adam")
        _check_positive("gamma", self.gamma, "it is the threshold of the norm; below it the loss is minimised instead")
        _check_positive("eta", self.eta, "it is the learning rate of the simulated step")
        _check_positive("loss_scale", 1.0 if self.loss_scale is None else self.loss_scale, "None leaves it out")
        for name, value in (("min_scale", self.min_scale), ("min_bias_scale", self.min_bias_scale)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]: every scale starts at 1")
        if self.max_scale is not None and not self.max_scale >= 1:
            raise ValueError(
                f"max_scale={self.max_scale} must be at least 1: every scale starts at 1; None sets no bound"
            )
        return self


class Options(TypedDict, total=False):
    """The keyword arguments of `gradinit_step`, for those who pass them on."""

    form: Form
    p: int
    gamma: float | Tensor | None
    eta: float | Tensor | None
    normalize: bool
    where: Where
    frozen: Where
    optimizer: AnyOptimizer | None
    min_scale: float
    min_bias_scale: float
    max_scale: float | None
    biases: Where
    weights: Any
    loss_scale: float | Tensor | None


def or_default(value: float | Tensor | None, defaults: Mapping[int, float], p: int) -> float | Tensor:
    """The value, or the authors' for this p."""
    return defaults.get(p, 1.0) if value is None else value


def _check_positive(name: str, value: float | Tensor, reason: str) -> None:
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name}={value} must be positive: {reason}")
