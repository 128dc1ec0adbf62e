"""Visual localization: the pose of query images in a COLMAP model, as hloc does it.

The query is matched with database images; a match whose database point is an observation of a 3-D point becomes a
2-D to 3-D correspondence, and pycolmap's LO-RANSAC finds the pose. Protocol of Aachen Day-Night v1.1 (GIM table 4):
retriangulate the database with the matcher, the given retrieval list, 12 px, and the first retrieved image's pose
where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from gim_jax import geometry
from gim_jax.data.tfrecord import write_atomic
from gim_jax.tasks import sfm, tracks
from gim_jax.tasks.image_pairs import Pairs, numbered_words

MAX_ERROR_PX = 12.0  # hloc localize_sfm.py
NUM_COVISIBLE = 20  # hloc pipeline_Aachen: database pairs of each image
MIN_INLIERS = 12  # below that a pose of thousands of matches is chance


@dataclass(frozen=True)
class Located:
    """Where a query was found.

    Attributes:
      cam_from_world: [4, 4] float64, or None.
      num_matches, num_points: matches with all its database images; those with a 3-D point.
      num_inliers: of the pose.
      reason: why there is no pose; "" otherwise.
      fallback: the first retrieved image, whose pose stands in, "" where the pose is the query's own.
    """

    cam_from_world: np.ndarray | None
    num_matches: int
    num_points: int
    num_inliers: int
    reason: str = ""
    fallback: str = ""


def read_model(path: str | Path) -> Any:
    """Read a COLMAP model (a folder of cameras, images and points3D, .bin or .txt)."""
    pycolmap = sfm.quiet_pycolmap()
    if not any((Path(path) / f"images{suffix}").is_file() for suffix in (".bin", ".txt")):
        raise ValueError(f"{path}: found no images.bin or images.txt, expected the folder of a COLMAP model")
    try:
        return pycolmap.Reconstruction(str(path))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read as a COLMAP model: {error}") from error


def read_queries(paths: Sequence[str | Path]) -> dict[str, Any]:
    """Read lists of queries with intrinsics, `name MODEL width height params...` a line: name -> pycolmap.Camera."""
    pycolmap, cameras = sfm.quiet_pycolmap(), {}
    for path in paths:
        for number, words in numbered_words(path, "list of queries"):
            if words[0].startswith("#"):
                continue
            try:
                name, model, width, height, *params = words
                cameras[name] = pycolmap.Camera(
                    model=model, width=int(width), height=int(height), params=[float(value) for value in params]
                )
                cameras[name].has_prior_focal_length = True
                if not cameras[name].verify_params():
                    raise ValueError(f"found {len(params)} parameters, too many or too few for {model}")
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                text = str(error).splitlines()[0]
                raise ValueError(f"{path}:{number}: expected name MODEL width height params...: {text}") from None
    if not cameras:
        raise ValueError(f"{', '.join(map(str, paths))}: found no query")
    return cameras


def guess_camera(path: str | Path) -> Any:
    """Return the camera of an image file with EXIF's focal length, else one that is estimated with the pose."""
    sfm.stored_turns(path)  # names what cannot be read
    return sfm.quiet_pycolmap().infer_camera_from_image(str(path))


def covisible_pairs(model: Any, num: int = NUM_COVISIBLE) -> Pairs:
    """Pair every image of a model with the `num` others that share most 3-D points."""
    shared: dict[int, dict[int, int]] = {}
    for point in model.points3D.values():
        images = sorted({element.image_id for element in point.track.elements})
        for a, b in combinations(images, 2):
            for one, other in ((a, b), (b, a)):
                row = shared.setdefault(one, {})
                row[other] = row.get(other, 0) + 1
    pairs = {}
    for one, row in shared.items():
        for other in sorted(row, key=lambda image: (-row[image], image))[:num]:
            pairs[tuple(sorted((one, other)))] = None
    return [(model.images[a].name, model.images[b].name) for a, b in pairs]


