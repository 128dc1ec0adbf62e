"""Two images related by a homography in one picture: a panorama, and the overlay that shows how well they fit."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from gim_jax import geometry
from gim_jax.image import size_of

MAX_CANVAS = 12_000  # px of a side; a plane seen at a grazing angle reaches to infinity
ROWS = 256  # of the canvas at once: on the way a pixel takes some 130 bytes
CORNERS = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])


def warp_image(image: np.ndarray, H: np.ndarray, size: tuple[int, int], offset=(0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Warp an image [H, W, 3] uint8 by a homography, bilinearly.

    Args:
      H: [3, 3], from pixels of the image to those of the canvas.
      size: (width, height) of the canvas; offset: (x, y) of its upper left pixel.

    Returns:
      The canvas [h, w, 3] uint8 and the weight [h, w] float32: 0 outside the image, 1 in its middle.
    """
    width, height = size
    x, y = np.meshgrid(np.arange(width) + offset[0], np.arange(height) + offset[1])
    inverse = np.linalg.inv(H)
    homogeneous = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3) @ inverse.T
    middle = H @ np.array([(image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2, 1.0])
    depth = homogeneous[:, 2] * np.sign(middle[2])  # what lies beyond the horizon is not seen
    source = np.where(
        depth[:, None] > 1e-12, homogeneous[:, :2] / np.where(depth == 0, 1, homogeneous[:, 2])[:, None], -9
    )
    limit = np.array(size_of(image)) - 1
    inside = ((source >= -0.5) & (source <= limit + 0.5)).all(1)
    places = source[inside, ::-1].T
    out = np.zeros((height * width, 3), np.uint8)
    for channel in range(3):
        values = ndimage.map_coordinates(image[..., channel].astype(np.float32), places, order=1, mode="nearest")
        out[inside, channel] = np.rint(values)
    weight = np.zeros(height * width, np.float32)
    border = np.minimum(source[inside] + 0.5, limit + 0.5 - source[inside]) / (limit + 1) * 2
    weight[inside] = np.maximum(border.min(1), 1e-3)
    return out.reshape(height, width, 3), weight.reshape(height, width)


def panorama(
    image0: np.ndarray, image1: np.ndarray, H_0to1: np.ndarray, max_canvas: int = MAX_CANVAS
) -> tuple[np.ndarray, np.ndarray]:
    """Lay image 0 onto image 1.

    Args:
      image0, image1: [H, W, 3] uint8 RGB.
      H_0to1: [3, 3], from pixels of image 0 to those of image 1.

    Returns:
      The panorama, both blended towards their borders, and the overlay in the frame of image 1: where they overlap red
      shows image 0 and cyan image 1, gray where they agree; [h, w, 3] uint8 each.

    Raises:
      ValueError: a canvas with a side above `max_canvas` px, so a homography that maps a corner near the horizon.
    """
    H = np.asarray(H_0to1, np.float64)
    corners0 = CORNERS * np.array(size_of(image0)) - 0.5
    behind = (geometry.to_homogeneous(corners0) @ H[2]) * np.sign(H[2] @ [*corners0.mean(0), 1.0]) <= 0
    mapped = geometry.warp_homography(corners0, H)
    corners = np.concatenate([mapped, CORNERS * np.array(size_of(image1)) - 0.5])
    low, high = np.floor(corners.min(0) + 0.5), np.ceil(corners.max(0) + 0.5)
    if behind.any() or not np.isfinite(corners).all() or (high - low).max() > max_canvas:
        raise ValueError(
            "homography: image 0 reaches the horizon of image 1, there is no panorama of both in one plane"
        )
    width, height = (high - low).astype(int).tolist()
    blended = np.zeros((height, width, 3), np.uint8)
    for top in range(0, height, ROWS):
        size, offset = (width, min(ROWS, height - top)), low + [0, top]
        colors, weights = zip(warp_image(image0, H, size, offset), warp_image(image1, np.eye(3), size, offset))
        total = np.maximum(weights[0] + weights[1], 1e-9)[..., None]
        mixed = (colors[0] * weights[0][..., None] + colors[1] * weights[1][..., None]) / total
        blended[top : top + ROWS] = np.rint(mixed)
    warped, weight = warp_image(image0, H, size_of(image1))
    gray0, gray1 = (image @ np.array([0.299, 0.587, 0.114]) for image in (warped, image1))
    overlay = np.where((weight > 0)[..., None], np.stack([gray0, gray1, gray1], -1), image1 / 2)
    return blended, np.rint(overlay).astype(np.uint8)
