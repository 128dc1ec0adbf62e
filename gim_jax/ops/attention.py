"""Attention between two sets of tokens, with masks."""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp

from gim_jax.ops.assignment import map_rows
from gim_jax.ops.precision import at_least_float32

EPS = 1e-6  # of the official code


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """Attend with the kernel `elu(q) + 1` instead of a softmax: linear in the number of tokens, O(S D^2)
    memory-free.

    Args:
      query: [B, L, H, D]. key, value: [B, S, H, D].
      query_mask: [B, L] bool; masked queries give zero. key_mask: [B, S] bool.

    Returns:
      [B, L, H, D] in the dtype of `value`; sums in float32.

    Source: Katharopoulos et al., "Transformers are RNNs", eq. 4-6, as LoFTR section 3.2 uses it.
    """
    dtype = value.dtype
    q = jax.nn.elu(at_least_float32(query)) + 1
    k = jax.nn.elu(at_least_float32(key)) + 1
    v = at_least_float32(value)
    if query_mask is not None:
        q = q * query_mask[..., None, None]
    if key_mask is not None:
        k = k * key_mask[..., None, None]
        v = v * key_mask[..., None, None]
    if query.shape[-1] < 16:
        return _narrow_linear_attention(q, k, v).astype(dtype)
    attended = jax.lax.platform_dependent(q, k, v, tpu=_narrow_linear_attention, default=_linear_attention_by_head)
    return attended.astype(dtype)


def _linear_attention_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute q (k^T v) / (q sum(k)) head by head."""
    kv = jnp.einsum("bshd,bshv->bhdv", k, v)
    norm = jnp.einsum("blhd,bhd->blh", q, k.sum(1)) + EPS
    return jnp.einsum("blhd,bhdv->blhv", q, kv) / norm[..., None]


def _narrow_linear_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Do the same for narrow heads: all heads in one product, what they share with each other struck out.

    Products of a few columns cost a CPU two to three times as much as these; those of 16 a TPU, with gradient, 2.3
    times by its compiler's estimate (windows of 25 tokens, 8 heads).
    """
    batch, length, heads, dim = q.shape
    q, k, v = (t.reshape(batch, -1, heads * dim) for t in (q, k, v))
    same_head = jnp.asarray(np.kron(np.eye(heads), np.ones((dim, dim))), q.dtype)
    kv = jnp.einsum("bsc,bsv->bcv", k, v) * same_head
    norm = (q * k.sum(1, keepdims=True)) @ same_head + EPS
    return (q @ kv / norm).reshape(batch, length, heads, dim)


def full_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_mask: jax.Array | None = None, chunk: int = 256
) -> jax.Array:
    """Attend with a softmax over the keys, scaled by 1/sqrt(D), in float32.

    The scores of all queries never exist at once, forward or backward. On a CPU that takes a third of the time.

    Args:
      query: [B, L, H, D]. key, value: [B, S, H, D]. key_mask: [B, S] bool; a row without a valid key gives
        zero.
      chunk: queries at a time; the largest array in memory is [B, H, chunk, S].

    Returns:
      [B, L, H, D].
    """
    batch, length, heads, dim = query.shape
    # every head is an item of the batch from here on: products that need no transpose
    query, key, value = (x.swapaxes(1, 2).reshape(batch * heads, -1, dim) for x in (query, key, value))
    valid = None if key_mask is None else jnp.repeat(key_mask, heads, axis=0)[:, None]

    @jax.checkpoint
    def attend(part):
        wide = jnp.promote_types(part.dtype, jnp.float32)
        scores = jnp.einsum("bld,bsd->bls", part, key, preferred_element_type=wide) / dim**0.5
        if valid is not None:
            scores = jnp.where(valid, scores, -1e9)
        weights = jax.nn.softmax(scores, axis=-1)
        if valid is not None:
            weights = weights * valid
        return jnp.einsum("bls,bsd->bld", weights.astype(value.dtype), value)

    return map_rows(attend, query, chunk).reshape(batch, heads, length, dim).swapaxes(1, 2)
