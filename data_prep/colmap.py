"""Labels by reconstruction instead of propagation: the control experiment of GIM (Table 2, row 6).

Clips of 200 sampled frames, which are 4000 frames at one in 20, are reconstructed with COLMAP from the direct labels,
and two frames that see the same points are a pair (section 4 and spec of the paper: most clips fail, which is why
propagation is better). The correspondences come from the tracks; or, as the paper's, from dense depth by COLMAP's
stereo, which needs an NVIDIA GPU and the wheel pycolmap-cuda12 in place of pycolmap, the extra `sfm`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import propagate as prop
from data_prep.fitting import PairLabels
from gim_jax import geometry
from gim_jax.tasks import sfm, tracks

MAX_REPROJECTION_PX = 2.0  # mean error of a track beyond which its correspondences are not labels
MAX_DEPTH_ERROR = 0.01  # relative; COLMAP's own where it joins depth maps (StereoFusionOptions)
GRID_PX = 8  # of points with depth: one per 64 pixels, as many as RootSIFT's keypoints
KEYPOINT_LABELLERS = ("rootsift", "superglue", "lightglue")  # prefixes; repeat their points from pair to pair
Row = dict[str, np.ndarray]  # xy [M, 4] px and conf [M] of a pair


@dataclass(frozen=True)
class Clip:
    """A reconstructed clip: which frames have a pose, and the correspondences of two of them, (start, end) -> row."""

    placed: np.ndarray
    pair: Callable[[int, int], Row]


def reconstruct(
    rows: dict[int, list[PairLabels | None]],
    labellers: tuple[str, ...],
    picture: Callable[[int], bytes],
    folder: Path | None,
    num_frames: int,
    dense: bool = False,
) -> Clip | None:
    """Reconstruct a clip, of several models the one with most frames; None where there is none.

    Args:
      rows: by step, the direct labels of the pairs (s, s + step) of the clip, None beyond its end.
      labellers: their names. picture: gives the JPEG of a frame. folder: for temporary files, None: the system's.
      num_frames: of the clip.
      dense: correspondences from depth maps instead of tracks.
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
        frames, database = Path(work) / "frames", Path(work) / "db"
        frames.mkdir()
        for name in keypoints:
            (frames / name).write_bytes(picture(int(name.split(".")[0])))
        index = [match for match, _ in matches]
        sfm.write_database(database, frames, keypoints, pairs, index, cameras="single")
        models = sfm.map_images(database, frames, Path(work) / "sparse", num_threads=1)  # the same each time
        if not models:
            return None
        if dense:
            views = depth_views(models[0], frames, Path(work) / "dense", num_frames)
            return Clip(np.array([view is not None for view in views]), partial(same_depth, views))
        seen = observations(models[0], num_frames)
        return Clip(np.array([len(frame["ids"]) > 0 for frame in seen]), partial(same_tracks, seen))


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


def same_tracks(seen: list[dict[str, np.ndarray]], start: int, end: int) -> Row:
    """The correspondences of two frames: the points that both see."""
    one, two = seen[start], seen[end]
    _, at0, at1 = np.intersect1d(one["ids"], two["ids"], assume_unique=True, return_indices=True)
    return {"xy": np.concatenate([one["xy"][at0], two["xy"][at1]], 1), "conf": one["conf"][at0]}


@dataclass(frozen=True)
class DepthView:
    """A frame with depth: K [3, 3] and depth [H, W] of its undistorted picture, 0 for none, pose, distorted camera."""

    K: np.ndarray
    depth: np.ndarray
    T_world_to_camera: np.ndarray
    camera: Any

    def pixels(self, rays: np.ndarray) -> np.ndarray:
        """[N, 3] directions in the camera -> [N, 2] px of the frame as it was filmed."""
        return geometry.corner_to_pixel(self.camera.img_from_cam(rays))


def depth_views(model: Any, pictures: Path, work: Path, num_frames: int) -> list[DepthView | None]:
    """Depth of the frames of a model by COLMAP's stereo with geometric consistency; None for those without a pose."""
    pycolmap = sfm.quiet_pycolmap()
    sparse = work / "model"
    sparse.mkdir(parents=True)
    model.write(sparse)
    pycolmap.undistort_images(work, sparse, pictures)
    pycolmap.patch_match_stereo(work)
    views: list[DepthView | None] = [None] * num_frames
    for picture in pycolmap.Reconstruction(work / "sparse").images.values():
        depth = pycolmap.DepthMap()
        depth.read(work / "stereo" / "depth_maps" / f"{picture.name}.geometric.bin")
        K, pose = picture.camera.calibration_matrix(), picture.cam_from_world().matrix()
        original = copy.deepcopy(model.find_image_with_name(picture.name).camera)  # outlives the model
        views[int(picture.name.split(".")[0])] = DepthView(K, depth.to_array(), pose, original)
    return views


def same_depth(views: list[DepthView | None], start: int, end: int) -> Row:
    """The correspondences of two frames: points of a grid whose depth in the one agrees with that in the other."""
    one, two = views[start], views[end]
    if one is None or two is None:
        return {"xy": np.zeros((0, 4)), "conf": np.zeros(0)}
    height, width = one.depth.shape
    y, x = (n.ravel() for n in np.mgrid[GRID_PX // 2 : height : GRID_PX, GRID_PX // 2 : width : GRID_PX])
    depth = one.depth[y, x].astype(float)
    rays0 = np.linalg.solve(one.K, np.stack([x + 0.5, y + 0.5, np.ones(len(x))])).T  # pixel centres are at .5 in COLMAP
    rays0, depth = rays0[depth > 0], depth[depth > 0]
    R, t = one.T_world_to_camera[:, :3], one.T_world_to_camera[:, 3]
    world = (rays0 * depth[:, None] - t) @ R  # R^T (x - t) of a row
    seen = world @ two.T_world_to_camera[:, :3].T + two.T_world_to_camera[:, 3]
    ahead = seen[:, 2] > 0
    rays0, seen = rays0[ahead], seen[ahead]
    rays1 = seen / seen[:, 2:]
    spot = np.floor(rays1[:, :2] @ two.K[:2, :2].T + two.K[:2, 2]).astype(int)
    inside = ((spot >= 0) & (spot < two.depth.shape[::-1])).all(1)
    rays0, rays1, expected, spot = rays0[inside], rays1[inside], seen[inside, 2], spot[inside]
    error = np.abs(two.depth[spot[:, 1], spot[:, 0]] / expected - 1) / MAX_DEPTH_ERROR  # no depth: far above 1
    same = error < 1
    xy = np.concatenate([one.pixels(rays0[same]), two.pixels(rays1[same])], 1)
    return {"xy": xy, "conf": 1 - error[same]}


def levels(clip: Clip, min_matches: int) -> list[prop.Level]:
    """The pairs 1, 2, 4, ... frames apart with more than `min_matches` correspondences, one level per interval."""
    out, step, num = [], 1, len(clip.placed)
    while step < min(num, prop.MAX_STEP + 1):
        rows = []
        for start in range(num - step):
            row = clip.pair(start, start + step)
            row = {**row, "xy": row["xy"].astype(np.float32), "teacher": np.zeros(len(row["conf"]), np.int32)}
            rows.append(row if len(row["xy"]) > min_matches else None)
        level = prop.make_level(step, rows, num)
        level.hops[level.mask] = max(2, step)  # carried by a reconstruction, not matched
        if level.mask.any():
            out.append(level)
        step *= 2
    return out
