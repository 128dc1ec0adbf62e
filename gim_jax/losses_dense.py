"""Training losses of dense warps (DKM), in float32: from depth and poses, and from sparse correspondences.

Predictions are {stride: {"flow": [B, h, w, 2], "certainty": [B, h, w]}}, flow (x, y) in [-1, 1] of image 1, +-1 its
outer borders, certainty a logit. Points in px here count from the corner of the image: the centre of pixel (i, j) is
(i + 0.5, j + 0.5).
"""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp

from gim_jax.losses import masked_mean
from gim_jax.ops.sampling import bilinear, grid_sample
from gim_jax.supervision import nearest_depth, reproject, warp_homography

CERTAINTY_WEIGHT = 0.01  # of the certainty's cross-entropy beside the distance
LOCAL_STRIDE = 8  # from here on, pixels count only where the stride before was close
LOCAL_DISTANCE = 4.0  # how close: in strides, of an image 512 px wide
GIM_DEPTH_ERROR, DKM_DEPTH_ERROR = 0.2, 0.05  # relative, between the warped depth and image 1's


def pixel_centers(shape: tuple[int, int], image_shape: tuple[int, int]) -> np.ndarray:
    """List the centres of a grid of `shape` = (h, w) over an image, [h * w, 2] float32 px from its corner."""
    (height, width), (image_height, image_width) = shape, image_shape
    x, y = np.meshgrid(
        (np.arange(width) + 0.5) * image_width / width, (np.arange(height) + 0.5) * image_height / height
    )
    return np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)


def depth_targets(shape: tuple[int, int], depth0, depth1, T, K0, K1):
    """Warp a grid over image 0 into image 1 by depth, as DKM's training does (`dkm/utils/utils.py`).

    Args:
      shape: (h, w) of the grid.
      depth0, depth1: [B, H, W] of the network's images, 0 = unknown, read by bilinear interpolation.
      T: [B, 4, 4] from camera 0 to camera 1.
      K0, K1: [B, 3, 3] of the network's images, principal point from the image's corner.

    Returns:
      target: [B, h * w, 2] in [-1, 1] of image 1.
      valid: [B, h * w] bool: depth known, inside image 1 but for the last pixel, depths there agree.
    """
    batch, height, width = depth0.shape
    points = jnp.broadcast_to(pixel_centers(shape, (height, width)), (batch, shape[0] * shape[1], 2))
    z0 = bilinear(depth0[..., None], points - 0.5)[..., 0]
    moved, z = reproject(points, z0, T, K0, K1)
    size1 = jnp.asarray([depth1.shape[2], depth1.shape[1]], jnp.float32)
    inside = ((moved > 0) & (moved < size1 - 1)).all(-1)
    target = 2 * moved / size1 - 1
    z1 = grid_sample(depth1[..., None], target, align_corners=False)[..., 0]
    agrees = jnp.abs((z1 - z) / z1) < DKM_DEPTH_ERROR
    return target, (z0 != 0) & inside & agrees


