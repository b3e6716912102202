"""DTensors: parameters that are spread over a device mesh, by tensor parallelism or FSDP2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gradnorm_func._core import tree
from gradnorm_func._measure.plan import Measured, Plan


def sharded(leaves: Iterable[Any]) -> list[int]:
    """Indices of the leaves that are DTensors."""
    # By name: the class lives in a module that is slow to import, and exists only where somebody has imported it.
    return [i for i, leaf in enumerate(leaves) if type(leaf).__name__ == "DTensor"]


def whole(x: Tensor) -> Tensor:
    """The plain tensor: of a DTensor all of it, the same on every rank. A collective."""
    full: Tensor = x.full_tensor() if sharded([x]) else x  # type: ignore[attr-defined]
    return full


def explain_sharded(plan: Plan, error: Exception) -> ValueError:
    """What to do where torch cannot differentiate at DTensors."""
    path = tree.paths(plan.params(plan.leaves))[sharded(plan.leaves)[0]]
    return ValueError(
        f"params[{path!r}] is a DTensor, at which differentiation failed: {error}. If FSDP2 or a tensor-parallel plan "
        "sharded it, keep that module under plain autograd: gn.fork and gn.measure_losses. If "
        "loss_fn itself computes with DTensors, and all ranks have the same batch, run this under "
        "torch.distributed.tensor.experimental.implicit_replication()"
    )


def whole_stats(measured: Measured) -> Measured:
    """What an engine has measured at DTensors, as plain tensors; only `grads` are as the parameters are."""
    grads = measured.stats.grads
    stats = tree.tree_map(whole, measured.stats._replace(grads=()))
    return measured._replace(stats=stats._replace(grads=grads), losses=tree.tree_map(whole, measured.losses))
