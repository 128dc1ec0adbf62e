"""Registration of point clouds by their bird's-eye views (GIM figures 4 and 9): a motion in the plane, and a height.

Both clouds are seen from above as images of one resolution, the images are matched, and a rotation about the vertical
and a translation are fitted to the matches. The paper states neither resolution nor rules; those here are ours.
A bird's-eye view is north up: x to the right, y upwards, pixel (0, 0) at the smallest x and the largest y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from gim_jax import geometry, robust
from gim_jax.image import resize
from gim_jax.tasks import load_extra
from gim_jax.tasks.clouds import Cloud
from gim_jax.viz import draw_matches

PICTURES = ("auto", "color", "density", "height")
LONG_SIDES = (640, 320, 160)  # px of the larger view, tried in this order: thin scans match when seen coarsely
BEYOND_DOUBT = -10.0  # log10 of the false alarms at which no coarser view is asked; a scan's raster, not the room, -5
MAX_SIDE = 8192  # px; more is a resolution given in the wrong unit
BLUR_PX = 1.0  # of density and height: a scan's raster is no texture
MARGIN = 8  # px around the points
OUTER = 0.1  # percent of the points at each end of an axis that may lie outside the view
MAX_GAP_PX = 8  # a match farther from every point is one of nothing with nothing; centres of blobs are off the walls
MAX_SAMPLES = 20_000  # pairs of matches tried; all of them up to 200 matches
MAX_SCALE_ERROR = 0.05  # both views have one resolution, so a similarity of another scale is a wrong one
NEAREST = 8  # points whose median height stands for a match
CLEARLY_MORE = 1.5  # a few near neighbours agree with a rigid motion whatever the scale; a true one has more
ICP_REACH = 5.0  # cells: neighbours farther apart are no correspondences


@dataclass(frozen=True)
class View:
    """A cloud from above.

    Attributes:
      image: [H, W, 3] uint8; empty cells are black.
      height: [H, W] float32, of the highest point; -inf where empty.
      count: [H, W] int64 points.
      corner: (x, y) of the upper left corner of the upper left pixel.
      resolution: length of a pixel.
    """

    image: np.ndarray
    height: np.ndarray
    count: np.ndarray
    corner: tuple[float, float]
    resolution: float

    def to_metric(self, points: np.ndarray) -> np.ndarray:
        """Map pixels [N, 2] to the cloud's x and y."""
        return np.add(self.corner, (geometry.pixel_to_corner(points) * self.resolution) * [1, -1])

    def to_pixel(self, points: np.ndarray) -> np.ndarray:
        """Map x and y [N, 2] to pixels."""
        return geometry.corner_to_pixel((points - np.array(self.corner)) * [1, -1] / self.resolution)


@dataclass(frozen=True)
class Registration:
    """The motion that lays cloud 0 onto cloud 1.

    Attributes:
      T_0to1: [4, 4] float64, `p1 = R p0 + t` in the units of the files; None where no motion can be trusted.
      reason: why it is None, "" otherwise.
      kpts0, kpts1: [M, 2] float32 px in the views, those on empty cells left out.
      inliers: [M] bool.
      views: both clouds from above.
      yaw_deg: rotation about the vertical, anticlockwise.
      scale: 1, or that of the similarity which had to stand in.
      overlap: share of the occupied cells of view 0 that fall within a cell of an occupied one of view 1.
      icp: what the refinement changed, {"rotation_deg", "translation", "num_inliers", "converged"}, or None.
    """

    T_0to1: np.ndarray | None
    reason: str
    kpts0: np.ndarray
    kpts1: np.ndarray
    inliers: np.ndarray
    views: tuple[View, View]
    yaw_deg: float = 0.0
    scale: float = 1.0
    overlap: float = 0.0
    icp: dict[str, Any] | None = None


