"""Robust fitting: the only caller of OpenCV's estimators, guarded once for all inputs.

OpenCV throws on too few points, returns None or stacked matrices on degenerate ones, and finds "inliers" in noise: of
20 000 random matches 55 agree with some fundamental matrix at 0.5 px. So every model has to pass an a-contrario test
(Moisan and Stival, IJCV 2004): the number of models expected to gather as many inliers from random matches must be
far below one.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.special import gammaln

from gim_jax.types import Fit

MAX_LOG10_NFA = -3.0  # expected number of equally good models among random matches: one in a thousand
PLANE_SHARE = 0.5  # a homography with fewer of the inliers cannot be all that they tell
PLANE_ITERS = 300  # finds one that half of the points agree with, but for a chance of 4e-9
PARALLAX = 3.0  # thresholds off the homography: beyond the tail of what noise does to points on it


@dataclass(frozen=True)
class _Problem:
    name: str
    min_points: int


PROBLEMS = {
    "F": _Problem("fundamental matrix", 7),
    "H": _Problem("homography", 4),
    "E": _Problem("essential matrix", 5),
}


def fit(
    kind: str,
    kpts0: np.ndarray,
    kpts1: np.ndarray,
    size1: tuple[int, int],
    threshold_px: float = 1.0,
    *,
    K0: np.ndarray | None = None,
    K1: np.ndarray | None = None,
    confidence: float = 0.999999,
    max_iters: int = 10_000,
) -> Fit:
    """Fit a fundamental matrix, homography or essential matrix with MAGSAC and refuse what chance could explain.

    Args:
      kind: "F", "H" or "E".
      kpts0, kpts1: [M, 2] px, finite.
      size1: (width, height) of image 1, the space in which random matches fall.
      threshold_px: inlier distance in pixels; for "E" divided by the mean focal length.
      K0, K1: [3, 3] intrinsics, needed for "E".

    Returns:
      `Fit` with a [3, 3] float64 model and the inlier mask; model None, no inliers and the reason otherwise.
    """
    if kind not in PROBLEMS:
        raise ValueError(f"kind: found {kind!r}, expected one of F, H, E")
    if len(kpts0) != len(kpts1):
        raise ValueError(f"kpts0 and kpts1: {len(kpts0)} and {len(kpts1)} points, expected as many")
    if not 0 < threshold_px < np.inf:
        raise ValueError(f"threshold_px: found {threshold_px}, expected a positive number of px")
    if kind == "E" and (K0 is None or K1 is None):
        raise ValueError("K0, K1: an essential matrix needs both intrinsics")
    kpts0 = np.ascontiguousarray(kpts0, np.float64).reshape(-1, 2)
    kpts1 = np.ascontiguousarray(kpts1, np.float64).reshape(-1, 2)
    problem, num = PROBLEMS[kind], len(kpts0)
    nobody = np.zeros(num, bool)
    if num <= problem.min_points:
        return Fit(None, nobody, f"{num} matches, a {problem.name} needs more than {problem.min_points}")
    if not (np.isfinite(kpts0).all() and np.isfinite(kpts1).all()):
        raise ValueError("kpts0, kpts1: found values that are not finite")
    try:
        model, mask = _estimate(kind, kpts0, kpts1, threshold_px, K0, K1, confidence, max_iters)
    except cv2.error as error:  # degenerate points; OpenCV has no finer type
        return Fit(None, nobody, f"no {problem.name}: {error.err}")
    if model is None or model.shape != (3, 3) or not np.isfinite(model).all() or mask is None:
        return Fit(None, nobody, f"no {problem.name} fits: the points are degenerate")
    inliers = mask.ravel() > 0
    score = log10_nfa(num, int(inliers.sum()), kind, threshold_px, size1)
    if not score <= MAX_LOG10_NFA:
        return Fit(None, nobody, f"{int(inliers.sum())} of {num} matches agree, which chance explains")
    return Fit(model, inliers)


def fit_motion(
    kpts0: np.ndarray, kpts1: np.ndarray, size1: tuple[int, int], threshold_px: float = 1.0, *,
    confidence: float = 0.999999, max_iters: int = 10_000,
) -> tuple[str, Fit]:  # fmt: skip
    """Fit the motion between two frames: a fundamental matrix, or a homography where that is all the matches tell.

    A camera that turns without moving, or that sees one plane, leaves the fundamental matrix undetermined: any
    epipole agrees, and along its lines arbitrary matches pass. So where a homography explains most inliers, those off
    it have to pass the chance test on their own: given the homography, two of them determine the epipole (plane and
    parallax, Hartley and Zisserman 13.3). Where they do not, the inliers of the homography are what is known.

    Args and errors: as `fit`.

    Returns:
      "F", "H" or "" where nothing can be trusted, and the fit.
    """
    found = fit("F", kpts0, kpts1, size1, threshold_px, confidence=confidence, max_iters=max_iters)
    if found.model is None:
        return "", found
    near = found.inliers
    plane = fit("H", kpts0[near], kpts1[near], size1, threshold_px, confidence=confidence, max_iters=PLANE_ITERS)
    if plane.model is None or plane.num_inliers < PLANE_SHARE * found.num_inliers:
        return "F", found
    error = transfer_error(plane.model, kpts0, kpts1)
    off = error > PARALLAX * threshold_px
    score = log10_nfa(int(off.sum()), int((off & near).sum()), "F", threshold_px, size1, sample=2)
    if score <= MAX_LOG10_NFA:
        return "F", found
    return "H", Fit(plane.model, error <= threshold_px)


def transfer_error(H: np.ndarray, kpts0: np.ndarray, kpts1: np.ndarray) -> np.ndarray:
    """Distance of `kpts1` from where H maps `kpts0`: [M] px, inf where it maps behind the camera."""
    mapped = np.c_[kpts0, np.ones(len(kpts0))] @ H.T
    front = mapped[:, 2] * np.median(mapped[:, 2]) > 0 if len(mapped) else np.zeros(0, bool)
    place = mapped[:, :2] / np.where(front, mapped[:, 2], 1.0)[:, None]
    return np.where(front, np.linalg.norm(place - kpts1, axis=1), np.inf)


def _estimate(kind, kpts0, kpts1, threshold_px, K0, K1, confidence, max_iters):
    if kind == "F":
        return cv2.findFundamentalMat(kpts0, kpts1, cv2.USAC_MAGSAC, threshold_px, confidence, max_iters)
    if kind == "H":
        return cv2.findHomography(kpts0, kpts1, cv2.USAC_MAGSAC, threshold_px, None, max_iters, confidence)
    unit0 = (kpts0 - K0[:2, 2]) / [K0[0, 0], K0[1, 1]]
    unit1 = (kpts1 - K1[:2, 2]) / [K1[0, 0], K1[1, 1]]
    focal = np.mean([K0[0, 0], K0[1, 1], K1[0, 0], K1[1, 1]])
    return cv2.findEssentialMat(
        unit0, unit1, np.eye(3), cv2.USAC_MAGSAC, confidence, threshold_px / focal, maxIters=max_iters
    )


def log10_nfa(
    num: int, num_inliers: int, kind: str, threshold_px: float, size1: tuple[int, int], sample: int = 0
) -> float:
    """Log10 of the number of models that random matches would offer with as many inliers (number of false alarms).

    A random point of image 1 lies within the threshold of a given epipolar line with probability at most
    2 * threshold * diagonal / area, and of a given point with pi * threshold^2 / area. The threshold is widened by
    sqrt(2) because OpenCV measures a distance that both images share. `sample` matches determine the model; by
    default as many as the kind needs when nothing is known of it.
    """
    width, height = size1
    sample = sample or PROBLEMS[kind].min_points
    if num_inliers <= sample:
        return np.inf
    reach = np.sqrt(2.0) * threshold_px
    area = float(width * height)
    chance = np.pi * reach**2 / area if kind == "H" else 2 * reach * np.hypot(width, height) / area
    choose = _log10_binomial(num, num_inliers) + _log10_binomial(num_inliers, sample)
    return float(np.log10(num - sample) + choose + (num_inliers - sample) * np.log10(min(chance, 1.0)))


def _log10_binomial(n: int, k: int) -> float:
    return float((gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)) / np.log(10))


POSE_METHODS = {"ransac": cv2.RANSAC, "magsac": cv2.USAC_MAGSAC, "poselib": None}
HOMOGRAPHY_METHODS = {"ransac": cv2.RANSAC, "magsac": cv2.USAC_MAGSAC, "poselib": None}


def _poselib():
    """Import the optional estimator."""
    try:
        import poselib  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("method: poselib is not installed; `pip install poselib` (extra: eval)") from error
    return poselib


def estimate_relative_pose(
    kpts0: np.ndarray,
    kpts1: np.ndarray,
    K0: np.ndarray,
    K1: np.ndarray,
    threshold_px: float = 0.5,
    method: str = "ransac",
    confidence: float = 0.99999,
    focal_px: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Estimate the pose of camera 1 relative to camera 0 as the published evaluations do (no chance test here).

    Points are normalised by K, an essential matrix is fitted with the threshold divided by the mean of fx0, fy1,
    fx0 and fy1 (sic), and of all returned 3x3 blocks the decomposition with most points before both cameras wins.
    OpenCV's seed is fixed, so the same matches in the same order give the same pose. Source: GIM
    `tools/metrics.py`, SuperGlue `models/utils.py`; GIM's options for other estimators have no effect there.

    Args:
      kpts0, kpts1: [M, 2] px.
      K0, K1: [3, 3].
      threshold_px: inlier distance.
      method: "ransac" (published), "magsac", or "poselib" (LO-RANSAC with refinement; an extra).
      confidence: of the estimator.
      focal_px: divides the threshold instead of the mean above.

    Returns:
      R [3, 3], unit t [3] with `X1 = R X0 + s t`, inliers [M] bool; None with fewer than five matches or no model.
    """
    if method not in POSE_METHODS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(POSE_METHODS)}")
    if len(kpts0) < 5:
        return None
    K0, K1 = np.asarray(K0, np.float64), np.asarray(K1, np.float64)
    rays0 = (np.asarray(kpts0, np.float64) - K0[:2, 2]) / K0[[0, 1], [0, 1]]
    rays1 = (np.asarray(kpts1, np.float64) - K1[:2, 2]) / K1[[0, 1], [0, 1]]
    threshold = threshold_px / (focal_px or float(np.mean([K0[0, 0], K1[1, 1], K0[0, 0], K1[1, 1]])))
    if method == "poselib":
        return _poselib_pose(rays0, rays1, threshold, confidence)
    eye = np.eye(3)
    try:
        E, mask = cv2.findEssentialMat(
            rays0, rays1, eye, method=POSE_METHODS[method], prob=confidence, threshold=threshold
        )
    except cv2.error:  # MAGSAC throws where RANSAC returns nothing
        return None
    if E is None or mask is None:
        return None
    best, best_count = None, 0
    for block in np.split(E, len(E) // 3):
        count, R, t = cv2.recoverPose(block, rays0, rays1, eye, 1e9, mask=mask)[:3]  # 1e9: no point is too far
        if count > best_count:
            best, best_count = (R, t[:, 0], mask.ravel() > 0), count
    return best


def _poselib_pose(rays0, rays1, threshold: float, confidence: float):
    camera = {"model": "PINHOLE", "width": 2, "height": 2, "params": [1.0, 1.0, 0.0, 0.0]}
    options = {"max_epipolar_error": threshold, "success_prob": confidence}
    pose, info = _poselib().estimate_relative_pose(rays0, rays1, camera, camera, options, {})
    inliers = np.asarray(info["inliers"], bool)
    length = np.linalg.norm(pose.t)
    if not inliers.any() or not length > 0:
        return None
    return np.asarray(pose.R), np.asarray(pose.t) / length, inliers


def estimate_homography(
    kpts0: np.ndarray,
    kpts1: np.ndarray,
    threshold_px: float = 3.0,
    method: str = "ransac",
    confidence: float = 0.995,
) -> tuple[np.ndarray | None, np.ndarray]:
    """Estimate the homography 0 -> 1 as the published evaluations do (no chance test here).

    Args:
      kpts0, kpts1: [M, 2] px.
      threshold_px: inlier distance in image 1.
      method: "ransac" (published), "magsac" or "poselib" (an extra).
      confidence: of the estimator; OpenCV's default here.

    Returns:
      H [3, 3] float64, None with fewer than four matches or no model; inliers [M] bool.
    """
    if method not in HOMOGRAPHY_METHODS:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(HOMOGRAPHY_METHODS)}")
    nobody = np.zeros(len(kpts0), bool)
    if len(kpts0) < 4:
        return None, nobody
    kpts0, kpts1 = np.asarray(kpts0, np.float64), np.asarray(kpts1, np.float64)
    if method == "poselib":
        options = {"max_reproj_error": threshold_px, "success_prob": confidence}
        H, info = _poselib().estimate_homography(kpts0, kpts1, options, {})
        mask = np.asarray(info["inliers"], bool)
        return (np.asarray(H), mask) if mask.any() else (None, nobody)
    try:
        H, mask = cv2.findHomography(kpts0, kpts1, HOMOGRAPHY_METHODS[method], threshold_px, confidence=confidence)
    except cv2.error:  # degenerate points
        return None, nobody
    return (None, nobody) if H is None or mask is None else (H, mask.ravel() > 0)
