"""What is looked at during training beside the loss: pose AUC on pairs that are known, and pictures of matches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gim_jax import geometry, viz
from gim_jax.api import load_matcher
from gim_jax.eval.pairs import evaluate_pairs, read_pairs
from gim_jax.image import read_image

SCORE = "eval/auc@5"  # of the weights that are kept as the best
ERROR_LIMIT_PX = 4.0  # from the true epipolar line: red in a picture


class Watch:
    """Match with the network as it is now, as `gim-jax match` would; its programs are compiled once.

    Args:
      evaluation: `config.eval` with pairs, a list as `gim-jax eval --benchmark=pairs` takes it or "", and num_pictures.
      meta: what the weights file will say of the network.

    Raises: ValueError for a list that is wrong.
    """

    def __init__(self, evaluation: Any, meta: Mapping[str, Any]):
        self._file, self._num_pictures, self._meta = evaluation.pairs, evaluation.num_pictures, meta
        self._pairs = read_pairs(self._file) if self._file else []
        self._matcher: Any = None

    def __call__(
        self, variables: Any, batch: Mapping[str, np.ndarray] | None
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Evaluate on the list, and draw pairs of it; without a list draw the pairs of a batch.

        Returns:
          {name: scalar}, `SCORE` and others where there is a list; {name: [H, W, 3] uint8 RGB}.
        """
        if self._matcher is None:
            self._matcher = load_matcher(self._meta["name"], variables, **self._meta["config"])
        else:
            self._matcher.set_variables(variables)
        scalars = {}
        if self._pairs:
            result = evaluate_pairs(self._file, self._matcher)
            scalars = {f"eval/auc@{degrees}": value for degrees, value in result["auc"].items()}
            scalars["eval/matches"] = float(result["mean_matches"])
        drawn = self._draw_pairs() if self._pairs else self._draw_batch(batch or {})
        return scalars, {f"matches/{number}": picture for number, picture in enumerate(drawn)}

    def _draw_pairs(self) -> Iterator[np.ndarray]:
        """Draw the first pairs of the list, coloured by the distance from the true epipolar line."""
        for pair in [pair for pair in self._pairs if not (pair.turns0 or pair.turns1)][: self._num_pictures]:
            images = read_image(pair.path0, exif=False), read_image(pair.path1, exif=False)
            found = self._matcher(*images)
            F = geometry.fundamental_from_pose(pair.T_0to1, pair.K0, pair.K1)
            error = np.sqrt(geometry.sampson_distance(found.kpts0, found.kpts1, F))
            yield viz.draw_matches(*images, found.kpts0, found.kpts1, error=error, error_limit=ERROR_LIMIT_PX)

    def _draw_batch(self, batch: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        """Draw the first pairs of a batch, coloured by confidence."""
        for rows in zip(*(batch.get(name, ())[: self._num_pictures] for name in ("image0", "image1"))):
            image0, image1 = (np.broadcast_to(image, (*image.shape[:2], 3)) for image in rows)
            found = self._matcher(image0, image1)
            yield viz.draw_matches(image0, image1, found.kpts0, found.kpts1, found.conf)