def rotation_to_z(up: Sequence[float]) -> np.ndarray:
    """Return the rotation [3, 3] that turns the direction `up` into z by the shortest way."""
    vector = np.asarray(up, np.float64)
    if vector.shape != (3,) or not np.isfinite(vector).all() or not np.linalg.norm(vector) > 0:
        raise ValueError(f"up: found {vector.tolist()}, expected a direction of three numbers")
    x, y, z = vector / np.linalg.norm(vector)
    if z < -1 + 1e-9:
        return np.diag([1.0, -1.0, -1.0])
    cross = geometry.cross_matrix(np.array([y, -x, 0.0]))  # up x z
    return np.eye(3) + cross + cross @ cross / (1 + z)


def _extent(*clouds: np.ndarray) -> float:
    """Return the largest side of clouds [N, 3] in the plane."""
    extents = [np.ptp(np.percentile(points[:, :2], [OUTER, 100 - OUTER], axis=0), axis=0).max() for points in clouds]
    if max(extents) <= 0:
        raise ValueError("points: all lie above each other, there is nothing to see from above")
    return float(max(extents))


def view_from_above(points: np.ndarray, colors: np.ndarray | None, resolution: float, picture: str = "density") -> View:
    """Project a cloud onto the ground.

    Args:
      points: [N, 3], z up.
      colors: [N, 3] uint8 RGB, needed for "color".
      resolution: length of a pixel.
      picture: "color": of the highest point of each cell, gaps of one cell closed; "density": logarithm of the number
        of points, slightly blurred, which shows walls; "height": of the highest point, likewise blurred.
    """
    low, high = np.percentile(points[:, :2], [OUTER, 100 - OUTER], axis=0)
    corner = (low[0] - MARGIN * resolution, high[1] + MARGIN * resolution)
    width, height = (np.ceil((high - low) / resolution) + 2 * MARGIN).astype(int).tolist()
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"resolution: found {resolution:g}, views of {width}x{height} px, expected up to {MAX_SIDE}")
    cells = np.floor((points[:, :2] - corner) * [1, -1] / resolution).astype(int)
    inside = ((cells >= 0) & (cells < [width, height])).all(1)
    index = cells[inside, 1] * width + cells[inside, 0]
    z = points[inside, 2]
    count = np.bincount(index, minlength=height * width).reshape(height, width)
    top = np.full(height * width, -np.inf, np.float32)
    order = np.argsort(z, kind="stable")
    top[index[order]] = z[order]  # the last one written is the highest
    top = top.reshape(height, width)
    filled = count > 0
    if picture == "color":
        if colors is None:
            raise ValueError("picture: found a cloud without colours, expected colours for 'color'")
        image = np.zeros((height * width, 3), np.uint8)
        image[index[order]] = colors[inside][order]
        image = image.reshape(height, width, 3)
        closed = ndimage.grey_closing(image, (3, 3, 1))
        image = np.where(filled[..., None], np.maximum(image, 1), closed)  # 0 means empty
    else:
        value = np.log1p(count)
        if picture == "height":
            bottom, ceiling = np.percentile(z, [1, 99])
            value = np.where(filled, 0.15 + 0.85 * np.clip((top - bottom) / max(ceiling - bottom, 1e-9), 0, 1), 0)
        value = value / np.percentile(value[filled], 98)
        gray = ndimage.gaussian_filter(np.clip(value, 0, 1), BLUR_PX)
        image = np.repeat(np.rint(255 * gray).astype(np.uint8)[..., None], 3, 2)
    return View(image, top, count, (float(corner[0]), float(corner[1])), float(resolution))


