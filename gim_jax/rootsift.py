"""RootSIFT (Arandjelovic and Zisserman, CVPR 2012): the matcher that needs no weights."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

CONTRAST_THRESHOLD = 1e-5  # gim/video_preprocessor.py: keep weak keypoints, the ratio test decides
PIXELS_PER_KEYPOINT = 64  # gim/trainer/lightning.py: nfeatures = H * W // 64
RATIO = 0.8  # gim/trainer/lightning.py
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
    if gray.ndim != 2 or gray.dtype != np.uint8:
        raise ValueError(f"gray: found {gray.dtype} of shape {gray.shape}, expected uint8 [H, W]")
    empty = Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32))
    if min(gray.shape) < 16:  # below one octave OpenCV's pyramid fails
        return empty
    num = max_keypoints or max(gray.size // PIXELS_PER_KEYPOINT, 1)
    sift = cv2.SIFT_create(nfeatures=num, contrastThreshold=contrast_threshold)
    keypoints, desc = sift.detectAndCompute(gray, None if mask is None else mask.astype(np.uint8) * 255)
    if desc is None or len(keypoints) == 0:
        return empty
    small = np.array([point.size for point in keypoints]) <= max_diameter_px
    kpts = cv2.KeyPoint.convert(keypoints).astype(np.float32)[small][:max_keypoints]
    desc = desc[small][:max_keypoints]
    total = desc.sum(1, keepdims=True)
    return Features(kpts, np.sqrt(desc / np.maximum(total, 1e-6)))


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
    distance = np.sqrt(np.maximum(2 - 2 * best_sim, 0))
    second = np.sqrt(np.maximum(2 - 2 * second_sim, 0))
    idx0 = np.flatnonzero((best_sim == column_sim[best]) & (distance < ratio * second))
    idx0 = idx0[np.sort(np.unique(best[idx0], return_index=True)[1])]  # of equal descriptors the first
    conf = 1 - distance[idx0] / np.maximum(second[idx0], 1e-12)
    return idx0, best[idx0], conf.astype(np.float32)
