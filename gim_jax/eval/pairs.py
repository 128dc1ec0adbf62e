"""Relative pose on a list of image pairs with ground truth, in the text form of SuperGlue and ZEB.

One pair a line, 38 blank-separated tokens: `name0 name1 rot0 rot1 K0(9) K1(9) T_0to1(16)`. Names are relative to the
file's folder. `rot0 rot1` are SuperGlue's quarter turns (integers 0 to 3, counter-clockwise, that make the stored
images upright) or ZEB's overlaps (decimal fractions). K belongs to the image as stored: no EXIF orientation is applied.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax.eval import run
from gim_jax.eval.document import versions
from gim_jax.eval.measure import Pair, Protocol
from gim_jax.image import image_size

__all__ = ["Pair", "evaluate_pairs", "parse", "read_pairs", "versions"]

NUM_TOKENS = 38
ORTHONORMAL_TOLERANCE = 1e-3  # published lists print rotations with five digits or more


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
            tokens = line.split()
            pair = parse(tokens, [pairs_file.parent / name for name in tokens[:2]], number, sizes)
        except ValueError as error:
            raise ValueError(f"{pairs_file}:{number}: {error}") from error
        first = seen.setdefault((pair.name0, pair.name1), number)
        if first != number:
            raise ValueError(f"{pairs_file}:{number}: {pair.name0} {pair.name1}: the pair stands in line {first} too")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{pairs_file}: found no pair, expected lines of {NUM_TOKENS} tokens")
    return pairs


def parse(
    tokens: list[str],
    paths: list[Path],
    number: int,
    sizes: dict[Path, tuple[int, int]],
    overlaps: bool | None = None,
) -> Pair:
    """Make a pair of the tokens of a line, all checked.

    Args:
      tokens: see the head of this file.
      paths: of the two images.
      number: of the line, for `Pair.line`.
      sizes: of images that are known; others are read and added.
      overlaps: tokens 3 and 4 are overlaps, not quarter turns; None: if one of them has a decimal point.
    """
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
    if any("." in token for token in tokens[2:4]) if overlaps is None else overlaps:
        turns, overlap = (0, 0), values[0]
        if not (0 <= values[0] <= 1 and 0 <= values[1] <= 1):
            raise ValueError(f"tokens 3, 4: found {tokens[2]} {tokens[3]}, expected overlaps from 0 to 1")
    elif not (0 <= turns[0] <= 3 and 0 <= turns[1] <= 3):
        raise ValueError(f"rot0 rot1: found {tokens[2]} {tokens[3]}, expected quarter turns from 0 to 3")
    K0, K1 = (np.array(values[start : start + 9]).reshape(3, 3) for start in (2, 11))
    T_0to1 = np.array(values[20:36]).reshape(4, 4)
    for path in paths:
        if path not in sizes:
            sizes[path] = image_size(path)
    check_K("K0", K0, sizes[paths[0]])
    check_K("K1", K1, sizes[paths[1]])
    check_pose(T_0to1)
    where = (tokens[0], tokens[1], paths[0], paths[1])
    return Pair(*where, *turns, overlap, K0, K1, T_0to1, number, identifier=f"{tokens[0]}#{tokens[1]}")


def check_K(name: str, K: np.ndarray, size: tuple[int, int]) -> None:
    """Raise ValueError if K [3, 3] cannot be the intrinsics of an image of `size` = (width, height)."""
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


def check_pose(T: np.ndarray) -> None:
    """Raise ValueError if T [4, 4] is no rigid motion."""
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
      method: of `robust.POSE_METHODS`.
      progress: called with (pairs done, of how many).

    Returns:
      A JSON-ready dict: `rows` (one per pair: errors in degrees or None without a pose, matches, inliers, precision),
      `auc` by threshold in degrees, in [0, 1], `mean_matches`, `precision` before and after the estimator,
      `num_failures` (no pose, or no true baseline), `num_lost` (pairs that could not be matched; they count as
      failures in the AUC), `settings`, `versions`, seconds. Everything but seconds is the same in every run.
    """
    pairs = read_pairs(pairs_file)
    begin = time.monotonic()
    protocol = Protocol(threshold_px=threshold_px, method=method)
    with tempfile.TemporaryDirectory() as folder:
        done = run.run(pairs, {}, [lambda: matcher], folder, {}, [protocol], num_workers=0, progress=progress)
    (record,) = run.records(pairs, done, protocol)
    rows = [
        {"name0": pair.name0, "name1": pair.name1} | row for pair, row in zip(pairs, run.rows(record, done.reasons))
    ]
    record.pop("pairs")
    return {
        **record,
        "benchmark": "pairs",
        "set": Path(pairs_file).resolve().parent.name,
        "pairs_file": str(pairs_file),
        "pairs_sha256": hashlib.sha256(Path(pairs_file).read_bytes()).hexdigest(),
        "model": matcher.describe(),
        "settings": {"threshold_px": threshold_px, "method": method, "confidence": protocol.confidence},
        "versions": versions(),
        "seconds": {"match": round(done.match_s, 3), "total": round(time.monotonic() - begin, 3)},
        "rows": rows,
    }
