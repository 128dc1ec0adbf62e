"""Robust fitting: right models on planted data, honest refusal of everything else."""

import numpy as np
import pytest

from gim_jax import robust

SIZE = (1920, 1080)


def two_views(num: int, outliers: float, noise_px: float, seed: int = 0):
    """Project points of a cloud into two known cameras; returns points, fundamental matrix and the planted inliers."""
    rng = np.random.default_rng(seed)
    K = np.array([[1400.0, 0, 960], [0, 1400, 540], [0, 0, 1]])
    angle = 0.1
    R = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    t = np.array([0.8, 0.1, 0.3])
    X = rng.uniform([-4, -2, 5], [4, 2, 15], (num, 3))
    project = lambda P: (P @ K.T)[:, :2] / P[:, 2:]  # noqa: E731
    kpts0, kpts1 = project(X), project(X @ R.T + t)
    kpts0, kpts1 = (k + rng.normal(0, noise_px, k.shape) for k in (kpts0, kpts1))
    good = rng.uniform(size=num) >= outliers
    kpts1[~good] = rng.uniform(0, 1, (int((~good).sum()), 2)) * SIZE
    skew = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    F = np.linalg.inv(K).T @ skew @ R @ np.linalg.inv(K)
    return kpts0, kpts1, F, good, K


@pytest.mark.parametrize("kind", ["F", "E"])
def test_planted_inliers_are_found(kind):
    kpts0, kpts1, _, good, K = two_views(1000, 0.4, 0.2)
    found = robust.fit(kind, kpts0, kpts1, SIZE, 1.0, K0=K, K1=K)
    assert found.model is not None
    assert (found.inliers & good).sum() / good.sum() > 0.95
    assert (found.inliers & good).sum() / found.inliers.sum() > 0.97


def test_fundamental_matrix_is_that_of_the_cameras():
    kpts0, kpts1, F, _, _ = two_views(2000, 0.0, 0.0)
    found = robust.fit("F", kpts0, kpts1, SIZE).model
    found *= np.linalg.norm(F) / np.linalg.norm(found) * np.sign(found[2, 2] * F[2, 2])
    np.testing.assert_allclose(found, F, atol=2e-5 * np.linalg.norm(F))


def test_homography_of_a_plane():
    rng = np.random.default_rng(0)
    H = np.array([[1.1, 0.05, 20], [-0.03, 0.95, 10], [1e-5, 2e-5, 1]])
    kpts0 = rng.uniform(0, 1, (300, 2)) * SIZE
    warped = np.c_[kpts0, np.ones(300)] @ H.T
    found = robust.fit("H", kpts0, warped[:, :2] / warped[:, 2:], SIZE)
    np.testing.assert_allclose(found.model / found.model[2, 2], H, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num", [0, 3, 7, 8, 12, 100, 1000, 20_000])
@pytest.mark.parametrize("threshold_px", [0.5, 1.0])
def test_random_matches_are_refused(num, threshold_px):
    """20 000 random matches keep 55 to 90 'inliers': a fixed minimum would accept them."""
    rng = np.random.default_rng(num)
    kpts0, kpts1 = rng.uniform(0, 1, (2, num, 2)) * SIZE
    found = robust.fit("F", kpts0, kpts1, SIZE, threshold_px)
    assert found.model is None and found.num_inliers == 0 and found.reason


def test_few_but_certain_matches_are_accepted():
    kpts0, kpts1, _, _, _ = two_views(40, 0.0, 0.1)
    assert robust.fit("F", kpts0, kpts1, SIZE).num_inliers >= 36


def test_false_alarms_against_the_definition():
    """NFA = (N - s) C(N, k) C(k, s) p^(k - s), computed with whole numbers."""
    from math import comb, hypot, log10, sqrt

    chance = 2 * sqrt(2) * hypot(*SIZE) / (SIZE[0] * SIZE[1])
    want = log10((50 - 7) * comb(50, 20) * comb(20, 7)) + 13 * log10(chance)
    assert robust.log10_nfa(50, 20, "F", 1.0, SIZE) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("points", [np.full((30, 2), 5.0), np.c_[np.arange(30.0), np.arange(30.0)]])
def test_degenerate_points_never_raise(points):
    for kind in "FH":
        found = robust.fit(kind, points, points[::-1], SIZE)
        assert found.model is None or np.isfinite(found.model).all()


def test_bad_arguments_name_the_field():
    points = np.zeros((10, 2))
    with pytest.raises(ValueError, match="kpts0 and kpts1: 10 and 9"):
        robust.fit("F", points, points[:9], SIZE)
    with pytest.raises(ValueError, match="not finite"):
        robust.fit("F", points * np.nan, points, SIZE)
    with pytest.raises(ValueError, match="K0, K1"):
        robust.fit("E", points, points, SIZE)
    for threshold_px in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="threshold_px: found"):
            robust.fit("F", points, points, SIZE, threshold_px)
    with pytest.raises(ValueError, match="kind"):
        robust.fit("X", points, points, SIZE)


