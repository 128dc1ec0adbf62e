"""DISK: keypoints and descriptors learned with policy gradient (Tyszkiewicz et al., NeurIPS 2020, arXiv 2006.13566).

Its released weights are Apache-2.0. Descriptors are computed where keypoints are, not for every pixel: the last
convolution has 129 outputs, of which detection needs one.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from gim_jax.models.sparse import valid_size
from gim_jax.models.superpoint import crop, unit, within
from gim_jax.ops.sampling import gather_windows

MULTIPLE = 16  # px: images are padded with black to multiples of it, and normalised with that padding
WINDOW = 5  # px of every convolution
DOWN, UP = (16, 32, 64, 64, 64), (64, 64, 64)
DIM = 128
NORM_EPS = 1e-5  # torch's InstanceNorm


@dataclass(frozen=True)
class DiskConfig:
    """Settings of `Disk`.

    Attributes:
      max_keypoints: K, static; missing ones are masked.
      nms_window: px, odd; a keypoint scores higher than all others in its window, which lies in the image.
      threshold: scores (logits) must be strictly above.
      dtype: of the convolutions; normalisation, scores and descriptors are float32.
    """

    max_keypoints: int = 2048
    nms_window: int = 5
    threshold: float = 0.0
    dtype: str = "float32"


class PReLU(nn.Module):
    """Scale negative values, each channel by its own factor."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x >= 0, x, weight.astype(x.dtype) * x)


class LastConv(nn.Module):
    """The convolution that ends the network, computed in parts."""

    dtype: str

    @nn.compact
    def __call__(self, x, places=None):
        """Without places the scores [B, H, W]; with places [B, K, 2] (x, y) the descriptors [B, K, 128] there."""
        shape = (WINDOW, WINDOW, x.shape[-1], DIM + 1)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (DIM + 1,))
        if places is None:
            scores = jax.lax.conv_general_dilated(
                x,
                kernel[..., DIM:],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                preferred_element_type=jnp.float32,
            )
            return scores[..., 0] + bias[DIM]
        windows = gather_windows(x, places, WINDOW)
        kernel = kernel[..., :DIM].reshape(-1, x.shape[-1], DIM)
        desc = jnp.einsum("bkwc,wcd->bkd", windows, kernel, preferred_element_type=jnp.float32)
        return desc + bias[:DIM]


