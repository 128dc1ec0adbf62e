"""Ground truth for training: LoFTR's coarse and fine targets from depth and poses; labels of keypoints from depth and
poses or from a homography.

Conventions: depth maps and intrinsics are those of the original images, coarse cells those of the network's
images. `scale` = original size / resized size (x, y); `offset` = where the crop starts, in px of the resized
image.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp

from gim_jax import geometry

COARSE = 8  # px per coarse cell


def nearest_depth(depth, points, outside=0.0):
    """Read depth [B, H, W] at the pixels nearest to points [B, N, 2]; `outside` of the map, a number or [B, 1]."""
    height, width = depth.shape[1:]
    x, y = jnp.moveaxis(jnp.round(points), -1, 0)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = jnp.where(inside, y * width + x, 0).astype(jnp.int32)
    return jnp.where(inside, jnp.take_along_axis(depth.reshape(len(depth), -1), index, axis=1), outside)


def into_camera(points, depth, T, K_from, K_to):
    """Move points [B, N, 2] px with `depth` [B, N] into another camera: homogeneous px [B, N, 3] and depth [B, N]."""
    rays = geometry.to_homogeneous(points) * depth[..., None]
    camera = jnp.einsum("bij,bnj->bni", jnp.linalg.inv(K_from), rays, precision="highest")
    moved = jnp.einsum("bij,bnj->bni", T[:, :3, :3], camera, precision="highest") + T[:, None, :3, 3]
    return jnp.einsum("bij,bnj->bni", K_to, moved, precision="highest"), moved[..., 2]


def reproject(points, depth, T, K_from, K_to):
    """Like `into_camera`, but px [B, N, 2]: of points without depth those of the epipole (LoFTR's and DKM's code)."""
    projected, z = into_camera(points, depth, T, K_from, K_to)
    return projected[..., :2] / (projected[..., 2:] + 1e-4), z


def warp_depth(points, depth, T, K_from, K_to, released: bool = False):
    """Warp points of one image into another through their depth.

    Args:
      points: [B, N, 2] px. depth: [B, H, W], 0 = unknown, read at the nearest pixel (0 outside the array).
      T: [B, 4, 4], from the first camera to the second. K_from, K_to: [B, 3, 3].
      released: points outside the array get the depth of its first pixel, as in GIM's code.

    Returns:
      [B, N, 2] px. Points without depth land on the epipole, as in the official code
      (`src/loftr/utils/geometry.py`): the mutual check of `coarse_targets` sorts them out.
    """
    z = nearest_depth(depth, points, depth[:, :1, 0] if released else 0.0)
    return reproject(points, z, T, K_from, K_to)[0]


def warp_homography(points, H):
    """Apply homographies [B, 3, 3] to points [B, N, 2]."""
    moved = jnp.einsum("bij,bnj->bni", H[:, :, :2], points, precision="highest") + H[:, None, :, 2]
    return moved[..., :2] / moved[..., 2:]


def grid_points(batch: int, shape: tuple[int, int], mask=None) -> jax.Array:
    """List the cell corners of a coarse grid, [B, h * w, 2] px of the network's image; masked cells move to
    (0, 0)."""
    y, x = jnp.meshgrid(jnp.arange(shape[0]), jnp.arange(shape[1]), indexing="ij")
    points = jnp.stack([x, y], -1).reshape(1, -1, 2).astype(jnp.float32) * COARSE
    points = jnp.broadcast_to(points, (batch, *points.shape[1:]))
    return points if mask is None else points * mask.reshape(batch, -1, 1)


def nearest_cell(points, shape: tuple[int, int]) -> jax.Array:
    """Index the cell nearest to points [B, N, 2] px of the network's image; 0 for points outside the grid."""
    cell = jnp.round(points / COARSE)
    x, y = cell[..., 0], cell[..., 1]
    inside = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])  # NaN is outside
    return jnp.where(inside, y * shape[1] + x, 0).astype(jnp.int32)


