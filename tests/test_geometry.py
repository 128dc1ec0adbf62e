"""Coordinate conventions invert each other and put pixels where OpenCV does; two-view formulas against brute
force."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gim_jax import geometry

RNG = np.random.default_rng(0)
SIZE = (40, 30)
POINTS = RNG.uniform([-0.5, -0.5], [39.5, 29.5], (50, 2))


def random_pose(rng):
    R = cv2.Rodrigues(rng.normal(size=3) * 0.4)[0]
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, rng.normal(size=3)
    return T


def two_views(rng, num=40):
    """Return pose, intrinsics and the exact projections of random points before both cameras."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = cv2.Rodrigues(rng.normal(size=3) * 0.1)[0], rng.normal(size=3) * 0.5
    K0 = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])
    K1 = np.array([[450.0, 0, 300], [0, 440, 200], [0, 0, 1]])
    X0 = rng.uniform([-3, -3, 6], [3, 3, 12], (num, 3))
    X1 = X0 @ T[:3, :3].T + T[:3, 3]
    project = lambda X, K: (X @ K.T)[:, :2] / X[:, 2:]  # noqa: E731
    return T, K0, K1, project(X0, K0), project(X1, K1)


def point_line_distance(point, line):
    return abs(line @ [*point, 1]) / np.hypot(line[0], line[1])


@pytest.mark.parametrize("align_corners", [True, False])
def test_normalized_round_trip(align_corners):
    there = geometry.pixel_to_normalized(POINTS, SIZE, align_corners)
    np.testing.assert_allclose(geometry.normalized_to_pixel(there, SIZE, align_corners), POINTS, atol=1e-12)


def test_normalized_corners():
    corners = [[0, 0], [39, 29]]
    np.testing.assert_allclose(geometry.pixel_to_normalized(corners, SIZE, True), [[-1, -1], [1, 1]])
    np.testing.assert_allclose(
        geometry.pixel_to_normalized(corners, SIZE, False),
        [[-1 + 1 / 40, -1 + 1 / 30], [1 - 1 / 40, 1 - 1 / 30]],
    )


def test_corner_round_trip_and_offset():
    np.testing.assert_allclose(geometry.pixel_to_corner(np.zeros(2)), [0.5, 0.5])
    np.testing.assert_allclose(geometry.corner_to_pixel(geometry.pixel_to_corner(POINTS)), POINTS, atol=1e-12)


def test_cells_partition_the_pixels():
    pixels = np.stack(np.meshgrid(np.arange(40), np.arange(24)), -1)
    np.testing.assert_array_equal(geometry.pixel_to_cell(pixels, 8), pixels // 8)


def test_cell_round_trip():
    cells = RNG.integers(0, 20, (50, 2))
    np.testing.assert_array_equal(geometry.pixel_to_cell(geometry.cell_to_pixel(cells, 8), 8), cells)
    np.testing.assert_allclose(geometry.cell_to_pixel([0, 0], 8), [3.5, 3.5])  # the middle of pixels 0..7


def test_scale_points_is_where_cv2_resize_puts_them():
    """The centroid of a resized blob lies where scale_points maps the centroid of the blob."""
    image = np.zeros((60, 80), np.float32)
    image[20:30, 40:56] = 1
    resized = cv2.resize(image, (200, 90), interpolation=cv2.INTER_LINEAR)
    ys, xs = np.mgrid[:90, :200]
    centroid = np.array([(xs * resized).sum(), (ys * resized).sum()]) / resized.sum()
    np.testing.assert_allclose(geometry.scale_points([47.5, 24.5], (200 / 80, 90 / 60)), centroid, atol=1e-3)


def test_scale_points_round_trip():
    np.testing.assert_allclose(geometry.scale_points(geometry.scale_points(POINTS, 0.3), 1 / 0.3), POINTS, atol=1e-12)


def test_scaled_K_projects_onto_scaled_points():
    _, K0, _, kpts0, _ = two_views(RNG)
    rays = geometry.normalize_by_K(kpts0, K0)
    scale = (0.5, 0.75)
    projected = geometry.from_homogeneous(geometry.to_homogeneous(rays) @ geometry.scale_K(K0, scale).T)
    np.testing.assert_allclose(projected, geometry.scale_points(kpts0, scale), atol=1e-9)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1])
