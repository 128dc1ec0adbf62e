"""Film a walk through a procedural town: frames, and for every pixel the surface it shows."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from data_prep import textures, town
from data_prep.raster import (
    FAR_M,
    MAX_PPM,
    MIN_PPM,
    Ripmap,
    build_ripmap,
    camera_quads,
    candidates,
    cover,
    look_up,
    nearer,
    pixel_maps,
    sample,
)

PERSON_M = (0.62, 1.76)  # width and height of a walker
HAZE_M = 220.0  # depth at which haze hides 63 % of a surface


@dataclass
class Shot:
    """One take: a town, a camera path, walkers and light.

    K float64 [3, 3]; T_world_to_camera [N, 4, 4]; feet [N, P, 3] where walkers stand; gain [N, 3] factor of
    each colour.
    """

    town: town.Town
    size: tuple[int, int]
    K: np.ndarray
    T_world_to_camera: np.ndarray
    feet: np.ndarray
    gain: np.ndarray
    noise: float = 1.5
    ripmaps: dict[int, Ripmap] = field(default_factory=dict)
    sky: np.ndarray = field(init=False)
    horizon: np.ndarray = field(init=False)
    vignette: np.ndarray = field(init=False)
    grain: np.ndarray = field(init=False)
    ppm: np.ndarray = field(init=False)

    def __post_init__(self):
        width, height = self.size
        rng = np.random.default_rng([*self.town.seed, 3])
        self.sky = paint_sky(rng, self.town.look)
        self.horizon = np.empty((height, width, 3), np.uint8)
        self.horizon[:] = self.town.look.sky[1]
        dx = (np.arange(width) - (width - 1) / 2) / width
        dy = (np.arange(height) - (height - 1) / 2) / width
        fall = 1 - rng.uniform(0.1, 0.5) * (dx[None] ** 2 + dy[:, None] ** 2)
        self.vignette = np.repeat(fall[..., None], 3, 2).astype(np.float32)
        grain = self.noise * rng.standard_normal((height + 64, width + 64, 1))
        self.grain = np.repeat(np.rint(grain), 3, 2).astype(np.int16)
        centres = -np.einsum("nji,nj->ni", self.T_world_to_camera[:, :3, :3], self.T_world_to_camera[:, :3, 3])
        self.ppm = texture_scales(self.town.quads, centres[:: max(1, len(centres) // 60)], self.K[0, 0])

    def ripmap(self, index: int) -> Ripmap:
        """Return the texture of surface `index`, painting it when it is first seen (negative: walker -1 -
        index).
        """
        if index not in self.ripmaps:  # two threads may both paint it: they paint the same
            if index >= 0:
                texture = town.paint(self.town, index, float(self.ppm[index]))
            else:
                rng = np.random.default_rng([*self.town.seed, 4, -index])
                texture = textures.person(rng, *PERSON_M, 80.0, self.town.look)
            self.ripmaps[index] = build_ripmap(texture)
        return self.ripmaps[index]


def texture_scales(quads: np.ndarray, centres: np.ndarray, focal: float) -> np.ndarray:
    """Choose texels per metre [Q], halvings of MAX_PPM, so that a quad's nearest view has about one a pixel."""
    right, down = quads[:, 1], quads[:, 2]
    nearest = np.full(len(quads), np.inf)
    for centre in centres:
        v = centre - quads[:, 0]
        s = np.clip((v * right).sum(1) / (right**2).sum(1), 0, 1)[:, None]
        t = np.clip((v * down).sum(1) / (down**2).sum(1), 0, 1)[:, None]
        nearest = np.minimum(nearest, np.linalg.norm(v - s * right - t * down, axis=1))
    wanted = 0.8 * focal / np.maximum(nearest, 1.0)
    levels = np.clip(np.round(np.log2(MAX_PPM / wanted)), 0, np.log2(MAX_PPM / MIN_PPM))
    return MAX_PPM / 2**levels


