"""Linking beyond the paper: where does the motion of the labels around a point of the middle frame take it?

The paper links A->B and B->C where two labels happen to meet in B. Labels around a point tell its motion too: a local
affine map B->C, fitted to the nearest ones that agree, carries any point of A->B on, checked by the map back.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

NEIGHBOURS = 8  # labels that a local map is fitted to
MIN_NEIGHBOURS = 5  # three determine an affine map; two more tell whether it holds
REACH_PX = 24.0  # no farther than this from the point; of 12, 24 and 32 the best on rendered towns
NEAREST_PX = 8.0  # and one as near as this, or the point may lie on another surface
SPREAD_PX = 3.0  # difference from the median motion of the neighbours beyond which one is wrong or of another surface
MAX_OTHERS = 1  # of these; with more there is a depth edge, and no telling on which side of it the point lies
RESIDUAL_PX = 0.55  # root mean square of the fit: 8 labels of 0.5 px noise stay below; a depth edge leaves more
RETURN_PX = 1.0  # of the way back
PRIOR = 4.0  # px^2, of the neighbours' scatter: holds a map that they do not determine to a mere shift


def local_maps(points: np.ndarray, source: np.ndarray, target: np.ndarray, scale: float = 1.0):
    """Affine maps around points, from matched points near them.

    Args:
      points: [N, 2] px. source, target: [M, 2] px, matched.
      scale: factor of all distances.

    Returns:
      places [N, 2] px, where the maps take the points; matrices [N, 2, 2]; good [N] bool, the map can be trusted.
    """
    num = len(points)
    if num == 0 or len(source) < MIN_NEIGHBOURS:
        return np.zeros((num, 2)), np.tile(np.eye(2), (num, 1, 1)), np.zeros(num, bool)
    k = min(NEIGHBOURS, len(source))
    distance, index = cKDTree(source).query(points, k, distance_upper_bound=REACH_PX * scale)
    valid = np.isfinite(distance)
    index = np.where(valid, index, 0)
    motion = np.where(valid[..., None], target[index] - source[index], np.nan)
    with np.errstate(all="ignore"):
        middle = np.where(valid.any(1)[:, None], _nanmedian(motion), 0.0)
    weight = (valid & (np.hypot(*np.moveaxis(motion - middle[:, None], -1, 0)) < SPREAD_PX * scale)).astype(float)
    enough = (weight.sum(1) >= MIN_NEIGHBOURS) & (valid.sum(1) - weight.sum(1) <= MAX_OTHERS)
    total = np.maximum(weight.sum(1), 1)[:, None]
    offset = source[index] - points[:, None]
    motion = np.nan_to_num(motion)
    mean_offset = (weight[..., None] * offset).sum(1) / total
    mean_motion = (weight[..., None] * motion).sum(1) / total
    u, v = (offset - mean_offset[:, None]) * weight[..., None], (motion - mean_motion[:, None]) * weight[..., None]
    scatter = np.einsum("nki,nkj->nij", u, u) + PRIOR * scale**2 * np.eye(2)
    gradient = np.linalg.solve(scatter, np.einsum("nki,nkj->nij", u, v))  # motion ~ offset @ gradient
    residual = v - np.einsum("nki,nij->nkj", u, gradient)
    rms = np.sqrt((residual**2).sum((1, 2)) / total[:, 0])
    places = points + mean_motion - np.einsum("ni,nij->nj", mean_offset, gradient)
    good = enough & (rms < RESIDUAL_PX * scale) & (distance[:, 0] < NEAREST_PX * scale)
    return places, np.eye(2) + np.swapaxes(gradient, 1, 2), good


def _nanmedian(values: np.ndarray) -> np.ndarray:
    """Median over the second axis of [N, K, 2] without the NaNs, which sort last."""
    ordered, count = np.sort(values, axis=1), np.isfinite(values[..., 0]).sum(1)
    return ordered[np.arange(len(values)), np.maximum(count - 1, 0) // 2]


def carry(first: np.ndarray, second: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Carry the labels of A->B on by the local motion of those of B->C.

    Args:
      first: [N, 4] px, A->B. second: [M, 4] px, B->C.

    Returns:
      places [N, 2] px in C, good [N] bool: the map can be trusted, and the one back from C ends where it began.
    """
    middle = first[:, 2:].astype(np.float64)
    source, target = second[:, :2].astype(np.float64), second[:, 2:].astype(np.float64)
    places, _, good = local_maps(middle, source, target, scale)
    back, _, known = local_maps(places, target, source, scale)
    return places, good & known & (np.hypot(*(back - middle).T) < RETURN_PX * scale)
