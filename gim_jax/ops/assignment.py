"""Turn scores between two sets into assignments: dual softmax, optimal transport, mutual nearest neighbours.

All in float32. A masked row or column takes part in nothing; values there mean nothing.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp
from jax.nn import logsumexp

from gim_jax.ops.precision import at_least_float32

MASKED = -1e9  # finite, as in LoFTR: a row without any valid entry must not become NaN


def pair_mask(mask0: jax.Array | None, mask1: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """Combine [B, M] and [B, N] masks into [B, M, N]; None where both are None."""
    if mask0 is None and mask1 is None:
        return None
    rows = jnp.ones(shape[:-1], bool) if mask0 is None else mask0
    columns = jnp.ones((*shape[:-2], shape[-1]), bool) if mask1 is None else mask1
    return rows[..., :, None] & columns[..., None, :]


def dual_softmax(scores: jax.Array, mask0: jax.Array | None = None, mask1: jax.Array | None = None) -> jax.Array:
    """Multiply the softmax over rows with the softmax over columns (LoFTR section 3.3).

    Args:
      scores: [B, M, N], divided by the temperature. mask0: [B, M], mask1: [B, N] bool.

    Returns:
      [B, M, N] confidences.
    """
    valid = pair_mask(mask0, mask1, scores.shape)
    scores = at_least_float32(scores)
    scores = scores if valid is None else jnp.where(valid, scores, MASKED)
    return jax.nn.softmax(scores, axis=-2) * jax.nn.softmax(scores, axis=-1)


def log_optimal_transport(
    scores: jax.Array,
    bin_score: jax.Array,
    iters: int,
    mask0: jax.Array | None = None,
    mask1: jax.Array | None = None,
) -> jax.Array:
    """Run Sinkhorn's iterations in log space on `scores` with a dustbin row and column (SuperGlue section
    3.2).

    The backward pass runs through all iterations and keeps two vectors of each, no matrices.

    Args:
      scores: [B, M, N]. bin_score: scalar. mask0: [B, M], mask1: [B, N] bool; the result on valid entries
        equals that of the problem without the masked ones.

    Returns:
      [B, M+1, N+1] log-assignment; valid rows and columns sum to 1, the dustbin row to N and the dustbin
      column to M.
    """
    scores = at_least_float32(scores)
    batch, m, n = scores.shape
    valid0 = jnp.ones((batch, m), bool) if mask0 is None else mask0
    valid1 = jnp.ones((batch, n), bool) if mask1 is None else mask1
    num0 = valid0.sum(-1, keepdims=True).astype(scores.dtype)
    num1 = valid1.sum(-1, keepdims=True).astype(scores.dtype)

    bins = jnp.pad(scores, ((0, 0), (0, 1), (0, 1)))
    edge = (jnp.arange(m + 1) == m)[:, None] | (jnp.arange(n + 1) == n)
    couplings = jnp.where(edge, bin_score.astype(scores.dtype), bins)
    with_bin = ((0, 0), (0, 1))
    valid0 = jnp.pad(valid0, with_bin, constant_values=True)
    valid1 = jnp.pad(valid1, with_bin, constant_values=True)
    couplings = jnp.where(valid0[:, :, None] & valid1[:, None], couplings, MASKED)

    norm = -jnp.log(jnp.maximum(num0 + num1, 1))
    log_mu = jnp.where(jnp.arange(m + 1) == m, jnp.log(num1) + norm, norm)
    log_nu = jnp.where(jnp.arange(n + 1) == n, jnp.log(num0) + norm, norm)
    log_mu = jnp.where(valid0, jnp.maximum(log_mu, MASKED), MASKED)  # an empty set: log 0
    log_nu = jnp.where(valid1, jnp.maximum(log_nu, MASKED), MASKED)

    @jax.checkpoint
    def iterate(carry, _):
        _, v = carry
        u = log_mu - logsumexp(couplings + v[:, None], axis=2)
        v = log_nu - logsumexp(couplings + u[..., None], axis=1)
        return (u, v), None

    start = jnp.zeros_like(log_mu), jnp.zeros_like(log_nu)
    (u, v), _ = jax.lax.scan(iterate, start, length=iters)
    return couplings + u[..., None] + v[:, None] - norm[..., None]


def mutual_nearest(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find the best column of every row and whether that row is its best, too.

    Args:
      scores: [B, M, N]; give masked entries a value below all others.

    Returns:
      index [B, M] of the best column, its score [B, M], mutual [B, M] bool (exact equality: ties all count).
    """
    index = scores.argmax(-1)
    best = scores.max(-1)
    best1 = scores.max(-2)
    return index, best, best == jnp.take_along_axis(best1, index, axis=-1)


