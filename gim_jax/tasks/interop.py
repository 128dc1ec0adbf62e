"""Matches for other tools: a matcher of vismatch, a pandas table."""

from __future__ import annotations

from typing import Any

import numpy as np

from gim_jax import api
from gim_jax.tasks import load_extra
from gim_jax.types import Matches


def vismatch_matcher(name: str = "rootsift", weights: Any = None, device: str = "cpu", **settings: Any) -> Any:
    """Return a matcher of ours as an instance of vismatch's `BaseMatcher` (vismatch 1.4, TEMPLATE.py).

    It takes what vismatch takes and returns its dict; homographies are fitted by vismatch. Needs vismatch and its
    torch, which are nobody's extra here: `pip install vismatch`.

    Args:
      name, weights: as of `gim_jax.load_matcher`.
      device: where vismatch puts its tensors; JAX chooses its own device.
      **settings: `ransac_iters`, `ransac_conf`, `ransac_reproj_thresh` go to vismatch, the others to our matcher.
    """
    try:
        base = load_extra("vismatch.base_matcher", "")
    except ValueError as error:
        raise ValueError("vismatch is not installed: pip install vismatch") from error
    theirs = {key: settings.pop(key) for key in list(settings) if key.startswith("ransac_")}
    matcher = api.load_matcher(name, weights, **settings)

    class GimJax(base.BaseMatcher):
        """A matcher of gim-jax."""

        def __init__(self):
            super().__init__(device, **theirs)
            self.matcher = matcher

        def _forward(self, img0, img1):  # tensors [3, H, W] in [0, 1] -> seven values, None where there is none
            images = [
                np.ascontiguousarray(np.rint(np.asarray(image.cpu()) * 255).astype(np.uint8).transpose(1, 2, 0))
                for image in (img0, img1)
            ]
            found = self.matcher(*images)
            return found.kpts0, found.kpts1, None, None, None, None, found.conf

    return GimJax()


def to_pandas(matches: Matches) -> Any:
    """Return a table of matches with columns x0, y0, x1, y1 (px), conf and, after `fit`, inlier."""
    pandas = load_extra("pandas", "tables")
    columns: dict[str, np.ndarray] = {}
    for side, kpts in enumerate((matches.kpts0, matches.kpts1)):
        columns |= {f"x{side}": kpts[:, 0], f"y{side}": kpts[:, 1]}
    columns["conf"] = matches.conf
    if matches.inliers is not None:
        columns["inlier"] = matches.inliers
    return pandas.DataFrame(columns)
