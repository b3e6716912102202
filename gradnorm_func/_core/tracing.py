"""Whether somebody traces us: a compiler, or a torch.func transform around this call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def traced() -> bool:
    """Whether a compiler or a torch.func transform is at work, so that autograd's own tape would not be seen."""
    return torch.compiler.is_compiling() or inside_transform()


def inside_transform() -> bool:
    """Whether a torch.func transform surrounds this call, so that what we return must stay differentiable."""
    # There is no public question for this. torch.compile traces this one, but wraps even a None that comes back, so
    # that `is None` is always False to it; an attribute of a real interpreter tells the two apart.
    return hasattr(torch._C._functorch.peek_interpreter_stack(), "key")


def no_graph() -> AbstractContextManager[Any]:
    """What keeps autograd from recording our own sums, unless a surrounding transform differentiates through them."""
    return nullcontext() if inside_transform() else torch.no_grad()


def constant(x: Tensor) -> Tensor:
    """Without the graph that a caller's own tensor may hang on, which a state would keep alive for ever."""
    return x.detach() if x.requires_grad and not inside_transform() else x


def free_to_ask(x: Tensor) -> bool:
    """Whether Python may look at a value: on a CPU it waits for nobody, and nobody traces it."""
    return x.device.type == "cpu" and not traced()
