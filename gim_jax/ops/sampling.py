"""Read feature maps at points: bilinear samples, resizes with corners aligned, windows.

Maps are `[B, H, W, C]`; points are `(x, y)` in indices of the map, `(0, 0)` = centre of its first cell,
unless they are called normalised (torch's [-1, 1]).
"""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp


def unnormalise(grid: jax.Array, size: tuple[int, int], align_corners: bool) -> jax.Array:
    """Turn normalised coordinates [..., 2] in [-1, 1] into indices of a map of `size` = (width, height).

    `align_corners`: +-1 are the centres of the outer cells (True) or the outer borders of the map (False).
    """
    extent = jnp.asarray(size, grid.dtype)
    return (grid + 1) / 2 * (extent - 1) if align_corners else ((grid + 1) * extent - 1) / 2


def bilinear(features: jax.Array, points: jax.Array) -> jax.Array:
    """Interpolate `features` [B, H, W, C] at `points` [B, N, 2]; what lies outside the map counts as zero.

    Each of the four neighbours outside is zero by itself, so values fade out over the last cell (torch's
    `padding_mode="zeros"`).

    Returns:
      [B, N, C].
    """
    height, width = features.shape[1:3]
    low = jnp.floor(points)
    frac = points - low
    flat = features.reshape(features.shape[0], height * width, -1)
    out = jnp.zeros((), features.dtype)
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = low[..., 0] + dx, low[..., 1] + dy
            weight = jnp.where(dx, frac[..., 0], 1 - frac[..., 0]) * jnp.where(dy, frac[..., 1], 1 - frac[..., 1])
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = jnp.where(inside, y * width + x, 0).astype(jnp.int32)
            value = jnp.take_along_axis(flat, index[..., None], axis=1)
            out = out + value * jnp.where(inside, weight, 0)[..., None].astype(features.dtype)
    return out


def grid_sample(features: jax.Array, grid: jax.Array, align_corners: bool) -> jax.Array:
    """Interpolate `features` [B, H, W, C] at normalised `grid` [B, ..., 2] (x, y), zeros outside: torch's
    `grid_sample`.

    Returns:
      [B, ..., C].
    """
    height, width = features.shape[1:3]
    points = unnormalise(grid, (width, height), align_corners).reshape(grid.shape[0], -1, 2)
    return bilinear(features, points).reshape(*grid.shape[:-1], features.shape[-1])


def resize_align_corners(features: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Resize [B, H, W, C] to `shape` = (height, width), bilinear, outer cell centres kept
    (`align_corners=True`).

    Two products with constant interpolation matrices: `jax.image.resize` knows only half-pixel centres, and
    gathers have slow gradients.
    """
    for axis, size in ((1, shape[0]), (2, shape[1])):
        weights = jnp.asarray(_interpolation(features.shape[axis], size), features.dtype)
        equation = "oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"
        features = jnp.einsum(equation, weights, features, precision="highest")
    return features


def _interpolation(size_in: int, size_out: int) -> np.ndarray:
    """Build the [size_out, size_in] matrix of linear interpolation with corners aligned."""
    at = np.arange(size_out, dtype=np.float32) * (np.float32(size_in - 1) / np.float32(max(size_out - 1, 1)))
    low = np.clip(np.floor(at).astype(int), 0, max(size_in - 2, 0))
    frac = at - low
    matrix = np.zeros((size_out, size_in), np.float32)
    matrix[np.arange(size_out), low] = 1 - frac
    matrix[np.arange(size_out), np.minimum(low + 1, size_in - 1)] += frac
    return matrix


def gather_windows(features: jax.Array, centres: jax.Array, size: int) -> jax.Array:
    """Cut `size` x `size` windows (odd) out of `features` [B, H, W, C] around integer `centres` [B, K, 2] (x,
    y).

    Centres must lie inside the map; cells of a window outside it are zero.

    Returns:
      [B, K, size * size, C], row-major in the window.
    """
    batch, _, width, channels = features.shape
    radius = size // 2
    padded = jnp.pad(features, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
    offset = np.arange(size)
    rows = centres[..., 1, None, None] + offset[:, None]  # [B, K, size, 1]
    columns = centres[..., 0, None, None] + offset[None, :]
    index = (rows * (width + 2 * radius) + columns).reshape(batch, -1)
    flat = padded.reshape(batch, -1, channels)
    return jnp.take_along_axis(flat, index[..., None], axis=1).reshape(batch, -1, size * size, channels)
