"""The grid of a sweep: the combinations of hyperparameters to run, and who takes which of them by name."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch

Grid: TypeAlias = Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]]
Combination: TypeAlias = dict[str, float]  # the hyperparameters of a run, by name


def combinations_of(grid: Grid | None) -> list[Combination]:
    """Every run of the grid but for its seed, checked."""
    if grid is None:
        return [{}]
    rows = _product(grid) if isinstance(grid, Mapping) else [dict(row) for row in grid]
    if not rows:
        raise ValueError("grid is empty: there is nothing to run")
    for row in rows:
        if set(row) != set(rows[0]):
            raise ValueError(f"every combination in grid needs the same names, but {list(row)} != {list(rows[0])}")
    return [{name: _number(name, value) for name, value in row.items()} for row in rows]


def _product(grid: Mapping[str, Sequence[float]]) -> list[Combination]:
    """All combinations of some columns, the last name changing fastest."""
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"grid[{name!r}]={values!r} must be a list of numbers")
    columns = {name: list(values) for name, values in grid.items()}
    for name, column in columns.items():
        if not column:
            raise ValueError(f"grid[{name!r}] is empty: there is nothing to run")
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())] if columns else []


def _number(name: str, value: Any) -> float:
    if name == "seed":
        raise ValueError("grid has a 'seed': pass seeds=")
    if not isinstance(value, (bool, str)):
        with suppress(TypeError, ValueError, RuntimeError):
            return value if isinstance(value, int) else float(value)
    raise ValueError(
        f"grid[{name!r}] has {value!r}: all runs are one program, so only numbers can differ; call sweep once for each"
    )


class Factory(NamedTuple):
    """A balancer or an optimizer, as a function of the hyperparameters that it takes by name."""

    make: Callable[..., Any]
    names: tuple[str, ...]

    def __call__(self, hyper: Mapping[str, Any]) -> Any:
        return self.make(**{name: hyper[name] for name in self.names})

    @classmethod
    def of(cls, argument: Any, role: str, kind: type, combinations: list[Combination]) -> Factory:
        """The factory of an argument that is one of a kind for all runs, or a function that makes it."""
        if isinstance(argument, kind):
            return cls(lambda: argument, ())
        if not callable(argument):
            raise ValueError(
                f"{role}={argument!r} must be a {kind.__name__}, or a function of hyperparameters that returns one"
            )
        factory = cls(argument, _names_of(argument, role, list(combinations[0])))
        for combination in combinations:
            # With plain numbers first, whose range the library checks; a function may also want tensors.
            with suppress(TypeError, AttributeError):
                factory(combination)
        first = factory({name: torch.tensor(value) for name, value in combinations[0].items()})
        if not isinstance(first, kind):
            raise ValueError(f"{role} returned {type(first).__name__} and not a {kind.__name__}")
        return factory


def _names_of(function: Callable[..., Any], role: str, names: list[str]) -> tuple[str, ...]:
    """Those of the names that the function takes; it must take no other without a default."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"{role} takes any name: name its hyperparameters one by one, as in `lambda alpha, lr: ...`")
    for p in parameters:
        if p.name not in names and p.default is p.empty and p.kind is not p.VAR_POSITIONAL:
            raise ValueError(f"{role} takes {p.name!r}, which grid does not have; it has {names}")
    return tuple(p.name for p in parameters if p.name in names)


def check_names(combinations: list[Combination], *factories: Factory) -> None:
    """Every name in the grid must be taken by someone."""
    known = [name for factory in factories for name in factory.names]
    for name in combinations[0]:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            hint = f"did you mean one of {near}?" if near else "give balancer= or optimizer= as a function of it"
            raise ValueError(f"grid has {name!r}, but neither balancer nor optimizer takes it; {hint}")
