"""InLoc (Taira et al., CVPR 2018; GIM table 5) by hloc's protocol: no model, every database image carries its scan.

Layout of the data set: `query/iphone7/NAME.JPG`, `database/cutouts/<floor>/<scan>/NAME.jpg` with `NAME.jpg.mat`
(XYZcut [H, W, 3]) beside it, `database/alignments/<floor>/transformations/<building>_trans_<scan>.txt`; the building is
the first three letters of NAME: the floor DUC1 has DUC_cutout_024_0_0.jpg and DUC_trans_024.txt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from gim_jax.image import image_size
from gim_jax.tasks import sfm
from gim_jax.tasks.localize import Located, solve_pnp
from gim_jax.weights.store import BAD_FILE

FOCAL_PX = 4032 * 28 / 36  # iPhone 7: 28 mm equivalent, 4032 px wide (hloc localize_inloc.py)
MAX_ERROR_PX = 48.0  # hloc localize_inloc.py
MIN_MATCHES = 20  # hloc pipeline_InLoc: database images with fewer are skipped
TRANSFORM_ROWS = slice(7, 11)  # lines of the transformation file that hold the 4x4 matrix after ICP


def interpolate_scan(scan: np.ndarray, kpts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read the points of a scan at pixels: bilinear, and nearest where a neighbour is missing.

    Args:
      scan: [H, W, 3], NaN where the scanner saw nothing.
      kpts: [M, 2] px.

    Returns:
      [M, 3] float64, and [M] bool, False where there is no point or no pixel.
    """
    height, width = scan.shape[:2]
    x, y = np.asarray(kpts, np.float64).T
    inside = (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    x, y = np.where(inside, x, 0), np.where(inside, y, 0)
    x0, y0 = (np.minimum(np.floor(v).astype(int), n - 2) for v, n in ((x, width), (y, height)))
    wx, wy = (x - x0)[:, None], (y - y0)[:, None]
    top = scan[y0, x0] * (1 - wx) + scan[y0, x0 + 1] * wx
    bottom = scan[y0 + 1, x0] * (1 - wx) + scan[y0 + 1, x0 + 1] * wx
    points = top * (1 - wy) + bottom * wy
    nearest = scan[np.rint(y).astype(int), np.rint(x).astype(int)]
    points = np.where(np.isfinite(points).all(1, keepdims=True), points, nearest)
    return points, inside & np.isfinite(points).all(1)


def read_transform(path: str | Path) -> np.ndarray:
    """Read the matrix [4, 4] that maps a scan to its floor, lines 8 to 11 of a transformation file."""
    try:
        lines = Path(path).read_text().splitlines()[TRANSFORM_ROWS]
        matrix = np.array([[float(word) for word in line.split()] for line in lines])
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a transformation: {error}") from error
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"{path}: found {matrix.shape} numbers in lines 8 to 11, expected 4 x 4")
    return matrix


def scan_points(dataset: Path, name: str, kpts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points [M, 3] of the world that pixels [M, 2] of a database image show, and [M] bool valid."""
    path = dataset / f"{name}.mat"
    try:
        scan = np.asarray(loadmat(path)["XYZcut"], np.float64)
    except (*BAD_FILE, MatReadError) as error:
        raise ValueError(f"{path}: found no scan XYZcut: {str(error) or type(error).__name__}") from error
    if scan.ndim != 3 or scan.shape[2] != 3 or min(scan.shape[:2]) < 2:
        raise ValueError(f"{path}: XYZcut: found shape {scan.shape}, expected [H, W, 3]")
    if len(Path(name).parts) < 3:
        raise ValueError(f"{name}: expected a database image as database/cutouts/<floor>/<scan>/NAME.jpg")
    floor, scan_id, image = Path(name).parts[-3:]
    root = dataset / "database" / "alignments" / floor / "transformations"
    T = read_transform(root / f"{image[:3]}_trans_{scan_id}.txt")
    points, valid = interpolate_scan(scan, kpts)
    homogeneous = points @ T[:3, :3].T + T[:3, 3]
    return homogeneous / (points @ T[3, :3] + T[3, 3])[:, None], valid


def localize(
    dataset: str | Path,
    retrieved: Mapping[str, Sequence[str]],
    matcher: Any,
    *,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Located]:
    """Find the poses of queries among scans.

    Args:
      retrieved: query -> database images, the most similar first; names relative to the data set.
    """
    dataset, pycolmap = Path(dataset), sfm.quiet_pycolmap()
    pairs = [(query, name) for query, names in retrieved.items() for name in names]
    found = dict(zip(pairs, sfm.match_all(dataset, pairs, matcher, cache, progress)))
    results = {}
    for query, names in retrieved.items():
        kpts, points, num_matches = [np.zeros((0, 2))], [np.zeros((0, 3))], 0
        for name in names:
            kpts0, kpts1, _ = found[query, name]
            num_matches += len(kpts0)
            if len(kpts0) >= MIN_MATCHES:
                xyz, valid = scan_points(dataset, name, kpts1)
                kpts.append(kpts0[valid])
                points.append(xyz[valid])
        width, height = image_size(dataset / query)
        camera = pycolmap.Camera(
            model="SIMPLE_PINHOLE", width=width, height=height, params=[FOCAL_PX, width / 2, height / 2]
        )
        camera.has_prior_focal_length = True
        places = np.concatenate(kpts)
        pose, num_inliers, reason = solve_pnp(places, np.concatenate(points), camera, MAX_ERROR_PX, corner_shift=False)
        results[query] = Located(pose, num_matches, len(places), num_inliers, reason)
    return results
