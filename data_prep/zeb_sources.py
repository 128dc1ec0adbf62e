"""The twelve source data sets of ZEB as their authors publish them: scenes of frames for `zeb.build`.

Each function takes the folder of the data set and the names of the scenes that are wanted (none: all that are there)
and yields (scene, frames). Formats: the data sets' own documentation and readers, named at each function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from data_prep.zeb import GRID, Frame, Scene, scene_overlaps
from data_prep.zeb_driving import kitti, robotcar
from data_prep.zeb_readers import folders, image_of, intrinsics, numbers, png_depth, pose
from gim_jax import geometry
from gim_jax.image import image_size


def read_pfm(path: Path) -> np.ndarray:
    """Read a gray PFM file: [h, w] float32, rows from the top."""
    data = path.read_bytes()
    head = data.split(b"\n", 3)
    try:
        if len(head) != 4 or head[0].strip() != b"Pf":
            raise ValueError(f"found the heading {head[0][:20]!r}, expected Pf")
        width, height = (int(token) for token in head[1].split())
        values = np.frombuffer(head[3], "<f4" if float(head[2]) < 0 else ">f4", width * height)
    except ValueError as error:
        raise ValueError(f"{path}: not a whole gray PFM file: {error}") from error
    return values.reshape(height, width)[::-1].astype(np.float32)


def gl3d(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """GL3D: `data/<scene>/{undist_images/*.jpg, depths/*.pfm, geolabel/cameras.txt}` (github.com/lzx551402/GL3D,
    docs/data_format.md). A line of cameras.txt: index, fx, fy, px, py, skew, t, R (world to camera), distortion,
    size."""
    for folder in folders(root / "data", wanted):
        frames = []
        for row in numbers(folder / "geolabel" / "cameras.txt"):
            if len(row) != 23:
                raise ValueError(f"{folder}/geolabel/cameras.txt: found {len(row)} numbers in a line, expected 23")
            name = f"{int(row[0]):08d}"
            path = folder / "undist_images" / f"{name}.jpg"
            size = image_size(path)
            K = geometry.scale_K(intrinsics(*row[1:5]), np.divide(size, row[21:23]))
            T = pose(np.reshape(row[9:18], (3, 3)), row[6:9])
            frames.append(
                Frame(name, image_of(path), K, T, functools.partial(read_pfm, folder / "depths" / f"{name}.pfm"), size)
            )
        yield folder.name, frames


def blendedmvs(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """BlendedMVS: `<scene>/{blended_images/*.jpg, cams/*_cam.txt, rendered_depth_maps/*.pfm}`
    (github.com/YoYo000/BlendedMVS). A camera: `extrinsic` and 4x4 world to camera, `intrinsic` and 3x3."""
    for folder in folders(root, wanted):
        frames = []
        for path in sorted((folder / "blended_images").glob("*.jpg")):
            if path.stem.endswith("_masked"):
                continue
            tokens = (folder / "cams" / f"{path.stem}_cam.txt").read_text().split()
            if len(tokens) < 27 or tokens[0] != "extrinsic" or tokens[17] != "intrinsic":
                raise ValueError(f"{folder}/cams/{path.stem}_cam.txt: expected extrinsic 4x4 and intrinsic 3x3")
            T, K = np.array(tokens[1:17], float).reshape(4, 4), np.array(tokens[18:27], float).reshape(3, 3)
            depth = functools.partial(read_pfm, folder / "rendered_depth_maps" / f"{path.stem}.pfm")
            frames.append(Frame(path.stem, image_of(path), K, T, depth, image_size(path)))
        yield folder.name, frames


def _colmap(folder: Path) -> tuple[dict[int, tuple], dict[str, tuple[int, np.ndarray]]]:
    """Read COLMAP's cameras.txt and images.txt: id -> (model, size, parameters); file name -> (camera, T)."""
    cameras, images = {}, {}
    for line in (folder / "cameras.txt").read_text().splitlines():
        tokens = line.split()
        if tokens and not line.startswith("#"):
            size = int(tokens[2]), int(tokens[3])
            cameras[int(tokens[0])] = tokens[1], size, [float(token) for token in tokens[4:]]
    rows = [line for line in (folder / "images.txt").read_text().splitlines() if not line.startswith("#")]
    for line in rows[::2]:  # every second line holds points
        tokens = line.split()
        if len(tokens) >= 10:
            w, x, y, z = (float(token) for token in tokens[1:5])
            R = Rotation.from_quat([x, y, z, w]).as_matrix()
            images[Path(tokens[9]).name] = int(tokens[8]), pose(R, [float(token) for token in tokens[5:8]])
    return cameras, images


