"""What one step descends, the gradient norm above γ and the loss below, and its derivative by the scales."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core.tracing import free_to_ask, inside_transform
from gradnorm_func._gradinit.problem import Problem
from gradnorm_func._gradinit.settings import Settings
from gradnorm_func._measure.tape import tape, without_graph

# () what is descended, and (P,) its derivative by the scales
Branch: TypeAlias = tuple[Tensor, Tensor]


class Objective(NamedTuple):
    """The objective at θ_m."""

    loss: Tensor  # () L(S; θ_m)
    grad_norm: Tensor  # () ‖∇L(S; θ_m)‖_p
    above: Tensor  # () bool: grad_norm > γ
    value: Tensor  # () what is descended
    scale_grads: Tensor  # (P,) ∂ value / ∂ m_i


def objective_of(problem: Problem, batch: Any, batch_after: Any, settings: Settings) -> Objective:
    """The branch that counts, where it costs nothing to ask which; elsewhere both, and one is selected."""
    trained = [problem.current[i] for i in problem.leaves.trained]
    recorded = tape(lambda leaves: problem.gradient_with_graph(leaves, batch), trained)
    loss, grads = without_graph(recorded.aux), recorded.outputs
    norm, direction = norm_and_direction(grads, settings.p, settings.loss_scale)
    above = norm > settings.gamma
    asked = bool(above) if free_to_ask(above) else None

    branches: list[Branch] = []
    if asked is not False:
        branches.append((norm, problem.per_scale(recorded.pull(direction, last=True)) / problem.loss_scale))
    del recorded  # and its graph, before there is another
    if asked is not True and settings.form == "simple":
        branches.append((loss, problem.per_scale([*grads]) / problem.loss_scale))
    elif asked is not True:
        rate = settings.eta if settings.normalize or settings.p == 1 else settings.eta * norm
        moved = [(x - rate * step).to(x.dtype) for x, step in zip(trained, direction, strict=True)]
        after = batch if batch_after is None else batch_after
        branches.append(_loss_after(problem, moved, after, settings.eta, above, norm))

    value, scale_grads = branches[0]
    if asked is None:
        value, scale_grads = (torch.where(above, a, b) for a, b in zip(*branches, strict=True))
    return Objective(loss, norm, above, value.to(torch.promote_types(norm.dtype, loss.dtype)), scale_grads)


def norm_and_direction(
    grads: Sequence[Tensor], p: int, loss_scale: float | Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """‖g‖_p of g = grads / loss_scale, and ∂‖g‖_p/∂g: g/‖g‖₂ or sign(g).

    With a loss scale, the gradient of a parameter counts as 0 unless all of it is finite.
    """
    dtype = reduce(torch.promote_types, (grad.dtype for grad in grads), torch.float32)
    promoted = [grad.to(dtype) for grad in grads]
    if loss_scale is not None:
        promoted = [torch.where(grad.isfinite().all(), grad / loss_scale, 0.0) for grad in promoted]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad, p) for grad in promoted]), p)
    if p == 1:
        direction = [grad.sign() for grad in promoted]
    else:
        length = torch.where(norm > 0, norm, 1.0)
        direction = [grad / length for grad in promoted]
    return norm, [step.to(grad.dtype) for step, grad in zip(direction, grads, strict=True)]


def _loss_after(
    problem: Problem, moved: list[Tensor], batch: Any, eta: float | Tensor, above: Tensor, norm: Tensor
) -> Branch:
    """L(S̃; θ') / η, and its derivative by the scales."""

    def run(*moved: Tensor) -> Branch:
        grads, loss = problem.gradient(list(moved), batch)
        return (loss / eta).to(norm.dtype), problem.per_scale([*grads]) / (problem.loss_scale * eta)

    def skip(*_: Tensor) -> Branch:
        return torch.zeros_like(norm), torch.zeros_like(problem.scales)

    # Compiled for a CPU, where asking costs nothing, the branch that does not count is not run.
    if torch.compiler.is_compiling() and above.device.type == "cpu" and not inside_transform():
        value, scale_grads = torch.cond(above, skip, run, tuple(moved))
        return value, scale_grads
    return run(*moved)