def coarse_targets(batch: dict, shape0: tuple[int, int], shape1: tuple[int, int], released: bool = False) -> dict:
    """Match coarse cells that project onto each other both ways (LoFTR supplementary 1.3).

    Args:
      batch: depth0, depth1 [B, H, W], T_0to1, T_1to0 [B, 4, 4], K0, K1 [B, 3, 3]; optional scale0, scale1 [B,
        2], offset0, offset1 [B, 2], mask0, mask1 [B, h, w], and Hq_aug [B, 3, 3], Hq_ori: the homography that
        was applied to image 1, in px of the network's and of the original image.
      shape0, shape1: (h, w) of the coarse grids.
      released: see `warp_depth`; cells that the homography brings from outside of image 1 then match, too.

    Returns:
      match1 [B, h0 * w0] int32: the cell of image 1, -1 where there is none (the first cell never matches, as
      in the official code); w_pt0 [B, h0 * w0, 2]: cells of image 0 warped to image 1, pt1 [B, h1 * w1, 2]:
      cells of image 1, both px of the original image 1.
    """
    size = batch["depth0"].shape[0]
    ones, zeros = jnp.ones((size, 1, 2)), jnp.zeros((size, 1, 2))
    scale0, scale1 = (batch[k][:, None] if k in batch else ones for k in ("scale0", "scale1"))
    offset0, offset1 = (batch[k][:, None] if k in batch else zeros for k in ("offset0", "offset1"))
    homography = batch.get("Hq_aug")

    pt0 = (grid_points(size, shape0, batch.get("mask0")) + offset0) * scale0
    pt1 = grid_points(size, shape1, batch.get("mask1"))
    source1 = pt1 if homography is None else warp_homography(pt1, jnp.linalg.inv(homography))
    source1 = (source1 + offset1) * scale1

    w_pt0 = warp_depth(pt0, batch["depth0"], batch["T_0to1"], batch["K0"], batch["K1"], released)
    w_pt1 = warp_depth(source1, batch["depth1"], batch["T_1to0"], batch["K1"], batch["K0"], released)
    in1 = w_pt0 / scale1 - offset1
    in1 = in1 if homography is None else warp_homography(in1, homography)
    nearest1 = nearest_cell(in1, shape1)
    nearest0 = nearest_cell(w_pt1 / scale0 - offset0, shape0)

    cells = jnp.arange(nearest1.shape[1])
    mutual = (jnp.take_along_axis(nearest0, nearest1, axis=1) == cells) & (cells > 0)
    return {"match1": jnp.where(mutual, nearest1, -1), "w_pt0": w_pt0, "pt1": pt1 * scale1}


def fine_targets(batch: dict, targets: dict, index, cells0, cells1, radius: int = 2) -> jax.Array:
    """Say where in its fine window each match lies: the target of the fine stage.

    Args:
      batch, targets: input and output of `coarse_targets`. index: [N] image of each match in the batch.
      cells0, cells1: [N] coarse cells. radius: of the window, in fine cells (2 px).

    Returns:
      [N, 2] (x, y), +-1 = border of the window; values beyond are wrong coarse matches.
    """
    size = batch["depth0"].shape[0]
    scale1 = batch["scale1"] if "scale1" in batch else jnp.ones((size, 2))
    target = targets["w_pt0"]
    if "Hq_ori" in batch:
        offset = batch["offset1"][:, None] * scale1[:, None] if "offset1" in batch else 0
        target = warp_homography(target - offset, batch["Hq_ori"])
    return (target[index, cells0] - targets["pt1"][index, cells1]) / (2 * scale1[index]) / radius


# ------------------------------------------------------------------------------------------- labels of keypoints

UNMATCHED, IGNORE = -1, -2


def squared_distances(points0, points1):
    """[B, M, N] squared distances of points [B, M, 2] and [B, N, 2]."""
    return ((points0[:, :, None] - points1[:, None]) ** 2).sum(-1)


