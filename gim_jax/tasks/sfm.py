"""Reconstruction from many images: matches of any matcher, tracks, COLMAP's database, and mapping by pycolmap.

Everything COLMAP sees is in its own convention: pixel centres at 0.5. pycolmap is the extra `sfm`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gim_jax import geometry
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic
from gim_jax.tasks import load_extra
from gim_jax.tasks.image_pairs import Pairs
from gim_jax.tasks.two_view import draw_points
from gim_jax.viz import side_by_side
from gim_jax.weights.store import BAD_FILE

ORIENTATION = 0x0112  # EXIF tag
QUARTER_TURNS = {1: 0, 3: 2, 6: 3, 8: 1}  # EXIF orientation -> anticlockwise turns that make the stored image upright
CAMERA_MODES = ("auto", "single", "per-folder", "per-image")
MAX_ERROR_PX = 4.0  # of the epipolar verification; hloc and COLMAP
MAX_TRIALS, MIN_INLIER_RATIO = 20_000, 0.1  # hloc reconstruction.py
KEYPOINT_FAMILIES = ("rootsift", "superglue", "lightglue")  # repeat their points from pair to pair
MERGE_PX = 1.0  # radius of a keypoint for the others


def merge_radius(matcher: Any) -> float:
    """Return the radius in px within which points of a matcher are one keypoint."""
    return 0.0 if matcher.info.family in KEYPOINT_FAMILIES else MERGE_PX


def stored_turns(path: str | Path) -> tuple[int, tuple[int, int]]:
    """Return the quarter turns that EXIF asks for, and the (width, height) of the image as stored.

    COLMAP and the readers of its models do not turn images, matchers do.
    """
    try:
        with Image.open(path) as image:
            for key in ("xmp", "XML:com.adobe.xmp"):  # Pillow takes an orientation from there, OpenCV does not
                image.info.pop(key, None)
            orientation, size = image.getexif().get(ORIENTATION, 1), image.size
            if image.format == "TIFF":  # for which Pillow gives the upright size
                size = image.tag_v2[256], image.tag_v2[257]
    except (OSError, KeyError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not an image that can be read: {error}") from error
    orientation = orientation if orientation in range(1, 9) else 1  # undefined ones are upright for OpenCV, too
    if orientation not in QUARTER_TURNS:
        raise ValueError(f"{path}: found the mirrored EXIF orientation {orientation}, expected 1, 3, 6 or 8")
    return QUARTER_TURNS[orientation], size


def match_all(
    folder: str | Path,
    pairs: Pairs,
    matcher: Any,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    folder1: str | Path | None = None,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Match pairs of images of a folder.

    Args:
      matcher: of `gim_jax.load_matcher`.
      cache: folder of finished pairs; what is there of the same matcher is not matched again.
      folder1: of the second image of each pair, where it is another.

    Returns:
      kpts0 [M, 2], kpts1 [M, 2] float32 px of the images as stored, conf [M] float32, for every pair.
    """
    folders = Path(folder), Path(folder1 or folder)
    turns = {side: {pair[side]: stored_turns(folders[side] / pair[side]) for pair in pairs} for side in (0, 1)}
    key = json.dumps([matcher.describe(), str(folders[0].resolve()), str(folders[1].resolve())], sort_keys=True)
    found: list[Any] = [None] * len(pairs)
    files: list[Path | None] = [None] * len(pairs)
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
        for index, pair in enumerate(pairs):
            stamps = [os.stat(f / name) for f, name in zip(folders, pair)]
            text = "\n".join([key, *pair, *(f"{stamp.st_size} {stamp.st_mtime_ns}" for stamp in stamps)])
            path = files[index] = Path(cache) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
            if path.is_file():
                with contextlib.suppress(*BAD_FILE), np.load(path, allow_pickle=False) as data:
                    found[index] = (data["kpts0"], data["kpts1"], data["conf"])
    missing = [index for index, item in enumerate(found) if item is None]
    sources = [tuple(f / name for f, name in zip(folders, pairs[index])) for index in missing]
    for done, (index, matches) in enumerate(zip(missing, matcher.match_pairs(sources))):
        kpts = []
        for side, points in enumerate((matches.kpts0, matches.kpts1)):
            quarter, (width, height) = turns[side][pairs[index][side]]
            upright = (width, height) if quarter % 2 == 0 else (height, width)
            kpts.append(geometry.rotate_points(points, upright, -quarter).astype(np.float32))
        found[index] = (kpts[0], kpts[1], matches.conf.astype(np.float32))
        path = files[index]
        if path is not None:
            arrays = dict(zip(("kpts0", "kpts1", "conf"), found[index]))
            write_atomic(path, lambda file, arrays=arrays: np.savez(file, **arrays))
        if progress:
            progress(len(pairs) - len(missing) + done + 1, len(pairs))
    return found


