"""Errors of poses, epipolar geometry and homographies, and their areas under the curve. NumPy, float64.

Every function is the published protocol's (official `analysis.py`, `tools/metrics.py` of GIM; `models/utils.py` of
SuperGlue; `src/utils/metrics.py` of LoFTR; the HPatches benchmark of DKM) and equals it in the golden cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gim_jax import geometry

AUC_THRESHOLDS_DEG = (5.0, 10.0, 20.0)
EPIPOLAR_THRESHOLD = 5e-4  # squared, normalised coordinates (SuperGlue section 5.2, GIM tools/metrics.py)


def _angle_deg(cosine):
    return np.degrees(np.abs(np.arccos(np.clip(cosine, -1.0, 1.0))))


def rotation_error_deg(R, R_gt):
    """Return the angle between rotations [..., 3, 3] in degrees, 0 to 180."""
    trace = np.trace(np.swapaxes(R, -1, -2) @ R_gt, axis1=-2, axis2=-1)
    return _angle_deg((trace - 1) / 2)


def translation_error_deg(t, t_gt):
    """Return the angle between directions [..., 3] in degrees, folded to 0 to 90: an essential matrix has no sign.

    NaN where one of them is zero: a pair without baseline has no direction.
    """
    t, t_gt = np.asarray(t, np.float64), np.asarray(t_gt, np.float64)
    with np.errstate(invalid="ignore"):
        cosine = np.sum(t * t_gt, -1) / (np.linalg.norm(t, axis=-1) * np.linalg.norm(t_gt, axis=-1))
    angle = _angle_deg(cosine)
    return np.minimum(angle, 180 - angle)


def translation_error(t, t_gt):
    """Return the distance of `t`, scaled to the true length, from `t_gt`, [..., 3], in its units; not folded."""
    t, t_gt = np.asarray(t, np.float64), np.asarray(t_gt, np.float64)
    length = np.linalg.norm(t_gt, axis=-1, keepdims=True)
    return np.linalg.norm(t / np.linalg.norm(t, axis=-1, keepdims=True) * length - t_gt, axis=-1)


def pose_error_deg(R_error_deg, t_error_deg):
    """Return the larger of rotation and translation error: the figure that pose AUC integrates."""
    return np.maximum(R_error_deg, t_error_deg)


def pose_auc(errors, thresholds: Sequence[float] = AUC_THRESHOLDS_DEG) -> np.ndarray:
    """Return the area under the recall curve up to each threshold, divided by the threshold, in [0, 1].

    The curve starts at (0, 0), is linear between the sorted errors (recall i / n at the i-th) and flat from the last
    error below the threshold on. Errors that are infinite or NaN count as failures.
    """
    errors = np.asarray(errors, np.float64).ravel()
    if errors.size == 0:
        raise ValueError("errors: found none, an AUC needs at least one pair")
    errors = np.where(np.isfinite(errors), errors, np.inf)
    curve = np.concatenate([[0.0], np.sort(errors)])
    recall = np.linspace(0.0, 1.0, errors.size + 1)
    areas = []
    for threshold in thresholds:
        last = np.searchsorted(curve, threshold)
        x = np.concatenate([curve[:last], [threshold]])
        y = np.concatenate([recall[:last], [recall[last - 1]]])
        areas.append(np.trapezoid(y, x) / threshold)
    return np.array(areas)


def share_below(errors, thresholds: Sequence[float] = AUC_THRESHOLDS_DEG) -> np.ndarray:
    """Return the share of errors below each threshold (what GIM's `tools/metrics.py` calls AUC in validation)."""
    errors = np.asarray(errors, np.float64).ravel()
    return np.array([np.mean(errors < threshold) for threshold in thresholds])


def epipolar_errors(kpts0, kpts1, K0, K1, T_0to1) -> np.ndarray:
    """Return squared symmetric epipolar distances [M] of pixel matches in normalised coordinates."""
    rays0, rays1 = geometry.normalize_by_K(kpts0, K0), geometry.normalize_by_K(kpts1, K1)
    return geometry.symmetric_epipolar_distance(rays0, rays1, geometry.essential_from_pose(np.asarray(T_0to1)))


def epipolar_precision(errors, threshold: float = EPIPOLAR_THRESHOLD) -> float:
    """Return the share of one pair's epipolar errors below the threshold; 0 without matches."""
    errors = np.asarray(errors)
    return float(np.mean(errors < threshold)) if errors.size else 0.0


def homography_corner_error(H, H_gt, size, *, pixel_centers: bool = True) -> float:
    """Return the mean distance in px between the image corners mapped by two homographies.

    Args:
      H: [3, 3], or None for a failure (inf).
      H_gt: [3, 3], image 0 -> image 1.
      size: (width, height) of the image whose corners are mapped.
      pixel_centers: True: corners (0, 0) to (w - 1, h - 1), as DKM's and LoFTR's protocols; False: to (w, h), as
        glue-factory.
    """
    if H is None:
        return np.inf
    width, height = np.asarray(size) - (1 if pixel_centers else 0)
    corners = np.array([[0, 0], [0, height], [width, 0], [width, height]], np.float64)
    with np.errstate(invalid="ignore"):
        offset = geometry.warp_homography(corners, np.asarray(H)) - geometry.warp_homography(corners, np.asarray(H_gt))
    error = np.mean(np.linalg.norm(offset, axis=-1))
    return float(error) if np.isfinite(error) else np.inf


def homography_transfer_error(kpts0, kpts1, H) -> np.ndarray:
    """Return half the sum of the distances in px of both transfers, 0 -> 1 by H and 1 -> 0 by its inverse, [M]."""
    H = np.asarray(H, np.float64)
    forward = np.linalg.norm(geometry.warp_homography(kpts0, H) - kpts1, axis=-1)
    backward = np.linalg.norm(geometry.warp_homography(kpts1, np.linalg.inv(H)) - kpts0, axis=-1)
    return (forward + backward) / 2
