"""Walking-tour videos with ground truth: the quickstart's default input and the judge of labels.

`render` films a walk and writes a folder with `video.mp4` and `truth.npz`, which `Truth.load(folder)` reads;
`render_pairs` writes an evaluation set of image pairs; `correspondence_error` measures labels against the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np

from data_prep import render as camera
from data_prep import town
from data_prep.folder import write_folder
from data_prep.ordered import ordered
from data_prep.pairs import render_pairs
from data_prep.truth import NOTHING, SCHEMA_VERSION, Truth, correspondence_error

__all__ = ["Truth", "WorldConfig", "check", "correspondence_error", "frames", "render", "render_pairs"]


@dataclass(frozen=True)
class WorldConfig:
    """What to film. The same values give the same frames, byte by byte.

    seed: decides everything random. seconds, fps: length and rate. size: (width, height), even, at least 64 px.
    speed_m_s: walking speed. fov_deg: horizontal field of view. look: one of `data_prep.town.LOOKS`, or None =
      by the seed.
    num_cuts: cuts to another town. num_movers: people in view of a shot. overlay: caption and logo. crf: H.264
      quality.
    """

    seed: int = 0
    seconds: float = 40 / 3
    fps: float = 30.0
    size: tuple[int, int] = (640, 480)
    speed_m_s: float = 1.3
    fov_deg: float = 65.0
    look: str | None = None
    num_cuts: int = 0
    num_movers: int = 6
    overlay: bool = False
    crf: int = 18

    @property
    def num_frames(self) -> int:
        return int(round(self.seconds * self.fps))


def check(config: WorldConfig):
    """Raise a ValueError naming the first field of `config` that cannot be filmed."""
    width, height = config.size
    rules = (
        ("seed", config.seed, config.seed >= 0, "0 or more"),
        ("fps", config.fps, 1 <= config.fps <= 240, "1 to 240"),
        (
            "seconds",
            config.seconds,
            config.seconds * config.fps >= 2 and config.seconds <= 3600,
            "two frames to one hour",
        ),
        (
            "size",
            config.size,
            width >= 64 and height >= 64 and width <= 4096 and height <= 4096,
            "64 to 4096 px a side",
        ),
        ("size", config.size, width % 2 == 0 and height % 2 == 0, "even numbers (H.264 halves the colour)"),
        ("speed_m_s", config.speed_m_s, 0 < config.speed_m_s <= 5, "above 0, at most 5"),
        ("fov_deg", config.fov_deg, 20 <= config.fov_deg <= 110, "20 to 110"),
        ("look", config.look, config.look is None or config.look in town.LOOKS, f"one of {', '.join(town.LOOKS)}"),
        (
            "num_cuts",
            config.num_cuts,
            0 <= config.num_cuts <= config.seconds * config.fps / 4,
            "0 to a quarter of the number of frames",
        ),
        ("num_movers", config.num_movers, 0 <= config.num_movers <= 100, "0 to 100"),
        ("crf", config.crf, 0 <= config.crf <= 51, "0 to 51"),
    )
    for name, value, good, wanted in rules:
        if not good:
            raise ValueError(f"world config: {name} is {value}, expected {wanted}")


def shot_starts(config: WorldConfig) -> np.ndarray:
    """Choose the first frame of every shot, and the end: int64 [num_cuts + 2]."""
    rng = np.random.default_rng([config.seed, 9])
    share = np.cumsum(rng.uniform(0.7, 1.3, config.num_cuts + 1))
    inner = np.round(share[:-1] / share[-1] * config.num_frames).astype(np.int64)
    return np.concatenate([[0], inner, [config.num_frames]])


def film(config: WorldConfig) -> tuple[list[camera.Shot], np.ndarray]:
    """Plan every shot of a video: each a walk through a town of its own. Returns shots and their first
    frames.
    """
    check(config)
    starts = shot_starts(config)
    shots = [
        camera.plan_shot(
            (config.seed, k),
            config.look,
            config.size,
            config.fov_deg,
            int(n),
            config.fps,
            config.speed_m_s,
            config.num_movers,
        )
        for k, n in enumerate(np.diff(starts))
    ]
    return shots, starts


def overlay_boxes(size: tuple[int, int]) -> tuple[tuple[int, int, int, int], ...]:
    """Place the logo and the caption: (x0, y0, x1, y1) in px, ends exclusive."""
    width, height = size
    return (
        (int(0.83 * width), int(0.05 * height), int(0.96 * width), int(0.13 * height)),
        (int(0.15 * width), int(0.88 * height), int(0.85 * width), int(0.95 * height)),
    )


def draw_frame(shots: list[camera.Shot], starts: np.ndarray, first_ids: np.ndarray, overlay: bool, frame: int):
    """Draw one frame of the video. Returns image RGB uint8 and ids uint16 [height, width] (see NOTHING)."""
    k = int(np.searchsorted(starts, frame, side="right")) - 1
    image, surface = camera.draw(shots[k], frame - int(starts[k]))
    ids = np.where(surface >= 0, surface + 1 + first_ids[k], NOTHING).astype(np.uint16)
    if overlay:
        texts = ("GIM-TV", "walking tour of a town that is not there")
        for (x0, y0, x1, y1), text in zip(overlay_boxes(shots[k].size), texts):
            image[y0:y1, x0:x1] = image[y0:y1, x0:x1] // 4 + (20, 20, 90)
            scale = 0.85 * min((y1 - y0) / 30, (x1 - x0) / (19 * len(text)))
            cv2.putText(image, text, (x0 + 4, y1 - (y1 - y0) // 4), 0, scale, (255, 255, 255), 1, cv2.LINE_AA)
            ids[y0:y1, x0:x1] = NOTHING
    return image, ids


def frames(config: WorldConfig, num_threads: int = 2) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw the video frame by frame: RGB uint8 [height, width, 3] and surface ids uint16 [height, width]."""
    shots, starts = film(config)
    first_ids = np.cumsum([0] + [len(s.town.quads) for s in shots])
    yield from ordered(partial(draw_frame, shots, starts, first_ids, config.overlay), config.num_frames, num_threads)


