"""A progress bar, where one is wanted and tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

Item = TypeVar("Item")


class Bar(Generic[Item]):
    """What is gone through, with or without a bar beside it."""

    def __init__(self, items: Iterable[Item], tqdm_bar: Any) -> None:
        self._items, self._tqdm = items, tqdm_bar

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items if self._tqdm is None else self._tqdm)

    def note(self, values: Mapping[str, str | Tensor]) -> None:
        """What to show beside the bar; without one, nothing is even read from the device."""
        if self.shown:
            short = {name: x if isinstance(x, str) else f"{float(x):.3g}" for name, x in values.items()}
            self._tqdm.set_postfix(short, refresh=False)

    @property
    def shown(self) -> bool:
        """Whether anybody sees it."""
        return self._tqdm is not None and not self._tqdm.disable


def bar(items: Iterable[Item], show: bool | None, name: str) -> Bar[Item]:
    """The items to go through, with a bar of this name if tqdm is installed: None shows it on a terminal only, for in a
    log every change of it is a line."""
    if show is False:
        return Bar(items, None)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return Bar(items, None)
    return Bar(items, tqdm(items, desc=name, leave=False, disable=None if show is None else False))
