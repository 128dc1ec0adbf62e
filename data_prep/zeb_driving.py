"""KITTI and RobotCar as published, for `zeb.build`: their depth is a laser's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from data_prep.zeb import GRID, Frame, Scene
from data_prep.zeb_readers import folders, image_of, intrinsics, numbers, png_depth, pose
from gim_jax import geometry
from gim_jax.image import image_size

KITTI_DRIVES = {  # odometry sequence: (raw drive, its first frame), from the odometry development kit
    "00": ("2011_10_03_drive_0027_sync", 0),
    "01": ("2011_10_03_drive_0042_sync", 0),
    "02": ("2011_10_03_drive_0034_sync", 0),
    "04": ("2011_09_30_drive_0016_sync", 0),
    "05": ("2011_09_30_drive_0018_sync", 0),
    "06": ("2011_09_30_drive_0020_sync", 0),
    "07": ("2011_09_30_drive_0027_sync", 0),
    "08": ("2011_09_30_drive_0028_sync", 1100),
    "09": ("2011_09_30_drive_0033_sync", 0),
    "10": ("2011_09_30_drive_0034_sync", 0),
}


def kitti(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """KITTI odometry (`sequences/NN/{image_2/*.png, calib.txt}`, `poses/NN.txt`: left gray camera to world) with the
    depth benchmark's `{train,val}/<drive>/proj_depth/groundtruth/image_02/*.png` (metres x 256). Frames without depth
    are left out: the first and last five of a drive."""
    for folder in folders(root / "sequences", ()):
        if folder.name not in KITTI_DRIVES:
            continue
        drive, first = KITTI_DRIVES[folder.name]
        if wanted and drive not in wanted:
            continue
        lines = (folder / "calib.txt").read_text().splitlines()
        P2 = next((np.array(line.split()[1:], float) for line in lines if line.startswith("P2:")), np.zeros(0))
        if P2.size != 12:
            raise ValueError(f"{folder}/calib.txt: expected P2: and 12 numbers")
        P2 = P2.reshape(3, 4)
        K = P2[:, :3]
        offset = pose(np.eye(3), np.linalg.solve(K, P2[:, 3]))  # from the left gray camera to the left colour one
        frames = []
        for index, row in enumerate(numbers(root / "poses" / f"{folder.name}.txt")):
            name = f"{first + index:010d}.png"
            places = (
                root / part / drive / "proj_depth" / "groundtruth" / "image_02" / name for part in ("train", "val")
            )
            depth = next((path for path in places if path.is_file()), None)
            image = folder / "image_2" / f"{index:06d}.png"
            if depth is None or not image.is_file():
                continue
            T = offset @ geometry.invert_pose(pose(np.reshape(row, (3, 4))[:, :3], np.reshape(row, (3, 4))[:, 3]))
            read = functools.partial(png_depth, depth, 256.0)
            frames.append(Frame(image.stem, image_of(image), K, T, read, image_size(image)))
        yield drive, frames


def _se3(values: Sequence[float]) -> np.ndarray:
    """RobotCar's x y z roll pitch yaw, R = Rz Ry Rx."""
    return pose(Rotation.from_euler("xyz", values[3:6]).as_matrix(), values[:3])