def render(
    out_folder: str | Path,
    config: WorldConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    num_threads: int = 2,
) -> Path:
    """Film a walk and write `video.mp4`, `truth.npz` and `config.json` into a new folder.

    A folder that already holds the same world is left as it is. It is written under a temporary name and
    renamed when whole.

    Args:
      out_folder: a folder that does not exist, is empty, or holds the same world.
      config: what to film. progress: called with (frames done, frames in all).

    Returns:
      The folder. Raises ValueError for bad values and for a folder that holds something else.
    """
    config = config or WorldConfig()
    check(config)
    settings = {"schema_version": SCHEMA_VERSION, **asdict(config), "size": list(config.size)}
    write = partial(write_world, config=config, settings=settings, progress=progress, num_threads=num_threads)
    return write_folder(out_folder, settings, write)


def write_world(folder: Path, config: WorldConfig, settings: dict, progress, num_threads: int):
    """Write the files of `render` into an existing folder."""
    shots, starts = film(config)
    first_ids = np.cumsum([0] + [len(s.town.quads) for s in shots])
    if first_ids[-1] >= 2**16 - 1:
        raise ValueError(
            f"world config: num_cuts is {config.num_cuts}: {first_ids[-1]} surfaces, expected at most 65534"
        )
    pictures, offsets = [], [0]
    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = add_stream(container, config)
        draws = partial(draw_frame, shots, starts, first_ids, config.overlay)
        for k, (image, ids) in enumerate(ordered(draws, config.num_frames, num_threads)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            png = cv2.imencode(".png", ids, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].ravel()
            pictures.append(png)
            offsets.append(offsets[-1] + len(png))
            if progress:
                progress(k + 1, config.num_frames)
        container.mux(stream.encode(None))
    np.savez(
        folder / "truth.npz",
        schema_version=np.int64(SCHEMA_VERSION),
        config=np.array(json.dumps(settings)),
        fps=np.float64(config.fps),
        size=np.array(config.size, np.int64),
        K=np.repeat(shots[0].K[None], config.num_frames, 0),
        T_world_to_camera=np.concatenate([s.T_world_to_camera for s in shots]),
        shot=np.repeat(np.arange(len(shots)), np.diff(starts)),
        quads=np.concatenate([s.town.quads for s in shots]),
        ids_png=np.concatenate(pictures),
        ids_offsets=np.array(offsets, np.int64),
    )


def add_stream(container, config: WorldConfig):
    """Add an H.264 stream, or MPEG-4 where this build of FFmpeg has no x264."""
    name = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stream = container.add_stream(name, rate=Fraction(config.fps).limit_denominator(1001))
    stream.width, stream.height = config.size
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": str(config.crf), "preset": "veryfast"} if name == "libx264" else {"qscale": "3"}
    return stream
