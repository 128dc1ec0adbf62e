"""Gaussian-process regression from features of one image to positions in another (DKM, section 3.2)."""

from __future__ import annotations

import jax
from jax import numpy as jnp

TEMPERATURE = 0.2  # of the kernel, not learned
NOISE = 0.1  # added to the kernel's diagonal
EPSILON = 1e-6  # beside the product of norms


def cosine_kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    """exp((cos(x, y) - 1) / 0.2) of all pairs of [..., N, C] and [..., M, C]: [..., N, M] float32."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1)[..., :, None] * jnp.linalg.norm(y, axis=-1)[..., None, :]
    cosine = jnp.einsum("...nc,...mc->...nm", x, y, precision="highest") / (norms + EPSILON)
    return jnp.exp((cosine - 1) / TEMPERATURE)


def posterior_mean(feat0: jax.Array, feat1: jax.Array, values: jax.Array, solved: jax.Array) -> jax.Array:
    """Predict at `feat0` what `feat1` observes: K01 (K11 + 0.1 I)^-1 values, by Cholesky, in float32.

    Args:
      feat0: [B, N, C] features of the queries.
      feat1: [B, M, C] features of the observations.
      values: [M, D] observed values, the same for all items.
      solved: [B or 1, M, C] the features whose K11 is inverted; `feat1` unless a fault is to be reproduced.

    Returns:
      [B, N, D] float32.
    """
    gram = cosine_kernel(solved, solved) + NOISE * jnp.eye(solved.shape[-2])
    factor = jnp.linalg.cholesky(gram)
    values = jnp.broadcast_to(values.astype(jnp.float32), (gram.shape[0], *values.shape))
    weights = jax.scipy.linalg.cho_solve((factor, True), values)
    return jnp.matmul(cosine_kernel(feat0, feat1), weights, precision="highest")
