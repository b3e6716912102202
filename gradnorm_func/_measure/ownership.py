"""Which parameters a part of a loss reads, so that each part is differentiated with respect to those alone.

A pullback computes every input's cotangent, asked for or not, and fills zeros for the unused: as much memory as the
parameters themselves. The graph tells what was read; a tripwire notices when a part later reads something new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph of the outputs."""
    todo = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                todo.append(parent)


def read_by(outputs: Iterable[Tensor], leaves: Sequence[Tensor]) -> set[int]:
    """Indices of the leaves that the autograd graph of the outputs reaches."""
    outputs = list(outputs)
    reached = {id(getattr(node, "variable", None)) for node in nodes(outputs)}
    # An output may be a leaf itself (a head that returns a parameter), and then has no graph.
    own = {id(out) for out in outputs}
    return {i for i, leaf in enumerate(leaves) if id(leaf) in reached or id(leaf) in own}


def tripwires(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Copies that make whatever reads them require grad, while nothing else in the pass does."""
    return [leaf.detach().requires_grad_() for leaf in leaves]