def thin_prism_fisheye(rays: np.ndarray, p: Sequence[float]) -> np.ndarray:
    """Project rays [..., 2] (x / z, y / z) by COLMAP's THIN_PRISM_FISHEYE: corner coordinates [..., 2]."""
    fx, fy, cx, cy, k1, k2, p1, p2, k3, k4, sx, sy = p
    radius = np.maximum(np.linalg.norm(rays, axis=-1, keepdims=True), 1e-12)
    u, v = np.moveaxis(rays / radius * np.arctan(radius), -1, 0)
    r2 = u * u + v * v
    radial = r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    x = u + u * radial + 2 * p1 * u * v + p2 * (r2 + 2 * u * u) + sx * r2
    y = v + v * radial + 2 * p2 * u * v + p1 * (r2 + 2 * v * v) + sy * r2
    return np.stack([fx * x + cx, fy * y + cy], -1)


def _eth3d_depth(path: Path, K: np.ndarray, size: tuple[int, int], camera: tuple) -> np.ndarray:
    """Depth of the undistorted image on a grid, from the raw float32 map of the distorted one."""
    model, (width, height), parameters = camera
    if model != "THIN_PRISM_FISHEYE" or len(parameters) != 12:
        raise ValueError(f"{path}: camera {model}, expected THIN_PRISM_FISHEYE")
    raw = np.fromfile(path, np.float32)
    if raw.size != width * height:
        raise ValueError(f"{path}: found {raw.size} numbers, expected {width}x{height}")
    grid = 4 * GRID[0], 4 * GRID[1]
    small = geometry.scale_K(K, np.divide(grid, size))
    pixels = np.stack(np.meshgrid(np.arange(grid[0]), np.arange(grid[1])), -1).astype(float)
    rays = geometry.normalize_by_K(pixels.reshape(-1, 2), small)
    found = np.floor(thin_prism_fisheye(rays, parameters)).astype(int)  # corner coordinates: the pixel's own number
    inside = (found >= 0).all(-1) & (found < [width, height]).all(-1)
    depth = np.zeros(len(rays), np.float32)
    depth[inside] = raw.reshape(height, width)[found[inside, 1], found[inside, 0]]
    return np.where(np.isfinite(depth), depth, 0).reshape(grid[1], grid[0])


