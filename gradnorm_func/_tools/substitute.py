"""Other tensors in the place of a module's parameters and buffers while a function runs, in eager mode.

`torch.func.functional_call` does that too, but more slowly, and it leaves two cases wrong:

- two threads that call one module with different parameters: here they take turns;
- activation checkpointing inside the module: the backward pass repeats a part of the forward pass, after the call, when
  the module has its own parameters back, and autograd silently mixes the two sets. Here the repetition runs on the
  parameters of the call.
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import checkpoint

from gradnorm_func._core.tracing import inside_transform


class Place(NamedTuple):
    """One place in which a module looks a tensor up; a tied tensor has several, under one name."""

    holder: MutableMapping[str, Any]  # `_parameters` or `_buffers` of a part of the module
    key: str
    name: str  # in params; "" for a parameter that is None


class Places:
    """All places of a module and its parts: first those of the parameters, then those of the buffers."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        _follow_checkpoints()
        dot = f"{prefix}." if prefix else ""
        parts = list(module.modules())
        self.module = module
        if any(kind.__name__ == "FSDPModule" for part in parts for kind in type(part).__mro__):
            name = next((name for name, _ in module.named_parameters()), "")
            raise ValueError(
                f"params[{dot + name!r}] is a DTensor that FSDP2 gathers by hooks of the module, which a function of "
                "params cannot do, under implicit_replication() neither: keep that module under plain autograd, with "
                "gn.fork and gn.measure_losses"
            )
        self.children = [part._modules for part in parts]
        self.holders = [holder for part in parts for holder in (part._parameters, part._buffers)]
        self.norms = {id(part._buffers): part for part in parts if isinstance(part, _NormBase)}
        self.turn = _Turn(parts)
        self.seen_training = False  # whether the values of the buffers were compared, in train mode, and were old
        with self.turn:  # another thread may have put its tensors there
            self.structure = self._structure()
            parameters = _places(self.holders[::2], dict(module.named_parameters()), dot)
            self.names = [place.name for place in parameters if place.name]
            self.buffers = _places(self.holders[1::2], dict(module.named_buffers()), dot)
            unset = {(id(holder), key): dot + name for name, (holder, key) in unset_buffers(module).items()}
            self.buffers = [place._replace(name=place.name or unset[id(place[0]), place.key]) for place in self.buffers]
        self.pairs = [place[:2] for place in (*(place for place in parameters if place.name), *self.buffers)]

    def _structure(self) -> list[Any]:
        """Parts, keys, and which places hold one tensor: for each, the first that holds it."""
        parts = [part for children in self.children for part in children.values()]
        first: dict[int, int] = {}
        tensors = itertools.chain.from_iterable(holder.values() for holder in self.holders)
        tied = [first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)]
        return [*parts, *itertools.chain.from_iterable(self.holders), tied]

    def fit(self) -> bool:
        """Whether the module still has the parts, parameters and buffers that it had, tied as they were."""
        with self.turn:
            return self._structure() == self.structure

    def renews(self, holder: MutableMapping[str, Any]) -> bool:
        """Whether what was written to these buffers is news: some versions of torch write the old values to those of a
        norm layer in eval mode."""
        norm = self.norms.get(id(holder))
        return norm is None or norm.training

    def read(self) -> list[Any]:
        """The tensors in their places."""
        return [holder[key] for holder, key in self.pairs]

    def fill(self, tensors: list[Any]) -> None:
        """Puts tensors in their places."""
        for (holder, key), tensor in zip(self.pairs, tensors, strict=True):
            holder[key] = tensor

    def call(
        self, parameters: list[Tensor], buffers: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> tuple[Any, dict[str, Tensor], list[str]]:
        """The module's output, what it left in its buffers, by name, and the names of those that are new.

        `parameters` has one tensor for each of `names`; where `buffers` has none, the module's own buffer is used.
        """
        with self.turn:
            values = [buffers.get(name, holder[key]) for holder, key, name in self.buffers]
            substitution = Substitution(self, parameters, values)
            return *substitution.run(self.module, args, kwargs), substitution.changed


class Substitution:
    """Tensors for the places of a module: functions can be run with them there, more than once."""

    def __init__(self, places: Places, parameters: list[Tensor], buffers: list[Tensor | None]) -> None:
        self.places = places
        self.parameters = parameters
        self.buffers = buffers
        self.running = False
        self.changed: list[str] = []  # the names of the buffers that the last run left new

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The output of a function, and what it left in the buffers, by name; whoever calls this has the turn."""
        places, outer, was_running = self.places, _thread.active, self.running
        before = places.read()
        # Clones, for a module may write to its buffers, as batch norm does; one for tied ones.
        clones = {id(buffer): buffer.clone() for buffer in self.buffers if buffer is not None}
        try:
            places.fill([*self.parameters, *(clones.get(id(buffer)) for buffer in self.buffers)])
            _thread.active, self.running = (*outer, self), True
            out = function(*args, **kwargs)
            compare = places.module.training and not places.seen_training and not inside_transform()
            self.changed = [
                name
                for (holder, key, name), old in zip(places.buffers, self.buffers, strict=True)
                if places.renews(holder)
                and (_is_new(holder[key], clones.get(id(old))) or (compare and _differs(holder[key], old)))
            ]
            places.seen_training |= compare and not self.changed
            return out, {name: holder[key] for holder, key, name in places.buffers if holder[key] is not None}
        finally:
            _thread.active, self.running = outer, was_running
            places.fill(before)

    def repeat(self, function: Callable[..., Any], *args: Any) -> Any:
        """The output of a function that the backward pass repeats."""
        # A backward pass within the call, as of forces from an energy, may have a thread of its own (on a GPU it has),
        # and the thread that has the turn waits for it.
        with nullcontext() if self.running else self.places.turn:
            return self.run(function, args, {})[0]


def _is_new(tensor: Any, clone: Tensor | None) -> bool:
    """Whether another tensor stands in the place of the clone, or something was written to it; None is a buffer that
    had no value."""
    return tensor is not clone or (clone is not None and not clone.is_inference() and clone._version > 0)


def _differs(tensor: Any, old: Any) -> bool:
    """Whether values are other ones, which waits for the device: `F.batch_norm` writes to its statistics, and leaves
    their version as it was."""
    if type(tensor) is not Tensor or type(old) is not Tensor or old.is_meta or old.layout is not torch.strided:
        return False
    return not torch.equal(tensor, old) and not bool(((tensor == old) | ((tensor != tensor) & (old != old))).all())


def unset_buffers(module: nn.Module) -> dict[str, tuple[MutableMapping[str, Any], str]]:
    """Where the buffers that are None stand, which `named_buffers` leaves out, by name."""
    return {
        f"{path}.{key}" if path else key: (part._buffers, key)
        for path, part in module.named_modules()
        for key, buffer in part._buffers.items()
        if buffer is None
    }


def _places(holders: list[Any], named: Mapping[str, Tensor], dot: str) -> list[Place]:
    names = {id(tensor): dot + name for name, tensor in named.items()}
    return [Place(holder, key, names.get(id(leaf), "")) for holder in holders for key, leaf in holder.items()]


class _Turn:
    """A lock that modules share if they share a part."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        with _registry:
            new = threading.RLock()
            # In one order everywhere, so that no two threads wait for each other.
            self.locks = sorted({_locks.setdefault(part, new) for part in parts}, key=id)

    def __enter__(self) -> None:
        for lock in self.locks:
            lock.acquire()

    def __exit__(self, *exception: object) -> None:
        for lock in self.locks:
            lock.release()


class _Thread(threading.local):
    active: tuple[Substitution, ...] = ()  # the outermost first


_thread = _Thread()
_registry = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@functools.cache
def _follow_checkpoints() -> None:
    """What torch.utils.checkpoint repeats is to run under the substitutions that it was first run under.

    There is no public way to ask for this. The two classes that remember the function to repeat get it as their first
    argument, and are given it bound to the substitutions; where there are none, nothing is changed.
    """
    for name, method in (("_CheckpointFrame", "__init__"), ("CheckpointFunction", "forward")):
        owner = getattr(checkpoint, name, None)
        if owner is None:
            warnings.warn(
                f"torch {torch.__version__} has no torch.utils.checkpoint.{name}: activation checkpointing inside "
                "a module called by gn.functional will recompute with the module's own parameters, not with params",
                stacklevel=2,
            )
        else:
            setattr(owner, method, _substituted(getattr(owner, method)))


def _substituted(remember: Callable[..., Any]) -> Callable[..., Any]:
    def remember_substituted(frame: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        again = functools.partial(_repeat, _thread.active, function) if _thread.active else function
        return remember(frame, again, *args, **kwargs)

    return remember_substituted


def _repeat(active: tuple[Substitution, ...], function: Callable[..., Any], *args: Any) -> Any:
    if _thread.active == active:  # a reentrant checkpoint runs its function through this in the forward pass, too
        return function(*args)
    for substitution in reversed(active):
        function = functools.partial(substitution.repeat, function)
    return function(*args)