def turned(num: int, noise_px: float, seed: int = 0):
    """Points as a camera sees them that turns by 0.1 rad and stays where it is; every third match is random."""
    rng = np.random.default_rng(seed)
    K = np.array([[1400.0, 0, 960], [0, 1400, 540], [0, 0, 1]])
    R = np.array([[np.cos(0.1), 0, np.sin(0.1)], [0, 1, 0], [-np.sin(0.1), 0, np.cos(0.1)]])
    kpts0 = rng.uniform(0, 1, (num, 2)) * SIZE
    rays = np.c_[kpts0, np.ones(num)] @ (K @ R @ np.linalg.inv(K)).T
    kpts1 = rays[:, :2] / rays[:, 2:] + rng.normal(0, noise_px, (num, 2))
    kpts1[::3] = rng.uniform(0, 1, kpts1[::3].shape) * SIZE
    return kpts0, kpts1


def test_a_turning_camera_is_named_and_keeps_no_match_along_the_lines():
    """Any epipole agrees with a rotation, so an F keeps some random matches; the homography keeps none."""
    kpts0, kpts1 = turned(3000, 0.3)
    along = robust.fit("F", kpts0, kpts1, SIZE, 1.0).inliers[::3].sum()
    name, found = robust.fit_motion(kpts0, kpts1, SIZE, 1.0)
    assert name == "H" and found.inliers[::3].sum() <= 1 < along
    assert found.inliers.reshape(-1, 3)[:, 1:].mean() > 0.95


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_parallax_is_a_fundamental_matrix_even_when_most_points_lie_on_a_plane(share):
    kpts0, kpts1, F, _, _ = two_views(2000, 0.0, 0.2)
    epipole = np.linalg.svd(F.T)[2][2]  # a plane's homography agrees with F where F = [e1]x H up to scale
    cross = np.array([[0, -epipole[2], epipole[1]], [epipole[2], 0, -epipole[0]], [-epipole[1], epipole[0], 0]])
    H = cross @ F / np.linalg.norm(F) + np.outer(epipole, [1e-4, 2e-4, 1.0])
    plane = np.arange(2000) < share * 2000
    mapped = np.c_[kpts0, np.ones(2000)] @ H.T
    kpts1 = np.where(plane[:, None], mapped[:, :2] / mapped[:, 2:], kpts1)
    name, found = robust.fit_motion(kpts0, kpts1, SIZE, 1.0)
    assert name == "F" and found.inliers[~plane].mean() > 0.95


@pytest.mark.parametrize("num", [8, 1000, 20_000])
def test_random_matches_move_in_no_way(num):
    kpts0, kpts1 = np.random.default_rng(num).uniform(0, 1, (2, num, 2)) * SIZE
    name, found = robust.fit_motion(kpts0, kpts1, SIZE, 0.5)
    assert name == "" and found.num_inliers == 0 and found.reason
