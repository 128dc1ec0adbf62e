"""Relative pose on a list of image pairs with ground truth, in the text form of SuperGlue and ZEB.

One pair a line, 38 blank-separated tokens: `name0 name1 rot0 rot1 K0(9) K1(9) T_0to1(16)`. Names are relative to the
file's folder. `rot0 rot1` are SuperGlue's quarter turns (integers 0 to 3, counter-clockwise, that make the stored
images upright) or ZEB's overlaps (decimal fractions). K belongs to the image as stored: no EXIF orientation is applied.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import geometry
from gim_jax.eval import metrics
from gim_jax.image import image_size, read_image
from gim_jax.robust import estimate_relative_pose
from gim_jax.types import Matches

NUM_TOKENS = 38
ORTHONORMAL_TOLERANCE = 1e-3  # published lists print rotations with five digits or more
READ_AHEAD = 8  # pairs decoded while the matcher works


@dataclass(frozen=True)
class Pair:
    """One line of a pairs file. `turns` are quarter turns that make the images upright; `line` counts from one."""

    name0: str
    name1: str
    path0: Path
    path1: Path
    turns0: int
    turns1: int
    overlap: float | None
    K0: np.ndarray
    K1: np.ndarray
    T_0to1: np.ndarray
    line: int


def read_pairs(pairs_file: str | Path) -> list[Pair]:
    """Read a pairs file and check every field of it and the presence and size of every image.

    Raises:
      ValueError: with file and line: wrong number of tokens, not a number, NaN or infinite, quarter turns out of
        range, no positive focal length, K of another shape or for another image size, a rotation that is none, a last
        row that is not 0 0 0 1, a missing or unreadable image, a pair that occurs twice, an empty file.
    """
    pairs_file = Path(pairs_file)
    if not pairs_file.is_file():
        found = "a folder" if pairs_file.is_dir() else "no such file"
        raise ValueError(f"{pairs_file}: {found}, expected a text file of pairs")
    try:
        lines = pairs_file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{pairs_file}: not a text file: {error.reason} at byte {error.start}") from error
    pairs: list[Pair] = []
    seen: dict[tuple[str, str], int] = {}
    sizes: dict[Path, tuple[int, int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = _parse(line.split(), pairs_file.parent, number, sizes)
        except ValueError as error:
            raise ValueError(f"{pairs_file}:{number}: {error}") from error
        first = seen.setdefault((pair.name0, pair.name1), number)
        if first != number:
            raise ValueError(f"{pairs_file}:{number}: {pair.name0} {pair.name1}: the pair stands in line {first} too")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{pairs_file}: found no pair, expected lines of {NUM_TOKENS} tokens")
    return pairs


def _parse(tokens: list[str], folder: Path, number: int, sizes: dict[Path, tuple[int, int]]) -> Pair:
    if len(tokens) != NUM_TOKENS:
        raise ValueError(f"found {len(tokens)} tokens, expected {NUM_TOKENS} (name0 name1 rot0 rot1 K0 K1 T_0to1)")
    values = []
    for index, token in enumerate(tokens[2:], 3):
        try:
            values.append(float(token))
        except ValueError:
            raise ValueError(f"token {index}: found {token!r}, expected a number") from None
        if not math.isfinite(values[-1]):
            raise ValueError(f"token {index}: found {token}, expected a finite number")
    turns, overlap = (int(values[0]), int(values[1])), None
    if any("." in token for token in tokens[2:4]):
        turns, overlap = (0, 0), values[0]
        if not (0 <= values[0] <= 1 and 0 <= values[1] <= 1):
            raise ValueError(f"tokens 3, 4: found {tokens[2]} {tokens[3]}, expected overlaps from 0 to 1")
    elif not (0 <= turns[0] <= 3 and 0 <= turns[1] <= 3):
        raise ValueError(f"rot0 rot1: found {tokens[2]} {tokens[3]}, expected quarter turns from 0 to 3")
    K0, K1 = (np.array(values[start : start + 9]).reshape(3, 3) for start in (2, 11))
    T_0to1 = np.array(values[20:36]).reshape(4, 4)
    paths = [folder / name for name in tokens[:2]]
    for path in paths:
        if path not in sizes:
            sizes[path] = image_size(path)
    _check_K("K0", K0, sizes[paths[0]])
    _check_K("K1", K1, sizes[paths[1]])
    _check_pose(T_0to1)
    return Pair(tokens[0], tokens[1], paths[0], paths[1], turns[0], turns[1], overlap, K0, K1, T_0to1, number)


def _check_K(name: str, K: np.ndarray, size: tuple[int, int]) -> None:
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ValueError(f"{name}: found focal lengths {K[0, 0]:g} {K[1, 1]:g}, expected positive ones")
    if K[1, 0] != 0 or (K[2] != [0, 0, 1]).any():
        raise ValueError(f"{name}: found {K.tolist()}, expected fx s cx 0 fy cy 0 0 1")
    place = K[:2, 2] / size
    inside = (place > 0).all() and (place < 1).all()
    # an image cut on one side may have its principal point anywhere, one resized has it off the middle both ways
    if not inside or (np.abs(place - 0.5) > 0.2).all():
        raise ValueError(
            f"{name}: found principal point {K[0, 2]:g} {K[1, 2]:g} in an image of {size[0]}x{size[1]}; "
            f"expected the intrinsics of the image as stored"
        )


def _check_pose(T: np.ndarray) -> None:
    R = T[:3, :3]
    error = np.abs(R @ R.T - np.eye(3)).max()
    if error > ORTHONORMAL_TOLERANCE or np.linalg.det(R) < 0:
        found = f"determinant {np.linalg.det(R):.3g}, |R R^T - I| up to {error:.3g}"
        raise ValueError(f"T_0to1: found a matrix that is no rotation ({found}), expected one within 0.001")
    if (T[3] != [0, 0, 0, 1]).any():
        raise ValueError(f"T_0to1: found last row {T[3].tolist()}, expected 0 0 0 1")


def evaluate_pairs(
    pairs_file: str | Path,
    matcher: Any,
    *,
    threshold_px: float = 0.5,
    method: str = "ransac",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Match every pair, estimate its relative pose, compare with the truth.

    Args:
      pairs_file: see `read_pairs`.
      matcher: `gim_jax.load_matcher(...)`.
      threshold_px: inlier threshold of the essential matrix in pixels of the stored images.
      method: "ransac" (published) or "magsac".
      progress: called with (pairs done, of how many).

    Returns:
      A JSON-ready dict: `rows` (one per pair: errors in degrees or None without a pose, matches, inliers, precision),
      `auc` by threshold in degrees, in [0, 1], `mean_matches`, `precision` before and after the estimator,
      `num_failures` (no pose, or no true baseline), `num_lost` (pairs that could not be matched; they count as
      failures in the AUC), `settings`, `versions`, seconds. Everything but seconds is the same in every run.
    """
    pairs = read_pairs(pairs_file)
    begin = time.monotonic()
    match_s, solving = 0.0, []
    with ThreadPoolExecutor(2) as pool:  # decoding and pose estimation beside the matcher
        for batch in _batches(_prefetch(pool, _read, pairs, READ_AHEAD), matcher.batch_size):
            images = [item for item in batch if not isinstance(item, ValueError)]
            started = time.monotonic()
            found = iter(matcher.match_batch(images)) if images else iter(())
            match_s += time.monotonic() - started
            for item in batch:
                result = item if isinstance(item, ValueError) else next(found)
                solving.append(pool.submit(_row, pairs[len(solving)], result, threshold_px, method))
            if progress:
                progress(len(solving), len(pairs))
        rows = [future.result() for future in solving]
    return {
        "benchmark": "pairs",
        "set": Path(pairs_file).resolve().parent.name,
        "pairs_file": str(pairs_file),
        "pairs_sha256": hashlib.sha256(Path(pairs_file).read_bytes()).hexdigest(),
        **summarize(rows),
        "model": matcher.describe(),
        "settings": {"threshold_px": threshold_px, "method": method, "confidence": 0.99999},
        "versions": versions(),
        "seconds": {"match": round(match_s, 3), "total": round(time.monotonic() - begin, 3)},
        "rows": rows,
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a list of rows; pairs without a pose count as errors above every threshold."""
    errors = [np.inf if row["error_deg"] is None else row["error_deg"] for row in rows]
    matched = [row for row in rows if "lost" not in row]
    mean = lambda name: float(np.mean([row[name] for row in matched])) if matched else 0.0  # noqa: E731
    return {
        "num_pairs": len(rows),
        "num_failures": sum(row["error_deg"] is None for row in matched),
        "num_lost": len(rows) - len(matched),
        "auc": {f"{thr:g}": float(a) for thr, a in zip(metrics.AUC_THRESHOLDS_DEG, metrics.pose_auc(errors))},
        "mean_matches": mean("num_matches"),
        "mean_inliers": mean("num_inliers"),
        "precision": mean("precision"),
        "precision_inliers": mean("precision_inliers"),
    }


def _read(pair: Pair) -> tuple[np.ndarray, np.ndarray] | ValueError:
    try:
        images = [read_image(path, exif=False) for path in (pair.path0, pair.path1)]
    except ValueError as error:
        return error
    return tuple(np.rot90(image, turns) for image, turns in zip(images, (pair.turns0, pair.turns1)))  # type: ignore


def _row(pair: Pair, matches: Matches | ValueError, threshold_px: float, method: str) -> dict[str, Any]:
    """Return the row of one pair; an error instead of matches makes it a lost one."""
    if isinstance(matches, ValueError):
        return {"name0": pair.name0, "name1": pair.name1, "error_deg": None, "lost": str(matches)}
    kpts0 = geometry.rotate_points(matches.kpts0, matches.size0, -pair.turns0)
    kpts1 = geometry.rotate_points(matches.kpts1, matches.size1, -pair.turns1)
    pose = estimate_relative_pose(kpts0, kpts1, pair.K0, pair.K1, threshold_px, method)
    epipolar = metrics.epipolar_errors(kpts0, kpts1, pair.K0, pair.K1, pair.T_0to1)
    row: dict[str, Any] = {
        "name0": pair.name0,
        "name1": pair.name1,
        "error_deg": None,
        "R_error_deg": None,
        "t_error_deg": None,
        "num_matches": len(matches),
        "num_inliers": 0,
        "precision": metrics.epipolar_precision(epipolar),
        "precision_inliers": 0.0,
    }
    if pair.overlap is not None:
        row["overlap"] = pair.overlap
    if pose is not None:
        R, t, inliers = pose
        R_error = float(metrics.rotation_error_deg(R, pair.T_0to1[:3, :3]))
        t_error = float(metrics.translation_error_deg(t, pair.T_0to1[:3, 3]))
        t_error = t_error if math.isfinite(t_error) else None  # a pair without baseline has no direction
        row |= {
            "error_deg": None if t_error is None else max(R_error, t_error),
            "R_error_deg": R_error,
            "t_error_deg": t_error,
            "num_inliers": int(inliers.sum()),
            "precision_inliers": metrics.epipolar_precision(epipolar[inliers]),
        }
    return row


def _prefetch(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yield function(item) in order, computed up to `ahead` items early by the pool."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    from importlib.metadata import version

    packages = ("gim-jax", "jax", "jaxlib", "flax", "numpy", "opencv-python")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