def _ins(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Read ins.csv (timestamp in column 0, northing easting down in 5 to 7, roll pitch yaw last): times -> [N, 4, 4]
    INS to world; columns as in the robotcar-dataset-sdk."""
    lines = path.read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines if line.strip()]
    if len(rows) < 2:
        raise ValueError(f"{path}: found {len(rows)} poses, expected at least two")
    try:
        times = np.array([int(row[0]) for row in rows])
        values = np.array([[float(v) for v in (*row[5:8], *row[-3:])] for row in rows])
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: {error}") from error
    origin = int(times[0])
    seconds = (times - origin) * 1e-6
    turns = Slerp(seconds, Rotation.from_euler("xyz", values[:, 3:]))

    def at(when: np.ndarray) -> np.ndarray:
        t = np.clip((np.asarray(when) - origin) * 1e-6, seconds[0], seconds[-1])
        poses = np.tile(np.eye(4), (len(t), 1, 1))
        poses[:, :3, :3] = turns(t).as_matrix()
        poses[:, :3, 3] = np.stack([np.interp(t, seconds, values[:, k]) for k in range(3)], -1)
        return poses

    return at


LASER_WINDOW_US = 10_000_000  # scans 10 s before and after an image make its depth, as in the development kit


def robotcar(root: Path, wanted: Sequence[str] = ()) -> Iterator[Scene]:
    """RobotCar: `<traversal>/{stereo/centre/*.png (Bayer), stereo.timestamps, gps/ins.csv, lms_front/*.bin}` with the
    development kit's `models/stereo_narrow_left{.txt,_distortion_lut.bin}` and
    `extrinsics/{stereo,ins,lms_front}.txt` beside the traversals (github.com/ori-mrg/robotcar-dataset-sdk). Depth:
    laser scans around the time of the image."""
    model = numbers(root / "models" / "stereo_narrow_left.txt")
    K, G_camera_image = intrinsics(*model[0][:4]), np.array(model[1:5])
    ins, stereo, laser = (_se3(numbers(root / "extrinsics" / f"{n}.txt")[0]) for n in ("ins", "stereo", "lms_front"))
    camera_from_ins = np.linalg.inv(G_camera_image) @ stereo @ ins
    ins_from_laser = np.linalg.inv(ins) @ laser
    lut = np.fromfile(root / "models" / "stereo_narrow_left_distortion_lut.bin", np.float64).reshape(2, -1)
    for folder in folders(root, wanted):
        if not (folder / "stereo" / "centre").is_dir():
            continue
        poses = _ins(folder / "gps" / "ins.csv")
        scans = sorted(int(path.stem) for path in (folder / "lms_front").glob("*.bin"))
        if not scans:
            raise ValueError(f"{folder}/lms_front: found no scan")
        when = np.array(scans)
        from_laser = poses(when) @ ins_from_laser
        frames = []
        for row in numbers(folder / "stereo.timestamps"):
            stamp = int(row[0])
            path = folder / "stereo" / "centre" / f"{stamp}.png"
            if not path.is_file():
                continue
            size = image_size(path)
            T = camera_from_ins @ geometry.invert_pose(poses(np.array([stamp]))[0])
            image = functools.partial(_robotcar_image, path, lut)
            depth = functools.partial(_laser_depth, folder / "lms_front", when, from_laser, stamp, K, T, size)
            frames.append(Frame(str(stamp), image, K, T, depth, size))
        yield folder.name, frames


def _robotcar_image(path: Path, lut: np.ndarray) -> np.ndarray:
    """Demosaic (GBRG) and undistort: [H, W, 3] RGB."""
    raw = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if raw is None or raw.size != lut.shape[1]:
        raise ValueError(f"{path}: not an image of the size that the distortion table is for")
    colour = cv2.cvtColor(raw, cv2.COLOR_BayerGBRG2RGB)
    maps = [m.reshape(raw.shape).astype(np.float32) for m in lut]
    return cv2.remap(colour, maps[0], maps[1], cv2.INTER_LINEAR)


def _laser_depth(folder: Path, when, from_laser, stamp: int, K, T, size) -> np.ndarray:
    """Project the scans around a time; [h, w] on a grid, the nearest point of each cell."""
    chosen = np.flatnonzero(np.abs(when - stamp) <= LASER_WINDOW_US)
    depth = np.full((GRID[1], GRID[0]), np.inf, np.float32)
    small = geometry.scale_K(K, np.divide(GRID, size))
    for index in chosen:
        scan = np.fromfile(folder / f"{when[index]}.bin", np.float64)
        points = scan[: len(scan) // 3 * 3].reshape(-1, 3).copy()
        points[:, 2] = 0  # the third number is the reflectance
        moved = T @ from_laser[index]
        points = points @ moved[:3, :3].T + moved[:3, 3]
        points = points[points[:, 2] > 0.5]  # metres; nearer is the car itself
        uv = np.rint(points[:, :2] / points[:, 2:] * np.diag(small)[:2] + small[:2, 2]).astype(int)
        inside = (uv >= 0).all(-1) & (uv < GRID).all(-1)
        np.minimum.at(depth, (uv[inside, 1], uv[inside, 0]), points[inside, 2].astype(np.float32))
    return np.where(np.isfinite(depth), depth, 0)