def label_by_distance(dist0, dist1, possible, known0, known1, mask0, mask1, positive_px: float, negative_px: float):
    """Label keypoints by how near they come to each other's warped places.

    Args:
      dist0: [B, M, N] squared px from the warped keypoints of image 0 to those of image 1; dist1: [B, M, N] from those
        of image 0 to the warped ones of image 1.
      possible: [B, M, N] bool, pairs that may match. known0: [B, M], known1: [B, N] bool, keypoints that may be called
        unmatched. mask0, mask1: bool, slots that hold a keypoint.
      positive_px: both distances of a match are below. negative_px: an unmatched keypoint has none within.

    Returns:
      matches0 [B, M] int32 index of the match, -1 unmatched, -2 to be ignored; matches1 [B, N].
    """
    pair = mask0[:, :, None] & mask1[:, None]
    dist = jnp.where(possible & pair, jnp.maximum(dist0, dist1), jnp.inf)
    best0, best1 = dist.argmin(2).astype(jnp.int32), dist.argmin(1).astype(jnp.int32)
    near0, near1 = dist.min(2) < positive_px**2, dist.min(1) < positive_px**2
    mutual0 = jnp.take_along_axis(best1, best0, 1) == jnp.arange(dist.shape[1])
    mutual1 = jnp.take_along_axis(best0, best1, 1) == jnp.arange(dist.shape[2])
    alone0 = jnp.where(pair, dist0, jnp.inf).min(2) > negative_px**2
    alone1 = jnp.where(pair, dist1, jnp.inf).min(1) > negative_px**2
    matches0 = jnp.where(mutual0 & near0, best0, IGNORE)
    matches1 = jnp.where(mutual1 & near1, best1, IGNORE)
    matches0 = jnp.where(alone0 & known0 & mask0, UNMATCHED, matches0)
    matches1 = jnp.where(alone1 & known1 & mask1, UNMATCHED, matches1)
    return matches0, matches1


def label_by_homography(kpts0, kpts1, H, mask0, mask1, positive_px: float = 3.0, negative_px: float = 3.0):
    """Label keypoints of two images related by homographies.

    Args:
      kpts0: [B, M, 2], kpts1: [B, N, 2] px; H: [B, 3, 3] from image 0 to image 1; mask0: [B, M], mask1: [B, N] bool.

    Returns:
      matches0 [B, M], matches1 [B, N], see `label_by_distance`.

    Source: glue-factory's thresholds (3 px each).
    """
    dist0 = squared_distances(warp_homography(kpts0, H), kpts1)
    dist1 = squared_distances(kpts0, warp_homography(kpts1, jnp.linalg.inv(H)))
    everything = jnp.ones(dist0.shape, bool)
    return label_by_distance(dist0, dist1, everything, mask0, mask1, mask0, mask1, positive_px, negative_px)


def read_depth(depth, points):
    """Read depth maps [B, H, W] (0 = unknown) at points [B, N, 2] (x, y) px of their pixels' centres.

    Bilinear where all neighbours inside the map are known, else the nearest pixel's; what lies outside counts as 0.

    Returns:
      [B, N]; 0 where unknown.
    """
    _, height, width = depth.shape

    def at(x, y):
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = jnp.where(inside, y * width + x, 0).astype(jnp.int32)
        value = jnp.take_along_axis(depth.reshape(len(depth), -1), index, axis=1)
        return jnp.where(inside, value, 0.0), inside

    low = jnp.floor(points)
    frac = points - low
    total, known = 0.0, True
    for dx in (0, 1):
        for dy in (0, 1):
            value, inside = at(low[..., 0] + dx, low[..., 1] + dy)
            weight = (frac[..., 0] if dx else 1 - frac[..., 0]) * (frac[..., 1] if dy else 1 - frac[..., 1])
            total += weight * value
            known &= (value > 0) | ~inside
    nearest = jnp.round(points)
    return jnp.where(known, total, at(nearest[..., 0], nearest[..., 1])[0])


def project(points, depth, T, K_from, K_to, size_to):
    """Warp points into another image through their depth, with what is known of the result.

    Args:
      points: [B, N, 2] px of the original image, (0, 0) = its corner. depth: [B, N], 0 = unknown.
      T: [B, 4, 4] from the first camera to the second. K_from, K_to: [B, 3, 3]. size_to: [B, 2] (width, height).

    Returns:
      [B, N, 2] px; visible [B, N] bool: depth known, in front of the camera and inside the other image.
    """
    homogeneous, z = into_camera(points, depth, T, K_from, K_to)
    in_front = z > 1e-4
    w = homogeneous[..., 2:]
    warped = jnp.where(w != 0, homogeneous[..., :2] / jnp.where(w != 0, w, 1), 0)
    inside = ((warped > 0) & (warped < size_to[:, None] - 1)).all(-1)
    return warped, in_front & inside & (depth > 0)


