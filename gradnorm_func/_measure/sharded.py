"""DTensors: parameters that are spread over a device mesh, by tensor parallelism or FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def run_sharded(engine: Callable[..., Measured], loss_fn: Any, params: Any, batch: Any, plan: Plan) -> Measured:
    """What an engine measures at DTensors, as plain tensors; only `grads` are as the parameters are."""
    try:
        measured = engine(loss_fn, params, batch, plan)
    except ValueError:
        raise
    except Exception as error:
        path = tree.paths(params)[sharded(tree.flatten(params)[0])[0]]
        raise ValueError(
            f"params[{path!r}] is a DTensor, at which torch.func failed: {error}. If FSDP2 or a tensor-parallel plan "
            "sharded it, keep that module under plain autograd: gn.fork and gn.measure_losses (or gn.measure_from). If "
            "loss_fn itself computes with DTensors, and all ranks have the same batch, run this under "
            "torch.distributed.tensor.experimental.implicit_replication()"
        ) from error
    return measured._replace(
        losses=tree.tree_map(whole, measured.losses),
        vector=whole(measured.vector),
        grad_norms=tree.tree_map(whole, measured.grad_norms),
        example_norms=tree.tree_map(whole, measured.example_norms),
        task_grads=tree.tree_map(whole, measured.task_grads),
    )
