"""Two batches as one, pair by pair: rows of a batch that is split over devices stay where they are.

Joined end to end, half of the rows would have to move, at every place where the images of pairs meet or part.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp


def join(x0: jax.Array, x1: jax.Array) -> jax.Array:
    """Make one batch of [B, ...] and [B, ...]: [2 B, ...], row i of the first before row i of the second."""
    return jnp.stack([x0, x1], 1).reshape(-1, *x0.shape[1:])


def part(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undo `join`."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]