def eth3d(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """ETH3D high-res multi-view, as its archives unpack: `<scene>/images/dslr_images_undistorted/*.JPG`,
    `<scene>/dslr_calibration_undistorted/{cameras,images}.txt` and `<scene>/dslr_calibration_jpg/...` (COLMAP), and raw
    depth of the distorted images in `<scene>/ground_truth_depth/dslr_images/*.JPG` (eth3d.net/documentation)."""
    for folder in folders(root, wanted):
        cameras, images = _colmap(folder / "dslr_calibration_undistorted")
        distorted, names = _colmap(folder / "dslr_calibration_jpg")
        frames = []
        for name, (camera, T) in sorted(images.items()):
            model, size, parameters = cameras[camera]
            if model != "PINHOLE":
                raise ValueError(f"{folder}/dslr_calibration_undistorted: camera {model}, expected PINHOLE")
            fx, fy, cx, cy = parameters
            cx, cy = geometry.corner_to_pixel(np.array([cx, cy]))
            K = intrinsics(fx, fy, cx, cy)
            path = folder / "ground_truth_depth" / "dslr_images" / name
            depth = functools.partial(_eth3d_depth, path, K, size, distorted[names[name][0]])
            image = folder / "images" / "dslr_images_undistorted" / name
            frames.append(Frame(Path(name).stem, image_of(image), K, T, depth, size))
        yield folder.name, frames


def multifov(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """Multi-FoV's pinhole camera in the city: `data/img/img0001_0.png`, `data/depth/img0001_0.depth` (z-depth, text,
    rows from the top), `info/groundtruth.txt` (index, t, quaternion xyzw, camera to world); its archives unpack into
    one tree (rpg.ifi.uzh.ch/fov.html; depth as vikit's blender_utils reads it). One scene, `urban`."""
    if wanted and list(wanted) != ["urban"]:
        raise ValueError(f"scenes: found {', '.join(wanted)}, expected urban")
    K = intrinsics(329.115520046, 329.115520046, 320.0, 240.0)  # the data set's calibration
    frames = []
    for row in numbers(root / "info" / "groundtruth.txt"):
        name = f"img{int(row[0]):04d}_0"
        image, depth = root / "data" / "img" / f"{name}.png", root / "data" / "depth" / f"{name}.depth"
        if not (image.is_file() and depth.is_file()):
            continue
        T = geometry.invert_pose(pose(Rotation.from_quat(row[4:8]).as_matrix(), row[1:4]))
        size = image_size(image)

        def read(depth=depth, size=size):
            values = np.array(depth.read_text().split(), np.float32)
            if values.size != size[0] * size[1]:
                raise ValueError(f"{depth}: found {values.size} numbers, expected {size[0]}x{size[1]}")
            return values.reshape(size[1], size[0])

        frames.append(Frame(name, image_of(image), K, T, read, size))
    yield "urban", frames


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield (number, value) of a protobuf message: bytes of lengths and floats, integers of varints."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("not a whole protobuf message")
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value, at

    at = 0
    while at < len(data):
        key, at = varint(at)
        kind = key & 7
        if kind == 0:
            value, at = varint(at)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            if kind != 2:
                raise ValueError(f"not a protobuf message: wire type {kind}")
            length, at = varint(at)
        if at + length > len(data):
            raise ValueError("not a whole protobuf message")
        yield key >> 3, data[at : at + length]
        at += length


def _xyz(data: bytes) -> np.ndarray:
    out = np.zeros(3)
    for number, value in _fields(data):
        out[number - 1] = np.frombuffer(value, "<f4")[0]  # type: ignore[arg-type]
    return out


def _scenenet_pose(view: dict[int, bytes]) -> np.ndarray:
    """World to camera in the middle of the exposure: z towards `lookat`, y down (pySceneNetRGBD's example)."""
    points = [[_xyz(dict(_fields(view[key]))[n]) for n in (1, 2)] for key in (2, 3)]  # type: ignore[arg-type]
    camera, lookat = (sum(pair) / 2 for pair in zip(*points))
    z = (lookat - camera) / np.linalg.norm(lookat - camera)
    x = np.cross(z, [0, 1, 0])
    x /= np.linalg.norm(x)
    R = np.stack([x, np.cross(z, x), z])
    return pose(R, -R @ camera)


def scenenet(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """SceneNet RGB-D validation: `scenenet_rgbd_val.pb`, `val/<render path>/{photo/*.jpg, depth/*.png}`, depth = ray
    length in mm (github.com/jmccormac/pySceneNetRGBD, scenenet.proto). Scenes have the last part of the path."""
    path = root / "scenenet_rgbd_val.pb"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    K = intrinsics(
        160 / math.tan(math.radians(30)), 120 / math.tan(math.radians(22.5)), 160.0, 120.0
    )  # 60 by 45 degrees
    try:
        trajectories = [value for number, value in _fields(path.read_bytes()) if number == 1]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for trajectory in trajectories:
        views, place = [], ""
        for number, value in _fields(trajectory):  # type: ignore[arg-type]
            if number == 3:
                views.append(dict(_fields(value)))  # type: ignore[arg-type]
            elif number == 4:
                place = bytes(value).decode()  # type: ignore[arg-type]
        folder, name = root / "val" / place, Path(place).name
        if ".." in Path(place).parts or Path(place).is_absolute():
            raise ValueError(f"{path}: found the path {place!r}, expected one below val")
        if (wanted and name not in wanted) or not folder.is_dir():
            continue
        frames = []
        for view in views:
            stem = str(view.get(1, 0))
            photo = folder / "photo" / f"{stem}.jpg"
            size = image_size(photo)
            rays = np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1])), -1).reshape(-1, 2)
            length = np.linalg.norm(geometry.to_homogeneous(geometry.normalize_by_K(rays, K)), axis=-1)

            def read(path=folder / "depth" / f"{stem}.png", length=length, size=size):
                return (png_depth(path, 1000.0) / length.reshape(size[1], size[0])).astype(np.float32)

            frames.append(Frame(stem, image_of(photo), K, _scenenet_pose(view), read, size))  # type: ignore[arg-type]
        yield name, frames


