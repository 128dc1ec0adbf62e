"""Coordinates and two-view geometry, on NumPy and JAX arrays alike.

Points are `(x, y)` pixels of an image, `(0, 0)` = centre of the top-left pixel; every other convention lives
here and nowhere else. `size` is `(width, height)`. Poses are world-to-camera 4x4 matrices, OpenCV axes (x
right, y down, z forward); `T_0to1` maps a point of camera 0 to camera 1: `X1 = R X0 + t`. Leading axes are
batch axes.
"""

from __future__ import annotations

import numpy as np

CELL = 8  # px of an image per entry of its mask, and per coarse cell of every network


def _namespace(*arrays):
    """Return `jax.numpy` where one of the arrays is a JAX array, else `numpy`."""
    for array in arrays:
        if not isinstance(array, np.ndarray) and hasattr(array, "__array_namespace__"):
            return array.__array_namespace__()
    return np


def _arrays(*arrays):
    """Return the namespace and the arrays as floating-point arrays of it (integers and lists become
    float64)."""
    xp = _namespace(*arrays)
    out = [xp.asarray(a) for a in arrays]
    return xp, *[a if xp.issubdtype(a.dtype, xp.floating) else a.astype(float) for a in out]


# ------------------------------------------------------------------------------------------------ conventions


def pixel_to_corner(points):
    """Convert pixels to COLMAP's convention, where `(0, 0)` is the top-left corner of the top-left pixel."""
    return points + 0.5


def corner_to_pixel(points):
    """Convert COLMAP's corner convention to pixels."""
    return points - 0.5


def pixel_to_normalized(points, size, align_corners: bool):
    """Convert pixels to [-1, 1].

    Args:
      points: [..., 2] px.
      size: (width, height).
      align_corners: True: -1 and 1 are the centres of the outermost pixels (`2x / (w - 1) - 1`); False: they
        are the outer edges of these pixels (`(2x + 1) / w - 1`). The name is that of PyTorch's `grid_sample`.
    """
    _, points, size = _arrays(points, size)
    if align_corners:
        return 2 * points / (size - 1) - 1
    return (2 * points + 1) / size - 1


def normalized_to_pixel(points, size, align_corners: bool):
    """Convert [-1, 1] to pixels, the inverse of `pixel_to_normalized`."""
    _, points, size = _arrays(points, size)
    if align_corners:
        return (points + 1) * (size - 1) / 2
    return ((points + 1) * size - 1) / 2


def pixel_to_cell(points, stride: int):
    """Return the cell `(column, row)`, int32, of a grid of stride x stride pixels that a pixel position
    falls in."""
    xp, points = _arrays(points)
    return xp.floor((points + 0.5) / stride).astype(xp.int32)


def cell_to_pixel(cells, stride: int):
    """Return the pixel position of the middle of cells `(column, row)`."""
    _, cells = _arrays(cells)
    return (cells + 0.5) * stride - 0.5


def scale_points(points, scale):
    """Map points into an image resized by `scale` (new size / old size, one factor or `(x, y)`): `(x + .5) s
    - .5`.

    This is where `cv2.resize` puts pixel centres.
    """
    _, points, scale = _arrays(points, scale)
    return (points + 0.5) * scale - 0.5


def scaling_homography(scale):
    """Return the homography [3, 3] that does what `scale_points` does."""
    x, y = np.broadcast_to(scale, 2)
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1.0]])


def scale_K(K, scale, half_pixel: bool = True):
    """Scale intrinsics for an image resized by `scale` (new size / old size, one factor or `(x, y)`).

    Args:
      K: [..., 3, 3].
      scale: one factor or `(x, y)`.
      half_pixel: True: the principal point moves as `scale_points` does. False: it is merely multiplied, as
        SuperGlue's evaluation does (official `models/utils.py`).
    """
    xp, K, scale = _arrays(K, scale)
    sx, sy = xp.broadcast_to(scale, (2,))
    dx, dy = ((sx - 1) / 2, (sy - 1) / 2) if half_pixel else (0.0, 0.0)
    return xp.asarray([[sx, 0, dx], [0, sy, dy], [0, 0, 1]], dtype=K.dtype) @ K


def rotate_points(points, size, quarter_turns: int):
    """Map points of an image into `np.rot90(image, quarter_turns)` (counter-clockwise).

    Args:
      points: [..., 2] px in the image before the turn.
      size: (width, height) before the turn.
      quarter_turns: any integer; negative turns clockwise.
    """
    xp, points = _arrays(points)
    width, height = size
    x, y = points[..., 0], points[..., 1]
    return xp.stack(
        [(x, y), (y, width - 1 - x), (width - 1 - x, height - 1 - y), (height - 1 - y, x)][quarter_turns % 4],
        axis=-1,
    )


def rotate_K(K, size, quarter_turns: int):
    """Return the intrinsics of `np.rot90(image, quarter_turns)`; `size` is (width, height) before the
    turn."""
    xp, K = _arrays(K)
    center = rotate_points(K[..., :2, 2], size, quarter_turns)
    focal = xp.stack([K[..., 0, 0], K[..., 1, 1]], axis=-1)
    focal = focal[..., ::-1] if quarter_turns % 2 else focal
    diagonal = xp.concatenate([focal, xp.ones_like(focal[..., :1])], axis=-1)[..., None, :] * xp.eye(3, dtype=K.dtype)
    column = xp.concatenate([center, xp.zeros_like(center[..., :1])], axis=-1)[..., :, None]
    return diagonal + column * xp.asarray([0, 0, 1], dtype=K.dtype)


