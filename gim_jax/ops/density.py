"""Kernel density, used to thin dense matches evenly."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def gaussian_density(points: jax.Array, std: float = 0.1, chunk: int = 512) -> jax.Array:
    """Return `sum_j exp(-|x_i - x_j|^2 / (2 std^2))`, [N], for points [N, D]; the point itself counts one.

    Rows are done in chunks, so that N x N is never held. Source: official DKM `dkm/utils/kde.py` (std 0.1 over
    the four normalised coordinates of a match).
    """

    def row(point):
        return jnp.sum(jnp.exp(-jnp.sum((points - point) ** 2, axis=-1) / (2 * std**2)))

    return jax.lax.map(row, points, batch_size=min(chunk, len(points)))