def quiet_pycolmap() -> Any:
    """Return pycolmap with its log at errors only."""
    pycolmap = load_extra("pycolmap", "sfm")
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    pycolmap.set_random_seed(0)
    return pycolmap


def check_camera(model: str, params: Sequence[float]) -> None:
    """Refuse what is not a camera model of COLMAP with as many parameters as it has."""
    pycolmap = quiet_pycolmap()
    known = sorted(name for name in pycolmap.CameraModelId.__members__ if name != "INVALID")
    if model not in known:
        raise ValueError(f"camera model: found {model!r}, expected one of {', '.join(known)}")
    camera = pycolmap.Camera.create_from_model_name(0, model, 1.0, 1, 1)
    if len(params) != len(camera.params):
        raise ValueError(f"{model}: found {len(params)} parameters, expected {camera.params_info}")
    if not np.isfinite(params).all() or params[0] <= 0:
        raise ValueError(
            f"{model}: found {', '.join(map(str, params))}, expected finite numbers, the first one positive"
        )


def write_database(
    path: str | Path,
    folder: str | Path,
    keypoints: dict[str, np.ndarray],
    pairs: Pairs,
    matches: Sequence[np.ndarray],
    *,
    cameras: str = "auto",
    camera_model: str = "",
    camera_params: Sequence[float] = (),
    verify: bool = True,
) -> None:
    """Write a new COLMAP database: cameras (EXIF's focal length where there is one), images, keypoints, matches.

    Args:
      path: must not exist.
      folder: of the images that `keypoints` names.
      keypoints: name -> [K, 2] px. matches: per pair [M, 2] int.
      cameras: "auto": images of one size and focal length share one; "single", "per-folder", "per-image".
      camera_model, camera_params: COLMAP's, for all images; empty: SIMPLE_RADIAL with guessed values.
      verify: estimate the two-view geometries.
    """
    pycolmap = quiet_pycolmap()
    if cameras not in CAMERA_MODES:
        raise ValueError(f"cameras: found {cameras!r}, expected one of {', '.join(CAMERA_MODES)}")
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: exists, expected a new file")
    options = pycolmap.ImageReaderOptions()
    if camera_model:
        options.camera_model = camera_model
        options.camera_params = ",".join(f"{value:.17g}" for value in camera_params)
    groups: dict[Any, list[str]] = {}
    for name in sorted(keypoints):  # COLMAP's own "auto" shares no camera where EXIF names none
        groups.setdefault(_camera_of(pycolmap, Path(folder) / name) if cameras == "auto" else None, []).append(name)
    mode = getattr(pycolmap.CameraMode, "SINGLE" if cameras == "auto" else cameras.upper().replace("-", "_"))
    pycolmap.Database.open(str(path)).close()
    for names in groups.values():
        pycolmap.import_images(str(path), str(folder), camera_mode=mode, image_names=names, options=options)
    database = pycolmap.Database.open(str(path))
    try:
        ids = {image.name: image.image_id for image in database.read_all_images()}
        lost = sorted(set(keypoints) - set(ids))
        if lost:
            raise ValueError(f"{Path(folder) / lost[0]}: COLMAP cannot read this image")
        for name, points in keypoints.items():
            database.write_keypoints(ids[name], geometry.pixel_to_corner(points).astype(np.float32))
        for (name0, name1), index in zip(pairs, matches):
            if len(index):
                database.write_matches(ids[name0], ids[name1], index.astype(np.uint32))
    finally:
        database.close()
    if verify:
        listing = path.with_suffix(".pairs.txt")
        text = "".join(f"{name0} {name1}\n" for name0, name1 in pairs)
        write_atomic(listing, lambda file: file.write(text.encode()))
        pycolmap.verify_matches(str(path), str(listing), options=verification_options(pycolmap))