def label_by_depth(
    batch: dict,
    kpts0,
    kpts1,
    mask0,
    mask1,
    positive_px: float = 3.0,
    negative_px: float = 5.0,
):
    """Label keypoints of two posed images with depth.

    A keypoint without depth counts as unmatched where no keypoint of the other image that is still undecided comes
    within `negative_px` of its epipolar line.

    Args:
      batch: depth0, depth1 [B, H, W], T_0to1, T_1to0 [B, 4, 4], K0, K1 [B, 3, 3]; optional size0, size1 [B, 2] (width,
        height) of the original images, scale0, scale1, offset0, offset1 [B, 2], and Hq_aug [B, 3, 3], the homography
        that was applied to image 1.
      kpts0, kpts1: [B, M, 2], [B, N, 2] px of the network's images. mask0: [B, M], mask1: [B, N] bool.

    Returns:
      matches0 [B, M], matches1 [B, N], see `label_by_distance`.

    Source: the algorithm of GIM's training code for LightGlue and of glue-factory.
    """
    size = len(kpts0)
    ones, zeros = jnp.ones((size, 1, 2)), jnp.zeros((size, 1, 2))
    scale0, scale1 = (batch[k][:, None] if k in batch else ones for k in ("scale0", "scale1"))
    offset0, offset1 = (batch[k][:, None] if k in batch else zeros for k in ("offset0", "offset1"))
    homography = batch.get("Hq_aug")
    full = [jnp.tile(jnp.array([[d.shape[2], d.shape[1]]]), (size, 1)) for d in (batch["depth0"], batch["depth1"])]
    size0, size1 = (batch.get(k, whole) for k, whole in zip(("size0", "size1"), full))

    # sizes scale about the image's corner, so places are measured from there
    corner0, corner1 = geometry.pixel_to_corner(kpts0), geometry.pixel_to_corner(kpts1)
    straight1 = corner1 if homography is None else warp_homography(corner1, jnp.linalg.inv(homography))
    source0, source1 = (corner0 + offset0) * scale0, (straight1 + offset1) * scale1
    z0 = read_depth(batch["depth0"], geometry.corner_to_pixel(source0))
    z1 = read_depth(batch["depth1"], geometry.corner_to_pixel(source1))
    warped0, visible0 = project(source0, z0, batch["T_0to1"], batch["K0"], batch["K1"], size1)
    warped1, visible1 = project(source1, z1, batch["T_1to0"], batch["K1"], batch["K0"], size0)
    in1, in0 = warped0 / scale1 - offset1, warped1 / scale0 - offset0
    in1 = in1 if homography is None else warp_homography(in1, homography)

    known0, known1 = z0 > 0, z1 > 0
    matches0, matches1 = label_by_distance(
        squared_distances(in1, corner1),
        squared_distances(corner0, in0),
        visible0[:, :, None] & visible1[:, None],
        known0,
        known1,
        mask0,
        mask1,
        positive_px,
        negative_px,
    )
    F = geometry.fundamental_from_pose(batch["T_0to1"], batch["K0"], batch["K1"])
    undecided = ((matches0 == IGNORE) & mask0)[:, :, None] & ((matches1 == IGNORE) & mask1)[:, None]
    away = jnp.where(undecided, epipolar_distances(source0, source1, F), jnp.inf)
    matches0 = jnp.where(mask0 & ~known0 & (away.min(2) > negative_px), UNMATCHED, matches0)
    matches1 = jnp.where(mask1 & ~known1 & (away.min(1) > negative_px), UNMATCHED, matches1)
    return matches0, matches1


def epipolar_distances(points0, points1, F):
    """[B, M, N] px: mean distance of each pair of points [B, M, 2], [B, N, 2] to the two epipolar lines."""
    x0, x1 = geometry.to_homogeneous(points0), geometry.to_homogeneous(points1)
    lines1 = jnp.einsum("bij,bmj->bmi", F, x0, precision="highest")
    lines0 = jnp.einsum("bij,bni->bnj", F, x1, precision="highest")
    residual = jnp.abs(jnp.einsum("bmi,bni->bmn", lines1, x1, precision="highest"))
    slope1 = jnp.linalg.norm(lines1[..., :2], axis=-1)[:, :, None]
    slope0 = jnp.linalg.norm(lines0[..., :2], axis=-1)[:, None]
    return residual * (1 / jnp.maximum(slope0, 1e-15) + 1 / jnp.maximum(slope1, 1e-15)) / 2
