"""Reading, resizing and padding images. Images are [H, W, 3] uint8 RGB; sizes are `(width, height)`."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # a damaged file is reported once, by our error
import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PNG = b"\x89PNG\r\n\x1a\n"
IMREAD = cv2.IMREAD_COLOR_RGB  # turns as EXIF says, cuts to 8 bit, CMYK and palettes to RGB, drops alpha


def read_image(source: Any, *, exif: bool = True) -> np.ndarray:
    """Read an image of any common kind as [H, W, 3] uint8 RGB.

    Args:
      source: a path, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] RGB or [H, W, 4] RGBA of uint8
        or uint16. Sixteen bits are cut to the upper eight, alpha is dropped.
      exif: turn the image as its EXIF orientation says. False where coordinates refer to the pixels as
        stored; TIFF files are always turned (by OpenCV).

    Raises:
      ValueError: a file that is missing, a folder, empty, truncated, too large (179 million pixels) or not
        an image; an array of another shape or type. The message names the file.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"{path}: {'is not a file' if path.exists() else 'no such file'}, expected an image")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        return decode_image(data, str(path), exif=exif)
    if isinstance(source, Image.Image):
        try:
            source = ImageOps.exif_transpose(source) if exif else source
            if source.mode in ("I", "F"):  # no telling what is white
                raise ValueError(f"PIL image: found mode {source.mode}, expected 8 or 16 bits a channel")
            deep = source.mode.startswith("I;16")
            array = np.asarray(source).astype(np.uint16) if deep else np.asarray(source.convert("RGB"))
        except OSError as error:  # opened lazily, found truncated now
            raise ValueError(f"PIL image {getattr(source, 'filename', '')}: {error}") from error
        return _to_rgb(array, "PIL image")
    return _to_rgb(np.asarray(source), "array")


def decode_image(data: bytes, name: str, *, exif: bool = True) -> np.ndarray:
    """Decode the bytes of an image file as [H, W, 3] uint8 RGB; `name` stands in the error message."""
    if not data:
        raise ValueError(f"{name}: the file is empty, expected an image")
    try:
        if data.startswith(PNG):  # about these libpng would write to the terminal
            width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
            if not width or not height:
                raise ValueError(f"found {width}x{height} px")
            if b"IEND" not in data[-32:]:
                raise ValueError(f"{len(data)} bytes without an end")
        Image.open(io.BytesIO(data))  # reads the header alone and bounds the size before anything is decoded
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: cannot be decoded: {error}") from error
    except UnidentifiedImageError:
        pass  # OpenCV knows formats that Pillow does not
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged headers
        raise ValueError(f"{name}: not an image that can be decoded, or truncated: {error}") from error
    try:
        flags = IMREAD if exif else IMREAD | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(f"{name}: cannot be decoded: {error.err}") from error
    if image is None or image.size == 0:
        raise ValueError(f"{name}: not an image that can be decoded, or truncated ({len(data)} bytes)")
    return image


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Return (width, height) of an image file as stored, from its header alone; errors as `read_image`."""
    try:
        with Image.open(path) as header:
            return header.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return size_of(read_image(path, exif=False))  # names the fault, or reads a format that Pillow does not


def _to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(f"{name}: found {array.dtype} of shape {array.shape}, expected uint8 [H, W, 3]")
    if array.size == 0:
        raise ValueError(f"{name}: found shape {array.shape}, an image without pixels")
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(array[..., :3])


def to_gray(image: np.ndarray) -> np.ndarray:
    """Return luma [H, W] uint8 = 0.299 R + 0.587 G + 0.114 B, with OpenCV's fixed-point rounding."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def size_of(image: np.ndarray) -> tuple[int, int]:
    """Return (width, height) of [H, W, ...]."""
    return image.shape[1], image.shape[0]


def target_size(
    size: tuple[int, int],
    long_side: int | None = None,
    exact: tuple[int, int] | None = None,
    multiple: int = 1,
    upscale: bool = True,
    floor: bool = False,
) -> tuple[int, int]:
    """Return the (width, height) that a protocol resizes an image to.

    Args:
      size: (width, height) of the image.
      long_side: the longer side becomes so many pixels, the other one keeps the ratio, rounded (half to
        even, as the official SuperGlue and LoFTR code does).
      exact: the size itself, whatever the ratio.
      multiple: both sides are then floored to a multiple, but not below one multiple.
      upscale: False keeps images whose longer side is already within `long_side`.
      floor: round the other side down instead (kornia, so the official LightGlue).
    """
    width, height = exact or size
    if long_side and exact is None and (upscale or max(size) > long_side):
        ratio = width / height
        if floor:  # kornia's order of operations, for the same floating-point rounding
            width, height = (int(long_side * ratio), long_side) if ratio < 1 else (long_side, int(long_side / ratio))
        else:
            width, height = (round(side * (long_side / max(size))) for side in size)
    return max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple


def resize(image: np.ndarray, size: tuple[int, int], interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Resize to (width, height): bilinear between half-pixel centres, without antialiasing, as the protocols
    do.

    Points follow with `geometry.scale_points(points, (new_width / width, new_height / height))`.
    """
    if size_of(image) == tuple(size):
        return image
    return cv2.resize(image, tuple(size), interpolation=interpolation)


def shrink_blurred(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize to (width, height) in float32, after a Gaussian blur along each side that shrinks.

    Args:
      image: [H, W] or [H, W, C] uint8 or float32.

    Returns:
      float32 of the same range; what kornia's `resize(antialias=True)`, and so the official LightGlue, gives.
    """
    image = image.astype(np.float32)
    factors = np.divide(size_of(image), size)
    if factors.max() > 1:
        sigmas = np.maximum((factors - 1) / 2, 0.001)
        windows = [1 if n == 1 else int(max(4 * sigma, 3)) | 1 for n, sigma in zip(size_of(image), sigmas)]
        image = cv2.GaussianBlur(image, windows, sigmaX=sigmas[0], sigmaY=sigmas[1], borderType=cv2.BORDER_REFLECT_101)
    return resize(image, size)


def pad_bottom_right(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pad with zeros on the right and at the bottom to (width, height); points keep their coordinates."""
    width, height = size
    if width < image.shape[1] or height < image.shape[0]:
        raise ValueError(f"size: found {size}, smaller than the image {size_of(image)}")
    padding = [(0, height - image.shape[0]), (0, width - image.shape[1])] + [(0, 0)] * (image.ndim - 2)
    return np.pad(image, padding)


def padding_to_aspect(size: tuple[int, int], aspect: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the zero padding (left, right, top, bottom) that centres an image in a canvas of another aspect
    ratio.

    Args:
      size: (width, height) of the image.
      aspect: (width, height) of the network's input; only their ratio counts (official `tools/__init__.py`).
    """
    width, height = size
    ratio = aspect[0] / aspect[1]
    extra_x = max(width, int(height * ratio)) - width
    extra_y = max(height, int(width / ratio)) - height
    return extra_x // 2, extra_x - extra_x // 2, extra_y // 2, extra_y - extra_y // 2


def encode_jpeg(rgb: np.ndarray, quality: int) -> bytes:
    """Encode [H, W, 3] uint8 RGB as JPEG bytes; quality 0 to 100."""
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise ValueError(f"an image of shape {rgb.shape} cannot be written as JPEG")
    return data.tobytes()
