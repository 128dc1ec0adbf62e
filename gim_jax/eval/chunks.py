"""Files of arrays of a run: NumPy's npz without pickles, written atomically, damage named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax.data.tfrecord import write_atomic
from gim_jax.weights.store import BAD_FILE


def write_chunk(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as one npz file, atomically."""
    write_atomic(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read_chunk(path: str | Path) -> dict[str, np.ndarray]:
    """Read an npz file; a ValueError names a file that is not whole or holds more than arrays."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except BAD_FILE as error:
        raise ValueError(f"{path}: not a whole npz file of arrays: {error}") from error
