"""Draw a town as a pinhole camera sees it: exact visibility per pixel, textures filtered in two directions.

A quad with origin o and edges e, f (camera axes) is seen at pixel p where `M p = (s w, t w, w)`,
M = inv([e f o]) inv(K): s and t are the place on the quad in 0..1, w is the inverse depth. All three are affine in the
pixel, which makes coverage and depth exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

NEAR_M = 0.1
FAR_M = 110.0
MAX_PPM = 96.0  # texels per metre of the nearest surfaces
MIN_PPM = 6.0
NOBODY = -1
BLOCK_PX = 16


def camera_quads(quads: np.ndarray, T_world_to_camera: np.ndarray) -> np.ndarray:
    """Move quads (rows: origin, right, down) into camera axes: [Q, 3, 3], columns right, down, origin."""
    R, t = T_world_to_camera[:3, :3], T_world_to_camera[:3, 3]
    moved = quads @ R.T
    moved[:, 0] += t
    return moved[:, [1, 2, 0]].transpose(0, 2, 1)


def candidates(A: np.ndarray, K: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the quads that face the camera and may be in view.

    Args:
      A: camera quads [Q, 3, 3]. K: [3, 3]. size: (width, height).

    Returns:
      indices [C], near ones first; their boxes [C, 4] int: x0, y0, x1, y1 (exclusive); and an upper bound [C]
      of their
      inverse depths.
    """
    e, f, o = A[:, :, 0], A[:, :, 1], A[:, :, 2]
    corners = np.stack([o, o + e, o + e + f, o + f], 1)
    z = corners[:, :, 2]
    facing = np.einsum("qi,qi->q", np.cross(e, f), o) > 1e-6 * np.linalg.norm(np.cross(e, f), axis=1)
    keep = facing & (z.max(1) > NEAR_M) & (z.min(1) < FAR_M)
    pixels = corners @ K.T
    width, height = size
    limits = ((0, -0.5, 1), (0, width - 0.5, -1), (1, -0.5, 1), (1, height - 0.5, -1))
    for axis, bound, sign in limits:
        keep &= ((pixels[:, :, axis] - bound * z) * sign > 0).any(1)
    index = np.flatnonzero(keep)
    index = index[np.argsort(np.maximum(z[index].min(1), NEAR_M), kind="stable")]
    boxes = np.empty((len(index), 4))
    whole = z[index].min(1) > NEAR_M
    flat = pixels[index] / np.where(z[index] > NEAR_M, z[index], 1.0)[..., None]
    boxes[:, :2], boxes[:, 2:] = flat[..., :2].min(1), flat[..., :2].max(1)
    for k in np.flatnonzero(~whole):  # cut by the near plane
        ring, points = pixels[index[k]], []
        for a, b in zip(ring, np.roll(ring, -1, axis=0)):
            if a[2] > NEAR_M:
                points.append(a[:2] / a[2])
            if (a[2] > NEAR_M) != (b[2] > NEAR_M):
                cut = a + (b - a) * (NEAR_M - a[2]) / (b[2] - a[2])
                points.append(cut[:2] / NEAR_M)
        boxes[k] = [*np.min(points, 0), *np.max(points, 0)]
    boxes[:, :2] = np.floor(boxes[:, :2])
    boxes[:, 2:] = np.ceil(boxes[:, 2:]) + 1
    boxes = np.clip(boxes, 0, [width, height, width, height]).astype(int)
    seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    bound = np.where(whole, 1.001 / np.maximum(z[index].min(1), NEAR_M), np.inf)
    return index[seen], boxes[seen], bound[seen]


