"""Correlate each position of one feature map with a window of another around its match."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from gim_jax.ops.sampling import unnormalise


def local_correlation(feat0: jax.Array, feat1: jax.Array, flow: jax.Array, radius: int) -> jax.Array:
    """Correlate `feat0` with bilinear samples of `feat1` at `flow` + every whole-cell offset up to `radius`.

    The offsets are whole cells, so all samples of a window share their fractions: the correlations with the
    (2 radius + 2)^2 cells around it are blended, one scan step per cell, and neither the sampled windows
    nor their gradients are ever stored. Cells outside the map count as zero.

    Args:
      feat0: [B, H, W, C].
      feat1: [B, H1, W1, C].
      flow: [B, H, W, 2] (x, y) in [-1, 1] of `feat1`, +-1 the outer borders of the map.
      radius: of the window, in cells.

    Returns:
      [B, H, W, (2 radius + 1)^2] float32, offsets row-major (y slow), divided by sqrt(C) (DKM, section 3.3).
    """
    batch, height, width, channels = feat0.shape
    height1, width1 = feat1.shape[1:3]
    side = 2 * radius + 2
    points = unnormalise(flow.astype(jnp.float32), (width1, height1), align_corners=False)
    low = jnp.floor(points)
    frac_x, frac_y = jnp.moveaxis(points - low, -1, 0)[..., None, None]
    # A margin of one window holds the whole window of a point just outside; points farther out are clipped there.
    corner = jnp.clip(low - radius, -side, jnp.asarray([width1, height1])).astype(jnp.int32) + side
    padded = jnp.pad(feat1, ((0, 0), (side, side), (side, side), (0, 0)))
    columns = padded.shape[2]
    start = (corner[..., 1] * columns + corner[..., 0]).reshape(batch, -1)
    cells = padded.reshape(batch, -1, channels)
    query = feat0.reshape(batch, -1, channels)

    @jax.checkpoint
    def correlate(offset, cells, query):
        # image by image: from a batch that is split over devices, one index over all images would fetch them all
        values = jax.vmap(lambda cells, at: cells.at[at].get(mode="promise_in_bounds"))(cells, start + offset)
        return jnp.sum(values * query, axis=-1, dtype=jnp.float32)

    offsets = (jnp.arange(side)[:, None] * columns + jnp.arange(side)).reshape(-1)
    _, scores = jax.lax.scan(lambda _, offset: (None, correlate(offset, cells, query)), None, offsets)
    scores = jnp.moveaxis(scores.reshape(side, side, batch, height, width), (0, 1), (3, 4))
    scores = (1 - frac_y) * scores[..., :-1, :] + frac_y * scores[..., 1:, :]
    scores = (1 - frac_x) * scores[..., :-1] + frac_x * scores[..., 1:]
    return scores.reshape(batch, height, width, -1) / channels**0.5
