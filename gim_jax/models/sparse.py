"""What the matchers of keypoints share: from two images to matched keypoints."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gim_jax.geometry import CELL
from gim_jax.ops.pairing import join, part


def valid_size(image, mask):
    """[B, 2] int32 (width, height) px of the smallest top left part that holds everything valid.

    Args:
      image: [B, H, W, C].
      mask: [B, H/8, W/8] bool, valid cells (of a warped image no rectangle); or, to the pixel, that size itself,
        [B, 2] int32; or None where all is valid.
    """
    batch, height, width, _ = image.shape
    if mask is None:
        return jnp.tile(jnp.array([[width, height]], jnp.int32), (batch, 1))
    if mask.ndim == 2:
        return mask
    ends = [jnp.where(filled, jnp.arange(1, filled.shape[1] + 1), 0).max(-1) for filled in (mask.any(1), mask.any(2))]
    return CELL * jnp.stack(ends, -1).astype(jnp.int32)


def as_one_batch(function, *pairs):
    """Apply `function` to both images' arrays: as one batch where their shapes agree.

    Args:
      function: of arrays (or None, or trees of such) with a batch axis, giving a tree of such.
      pairs: its arguments for image 0 and image 1.

    Returns:
      What it gives for image 0 and for image 1.
    """
    first, second = zip(*pairs)
    shapes0, shapes1 = (jax.tree.map(jnp.shape, arrays) for arrays in (first, second))
    if shapes0 != shapes1:
        return function(*first), function(*second)
    both = function(*jax.tree.map(join, first, second))
    return jax.tree.map(lambda x: part(x)[0], both), jax.tree.map(lambda x: part(x)[1], both)


class Pipeline(nn.Module):
    """Extractor and matcher: `params/extractor` and `params/matcher`. A family says in `setup` which."""

    config: Any

    def __call__(self, image0, image1, size0=None, size1=None):
        """Extract and match.

        Args:
          image0, image1: [B, H, W, 1 or 3] float32 in [0, 1]; size0, size1: [B, 2] int32 valid (width, height) px,
            None for all.

        Returns:
          What the matcher returns, with kpts0, kpts1 [B, K, 2] px and mask0, mask1 [B, K].
        """
        size0, size1 = valid_size(image0, size0), valid_size(image1, size1)
        found0, found1 = as_one_batch(self.extractor, (image0, image1), (size0, size1))
        out = self.matcher(found0, found1, size0, size1)
        places = {f"{k}{i}": f[k] for i, f in enumerate([found0, found1]) for k in ("kpts", "mask")}
        return {**out, **places}

    def extract(self, image, size=None):
        """Detect and describe; see the extractor's call."""
        return self.extractor(image, size)

    def match_features(self, features0, features1, size0, size1):
        """Match features that come from elsewhere; see the matcher's call."""
        return self.matcher(features0, features1, size0, size1)

    def encode(self, image0, image1, size0, size1):
        """Return the extractor's maps of both images, without gradient: it is left as it is in training."""
        return jax.lax.stop_gradient(as_one_batch(self.extractor.encode, (image0, image1), (size0, size1)))

    def detect(self, maps, size):
        """Return what the extractor finds in the maps of `encode`."""
        return self.extractor.detect(maps, size)

    def match_at(self, maps0, maps1, kpts0, kpts1, size0, size1, train: bool = False):
        """Match given places instead of detected ones.

        Args:
          maps0, maps1: of `encode`.
          kpts0, kpts1: [B, K, 2] px; the rest as of a call. train: update the matcher's batch statistics.
        """
        found0, found1 = self._describe(maps0, maps1, kpts0, kpts1, size0, size1)
        return self.matcher(found0, found1, size0, size1, train)

    def answers_at(self, maps0, maps1, kpts0, kpts1, size0, size1, train: bool = False):
        """Like `match_at`, but every layer's answer, see the matcher's `supervised`."""
        found0, found1 = self._describe(maps0, maps1, kpts0, kpts1, size0, size1)
        return self.matcher.supervised(found0, found1, size0, size1, train)

    def _describe(self, *maps_kpts_sizes):
        pairs = zip(maps_kpts_sizes[::2], maps_kpts_sizes[1::2])
        return jax.lax.stop_gradient(as_one_batch(self.extractor.at, *pairs))


def match(module, variables, image0, image1, mask0=None, mask1=None):
    """Match two batches of images with `SuperGlue` or `LightGlue`.

    Args:
      module, variables: one of the two and its weights.
      image0, image1: [B, H, W, C] float32 in [0, 1], gray or RGB.
      mask0, mask1: [B, H/8, W/8] bool, valid cells (a rectangle at the top left); or its size to the pixel,
        [B, 2] int32 (width, height); or None for all.

    Returns:
      dict of kpts0, kpts1 [B, K, 2] px (pixel centres are whole numbers), conf [B, K] in [0, 1], mask [B, K].
      K is the number of keypoints of image 0; row i is its i-th keypoint.
    """
    out = module.apply(variables, image0, image1, valid_size(image0, mask0), valid_size(image1, mask1))
    return select(out, out["kpts0"], out["kpts1"])


def match_features(module, variables, features0, features1, size0, size1):
    """Match two batches of features; arguments as of the matcher's call, result as of `match`."""
    out = module.apply(variables, features0, features1, size0, size1, method="match_features")
    return select(out, features0["kpts"], features1["kpts"])


def select(out, kpts0, kpts1):
    """Bring the matcher's answer into the form of `match`."""
    matches = out["matches0"]
    mask = matches >= 0
    kpts1 = jnp.take_along_axis(kpts1, jnp.maximum(matches, 0)[..., None], axis=1)
    return {
        "kpts0": jnp.where(mask[..., None], kpts0, 0.0),
        "kpts1": jnp.where(mask[..., None], kpts1, 0.0),
        "conf": jnp.where(mask, out["scores0"], 0.0),
        "mask": mask,
    }
