"""From a labelled pair to a training sample: fit, rescale, crop, darken, warp; the points move with the pixels.

The recipe is GIM's for video pairs (paper section 4; gim training branches, datasets/utils.py, augment.py, walk.py):
each image is fitted to a box, now and then rescaled and darkened, and image 1 is warped by a random perspective and
rotation. Deviations, all on purpose:

* Pixel centres throughout: a resize by s maps x to (x + 0.5) s - 0.5, as `cv2.resize` moves the pixels.
* Zooming into image 1 works. The released code caps it by label coordinates of the wrong frame, so it never happens.
* A crop is drawn around a random correspondence, the same in both images, instead of towards the top-left corner.
* Of too many correspondences a random subset stays, not the left-most ones.
* The geometry is drawn until enough correspondences survive before any pixel is touched, so redrawing costs nothing.
* Darkening is applied after resizing, at the scale the network sees.

Pairs with pose and depth go the same way: correspondences drawn through their depth steer the crops, and depth and
intrinsics follow the pixels into the crop, so that supervision needs to know of no scale and no offset.

Everything is a function of a `numpy.random.Generator`; OpenCV and NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from gim_jax.data.depth import decode_depth, depth_matches
from gim_jax.data.records import MAX_IMAGE_PIXELS, PairRecord
from gim_jax.geometry import CELL

NUM_DRAWN = 4  # points tried through the depth per correspondence wanted: some are hidden, some leave the crops


@dataclass(frozen=True)
class Augment:
    """Ranges and probabilities; the defaults are GIM's for video pairs.

    Attributes:
      enabled: False fits the whole image into the box and does nothing else (validation).
      rescale_prob: probability of rescaling an image by a factor of `rescale0` (image 0) or `rescale1` (image 1),
        1.0 being the size that fits the box.
      dark_prob: probability of the photometric 'dark' augmentation, per image.
      perspective_prob: probability of warping image 1.
      corner_jitter: each corner moves by up to this share of the width and height.
      rotation_deg: the warp also rotates by up to this angle, either way.
      max_tries: draws of the geometry before a pair is given up.
      rescale_posed: range of `rescale0` and `rescale1` for pairs with depth (GIM).
      zoom_in: False draws the factor of image 1 of a video pair as the released code does, up to box / largest label
        coordinate, which it takes in pixels of the video: a frame larger than the box is never enlarged.
      subset: of too many correspondences keep a "random" subset or the "leftmost" ones (released, sparse matchers).
    """

    enabled: bool = True
    rescale_prob: float = 0.5
    rescale0: tuple[float, float] = (0.6, 1.0)
    rescale1: tuple[float, float] = (1.0, 1.4)
    dark_prob: float = 0.5
    perspective_prob: float = 0.9
    corner_jitter: float = 0.25
    rotation_deg: float = 180.0
    max_tries: int = 30
    rescale_posed: tuple[float, float] = (0.6, 1.4)
    zoom_in: bool = True
    subset: str = "random"

    def __post_init__(self):
        if self.subset not in ("random", "leftmost"):
            raise ValueError(f"subset: found {self.subset!r}, expected 'random' or 'leftmost'")


@dataclass(frozen=True)
class Geometry:
    """How one image gets into the network frame: resize, then crop (or pad at the bottom and right), then warp.

    Attributes:
      resized: (width, height) px after resizing, multiples of 8.
      start: (x, y) of the crop in the resized image.
      valid: (width, height) px of the part of the box that the crop fills.
      warp: [3, 3] float64 from the box to the network frame, or None.
    """

    resized: tuple[int, int]
    start: tuple[int, int]
    valid: tuple[int, int]
    warp: np.ndarray | None = None

    def apply(self, kpts: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Map points [M, 2] px of an image of `size` to ([M, 2] px of the network frame, [M] bool inside the crop)."""
        scale = np.divide(self.resized, size)
        kpts = (kpts + 0.5) * scale - 0.5 - self.start
        inside = np.all((kpts >= 0) & (kpts <= np.subtract(self.valid, 1)), axis=1)
        return (kpts if self.warp is None else project(self.warp, kpts)), inside

    def camera(self, K: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Turn intrinsics [3, 3] of an image of `size` into those of the crop, before the warp."""
        (sx, sy), (x, y) = np.divide(self.resized, size), self.start
        return np.array([(sx, 0, (sx - 1) / 2 - x), (0, sy, (sy - 1) / 2 - y), (0, 0, 1)]) @ K

    def crop_depth(self, depth: np.ndarray, box: tuple[int, int]) -> np.ndarray:
        """Bring depth [h, w] into the crop, before the warp: the nearest pixel's; 0 where the box is empty."""
        columns, rows = (
            ((np.arange(count) + start + 0.5) * n / extent).astype(int).clip(0, n - 1)
            for count, start, n, extent in zip(self.valid, self.start, depth.shape[::-1], self.resized)
        )
        out = np.zeros((box[1], box[0]), np.float32)
        out[: len(rows), : len(columns)] = depth[np.ix_(rows, columns)]
        return out

    def coarse_mask(self, box: tuple[int, int]) -> np.ndarray:
        """Mark the coarse cells [H/8, W/8] of the network frame whose centre shows a pixel of the image."""
        x, y = (np.arange(n // CELL) * CELL + (CELL - 1) / 2 for n in box)
        centres = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        if self.warp is not None:
            centres = project(np.linalg.inv(self.warp), centres)
        inside = np.all((centres >= -0.5) & (centres <= np.subtract(self.valid, 0.5)), axis=1)
        return inside.reshape(box[1] // CELL, box[0] // CELL)

    def render(self, image: np.ndarray, box: tuple[int, int], dark: np.random.Generator | None = None) -> np.ndarray:
        """Bring an image uint8 [h, w, C] into the network frame [H, W, C]; `dark` darkens it on the way."""
        shrinks = self.resized[0] < image.shape[1]
        image = cv2.resize(image, self.resized, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        (x, y), (width, height) = self.start, self.valid
        image = image[y : y + height, x : x + width]
        if dark is not None:
            image = darken(image, dark)
        image = cv2.copyMakeBorder(image, 0, box[1] - height, 0, box[0] - width, cv2.BORDER_CONSTANT, value=0)
        if self.warp is not None:
            image = cv2.warpPerspective(image, self.warp, box, flags=cv2.INTER_LINEAR)
        return image.reshape(box[1], box[0], -1)


def project(matrix: np.ndarray, kpts: np.ndarray) -> np.ndarray:
    """Map points [M, 2] by a homography [3, 3]; points on or behind its horizon become infinite."""
    x = kpts @ matrix[:, :2].T + matrix[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x[:, 2:] > 0, x[:, :2] / x[:, 2:], np.inf)


def draw_perspective(rng: np.random.Generator, box: tuple[int, int], jitter: float, rotation_deg: float) -> np.ndarray:
    """Draw a homography [3, 3] of the box: corners moved by up to `jitter` of its size, then a rotation."""
    width, height = box
    corners = np.array([(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)], np.float32)
    moved = corners + rng.uniform(-jitter, jitter, (4, 2)) * box
    perspective = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    centre = ((width - 1) / 2, (height - 1) / 2)
    rotation = cv2.getRotationMatrix2D(centre, rng.uniform(-rotation_deg, rotation_deg), 1.0)
    return np.vstack([rotation, (0, 0, 1)]) @ perspective


def draw_geometry(
    rng: np.random.Generator,
    size: tuple[int, int],
    box: tuple[int, int],
    anchor: np.ndarray,
    rescale: tuple[float, float],
    settings: Augment,
    warped: bool,
    limit: float = np.inf,
) -> Geometry:
    """Draw how an image of `size` gets into a box so that the point `anchor` (px of the image) stays in the crop;
    `limit`: of the range that the rescaling factor is drawn from."""
    ratios = np.divide(box, size)
    scale = 1.0
    if ratios.min() < 1:  # larger than the box
        scale = float(rng.choice(ratios) if settings.enabled else ratios.min())
    if settings.enabled and rng.random() < settings.rescale_prob:
        low, high = np.multiply(rescale, max(float(ratios.min()), 1.0))
        scale *= low + (min(high, limit) - low) * rng.random()
    if size[0] * size[1] * scale**2 > MAX_IMAGE_PIXELS:  # the short side of a strip fitted to the box
        scale = float(ratios.min())
    resized = tuple(int(max(n * scale // CELL, 1)) * CELL for n in size)
    start = []
    for point, n, extent, limit in zip(anchor, size, resized, box):
        point = int((point + 0.5) * extent / n)
        low, high = max(0, point - limit + 1), max(0, min(point, extent - limit))
        start.append(int(rng.integers(min(low, high), high + 1)))
    valid = tuple(min(extent, limit) for extent, limit in zip(resized, box))
    warp = None
    if warped and settings.enabled and rng.random() < settings.perspective_prob:
        warp = draw_perspective(rng, box, settings.corner_jitter, settings.rotation_deg)
    return Geometry((resized[0], resized[1]), (start[0], start[1]), (valid[0], valid[1]), warp)


def darken(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, sharpness and tone of an image uint8 [h, w, 3] or [h, w]; nothing moves.

    The operations, probabilities and ranges are those of gim's DarkAug (datasets/augment.py). A gray image gets the
    HSV value shift as a shift of its gray values.
    """
    if rng.random() >= 0.75:
        return image
    if rng.random() < 0.75:
        contrast, brightness = 1 + rng.uniform(-0.5, 0.3), rng.uniform(-0.6, 0.0)
        image = cv2.LUT(image, _table(np.arange(256) * contrast + 255 * brightness))
    if rng.random() < 0.1:
        kernel = int(rng.choice((3, 5, 7, 9)))
        image = cv2.blur(image, (kernel, kernel))
    if rng.random() < 0.2:
        image = cv2.filter2D(image, -1, _motion_kernel(int(rng.integers(1, 13)), rng.uniform(0, np.pi)))
    if rng.random() < 0.1:
        image = cv2.LUT(image, _table(255 * (np.arange(256) / 255) ** (rng.uniform(15, 65) / 100)))
    if rng.random() < 0.1:
        table = _table(np.arange(256) - rng.uniform(40, 100))
        if image.ndim == 2:
            image = cv2.LUT(image, table)
        else:
            h, s, v = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
            image = cv2.cvtColor(cv2.merge([h, s, cv2.LUT(v, table)]), cv2.COLOR_HSV2RGB)
    return image


def _table(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _motion_kernel(radius: int, angle: float) -> np.ndarray:
    """Draw a straight line of 2 radius + 1 px through the centre; made symmetric so that the image does not shift."""
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1), np.float32)
    x, y = round(radius * np.cos(angle)), round(radius * np.sin(angle))
    cv2.line(kernel, (radius - x, radius - y), (radius + x, radius + y), 1.0)
    kernel += kernel[::-1, ::-1]
    return kernel / kernel.sum()


def decode_jpeg(data: bytes, size: tuple[int, int], channels: int, resized: tuple[int, int]) -> np.ndarray:
    """Decode a JPEG to RGB or gray, at a half, quarter or eighth where `resized` is at most that.

    Raises: ValueError if the bytes cannot be decoded to an image of that size.
    """
    reduce = 1
    while reduce < 8 and all(n % (2 * reduce) == 0 and n // (2 * reduce) >= m for n, m in zip(size, resized)):
        reduce *= 2
    mode = f"{'' if reduce == 1 else 'REDUCED_'}{'COLOR' if channels == 3 else 'GRAYSCALE'}"
    flag = getattr(cv2, f"IMREAD_{mode}" + ("" if reduce == 1 else f"_{reduce}")) | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    if image is None or image.shape[1::-1] != (size[0] // reduce, size[1] // reduce):
        found = "nothing" if image is None else f"{image.shape[1]}x{image.shape[0]} px"
        raise ValueError(f"image: decoded {found}, expected {size[0] // reduce}x{size[1] // reduce} px")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if channels == 3 else image


class TooFewMatchesError(ValueError):
    """No draw of the geometry left enough correspondences."""


def make_sample(
    record: PairRecord,
    rng: np.random.Generator,
    size: tuple[int, int],
    channels: int,
    max_matches: int,
    min_matches: int,
    settings: Augment,
    depth: bool = False,
) -> dict[str, np.ndarray]:
    """Turn a record into one element of a training batch.

    Args:
      record: the pair.
      rng: all randomness; the same generator state gives the same sample.
      size: (width, height) of the network frame, multiples of 8.
      channels: 1 (gray) or 3 (RGB).
      max_matches: M, static; of more correspondences a random subset stays.
      min_matches: correspondences that must survive.
      depth: also give what supervision by depth needs, all of it 0 or the identity for a pair without.

    Returns: dict of image0, image1 uint8 [H, W, C]; mask0, mask1 bool [H/8, W/8], True = the cell shows the image;
      kpts0, kpts1 float32 [M, 2] px of the network frame; match_mask bool [M]; conf float32 [M]. Padding is 0.
      With `depth` also posed, depth_complete bool []; depth0, depth1 float32 [H, W], K0, K1 [3, 3] of the crops,
      T_0to1 [4, 4], imsize1 int32 [2] = (height, width) of the valid part of crop 1, and Hq_aug [3, 3] from crop 1 to
      network frame 1.

    Raises: TooFewMatchesError after `settings.max_tries` draws; ValueError if an image cannot be decoded.
    """
    points, maps = record.correspondences.astype(np.float64), ()
    if record.posed:
        (near0, far0), (near1, far1) = record.depth_ranges
        maps = decode_depth(record.depth0, near0, far0), decode_depth(record.depth1, near1, far1)
        points = depth_matches(rng, maps, (record.K0, record.K1), record.T_0to1, NUM_DRAWN * max_matches)
    if len(points) < max(min_matches, 1):
        raise TooFewMatchesError(f"found {len(points)} correspondences, expected at least {max(min_matches, 1)}")
    sizes = (record.size0, record.size1)
    rescales = (settings.rescale_posed,) * 2 if record.posed else (settings.rescale0, settings.rescale1)
    reach = np.divide(size, points[:, 2:].max(0).clip(1))
    limits = (np.inf, np.inf if settings.zoom_in or record.posed else float(reach.min()))
    most = 0
    for _ in range(settings.max_tries if settings.enabled else 1):
        anchor = points[rng.integers(len(points))]
        geometry = [
            draw_geometry(rng, sizes[i], size, anchor[2 * i : 2 * i + 2], rescales[i], settings, i == 1, limits[i])
            for i in (0, 1)
        ]
        masks = [g.coarse_mask(size) for g in geometry]
        keep = np.ones(len(points), bool)
        kpts = []
        for i in (0, 1):
            moved, inside = geometry[i].apply(points[:, 2 * i : 2 * i + 2], sizes[i])
            kpts.append(moved)
            keep &= inside & ((moved >= 0) & (moved <= np.subtract(size, 1))).all(axis=1)
            cell = np.floor((np.where(keep[:, None], moved, 0) + 0.5) / CELL).astype(int)
            keep &= masks[i][cell[:, 1], cell[:, 0]]
        chosen = np.flatnonzero(keep)
        rows = np.concatenate(kpts, axis=1)[chosen].astype(np.float32)
        _, first = np.unique(rows.view(np.dtype((np.void, 16))).ravel(), return_index=True)
        chosen = chosen[np.sort(first)]
        most = max(most, len(chosen))
        if len(chosen) >= max(min_matches, 1):
            break
    else:
        raise TooFewMatchesError(f"at most {most} correspondences survived, expected at least {max(min_matches, 1)}")
    if len(chosen) > max_matches:
        if settings.subset == "leftmost":
            chosen = chosen[np.lexsort(np.concatenate(kpts, 1)[chosen].T[::-1])][:max_matches]
        else:
            chosen = np.sort(rng.choice(chosen, max_matches, replace=False))
    count = len(chosen)
    sample: dict[str, np.ndarray] = {
        "match_mask": np.arange(max_matches) < count,
        "conf": np.zeros(max_matches, np.float32),
    }
    sample["conf"][:count] = 1 if record.posed else record.confidence[chosen]
    for i in (0, 1):
        image = decode_jpeg((record.image0, record.image1)[i], sizes[i], channels, geometry[i].resized)
        dark = rng if settings.enabled and rng.random() < settings.dark_prob else None
        sample[f"image{i}"] = geometry[i].render(image, size, dark)
        sample[f"mask{i}"] = masks[i]
        sample[f"kpts{i}"] = np.zeros((max_matches, 2), np.float32)
        sample[f"kpts{i}"][:count] = kpts[i][chosen]
        if depth:
            K = geometry[i].camera((record.K0, record.K1)[i], sizes[i]) if record.posed else np.eye(3)
            sample[f"K{i}"] = K.astype(np.float32)
            empty = np.zeros((size[1], size[0]), np.float32)
            sample[f"depth{i}"] = geometry[i].crop_depth(maps[i], size) if record.posed else empty
    if depth:
        warp = geometry[1].warp
        sample["Hq_aug"] = np.eye(3, dtype=np.float32) if warp is None else (warp / warp[2, 2]).astype(np.float32)
        sample["T_0to1"] = (record.T_0to1 if record.posed else np.eye(4)).astype(np.float32)
        sample["imsize1"] = np.array(geometry[1].valid[::-1], np.int32)
        sample["posed"], sample["depth_complete"] = np.array(record.posed), np.array(bool(record.depth_complete))
    return sample
