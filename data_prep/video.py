"""Video decoding with PyAV: one sequential pass, frames named by presentation time, rotation metadata applied.

OpenCV's wheel opens AV1 and reads nothing, and seeking to every sample is several times slower than decoding all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

MAX_PIXELS = 8192 * 8192  # a header may claim any size


@dataclass(frozen=True)
class Frame:
    """A decoded frame: number in decoding order, presentation time, upright [H, W, 3] uint8 RGB, scene."""

    index: int
    time_s: float
    rgb: np.ndarray
    scene: int = 0


@dataclass(frozen=True)
class VideoInfo:
    """What the container says; `num_frames` is 0 where it does not say."""

    name: str
    sha256: str
    codec: str
    fps: float
    num_frames: int
    duration_s: float


def probe(path: str | Path) -> VideoInfo:
    """Check that a file is a video and describe it. Raises ValueError naming the file otherwise."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        duration = stream.duration * stream.time_base if stream.duration and stream.time_base else None
        if duration is None and container.duration:
            duration = container.duration / av.time_base
        fps = float(rate) if rate else 0.0
        num_frames = stream.frames or int(float(duration or 0) * fps)
        codec = stream.codec_context.name
    return VideoInfo(
        name=Path(path).name,
        sha256=_sha256(path),
        codec=codec,
        fps=fps,
        num_frames=num_frames,
        duration_s=float(duration or 0.0),
    )


def decode(path: str | Path, notes: list[str]) -> Iterator[tuple[int, float, av.VideoFrame]]:
    """Decode a video once, in order: number, presentation time in seconds, frame as stored.

    Args:
      notes: receives a line where decoding ended early, or where the size changes or time goes back, which end it;
        what came is good.
    """
    index, size, last_s = -1, None, -math.inf
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        try:
            for index, frame in enumerate(container.decode(stream)):
                time_s = float(frame.time) if frame.time is not None else max(index / rate, last_s)
                size = size or (frame.width, frame.height, frame.rotation)
                if size != (frame.width, frame.height, frame.rotation):
                    notes.append(f"frame size changes at {time_s:.2f} s; what follows is left out")
                    return
                if time_s < last_s:  # recordings that were joined end to end
                    notes.append(f"time goes back from {last_s:.2f} to {time_s:.2f} s; what follows is left out")
                    return
                last_s = time_s
                yield index, time_s, frame
        except av.error.FFmpegError as error:
            notes.append(f"damaged after frame {index}: {error.strerror}")
        if index < 0 and not notes:
            notes.append("no frame can be decoded")
        expected = stream.frames
        if expected and index + 1 < expected and not notes:
            notes.append(f"ends early: {index + 1} of {expected} frames")


def sample_frames(
    path: str | Path,
    every_frames: int = 20,
    every_seconds: float = 0.0,
    notes: list[str] | None = None,
    *,
    repeats: Sequence[int] | np.ndarray = (),
    cuts: Sequence[int] | np.ndarray = (),
    crop: tuple[int, int, int, int] | None = None,
) -> Iterator[Frame]:
    """Decode a video once and yield every n-th frame, or the first frame at or after each multiple of a time step.

    Args:
      path: the file.
      every_frames: step in frames; used where `every_seconds` is 0.
      every_seconds: step in seconds of presentation time.
      notes: see `decode`.
      repeats: numbers of frames that do not count, because they repeat the one before.
      cuts: numbers of the first frames of scenes but the first.
      crop: (x0, y0, x1, y1) px of the upright frame that is kept.
    """
    origin_s, due, counted, skipped = None, 0, -1, {int(n) for n in repeats}
    scenes = np.sort(np.asarray(cuts, int))
    for index, time_s, frame in decode(path, [] if notes is None else notes):
        if index in skipped:
            continue
        counted += 1
        origin_s = time_s if origin_s is None else origin_s
        if every_seconds > 0:
            if time_s - origin_s < due * every_seconds - 1e-6:
                continue
            due = int((time_s - origin_s) / every_seconds + 1e-6) + 1
        elif counted % every_frames:
            continue
        rgb = upright(frame)
        if crop is not None:
            rgb = np.ascontiguousarray(rgb[crop[1] : crop[3], crop[0] : crop[2]])
        yield Frame(index, time_s, rgb, int(np.searchsorted(scenes, index, side="right")))


def open_video(path: str | Path):
    """Open a file as a video, with its first video stream to be decoded. Raises ValueError naming the file."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: a folder, expected a video file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        # "file:" keeps odd names from being read as URLs, the whitelist keeps playlists from fetching anything
        container = av.open("file:" + str(path.resolve()), options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, UnicodeError) as error:
        raise ValueError(f"{path}: not a video that can be opened ({error})") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path}: no video stream in it")
    context = container.streams.video[0].codec_context
    if context is None or context.width * context.height > MAX_PIXELS:
        container.close()
        raise ValueError(f"{path}: the video stream cannot be decoded")
    return container


def upright(frame: av.VideoFrame, kind: str = "rgb24") -> np.ndarray:
    """A decoded frame as uint8, turned as its metadata says: [H, W, 3] RGB, or [H, W] for "gray"."""
    picture = frame.to_ndarray(format=kind)
    return np.ascontiguousarray(np.rot90(picture, k=round(frame.rotation / 90) % 4))


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