def _camera_of(pycolmap: Any, path: Path) -> tuple[Any, ...]:
    """Return what images of one camera have in common: width, height, EXIF's focal length or None."""
    camera = pycolmap.infer_camera_from_image(str(path))
    return camera.width, camera.height, camera.mean_focal_length() if camera.has_prior_focal_length else None


def verification_options(pycolmap: Any) -> Any:
    """Return how strictly pairs are verified: 4 px, up to 20 000 trials, a tenth of inliers (hloc)."""
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.max_error = MAX_ERROR_PX
    options.ransac.max_num_trials = MAX_TRIALS
    options.ransac.min_inlier_ratio = MIN_INLIER_RATIO
    options.ransac.random_seed = 0
    return options


def map_images(
    database: str | Path, folder: str | Path, out: str | Path, fixed_cameras: bool = False, num_threads: int = -1
) -> list[Any]:
    """Run COLMAP's incremental mapping: the models, that with most images first, written to `out`/0, 1 ...

    Models of an earlier run in `out` are removed.
    Several threads (-1: all cores) add up in another order each time; with one the same input gives the same model.
    """
    pycolmap = quiet_pycolmap()
    reader = pycolmap.Database.open(str(database))
    num_verified = reader.num_verified_image_pairs()
    reader.close()
    for earlier in Path(out).glob("*"):
        if earlier.name.isdecimal():
            shutil.rmtree(earlier)
    if num_verified == 0:  # COLMAP would look for a start again and again
        return []
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = 0
    options.num_threads = num_threads
    options.min_model_size = 3
    if fixed_cameras:
        options.ba_refine_focal_length = options.ba_refine_principal_point = options.ba_refine_extra_params = False
    Path(out).mkdir(parents=True, exist_ok=True)
    models = pycolmap.incremental_mapping(str(database), str(folder), str(out), options)
    ranked = sorted(models.values(), key=lambda model: -model.num_reg_images())
    for index, model in enumerate(ranked):
        target = Path(out) / str(index)
        target.mkdir(exist_ok=True)
        model.write(str(target))
    return ranked


def poses_of(model: Any) -> dict[str, np.ndarray]:
    """Return the poses of a pycolmap reconstruction: name -> world-to-camera [4, 4] float64."""
    poses = {}
    for image in model.images.values():
        if image.has_pose:
            pose = np.eye(4)
            pose[:3] = image.cam_from_world().matrix()
            poses[image.name] = pose
    return poses


