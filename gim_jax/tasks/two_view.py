"""Reconstruction from two images (GIM figures 3 and 8): matches, essential matrix, pose, triangulated points.

World = camera 0, OpenCV axes (x right, y down, z forward); the distance between the cameras is the unit of length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from gim_jax import geometry, robust
from gim_jax.types import Matches
from gim_jax.viz import draw_matches

FOCAL_GUESS = 1.2  # times the longer side, where nothing is known (COLMAP's default_focal_length_factor)
FOCALS = (0.6, 0.75, 0.9, 1.2, 1.6, 2.2)  # times the longer side, tried where the focal length is to be found
MAX_REPROJECTION_PX = 2.0
MIN_ANGLE_DEG = 1.0
FILM_MM = 36.0  # long side of the film that EXIF's 35 mm equivalent focal length refers to
EXIF_IFD, FOCAL_35MM = 0x8769, 0xA405  # tags of the EXIF standard
MAX_REFINED = 3000  # inliers in the refinement of the pose; more only cost time
MIN_POINTS = 8  # fewer are no reconstruction


@dataclass(frozen=True)
class TwoView:
    """Two cameras and what both see.

    Attributes:
      T_0to1: [4, 4] float64, `X1 = R X0 + t` with |t| = 1; None where no pose can be trusted.
      reason: why it is None, "" otherwise.
      K0, K1: [3, 3] as given or guessed.
      points: [N, 3] float64 in camera 0; index: [N] the matches they come from.
      errors_px: [N] larger reprojection error of the two images.
      angles_deg: [N] between the two rays.
      inliers: [M] bool, matches that agree with the pose.
      counts: how many matches each test left, in order.
    """

    T_0to1: np.ndarray | None
    reason: str
    K0: np.ndarray
    K1: np.ndarray
    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    errors_px: np.ndarray = field(default_factory=lambda: np.zeros(0))
    angles_deg: np.ndarray = field(default_factory=lambda: np.zeros(0))
    inliers: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    counts: dict[str, int] = field(default_factory=dict)


def guess_K(size: tuple[int, int], focal_px: float | None = None) -> np.ndarray:
    """Return intrinsics [3, 3] with the principal point in the middle; the focal length defaults to 1.2 long sides."""
    width, height = size
    focal = focal_px or FOCAL_GUESS * max(size)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def exif_focal_px(path: Any) -> float | None:
    """Return the focal length in pixels that the EXIF data of an image file states, None where they do not."""
    try:
        with Image.open(path) as image:
            value = float(image.getexif().get_ifd(EXIF_IFD).get(FOCAL_35MM) or 0)
            return value / FILM_MM * max(image.size) if 5 < value < 2000 else None
    except (OSError, SyntaxError, TypeError, ValueError, ZeroDivisionError):  # no EXIF, or damaged
        return None


def refine_pose(
    rays0: np.ndarray, rays1: np.ndarray, T_0to1: np.ndarray, threshold: float, free_focal: bool = False
) -> tuple[np.ndarray, float]:
    """Minimise the Sampson distances of camera rays [N, 2] over rotation, direction and, if free, one focal length.

    Returns:
      T_0to1 [4, 4] with |t| = 1, and the factor of the focal length.
    """
    step = max(len(rays0) // MAX_REFINED, 1)
    rays0, rays1 = rays0[::step], rays1[::step]
    R, t = T_0to1[:3, :3], T_0to1[:3, 3]
    tangent = np.linalg.svd(t[None])[2][1:]

    def pose(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        moved = t + v[3:5] @ tangent
        return Rotation.from_rotvec(v[:3]).as_matrix() @ R, moved / np.linalg.norm(moved)

    def residuals(v: np.ndarray) -> np.ndarray:
        turn, direction = pose(v)
        E = geometry.cross_matrix(direction) @ turn
        factor = np.exp(v[5]) if free_focal else 1.0
        x0, x1 = (geometry.to_homogeneous(rays / factor) for rays in (rays0, rays1))
        line1, line0 = x0 @ E.T, x1 @ E
        return factor * (x1 * line1).sum(1) / np.sqrt((line0[:, :2] ** 2).sum(1) + (line1[:, :2] ** 2).sum(1))

    best = least_squares(residuals, np.zeros(5 + free_focal), loss="soft_l1", f_scale=threshold, x_scale=1e-2)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = pose(best.x)
    return T, float(np.exp(best.x[5])) if free_focal else 1.0


def triangulate(rays0: np.ndarray, rays1: np.ndarray, T_0to1: np.ndarray) -> np.ndarray:
    """Triangulate camera rays at depth one by the direct linear transform (Hartley and Zisserman 12.2).

    Args:
      rays0, rays1: [N, 2], see `geometry.normalize_by_K`.
      T_0to1: [4, 4].

    Returns:
      [N, 3] in camera 0; points at infinity are huge, never NaN.
    """
    P0, P1 = np.eye(3, 4), T_0to1[:3]
    rows = [rays[:, axis, None] * P[2] - P[axis] for rays, P in ((rays0, P0), (rays1, P1)) for axis in (0, 1)]
    homogeneous = np.linalg.svd(np.stack(rows, 1))[2][:, -1]
    w = homogeneous[:, 3:]
    return homogeneous[:, :3] / np.where(np.abs(w) < 1e-12, 1e-12, w)


def reconstruct(
    matches: Matches,
    K0: np.ndarray | None = None,
    K1: np.ndarray | None = None,
    *,
    threshold_px: float = 1.0,
    max_reprojection_px: float = MAX_REPROJECTION_PX,
    min_angle_deg: float = MIN_ANGLE_DEG,
) -> TwoView:
    """Find the pose of camera 1 and the points that both cameras see.

    Args:
      K0, K1: [3, 3] intrinsics. Without both one focal length for the two images is found from the matches, the
        principal points are taken to be in the middle.
      threshold_px: inlier distance of the essential matrix.
      max_reprojection_px: a point farther from either match is dropped.
      min_angle_deg: a point under a smaller angle between its rays is dropped, its depth is uncertain.

    Raises:
      ValueError: intrinsics of one image alone, of another shape, not finite or without positive focal lengths.
    """
    if (K0 is None) != (K1 is None):
        raise ValueError("K0, K1: found one of them, expected both or none")
    known = K0 is not None
    longer = max(matches.size0 + matches.size1)
    focals = [None] if known else [factor * longer for factor in FOCALS]
    Ks = [
        guess_K(size) if K is None else np.asarray(K, np.float64)
        for size, K in ((matches.size0, K0), (matches.size1, K1))
    ]
    for name, K in zip(("K0", "K1"), Ks):
        if K.shape != (3, 3) or not np.isfinite(K).all() or min(np.diag(K)) <= 0:
            raise ValueError(f"{name}: found {K.tolist()}, expected [3, 3] with positive focal lengths")
    nobody = np.zeros(len(matches), bool)
    counts = {"matches": len(matches)}

    def failed(reason: str) -> TwoView:
        return TwoView(None, reason, Ks[0], Ks[1], inliers=nobody, counts=counts)

    if len(matches) <= robust.PROBLEMS["E"].min_points:
        return failed(f"{len(matches)} matches, an essential matrix needs more than 5")
    best = None
    for focal in focals:
        Ks = Ks if focal is None else [guess_K(matches.size0, focal), guess_K(matches.size1, focal)]
        pose = robust.estimate_relative_pose(matches.kpts0, matches.kpts1, Ks[0], Ks[1], threshold_px, "magsac")
        if pose is not None and (best is None or pose[2].sum() > best[0][2].sum()):
            best = pose, Ks
    if best is None:
        return failed("no essential matrix fits the matches")
    (R, t, inliers), (K0, K1) = best
    counts["agree with the pose"] = int(inliers.sum())
    nfa = robust.log10_nfa(len(matches), int(inliers.sum()), "E", threshold_px, matches.size1)
    if nfa > robust.MAX_LOG10_NFA:
        kind, plane = robust.fit_motion(matches.kpts0, matches.kpts1, matches.size1, threshold_px)
        if kind == "H":
            return failed(f"{plane.num_inliers} of {len(matches)} matches fit a homography; the camera only turned")
        return failed(f"{int(inliers.sum())} of {len(matches)} matches agree, which chance explains")
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, t
    kpts = [points.astype(np.float64) for points in (matches.kpts0, matches.kpts1)]
    rays = [geometry.normalize_by_K(points, K) for points, K in zip(kpts, (K0, K1))]
    mean_focal = float(np.mean([K0[0, 0], K0[1, 1], K1[0, 0], K1[1, 1]]))
    T, factor = refine_pose(rays[0][inliers], rays[1][inliers], T, threshold_px / mean_focal, free_focal=not known)
    if not known:
        K0, K1 = (guess_K(size, mean_focal * factor) for size in (matches.size0, matches.size1))
        rays = [geometry.normalize_by_K(points, K) for points, K in zip(kpts, (K0, K1))]
    R, t = T[:3, :3], T[:3, 3]
    points = triangulate(rays[0], rays[1], T)
    points1 = points @ R.T + t
    keep = inliers & (points[:, 2] > 0) & (points1[:, 2] > 0)
    counts["in front of both cameras"] = int(keep.sum())
    projected = [geometry.from_homogeneous(p @ K.T) for p, K in ((points, K0), (points1, K1))]
    offsets = [np.linalg.norm(p - k, axis=1) for p, k in zip(projected, (matches.kpts0, matches.kpts1))]
    errors = np.nan_to_num(np.maximum(*offsets), nan=np.inf)
    keep &= errors <= max_reprojection_px
    counts[f"reprojected within {max_reprojection_px:g} px"] = int(keep.sum())
    directions = points / np.linalg.norm(points, axis=1, keepdims=True), points + R.T @ t
    cosine = (directions[0] * directions[1]).sum(1) / np.linalg.norm(directions[1], axis=1)
    angles = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    keep &= angles >= min_angle_deg
    counts[f"seen under {min_angle_deg:g} degree or more"] = int(keep.sum())
    if keep.sum() < MIN_POINTS:
        return failed(f"{int(keep.sum())} points left; the cameras hardly moved, or the focal length is wrong")
    index = np.flatnonzero(keep)
    return TwoView(T, "", K0, K1, points[index], index, errors[index], angles[index], inliers, counts)


def sample_colors(image: np.ndarray, kpts: np.ndarray) -> np.ndarray:
    """Return the RGB [N, 3] uint8 of the pixels nearest to points [N, 2]."""
    x, y = np.clip(np.rint(kpts).astype(int), 0, np.subtract(image.shape[1::-1], 1)).T
    return image[y, x]


def draw_points(
    points: np.ndarray, colors: np.ndarray, size: tuple[int, int], turn_deg: float = 0.0, tilt_deg: float = 0.0
) -> np.ndarray:
    """Draw points [N, 3] (y down, z forward) in perspective, seen from a side and from above: [H, W, 3] uint8 RGB."""
    width, height = size
    canvas = np.zeros((height, width, 3), np.uint8)
    middle = np.median(points, axis=0)
    spread = float(np.percentile(np.linalg.norm(points - middle, axis=1), 90)) or 1.0
    turn = Rotation.from_euler("yx", [-turn_deg, tilt_deg], degrees=True)
    seen = turn.apply(points - middle) / spread
    seen[:, 2] += 3
    near = np.flatnonzero(seen[:, 2] > 0.5)
    near = near[np.argsort(-seen[near, 2])]  # the nearest is drawn last
    reach = (np.abs(seen[near, :2]) / seen[near, 2:] / (np.array(size) / 2)).max(1)
    focal = 0.85 / max(float(np.percentile(reach, 97)), 1e-6) if len(near) else 1.0  # a few may lie outside
    x, y = np.rint(focal * seen[near, :2] / seen[near, 2:] + [width / 2, height / 2]).astype(int).T
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            inside = (x + dx >= 0) & (x + dx < width) & (y + dy >= 0) & (y + dy < height)
            canvas[(y + dy)[inside], (x + dx)[inside]] = np.maximum(colors[near][inside], 40)
    return canvas


def draw_reconstruction(
    image0: np.ndarray, image1: np.ndarray, matches: Matches, found: TwoView, height: int = 480
) -> np.ndarray:
    """Return a picture: the matches that became points, and the points as camera 0 sees them and from the side."""
    kpts0, kpts1 = matches.kpts0[found.index], matches.kpts1[found.index]
    limit = MAX_REPROJECTION_PX
    picture = draw_matches(image0, image1, kpts0, kpts1, error=found.errors_px, error_limit=limit, height=height)
    if found.T_0to1 is None:
        return picture
    half = picture.shape[1] // 2
    colors = sample_colors(image0, kpts0)
    below = [draw_points(found.points, colors, (width, height), turn) for turn, width in ((0, half), (35, half))]
    below.append(np.zeros((height, picture.shape[1] - 2 * half, 3), np.uint8))
    return np.concatenate([picture, np.concatenate(below, 1)])


def statistics(found: TwoView) -> dict[str, Any]:
    """Return the JSON-ready figures of a reconstruction."""
    stats: dict[str, Any] = {"counts": found.counts, "reason": found.reason, "num_points": len(found.points)}
    if found.T_0to1 is not None:
        angle = np.degrees(np.arccos(np.clip((np.trace(found.T_0to1[:3, :3]) - 1) / 2, -1, 1)))
        stats |= {
            "rotation_deg": float(angle),
            "median_reprojection_px": float(np.median(found.errors_px)),
            "median_angle_deg": float(np.median(found.angles_deg)),
            "median_depth_in_baselines": float(np.median(found.points[:, 2])),
        }
    return stats
