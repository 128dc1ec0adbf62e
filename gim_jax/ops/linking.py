"""Linking correspondences through a shared frame (GIM section 3.1): points of frame B less than a radius apart.

Rule: A->B and B->C are linked where their two points in B are nearest to each other, both ways, and strictly closer
than the radius; ties go to the lower index. So the result is one-to-one.

Points are sorted by the cell of a grid that they lie in, row by row, so that the circle around a query is a run of
sorted points in each of the two rows it can touch: exact for any crowd of points, static in shape, and the walk along
the runs is as long as the most crowded one. Cell and index share one 32-bit word, whose sort costs a fifth of an
argsort.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

RADIUS_PX = 1.0  # GIM section 3.1: "less than 1 pixel"
CELL = (2, 4)  # width and height in radii; fewer of the points beside a run the smaller, more distant frames the larger
X_BITS = 10  # 2048 px at a radius of 1; points beyond the grid share its last cells: slower, not wrong
_NOBODY = np.int32(2**30)
_LAST = np.uint32(2**32 - 1)


def nearest(query, query_mask, points, points_mask, radius_px: float = RADIUS_PX):
    """Index of the nearest point closer than the radius.

    Args:
      query: [N, 2] float32 px; query_mask: [N] bool.
      points: [M, 2] float32 px; points_mask: [M] bool; M at most 2**20.

    Returns:
      [N] int32 index into `points`, -1 where there is none.
    """
    num = len(points)
    bits = max(num - 1, 1).bit_length()
    words = _cell(points, radius_px, bits) | jnp.arange(num, dtype=jnp.uint32)
    words = jnp.sort(jnp.where(points_mask, words, _LAST))
    points = points[jnp.minimum(words & ((1 << bits) - 1), num - 1)]

    left_top = _cell(query - radius_px, radius_px, bits)
    right_top = _cell(query + jnp.asarray([radius_px, -radius_px]), radius_px, bits)
    left_bottom = _cell(query + jnp.asarray([-radius_px, radius_px]), radius_px, bits)
    right_bottom = _cell(query + radius_px, radius_px, bits)
    start = jnp.stack([left_top, left_bottom])
    end = jnp.stack([right_top, right_bottom]) | ((1 << bits) - 1)
    walked = jnp.stack([query_mask, query_mask & (left_top != left_bottom)])
    first = jnp.where(walked, jnp.searchsorted(words, start.ravel()).reshape(start.shape), num)

    def step(carry):
        k, _, best_d2, best = carry
        at = jnp.minimum(first + k, num - 1)
        word = words[at]
        on_run = (first + k < num) & (word <= end)
        offset = points[at] - query
        d2 = offset[..., 0] * offset[..., 0] + offset[..., 1] * offset[..., 1]
        index = (word & ((1 << bits) - 1)).astype(jnp.int32)
        for row in range(2):
            closer = (d2[row] < best_d2) | ((d2[row] == best_d2) & (index[row] < best))
            closer &= on_run[row] & (d2[row] < radius_px * radius_px)
            best_d2, best = jnp.where(closer, d2[row], best_d2), jnp.where(closer, index[row], best)
        return k + 1, on_run.any(), best_d2, best

    nothing = (jnp.int32(0), jnp.bool_(True), jnp.full(len(query), jnp.inf, jnp.float32), jnp.full(len(query), _NOBODY))
    *_, best = jax.lax.while_loop(lambda carry: carry[1], step, nothing)
    return jnp.where(best == _NOBODY, -1, best)


def _cell(xy, radius_px: float, bits: int):
    """[..., 2] px -> [...] uint32: cell in the order of rows, above `bits` bits; its last row is no point's."""
    last = 2**X_BITS - 1, 2 ** (32 - X_BITS - bits) - 2
    x, y = (
        jnp.clip(xy[..., i] / (CELL[i] * radius_px), 0, last[i]).astype(jnp.uint32)  # cut off, so rounded down
        for i in range(2)
    )
    return ((y << X_BITS) | x) << bits


def mutual_nearest(points0, mask0, points1, mask1, radius_px: float = RADIUS_PX):
    """[N] int32: index of the point of set 1 that is nearest both ways and closer than the radius, else -1."""
    to1 = nearest(points0, mask0, points1, mask1, radius_px)
    to0 = nearest(points1, mask1, points0, mask0, radius_px)
    back = to0[jnp.maximum(to1, 0)]
    return jnp.where((to1 >= 0) & (back == jnp.arange(len(points0))), to1, -1)


@partial(jax.jit, static_argnames="radius_px")
def link(mid0, mask0, mid1, mask1, radius_px: float = RADIUS_PX):
    """Link a whole round of a video at once.

    Args:
      mid0: [P, N, 2] float32 px, points in frame B of the correspondences A->B; mask0: [P, N] bool.
      mid1: [P, M, 2] float32 px, points in frame B of the correspondences B->C; mask1: [P, M] bool.

    Returns:
      [P, N] int32 row of B->C linked to each row of A->B, -1 for none.
    """
    return _over_pairs(partial(mutual_nearest, radius_px=radius_px), mid0, mask0, mid1, mask1)


@partial(jax.jit, static_argnames="radius_px")
def is_near(query, query_mask, points, points_mask, radius_px: float = RADIUS_PX):
    """[P, N] bool: True where a query point [P, N, 2] has a point of [P, M, 2] closer than the radius."""
    return _over_pairs(partial(nearest, radius_px=radius_px), query, query_mask, points, points_mask) >= 0


def _over_pairs(one, *arrays):
    """Apply a function to every pair: all at once; on a CPU in turn, where a pair fits the cache and walks its own
    length, 4.5 times as fast."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda pair: one(*pair), arrays)
    return jax.vmap(one)(*arrays)


def link_numpy(mid0: np.ndarray, mid1: np.ndarray, radius_px: float = RADIUS_PX) -> np.ndarray:
    """`link` for one pair without padding, in NumPy: the reference. [N, 2] and [M, 2] px -> [N] int32."""
    to1 = _nearest_numpy(mid0, mid1, radius_px)
    to0 = _nearest_numpy(mid1, mid0, radius_px)
    if not len(mid1):
        return to1
    mutual = (to1 >= 0) & (to0[np.maximum(to1, 0)] == np.arange(len(mid0)))
    return np.where(mutual, to1, -1).astype(np.int32)


def _nearest_numpy(query: np.ndarray, points: np.ndarray, radius_px: float) -> np.ndarray:
    query, points = query.astype(np.float32), points.astype(np.float32)
    strip = np.floor(points[:, 1] / np.float32(radius_px)).astype(np.int32)
    order = np.argsort(strip, kind="stable")
    strip, points = strip[order], points[order]
    query_strip = np.floor(query[:, 1] / np.float32(radius_px)).astype(np.int32)
    first, last = (
        np.searchsorted(strip, query_strip - 1),
        np.searchsorted(strip, query_strip + 1, side="right"),
    )
    # every (query, candidate) pair of neighbouring strips, flat
    length = last - first
    row = np.repeat(np.arange(len(query)), length)
    at = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length) + np.repeat(first, length)
    offset = points[at] - query[row]
    d2 = offset[:, 0] * offset[:, 0] + offset[:, 1] * offset[:, 1]
    close = d2 < np.float32(radius_px * radius_px)
    row, d2, index = row[close], d2[close], order[at[close]]
    ranked = np.lexsort((index, d2, row))
    row, index = row[ranked], index[ranked]
    winner = np.ones(len(row), bool)
    winner[1:] = row[1:] != row[:-1]
    best = np.full(len(query), -1, np.int32)
    best[row[winner]] = index[winner]
    return best
