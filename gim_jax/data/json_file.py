"""JSON files: written atomically, and named where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gim_jax.data.tfrecord import write_atomic


def read_json(path: Path) -> Any:
    """Read a JSON file: its content, None where there is no file. Raises ValueError naming one that is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON file ({error})") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, whole or not at all. Raises ValueError for NaN and infinities, which JSON does not know."""
    text = json.dumps(value, indent=1, allow_nan=False)
    write_atomic(path, lambda file: file.write(text.encode()))