def nearest_resize(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Resize [B, H, W] to `shape` = (height, width), each pixel from floor(i * scale): torch's "nearest"."""
    rows, columns = (
        np.floor(np.arange(n) * (np.float32(old) / np.float32(n))).astype(int) for n, old in zip(shape, x.shape[1:])
    )
    return x[:, rows][:, :, columns]


def gim_depth_targets(shape: tuple[int, int], batch: dict, image_shape: tuple[int, int], released: bool = False):
    """Warp a grid over image 0 into image 1 by depth, through crops, flips and a homography, as GIM's training does.

    Args:
      shape: (h, w) of the grid.
      batch: depth0, depth1 [B, Hd, Wd] of the original images, 0 = unknown, read at the nearest pixel; T_0to1
        [B, 4, 4]; K0, K1 [B, 3, 3]; imsize1 [B, 2] (height, width) of the original image 1; optional scale0,
        scale1 [B, 2] original / resized size, offset0, offset1 [B, 2] start of the crop in px of the resized
        image, hflip1, vflip1 [B] bool with resize1 [B, 2] (height, width) of the valid part, Hq_aug [B, 3, 3].
      image_shape: (height, width) of the network's images.
      released: as the released code does, mistake the grid's points for pixel centres, though they count from the
        corner, normalise targets by width - 1, though the warp spans the width (targets are off by up to a pixel
        at the right and lower border), and call targets beyond the network's image 1 valid.

    Returns:
      target [B, h * w, 2] and valid [B, h * w], see `depth_targets`.
    """
    num = len(batch["depth0"])
    ones, zeros = jnp.ones((num, 1, 2)), jnp.zeros((num, 1, 2))
    scale0, scale1 = (batch[k][:, None] if k in batch else ones for k in ("scale0", "scale1"))
    offset0, offset1 = (batch[k][:, None] if k in batch else zeros for k in ("offset0", "offset1"))
    points = jnp.asarray(pixel_centers(shape, image_shape) - (0 if released else 0.5))  # from here on pixel centres
    points = (points + offset0) * scale0
    z0 = nearest_depth(batch["depth0"], points)
    moved, z = reproject(points, z0, batch["T_0to1"], batch["K0"], batch["K1"])
    size1 = batch["imsize1"][:, None, ::-1].astype(jnp.float32)
    inside = ((moved > 0) & (moved < size1 - 1)).all(-1)
    z1 = nearest_depth(batch["depth1"], moved)
    valid = (z0 != 0) & inside & (jnp.abs((z1 - z) / z1) < GIM_DEPTH_ERROR)
    target = moved / scale1 - offset1
    if "resize1" in batch:
        last = batch["resize1"][:, None, ::-1].astype(jnp.float32) - 1
        flips = jnp.stack([batch["hflip1"], batch["vflip1"]], -1)[:, None]
        target = jnp.where(flips, last - target, target)
    if "Hq_aug" in batch:
        target = warp_homography(target, batch["Hq_aug"])
    target = normalise_points(target, image_shape, released)
    return target, valid if released else valid & (jnp.abs(target) <= 1).all(-1)


def normalise_points(points, shape: tuple[int, int], released: bool):
    """Turn px into [-1, 1] of an image of `shape` = (height, width).

    The points count from the centre of the first pixel; `released`: that pixel's centre becomes -1, the last one's
    1, instead of the borders of the image.
    """
    size = jnp.asarray([shape[1], shape[0]], jnp.float32)
    return 2 * points / (size - 1) - 1 if released else (2 * points + 1) / size - 1


def scale_losses(
    predictions: dict, targets: dict, local_distance: float = LOCAL_DISTANCE, local_stride: int = LOCAL_STRIDE
) -> dict:
    """Compare predictions with dense targets, stride by stride (DKM, section 3.5).

    Args:
      predictions: see the module.
      targets: {stride: (target [B, h * w, 2], valid [B, h * w])}.
      local_distance, local_stride: from this stride on, a pixel is valid only where the distance at the stride
        before was below so many strides, of an image 512 px wide.

    Returns:
      {stride: {"distance": [B, h, w], "valid": [B, h, w] bool, "cross_entropy": [B]}}.
    """
    out, before = {}, None
    for stride in sorted(predictions, reverse=True):
        flow, certainty = (predictions[stride][name].astype(jnp.float32) for name in ("flow", "certainty"))
        target, valid = targets[stride]
        target = jnp.where(jnp.isfinite(target), target, 0).reshape(flow.shape)
        distance, valid = length(flow - target), valid.reshape(certainty.shape)
        if stride <= local_stride and before is not None:
            valid &= nearest_resize(before, distance.shape[1:]) < 2 / 512 * local_distance * stride
        before = distance
        cross_entropy = (jnp.logaddexp(0.0, certainty) - valid * certainty).mean((1, 2))
        out[stride] = {"distance": distance, "valid": valid, "cross_entropy": cross_entropy}
    return out


def length(x: jax.Array) -> jax.Array:
    """Length along the last axis, with gradient 0 (not NaN) where it is 0."""
    square = jnp.sum(x * x, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def dense_loss(
    predictions: dict, targets: dict, certainty=None, certainty_weight: float = CERTAINTY_WEIGHT, **settings
):
    """Train flow and certainty on pairs with depth.

    Args:
      predictions, targets, settings: see `scale_losses`.
      certainty: [B] bool, pairs whose certainty is trained (GIM leaves ScanNet out); None for all.
      certainty_weight: of the certainty's cross-entropy beside the distance.

    Returns:
      scalar total, and {stride: {"cross_entropy": scalar, "distance": scalar, "num_valid": scalar}}: means over
      pairs and over all valid pixels of the batch, unweighted.
    """
    total, parts = 0.0, {}
    for stride, part in scale_losses(predictions, targets, **settings).items():
        trained = jnp.ones(len(part["cross_entropy"]), bool) if certainty is None else certainty
        cross_entropy = masked_mean(part["cross_entropy"], trained)
        distance = masked_mean(part["distance"], part["valid"])
        parts[stride] = {"cross_entropy": cross_entropy, "distance": distance, "num_valid": part["valid"].sum()}
        total += certainty_weight * cross_entropy + distance
    return total, parts


def sparse_loss(predictions: dict, kpts0, kpts1, mask, released: bool = False):
    """Train the flow on sparse correspondences: at every stride, the mean distance in [-1, 1] units (GIM).

    Args:
      predictions: see the module.
      kpts0, kpts1: [B, M, 2] px of the network's images, (0, 0) = centre of the first pixel; their size is that of
        stride 1.
      mask: [B, M] bool.
      released: put the centres of the outer cells of every stride, not their borders, at +-1, as the released code
        does; the warp itself spans the borders.

    Returns:
      scalar total; {stride: {"distance": scalar, "cross_entropy": scalar}}, where the cross-entropy is that of the
      certainty at the points towards 1, which is not part of the total; and [B, M] the distance in px at stride 1.
    """
    shape = predictions[1]["flow"].shape[1:3]
    source, target = (normalise_points(kpts, shape, released) for kpts in (kpts0, kpts1))
    total, parts, error = 0.0, {}, jnp.zeros((*mask.shape, 2))
    for stride in sorted(predictions, reverse=True):
        flow, certainty = (predictions[stride][name].astype(jnp.float32) for name in ("flow", "certainty"))
        maps = jnp.concatenate([flow, certainty[..., None]], -1)
        size = jnp.asarray([flow.shape[2], flow.shape[1]], jnp.float32)
        index = (source + 1) / 2 * (size - 1) if released else ((source + 1) * size - 1) / 2
        index = jnp.clip(index, 0, size - 1)  # beyond the centres of the outer cells, their values hold
        values = bilinear(maps, index)
        error = values[..., :2] - target
        parts[stride] = {
            "distance": masked_mean(length(error), mask),
            "cross_entropy": masked_mean(jnp.logaddexp(0.0, -values[..., 2]), mask),
        }
        total += parts[stride]["distance"]
    return total, parts, length(error / 2 * jnp.asarray([shape[1], shape[0]], jnp.float32))
