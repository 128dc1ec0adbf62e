"""Labels by reconstruction instead of propagation: the control experiment of GIM (Table 2, row 6).

Clips of 200 sampled frames, which are 4000 frames at one in 20, are reconstructed with COLMAP from the direct labels,
and two frames that see the same points are a pair (section 4 and spec of the paper: most clips fail, which is why
propagation is better). The correspondences come from the tracks. Dense depth would need COLMAP's CUDA stereo, which
the wheels of pycolmap do not have. pycolmap is the extra `sfm`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import propagate as prop
from data_prep.fitting import PairLabels
from gim_jax import geometry
from gim_jax.tasks import sfm, tracks

MAX_REPROJECTION_PX = 2.0  # mean error of a track beyond which its correspondences are not labels
KEYPOINT_LABELLERS = ("rootsift", "superglue", "lightglue")  # prefixes; repeat their points from pair to pair


def reconstruct(
    rows: dict[int, list[PairLabels | None]],
    labellers: tuple[str, ...],
    picture: Callable[[int], bytes],
    folder: Path | None,
) -> Any | None:
    """Reconstruct a clip: a pycolmap model, the one with most frames, or None.

    Args:
      rows: by step, the direct labels of the pairs (s, s + step) of the clip, None beyond its end.
      labellers: their names. picture: gives the JPEG of a frame. folder: for temporary files, None: the system's.
    """
    pairs, found = [], []
    for step, labels in rows.items():
        for start, row in enumerate(labels):
            if row is not None and row.kind:
                pairs.append((_name(start), _name(start + step)))
                found.append((row.xy[:, :2], row.xy[:, 2:], row.conf))
    if not pairs:
        return None
    repeats = all(name.startswith(KEYPOINT_LABELLERS) for name in labellers)
    keypoints, matches = tracks.build_tracks(pairs, found, 0.0 if repeats else sfm.MERGE_PX)
    with tempfile.TemporaryDirectory(prefix="colmap-", dir=folder, ignore_cleanup_errors=True) as work:
        temporary = Path(work)
        for name in keypoints:
            (temporary / name).write_bytes(picture(int(name.split(".")[0])))
        index = [match for match, _ in matches]
        sfm.write_database(temporary / "db", temporary, keypoints, pairs, index, cameras="single")
        models = sfm.map_images(temporary / "db", temporary, temporary / "sparse", num_threads=1)  # the same each time
    return models[0] if models else None


def _name(frame: int) -> str:
    return f"{frame:06d}.jpg"


def observations(model: Any, num_frames: int) -> list[dict[str, np.ndarray]]:
    """What each frame of a clip sees: ids [N] int of points, ascending, xy [N, 2] px, and conf [N] of the points."""
    good = {i: point.error for i, point in model.points3D.items() if point.error <= MAX_REPROJECTION_PX}
    seen = [dict(ids=np.zeros(0, int), xy=np.zeros((0, 2)), conf=np.zeros(0)) for _ in range(num_frames)]
    for picture in model.images.values():
        if not picture.has_pose:
            continue
        spots = {p.point3D_id: p.xy for p in picture.points2D if p.has_point3D() and p.point3D_id in good}
        ids = np.array(sorted(spots), int)
        seen[int(picture.name.split(".")[0])] = {
            "ids": ids,
            "xy": geometry.corner_to_pixel(np.array([spots[i] for i in ids]).reshape(-1, 2)),
            "conf": np.array([1 / (1 + good[i]) for i in ids]),
        }
    return seen


def levels(seen: list[dict[str, np.ndarray]], min_matches: int) -> list[prop.Level]:
    """The pairs 1, 2, 4, ... frames apart with more than `min_matches` common points, one level per interval."""
    out, step, num = [], 1, len(seen)
    while step < min(num, prop.MAX_STEP + 1):
        rows = []
        for one, two in zip(seen, seen[step:]):
            _, at0, at1 = np.intersect1d(one["ids"], two["ids"], assume_unique=True, return_indices=True)
            xy = np.concatenate([one["xy"][at0], two["xy"][at1]], 1).astype(np.float32)
            row = {"xy": xy, "conf": one["conf"][at0], "teacher": np.zeros(len(xy), np.int32)}
            rows.append(row if len(xy) > min_matches else None)
        level = prop.make_level(step, rows, num)
        level.hops[level.mask] = max(2, step)  # carried by a track, not matched
        if level.mask.any():
            out.append(level)
        step *= 2
    return out
