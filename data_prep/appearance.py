"""Do labels come from the pictures? A check that needs neither geometry nor the matcher's own confidence.

A network that was never trained can give a smooth warp, such as "nothing moves", that some homography explains to the
last pixel. But what it says does not depend on where things are: patches around its points are as alike as patches a
few pixels beside. Of labels that follow the picture, most are more alike than all of those.
"""

from __future__ import annotations

import cv2
import numpy as np

from gim_jax import image, viz

NUM_JUDGED = 256  # labels of a pair, evenly chosen
HALF_PX = 5  # a patch is 11x11
SHIFT_PX = 6  # of the eight patches around
MIN_CONTRAST = 3.0  # of 255: standard deviation below which a patch is noise and tells nothing
MIN_JUDGED = 8


def reduced_gray(rgb: np.ndarray, scale: float) -> np.ndarray:
    """[h, w] uint8 of an [H, W, 3] RGB frame, made smaller by a factor of one or more."""
    gray = image.to_gray(rgb)
    if scale == 1:
        return gray
    width, height = (max(round(n / scale), 1) for n in image.size_of(gray))
    return image.resize(gray, (width, height), cv2.INTER_AREA)


def agreement(gray0: np.ndarray, gray1: np.ndarray, xy: np.ndarray, size: tuple[int, int]) -> tuple[float, int]:
    """Share of labels whose patches are more alike than those around: about 1/9 by chance.

    Args:
      gray0, gray1: [h, w] uint8, of `reduced_gray`. xy: [M, 4] px of the frames. size: (width, height) of the frames.

    Returns:
      The share, and the number of labels judged: those on contrast in both frames.
    """
    chosen = viz.spread(len(xy), NUM_JUDGED)
    scale = np.divide(image.size_of(gray0), size)
    points = (xy[chosen].reshape(-1, 2, 2) + 0.5) * scale - 0.5
    patch0 = _normalised(_windows(gray0, points[:, 0], HALF_PX))
    wide = _windows(gray1, points[:, 1], HALF_PX + SHIFT_PX)
    side = 2 * HALF_PX + 1
    scores = []
    for dy in (SHIFT_PX, 0, 2 * SHIFT_PX):  # the place itself first
        for dx in (SHIFT_PX, 0, 2 * SHIFT_PX):
            scores.append((patch0 * _normalised(wide[:, dy : dy + side, dx : dx + side])).sum((1, 2)))
    judged = (scores[0] != 0) & (patch0 != 0).any((1, 2))
    best = np.argmax(np.stack(scores), 0) == 0
    return float(best[judged].mean()) if judged.any() else 0.0, int(judged.sum())


def _windows(gray: np.ndarray, points: np.ndarray, half: int) -> np.ndarray:
    """[N, 2 half + 1, 2 half + 1] float32: the picture around points [N, 2] px, edges repeated."""
    around = np.arange(-half, half + 1, dtype=np.float32)
    x = points[:, 0, None, None].astype(np.float32) + around[None, None]
    y = points[:, 1, None, None].astype(np.float32) + around[None, :, None]
    side = len(around)
    x, y = (np.ascontiguousarray(part.reshape(-1, side)) for part in np.broadcast_arrays(x, y))
    found = cv2.remap(gray, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) if len(points) else x
    return found.reshape(-1, side, side).astype(np.float32)


def _normalised(patches: np.ndarray) -> np.ndarray:
    """Patches of mean zero and length one, zeros where there is too little contrast."""
    centred = patches - patches.mean((1, 2), keepdims=True)
    length = np.sqrt((centred**2).sum((1, 2), keepdims=True))
    enough = length > MIN_CONTRAST * patches.shape[1]
    return np.where(enough, centred / np.where(enough, length, 1), 0)
