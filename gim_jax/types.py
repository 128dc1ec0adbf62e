"""The few types that cross module borders.

Coordinates are `(x, y)` float32 pixels of the original image, `(0, 0)` = centre of the top-left pixel. Sizes are
`(width, height)`. Images are `0` and `1` everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Matches:
    """Correspondences between two images.

    Attributes:
      kpts0: [M, 2] float32 px in image 0.
      kpts1: [M, 2] float32 px in image 1.
      conf: [M] float32 in [0, 1], higher is better.
      size0: (width, height) of image 0.
      size1: (width, height) of image 1.
      model: [3, 3] float64 after `fit`, None before and where no model could be trusted.
      inliers: [M] bool after `fit`, None before.
      reason: why `fit` gave no model, "" otherwise.
    """

    kpts0: np.ndarray
    kpts1: np.ndarray
    conf: np.ndarray
    size0: tuple[int, int]
    size1: tuple[int, int]
    model: np.ndarray | None = None
    inliers: np.ndarray | None = None
    reason: str = ""

    def __len__(self) -> int:
        return len(self.kpts0)

    def fit(self, kind: str, K0: Any = None, K1: Any = None, threshold_px: float = 1.0) -> Matches:
        """Fit a geometric model robustly and return the matches with `model`, `inliers` and `reason` set.

        Args:
          kind: "F" fundamental matrix, "H" homography 0 -> 1, "E" essential matrix.
          K0, K1: [3, 3] intrinsics, needed for "E".
          threshold_px: inlier distance.
        """
        from gim_jax import robust

        fit = robust.fit(kind, self.kpts0, self.kpts1, self.size1, threshold_px, K0=K0, K1=K1)
        return replace(self, model=fit.model, inliers=fit.inliers, reason=fit.reason)


@dataclass(frozen=True)
class Features:
    """Keypoints of one image with their descriptors.

    Attributes:
      kpts: [N, 2] float32 px of the image.
      desc: [N, D] float32.
      scores: [N] float32, higher is better.
      size: (width, height) of the image.
      scales: [N] float32 px in the image as it was resized for detection, None where a detector has none.
      oris: [N] float32 radians, None where a detector has none.
    """

    kpts: np.ndarray
    desc: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
    scales: np.ndarray | None = None
    oris: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.kpts)


@dataclass(frozen=True)
class Warp:
    """Where the pixels of each image lie in the other, on regular grids that cover the images.

    Cell (row i, column j) of an [H, W] grid over an image is centred at ((j + 0.5) width / W - 0.5,
    (i + 0.5) height / H - 0.5) px.

    Attributes:
      kpts1: [H, W, 2] float32 px in image 1, of the cells of image 0; conf0: [H, W] float32 in [0, 1].
      kpts0: [H, W, 2] float32 px in image 0, of the cells of image 1; conf1: [H, W] float32 in [0, 1]; both None
        where only one direction was computed.
      size0, size1: (width, height) of the images.
    """

    kpts1: np.ndarray
    conf0: np.ndarray
    kpts0: np.ndarray | None
    conf1: np.ndarray | None
    size0: tuple[int, int]
    size1: tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """A geometric model and the matches that agree with it.

    Attributes:
      model: [3, 3] float64, or None where no model could be fitted or trusted.
      inliers: [M] bool.
      reason: why `model` is None, "" otherwise.
    """

    model: np.ndarray | None
    inliers: np.ndarray
    reason: str = ""

    @property
    def num_inliers(self) -> int:
        return int(self.inliers.sum())
