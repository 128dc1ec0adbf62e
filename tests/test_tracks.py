"""Keypoints from matches: one point of a scene becomes one keypoint, unrounded, and tracks stay one to one."""

import numpy as np
import pytest

from gim_jax.tasks import image_pairs
from gim_jax.tasks.tracks import anchor_points, build_tracks, one_to_one


def test_equal_points_alone_are_merged_at_radius_zero():
    points = np.array([[1.25, 2.5], [1.25, 2.5], [1.5, 2.5]], np.float32)
    keypoints, nearest = anchor_points(points, np.ones(3), 0.0)
    np.testing.assert_array_equal(keypoints, [[1.25, 2.5], [1.5, 2.5]])  # the better supported one first
    np.testing.assert_array_equal(nearest, [0, 0, 1])


def test_keypoints_are_points_apart_by_more_than_the_radius_and_cover_all():
    points = np.random.default_rng(0).uniform(0, 40, (800, 2)).astype(np.float32)
    keypoints, nearest = anchor_points(points, np.ones(800), 2.0)
    gaps = np.linalg.norm(keypoints[:, None] - keypoints[None], axis=-1) + 99 * np.eye(len(keypoints))
    assert gaps.min() > 2.0
    assert (nearest >= 0).all() and np.linalg.norm(points - keypoints[nearest], axis=1).max() <= 2.0
    assert {tuple(k) for k in keypoints} <= {tuple(p) for p in points}


def test_best_supported_points_are_kept():
    points = np.array([[0, 0], [0.5, 0], [0, 0.5], [50, 0], [90, 0]], np.float32)
    keypoints, nearest = anchor_points(points, np.array([1, 1, 1, 2, 1.0]), 1.0, max_keypoints=2)
    np.testing.assert_array_equal(keypoints, [[0, 0], [50, 0]])
    np.testing.assert_array_equal(nearest, [0, 0, 0, 1, -1])


def test_matches_become_one_to_one_by_score():
    matches, scores = one_to_one(np.array([[0, 5], [1, 5], [1, 6], [2, 7]]), np.array([0.5, 0.9, 0.3, 0.2]))
    np.testing.assert_array_equal(matches, [[1, 5], [2, 7]])
    np.testing.assert_array_equal(scores, [0.9, 0.2])


def test_points_of_three_images_become_tracks():
    rng = np.random.default_rng(0)
    places = {name: rng.permutation(400)[:100, None] * [1.0, 0.5] + [0.25, 0.125] for name in "abc"}
    pairs = [("a", "b"), ("b", "c"), ("a", "c")]
    jitter = lambda p: (p + rng.uniform(-0.2, 0.2, p.shape)).astype(np.float32)  # noqa: E731
    found = [(jitter(places[a]), jitter(places[b]), np.ones(100)) for a, b in pairs]
    keypoints, matches = build_tracks(pairs, found, radius_px=0.5)
    assert {name: len(points) for name, points in keypoints.items()} == {"a": 100, "b": 100, "c": 100}
    to = [dict(index.tolist()) for index, _ in matches]
    assert all(to[1][to[0][a]] == to[2][a] for a in range(100))  # a -> b -> c is a -> c


def test_fixed_keypoints_stay_and_far_matches_are_dropped():
    fixed = {"a": np.array([[10.0, 10.0], [20, 20]], np.float32)}
    found = [(np.array([[19.5, 20], [40, 40.0]]), np.array([[1.0, 1], [2, 2]]), np.ones(2))]
    keypoints, [(index, _)] = build_tracks([("a", "b")], found, 1.0, fixed=fixed)
    np.testing.assert_array_equal(keypoints["a"], fixed["a"])
    assert index[0, 0] == 1 and len(index) == 1


def test_pair_selections():
    names = [f"{i}" for i in range(12)]
    assert len(image_pairs.exhaustive(names)) == 66
    pairs = image_pairs.sequential(names, 2)
    assert {b for a, b in pairs if a == "0"} == {"1", "2", "4"}  # the next two, and 4 = 2^2
    assert image_pairs.unique_pairs([("a", "b"), ("b", "a"), ("a", "a")]) == [("a", "b")]


@pytest.mark.parametrize("line, message", [("a.jpg", "1 words"), ("a.jpg c.jpg", "c.jpg: no such image")])
def test_pair_list_names_the_line(tmp_path, line, message):
    (tmp_path / "pairs.txt").write_text(f"a.jpg b.jpg\n\n{line}\n")
    with pytest.raises(ValueError, match=f"pairs.txt:3: .*{message}"):
        image_pairs.read_pair_list(tmp_path / "pairs.txt", ["a.jpg", "b.jpg"])


def test_similar_images_are_found(tmp_path):
    from gim_jax.image import encode_jpeg, resize

    rng = np.random.default_rng(0)
    for scene in range(3):
        base = resize(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8), (400, 240))
        for view in range(2):
            (tmp_path / f"{scene}{view}.jpg").write_bytes(encode_jpeg(base[20 * view :, 30 * view :], 90))
    names = image_pairs.list_images(tmp_path)
    pairs = image_pairs.GlobalDescriptor(tmp_path, names).pairs(1)
    assert {tuple(sorted(pair)) for pair in pairs} == {(f"{s}0.jpg", f"{s}1.jpg") for s in range(3)}