def paint_sky(rng, look) -> np.ndarray:
    """Paint a panorama, RGBA uint8: columns azimuth (whole turn), rows elevation from 90 degrees down to 0."""
    clouds = textures.fractal(rng, 256, 512, 1.0, 128.0, 0.55)
    clouds = np.concatenate([clouds, clouds[:, ::-1]], 1)[..., None]  # closes without a seam
    rise = np.linspace(0, 1, 256, dtype=np.float32)[:, None, None] ** 1.5
    image = np.float32(look.sky[0]) * (1 - rise) + np.float32(look.sky[1]) * rise + 14 * np.clip(clouds, -1, 2)
    return cv2.cvtColor(np.clip(image, 0, 255).astype(np.uint8), cv2.COLOR_RGB2RGBA)


def billboards(feet: np.ndarray, T: np.ndarray) -> np.ndarray:
    """Stand a quad facing the camera on every foot point [P, 3]: [P, 3, 3]."""
    centre = -T[:3, :3].T @ T[:3, 3]
    view = feet - centre
    view[:, 2] = 0
    view /= np.linalg.norm(view, axis=1, keepdims=True) + 1e-9
    right = np.stack([view[:, 1], -view[:, 0], np.zeros(len(view))], 1)
    up = np.array([0, 0, PERSON_M[1]])
    origin = feet + up - right * PERSON_M[0] / 2
    return np.stack([origin, right * PERSON_M[0], np.broadcast_to(-up, right.shape)], 1)