def triangulate(
    model: Any,
    folder: str | Path,
    matcher: Any,
    out: str | Path,
    *,
    num_covisible: int = NUM_COVISIBLE,
    merge_px: float | None = None,
    max_keypoints: int | None = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Triangulate the points of a model anew from a matcher's matches; its poses stay.

    Args:
      max_keypoints: per image (hloc's 8192).
      out: folder for the database, the cache of matches and the model.
    """
    pycolmap, out = sfm.quiet_pycolmap(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pairs = covisible_pairs(model, num_covisible)
    if not pairs:
        raise ValueError("model: found no two images that share a point, expected some to be matched")
    found = sfm.match_all(folder, pairs, matcher, out / "matches", progress)
    radius = sfm.merge_radius(matcher) if merge_px is None else merge_px
    keypoints, matched = tracks.build_tracks(pairs, found, radius, max_keypoints)
    path = out / "database.db"
    path.unlink(missing_ok=True)
    database = pycolmap.Database.open(str(path))
    try:
        for camera in model.cameras.values():
            database.write_camera(camera, use_camera_id=True)
        for rig in model.rigs.values():
            database.write_rig(rig, use_rig_id=True)
        for frame in model.frames.values():
            database.write_frame(frame, use_frame_id=True)
        ids = {}
        for image in model.images.values():
            database.write_image(image, use_image_id=True)
            ids[image.name] = image.image_id
            points = keypoints.get(image.name, np.zeros((0, 2), np.float32))
            database.write_keypoints(image.image_id, geometry.pixel_to_corner(points).astype(np.float32))
        for (name0, name1), (index, _) in zip(pairs, matched):
            if len(index):
                database.write_matches(ids[name0], ids[name1], index.astype(np.uint32))
    finally:
        database.close()
    listing = out / "database.pairs.txt"
    write_atomic(listing, lambda file: file.write("".join(f"{a} {b}\n" for a, b in pairs).encode()))
    pycolmap.verify_matches(str(path), str(listing), options=sfm.verification_options(pycolmap))
    (out / "model").mkdir(exist_ok=True)
    return pycolmap.triangulate_points(model, str(path), str(folder), str(out / "model"))


def observations(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return name -> observed points [K, 2] px and their 3-D points [K, 3], of the images that have some."""
    out = {}
    for image in model.images.values():
        seen = [point for point in image.points2D if point.has_point3D()]
        if seen and image.has_pose:
            corner = np.array([point.xy for point in seen])
            xyz = np.array([model.points3D[point.point3D_id].xyz for point in seen])
            out[image.name] = geometry.corner_to_pixel(corner), xyz
    return out


def localize(
    model: Any,
    folder: str | Path,
    query_folder: str | Path,
    cameras: Mapping[str, Any],
    retrieved: Mapping[str, Sequence[str]],
    matcher: Any,
    *,
    anchor_px: float | None = None,
    max_error_px: float = MAX_ERROR_PX,
    fallback: bool = True,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Located]:
    """Find the poses of queries.

    Args:
      cameras: query -> pycolmap.Camera.
      retrieved: query -> names of database images, the most similar first.
      anchor_px: a match belongs to a 3-D point observed so near its database point; None: 1 px for matchers of
        keypoints, 4 for others.
      fallback: give a query without a pose that of its first retrieved image, as hloc does.
    """
    seen, poses = observations(model), sfm.poses_of(model)
    trees = {name: cKDTree(points) for name, (points, _) in seen.items()}
    if anchor_px is None:
        anchor_px = 1.0 if sfm.merge_radius(matcher) == 0 else 4.0
    pairs = [(query, name) for query in cameras for name in retrieved.get(query, ()) if name in seen]
    found = dict(zip(pairs, sfm.match_all(query_folder, pairs, matcher, cache, progress, folder1=folder)))
    results = {}
    for query, camera in cameras.items():
        places, points, num_matches = [], [], 0
        for name in retrieved.get(query, ()):
            kpts0, kpts1, _ = found.get((query, name), ((), (), ()))
            if not len(kpts0):
                continue
            num_matches += len(kpts0)
            distance, nearest = trees[name].query(kpts1)
            near = distance <= anchor_px
            places.append(kpts0[near])
            points.append(seen[name][1][nearest[near]])
        rows = np.concatenate([np.concatenate(places), np.concatenate(points)], 1) if places else np.zeros((0, 5))
        rows = np.unique(rows, axis=0)  # one point may come from several database images
        pose, num_inliers, reason = solve_pnp(rows[:, :2], rows[:, 2:], camera, max_error_px)
        stand_in = ""
        if pose is None and fallback:
            stand_in = next((name for name in retrieved.get(query, ()) if name in poses), "")
            pose = poses.get(stand_in)
        results[query] = Located(pose, num_matches, len(rows), num_inliers, reason, stand_in)
    return results


def solve_pnp(
    kpts: np.ndarray, points: np.ndarray, camera: Any, max_error_px: float, corner_shift: bool = True
) -> tuple[np.ndarray | None, int, str]:
    """Find a pose from points [M, 2] px of an image and [M, 3] of the world: the pose, its inliers, or the reason.

    Args:
      camera: pycolmap.Camera; the focal length is estimated too where `has_prior_focal_length` is False.
      corner_shift: the camera has COLMAP's convention, pixel centres at 0.5. False: at integers (InLoc's protocol).
    """
    pycolmap = sfm.quiet_pycolmap()
    if len(kpts) < 4:
        return None, 0, f"{len(kpts)} matches with a 3-D point, a pose needs 4"
    options = pycolmap.AbsolutePoseEstimationOptions()
    options.ransac.max_error = max_error_px
    options.ransac.random_seed = 0
    kpts = geometry.pixel_to_corner(kpts) if corner_shift else kpts
    refinement = pycolmap.AbsolutePoseRefinementOptions()
    options.estimate_focal_length = refinement.refine_focal_length = not camera.has_prior_focal_length
    answer = pycolmap.estimate_and_refine_absolute_pose(
        kpts.astype(np.float64), points.astype(np.float64), camera, options, refinement
    )
    if answer is None or answer["num_inliers"] < MIN_INLIERS:
        agree = 0 if answer is None else int(answer["num_inliers"])
        return None, agree, f"{agree} of {len(kpts)} matches agree with a pose, expected {MIN_INLIERS} or more"
    pose = np.eye(4)
    pose[:3] = answer["cam_from_world"].matrix()
    return pose, int(answer["num_inliers"]), ""


def write_poses(path: str | Path, poses: Mapping[str, np.ndarray]) -> None:
    """Write the submission file of visuallocalization.net: `basename qw qx qy qz tx ty tz`, camera from world."""
    from scipy.spatial.transform import Rotation

    lines = []
    for name, pose in poses.items():
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat(canonical=True)
        values = " ".join(f"{value:.12g}" for value in (w, x, y, z, *pose[:3, 3]))
        lines.append(f"{name.split('/')[-1]} {values}\n")
    write_atomic(path, lambda file: file.write("".join(lines).encode()))