def test_rotated_points_and_K_follow_the_pixels(turns):
    image = RNG.integers(0, 255, (30, 40))
    points = np.stack([RNG.integers(0, 40, 20), RNG.integers(0, 30, 20)], -1)
    rotated = np.rot90(image, turns)
    x, y = geometry.rotate_points(points, SIZE, turns).T.astype(int)
    np.testing.assert_array_equal(rotated[y, x], image[points[:, 1], points[:, 0]])
    K = np.array([[50.0, 0, 21], [0, 60, 13], [0, 0, 1]])
    rays = geometry.normalize_by_K(points, K)
    angle = -np.pi / 2 * turns  # counter-clockwise on the screen, where y points down
    spin = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rays_rotated = geometry.normalize_by_K(np.stack([x, y], -1), geometry.rotate_K(K, SIZE, turns))
    np.testing.assert_allclose(rays_rotated, rays @ spin.T, atol=1e-12)


def test_relative_pose_and_inverse():
    T0, T1 = random_pose(RNG), random_pose(RNG)
    np.testing.assert_allclose(geometry.invert_pose(T0), np.linalg.inv(T0), atol=1e-12)
    np.testing.assert_allclose(geometry.relative_pose(T0, T1), T1 @ np.linalg.inv(T0), atol=1e-12)


def test_exact_projections_satisfy_E_and_F():
    T, K0, K1, kpts0, kpts1 = two_views(RNG)
    E = geometry.essential_from_pose(T)
    F = geometry.fundamental_from_pose(T, K0, K1)
    rays0, rays1 = geometry.normalize_by_K(kpts0, K0), geometry.normalize_by_K(kpts1, K1)
    assert geometry.symmetric_epipolar_distance(rays0, rays1, E).max() < 1e-20
    assert geometry.symmetric_epipolar_distance(kpts0, kpts1, F).max() < 1e-15


def test_epipolar_distances_against_point_to_line():
    T, K0, K1, kpts0, kpts1 = two_views(RNG)
    kpts1 = kpts1 + RNG.normal(size=kpts1.shape) * 5
    F = geometry.fundamental_from_pose(T, K0, K1)
    d1 = np.array([point_line_distance(b, F @ [*a, 1]) for a, b in zip(kpts0, kpts1)])
    d0 = np.array([point_line_distance(a, F.T @ [*b, 1]) for a, b in zip(kpts0, kpts1)])
    np.testing.assert_allclose(geometry.symmetric_epipolar_distance(kpts0, kpts1, F), d0**2 + d1**2)
    np.testing.assert_allclose(geometry.mean_epipolar_distance(kpts0, kpts1, F), (d0 + d1) / 2)
    sampson = [cv2.sampsonDistance(np.array([*a, 1.0]), np.array([*b, 1.0]), F) for a, b in zip(kpts0, kpts1)]
    np.testing.assert_allclose(geometry.sampson_distance(kpts0, kpts1, F), sampson)


def test_warp_homography_matches_opencv():
    H = np.array([[1.1, 0.1, 5], [-0.05, 0.9, 3], [1e-4, 2e-4, 1]])
    np.testing.assert_allclose(geometry.warp_homography(POINTS, H), cv2.perspectiveTransform(POINTS[None], H)[0])


def test_jax_arrays_stay_on_jax_and_agree():
    T, K0, K1, kpts0, kpts1 = two_views(RNG)
    fundamental = jax.jit(geometry.fundamental_from_pose)(jnp.asarray(T), jnp.asarray(K0), jnp.asarray(K1))
    distance = jax.jit(geometry.mean_epipolar_distance)(jnp.asarray(kpts0), jnp.asarray(kpts1) + 9, fundamental)
    warped = jax.jit(geometry.warp_homography)(jnp.asarray(kpts0), jnp.asarray(K0))
    assert isinstance(fundamental, jax.Array)
    F = geometry.fundamental_from_pose(T, K0, K1)
    np.testing.assert_allclose(distance, geometry.mean_epipolar_distance(kpts0, kpts1 + 9, F), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(warped, geometry.warp_homography(kpts0, K0), rtol=1e-5)


def test_batches():
    pairs = [two_views(RNG) for _ in range(3)]
    T, K0, K1, kpts0, kpts1 = (np.stack(x) for x in zip(*pairs))
    F = geometry.fundamental_from_pose(T, K0, K1)
    together = geometry.symmetric_epipolar_distance(kpts0 + 1, kpts1, F)
    for i, (T, K0, K1, kpts0, kpts1) in enumerate(pairs):
        one = geometry.symmetric_epipolar_distance(kpts0 + 1, kpts1, geometry.fundamental_from_pose(T, K0, K1))
        np.testing.assert_allclose(together[i], one)
    np.testing.assert_allclose(geometry.normalize_by_K(kpts0[None], K0[None])[0], geometry.normalize_by_K(kpts0, K0))
