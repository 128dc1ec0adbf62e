"""What robust fitting confirms of the matches of a pair of frames; thresholds follow the size of the frames."""

from __future__ import annotations

import numpy as np

from gim_jax import robust
from gim_jax.types import Fit


def pixel_scale(size: tuple[int, int], config) -> float:
    """How many pixels of a frame of `size` one pixel of `config.threshold_size` is, at least one.

    So an enlarged video is labelled like the original; below that size the noise is the detector's, not the video's.
    """
    width, height = config.threshold_size
    return max(1.0, float(np.sqrt(size[0] * size[1] / (width * height))))


def min_matches_for(size: tuple[int, int], config) -> int:
    """The paper's 1024 correspondences at full HD, scaled with the image area unless told otherwise."""
    if not config.scale_min_matches:
        return config.min_matches
    width, height = config.min_matches_size
    return round(config.min_matches * size[0] * size[1] / (width * height))


def fit_motion(xy: np.ndarray, size: tuple[int, int], config) -> tuple[str, Fit]:
    """`robust.fit_motion` of correspondences [M, 4] px between two frames of one size."""
    return robust.fit_motion(
        xy[:, :2], xy[:, 2:], size, config.threshold_px * pixel_scale(size, config),
        confidence=config.confidence, max_iters=config.max_iters,
    )  # fmt: skip


def one_to_one(xy: np.ndarray, conf: np.ndarray) -> np.ndarray:
    """Rows to keep so that no position occurs twice in either frame (SIFT repeats one per orientation)."""
    order = np.argsort(-conf, kind="stable")
    for side in (xy[:, :2], xy[:, 2:]):
        first = np.unique(side[order], axis=0, return_index=True)[1]
        order = order[np.sort(first)]
    return np.sort(order)