# --------------------------------------------------------------------------------------- homogeneous, cameras


def to_homogeneous(points):
    """Append a one: [..., D] -> [..., D + 1]."""
    xp, points = _arrays(points)
    return xp.concatenate([points, xp.ones_like(points[..., :1])], axis=-1)


def from_homogeneous(points):
    """Divide by the last coordinate and drop it: [..., D + 1] -> [..., D]. At zero the result is inf or
    NaN."""
    xp, points = _arrays(points)
    if xp is np:
        with np.errstate(divide="ignore", invalid="ignore"):
            return points[..., :-1] / points[..., -1:]
    return points[..., :-1] / points[..., -1:]


def normalize_by_K(points, K):
    """Return camera rays at depth one, `(x - c) / f`, of points [..., N, 2] and K [..., 3, 3]; a skew in K
    is ignored, as every pose protocol does."""
    xp, points, K = _arrays(points, K)
    focal = xp.stack([K[..., 0, 0], K[..., 1, 1]], axis=-1)
    return (points - K[..., None, :2, 2]) / focal[..., None, :]


def invert_pose(T):
    """Invert rigid motions [..., 4, 4] without a matrix inverse."""
    xp, T = _arrays(T)
    R_t = xp.swapaxes(T[..., :3, :3], -1, -2)
    top = xp.concatenate([R_t, -(R_t @ T[..., :3, 3:])], axis=-1)
    return xp.concatenate([top, xp.zeros_like(T[..., 3:, :]) + xp.asarray([0, 0, 0, 1], dtype=T.dtype)], axis=-2)


def relative_pose(T0, T1):
    """Return `T_0to1 = T1 inv(T0)` from world-to-camera poses [..., 4, 4]."""
    return T1 @ invert_pose(T0)


def cross_matrix(t):
    """Return [t]x, [..., 3, 3], so that `cross_matrix(t) @ v` is `t x v`."""
    xp, t = _arrays(t)
    x, y, z = t[..., 0], t[..., 1], t[..., 2]
    o = xp.zeros_like(x)
    return xp.stack([xp.stack([o, -z, y], -1), xp.stack([z, o, -x], -1), xp.stack([-y, x, o], -1)], axis=-2)


def essential_from_pose(T_0to1):
    """Return `E = [t]x R`, [..., 3, 3], of a pose [..., 4, 4] or [..., 3, 4]: `x1^T E x0 = 0` for camera
    rays."""
    return cross_matrix(T_0to1[..., :3, 3]) @ T_0to1[..., :3, :3]


def fundamental_from_pose(T_0to1, K0, K1):
    """Return `F = K1^-T E K0^-1`, [..., 3, 3]: `x1^T F x0 = 0` for pixels."""
    xp, T_0to1, K0, K1 = _arrays(T_0to1, K0, K1)
    return xp.swapaxes(xp.linalg.inv(K1), -1, -2) @ essential_from_pose(T_0to1) @ xp.linalg.inv(K0)


# --------------------------------------------------------------------------------------- epipolar, homography


def _epipolar_terms(points0, points1, F):
    """Return the residual `x1^T F x0` and the squared gradients of both epipolar lines, [..., N] each."""
    xp, points0, points1, F = _arrays(points0, points1, F)
    x0, x1 = to_homogeneous(points0), to_homogeneous(points1)
    line1 = x0 @ xp.swapaxes(F, -1, -2)
    line0 = x1 @ F
    residual = xp.sum(x1 * line1, axis=-1)
    return residual, line0[..., 0] ** 2 + line0[..., 1] ** 2, line1[..., 0] ** 2 + line1[..., 1] ** 2


def symmetric_epipolar_distance(points0, points1, F):
    """Return `d0^2 + d1^2`, [..., N]: squared distances to the epipolar lines in both images, summed.

    Args:
      points0, points1: [..., N, 2] pixels (with F) or camera rays (with E).
      F: [..., 3, 3] with `x1^T F x0 = 0`.
    """
    residual, gradient0, gradient1 = _epipolar_terms(points0, points1, F)
    return residual**2 * (1 / gradient0 + 1 / gradient1)


def mean_epipolar_distance(points0, points1, F):
    """Return `(d0 + d1) / 2`, [..., N]: the mean distance to the two epipolar lines, in the units of the
    points."""
    residual, gradient0, gradient1 = _epipolar_terms(points0, points1, F)
    return abs(residual) * (gradient0**-0.5 + gradient1**-0.5) / 2


def sampson_distance(points0, points1, F):
    """Return the squared Sampson distance, [..., N]: the first-order squared distance to the epipolar
    manifold."""
    residual, gradient0, gradient1 = _epipolar_terms(points0, points1, F)
    return residual**2 / (gradient0 + gradient1)


def warp_homography(points, H):
    """Map points [..., N, 2] by homographies [..., 3, 3]; points on the horizon become inf or NaN."""
    xp, points, H = _arrays(points, H)
    return from_homogeneous(to_homogeneous(points) @ xp.swapaxes(H, -1, -2))
