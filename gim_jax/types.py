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
