"""One graph for a step that runs many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compiled(step: Callable[P, R], **options: Any) -> Callable[P, R]:
    """A step of this package as one graph. Dynamo counts recompilations by code object, and the ninth loop of a session
    would be refused: each gets one of its own."""
    step.__code__ = step.__code__.replace()
    graph: Callable[P, R] = torch.compile(step, fullgraph=True, **options)
    return graph
