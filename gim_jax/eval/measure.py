"""From matches to errors: NumPy and OpenCV alone, so that worker processes can do it while a network runs.

A protocol says in which pixels the threshold counts, by which focal length it is divided, which estimator runs, how
often, and how points of the image that the matcher saw become points of the stored one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import geometry
from gim_jax.eval import metrics
from gim_jax.eval.chunks import read_chunk, write_chunk
from gim_jax.robust import estimate_homography, estimate_relative_pose


@dataclass(frozen=True)
class Pair:
    """Two images and what is true of them.

    Attributes:
      name0, name1, path0, path1: of the images.
      turns0, turns1: quarter turns, counter-clockwise, that make the stored images upright; matching happens upright.
      overlap: share of image 0 that image 1 sees, None if unknown.
      K0, K1: [3, 3] intrinsics of the stored images; T_0to1: [4, 4]. Of homographies identities.
      line: in the file of pairs, from one.
      set: the set's name in the table; identifier: the pair's name in it.
      H: [3, 3] homography of pixels, image 0 -> image 1, None of poses.
    """

    name0: str
    name1: str
    path0: Path
    path1: Path
    turns0: int
    turns1: int
    overlap: float | None
    K0: np.ndarray
    K1: np.ndarray
    T_0to1: np.ndarray
    line: int
    set: str = ""
    identifier: str = ""
    H: np.ndarray | None = None


@dataclass(frozen=True)
class Protocol:
    """How matches are judged.

    Attributes:
      kind: "pose" or "homography".
      method: of `robust.POSE_METHODS` or `robust.HOMOGRAPHY_METHODS`.
      threshold_px: inlier distance in pixels of `frame`.
      confidence: of the estimator.
      frame: see `frame_scale`: the size of the images in which the threshold, and a homography's error, count; none
        for the stored one.
      mean_focal: True: the threshold is divided by the mean of all four focal lengths, as DKM's evaluation; False: by
        that of fx0, fy1, fx0, fy1, as GIM's and LoFTR's.
      repeats: runs of the estimator on shuffled matches, all errors pooled (DKM: 5); 1: the order as it is.
      max_matches: the most confident that are used, None for all.
      unit_px: of a homography's error: 480: errors are divided by the short side of image 1 over 480; None: px.
      offset_px: with the released mapping of dense matchers, taken off the points in pixels of `frame` (DKM on
        ScanNet: 0.5).
      mapping: from the fed image to the stored one: "corrected"; or "released": as GIM's evaluation does, by plain
        factors without the half pixel, dense matchers' by the size without padding although they saw the padding.
    """

    kind: str = "pose"
    method: str = "ransac"
    threshold_px: float = 0.5
    confidence: float = 0.99999
    frame: tuple[tuple[str, Any], ...] = ()
    mean_focal: bool = False
    repeats: int = 1
    max_matches: int | None = None
    unit_px: float | None = None
    offset_px: float = 0.0
    mapping: str = "corrected"


COLUMNS = {  # of a chunk of measures, one row per pair and repeat: dtype and the value where there is none
    "error": (np.float64, np.inf),  # degrees, or px of homographies
    "R_error_deg": (np.float64, np.inf),
    "t_error_deg": (np.float64, np.inf),
    "t_error": (np.float64, np.inf),  # distance from the true translation in units of the scene, not folded
    "baseline": (np.float64, np.nan),  # length of the true translation in units of the scene
    "num_matches": (np.int64, 0),
    "num_inliers": (np.int64, 0),
    "num_correct": (np.int64, 0),  # matches within 5e-4 (squared, normalised) of their epipolar lines
    "num_correct_inliers": (np.int64, 0),
    "lost": (np.bool_, False),
}


def measure_chunk(matches: str, pairs: list[Pair], protocol: Protocol, dense: bool, out: str) -> str:
    """Measure a file of matches, write the file of measures, return its path."""
    begin = time.monotonic()
    data = read_chunk(matches)
    table = {name: np.full((len(pairs), protocol.repeats), none, dtype) for name, (dtype, none) in COLUMNS.items()}
    ends = np.concatenate([[0], np.cumsum(data["num_matches"])])
    for index, pair in enumerate(pairs):
        rows = slice(ends[index], ends[index + 1])
        if data["lost"][index]:
            table["lost"][index] = True
            continue
        kpts = [
            to_stored(data[f"kpts{side}"][rows], data["sizes"][index, side], protocol.mapping, dense) for side in (0, 1)
        ]
        for side, turns in enumerate((pair.turns0, pair.turns1)):
            kpts[side] = geometry.rotate_points(kpts[side], data["sizes"][index, side, 0], -turns)
        if protocol.max_matches is not None:
            best = np.argsort(-data["conf"][rows], kind="stable")[: protocol.max_matches]
            kpts = [points[best] for points in kpts]
        sizes = [tuple(int(v) for v in data["sizes"][index, side, 0]) for side in (0, 1)]
        for repeat in range(protocol.repeats):
            if protocol.repeats > 1:
                order = np.random.default_rng([repeat, len(kpts[0])]).permutation(len(kpts[0]))
                kpts = [points[order] for points in kpts]
            for name, value in MEASURES[protocol.kind](kpts, sizes, pair, protocol).items():
                table[name][index, repeat] = value
    write_chunk(out, {**table, "seconds": np.float64(time.monotonic() - begin)})
    return out


def to_stored(kpts: np.ndarray, sizes: np.ndarray, mapping: str, dense: bool) -> np.ndarray:
    """Map points of the fed image to the stored one, [M, 2] float64.

    Args:
      kpts: [M, 2] px of the image that the matcher was given.
      sizes: [3, 2] (width, height): stored (upright), resized, fed (resized and padded on the right and at the bottom).
      mapping: see `Protocol`.
      dense: the matcher's coordinates are fractions of its input, as DKM's.
    """
    stored, resized, fed = sizes.astype(np.float64)
    kpts = kpts.astype(np.float64)
    if mapping == "corrected":
        return geometry.scale_points(kpts, stored / resized)
    return (kpts + 0.5) / fed * stored if dense else kpts * (stored / resized)


def frame_scale(size: tuple[int, int], frame: Mapping[str, Any]) -> np.ndarray:
    """Return the factors (x, y) from an image of `size` = (width, height) to its frame.

    Args:
      frame: {} for the image itself, {"long_side": px}, {"short_side": px} or {"exact": (width, height)}.
    """
    if "exact" in frame:
        return np.divide(frame["exact"], size)
    scale = 1.0
    if "long_side" in frame:
        scale = frame["long_side"] / max(size)
    elif "short_side" in frame:
        scale = frame["short_side"] / min(size)
    return np.array([scale, scale])


def measure_pose(kpts, sizes, pair: Pair, protocol: Protocol) -> dict[str, Any]:
    """Estimate the relative pose of a pair and compare: a row of `COLUMNS`."""
    scales = [frame_scale(size, dict(protocol.frame)) for size in sizes]
    focals = [np.diag(K)[:2] * scale for K, scale in zip((pair.K0, pair.K1), scales)]
    focal = np.mean(focals) if protocol.mean_focal else (focals[0][0] + focals[1][1]) / 2
    kpts0, kpts1 = (points - protocol.offset_px / scale for points, scale in zip(kpts, scales))
    pose = estimate_relative_pose(
        kpts0, kpts1, pair.K0, pair.K1, protocol.threshold_px, protocol.method, protocol.confidence, float(focal)
    )
    errors = metrics.epipolar_errors(kpts0, kpts1, pair.K0, pair.K1, pair.T_0to1)
    good = errors < metrics.EPIPOLAR_THRESHOLD
    row = {
        "baseline": np.linalg.norm(pair.T_0to1[:3, 3]),
        "num_matches": len(kpts0),
        "num_correct": int(good.sum()),
    }
    if pose is None:
        return row
    R, t, inliers = pose
    R_error = metrics.rotation_error_deg(R, pair.T_0to1[:3, :3])
    t_error = metrics.translation_error_deg(t, pair.T_0to1[:3, 3])
    return (
        row
        | {
            "error": metrics.pose_error_deg(R_error, t_error),  # NaN where there is no true baseline: a failure
            "R_error_deg": R_error,
            "t_error_deg": t_error,
            "t_error": metrics.translation_error(t, pair.T_0to1[:3, 3]),
            "num_inliers": int(inliers.sum()),
            "num_correct_inliers": int(good[inliers].sum()),
        }
    )


def measure_homography(kpts, sizes, pair: Pair, protocol: Protocol) -> dict[str, Any]:
    """Estimate the homography of a pair and compare the corners of image 0: a row of `COLUMNS`."""
    frames = [np.rint(frame_scale(size, dict(protocol.frame)) * size).astype(int) for size in sizes]
    kpts0, kpts1 = (
        geometry.scale_points(points, np.divide(frame, size)) for points, frame, size in zip(kpts, frames, sizes)
    )
    resized = [geometry.scaling_homography(np.divide(frame, size)) for size, frame in zip(sizes, frames)]
    H_gt = resized[1] @ pair.H @ np.linalg.inv(resized[0])
    unit = min(frames[1]) / protocol.unit_px if protocol.unit_px else 1.0
    H, inliers = estimate_homography(kpts0, kpts1, protocol.threshold_px * unit, protocol.method, protocol.confidence)
    H = np.diag([0.0, 0.0, 1.0]) if H is None else H  # every corner to the origin, as DKM's evaluation
    return {
        "error": metrics.homography_corner_error(H, H_gt, frames[0]) / unit,
        "num_matches": len(kpts0),
        "num_inliers": int(inliers.sum()),
    }


MEASURES = {"pose": measure_pose, "homography": measure_homography}


def precision(columns: Mapping[str, np.ndarray], inliers: bool = False) -> np.ndarray:
    """Return the share of correct matches of each row, of all or of the inliers; 0 without any."""
    correct, of = ("num_correct_inliers", "num_inliers") if inliers else ("num_correct", "num_matches")
    return columns[correct] / np.maximum(columns[of], 1)
