"""Depth maps as PNG: 65535 steps of equal ratio between the nearest and the farthest depth, 0 = unknown.

A step is 0.01 % at a thousandfold range, ten times finer than float16, whatever the unit (MegaDepth has none).
"""

from __future__ import annotations

import cv2
import numpy as np

STEPS = 65535


def encode_depth(depth: np.ndarray) -> tuple[bytes, tuple[float, float]]:
    """Encode a map [H, W]; what is not finite or not positive is unknown.

    Returns: 16-bit PNG bytes and (nearest, farthest) depth, (1, 1) where all is unknown.
    """
    known = np.isfinite(depth) & (depth > 0)
    values = depth[known].astype(np.float64)
    near, far = (float(values.min()), float(values.max())) if len(values) else (1.0, 1.0)
    steps = np.zeros(depth.shape, np.uint16)
    ratio = np.log(far / near)
    steps[known] = 1 + (np.rint(np.log(values / near) / ratio * (STEPS - 1)) if ratio > 0 else 0)
    return cv2.imencode(".png", steps)[1].tobytes(), (near, far)


def decode_depth(data: bytes, near: float, far: float) -> np.ndarray:
    """Decode bytes of `encode_depth` to [H, W] float32. Raises a ValueError if they are no 16-bit gray PNG."""
    steps = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if steps is None or steps.dtype != np.uint16 or steps.ndim != 2:
        raise ValueError(f"depth: found {len(data)} bytes that do not decode, expected a 16-bit gray PNG")
    table = near * np.exp(np.log(far / near) * (np.arange(STEPS + 1) - 1) / (STEPS - 1))
    table[0] = 0
    return table.astype(np.float32)[steps]


def depth_matches(
    rng: np.random.Generator,
    depths: tuple[np.ndarray, np.ndarray],
    K: tuple[np.ndarray, np.ndarray],
    T: np.ndarray,
    num: int,
    tolerance: float = 0.05,
) -> np.ndarray:
    """Draw correspondences of two posed images through their depth.

    Args:
      depths: maps [H, W] of image 0 and 1, 0 = unknown. K: their intrinsics [3, 3]. T: [4, 4] from camera 0 to 1.
      num: points of image 0 to try. tolerance: relative, between the depth that arrives in image 1 and the depth there
        (DKM's).

    Returns: [M, 4] float64 (x0, y0, x1, y1) px of what both images see, M <= num.
    """
    flat = np.flatnonzero(depths[0])
    if not len(flat):
        return np.zeros((0, 4))
    chosen = flat[rng.integers(len(flat), size=num)]
    kpts0 = np.stack([chosen % depths[0].shape[1], chosen // depths[0].shape[1]], -1).astype(np.float64)
    z = depths[0].ravel()[chosen].astype(np.float64)
    rays = np.concatenate([kpts0, np.ones((num, 1))], 1) @ np.linalg.inv(K[0]).T
    moved = rays * z[:, None] @ T[:3, :3].T + T[:3, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        projected = moved @ K[1].T
        kpts1 = projected[:, :2] / projected[:, 2:]
        nearest = np.rint(np.where(moved[:, 2:] > 0, kpts1, -1))
    height, width = depths[1].shape
    seen = np.all((nearest >= 0) & (nearest < (width, height)), axis=1)
    x, y = np.where(seen[:, None], nearest, 0).astype(int).T
    there = depths[1][y, x]
    seen &= (there > 0) & (np.abs(there - moved[:, 2]) < tolerance * there)
    return np.concatenate([kpts0, kpts1], 1)[seen]