def iclnuim(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """The augmented ICL-NUIM of redwood-data.org: `<scene>-color/*.jpg`, `<scene>-depth-clean/*.png` (mm),
    `<scene>-traj.txt` (a line of three numbers, then 4x4 camera to world, per frame); livingroom1, 2, office1, 2."""
    trajectories = sorted(root.glob("*-traj.txt"))
    names = [path.name.removesuffix("-traj.txt") for path in trajectories]
    if not names or set(wanted) - set(names):
        raise ValueError(f"{root}: found {', '.join(names) or 'no <scene>-traj.txt'}, expected {', '.join(wanted)}")
    K = intrinsics(525.0, 525.0, 319.5, 239.5)  # redwood-data.org/indoor/data.html
    for scene, path in zip(names, trajectories):
        if wanted and scene not in wanted:
            continue
        rows = [row for row in numbers(path) if len(row) == 4]
        poses = np.array(rows).reshape(-1, 4, 4)
        frames = []
        for index, T in enumerate(poses):
            name = f"{index:05d}"
            image = root / f"{scene}-color" / f"{name}.jpg"
            read = functools.partial(png_depth, root / f"{scene}-depth-clean" / f"{name}.png", 1000.0)
            frames.append(Frame(name, image_of(image), K, geometry.invert_pose(T), read, image_size(image)))
        yield scene, frames


def _decode(data: np.ndarray) -> np.ndarray:
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("an image of GTA-SfM that cannot be decoded")
    return np.ascontiguousarray(image[..., ::-1])


def gtasfm(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """GTA-SfM: `<scene>.hdf5` with image_i (encoded), K_i, pose_i, depth_i (github.com/HKUST-Aerial-Robotics/
    Flow-Motion-Depth, read.py). It does not say which way poses go: the way under which the depths of neighbours agree
    is taken."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{root}: reading HDF5 needs h5py (the extra `prep`)") from error
    paths = [path for path in sorted(root.glob("*.hdf5")) if not wanted or path.stem in wanted]
    if not paths:
        raise ValueError(f"{root}: found no <scene>.hdf5{' of ' + ', '.join(wanted) if wanted else ''}")
    for path in paths:
        try:
            with h5py.File(path) as file:
                count = len(file) // 4
                encoded = [np.asarray(file[f"image_{i}"], np.uint8) for i in range(count)]
                Ks, poses, depths = (
                    [np.asarray(file[f"{kind}_{i}"], np.float64) for i in range(count)]
                    for kind in ("K", "pose", "depth")
                )
        except (OSError, KeyError) as error:
            raise ValueError(f"{path}: not a sequence of GTA-SfM: {error}") from error

        def frames(Ts, encoded=encoded, Ks=Ks, depths=depths) -> list[Frame]:
            out = []
            for i, (data, K, T, depth) in enumerate(zip(encoded, Ks, Ts, depths)):
                decode, read = functools.partial(_decode, data), functools.partial(np.asarray, depth, np.float32)
                out.append(Frame(f"image_{i}", decode, K, T, read, (depth.shape[1], depth.shape[0])))
            return out

        both = [frames(Ts) for Ts in (poses, [geometry.invert_pose(T) for T in poses])]
        neighbours = np.stack([np.arange(count - 1), np.arange(1, count)], -1)[:64]
        agree = [scene_overlaps(side[:65], neighbours).mean() if len(neighbours) else 0.0 for side in both]
        yield path.stem, both[int(np.argmax(agree))]


SOURCES = {
    **{"GL3": gl3d, "BLE": blendedmvs, "ETI": eth3d, "ETO": eth3d, "KIT": kitti},
    **{"WEA": robotcar, "SEA": robotcar, "NIG": robotcar},
    **{"MUL": multifov, "SCE": scenenet, "ICL": iclnuim, "GTA": gtasfm},
}
