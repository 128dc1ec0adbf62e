"""RootSIFT (Arandjelovic and Zisserman, CVPR 2012): the matcher that needs no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from gim_jax import types

CONTRAST_THRESHOLD = 1e-5  # gim/video_preprocessor.py: keep weak keypoints, the ratio test decides
PIXELS_PER_KEYPOINT = 64  # gim/trainer/lightning.py: nfeatures = H * W // 64
RATIO = 0.8  # gim/trainer/lightning.py
DETECTORS = {  # settings of OpenCV's SIFT, one keypoint per pixel?
    "rootsift": ({"contrastThreshold": CONTRAST_THRESHOLD}, False),
    "sift": ({"contrastThreshold": 0.0066667, "edgeThreshold": 10, "nOctaveLayers": 4}, True),  # cvg/LightGlue sift.py
}
BLOCK_ROWS = 2048  # rows of the similarity matrix held at once


@dataclass(frozen=True)
class Features:
    """Keypoints [N, 2] float32 px and RootSIFT descriptors [N, 128] float32 of unit length."""

    kpts: np.ndarray
    desc: np.ndarray


def extract(
    gray: np.ndarray,
    max_keypoints: int | None = None,
    contrast_threshold: float = CONTRAST_THRESHOLD,
    mask: np.ndarray | None = None,
    max_diameter_px: float = np.inf,
) -> Features:
    """Detect and describe.

    Args:
      gray: [H, W] uint8.
      max_keypoints: strongest kept, never more; by default one per 64 pixels, and ties at the end as OpenCV has them.
      mask: [H, W] bool, True where keypoints may lie.
      max_diameter_px: larger keypoints are dropped; their position is uncertain in proportion to their size.
    """
    num = max_keypoints or max(gray.size // PIXELS_PER_KEYPOINT, 1)
    found = _sift(gray, num, mask, contrastThreshold=contrast_threshold)
    small = np.asarray(found.scales) <= max_diameter_px
    return Features(found.kpts[small][:max_keypoints], root(found.desc[small][:max_keypoints]))


def detect(gray: np.ndarray, max_keypoints: int, kind: str = "rootsift") -> types.Features:
    """Detect and describe for a learned matcher.

    Args:
      gray: [H, W] uint8.
      max_keypoints: strongest kept, never more.
      kind: a key of DETECTORS.
    """
    settings, one_per_pixel = DETECTORS[kind]
    found = _sift(gray, max_keypoints, **settings)
    desc = root(found.desc)
    if one_per_pixel:
        keep = strongest_per_pixel(found.kpts, found.scores, np.asarray(found.oris))
        desc = np.maximum(desc, 1e-3)[keep]  # official: clip at 1e-6 before the root
        desc = desc / np.maximum(np.linalg.norm(desc, axis=1, keepdims=True), 1e-6)
        found = replace(found, **{name: getattr(found, name)[keep] for name in ("kpts", "scores", "scales", "oris")})
    found = replace(found, desc=desc)
    if len(found) <= max_keypoints:
        return found
    best = np.sort(np.argsort(-found.scores, kind="stable")[:max_keypoints])
    return replace(found, **{n: getattr(found, n)[best] for n in ("kpts", "desc", "scores", "scales", "oris")})


def _sift(gray: np.ndarray, num: int, mask: np.ndarray | None = None, **settings) -> types.Features:
    """Run OpenCV's SIFT for the `num` strongest keypoints (more where they are equal); descriptors are raw."""
    if gray.ndim != 2 or gray.dtype != np.uint8:
        raise ValueError(f"gray: found {gray.dtype} of shape {gray.shape}, expected uint8 [H, W]")
    keypoints, desc = (), None
    if min(gray.shape) >= 16:  # below one octave OpenCV's pyramid fails
        sift = cv2.SIFT_create(nfeatures=num, **settings)
        keypoints, desc = sift.detectAndCompute(gray, None if mask is None else mask.astype(np.uint8) * 255)
    rows = [(*k.pt, k.response, k.size, k.angle) for k in keypoints] if desc is not None else []
    table = np.array(rows, np.float32).reshape(-1, 5)
    desc = np.zeros((0, 128), np.float32) if desc is None else desc
    size = gray.shape[1], gray.shape[0]
    return types.Features(table[:, :2], desc, table[:, 2], size, table[:, 3], np.deg2rad(table[:, 4]))


def root(desc: np.ndarray) -> np.ndarray:
    """Turn SIFT's descriptors [N, 128] into RootSIFT's: divided by their sum, then the square root."""
    return np.sqrt(desc / np.maximum(desc.sum(1, keepdims=True), 1e-6))


def strongest_per_pixel(kpts: np.ndarray, scores: np.ndarray, oris: np.ndarray) -> np.ndarray:
    """Indices [K], ascending, of one keypoint per pixel: the highest score, among equals the smallest angle."""
    pixels = np.rint(kpts - 0.5).astype(np.int64)  # official: as if in the corner convention
    order = np.lexsort((np.abs(oris), -scores, pixels[:, 0], pixels[:, 1]))
    ordered = pixels[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return np.sort(order[first])


def match(desc0: np.ndarray, desc1: np.ndarray, ratio: float = RATIO) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mutual nearest neighbours that pass the ratio test in image 0.

    Args:
      desc0, desc1: [N, D] and [M, D] float32 of unit length.
      ratio: nearest over second-nearest distance must stay below.

    Returns:
      idx0 [K] int64 ascending, idx1 [K] int64, conf [K] float32 = 1 - distance ratio.
    """
    num0, num1 = len(desc0), len(desc1)
    if num0 == 0 or num1 < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    best = np.empty(num0, np.int64)
    best_sim, second_sim = np.empty(num0, np.float32), np.empty(num0, np.float32)
    column_sim = np.full(num1, -np.inf, np.float32)
    for start in range(0, num0, BLOCK_ROWS):
        sim = desc0[start : start + BLOCK_ROWS] @ desc1.T
        rows, block = np.arange(len(sim)), slice(start, start + len(sim))
        np.maximum(column_sim, sim.max(0), out=column_sim)  # fifty times as fast as an argmax over rows
        best[block] = sim.argmax(1)
        best_sim[block] = sim[rows, best[block]]
        sim[rows, best[block]] = -np.inf
        second_sim[block] = sim.max(1)
    return select(best, best_sim, second_sim, column_sim, ratio)


def select(
    best: np.ndarray, best_sim: np.ndarray, second_sim: np.ndarray, column_sim: np.ndarray, ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep what is mutual and passes the ratio test; returns what `match` does.

    Args:
      best, best_sim, second_sim: [N] most similar descriptor of image 1, its similarity, and that of the second.
      column_sim: [M] largest similarity that a descriptor of image 1 has.
    """
    distance = np.sqrt(np.maximum(2 - 2 * best_sim, 0))
    second = np.sqrt(np.maximum(2 - 2 * second_sim, 0))
    idx0 = np.flatnonzero((best_sim == column_sim[best]) & (distance < ratio * second))
    idx0 = idx0[np.sort(np.unique(best[idx0], return_index=True)[1])]  # of equal descriptors the first
    conf = 1 - distance[idx0] / np.maximum(second[idx0], 1e-12)
    return idx0, best[idx0], conf.astype(np.float32)
