"""What has been measured, in a JSON file that grows by a record at a time."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gradnorm_func as gn


class Key(NamedTuple):
    """Which record it is."""

    data: str
    optimizer: str
    condition: str
    method: str


Records = dict[Key, dict[str, Any]]
REFERENCE = "equal"  # what all rows are compared with: on normalised losses, with the same optimizer


def load(*paths: str) -> Records:
    """All records of some files; of two of one key the last."""
    records: Records = {}
    for path in paths:
        if Path(path).exists():
            rows = json.loads(Path(path).read_text())
            records |= {Key(*(row[field] for field in Key._fields)): row for row in rows}
    return records


def has(path: str, key: Key, protocol: Any) -> bool:
    """Whether it was measured by this protocol."""
    record = load(path).get(key)
    return record is not None and all(record[name] == getattr(protocol, name) for name in ("steps", "seeds"))


def add(path: str, key: Key, record: dict[str, Any]) -> None:
    """One record more; the file is never half written."""
    versions = {"torch": torch.__version__, "gradnorm_func": gn.__version__, "python": platform.python_version()}
    records = load(path) | {key: key._asdict() | _rounded(record) | {"versions": versions}}
    lines = ",\n".join(json.dumps(row) for row in records.values())
    Path(path + ".new").write_text(f"[\n{lines}\n]\n")
    os.replace(path + ".new", path)


def _rounded(value: Any) -> Any:
    """Five digits are more than five seeds can tell apart."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(entry) for entry in value]
    return value
