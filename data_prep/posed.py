"""What MegaDepth, ScanNet and homographies share on their way to records: views, pairs, a file per scene, packing.

A damaged or missing file costs its pairs and is named; it never stops the run.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from gim_jax import geometry
from gim_jax.cli.pack import pack
from gim_jax.data import records
from gim_jax.data.depth import encode_depth
from gim_jax.data.headers import jpeg_size
from gim_jax.data.tfrecord import TFRecordSource, write_tfrecord
from gim_jax.image import decode_image, encode_jpeg, resize

JPEG_QUALITY = 95
NUM_VIEWS = 64  # kept in memory, about 10 MB each at 1600x1200 px


class Pair(NamedTuple):
    """Two views by what the set's `read` takes (hashable), and the share that both see, 0 to 1."""

    view0: Any
    view1: Any
    overlap: float


@dataclass(frozen=True, eq=False)
class View:
    """A posed image.

    Attributes:
      image: JPEG bytes. size: (width, height) px.
      depth: [H, W] float32 along the axis, in the set's unit; not positive = unknown.
      K: [3, 3] float64, (0, 0) = centre of the top-left pixel. pose: [4, 4] float64, world to camera.
    """

    image: bytes
    size: tuple[int, int]
    depth: np.ndarray
    K: np.ndarray
    pose: np.ndarray

    @functools.cached_property
    def coded_depth(self) -> tuple[bytes, tuple[float, float]]:
        """`encode_depth` of the depth, once for all pairs of the view."""
        return encode_depth(self.depth)


def inside(root: Path, name: object) -> Path:
    """Return the path of a file that an index names; a ValueError for names that lead out of the folder."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{root}: found {name!r}, expected a file inside of the folder")
    return root / name


def read_bytes(path: Path) -> bytes:
    """Read a whole file; a ValueError if it is missing."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return path.read_bytes()


def resized(view: View, long_side: int) -> View:
    """Shrink a view to at most `long_side` px, its depth to the nearest pixel; gray images become colour."""
    scale = min(long_side / max(view.size), 1)
    if scale == 1 and jpeg_size(view.image)[2] == 3:
        return view
    width, height = size = tuple(max(round(n * scale), 1) for n in view.size)
    image = resize(decode_image(view.image, "image", exif=False), (width, height), cv2.INTER_AREA)
    depth = resize(view.depth, (width, height), cv2.INTER_NEAREST_EXACT)
    K = geometry.scale_K(view.K, np.divide(size, view.size))
    return View(encode_jpeg(image, JPEG_QUALITY), (width, height), depth, K, view.pose)


def make_record(view0: View, view1: View, overlap: float, scene: str, licence: str, complete: bool) -> bytes:
    """Encode a posed pair; a ValueError names the field that is out of range.

    Args: complete: unknown depth means that nothing can be matched there (`PairRecord.depth_complete`).
    """
    (depth0, range0), (depth1, range1) = view0.coded_depth, view1.coded_depth
    return records.encode(
        records.PairRecord(
            image0=view0.image, image1=view1.image, size0=view0.size, size1=view1.size,
            correspondences=np.zeros((0, 4), np.float32), confidence=np.zeros(0, np.float32),
            teacher=np.zeros(0, np.int32), teachers=(), hops=np.zeros(0, np.int32), F=np.zeros((3, 3)),
            frame0=0, frame1=0, time0_s=0.0, time1_s=0.0, interval=0,
            video="", video_sha256="", licence=licence, label_config_hash="",
            T_0to1=geometry.relative_pose(view0.pose, view1.pose), K0=view0.K, K1=view1.K,
            depth0=depth0, depth1=depth1, depth_ranges=np.array([range0, range1]), depth_complete=int(complete),
            scene=scene, overlap=overlap,
        )
    )  # fmt: skip


def draw(pairs: Sequence[Pair], count: int, num_bins: int, low: float, high: float, seed: int) -> list[Pair]:
    """Draw at most `count` pairs, as evenly from `num_bins` ranges of overlap in low to high as can be, in order."""
    if count < 1 or not low < high:
        raise ValueError(f"found {count} pairs of overlap {low} to {high}, expected 1 or more and a range")
    order = np.random.default_rng(seed).permutation(len(pairs))
    taken, turns = [0] * num_bins, []
    for index in order.tolist():
        place = min(max(int((pairs[index].overlap - low) / (high - low) * num_bins), 0), num_bins - 1)
        turns.append((taken[place], index))
        taken[place] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: within a turn the bins stay in random order
    return [pairs[index] for index in sorted(index for _, index in turns[:count])]


def write_scene(
    path: Path, pairs: Sequence[Pair], read: Callable[[Any], View], encode: Callable[[View, View, float], bytes]
) -> dict:
    """Write the records of a scene; one that is there is kept as it is, one without an intact pair is not written.

    Args:
      read: reads a view of a pair, `encode` makes the record; pairs of which either raises are left out.

    Returns: dict(pairs = number of records, kept = was there already, problems = [one line each]).
    """
    if path.is_file():
        return {"pairs": len(TFRecordSource([path], on_error="skip")), "kept": True, "problems": []}
    problems: dict[str, None] = {}  # each once, in order

    def attempt(what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (ValueError, OSError, IndexError) as error:  # IndexError: an index of pairs beyond its images
            problems[f"{path.stem}: {what}: {error}"] = None
            return None

    @functools.lru_cache(NUM_VIEWS)
    def view_of(key: Any) -> View | None:
        return attempt(f"image {key}", lambda: read(key))

    def payloads() -> Iterator[bytes]:
        for pair in pairs:
            view0, view1 = view_of(pair.view0), view_of(pair.view1)
            if view0 and view1:
                name = f"pair {pair.view0}, {pair.view1}"
                if payload := attempt(name, functools.partial(encode, view0, view1, pair.overlap)):
                    yield payload

    rest = payloads()
    first = next(rest, None)
    count = 0 if first is None else write_tfrecord(path, itertools.chain([first], rest))
    return {"pairs": count, "kept": False, "problems": list(problems)}


def report(rows: Sequence[dict], out: Path, name: str, num_shards: int) -> int:
    """Print what was left out, pack `out`/scenes to `out`/records, and print the totals. Returns the exit code."""
    for problem in itertools.chain.from_iterable(row["problems"] for row in rows):
        print(f"left out: {problem}")
    if kept := sum(row["kept"] for row in rows):
        print(f"{kept} of {len(rows)} files of {out / 'scenes'} were there and are kept; delete them to make them anew")
    result = pack(out / "scenes", out / "records", name, num_shards=num_shards)
    for line in result["damaged"]:
        print(f"left out: {line}")
    verb = "is up to date:" if result["up_to_date"] else "holds"
    print(f"{out / 'records'} {verb} {result['num_records']} pairs in {result['num_shards']} shards")
    return 1 if result["damaged"] else 0


def run(
    parser: argparse.ArgumentParser, convert: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parse and convert; bad input is one line and exit code 2."""
    args = parser.parse_args(argv)
    try:
        for name in ("long_side", "pairs_per_scene", "frame_step", "num_shards"):
            if getattr(args, name, 1) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: found {getattr(args, name)}, expected 1 or more")
        return convert(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog.removeprefix('python -m ')}: {error}", file=sys.stderr)
        return 2