def points_of(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the points of a pycolmap reconstruction [N, 3] float64 and their colours [N, 3] uint8."""
    points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    return points, np.array([point.color for point in model.points3D.values()], np.uint8).reshape(-1, 3)


def align_similarity(source: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return s, R [3, 3], t [3] that minimise |s R x + t - y| over points x, y [N, 3] (Umeyama, PAMI 1991)."""
    mean0, mean1 = source.mean(0), target.mean(0)
    x, y = source - mean0, target - mean1
    U, S, Vt = np.linalg.svd(y.T @ x)
    sign = np.array([1, 1, np.sign(np.linalg.det(U @ Vt))])
    R = (U * sign) @ Vt
    scale = float((S * sign).sum() / max((x**2).sum(), 1e-30))
    return scale, R, mean1 - scale * R @ mean0


def pose_errors(poses: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Compare poses with true ones, whatever the world and the scale of each.

    A rotation is compared relative to the other images': a similarity that aligns the camera centres would turn all of
    them when the centres lie nearly on a line, and the errors be those of the alignment.

    Returns:
      name -> rotation error in degrees, the median over the other images; error of the camera centre in the units of
      the truth, after a similarity that aligns the centres; images in both alone.

    Raises:
      ValueError: fewer than three images in both.
    """
    names = sorted(set(poses) & set(truth))
    if len(names) < 3:
        raise ValueError(f"found {len(names)} images with both poses, expected three or more to align them")
    centers = [np.stack([geometry.invert_pose(p[name])[:3, 3] for name in names]) for p in (poses, truth)]
    scale, R, t = align_similarity(*centers)
    offsets = np.linalg.norm(centers[0] @ (scale * R).T + t - centers[1], axis=1)
    turns = np.stack([truth[name][:3, :3].T @ poses[name][:3, :3] for name in names])  # world to world: equal if right
    chords = np.linalg.norm(turns[:, None] - turns, axis=(2, 3))
    angles = np.degrees(2 * np.arcsin(np.minimum(chords / np.sqrt(8), 1)))
    others = angles[~np.eye(len(names), dtype=bool)].reshape(len(names), -1)
    return {name: (float(np.median(row)), float(d)) for name, row, d in zip(names, others, offsets)}


def statistics(models: Sequence[Any], num_images: int) -> dict[str, Any]:
    """Return the JSON-ready figures of the models of `map_images`."""
    rows = [
        {
            "num_images": model.num_reg_images(),
            "num_cameras": model.num_cameras(),
            "num_points": model.num_points3D(),
            "mean_track_length": model.compute_mean_track_length(),
            "mean_reprojection_px": model.compute_mean_reprojection_error(),
        }
        for model in models
    ]
    return {"num_images": num_images, "models": rows}


def export_model(model: Any, out: str | Path) -> None:
    """Write points.ply (coloured), poses.json and picture.png of a model into a folder."""
    from gim_jax.tasks.clouds import write_ply
    from gim_jax.viz import encode_png

    out, poses = Path(out), poses_of(model)
    points, colors = points_of(model)
    write_ply(out / "points.ply", points, colors)
    cameras = {}
    for image in model.images.values():
        if image.has_pose:
            camera = model.cameras[image.camera_id]
            cameras[image.name] = {
                "cam_from_world": poses[image.name].tolist(),
                "camera": {
                    "model": camera.model.name,
                    "width": camera.width,
                    "height": camera.height,
                    "params": camera.params.tolist(),
                },
            }
    write_json(out / "poses.json", {"convention": "OpenCV axes, COLMAP pixels", "images": cameras})
    picture = draw_model(points, colors, poses)
    write_atomic(out / "picture.png", lambda file: file.write(encode_png(picture)))


def draw_model(
    points: np.ndarray, colors: np.ndarray, poses: dict[str, np.ndarray], queries: dict[str, np.ndarray] | None = None
) -> np.ndarray:
    """Draw the points [N, 3] from the middle camera, and from its side and above: cameras in red, queries in green.

    Returns:
      [600, 1608, 3] uint8 RGB.
    """
    queries, names = queries or {}, sorted(poses)
    view = poses[names[len(names) // 2]]
    centers = np.stack([geometry.invert_pose(pose)[:3, 3] for pose in poses.values()])
    depth = np.median(np.linalg.norm(points - centers.mean(0), axis=1)) * 0.06 if len(points) else 0.1
    edges, shape, paint = _camera_edges(depth), [points], [colors]
    for group, color in ((poses, (255, 40, 40)), (queries, (60, 255, 60))):
        for pose in group.values():
            inverse = geometry.invert_pose(pose)
            shape.append(edges @ inverse[:3, :3].T + inverse[:3, 3])
            paint.append(np.tile(np.array([color], np.uint8), (len(edges), 1)))
    seen = np.concatenate(shape) @ view[:3, :3].T + view[:3, 3]
    return side_by_side([draw_points(seen, np.concatenate(paint), (800, 600), *turn) for turn in ((0, 0), (35, 30))])


def _camera_edges(depth: float, num: int = 25) -> np.ndarray:
    """Return points [8 num, 3] on the edges of a camera's pyramid, the camera in the origin."""
    corners = depth * np.array([[-0.5, -0.375, 1], [0.5, -0.375, 1], [0.5, 0.375, 1], [-0.5, 0.375, 1]])
    along = np.linspace(0, 1, num)[:, None]
    sides = [along * corner for corner in corners]
    frame = [a + along * (b - a) for a, b in zip(corners, np.roll(corners, -1, 0))]
    return np.concatenate(sides + frame)
