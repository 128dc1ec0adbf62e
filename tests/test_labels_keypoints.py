"""Labels of keypoints against plain loops, on scenes with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax import supervision


def loops(kpts0, kpts1, to1, to0, possible, known0, known1, positive_px, negative_px):
    """The rule for one pair of images, in float64 loops: matches0, matches1."""
    m, n = len(kpts0), len(kpts1)
    forward = np.array([[((to1[i] - kpts1[j]) ** 2).sum() for j in range(n)] for i in range(m)])
    backward = np.array([[((kpts0[i] - to0[j]) ** 2).sum() for j in range(n)] for i in range(m)])
    both = np.where(possible, np.maximum(forward, backward), np.inf)
    matches0, matches1 = np.full(m, -2), np.full(n, -2)
    for i in range(m):
        j = both[i].argmin()
        if both[:, j].argmin() == i and both[i, j] < positive_px**2:
            matches0[i], matches1[j] = j, i
    for i in range(m):
        if known0[i] and forward[i].min() > negative_px**2:
            matches0[i] = -1
    for j in range(n):
        if known1[j] and backward[:, j].min() > negative_px**2:
            matches1[j] = -1
    return matches0, matches1


def apply(H, points):
    out = np.c_[points, np.ones(len(points))] @ np.asarray(H, float).T
    return out[:, :2] / out[:, 2:]


def test_homography_labels_equal_loops_and_ignore_padding():
    rng = np.random.default_rng(0)
    H = np.array([[1.02, 0.05, 8], [-0.04, 0.97, -5], [1e-4, -5e-5, 1]])
    kpts0 = rng.uniform(0, 200, (60, 2))
    kpts1 = np.r_[apply(H, kpts0[:40]) + rng.normal(0, 2.0, (40, 2)), rng.uniform(0, 200, (25, 2))]
    want = loops(
        kpts0, kpts1, apply(H, kpts0), apply(np.linalg.inv(H), kpts1), np.ones((60, 65), bool),
        np.ones(60, bool), np.ones(65, bool), 3, 3,
    )  # fmt: skip
    assert (want[0] >= 0).sum() > 10 and (want[0] == -1).sum() > 5 and (want[0] == -2).sum() > 3
    padded0 = np.r_[kpts0, apply(np.linalg.inv(H), kpts1[-10:])].astype(np.float32)  # tempting, but masked
    padded1 = np.r_[kpts1, apply(H, kpts0[-5:])].astype(np.float32)
    found = jax.jit(supervision.label_by_homography)(
        padded0[None], padded1[None], H[None].astype(np.float32),
        (np.arange(70) < 60)[None], (np.arange(70) < 65)[None],
    )  # fmt: skip
    np.testing.assert_array_equal(found[0][0], np.r_[want[0], np.full(10, -2)])
    np.testing.assert_array_equal(found[1][0], np.r_[want[1], np.full(5, -2)])


K = np.array([[90.0, 0, 40], [0, 95.0, 30], [0, 0, 1]])


def scene(seed):
    """Two views of a slanted plane with holes in the depth; keypoints in resized, cropped images, image 1 turned."""
    rng = np.random.default_rng(seed)
    angle = 0.1
    R = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, [0.4, -0.1, 0.2]
    normal, distance = np.array([0.2, -0.1, 1.0]), 4.0  # plane n.X = d in camera 0
    normal1 = R @ normal
    distance1 = distance + normal1 @ T[:3, 3]
    depth = []
    for n, d in ((normal, distance), (normal1, distance1)):
        y, x = np.mgrid[:60, :80] + 0.5  # corner convention: the centre of pixel 0 is at 0.5
        rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(K).T
        z = d / (rays @ n)
        z[rng.random(z.shape) < 0.08] = 0
        z[40:, :30] = 0
        depth.append(z)
    angle = 0.2
    turn = np.array([[np.cos(angle), -np.sin(angle), 6], [np.sin(angle), np.cos(angle), -4], [0, 0, 1]])
    scale0, scale1 = np.array([1.25, 1.5]), np.array([2.0, 1.6])
    offset0, offset1 = np.array([3.0, 2.0]), np.array([0.0, 4.0])
    kpts0 = rng.uniform(0, [60, 38], (70, 2))
    kpts1 = rng.uniform(0, [40, 34], (80, 2))
    batch = {
        "depth0": depth[0], "depth1": depth[1], "T_0to1": T, "T_1to0": np.linalg.inv(T), "K0": K, "K1": K,
        "scale0": scale0, "scale1": scale1, "offset0": offset0, "offset1": offset1, "Hq_aug": turn,
    }  # fmt: skip
    return batch, kpts0, kpts1


def depth_at(depth, x, y):
    """Bilinear where the known neighbours allow it, else nearest: in words, so in loops."""
    height, width = depth.shape
    x0, y0 = int(np.floor(x)), int(np.floor(y))
    total, known = 0.0, True
    for i in (x0, x0 + 1):
        for j in (y0, y0 + 1):
            if 0 <= i < width and 0 <= j < height:
                total += depth[j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
                known &= depth[j, i] > 0
    if known:
        return total
    i, j = round(x), round(y)
    return depth[j, i] if 0 <= i < width and 0 <= j < height else 0.0


def warp_loops(points, depth, T, size):
    out, z, visible = [], [], []
    for x, y in points:
        d = depth_at(depth, x - 0.5, y - 0.5)
        camera = T[:3, :3] @ (np.linalg.inv(K) @ np.array([x, y, 1]) * d) + T[:3, 3]
        pixel = K @ camera
        place = pixel[:2] / pixel[2]
        out.append(place)
        z.append(d)
        inside = 0 < place[0] < size[0] - 1 and 0 < place[1] < size[1] - 1
        visible.append(d > 0 and camera[2] > 1e-4 and inside)
    return np.array(out), np.array(z), np.array(visible)


def epipolar_loops(points0, points1, F):
    def to_line(point, line):
        return abs(line @ np.r_[point, 1]) / np.hypot(line[0], line[1])

    return np.array(
        [[(to_line(q, F @ np.r_[p, 1]) + to_line(p, F.T @ np.r_[q, 1])) / 2 for q in points1] for p in points0]
    )


def expected(batch, kpts0, kpts1):
    b = batch
    corner0, corner1 = kpts0 + 0.5, kpts1 + 0.5
    source0 = (corner0 + b["offset0"]) * b["scale0"]
    source1 = (apply(np.linalg.inv(b["Hq_aug"]), corner1) + b["offset1"]) * b["scale1"]
    warped0, z0, visible0 = warp_loops(source0, b["depth0"], b["T_0to1"], (80, 60))
    warped1, z1, visible1 = warp_loops(source1, b["depth1"], b["T_1to0"], (80, 60))
    to1 = apply(b["Hq_aug"], warped0 / b["scale1"] - b["offset1"])
    to0 = warped1 / b["scale0"] - b["offset0"]
    matches0, matches1 = loops(corner0, corner1, to1, to0, visible0[:, None] & visible1[None], z0 > 0, z1 > 0, 3, 5)
    t = b["T_0to1"][:3, 3]
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    F = np.linalg.inv(K).T @ cross @ b["T_0to1"][:3, :3] @ np.linalg.inv(K)
    far = epipolar_loops(source0, source1, F)
    far[~((matches0 == -2)[:, None] & (matches1 == -2)[None])] = np.inf
    matches0[(z0 == 0) & (far.min(1) > 5)] = -1
    matches1[(z1 == 0) & (far.min(0) > 5)] = -1
    return matches0, matches1


@pytest.mark.parametrize("seed", [0, 1])
def test_depth_labels_equal_loops(seed):
    batch, kpts0, kpts1 = scene(seed)
    with np.errstate(all="ignore"):
        want = expected(batch, kpts0, kpts1)
    counts = [(want[0] >= 0).sum(), (want[0] == -1).sum(), (want[0] == -2).sum()]
    assert min(counts) > 5, counts
    arrays = {k: jnp.asarray(v, jnp.float32)[None] for k, v in batch.items()}
    pad = np.full((6, 2), 20.0)  # masked slots in the midst of the images
    found = jax.jit(supervision.label_by_depth)(
        arrays, np.r_[kpts0, pad][None].astype(np.float32), np.r_[kpts1, pad][None].astype(np.float32),
        (np.arange(76) < 70)[None], (np.arange(86) < 80)[None],
    )  # fmt: skip
    np.testing.assert_array_equal(found[0][0], np.r_[want[0], np.full(6, -2)])
    np.testing.assert_array_equal(found[1][0], np.r_[want[1], np.full(6, -2)])


def test_depth_is_read_between_known_pixels_only():
    depth = jnp.array([[[2.0, 4.0, 0.0], [2.0, 4.0, 8.0]]])
    points = jnp.array([[[0.5, 0.5], [1.25, 0.25], [1.75, 0.75], [-0.25, 0.0], [5.0, 5.0], [1.9, 0.1]]])
    # bilinear; nearest beside the hole, twice; half a cell beyond the border fades; outside; in the hole
    np.testing.assert_allclose(supervision.read_depth(depth, points)[0], [3.0, 4.0, 8.0, 1.5, 0.0, 0.0])
