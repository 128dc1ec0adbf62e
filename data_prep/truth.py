"""Ground truth of rendered videos: where a static surface point seen in one frame lies in another, exactly.

For every pixel the surface it shows is stored, not its depth: the surfaces are plane quads, so the depth at any
sub-pixel point follows from the plane, and a point is hidden in another frame where another surface is stored.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from data_prep import raster

SCHEMA_VERSION = 1
NOTHING = 0  # surface id of sky, walkers and overlays; static surface k has id k + 1


class Truth:
    """Ground truth of a rendered video.

    Attributes:
      K float64 [N, 3, 3]; T_world_to_camera float64 [N, 4, 4] (OpenCV axes); shot int [N]; size (width, height); fps;
      config dict; ids(frame): surface of every pixel, integers [height, width], 0 = sky, walker or overlay.
    """

    def __init__(self, K, T_world_to_camera, shot, size, fps, config, quads, ids: Callable[[int], np.ndarray]):
        """`quads` float64 [Q, 3, 3]: origin, right edge, down edge of the surfaces with ids 1, 2, ..."""
        self.K, self.T_world_to_camera, self.shot = K, T_world_to_camera, shot
        self.size, self.fps, self.config = size, fps, config
        self._quads = quads
        self.ids = lru_cache(maxsize=256)(ids)

    @classmethod
    def load(cls, folder: str | Path) -> Truth:
        """Read the folder that `data_prep.world.render` wrote; ValueError if it is missing or damaged."""
        path = Path(folder) / "truth.npz"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected a folder written by `gim-jax render`")
        try:
            with np.load(path, allow_pickle=False) as data:
                values = {name: data[name] for name in data.files}
        except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        found = int(values.get("schema_version", -1))
        if found != SCHEMA_VERSION:
            raise ValueError(f"{path}: schema_version is {found}, expected {SCHEMA_VERSION}")
        pictures, offsets = values["ids_png"], values["ids_offsets"]

        def ids(frame: int) -> np.ndarray:
            picture = cv2.imdecode(pictures[offsets[frame] : offsets[frame + 1]], cv2.IMREAD_UNCHANGED)
            if picture is None:
                raise ValueError(f"{path}: ids_png: frame {frame} is not a PNG picture; the file is damaged")
            return picture

        return cls(
            values["K"],
            values["T_world_to_camera"],
            values["shot"],
            (int(values["size"][0]), int(values["size"][1])),
            float(values["fps"]),
            json.loads(str(values["config"])),
            values["quads"],
            ids,
        )

    def __len__(self) -> int:
        return len(self.K)

    def T_0to1(self, frame0: int, frame1: int) -> np.ndarray:
        """Return the motion between two frames of one shot, X1 = T X0: float64 [4, 4]."""
        return self.T_world_to_camera[frame1] @ np.linalg.inv(self.T_world_to_camera[frame0])

    def surface(self, frame: int, kpts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the static surface at sub-pixel points, and its depth.

        Args:
          frame: frame number. kpts: [N, 2] px.

        Returns:
          ids int64 [N], 0 outside of the image and where one of the nine pixels around shows sky, a walker or an
          overlay; depth float64 [N] metres along the optical axis, 0 where there is none.
        """
        kpts = np.asarray(kpts, np.float64).reshape(-1, 2)
        near = self._around(frame, kpts)
        good = (near != NOTHING).all(1) & self._inside(kpts)
        ids, depth = np.where(good, near[:, 4], NOTHING), np.zeros(len(kpts))
        mixed = good & (near != near[:, 4:5]).any(1)
        if mixed.any():
            ids[mixed] = self._nearest(frame, kpts[mixed], near[mixed])
        known, where = np.unique(ids[good], return_inverse=True)
        w = (self._pixel_maps(frame, known)[where, 2] * homogeneous(kpts[good])).sum(1)
        depth[good] = 1 / w
        return ids, depth

    def _nearest(self, frame: int, kpts: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Choose among the surfaces around each point, `near` [N, 9], the nearest that covers it."""
        known, where = np.unique(near, return_inverse=True)
        M = self._pixel_maps(frame, known)[where.reshape(near.shape)]
        s, t, w = np.moveaxis(M @ homogeneous(kpts)[:, None, :, None], 2, 0)[..., 0]
        covers = (w > 0) & (s >= 0) & (s <= w) & (t >= 0) & (t <= w)
        covers[:, 4] |= ~covers.any(1)  # a gap of less than rounding error between two surfaces: the pixel's own
        return near[np.arange(len(near)), np.where(covers, w, -np.inf).argmax(1)]

    def depth(self, frame: int) -> np.ndarray:
        """Return the depth of every pixel centre: float64 [height, width] metres, 0 = sky, walker, overlay."""
        ids = self.ids(frame)
        known, where = np.unique(ids, return_inverse=True)
        rows = np.zeros((len(known), 3))
        rows[known != NOTHING] = self._pixel_maps(frame, known[known != NOTHING])[:, 2]
        rows = rows[where.reshape(ids.shape)]
        w = rows[..., 0] * np.arange(self.size[0]) + rows[..., 1] * np.arange(self.size[1])[:, None] + rows[..., 2]
        return np.where(ids != NOTHING, 1 / np.where(w > 0, w, 1.0), 0.0)

    def correspond(self, frame0: int, kpts0: np.ndarray, frame1: int) -> tuple[np.ndarray, np.ndarray]:
        """Say where the static surface points seen at `kpts0` lie in another frame, hidden there or not.

        Args:
          frame0, frame1: frame numbers. kpts0: [N, 2] px.

        Returns:
          kpts1 float64 [N, 2] px; valid bool [N]: frame 0 shows a static surface there with no walker, sky or overlay
          within a pixel, and the point lies inside frame 1. Nothing is valid across a cut.
        """
        return self.correspond_visible(frame0, kpts0, frame1)[:2]

    def correspond_visible(self, frame0: int, kpts0: np.ndarray, frame1: int):
        """As `correspond`, and visible bool [N]: valid, and frame 1 shows the surface within a pixel of the point."""
        kpts0 = np.asarray(kpts0, np.float64).reshape(-1, 2)
        if self.shot[frame0] != self.shot[frame1]:
            nothing = np.zeros(len(kpts0), bool)
            return np.zeros_like(kpts0), nothing, nothing
        ids, depth = self.surface(frame0, kpts0)
        rays = homogeneous(kpts0) @ np.linalg.inv(self.K[frame0]).T
        T = self.T_0to1(frame0, frame1)
        pixels = (rays * depth[:, None] @ T[:3, :3].T + T[:3, 3]) @ self.K[frame1].T
        before = pixels[:, 2] > 1e-6
        kpts1 = pixels[:, :2] / np.where(before, pixels[:, 2], 1.0)[:, None]
        valid = (ids != NOTHING) & before & self._inside(kpts1)
        kpts1 = np.where(valid[:, None], kpts1, 0.0)
        visible = valid & (self._around(frame1, kpts1) == ids[:, None]).any(1)
        return kpts1, valid, visible

    def overlap(self, frame0: int, frame1: int, step_px: int = 8) -> float:
        """Return the share of the static surfaces of frame 0 (a grid of points) that frame 1 sees: 0..1."""
        x, y = np.meshgrid(np.arange(0, self.size[0], step_px), np.arange(0, self.size[1], step_px))
        kpts0 = np.stack([x.ravel(), y.ravel()], 1)
        static = self.surface(frame0, kpts0)[0] != NOTHING
        return float(self.correspond_visible(frame0, kpts0, frame1)[2].sum() / max(static.sum(), 1))

    def _inside(self, kpts: np.ndarray) -> np.ndarray:
        return np.all((kpts > -0.5) & (kpts < np.array(self.size) - 0.5), axis=1)

    def _around(self, frame: int, kpts: np.ndarray) -> np.ndarray:
        """Return the ids of the 3x3 pixels around points: int64 [N, 9], the fifth the pixel itself."""
        width, height = self.size
        ids = self.ids(frame)
        centre = np.clip(np.rint(kpts), 0, (width - 1, height - 1)).astype(np.int64)
        x = np.clip(centre[:, :1] + np.tile([-1, 0, 1], 3), 0, width - 1)
        y = np.clip(centre[:, 1:] + np.repeat([-1, 0, 1], 3), 0, height - 1)
        return ids.ravel()[y * width + x].astype(np.int64)

    def _pixel_maps(self, frame: int, ids: np.ndarray) -> np.ndarray:
        quads = self._quads[ids.astype(np.int64) - 1]
        return raster.pixel_maps(raster.camera_quads(quads, self.T_world_to_camera[frame]), self.K[frame])


def homogeneous(kpts: np.ndarray) -> np.ndarray:
    return np.append(kpts, np.ones((len(kpts), 1)), 1)


def correspondence_error(truth: Truth, frame0: int, frame1: int, kpts0: np.ndarray, kpts1: np.ndarray):
    """Measure labels against the truth.

    Args:
      kpts0, kpts1: [N, 2] px, claimed to show the same point in frame0 and frame1.

    Returns:
      err_px float64 [N]: distance from kpts1 to the true place, inf where not valid;
      valid bool [N]: the truth is known, see `Truth.correspond`.
    """
    true1, valid = truth.correspond(frame0, kpts0, frame1)
    error = np.linalg.norm(np.asarray(kpts1, np.float64).reshape(-1, 2) - true1, axis=1)
    return np.where(valid, error, np.inf), valid