def mutual_matches(
    log_assignment: jax.Array,
    threshold: float,
    mask0: jax.Array | None = None,
    mask1: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Match what is each other's best, at equal scores the first (SuperGlue, LightGlue).

    Args:
      log_assignment: [B, M, N], without dustbins.
      threshold: scores must be strictly above. mask0: [B, M], mask1: [B, N] bool.

    Returns:
      matches0 [B, M] int32 column of each row, -1 for none; matches1 [B, N]; scores0 [B, M], exp of the
      value, 0 where not mutual; scores1 [B, N].
    """
    valid = pair_mask(mask0, mask1, log_assignment.shape)
    values = log_assignment if valid is None else jnp.where(valid, log_assignment, -jnp.inf)
    index0, index1 = values.argmax(2).astype(jnp.int32), values.argmax(1).astype(jnp.int32)
    mutual0 = jnp.take_along_axis(index1, index0, 1) == jnp.arange(values.shape[1])
    mutual1 = jnp.take_along_axis(index0, index1, 1) == jnp.arange(values.shape[2])
    scores0 = jnp.where(mutual0, jnp.exp(values.max(2)), 0.0)
    scores1 = jnp.where(mutual1, jnp.take_along_axis(scores0, index1, 1), 0.0)
    found0 = mutual0 & (scores0 > threshold)
    found1 = mutual1 & jnp.take_along_axis(found0, index1, 1)
    if mask0 is not None:
        found0 &= mask0
    if mask1 is not None:
        found1 &= mask1
    return jnp.where(found0, index0, -1), jnp.where(found1, index1, -1), scores0, scores1


def log_double_softmax(
    scores: jax.Array,
    logits0: jax.Array,
    logits1: jax.Array,
    mask0: jax.Array | None = None,
    mask1: jax.Array | None = None,
) -> jax.Array:
    """Combine similarities and matchabilities into a log-assignment (LightGlue eq. 8).

    Args:
      scores: [B, M, N]. logits0: [B, M], logits1: [B, N] of being matchable. mask0: [B, M], mask1: [B, N] bool.

    Returns:
      [B, M+1, N+1]; the last column and row hold the logarithms of being unmatchable, the corner 0.
    """
    scores, logits0, logits1 = (x.astype(jnp.float32) for x in (scores, logits0, logits1))
    valid = pair_mask(mask0, mask1, scores.shape)
    scores = scores if valid is None else jnp.where(valid, scores, MASKED)
    rows = jax.nn.log_sigmoid(logits0) - logsumexp(scores, axis=2)
    columns = jax.nn.log_sigmoid(logits1) - logsumexp(scores, axis=1)
    inner = 2 * scores + rows[:, :, None] + columns[:, None, :]
    inner = inner if valid is None else jnp.where(valid, inner, MASKED)
    bins0, bins1 = jax.nn.log_sigmoid(-logits0), jax.nn.log_sigmoid(-logits1)
    out = jnp.concatenate([inner, bins0[:, :, None]], axis=2)
    return jnp.concatenate([out, jnp.pad(bins1, ((0, 0), (0, 1)))[:, None]], axis=1)


def row_logsumexp(a: jax.Array, b: jax.Array, mask_b: jax.Array | None = None, chunk: int = 512) -> jax.Array:
    """Compute `logsumexp_j(a_i . b_j)` without keeping the matrix of products, forward or backward.

    Args:
      a: [B, M, C], b: [B, N, C] float32. mask_b: [B, N] bool, columns that count.
      chunk: rows at a time; the largest array in memory is [B, chunk, N].

    Returns:
      [B, M] float32.
    """

    @jax.checkpoint
    def rows(part):
        products = jnp.einsum("bmc,bnc->bmn", part, b)
        return logsumexp(products if mask_b is None else jnp.where(mask_b[:, None], products, MASKED), axis=-1)

    return map_rows(rows, a, chunk)


def map_rows(fn, rows, chunk: int):
    """Apply `fn` to pieces of a tree of [B, M, ...] arrays, `chunk` rows at a time; outputs are joined along
    axis 1.

    The last piece is padded with zeros (False); what `fn` gives there is cut off.
    """
    batch, size = jax.tree.leaves(rows)[0].shape[:2]
    count = -(-size // chunk)
    if count <= 1:
        return fn(rows)
    chunk = -(-size // count)  # as even as possible, so that little is padded

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, count * chunk - size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    out = jax.lax.map(fn, jax.tree.map(split, rows))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :size], out)


def dual_softmax_best(
    a: jax.Array,
    b: jax.Array,
    mask0: jax.Array | None = None,
    mask1: jax.Array | None = None,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find mutual nearest neighbours under the dual softmax of `a_i . b_j` without keeping the matrix.

    `confidence_ij = exp(2 a_i.b_j - logsumexp_row_i - logsumexp_column_j)`.

    Args:
      a: [B, M, C], b: [B, N, C] float32, divided so that products are logits. mask0: [B, M], mask1: [B, N]
        bool.
      chunk: rows at a time.

    Returns:
      index [B, M] int32 of the best column, confidence [B, M], mutual [B, M] bool; a masked row is not
      mutual.
    """
    batch, m, _ = a.shape
    n = b.shape[1]
    valid0 = jnp.ones((batch, m), bool) if mask0 is None else mask0
    valid1 = jnp.ones((batch, n), bool) if mask1 is None else mask1
    chunk = -(-m // -(-m // chunk))
    count = -(-m // chunk)
    pad = count * chunk - m
    a = jnp.moveaxis(jnp.pad(a, ((0, 0), (0, pad), (0, 0))).reshape(batch, count, chunk, -1), 1, 0)
    rows = jnp.moveaxis(jnp.pad(valid0, ((0, 0), (0, pad))).reshape(batch, count, chunk), 1, 0)

    def logits(part, row_mask):
        products = jnp.einsum("bmc,bnc->bmn", part, b)
        return jnp.where(row_mask[..., None] & valid1[:, None], products, MASKED)

    def sums(column, piece):
        s = logits(*piece)
        return jnp.logaddexp(column, logsumexp(s, axis=1)), logsumexp(s, axis=2)

    column_lse, row_lse = jax.lax.scan(sums, jnp.full((batch, n), -jnp.inf, a.dtype), (a, rows))

    def best(column_best, piece):
        part, row_mask, lse = piece
        log_conf = 2 * logits(part, row_mask) - lse[..., None] - column_lse[:, None]
        log_conf = jnp.where(row_mask[..., None] & valid1[:, None], log_conf, MASKED)
        return jnp.maximum(column_best, log_conf.max(1)), (
            log_conf.argmax(-1).astype(jnp.int32),
            log_conf.max(-1),
        )

    column_best, (index, top) = jax.lax.scan(best, jnp.full((batch, n), MASKED, a.dtype), (a, rows, row_lse))
    index, top = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :m] for x in (index, top))
    mutual = (top >= jnp.take_along_axis(column_best, index, axis=1)) & (top > MASKED / 2)
    return index, jnp.exp(top), mutual
