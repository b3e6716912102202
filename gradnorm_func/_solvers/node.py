"""A solver as one node of a compiled graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradnorm_func._core.tracing import inside_transform

# (gramian (T, T), active (T,) bool, further tensors) -> (weights (T,), certificate ()), in the Gramian's dtype
Solver: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


def node(solve: Solver) -> Solver:
    """The same function, called by a compiled graph as it is: to unroll its small steps would take half a minute.

    So a compiled step on a CPU may stop a solver when it is done, too. Inside a torch.func transform a compiler traces
    the solver as it does any other function, with a fixed number of steps.
    """
    names = inspect.signature(solve).parameters
    schema = f"({', '.join(f'Tensor {name}' for name in names)}) -> (Tensor, Tensor)"
    op: Any = torch.library.custom_op(f"gradnorm_func::{solve.__name__}", solve, mutates_args=(), schema=schema)
    op.register_fake(lambda gramian, *_: (gramian.new_empty(gramian.shape[:-1]), gramian.new_empty(())))

    @functools.wraps(solve)
    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        as_it_is = torch.compiler.is_compiling() and not inside_transform()
        found: tuple[Tensor, Tensor] = (op if as_it_is else solve)(*tensors)
        return found

    return call
