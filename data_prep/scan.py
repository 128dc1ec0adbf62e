"""What has to be known of a whole video before its frames are sampled: one quick pass over small pictures.

Scene cuts, frames that repeat the one before (pulldown), black bars around the picture, and what is laid over it.
"""

from __future__ import annotations

import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from data_prep import video as vid
from gim_jax import image
from gim_jax.data.tfrecord import write_atomic

THUMB_WIDTH = 160  # px; of the pictures that cuts and repeats are found on
MIN_SCENE = 10  # frames; a second cut within as many is not reported
REPEAT_LEVELS = 2.0  # of 255: the largest change of a repeated frame, that of compression
MAX_REPEATS = 3  # in a row: pulldown of 15 frames/s to 60; more of them are a picture that stands still
BLACK = 24  # of 255: brighter than a bar ever is, compression included
MIN_PICTURE = 0.25  # of the area; where less is left nothing is a bar
OVERLAY_LONG_SIDE = 640  # px; scale of the gradients that overlays are found by
OVERLAY_SAMPLES = 32  # sampled frames judged together: a caption may come and go
OVERLAY_MIN_SAMPLES = 12
STEADY = 0.3  # deviation of a gradient over time, of its mean: a quarter of the picture shines through a dim overlay
EDGE = 12.0  # per px, of 255: letters have sharper edges than clouds, which stand still in the sky
FAINT = 4.0  # per px: edges above noise
MAX_STEADY = 0.5  # of these; where more are steady it is the camera that stands still
MIN_OVERLAY_PX = 40  # of that scale; what is smaller is a still point, not a logo
SMEAR_PX = 4  # an overlay's mask is widened by so many px of its scale: the window of a small feature


@dataclass(frozen=True)
class Scan:
    """What one pass over a video found.

    Attributes:
      num_frames: decoded ones.
      repeats: [R] numbers of the frames that repeat the one before, in runs of at most `MAX_REPEATS`.
      cuts: [C] numbers of the first frames of all scenes but the first.
      size: (width, height) of the upright frame.
      crop: (x0, y0, x1, y1) px of the picture within black bars, ends exclusive; the whole frame where there are none.
      overlays: [B, h, w] bool of the picture, True under logos and captions, for each part of the video.
      overlay_starts: [B] number of the frame at which each part begins.
    """

    num_frames: np.ndarray
    repeats: np.ndarray
    cuts: np.ndarray
    size: np.ndarray
    crop: np.ndarray
    overlays: np.ndarray
    overlay_starts: np.ndarray

    def notes(self) -> list[str]:
        """What a user should know, in words."""
        x0, y0, x1, y1 = self.crop.tolist()
        cropped = (x1 - x0, y1 - y0) != tuple(self.size.tolist())
        covered = 100 * self.overlays.mean() if self.overlays.size else 0.0
        texts = (
            (len(self.cuts), f"{len(self.cuts)} scene cut{'s' * (len(self.cuts) != 1)}"),
            (len(self.repeats), f"{len(self.repeats)} of {self.num_frames} frames repeat the one before, left out"),
            (cropped, f"black bars are cut off, the picture is {x1 - x0}x{y1 - y0}"),
            (covered, f"logos or captions over {covered:.1f} % of the picture are masked"),
        )
        return [text for holds, text in texts if holds]

    def valid(self, frame: int) -> np.ndarray | None:
        """[h, w] bool of the picture at a smaller scale, True where labels may lie; None for everywhere."""
        part = int(np.searchsorted(self.overlay_starts, frame, side="right")) - 1
        return None if part < 0 or not self.overlays[part].any() else ~self.overlays[part]


def scan(path: str | Path, every_frames: int, max_seconds: float = 0.0) -> Scan:
    """Decode a video once and look at small pictures of every frame, and at larger ones of every n-th.

    Args:
      every_frames: about the step of sampling; what is laid over the picture is judged on so many frames.
      max_seconds: look at the beginning only; 0: all of it.
    """
    detector = AdaptiveDetector(min_scene_len=MIN_SCENE)
    reformatter, previous, first_s = VideoReformatter(), None, 0.0
    same, cuts, fed = [], [], []
    bars, overlay = _Bars(), _Overlay()
    size = (0, 0)
    for index, time_s, frame in vid.decode(path, []):
        first_s = time_s if index == 0 else first_s
        if max_seconds and time_s - first_s > max_seconds:
            break
        width = min(THUMB_WIDTH, frame.width)
        height = max(round(frame.height * width / frame.width), 1)
        thumb = reformatter.reformat(frame, width, height, "bgr24").to_ndarray()
        same.append(previous is not None and cv2.absdiff(thumb, previous).max() <= REPEAT_LEVELS)
        if not same[-1]:
            fed.append(index)
            cuts += detector.process_frame(FrameTimecode(len(fed) - 1, 25.0), thumb)  # the rate does not matter
        previous = thumb
        if index % every_frames == 0:
            gray = vid.upright(frame, "gray")
            size = image.size_of(gray)
            bars.add(gray)
            overlay.add(index, gray)
    crop = bars.crop(size)
    overlays, starts = overlay.masks(size, crop)
    return Scan(
        np.array(len(same)), _short_runs(np.array(same, bool)),
        np.array([fed[cut.frame_num] for cut in cuts], int), np.array(size), np.array(crop), overlays, starts,
    )  # fmt: skip


