"""Carrying labels on by the motion of those around: right on a smooth field, silent at an edge."""

import numpy as np

from data_prep import local_motion
from data_prep import propagate as prop

AFFINE, SHIFT = np.array([[1.05, 0.04], [-0.03, 0.97]]), np.array([7.0, -3.0])


def labels(num: int, seed: int, noise_px: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 200, (num, 2))
    return np.concatenate([points, points @ AFFINE.T + SHIFT + rng.normal(0, noise_px, points.shape)], 1)


def test_points_between_labels_follow_the_affine_motion_around_them():
    first = np.concatenate([np.zeros((300, 2)), np.random.default_rng(1).uniform(20, 180, (300, 2))], 1)
    places, good = local_motion.carry(first, labels(4000, 0))
    assert good.mean() > 0.9
    assert np.hypot(*(places - (first[:, 2:] @ AFFINE.T + SHIFT))[good].T).max() < 0.1


def test_noise_of_the_labels_is_averaged_not_added():
    first = np.concatenate([np.zeros((300, 2)), np.random.default_rng(1).uniform(20, 180, (300, 2))], 1)
    places, good = local_motion.carry(first, labels(4000, 0, noise_px=0.3))
    error = np.hypot(*(places - (first[:, 2:] @ AFFINE.T + SHIFT))[good].T)
    assert good.mean() > 0.8 and np.sqrt(np.mean(error**2)) < 0.3 * np.sqrt(2), "below that of a single label"


def test_nothing_is_carried_across_a_depth_edge_or_far_from_all_labels():
    """The right half moves by 6 px more: a point on the edge has neighbours of both sides but for a chance of 7 %."""
    second = labels(4000, 0)
    second[:, 2:] = second[:, :2] + np.where(second[:, :1] > 100, 6.0, 0.0)
    edge = np.stack([np.full(50, 100.0), np.linspace(20, 180, 50)], 1)
    away = np.full((50, 2), 300.0)
    for points in (edge, away):
        first = np.concatenate([np.zeros((50, 2)), points], 1)
        assert local_motion.carry(first, second)[1].mean() < 0.2


def test_few_or_no_labels_are_no_motion():
    for num in (0, 4):
        places, good = local_motion.carry(np.ones((3, 4)), labels(num, 0))
        assert places.shape == (3, 2) and not good.any()
    assert local_motion.carry(np.zeros((0, 4)), labels(50, 0))[1].shape == (0,)


def test_labels_that_never_meet_reach_far_by_local_motion():
    """Every pair labels points of its own: the paper's rule links by chance alone."""
    rows = []
    for start in range(8):
        points = np.random.default_rng(start).uniform(0, 200, (2000, 2))
        xy = np.concatenate([points, points + [3.0, 1.0]], 1).astype(np.float32)
        rows.append({"xy": xy, "conf": np.full(2000, 0.5), "teacher": np.zeros(2000, int)})
    base = {1: prop.make_level(1, rows, 9)}
    paper = prop.propagate(base, min_matches=10)
    local = prop.propagate(base, min_matches=10, rule="local")
    assert [level.step for level in local] == [1, 2, 4, 8]
    assert local[-1].counts[0] > 1000 > 3 * paper[1].counts.max()
    for level in local:
        xy = level.pair(0)["xy"]
        off = np.hypot(*(xy[:, 2:] - xy[:, :2] - np.array([3.0, 1.0]) * level.step).T)
        assert np.percentile(off, 95) < level.step * 0.5
        assert (level.pair(0)["hops"] >= 1).all() and level.pair(0)["hops"].max() == level.step