def conv(features: int, dtype) -> nn.Conv:
    return nn.Conv(features, (WINDOW, WINDOW), padding=WINDOW // 2, dtype=dtype)


class UpBlock(nn.Module):
    """Gate and convolution of one step up; `conv.1` and `conv.3` in the released file."""

    features: int  # 0: the last step
    dtype: str

    def setup(self):
        last = LastConv(self.dtype) if not self.features else conv(self.features, self.dtype)
        self.conv = [None, PReLU(), None, last]

    def gate(self, x, region):
        return crop(self.conv[1](normalise(x, region)), region, 1)

    def __call__(self, x, region):
        return crop(self.conv[3](self.gate(x, region)), region, 1)


class UNet(nn.Module):
    """Features at full resolution, before the last convolution."""

    dtype: str

    def setup(self):
        down = [[None, None, None, conv(DOWN[0], self.dtype)]]
        down += [[None, PReLU(), None, conv(features, self.dtype)] for features in DOWN[1:]]
        self.path_down = [[None, block] for block in down]
        self.path_up = [UpBlock(features, self.dtype) for features in (*UP, 0)]

    def __call__(self, image, region):
        """[B, H, W, 3] -> what `last` takes, [B, H, W, 80]; region: [B, 2] (width, height), None for all."""
        skips, x = [], image
        for i, (_, block) in enumerate(self.path_down):
            part = None if region is None else region // 2**i
            if i:
                x = nn.avg_pool(x, (2, 2), (2, 2))
                x = crop(block[1](normalise(x, part)), part, 1)
            x = crop(block[3](x), part, 1)
            skips.append(x)
        skips.pop()
        for block in self.path_up[:-1]:
            skip = skips.pop()
            x = jnp.concatenate([double(x, None if region is None else region // 2 ** (len(skips) + 1)), skip], -1)
            x = block(x, None if region is None else region // 2 ** len(skips))
        x = jnp.concatenate([double(x, None if region is None else region // 2), skips.pop()], -1)
        x = self.path_up[-1].gate(x, region)
        return x

    def last(self, x, places=None):
        return self.path_up[-1].conv[3](x, places)


class Disk(nn.Module):
    """Detect keypoints and describe them.

    Args of a call:
      image: [B, H, W, 3] RGB or [B, H, W, 1] gray, float32 in [0, 1].
      size: [B, 2] int32 (width, height) px of the valid top left part, None for all of it. What lies outside has
        no influence.

    Returns:
      dict of kpts [B, K, 2] px (pixel centres are whole numbers), scores [B, K], desc [B, K, 128] of unit length
      and mask [B, K]; best scores first; where `mask` is False, all are 0.
    """

    config: DiskConfig

    def setup(self):
        self.unet = UNet(self.config.dtype)

    def encode(self, image, size):
        """Features [B, H', W', 80], sides multiples of 16, and scores [B, H, W] of every pixel."""
        _, height, width, channels = image.shape
        image = jnp.tile(image, (1, 1, 1, 3)) if channels == 1 else image
        image = crop(image, size, 1)
        pad = [(0, 0), (0, -height % MULTIPLE), (0, -width % MULTIPLE), (0, 0)]
        region = None if size is None else -(-size // MULTIPLE) * MULTIPLE
        x = self.unet(jnp.pad(image, pad), region)
        return x, self.unet.last(x)[:, :height, :width]

    def at(self, maps, kpts, size):
        """Describe the pixels nearest to places [B, K, 2] px of the maps of `encode`."""
        x, scores = maps
        _, h, w = scores.shape
        pixels = jnp.round(kpts).astype(jnp.int32).clip(0, jnp.array([w - 1, h - 1]))
        scores = jnp.take_along_axis(scores.reshape(len(x), -1), pixels[..., 1] * w + pixels[..., 0], axis=1)
        desc = unit(self.unet.last(x, pixels))
        return {"kpts": kpts, "scores": scores, "desc": desc, "mask": jnp.ones(scores.shape, bool)}

    def __call__(self, image, size=None):
        return self.detect(self.encode(image, size), valid_size(image, size))

    def detect(self, maps, size):
        """Detect keypoints in the maps of `encode` and describe them; size [B, 2] as of a call, but never None."""
        config = self.config
        x, scores = maps
        b, _, width = scores.shape
        radius = config.nms_window // 2
        inside = within(scores.shape, size)
        peak = within(scores.shape, size - radius, radius)
        peak &= scores > neighbour_max(jnp.where(inside, scores, -jnp.inf), radius)
        flat = jnp.where(peak & (scores > config.threshold), scores, -jnp.inf).reshape(b, -1)
        missing = max(config.max_keypoints - flat.shape[1], 0)
        flat = jnp.pad(flat, ((0, 0), (0, missing)), constant_values=-jnp.inf)
        best, index = jax.lax.top_k(flat, config.max_keypoints)
        mask = best > -jnp.inf
        index = jnp.where(mask, index, 0)
        kpts = jnp.stack([index % width, index // width], -1)
        desc = unit(self.unet.last(x, kpts))
        return {
            "kpts": jnp.where(mask[..., None], kpts, 0).astype(jnp.float32),
            "scores": jnp.where(mask, best, 0.0),
            "desc": jnp.where(mask[..., None], desc, 0.0),
            "mask": mask,
        }


def normalise(x, region):
    """Give every channel of every image mean 0 and variance 1 over the region [B, 2] (width, height)."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    if region is None:
        mean = x.mean((1, 2), keepdims=True)
        var = ((x - mean) ** 2).mean((1, 2), keepdims=True)
    else:
        count = jnp.maximum(region.prod(-1), 1)[:, None, None, None]
        inside = within(x.shape, region)[..., None]
        mean = jnp.where(inside, x, 0).sum((1, 2), keepdims=True) / count
        var = jnp.where(inside, (x - mean) ** 2, 0).sum((1, 2), keepdims=True) / count
    return ((x - mean) * jax.lax.rsqrt(var + NORM_EPS)).astype(dtype)


def double(x, region):
    """Double height and width, bilinear between pixel centres; beyond the region its border is repeated."""
    if region is not None:
        rows = jnp.minimum(jnp.arange(x.shape[1]), region[:, 1:] - 1)
        columns = jnp.minimum(jnp.arange(x.shape[2]), region[:, :1] - 1)
        x = jax.vmap(lambda v, r, c: v[r][:, c])(x, rows, columns)
    for axis in (1, 2):
        size, pad = x.shape[axis], [(0, 0)] * 4
        pad[axis] = (1, 1)
        padded = jnp.pad(x, pad, mode="edge")
        before, after = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in (0, 2))
        x = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = x.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 2 :])
    return x


def neighbour_max(x, radius: int):
    """Largest value of [B, H, W] within a Chebyshev distance, the pixel itself left out; -inf beyond the border."""

    def beside(v, axis):
        """Largest among the neighbours along an axis."""
        pad = [(0, 0)] * 3
        pad[axis] = (radius, radius)
        padded = jnp.pad(v, pad, constant_values=-jnp.inf)
        size = v.shape[axis]
        steps = [s for s in range(2 * radius + 1) if s != radius]
        return jnp.stack([jax.lax.slice_in_dim(padded, s, s + size, axis=axis) for s in steps]).max(0)

    along = beside(x, 2)
    return jnp.maximum(along, beside(jnp.maximum(along, x), 1))
