"""Where labels may lie: what is laid over the picture is left out, and what a mask provider of the user's says.

A provider keeps labels off people, sky and cars (GIM's code leaves these out with an ADE20K segmenter, classes 12, 2
and 20). It is `module:function`, called in threads with an [H, W, 3] uint8 RGB frame and giving [h, w] bool of any
scale, True where labels may lie; or a folder that holds them as `<name of the video without ending>/<frame>.png`,
0 where labels may not lie, frame numbers as in the manifest and counted from 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from data_prep.scan import Scan
from data_prep.video import Frame
from gim_jax import image

Provider = Callable[[Frame], np.ndarray]


def load_provider(spec: str, video: str | Path) -> Provider | None:
    """Find the provider of a video's masks, None for an empty spec.

    Raises ValueError where there is no such folder, module or function.
    """
    if not spec:
        return None
    if ":" not in spec:
        stem = Path(video).stem
        folder = Path(spec) / stem
        if stem in ("", ".", "..") or not folder.is_dir():
            raise ValueError(f"mask_provider: {folder}: no such folder; expected <frame>.png masks, or module:function")
        return lambda frame: _read_mask(folder / f"{frame.index}.png")
    name, _, attribute = spec.partition(":")
    try:
        function = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"mask_provider: {spec}: {error}") from error
    return lambda frame: _checked(function(frame.rgb), spec)


def frame_masks(scan: Scan | None, provider: Provider | None) -> Callable[[Frame], np.ndarray | None] | None:
    """A function from a frame to [h, w] bool, True where labels may lie, None for everywhere."""

    def mask(frame: Frame) -> np.ndarray | None:
        valid = None if scan is None else scan.valid(frame.index)
        if provider is None:
            return valid
        given = provider(frame)
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
