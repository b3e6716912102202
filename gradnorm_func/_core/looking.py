"""A look at a loss that is no step of a training: it leaves random numbers and buffers as they were."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def only_looking(loss_fn: Any, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Around runs of a loss that are no steps: whoever draws after them draws what he would have drawn without them,
    and the batch norm of a module that the loss closes over has seen nothing."""
    buffers = {id(buffer): buffer for module in modules_of(loss_fn) for buffer in module.buffers()}
    before = [(buffer, buffer.clone()) for buffer in buffers.values() if _is_plain(buffer)]
    try:
        with torch.random.fork_rng({x.device for x in tensors if x.is_cuda}):
            yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                if not torch.equal(buffer, values):  # a batch norm leaves the version as it was
                    buffer.copy_(values)


def _is_plain(buffer: Tensor) -> bool:
    """Whether it has values that can be compared and written: one of a lazy module, or on meta, has none."""
    kind = type(buffer) is Tensor and buffer.layout is torch.strided
    return kind and not buffer.is_meta and not buffer.is_inference()


def modules_of(function: Any) -> Iterator[nn.Module]:
    """The modules that a function can reach: in its closure, its defaults, the globals that it names."""
    todo, seen = [function], {id(function)}
    while todo:
        thing = todo.pop()
        if isinstance(thing, nn.Module):
            yield thing
            continue
        new = [part for part in _parts(thing) if id(part) not in seen]
        seen.update(map(id, new))
        todo += new


def _parts(function: Any) -> Iterable[Any]:
    if isinstance(function, types.FunctionType):
        if (function.__module__ or "").partition(".")[0] == "torch":
            return ()
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        known = function.__globals__
        named = [known[name] for name in function.__code__.co_names if name in known]
        return [*cells, *(function.__defaults__ or ()), *named]
    if isinstance(function, types.MethodType):
        owner = function.__self__
        return function.__func__, owner, *(getattr(owner, "__dict__", None) or {}).values()
    if isinstance(function, functools.partial):
        return function.func, *function.args, *function.keywords.values()
    if isinstance(function, (dict, list, tuple)):
        entries = function.values() if isinstance(function, dict) else function
        return entries if len(entries) < 1000 else ()  # what is longer is data
    has_parts = callable(function) and not isinstance(function, (type, types.BuiltinFunctionType))
    return vars(function).values() if has_parts and hasattr(function, "__dict__") else ()


def _is_filled(cell: Any) -> bool:
    """Whether a variable of a closure has a value: one that is assigned later has none."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
