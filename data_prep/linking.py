"""Linking correspondences through a shared frame (GIM section 3.1): points of frame B less than a radius apart.

Rule: A->B and B->C are linked where their two points in B are nearest to each other, both ways, and strictly closer
than the radius; ties go to the lower index. So the result is one-to-one. Distances are float32 and everything is
sorted, so that every machine links the same.
"""

from __future__ import annotations

import numpy as np

RADIUS_PX = 1.0  # GIM section 3.1: "less than 1 pixel"
ROW = 1 << 32  # of cells, one radius wide: more than any picture has


def near_pairs(points0: np.ndarray, points1: np.ndarray, radius_px: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of points [N, 2] and [M, 2] px closer than a radius: i [K], j [K], squared distance [K] float32.

    Points of the second set are sorted into cells one radius wide; a point looks into three cells of three rows.
    """
    points0, points1 = points0.astype(np.float32), points1.astype(np.float32)
    key0, key1 = (
        np.floor(p[:, 1].astype(np.float64) / radius_px).astype(np.int64) * ROW
        + np.floor(p[:, 0].astype(np.float64) / radius_px).astype(np.int64)
        for p in (points0, points1)
    )
    order = np.argsort(key1, kind="stable")
    key1 = key1[order]
    left = (key0 + np.array([[-ROW], [0], [ROW]]) - 1).ravel()
    first = np.searchsorted(key1, left)
    num = np.searchsorted(key1, left + 2, side="right") - first
    i = np.repeat(np.tile(np.arange(len(points0)), 3), num)
    j = order[np.arange(len(i)) + np.repeat(first - (np.cumsum(num) - num), num)]
    offset = points0[i] - points1[j]
    d2 = offset[:, 0] * offset[:, 0] + offset[:, 1] * offset[:, 1]
    close = d2 < np.float32(radius_px * radius_px)
    return i[close], j[close], d2[close]


def link(mid0: np.ndarray, mid1: np.ndarray, radius_px: float = RADIUS_PX) -> np.ndarray:
    """Link the labels of one pair of frames to those of the next.

    Args:
      mid0: [N, 2] px, points in frame B of the correspondences A->B. mid1: [M, 2] px, of the correspondences B->C.

    Returns:
      [N] int, row of B->C linked to each row of A->B, -1 for none.
    """
    i, j, d2 = near_pairs(mid0, mid1, radius_px)
    to1, to0 = _first_of(i, j, d2, len(mid0)), _first_of(j, i, d2, len(mid1))
    linked = np.flatnonzero(to1 >= 0)
    linked = linked[to0[to1[linked]] == linked]
    row = np.full(len(mid0), -1)
    row[linked] = to1[linked]
    return row


def _first_of(i: np.ndarray, j: np.ndarray, d2: np.ndarray, num: int) -> np.ndarray:
    """[num] int: for each i its nearest j, the lower one of equally near ones, -1 for none."""
    order = np.lexsort((j, d2, i))[::-1]  # of what is written to one place the last stays
    nearest = np.full(num, -1)
    nearest[i[order]] = j[order]
    return nearest


def is_near(query: np.ndarray, points: np.ndarray, radius_px: float) -> np.ndarray:
    """[N] bool: does a point of [M, 2] px lie closer than the radius to a query point of [N, 2] px?"""
    near = np.zeros(len(query), bool)
    near[near_pairs(query, points, radius_px)[0]] = True
    return near
