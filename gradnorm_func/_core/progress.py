"""A progress bar, where one is wanted and tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor

Item = TypeVar("Item")


class Bar(Generic[Item]):
    """What is gone through, with or without a bar beside it."""

    def __init__(self, items: Iterable[Item], tqdm_bar: Any) -> None:
        self._items, self._tqdm = items, tqdm_bar

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items if self._tqdm is None else self._tqdm)

    def note(self, **values: float | Tensor) -> None:
        """Numbers to show beside the bar; without one they are not even read from the device."""
        if self._tqdm is not None:
            self._tqdm.set_postfix({name: f"{float(value):.3g}" for name, value in values.items()}, refresh=False)


def bar(items: Iterable[Item], show: bool, name: str) -> Bar[Item]:
    """The items to go through, with a bar of this name if `show` is true and tqdm is installed."""
    if not show:
        return Bar(items, None)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return Bar(items, None)
    return Bar(items, tqdm(items, desc=name, leave=False))
