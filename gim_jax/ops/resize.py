"""Resize images and maps between half-pixel grids, as torch, PIL and OpenCV mean it."""

from __future__ import annotations

import jax
from jax import numpy as jnp


def resize(
    images: jax.Array, shape: tuple[int, ...], valid: jax.Array | None = None, antialias_cubic: bool = False
) -> jax.Array:
    """Resize [B, H, W, C] to `shape` = (height, width) with pixel centres at half integers, edges repeated.

    Two products with interpolation matrices: static shapes for any valid size, and no gather.

    Args:
      images: [B, H, W, C].
      shape: (height, width) of the result.
      valid: [B, 2] float32 (width, height) of the part of each image, from its top-left corner, that becomes
        the result; all of it if None. What lies outside has no influence.
      antialias_cubic: cubic and widened when shrinking (PIL's `BICUBIC`), else linear and never widened
        (torch's `interpolate(mode="bilinear", align_corners=False)`).

    Returns:
      [B, height, width, C], dtype of `images`.
    """
    for axis in (1, 2):
        size_in, size_out = images.shape[axis], shape[axis - 1]
        if valid is None and size_in == size_out:
            continue
        extent = jnp.full(1, size_in, jnp.float32) if valid is None else valid[:, 2 - axis].astype(jnp.float32)
        weights = _weights(size_in, size_out, extent, antialias_cubic).astype(images.dtype)
        if valid is None:
            equation, weights = ("oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"), weights[0]
        else:
            equation = "boh,bhwc->bowc" if axis == 1 else "bow,bhwc->bhoc"
        images = jnp.einsum(equation, weights, images, precision="highest")
    return images


def _weights(size_in: int, size_out: int, extent: jax.Array, antialias_cubic: bool) -> jax.Array:
    """Build the [B, size_out, size_in] interpolation matrices of the first `extent` [B] input pixels."""
    scale = (extent / size_out)[:, None, None]
    at = (jnp.arange(size_out, dtype=jnp.float32)[:, None] + 0.5) * scale - 0.5
    index = jnp.arange(size_in, dtype=jnp.float32)
    if antialias_cubic:
        distance = jnp.abs(at - index) / jnp.maximum(scale, 1.0)
        a = -0.5  # Keys' kernel as in PIL
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        weights = jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0.0))
    else:
        weights = jnp.maximum(1 - jnp.abs(at - index), 0.0)
    weights = jnp.where(index < extent[:, None, None], weights, 0.0)
    return weights / weights.sum(-1, keepdims=True)