def _short_runs(same: np.ndarray) -> np.ndarray:
    """Indices of True in runs of at most `MAX_REPEATS`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(int), [0]])))
    runs = [np.arange(a, b) for a, b in zip(edges[::2], edges[1::2]) if b - a <= MAX_REPEATS]
    return np.concatenate(runs) if runs else np.zeros(0, int)


class _Bars:
    """The brightest that each row and column ever was, but for the brightest tenth of it (a logo in a bar)."""

    def __init__(self):
        self.rows = self.columns = np.zeros(0)

    def add(self, gray: np.ndarray) -> None:
        height, width = gray.shape
        across = np.percentile(cv2.resize(gray, (min(64, width), height), interpolation=cv2.INTER_AREA), 90, axis=1)
        down = np.percentile(cv2.resize(gray, (width, min(64, height)), interpolation=cv2.INTER_AREA), 90, axis=0)
        first = not len(self.rows)
        self.rows = across if first else np.maximum(self.rows, across)
        self.columns = down if first else np.maximum(self.columns, down)

    def crop(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) of what is not black, the whole frame where bars are thin or leave too little."""
        sides = []
        for line, length in ((self.columns, size[0]), (self.rows, size[1])):
            seen = np.flatnonzero(line > BLACK)
            start, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, length)
            thin = 0.01 * length
            sides.append((start if start > thin else 0, end if length - end > thin else length))
        (x0, x1), (y0, y1) = sides
        if (x1 - x0) * (y1 - y0) < MIN_PICTURE * size[0] * size[1]:
            return 0, 0, *size
        return x0, y0, x1, y1


class _Overlay:
    """Sums of image gradients over parts of the video: an edge that is laid over the picture never moves."""

    def __init__(self):
        self.parts: list[tuple[int, np.ndarray, int]] = []  # the last two: first frame, sums of g^2, gx, gy, samples
        self.finished: list[tuple[int, np.ndarray]] = []  # those before: first frame, what is steady in them
        self.total, self.num = np.zeros((3, 1, 1), np.float32), 0  # their sums and samples

    def add(self, frame: int, gray: np.ndarray) -> None:
        scale = min(1.0, OVERLAY_LONG_SIDE / max(gray.shape))
        size = [max(round(n * scale), 1) for n in image.size_of(gray)]
        small = cv2.GaussianBlur(image.resize(gray, (size[0], size[1]), cv2.INTER_AREA), (3, 3), 0)
        gx, gy = cv2.Sobel(small, cv2.CV_32F, 1, 0, scale=1 / 8), cv2.Sobel(small, cv2.CV_32F, 0, 1, scale=1 / 8)
        sums = np.stack([gx * gx + gy * gy, gx, gy])
        if not self.parts or self.parts[-1][2] == OVERLAY_SAMPLES:
            if len(self.parts) == 2:
                self._finish()
            self.parts.append((frame, sums, 1))
        else:
            first, total, num = self.parts[-1]
            self.parts[-1] = (first, total + sums, num + 1)

    def _finish(self) -> None:
        first, sums, num = self.parts.pop(0)
        self.total, self.num = self.total + sums, self.num + num
        self.finished.append((first, _steady(sums, num)))

    def masks(self, size: tuple[int, int], crop: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Overlays of the parts [B, h, w] bool within the crop, and the frames [B] that they begin at."""
        if len(self.parts) > 1 and self.parts[-1][2] < OVERLAY_MIN_SAMPLES:
            (first, one, n), (_, two, m) = self.parts
            self.parts = [(first, one + two, n + m)]
        while self.parts:
            self._finish()
        if not self.finished:
            return np.zeros((0, 1, 1), bool), np.zeros(0, int)
        always = _steady(self.total, self.num)
        masks = np.stack([steady | always for _, steady in self.finished])
        x0, y0, x1, y1 = [int(n * masks.shape[2] / size[0]) for n in crop]
        masks = masks[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        return masks, np.array([first for first, _ in self.finished])


def _steady(sums: np.ndarray, num: int) -> np.ndarray:
    """[h, w] bool: regions whose edges never move, while most others do."""
    square, gx, gy = sums / num
    mean2 = gx * gx + gy * gy
    edges = square > FAINT**2
    steady = (mean2 > FAINT**2) & (square - mean2 < STEADY**2 * mean2)
    if num < OVERLAY_MIN_SAMPLES or steady.sum() > MAX_STEADY * edges.sum():
        return np.zeros(square.shape, bool)
    steady &= mean2 > EDGE**2
    joined = cv2.morphologyEx(steady.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    _, component, stats, _ = cv2.connectedComponentsWithStats(joined)
    big = (stats[:, cv2.CC_STAT_AREA] >= MIN_OVERLAY_PX) & (np.arange(len(stats)) > 0)
    found = big[component.astype(int)].astype(np.uint8)
    return cv2.dilate(found, np.ones((2 * SMEAR_PX + 1,) * 2, np.uint8)).astype(bool)


def save(path: Path, found: Scan) -> None:
    """Write a scan as NPZ, atomically."""
    write_atomic(path, lambda file: np.savez(file, allow_pickle=False, **asdict(found)))


def load(path: Path) -> Scan | None:
    """Read what `save` wrote, None where there is nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as data:
            return Scan(**{name: data[name] for name in data.files})
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile):
        return None
