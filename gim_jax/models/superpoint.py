"""SuperPoint: keypoints and descriptors (DeTone et al., CVPRW 2018, arXiv 1712.07629).

Three forms of one network: the official one (its released weights are for non-commercial research), the one GIM
wraps (same weights, other settings) and SuperPoint-open (MIT weights, BatchNorm after each ReLU).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from gim_jax.models.sparse import valid_size
from gim_jax.ops.sampling import bilinear

CELL = 8  # px: one score cell, and the stride of the descriptors
CHANNELS = (64, 64, 128, 128)  # of the four encoder stages
GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma of R, G, B
SAMPLINGS = ("legacy", "fixed", "exact")


@dataclass(frozen=True)
class SuperPointConfig:
    """Settings of `SuperPoint`.

    Attributes:
      max_keypoints: K, static; missing ones are masked.
      nms_radius: px; a score survives if it is the largest within this Chebyshev distance.
      threshold: scores must be strictly above.
      border: px; no keypoints this close to the border.
      border_of: "map": of the score map, whose sides are multiples of 8 (official); "image": of the image (GIM).
      sampling: where a keypoint reads the descriptor map, see `descriptor_index`.
      refinement_radius: px; moves keypoints to the mean of the scores around them, 0 for none.
      open: SuperPoint-open's layers.
      dtype: of the convolutions; scores and descriptors are float32.
    """

    max_keypoints: int = 1024
    nms_radius: int = 4
    threshold: float = 0.005
    border: int = 4
    border_of: str = "map"
    sampling: str = "legacy"
    refinement_radius: int = 0
    open: bool = False
    dtype: str = "float32"


CONFIGS = {
    "superpoint": SuperPointConfig(),
    "gim_superpoint": SuperPointConfig(2048, nms_radius=3, threshold=0.0, border_of="image"),
    "superpoint_open": SuperPointConfig(2048, sampling="exact", open=True),
}


class Block(nn.Module):
    """Convolution, ReLU, BatchNorm in this order (SuperPoint-open)."""

    features: int
    window: int
    relu: bool
    dtype: str

    def setup(self):
        self.conv = nn.Conv(self.features, (self.window,) * 2, padding=self.window // 2, dtype=self.dtype)
        self.bn = nn.BatchNorm(use_running_average=True, epsilon=1e-3, dtype=self.dtype)

    def __call__(self, x):
        x = self.conv(x)
        return self.bn(nn.relu(x) if self.relu else x)


class SuperPoint(nn.Module):
    """Detect keypoints and describe them.

    Args of a call:
      image: [B, H, W, 1] gray or [B, H, W, 3] RGB, float32 in [0, 1], any size of at least 8 x 8.
      size: [B, 2] int32 (width, height) px of the valid top left part, None for all of it. What lies outside has
        no influence: the result is that of the cropped image.

    Returns:
      dict of kpts [B, K, 2] px (pixel centres are whole numbers), scores [B, K], desc [B, K, 256] of unit length
      and mask [B, K]; best scores first; where `mask` is False, all are 0.
    """

    config: SuperPointConfig

    def setup(self):
        dtype = self.config.dtype
        if self.config.open:
            self.backbone = [[Block(c, 3, True, dtype), Block(c, 3, True, dtype)] for c in CHANNELS]
            self.detector = [Block(256, 3, True, dtype), Block(65, 1, False, "float32")]
            self.descriptor = [Block(256, 3, True, dtype), Block(256, 1, False, "float32")]
            return
        plan = [(f"conv{i + 1}{ab}", c, 3) for i, c in enumerate(CHANNELS) for ab in "ab"]
        plan += [("convPa", 256, 3), ("convPb", 65, 1), ("convDa", 256, 3), ("convDb", 256, 1)]
        for name, features, window in plan:
            head = window == 1  # scores and descriptors: equal ones, as bfloat16 makes them, would all be kept
            kind = "float32" if head else dtype
            setattr(self, name, nn.Conv(features, (window,) * 2, padding=window // 2, dtype=kind))

    def layers(self):
        """Encoder stages, detector and descriptor heads: lists of functions."""
        if self.config.open:
            return self.backbone, self.detector, self.descriptor

        def rectified(conv):
            return lambda x: nn.relu(conv(x))

        stages = [[rectified(getattr(self, f"conv{i}{ab}")) for ab in "ab"] for i in (1, 2, 3, 4)]
        return stages, [rectified(self.convPa), self.convPb], [rectified(self.convDa), self.convDb]

    def encode(self, image, size=None):
        """Score every pixel and describe every cell.

        Returns:
          scores [B, 8h, 8w], probabilities, 0 outside the valid size; descriptors [B, h, w, 256] of unit length,
          0 outside. h = H // 8, w = W // 8.
        """
        if min(image.shape[1:3]) < CELL:
            raise ValueError(f"image: {image.shape[2]}x{image.shape[1]} px, SuperPoint needs at least 8x8")
        stages, detector, descriptor = self.layers()
        x = to_gray(image)
        x = crop(x, size, 1)
        for i, stage in enumerate(stages):
            if i:
                x = crop(nn.max_pool(x, (2, 2), (2, 2)), size, 2**i)  # an odd last row or column is dropped
            for layer in stage:  # zeros outside are what the border of the cropped image would give
                x = crop(layer(x), size, 2**i)
        scores = detector[1](crop(detector[0](x), size, CELL))
        scores = nn.softmax(scores.astype(jnp.float32), axis=-1)[..., :-1]  # the last channel is "no keypoint"
        b, h, w, _ = scores.shape
        scores = crop(scores, size, CELL).reshape(b, h, w, CELL, CELL)
        scores = scores.swapaxes(2, 3).reshape(b, h * CELL, w * CELL)
        desc = descriptor[1](crop(descriptor[0](x), size, CELL)).astype(jnp.float32)
        return scores, crop(unit(desc), size, CELL)

    def describe(self, descriptors, kpts, size=None):
        """Read descriptors [B, K, 256] of unit length at kpts [B, K, 2] px from the map of `encode`."""
        _, h, w, _ = descriptors.shape
        cells = jnp.array([[w, h]]) if size is None else size // CELL
        return unit(bilinear(descriptors, descriptor_index(kpts, cells, self.config.sampling)))

    def at(self, maps, kpts, size):
        """Describe places [B, K, 2] px of the maps of `encode`; scores are those of the nearest pixels."""
        scores, descriptors = maps
        _, h, w = scores.shape
        x, y = (jnp.round(kpts[..., i]).astype(jnp.int32).clip(0, n - 1) for i, n in ((0, w), (1, h)))
        scores = jnp.take_along_axis(scores.reshape(len(scores), -1), y * w + x, axis=1)
        desc = self.describe(descriptors, kpts, size)
        return {"kpts": kpts, "scores": scores, "desc": desc, "mask": jnp.ones(scores.shape, bool)}

    def __call__(self, image, size=None):
        return self.detect(self.encode(image, size), valid_size(image, size))

    def detect(self, maps, size):
        """Detect keypoints in the maps of `encode` and describe them; size [B, 2] as of a call, but never None."""
        config = self.config
        scores, descriptors = maps
        b, h, w = scores.shape
        inside = within(scores.shape, size // CELL * CELL)
        bounds = size if config.border_of == "image" else size // CELL * CELL
        allowed = inside & within(scores.shape, bounds - config.border, config.border)
        peaks = jnp.where(allowed, non_maximum_suppression(scores, config.nms_radius, inside), -1.0)
        peaks = peaks.reshape(b, h * w)
        if h * w < config.max_keypoints:
            peaks = jnp.pad(peaks, ((0, 0), (0, config.max_keypoints - h * w)), constant_values=-1.0)
        best, index = jax.lax.top_k(peaks, config.max_keypoints)
        mask = best > max(config.threshold, -1.0)
        index = jnp.where(mask, index, 0)
        kpts = jnp.stack([index % w, index // w], -1).astype(jnp.float32)
        if config.refinement_radius:
            kpts = kpts + soft_argmax(scores, index, config.refinement_radius)
        desc = self.describe(descriptors, kpts, size)
        return {
            "kpts": jnp.where(mask[..., None], kpts, 0.0),
            "scores": jnp.where(mask, best, 0.0),
            "desc": jnp.where(mask[..., None], desc, 0.0),
            "mask": mask,
        }


def to_gray(image):
    """[B, H, W, 1 or 3] -> [B, H, W, 1]."""
    if image.shape[-1] == 1:
        return image
    return (image * jnp.array(GRAY, image.dtype)).sum(-1, keepdims=True)


def unit(x):
    """Scale to unit length along the last axis; lengths below 1e-12 count as that (torch's `normalize`)."""
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def within(shape, size, start=0):
    """[B, H, W] bool: start <= x < size[:, 0] and start <= y < size[:, 1]."""
    y, x = jnp.arange(shape[1])[None, :, None], jnp.arange(shape[2])[None, None, :]
    w, h = size[:, 0, None, None], size[:, 1, None, None]
    return (x >= start) & (x < w) & (y >= start) & (y < h)


def crop(x, size, stride):
    """Set to 0 what lies outside `size` px, for x [B, H, W, C] at a stride; None leaves x as it is."""
    return x if size is None else jnp.where(within(x.shape, size // stride)[..., None], x, 0)


def max_filter(x, radius: int):
    """Largest value within a Chebyshev distance; x [B, H, W]; nothing beyond the border."""
    for axis in (1, 2):
        window, padding = [1, 1, 1], [(0, 0)] * 3
        window[axis], padding[axis] = 2 * radius + 1, (radius, radius)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, tuple(window), (1, 1, 1), padding)
    return x


def non_maximum_suppression(scores, radius: int, inside):
    """Keep the largest score within `radius`, then twice more the largest of what those do not cover.

    Args:
      scores: [B, H, W]; inside: [B, H, W] bool, the rest neither survives nor suppresses.

    Returns:
      [B, H, W] scores, 0 where suppressed. Equal neighbours all survive.
    """
    scores = jnp.where(inside, scores, -jnp.inf)
    kept = (scores == max_filter(scores, radius)) & inside
    for _ in range(2):
        covered = max_filter(kept.astype(jnp.float32), radius) > 0
        rest = jnp.where(covered & inside, 0.0, scores)
        kept |= (rest == max_filter(rest, radius)) & ~covered & inside
    return jnp.where(kept, scores, 0.0)


def soft_argmax(scores, index, radius: int):
    """Offset [B, K, 2] px to the mean position of the scores [B, H, W] around flat indices [B, K]."""
    _, h, w = scores.shape
    offsets = jnp.arange(-radius, radius + 1)
    y, x = index[..., None, None] // w + offsets[:, None], index[..., None, None] % w + offsets[None, :]
    near = jax.vmap(lambda s, y, x: s[y.clip(0, h - 1), x.clip(0, w - 1)])(scores, y, x)
    near = jnp.where((y >= 0) & (y < h) & (x >= 0) & (x < w), near, 0.0)
    mean = jnp.stack([(near * offsets[None, :]).sum((-1, -2)), (near * offsets[:, None]).sum((-1, -2))], -1)
    return mean / jnp.maximum(near.sum((-1, -2)), 1e-6)[..., None]


def descriptor_index(kpts, cells, sampling: str):
    """Position of a pixel in the descriptor map, in cells.

    Args:
      kpts: [B, K, 2] px; cells: [B or 1, 2] (width, height) of the map.
      sampling: "legacy" stretches the map's corners onto the outermost cells' centres, half a pixel off (official,
        and what the released matchers were trained on); "fixed" x / 8 - 0.5 (half a pixel off);
        "exact" (x + 0.5) / 8 - 0.5 (SuperPoint-open).
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling: {sampling!r}, expected one of {', '.join(SAMPLINGS)}")
    if sampling == "legacy":
        cells = cells[:, None].astype(jnp.float32)
        return (kpts - 3.5) / (CELL * cells - 4.5) * (cells - 1)
    return (kpts + (0.5 if sampling == "exact" else 0.0)) / CELL - 0.5


def fill_random(key, features, size):
    """Give masked slots random places, as the official training does, so that every pair has K points.

    Args:
      key: PRNG key; features: dict of `SuperPoint`; size: [B, 2] (width, height) px.

    Returns:
      kpts [B, K, 2] with uniform places in the bounding box of the found ones (in the image if there are none);
      `SuperPoint.describe` reads their descriptors.
    """
    kpts, mask = features["kpts"], features["mask"][..., None]
    found = mask.any(1)
    low = jnp.where(found, jnp.where(mask, kpts, jnp.inf).min(1), 0.0)
    high = jnp.where(found, jnp.where(mask, kpts, -jnp.inf).max(1), size.min(-1, keepdims=True).astype(kpts.dtype))
    places = low[:, None] + jax.random.uniform(key, kpts.shape) * (high - low)[:, None]
    return jnp.where(mask, kpts, places)
