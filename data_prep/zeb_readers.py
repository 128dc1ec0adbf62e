"""Small readers that the adapters of posed image sets share. Whatever is wrong is a ValueError that names the file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from gim_jax.image import read_image


def folders(root: Path, wanted: Sequence[str]) -> list[Path]:
    """List the folders of scenes, all or the wanted ones, in order."""
    found = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    if not found:
        raise ValueError(f"{root}: found no folder of scenes")
    missing = sorted(set(wanted) - {path.name for path in found})
    if missing:
        raise ValueError(f"{root}: found no scene {', '.join(missing)}")
    return [path for path in found if not wanted or path.name in wanted]


def numbers(path: Path) -> list[list[float]]:
    """Read lines of numbers; blank lines and comments (#) are left out."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            rows.append([float(token) for token in line.split()])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return rows


def image_of(path: Path) -> Callable[[], np.ndarray]:
    """Return a function that reads an image as stored."""
    return functools.partial(read_image, path, exif=False)


def pose(R: np.ndarray, t) -> np.ndarray:
    """Put a rotation [3, 3] and a translation [3] into a matrix [4, 4]."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, np.ravel(t)
    return T


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """Return K [3, 3]."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def png_depth(path: Path, scale: float) -> np.ndarray:
    """Read a 16-bit PNG as depth = value / scale, 0 unknown."""
    depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if depth is None or depth.dtype != np.uint16 or depth.ndim != 2:
        raise ValueError(f"{path}: not a gray PNG of 16 bits")
    return depth.astype(np.float32) / scale
