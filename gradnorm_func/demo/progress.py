"""How far a long run is: a tqdm bar on a terminal, else one plain line a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


class Progress:
    """Counts the steps of many runs as one job; writes to stderr, so that stdout holds the results alone."""

    def __init__(self, runs: int, steps: int) -> None:
        self.runs, self.steps, self.run, self.start = runs, steps, 0, time.perf_counter()
        self.bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=runs * steps, unit="step", leave=False, dynamic_ncols=True)

    def watch(self, items: Iterable[Item], label: str) -> Iterator[Item]:
        """The items, counted as they are used."""
        self.run += 1
        if self.bar is not None:
            self.bar.set_description(f"run {self.run}/{self.runs}: {label}")
        for item in items:
            yield item
            if self.bar is not None:
                self.bar.update()
        if self.bar is None:
            spent = time.perf_counter() - self.start
            print(f"[{spent:4.0f} s] run {self.run}/{self.runs}: {label}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