def fit_plane_motion(
    points0: np.ndarray, points1: np.ndarray, threshold: float, with_scale: bool = False, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit `p1 = s R p0 + t` in the plane to the most points, from samples of two, then by least squares.

    Args:
      points0, points1: [M, 2].
      threshold: inlier distance, in the same units.
      with_scale: False keeps s = 1.

    Returns:
      `s R` [2, 2], t [2] and the inliers [M] bool; none of them with fewer than two distinct points.
    """
    p, q = (np.ascontiguousarray(points, np.float64).view(np.complex128)[:, 0] for points in (points0, points1))
    num, rng = len(p), np.random.default_rng(seed)  # as complex numbers q = a p + b, and |a| = s
    first, second = (
        np.triu_indices(num, 1) if num * (num - 1) // 2 <= MAX_SAMPLES else rng.integers(num, size=(2, MAX_SAMPLES))
    )
    span0, span1 = p[second] - p[first], q[second] - q[first]
    usable = (np.abs(span0) > threshold) & (np.abs(span1) > threshold)
    if not with_scale:
        usable &= np.abs(np.abs(span0) - np.abs(span1)) < 2 * threshold
    first, second = first[usable], second[usable]
    a = span1[usable] / span0[usable]
    a = a if with_scale else a / np.abs(a)
    b = (q[first] + q[second] - a * (p[first] + p[second])) / 2
    best, inliers = -1.0, np.zeros(num, bool)
    for start in range(0, len(a), 512):
        rows = slice(start, start + 512)
        error = np.abs(a[rows, None] * p + b[rows, None] - q) / threshold
        score = np.maximum(1 - error**2, 0).sum(1)  # MSAC, Torr and Zisserman 2000
        if score.max() > best:
            best, inliers = score.max(), error[score.argmax()] < 1
    turn, shift = 1.0 + 0j, 0j
    for _ in range(10):
        if inliers.sum() < 2:
            return np.eye(2), np.zeros(2), np.zeros(num, bool)
        p_mean, q_mean = p[inliers].mean(), q[inliers].mean()
        turn = np.vdot(p[inliers] - p_mean, q[inliers] - q_mean)
        norm = np.vdot(p[inliers] - p_mean, p[inliers] - p_mean).real if with_scale else np.abs(turn)
        if norm == 0:
            return np.eye(2), np.zeros(2), np.zeros(num, bool)
        turn = turn / norm
        shift = q_mean - turn * p_mean
        again = np.abs(turn * p + shift - q) < threshold
        if (again == inliers).all():
            break
        inliers = again
    return np.array([[turn.real, -turn.imag], [turn.imag, turn.real]]), np.array([shift.real, shift.imag]), inliers


def register(
    cloud0: Cloud,
    cloud1: Cloud,
    matcher: Callable,
    *,
    resolution: float | None = None,
    picture: str = "auto",
    band: tuple[float, float] | None = None,
    up: Sequence[float] = (0, 0, 1),
    quarter_turns: Sequence[int] = (0,),
    threshold_px: float = 3.0,
    icp: bool = False,
) -> Registration:
    """Find the motion that lays cloud 0 onto cloud 1.

    Args:
      matcher: as `gim_jax.load_matcher` returns.
      resolution: length of a pixel in the units of the files; None: 640 px for the larger cloud, and half or a quarter
        of that unless it is beyond doubt; what chance explains least counts, from the finest view that agrees.
      picture: see `view_from_above`; "auto": "color" where both clouds have colours, else "density".
      band: (lowest, highest) height to look at; None: everything.
      up: the vertical in the files' axes.
      quarter_turns: view 0 is matched turned so often anticlockwise, the best counts; (0, 1, 2, 3) for a matcher that
        knows no rotation.
      threshold_px: inlier distance.
      icp: refine with small_gicp (extra `clouds`).
    """
    if picture not in PICTURES:
        raise ValueError(f"picture: found {picture!r}, expected one of {', '.join(PICTURES)}")
    if resolution is not None and not (np.isfinite(resolution) and resolution > 0):
        raise ValueError(f"resolution: found {resolution}, expected a positive length")
    R_up = rotation_to_z(up)
    clouds = (cloud0, cloud1)
    if picture == "auto":
        picture = "density" if any(cloud.colors is None for cloud in clouds) else "color"
    seen = []
    for side, cloud in enumerate(clouds):
        points = cloud.points @ R_up.T
        keep = np.ones(len(points), bool) if band is None else (points[:, 2] >= band[0]) & (points[:, 2] <= band[1])
        if not keep.any():
            raise ValueError(f"band: found no point of cloud {side} from {band[0]:g} to {band[1]:g}")  # type: ignore
        seen.append((points[keep], None if cloud.colors is None else cloud.colors[keep]))
    extent = _extent(*(points for points, _ in seen))
    results = []
    for cell in [extent / side for side in LONG_SIDES] if resolution is None else [resolution]:
        views = tuple(view_from_above(points, colors, cell, picture) for points, colors in seen)
        results += [_register_views(views, matcher, turns, threshold_px) for turns in quarter_turns]
        score, motion, found = min(results, key=lambda result: result[0])
        if score <= BEYOND_DOUBT:
            break
    if motion is None:
        return found
    places = found.views[0].to_metric(found.kpts0[found.inliers])
    reach = threshold_px * found.views[0].resolution
    _, (turn, shift), found = next(  # the finest view that says the same
        result for result in results if result[1] is not None and _distance(places, motion, result[1]) <= reach
    )
    T = np.eye(4)
    T[:2, :2], T[:2, 3] = turn, shift
    T[2, 3] = _height_difference(found, seen)
    change = None
    if icp:
        refined, change = _refine([points for points, _ in seen], T, found.views[0].resolution)
        T = refined if change["converged"] else T
    U = np.eye(4)
    U[:3, :3] = R_up
    overlap = _overlap(found.views, T)
    yaw = float(np.degrees(np.arctan2(T[1, 0], T[0, 0])))
    return Registration(
        U.T @ T @ U, "", found.kpts0, found.kpts1, found.inliers, found.views, yaw, found.scale, overlap, change
    )


def _distance(points: np.ndarray, motion0, motion1) -> float:
    """Return how far two motions (R, t) of the plane lay points [N, 2] apart, the median."""
    moved = [points @ turn.T + shift for turn, shift in (motion0, motion1)]
    return float(np.median(np.linalg.norm(moved[0] - moved[1], axis=1)))


def _register_views(views, matcher, turns: int, threshold_px: float):
    """Match the views and fit: (log10 of the false alarms, (R, t) or None, a Registration without pose)."""
    size = views[0].image.shape[1], views[0].image.shape[0]
    turned = np.ascontiguousarray(np.rot90(views[0].image, turns))
    matches = matcher(turned, views[1].image)
    turned_size = size if turns % 2 == 0 else size[::-1]
    kpts = [geometry.rotate_points(matches.kpts0, turned_size, -turns), matches.kpts1]
    filled = np.ones(len(matches), bool)
    for view, points in zip(views, kpts):
        gap: Any = ndimage.distance_transform_edt(view.count == 0)
        x, y = np.clip(np.rint(points).astype(int), 0, np.subtract(gap.shape[::-1], 1)).T
        filled &= gap[y, x] <= MAX_GAP_PX
    kpts = [points[filled] for points in kpts]
    area = int(views[1].image.any(-1).sum())  # random matches fall on what is there to see
    metric = [view.to_metric(points) for view, points in zip(views, kpts)]
    threshold = threshold_px * views[0].resolution

    def alarms(inliers: np.ndarray) -> float:
        return robust.log10_nfa(len(inliers), int(inliers.sum()), "H", threshold_px, (area, 1), sample=2)

    def trusted(inliers: np.ndarray) -> bool:
        return alarms(inliers) <= robust.MAX_LOG10_NFA

    turn, shift, inliers = fit_plane_motion(metric[0], metric[1], threshold)
    similar, offset, agree = fit_plane_motion(metric[0], metric[1], threshold, with_scale=True)
    reason, scale, ratio = "", 1.0, float(np.hypot(*similar[0]))
    wrong_scale = trusted(agree) and abs(ratio - 1) > MAX_SCALE_ERROR
    if wrong_scale and (not trusted(inliers) or agree.sum() > CLEARLY_MORE * inliers.sum()):
        reason = f"{int(agree.sum())} matches agree on a scale of {ratio:.3f}, expected 1 within {MAX_SCALE_ERROR:g}"
    elif not trusted(inliers) and trusted(agree):  # the units are slightly off: keep the place of the inliers
        turn, inliers, scale = similar / ratio, agree, ratio
        shift = offset + (similar - turn) @ metric[0][inliers].mean(0)
    elif not trusted(inliers):
        reason = f"{int(inliers.sum())} of {len(inliers)} matches agree, which chance explains"
    score = np.inf if reason else alarms(inliers)
    inliers = inliers if not reason else np.zeros(len(inliers), bool)
    found = Registration(None, reason, kpts[0], kpts[1], inliers, views, scale=scale)
    return score, (None if reason else (turn, shift)), found


def _height_difference(found: Registration, seen) -> float:
    """Median over the inliers of the height of cloud 1 less that of cloud 0, by the points nearest in the plane."""
    heights = []
    for view, points, (cloud, _) in zip(found.views, (found.kpts0, found.kpts1), seen):
        place = view.to_metric(points[found.inliers])
        _, near = cKDTree(cloud[:, :2]).query(place, k=min(NEAREST, len(cloud)))
        heights.append(np.median(cloud[near.reshape(len(place), -1), 2], axis=1))
    return float(np.median(heights[1] - heights[0]))


def _overlap(views, T: np.ndarray) -> float:
    rows, columns = np.nonzero(views[0].count)
    moved = views[0].to_metric(np.stack([columns, rows], 1)) @ T[:2, :2].T + T[:2, 3]
    x, y = np.rint(views[1].to_pixel(moved)).astype(int).T
    near: Any = ndimage.binary_dilation(views[1].count > 0, np.ones((3, 3)))
    inside = (x >= 0) & (y >= 0) & (x < near.shape[1]) & (y < near.shape[0])
    return float(near[y[inside], x[inside]].sum() / max(len(x), 1))


def _refine(points: Sequence[np.ndarray], T: np.ndarray, cell: float) -> tuple[np.ndarray, dict[str, Any]]:
    """Refine a motion by generalized ICP with the library small_gicp."""
    small_gicp = load_extra("small_gicp", "clouds")
    middle = points[1].mean(0)  # its voxel grid wants coordinates near zero
    shift = np.eye(4)
    shift[:3, 3] = -middle
    source = points[0] @ T[:3, :3].T + T[:3, 3] - middle
    reach = ICP_REACH * cell
    result: Any = small_gicp.align(
        points[1] - middle, source, np.eye(4), downsampling_resolution=cell, max_correspondence_distance=reach
    )
    step = np.asarray(result.T_target_source)
    angle = np.degrees(np.arccos(np.clip((np.trace(step[:3, :3]) - 1) / 2, -1, 1)))
    change = {
        "rotation_deg": float(angle),
        "translation": float(np.linalg.norm(step[:3, 3])),
        "num_inliers": int(result.num_inliers),
        "converged": bool(result.converged),
    }
    return geometry.invert_pose(shift) @ step @ shift @ T, change


def draw_registration(found: Registration, up: Sequence[float] = (0, 0, 1), height: int = 540) -> np.ndarray:
    """Return a picture, uint8 RGB: the inliers between the views and, right, cloud 0 (red) laid onto 1 (cyan)."""
    view0, view1 = found.views
    left = draw_matches(view0.image, view1.image, found.kpts0[found.inliers], found.kpts1[found.inliers], height=height)
    if found.T_0to1 is None:
        return left
    R_up = rotation_to_z(up)
    T = np.eye(4)
    T[:3, :3] = R_up
    T = T @ found.T_0to1 @ T.T
    rows, columns = np.nonzero(view0.count)
    moved = view0.to_metric(np.stack([columns, rows], 1)) @ T[:2, :2].T + T[:2, 3]
    rows1, columns1 = np.nonzero(view1.count)
    fixed = view1.to_metric(np.stack([columns1, rows1], 1))
    low = np.minimum(moved.min(0), fixed.min(0))
    high = np.maximum(moved.max(0), fixed.max(0))
    scale = height / (high - low).max()
    canvas = np.zeros((height + 8, height + 8, 3), np.float64)
    for points, view, index, channels in (
        (moved, view0, (rows, columns), [0]),
        (fixed, view1, (rows1, columns1), [1, 2]),
    ):
        x, y = np.rint(((points - low) * [1, 1]) * scale).astype(int).T + 4
        weight = np.log1p(view.count[index])
        for channel in channels:
            np.maximum.at(canvas[..., channel], (height + 7 - y, x), weight / weight.max())
    overlay = np.rint(255 * np.clip(canvas * 2, 0, 1)).astype(np.uint8)
    overlay = resize(overlay, (height, height))
    return np.concatenate([left, np.full((height, 8, 3), 255, np.uint8), overlay], 1)