def surface_ids(quads: np.ndarray, T_world_to_camera: np.ndarray, K: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Say which static surface every pixel shows, walkers left out: int [height, width], -1 = sky."""
    A = camera_quads(quads, T_world_to_camera)
    index, boxes, nearest = candidates(A, K, size)
    owner, _ = cover(pixel_maps(A[index], K), boxes, nearest, size)
    return np.append(index, -1)[owner]


def draw(shot: Shot, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one frame of a shot.

    Returns:
      image RGB uint8 [height, width, 3];
      surface int32 [height, width]: index of the static quad, -1 where sky or a walker is seen.
    """
    width, height = shot.size
    T, K = shot.T_world_to_camera[frame], shot.K
    A = camera_quads(shot.town.quads, T)
    index, boxes, nearest = candidates(A, K, shot.size)
    M = pixel_maps(A[index], K)
    owner, inverse = cover(M, boxes, nearest, shot.size)
    order = np.argsort(owner.ravel(), kind="stable")  # radix sort of int16: the pixels of one quad lie together
    counts = np.bincount(owner.ravel() + 1, minlength=len(index) + 1)
    x, y = (order % width).astype(np.float32), (order // width).astype(np.float32)
    colours = np.empty((height * width, 4), np.uint8)
    begin = counts[0]
    if begin:
        colours[:begin] = sample_sky(shot, T, x[:begin], y[:begin])
    for k in np.flatnonzero(counts[1:]):
        end = begin + counts[k + 1]
        colours[begin:end] = sample(shot.ripmap(int(index[k])), M[k], x[begin:end], y[begin:end])
        begin = end
    image = np.empty(height * width, np.uint32)
    image[order] = colours.view(np.uint32)[:, 0]
    image = image.view(np.uint8).reshape(height, width, 4)
    surface = np.append(index, -1)[owner]
    draw_walkers(shot, frame, image, surface, inverse)
    return develop(shot, frame, cv2.cvtColor(image, cv2.COLOR_RGBA2RGB), surface, inverse), surface


def sample_sky(shot: Shot, T: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Look the panorama up at the pixels (x, y) float32 [N]: RGBA uint8 [N, 4]."""
    turn = (T[:3, :3].T @ np.linalg.inv(shot.K)).astype(np.float32)
    east, north, up = (row[0] * x + row[1] * y + row[2] for row in turn)
    rows, columns = shot.sky.shape[:2]
    azimuth = np.arctan2(north, east) * np.float32(columns / (2 * np.pi)) + columns / 2 - 0.5
    rise = np.arctan2(up, np.hypot(east, north)) * np.float32(2 / np.pi)
    return look_up(shot.sky, azimuth, (1 - np.clip(rise, 0, 1)) * (rows - 1), cv2.BORDER_WRAP)


def draw_walkers(shot: Shot, frame: int, image: np.ndarray, surface: np.ndarray, inverse: np.ndarray):
    """Draw walkers over image, surface (set to -1) and inverse depth, in place."""
    if not shot.feet.shape[1]:
        return
    T = shot.T_world_to_camera[frame]
    A = camera_quads(billboards(shot.feet[frame], T), T)
    index, boxes, _ = candidates(A, shot.K, shot.size)
    M = pixel_maps(A[index], shot.K)
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        covered, nearness = nearer(M[k], (x0, y0, x1, y1), inverse)
        if covered is None or not covered.any():
            continue
        y, x = np.nonzero(covered)
        ripmap = shot.ripmap(-1 - int(index[k]))
        colour = sample(ripmap, M[k], (x + x0).astype(np.float32), (y + y0).astype(np.float32))
        body = colour[:, 3] > 127
        y, x, colour = y[body], x[body], colour[body]
        image[y0:y1, x0:x1][y, x] = colour
        surface[y0:y1, x0:x1][y, x] = -1
        inverse[y0:y1, x0:x1][y, x] = nearness[y, x]


def develop(shot: Shot, frame: int, image: np.ndarray, surface: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Soften silhouettes, add haze, light, vignetting and sensor noise. Returns RGB uint8."""
    edge = np.zeros(surface.shape, np.uint8)
    across, down = surface[:, 1:] != surface[:, :-1], surface[1:] != surface[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    cv2.copyTo(cv2.GaussianBlur(image, (3, 3), 0.7), edge, image)
    clear = np.exp(np.float32(-1 / HAZE_M) / np.maximum(inverse, np.float32(1 / FAR_M)))
    clear[inverse == 0] = 1.0  # the sky
    image = cv2.blendLinear(image, shot.horizon, clear, 1 - clear)
    image = cv2.transform(image, np.diag(shot.gain[frame]))
    image = cv2.multiply(image, shot.vignette, dtype=cv2.CV_8U)
    rng = np.random.default_rng([*shot.town.seed, 5, frame])
    dy, dx = rng.integers(0, 64, 2)
    height, width = surface.shape
    return cv2.add(image, np.ascontiguousarray(shot.grain[dy : dy + height, dx : dx + width]), dtype=cv2.CV_8U)


def plan_shot(seed: tuple[int, ...], look: str | None, size, fov_deg: float, num_frames: int, fps: float, speed: float,
              num_movers: int) -> Shot:  # fmt: skip
    """Build a town and decide camera path, walkers and light of one take; everything follows from `seed`."""
    place = town.build_town(seed, look)
    rng = np.random.default_rng([*seed, 0])
    poses, route = town.walk(place, rng, num_frames, fps, speed)
    feet = town.walkers(rng, route, num_movers, num_frames, fps, speed)
    tint = 1 + 0.03 * np.stack([town.smooth_noise(rng, num_frames, 6 * fps) for _ in range(3)], 1)
    gain = np.exp2(0.25 * town.smooth_noise(rng, num_frames, 5 * fps))  # a quarter of a stop
    return Shot(place, size, intrinsics(size, fov_deg), poses, feet, gain[:, None] * tint)


def intrinsics(size: tuple[int, int], fov_deg: float) -> np.ndarray:
    """Make K of a camera with the given horizontal field of view; pixel centres are integers."""
    width, height = size
    focal = width / 2 / np.tan(np.deg2rad(fov_deg) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float64)
