"""Pictures of matches."""

from __future__ import annotations

import base64

import cv2
import numpy as np

from gim_jax.image import encode_jpeg, read_image, resize
from gim_jax.types import Warp

MAX_LINES = 200  # more cannot be told apart
MAX_ASPECT = 4  # of an image in a picture: one of 20000x20 px would need 300 million
MAX_TEXTURE = 4096  # px of an image that is warped for a picture
SUBPIXEL_BITS = 4  # of OpenCV's fixed-point line ends


def confidence_colors(conf: np.ndarray) -> np.ndarray:
    """Return RGB [M, 3] uint8 for values in [0, 1]: 0 red, 0.5 yellow, 1 green."""
    conf = np.clip(np.nan_to_num(conf), 0, 1)[:, None]
    return np.rint(255 * np.clip(np.concatenate([2 - 2 * conf, 2 * conf, 0 * conf], 1), 0, 1)).astype(np.uint8)


def error_colors(error: np.ndarray, limit: float) -> np.ndarray:
    """Return RGB [M, 3] uint8 for errors: 0 green, half the limit yellow, the limit and beyond red."""
    return confidence_colors(1 - np.minimum(np.nan_to_num(error, nan=np.inf), limit) / limit)


def draw_matches(
    image0: np.ndarray,
    image1: np.ndarray,
    kpts0: np.ndarray,
    kpts1: np.ndarray,
    conf: np.ndarray | None = None,
    error: np.ndarray | None = None,
    *,
    error_limit: float = 1.0,
    max_lines: int = MAX_LINES,
    height: int = 540,
    gap: int = 8,
) -> np.ndarray:
    """Draw two images side by side with thin lines between matched points.

    Args:
      image0, image1: [H, W] or [H, W, 3] uint8 RGB.
      kpts0, kpts1: [M, 2] px in these images.
      conf: [M] in [0, 1], colours from red (0) over yellow to green (1); without it and `error` all are green.
      error: [M], colours instead from green (0) to red (`error_limit` and above).
      max_lines: at most so many are drawn, every k-th of them in the given order.
      height: px of both images in the picture; their ratios are kept.
      gap: px between them.

    Returns:
      [height, W0 + gap + W1, 3] uint8 RGB.
    """
    num = len(kpts0)
    if error is not None:
        colors = error_colors(np.asarray(error, np.float64), error_limit)
    else:
        colors = confidence_colors(np.ones(num) if conf is None else np.asarray(conf, np.float64))
    if not num == len(kpts1) == len(colors):
        raise ValueError(f"found {num}, {len(kpts1)} points and {len(colors)} colours, expected as many of each")
    halves, ends = [], []
    for image, kpts in ((read_image(image0), kpts0), (read_image(image1), kpts1)):
        picture, scale = fit_height(image, height)
        halves.append(picture)
        ends.append((np.asarray(kpts, np.float64).reshape(-1, 2) + 0.5) * scale - 0.5)
    canvas = side_by_side(halves, gap)
    ends[1] = ends[1] + [halves[0].shape[1] + gap, 0]
    chosen = spread(num, max_lines)
    fixed = np.rint(np.stack(ends, 1)[chosen] * 2**SUBPIXEL_BITS).astype(int)
    for (start, end), color in zip(fixed.tolist(), colors[chosen].tolist()):
        cv2.line(canvas, start, end, color, 1, cv2.LINE_AA, SUBPIXEL_BITS)
        for point in (start, end):
            cv2.circle(canvas, point, 2 << SUBPIXEL_BITS, color, 1, cv2.LINE_AA, SUBPIXEL_BITS)
    return canvas


def draw_warp(image0: np.ndarray, image1: np.ndarray, warp: Warp, *, height: int = 540, gap: int = 8) -> np.ndarray:
    """Draw image 0 and, beside it, image 1 warped into image 0: white where the warp is not certain.

    Args:
      image0, image1: [H, W] or [H, W, 3] uint8 RGB, of the sizes that the warp knows.
      height: px of the picture. gap: px between the two.

    Returns:
      [height, 2 W0 + gap, 3] uint8 RGB.
    """
    image0, image1 = read_image(image0), read_image(image1)
    picture, (factor, _) = fit_height(image0, height)
    size = picture.shape[1], max(round(image0.shape[0] * factor), 1)
    scale = min(MAX_TEXTURE / max(image1.shape[:2]), 1.0)  # OpenCV's remap ends at 2^15 px
    texture = resize(image1, tuple(max(round(n * scale), 1) for n in image1.shape[1::-1]), cv2.INTER_AREA)
    shrink = np.divide(texture.shape[1::-1], image1.shape[1::-1], dtype=np.float32)
    places = (resize(warp.kpts1, size) + 0.5) * shrink - 0.5
    x, y = (np.ascontiguousarray(places[..., i], np.float32) for i in (0, 1))
    warped = cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderValue=(255, 255, 255))
    certain = resize(warp.conf0, size)[..., None]
    warped = np.rint(certain * warped + (1 - certain) * 255).astype(np.uint8)
    below = np.full((height - size[1], size[0], 3), 255, np.uint8)
    return side_by_side([picture, np.concatenate([warped, below])], gap)


def spread(num: int, limit: int) -> np.ndarray:
    """Return at most `limit` indices, evenly spread over `num`."""
    return np.unique(np.linspace(0, num - 1, min(num, limit)).astype(int)) if num else np.zeros(0, int)


def data_uri(rgb: np.ndarray, quality: int) -> str:
    """Return an image [H, W, 3] uint8 as the address of a JPEG that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(rgb, quality)).decode()


def fit_height(image: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize [H, W, 3] uint8 to a height, or where that is wider than MAX_ASPECT heights to that width, white below.

    Returns:
      [height, W', 3] uint8, and the factors (x, y) of the image in it.
    """
    factor = min(height / image.shape[0], MAX_ASPECT * height / image.shape[1])
    size = max(round(image.shape[1] * factor), 1), min(max(round(image.shape[0] * factor), 1), height)
    picture = resize(image, size, cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    picture = np.concatenate([picture, np.full((height - size[1], size[0], 3), 255, np.uint8)])
    return picture, np.divide(size, image.shape[1::-1])


def side_by_side(pictures: list[np.ndarray], gap: int = 8) -> np.ndarray:
    """Join pictures [H, W, 3] uint8 of one height, with white between them."""
    white = np.full((len(pictures[0]), gap, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (white, picture)][1:], axis=1)


def encode_png(picture: np.ndarray) -> bytes:
    """Return [H, W, 3] uint8 RGB as the bytes of a PNG file."""
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
