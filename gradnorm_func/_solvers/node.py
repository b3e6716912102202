"""A loop as one node of a compiled graph."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gradnorm_func._core.tracing import inside_transform

Loop = TypeVar("Loop", bound=Callable[..., Any])  # of tensors, to one tensor or a tuple of them

_libraries: dict[str, Any] = {}  # a torch.library.Library for each node, which is gone with it


def node(empty: Callable[..., Any], outputs: int = 1) -> Callable[[Loop], Loop]:
    """A compiled graph calls the function as it is: to unroll its many small steps would take half a minute.

    So a compiled step on a CPU may stop when it is done, too. Inside a torch.func transform a compiler traces it as any
    other function, with a fixed number of steps.

    Args:
        empty: a function of the same tensors, to empty ones of the shapes and dtypes that come back.
        outputs: how many come back.
    """

    def of(loop: Loop) -> Loop:
        op = _op(loop, empty, outputs)

        @functools.wraps(loop)
        def call(*tensors: Any) -> Any:
            as_it_is = torch.compiler.is_compiling() and not inside_transform()
            return (op if as_it_is else loop)(*tensors)

        return call  # type: ignore[return-value]

    return of


def _op(loop: Loop, empty: Callable[..., Any], outputs: int) -> Any:
    """The function as torch's own operation; `custom_op` would do the same, at twice the price of a call."""
    name = f"{loop.__module__.rpartition('.')[2]}_{loop.__name__.strip('_')}"
    reloaded = _libraries.pop(name, None) is not None  # then the old one is gone by now
    if not reloaded and hasattr(torch.ops.gradnorm_func, name):  # the package was imported anew, beside itself
        return getattr(torch.ops.gradnorm_func, name).default
    make: Any = torch.library.Library  # which has no types
    library = _libraries[name] = make("gradnorm_func", "FRAGMENT")
    arguments = ", ".join(f"Tensor {argument}" for argument in inspect.signature(loop).parameters)
    returned = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    library.define(f"{name}({arguments}) -> {returned}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, loop, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradnorm_func::{name}", empty, lib=library)
    return getattr(torch.ops.gradnorm_func, name).default