def pixel_maps(A: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Invert camera quads into `M` of the module docstring: [C, 3, 3]."""
    return np.linalg.inv(K @ A)


def nearer(m: np.ndarray, box, inverse: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Find where a quad lies before what `inverse` (inverse depth, [height, width]) holds, within its box.

    Returns:
      covered bool [y1 - y0, x1 - x0], None if the quad is hidden everywhere; inverse depth of its plane, float32.
    """
    x0, y0, x1, y1 = box
    x, y = np.arange(x0, x1, dtype=np.float32), np.arange(y0, y1, dtype=np.float32)[:, None]
    m = m.astype(np.float32)
    w = m[2, 0] * x + (m[2, 1] * y + m[2, 2])
    covered = w > inverse[y0:y1, x0:x1]
    if not covered.any():
        return None, w
    for row in m[:2]:
        s = row[0] * x + (row[1] * y + row[2])
        covered &= s >= 0
        covered &= s <= w
    return covered, w


def cover(
    M: np.ndarray, boxes: np.ndarray, nearest: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Decide which quad is nearest at every pixel centre.

    Args:
      M: pixel maps [C, 3, 3]; boxes, nearest: of `candidates`.

    Returns:
      owner int16 [height, width], index into M or NOBODY; inverse depth float32 [height, width], 0 where
      nobody.
    """
    width, height = size
    owner = np.full((height, width), NOBODY, np.int16)
    inverse = np.zeros((height, width), np.float32)
    farthest = np.zeros((1, 1), np.float32)
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if k in (100, 200, 400):  # by now most of the picture is filled, and most of what follows lies behind it
            rows, columns = np.arange(0, height, BLOCK_PX), np.arange(0, width, BLOCK_PX)
            farthest = np.minimum.reduceat(np.minimum.reduceat(inverse, rows, 0), columns, 1)
        if k >= 100:
            blocks = farthest[y0 // BLOCK_PX : -(-y1 // BLOCK_PX), x0 // BLOCK_PX : -(-x1 // BLOCK_PX)]
            if nearest[k] < blocks.min():
                continue
        covered, w = nearer(M[k], (x0, y0, x1, y1), inverse)
        if covered is not None:
            np.copyto(inverse[y0:y1, x0:x1], w, where=covered)
            np.copyto(owner[y0:y1, x0:x1], np.int16(k), where=covered)
    return owner, inverse


@dataclass
class Ripmap:
    """A texture and its copies shrunk by powers of two along x and y independently, in one picture."""

    image: np.ndarray
    widths: np.ndarray  # of the levels along x
    lefts: np.ndarray
    heights: np.ndarray
    tops: np.ndarray


def build_ripmap(texture: np.ndarray) -> Ripmap:
    """Shrink a texture [h, w, 3 or 4] uint8 along both axes independently; without alpha it is opaque."""
    if texture.shape[2] == 3:
        texture = cv2.cvtColor(texture, cv2.COLOR_RGB2RGBA)

    def halvings(n: int) -> np.ndarray:
        return np.array([max(math.ceil(n / 2**k), 1) for k in range(min(8, max(1, n.bit_length())))])

    widths, heights = halvings(texture.shape[1]), halvings(texture.shape[0])
    columns = [texture]
    for w in widths[1:]:
        columns.append(cv2.resize(columns[-1], (int(w), texture.shape[0]), interpolation=cv2.INTER_AREA))
    rows = [np.concatenate(columns, 1)]
    for h in heights[1:]:
        rows.append(cv2.resize(rows[-1], (rows[0].shape[1], int(h)), interpolation=cv2.INTER_AREA))
    lefts, tops = np.cumsum(widths) - widths, np.cumsum(heights) - heights
    return Ripmap(np.concatenate(rows, 0), *(v.astype(np.float32) for v in (widths, lefts, heights, tops)))


def sample(ripmap: Ripmap, m: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Look a quad's texture up at pixels (x, y) float32 [N]; `m` is its pixel map. Returns RGBA uint8 [N, 4]."""
    m = m.astype(np.float32)
    inv = 1.0 / (m[2, 0] * x + m[2, 1] * y + m[2, 2])
    place = []
    for row, sizes, starts in ((m[0], ripmap.widths, ripmap.lefts), (m[1], ripmap.heights, ripmap.tops)):
        s = (row[0] * x + row[1] * y + row[2]) * inv
        reach = np.maximum(np.abs(row[0] - s * m[2, 0]), np.abs(row[1] - s * m[2, 1])) * inv  # of a pixel, in 0..1
        # floor(log2) by the exponent; 1.3: rounding up a little, rather soft than aliased.
        level = np.clip(np.frexp(reach * (1.3 * sizes[0]))[1] - 1, 0, len(sizes) - 1)
        n = sizes[level]
        place.append(np.clip(s * n - 0.5, 0, n - 1) + starts[level])
    return look_up(ripmap.image, *place)


def look_up(image: np.ndarray, u: np.ndarray, v: np.ndarray, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """Read `image` at columns u and rows v float32 [N], bilinearly. Returns [N, channels]."""
    rows = -(-len(u) // 16384)  # cv2.remap takes maps of at most 32766 columns
    short = -len(u) % rows
    if short:
        u, v = np.append(u, u[:short]), np.append(v, v[:short])
    found = cv2.remap(image, u.reshape(rows, -1), v.reshape(rows, -1), cv2.INTER_LINEAR, borderMode=border)
    return found.reshape(len(u), -1)[: len(u) - short]
