"""Metrics against closed forms; the golden case of the official functions runs in test_parity."""

import cv2
import numpy as np
import pytest

from gim_jax.eval import metrics
from gim_jax.ops.density import gaussian_density
from gim_jax.robust import estimate_homography, estimate_relative_pose

RNG = np.random.default_rng(0)
K = np.array([[500.0, 0, 320], [0, 520, 240], [0, 0, 1]])


def rotation(axis, degrees):
    return cv2.Rodrigues(np.asarray(axis, float) / np.linalg.norm(axis) * np.radians(degrees))[0]


def two_views(num, rng, K1=K):
    """Return T_0to1 and exact projections of points before both cameras."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = rotation([0.1, 1, 0.2], 12), [0.8, -0.1, 0.3]
    X0 = rng.uniform([-3, -3, 5], [3, 3, 9], (num, 3))
    X1 = X0 @ T[:3, :3].T + T[:3, 3]
    return T, (X0 @ K.T)[:, :2] / X0[:, 2:], (X1 @ K1.T)[:, :2] / X1[:, 2:]


@pytest.mark.parametrize("degrees", [0.0, 0.01, 5.0, 90.0, 179.0])
def test_rotation_error_is_the_angle_between(degrees):
    R = rotation([1, 2, 3], 40)
    assert metrics.rotation_error_deg(R @ rotation([3, -1, 2], degrees), R) == pytest.approx(degrees, abs=1e-5)


@pytest.mark.parametrize("degrees, folded", [(0, 0), (30, 30), (90, 90), (150, 30), (180, 0)])
def test_translation_error_folds_the_sign(degrees, folded):
    t = rotation([0, 0, 1], degrees) @ [2.0, 0, 0]
    assert metrics.translation_error_deg(t, [5.0, 0, 0]) == pytest.approx(folded, abs=1e-5)


def test_translation_without_baseline_has_no_direction():
    assert np.isnan(metrics.translation_error_deg([1, 0, 0], [0, 0, 0]))


def test_scaled_translation_error_is_not_folded():
    assert metrics.translation_error([0, 3.0, 0], [0, -2.0, 0]) == pytest.approx(4)


def test_auc_of_perfect_and_of_failed_pairs():
    np.testing.assert_allclose(metrics.pose_auc([0, 0, 0]), [1, 1, 1])
    np.testing.assert_allclose(metrics.pose_auc([np.inf, np.nan, 180]), [0, 0, 0])


def test_auc_of_one_error_is_a_triangle_and_a_rectangle():
    # recall rises from 0 to 1 over [0, 2] and stays 1 up to 5
    assert metrics.pose_auc([2.0], [5])[0] == pytest.approx((2 / 2 + 3) / 5)
    assert metrics.pose_auc([2.0, np.inf], [5])[0] == pytest.approx((0.5 * 2 / 2 + 0.5 * 3) / 5)


def test_auc_is_the_integral_of_the_curve():
    errors = RNG.exponential(6, 37)
    x = np.concatenate([[0], np.sort(errors)])
    recall = np.arange(38) / 37
    for threshold, got in zip((5, 10, 20), metrics.pose_auc(errors)):
        grid = np.linspace(0, threshold, 200_001)
        last = x[x < threshold].max()  # flat from the last error below the threshold
        value = np.interp(np.minimum(grid, last), x, recall)
        assert got == pytest.approx(np.trapezoid(value, grid) / threshold, abs=1e-6)


def test_auc_does_not_depend_on_order():
    errors = RNG.exponential(6, 37)
    np.testing.assert_array_equal(metrics.pose_auc(errors), metrics.pose_auc(errors[::-1]))


def test_auc_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        metrics.pose_auc([])


def test_epipolar_errors_of_exact_matches_vanish_and_grow_with_the_offset():
    T, kpts0, kpts1 = two_views(40, RNG)
    assert metrics.epipolar_errors(kpts0, kpts1, K, K, T).max() < 1e-20
    moved = metrics.epipolar_errors(kpts0, kpts1 + [0, 3.0], K, K, T)
    # at most 3 px from either line, 3 px being 3 / 520 in normalised coordinates
    assert 0 < moved.max() < 2.2 * (3 / 500) ** 2


def test_epipolar_precision():
    assert metrics.epipolar_precision([1e-4, 4e-4, 6e-4, 1.0]) == 0.5
    assert metrics.epipolar_precision([]) == 0.0


def test_homography_corner_error_of_a_shift():
    shift = np.array([[1.0, 0, 3], [0, 1, 4], [0, 0, 1]])
    assert metrics.homography_corner_error(shift, np.eye(3), (640, 480)) == pytest.approx(5)


def test_homography_corner_error_of_a_scaling():
    double = np.diag([2.0, 2.0, 1.0])  # corners move by their own distance from the origin
    assert metrics.homography_corner_error(double, np.eye(3), (31, 41)) == pytest.approx((0 + 30 + 40 + 50) / 4)
    assert metrics.homography_corner_error(double, np.eye(3), (30, 40), pixel_centers=False) == pytest.approx(30)


def test_failed_homographies_are_infinite():
    assert metrics.homography_corner_error(None, np.eye(3), (640, 480)) == np.inf
    assert metrics.homography_corner_error(np.zeros((3, 3)), np.eye(3), (640, 480)) == np.inf


@pytest.mark.parametrize("method", ["ransac", "magsac"])
def test_pose_of_clean_matches_and_of_matches_with_outliers(method):
    T, kpts0, kpts1 = two_views(300, RNG)
    kpts1[:100] = RNG.uniform(0, 480, (100, 2))
    R, t, inliers = estimate_relative_pose(kpts0, kpts1, K, K, 0.5, method)
    assert metrics.rotation_error_deg(R, T[:3, :3]) < 0.3
    assert metrics.translation_error_deg(t, T[:3, 3]) < 1
    assert inliers[100:].mean() > 0.9 and inliers[:100].mean() < 0.1


@pytest.mark.parametrize("seed", range(12))
def test_pose_is_the_published_recipe_call_for_call(seed):
    """On noisy matches every constant changes one of these results, so equality fixes them."""
    rng = np.random.default_rng(seed)
    K1 = np.array([[450.0, 0, 300], [0, 430, 250], [0, 0, 1]])
    _, kpts0, kpts1 = two_views(300, rng, K1)
    kpts0, kpts1 = kpts0 + 0.3 * rng.normal(size=(300, 2)), kpts1 + 0.3 * rng.normal(size=(300, 2))
    kpts1[:120] = rng.uniform(0, 480, (120, 2))
    p0, p1 = (kpts0 - [320, 240]) / [500, 520], (kpts1 - [300, 250]) / [450, 430]
    E, mask = cv2.findEssentialMat(p0, p1, np.eye(3), cv2.RANSAC, 0.99999, 0.5 / ((500 + 430 + 500 + 430) / 4))
    _, R_want, t_want, _ = cv2.recoverPose(E, p0, p1, np.eye(3), 1e9, mask=mask)
    R, t, inliers = estimate_relative_pose(kpts0, kpts1, K, K1)
    np.testing.assert_array_equal(R, R_want)
    np.testing.assert_array_equal(t, t_want[:, 0])
    np.testing.assert_array_equal(inliers, mask.ravel() > 0)


@pytest.mark.parametrize("method", ["ransac", "magsac"])
@pytest.mark.parametrize("num", [0, 4])
def test_too_few_matches_give_no_pose(num, method):
    assert estimate_relative_pose(np.zeros((num, 2)), np.zeros((num, 2)), K, K, 0.5, method) is None


@pytest.mark.parametrize("method", ["ransac", "magsac"])
def test_degenerate_matches_do_not_crash(method):
    assert estimate_relative_pose(np.ones((50, 2)), np.ones((50, 2)), K, K, 0.5, method) is None


def test_unknown_estimator():
    with pytest.raises(ValueError, match="found 'lmeds'"):
        estimate_relative_pose(np.zeros((9, 2)), np.zeros((9, 2)), K, K, 0.5, "lmeds")


def test_density_in_chunks_equals_the_full_matrix():
    points = RNG.normal(size=(131, 4)).astype(np.float32) * 0.2
    squared = ((points[:, None] - points) ** 2).sum(-1)
    np.testing.assert_allclose(gaussian_density(points, 0.1, chunk=16), np.exp(-squared / 0.02).sum(1), rtol=1e-5)


def test_poselib_finds_pose_and_homography():
    """The optional estimator, on matches with a third of outliers."""
    pytest.importorskip("poselib", reason="the extra `eval` is not installed")
    T, kpts0, kpts1 = two_views(300, np.random.default_rng(3))
    kpts1[:100] = np.random.default_rng(4).uniform(0, 480, (100, 2))
    R, t, inliers = estimate_relative_pose(kpts0, kpts1, K, K, 0.5, "poselib")
    assert metrics.rotation_error_deg(R, T[:3, :3]) < 0.1 and metrics.translation_error_deg(t, T[:3, 3]) < 0.3
    assert np.linalg.norm(t) == pytest.approx(1) and inliers[100:].mean() > 0.95 and inliers[:100].mean() < 0.1
    H_gt = np.array([[1.1, 0.1, 5], [-0.1, 0.9, 7], [1e-4, 2e-5, 1]])
    moved = cv2.perspectiveTransform(kpts0[None], H_gt)[0]
    moved[:100] = kpts1[:100]
    H, inliers = estimate_homography(kpts0, moved, 1.0, "poselib")
    assert metrics.homography_corner_error(H, H_gt, (640, 480)) < 1e-3 and inliers.sum() >= 200


@pytest.mark.parametrize("method", ["ransac", "magsac"])
def test_homography_of_matches_with_outliers_and_of_too_few(method):
    rng = np.random.default_rng(5)
    kpts0 = rng.uniform(0, 480, (200, 2))
    H_gt = np.array([[1.1, 0.1, 5], [-0.1, 0.9, 7], [1e-4, 2e-5, 1]])
    kpts1 = cv2.perspectiveTransform(kpts0[None], H_gt)[0]
    kpts1[:80] = rng.uniform(0, 480, (80, 2))
    H, inliers = estimate_homography(kpts0, kpts1, 1.0, method)
    assert metrics.homography_corner_error(H, H_gt, (640, 480)) < 1e-3 and inliers[80:].all()
    assert estimate_homography(kpts0[:3], kpts1[:3], 1.0, method)[0] is None
    assert estimate_homography(np.ones((9, 2)), np.ones((9, 2)), 1.0, method)[0] is None
    with pytest.raises(ValueError, match="found 'x', expected one of ransac"):
        estimate_homography(kpts0, kpts1, 1.0, "x")
