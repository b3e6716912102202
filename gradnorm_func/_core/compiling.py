"""One graph for a step that runs many times, and the same one for the same step of a later call."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from gradnorm_func._core import tree

P = ParamSpec("P")
R = TypeVar("R")

KEPT = 16  # programs; each keeps alive what its functions close over
_EMPTY = CellType()  # of a variable that is not set yet
_programs: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()


def compiled(step: Callable[P, R], **options: Any) -> Callable[P, R]:
    """A step of this package as one graph. Dynamo counts recompilations by code object, and the ninth loop of a session
    would be refused: each gets one of its own."""
    assert isinstance(step, FunctionType)
    fresh = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__)
    graph: Callable[P, R] = torch.compile(fresh, fullgraph=True, **options)
    return graph


def compiled_once(step: Callable[..., R], program: Any, like: Any, **options: Any) -> Callable[..., R]:
    """`step(program, ...)` as one graph: that of an earlier call, if the program and the shapes are the same.

    The program is an argument of the graph, and Dynamo's guards look at all of it that was traced: a wrong guess here
    costs a compilation, and nothing else.

    Args:
        step: a function of a module, whose first argument is the program.
        program: functions and settings, in tuples.
        like: pytree of tensors, whose shapes tell programs apart that would otherwise use up Dynamo's recompilations.
        **options: of `torch.compile`.
    """
    shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in tree.flatten(like)[0] if isinstance(leaf, Tensor))
    key = (step, shapes, _signature(program, ()))
    if key not in _programs:
        _programs[key] = compiled(step, **options)
    _programs.move_to_end(key)
    while len(_programs) > KEPT:
        _programs.popitem(last=False)

    graph = _programs[key]

    def run(*arguments: Any) -> R:
        nonlocal graph
        try:
            out: R = graph(program, *arguments)
        except FailOnRecompileLimitHit:  # what differs is in no closure: a global number, for one
            graph = _programs[key] = compiled(step, **options)
            out = graph(program, *arguments)
        return out

    return run


class _Itself:
    """An object as a part of a key: equal to itself alone, and kept, so that no other gets its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _signature(value: Any, around: tuple[int, ...]) -> Hashable:
    """What is equal for two values that make the same program: so do all functions that one lambda has made."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return type(value), value
    if id(value) in around:  # a function that calls itself
        return None
    of = functools.partial(_signature, around=(*around, id(value)))
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        return _Itself(value.__code__), *map(of, (*cells, value.__defaults__, value.__kwdefaults__))
    if isinstance(value, MethodType):
        return of(value.__func__), _Itself(value.__self__)
    if isinstance(value, functools.partial):
        return functools.partial, of(value.func), of(value.args), of(value.keywords)
    if isinstance(value, (tuple, list)):
        return type(value), *map(of, value)
    if isinstance(value, Mapping):
        return type(value), *((key, of(entry)) for key, entry in value.items())
    if type(value).__module__.startswith("gradnorm_func."):  # a balancer, a loss
        return type(value), of(vars(value))
    return _Itself(value)
