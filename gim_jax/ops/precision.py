"""The precision of scores, statistics and losses, whatever the networks compute in."""

import jax
from jax import numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widen half precision (and integers) to float32; float32 and float64 stay what they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
