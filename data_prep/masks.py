"""Where labels may lie: what is laid over the picture is left out, and what a mask provider of the user's says.

A provider keeps labels off people, sky and cars (GIM's code leaves these out with an ADE20K segmenter, classes 12, 2
and 20). It is `module:function`, called in threads with an [H, W, 3] uint8 RGB frame and giving [h, w] bool of any
scale, True where labels may lie; or a folder that holds them as `<name of the video without ending>/<frame>.png`,
0 where labels may not lie, frame numbers as in the manifest and counted from 0. A function gets the picture within
black bars; a file is of the frame as it was filmed, at any scale (of another aspect: of the picture within the bars).
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np

from data_prep.scan import Scan
from data_prep.video import Frame
from gim_jax import image

Provider = Callable[[Frame, Scan | None], np.ndarray]


def load_provider(spec: str, video: str | Path) -> Provider | None:
    """Find the provider of a video's masks, None for an empty spec.

    Raises ValueError where there is no such folder, module or function.
    """
    if not spec:
        return None
    if ":" not in spec:
        folder = _folder(spec, video)
        return lambda frame, scan: _of_picture(_read_mask(folder / f"{frame.index}.png"), scan)
    module, attribute = _module(spec)
    function = getattr(module, attribute)
    return lambda frame, _: _checked(function(frame.rgb), spec)


def identity(spec: str, video: str | Path) -> str:
    """What of a provider changes the labels: the masks of this video, or the function and the file it is in."""
    if not spec:
        return ""
    digest = hashlib.sha256()
    if ":" not in spec:
        for path in sorted(_folder(spec, video).glob("*.png")):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()
    file = getattr(_module(spec)[0], "__file__", None)
    digest.update(Path(file).read_bytes() if file else b"")
    return f"{spec} {digest.hexdigest()}"


def _folder(spec: str, video: str | Path) -> Path:
    stem = Path(video).stem
    folder = Path(spec) / stem
    if stem in ("", ".", "..") or not folder.is_dir():
        raise ValueError(f"mask_provider: {folder}: no such folder; expected <frame>.png masks, or module:function")
    return folder


def _module(spec: str) -> tuple[ModuleType, str]:
    name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:  # no name, one that begins with a dot
        raise ValueError(f"mask_provider: {spec}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"mask_provider: {spec}: {name} has no {attribute}")
    return module, attribute


def _of_picture(mask: np.ndarray, scan: Scan | None) -> np.ndarray:
    """Cut a mask [h, w] as the frame is cut, unless its aspect says that it is of the picture alone."""
    if scan is None:
        return mask
    (height, width), (full_width, full_height) = mask.shape, scan.size.tolist()
    if abs(width * full_height - height * full_width) > max(full_width, full_height):  # more than rounding does
        return mask
    x0, y0, x1, y1 = np.round(scan.crop * np.tile(np.divide((width, height), scan.size), 2)).astype(int)
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def frame_masks(scan: Scan | None, provider: Provider | None) -> Callable[[Frame], np.ndarray | None] | None:
    """A function from a frame to [h, w] bool, True where labels may lie, None for everywhere."""

    def mask(frame: Frame) -> np.ndarray | None:
        valid = None if scan is None else scan.valid(frame.index)
        if provider is None:
            return valid
        given = provider(frame, scan)
        if valid is None:
            return given
        size = image.size_of(given)
        return given & (cv2.resize(valid.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)

    return None if provider is None and (scan is None or not scan.overlays.any()) else mask


def _read_mask(path: Path) -> np.ndarray:
    return _checked(image.read_image(path)[..., 0] > 0, str(path))


def _checked(mask: np.ndarray, name: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool or not mask.size:
        raise ValueError(f"mask_provider: {name}: found {mask.dtype} of shape {mask.shape}, expected bool [h, w]")
    return mask
