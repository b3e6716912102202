"""The grid of a sweep: the combinations of hyperparameters to run, and who takes which of them by name."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Value: TypeAlias = float | Sequence[float] | Tensor  # a number, a boolean, or a vector of numbers
Grid: TypeAlias = Mapping[str, Sequence[Value] | Tensor] | Sequence[Mapping[str, Value]]
Combination: TypeAlias = dict[str, Any]  # the hyperparameters of a run, by name


class Run(NamedTuple):
    """One row of the table of runs."""

    combination: Combination
    seed: int


def runs_of(grid: Grid | None, seeds: Iterable[int] | None) -> list[Run]:
    """Every combination with every seed, the seed changing fastest; or the rows of a list that say their own."""
    combinations = _combinations(grid)
    if "seed" in combinations[0]:
        if isinstance(grid, Mapping) or seeds is not None:
            raise ValueError("grid has a 'seed': pass seeds= instead, or a list of rows, each with its own seed")
        return [Run({k: v for k, v in row.items() if k != "seed"}, int(row["seed"])) for row in combinations]
    numbers = [0] if seeds is None else [int(seed) for seed in seeds]
    if not numbers:
        raise ValueError("seeds is empty: there is nothing to run")
    return [Run(row, seed) for row in combinations for seed in numbers]


def _combinations(grid: Grid | None) -> list[Combination]:
    """Every run of the grid but for its seed, checked."""
    if grid is None:
        return [{}]
    rows = _product(grid) if isinstance(grid, Mapping) else [dict(row) for row in grid]
    if not rows:
        raise ValueError("grid is empty: there is nothing to run")
    for row in rows:
        if set(row) != set(rows[0]):
            raise ValueError(f"every combination in grid needs the same names, but {list(row)} != {list(rows[0])}")
    checked = [{name: _value(name, value) for name, value in row.items()} for row in rows]
    for name in checked[0]:
        shapes = {tuple(value.shape) if isinstance(value, Tensor) else () for value in (row[name] for row in checked)}
        if len(shapes) > 1:
            raise ValueError(f"grid[{name!r}] has values of the shapes {sorted(shapes)}: all runs need the same")
    return checked


def _product(grid: Mapping[str, Any]) -> list[Combination]:
    """All combinations of some columns, the last name changing fastest."""
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"grid[{name!r}]={values!r} must be a list of numbers")
    columns = {name: list(values) for name, values in grid.items()}
    for name, column in columns.items():
        if not column:
            raise ValueError(f"grid[{name!r}] is empty: there is nothing to run")
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())] if columns else []


def _value(name: str, value: Any) -> float | Tensor:
    """A number, a boolean, or a vector of them as a tensor."""
    if name == "path":
        raise ValueError("grid has a 'path': under this name an optimizer gets the path of each parameter")
    if not isinstance(value, str):
        with suppress(TypeError, ValueError, RuntimeError):
            if isinstance(value, (bool, int)):
                return value
            vector = torch.as_tensor(value)
            if vector.ndim == 0:
                return bool(value) if vector.dtype is torch.bool else float(value)
            if vector.ndim == 1:  # of Python's numbers in all their digits
                exact = vector.is_floating_point() and not isinstance(value, Tensor)
                return torch.tensor(value, dtype=torch.float64) if exact else vector.detach()
    raise ValueError(
        f"grid[{name!r}] has {value!r}: all runs are one program, so only numbers, booleans and vectors of numbers can "
        "differ; call sweep once for each"
    )


class Factory(NamedTuple):
    """What differs by run, as a function of the hyperparameters that it takes by name."""

    make: Callable[..., Any]
    names: tuple[str, ...] = ()
    fixed: bool = False  # is `make` the thing itself, for all runs?

    def of_run(self, hyper: Mapping[str, Any]) -> Any:
        """What a run with these hyperparameters has. No `__call__`, which torch 2.10 does not trace."""
        return self.make if self.fixed else self.make(**{name: hyper[name] for name in self.names})

    @classmethod
    def of(cls, argument: Any, role: str, kind: type, runs: list[Run], **more: Any) -> Factory:
        """Of an argument that is one of a kind for all runs, or a function that makes it; `more` is what else it may
        take, with an example."""
        if isinstance(argument, kind):
            return cls(argument, fixed=True)  # type: ignore[arg-type]
        if not callable(argument):
            raise ValueError(
                f"{role}={argument!r} must be a {kind.__name__}, or a function of hyperparameters that returns one"
            )
        factory = cls(argument, _names_of(argument, role, [*runs[0].combination, *more]))
        first = factory._tried(runs, more)
        if not isinstance(first, kind):
            raise ValueError(f"{role} returned {type(first).__name__} and not a {kind.__name__}")
        return factory

    @classmethod
    def of_function(cls, argument: Any, role: str, runs: list[Run]) -> Factory:
        """Of a function for all runs, or of one that returns it, and takes a name that is in the grid."""
        if not callable(argument):
            raise ValueError(
                f"{role}={argument!r} must be a function, or a function of hyperparameters that returns it"
            )
        names = list(runs[0].combination)
        takes: Sequence[str] = ()
        with suppress(ValueError, TypeError):  # of what has no signature
            takes = list(inspect.signature(argument).parameters)
        if not set(takes) & set(names):
            return cls(argument, fixed=True)
        factory = cls(argument, _names_of(argument, role, names))
        first = factory._tried(runs, {})
        if not callable(first):
            raise ValueError(f"{role} returned {type(first).__name__} of its hyperparameters, and not a function")
        return factory

    def _tried(self, runs: list[Run], more: Mapping[str, Any]) -> Any:
        """What it makes for the first run."""
        for run in runs:
            # With plain numbers first, whose range the library checks; a function may also want tensors.
            with suppress(TypeError, AttributeError):
                self.of_run({**run.combination, **more})
        return self.of_run({name: torch.as_tensor(value) for name, value in runs[0].combination.items()} | dict(more))


def _names_of(function: Callable[..., Any], role: str, names: list[str]) -> tuple[str, ...]:
    """Those of the names that the function takes; it must take no other without a default."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(f"{role} takes any name: name its hyperparameters one by one, as in `lambda alpha, lr: ...`")
    for p in parameters:
        if p.name not in names and p.default is p.empty and p.kind is not p.VAR_POSITIONAL:
            raise ValueError(f"{role} takes {p.name!r}, which grid does not have; it has {names}")
    return tuple(p.name for p in parameters if p.name in names)


def check_names(runs: list[Run], factories: Iterable[Factory]) -> None:
    """Every name in the grid must be taken by someone."""
    known = [name for factory in factories for name in factory.names]
    for name in runs[0].combination:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            hint = f"did you mean one of {near}?" if near else "give balancer= or optimizer= as a function of it"
            raise ValueError(f"grid has {name!r}, but no function of this sweep takes it; {hint}")
