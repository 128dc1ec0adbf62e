"""RootSIFT against OpenCV's brute-force matcher."""

import cv2
import numpy as np
import pytest

from gim_jax import rootsift

RNG = np.random.default_rng(0)


def unit(desc):
    return (desc / np.linalg.norm(desc, axis=1, keepdims=True)).astype(np.float32)


def brute_force(desc0, desc1, ratio):
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    back = {m.queryIdx: m.trainIdx for m in matcher.match(desc1, desc0)}
    two = [m for m in matcher.knnMatch(desc0, desc1, k=2)]
    return [
        (a.queryIdx, a.trainIdx) for a, b in two if a.distance < ratio * b.distance and back[a.trainIdx] == a.queryIdx
    ]


@pytest.mark.parametrize("num0, num1", [(700, 500), (300, 900), (5, 2), (1, 7)])
def test_equals_brute_force(monkeypatch, num0, num1):
    monkeypatch.setattr(rootsift, "BLOCK_ROWS", 64)
    common = RNG.random((min(num0, num1), 16))
    desc0 = unit(np.concatenate([common, RNG.random((num0 - len(common), 16))]))
    desc1 = unit(np.concatenate([common, RNG.random((num1 - len(common), 16))]) + 0.05 * RNG.random((num1, 16)))
    idx0, idx1, conf = rootsift.match(desc0, desc1, 0.8)
    assert list(zip(idx0, idx1)) == brute_force(desc0, desc1, 0.8)
    near, far = np.sort(np.linalg.norm(desc0[idx0][:, None] - desc1[None], axis=-1), axis=1)[:, :2].T
    np.testing.assert_allclose(conf, 1 - near / far, atol=1e-3)


def test_of_equal_descriptors_the_first_matches(monkeypatch):
    monkeypatch.setattr(rootsift, "BLOCK_ROWS", 2)
    desc0 = unit(RNG.random((6, 16)))
    desc1 = desc0[[3, 5, 1]]
    desc0[4] = desc0[1]
    idx0, idx1, _ = rootsift.match(desc0, desc1)
    assert list(zip(idx0, idx1)) == [(1, 2), (3, 0), (5, 1)]


def test_equal_candidates_are_no_match():
    desc0 = unit(RNG.random((3, 16)))
    assert len(rootsift.match(desc0, desc0[[0, 0, 1, 1, 2, 2]])[0]) == 0


@pytest.mark.parametrize("num0, num1", [(0, 5), (5, 0), (5, 1), (0, 0)])
def test_too_few_descriptors(num0, num1):
    idx0, idx1, conf = rootsift.match(unit(RNG.random((num0, 16))), unit(RNG.random((num1, 16))))
    assert len(idx0) == len(idx1) == len(conf) == 0


def test_descriptors_are_roots_of_opencv_sift():
    gray = cv2.resize(RNG.integers(0, 255, (20, 30), dtype=np.uint8), (150, 100), interpolation=cv2.INTER_CUBIC)
    found = rootsift.extract(gray)
    keypoints, desc = cv2.SIFT_create(nfeatures=150 * 100 // 64, contrastThreshold=1e-5).detectAndCompute(gray, None)
    np.testing.assert_array_equal(found.kpts, cv2.KeyPoint.convert(keypoints))
    np.testing.assert_allclose(found.desc**2, desc / desc.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.desc, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "gray", [np.zeros((64, 64), np.uint8), np.zeros((1, 1), np.uint8), np.zeros((8, 900), np.uint8)]
)
def test_nothing_to_see(gray):
    found = rootsift.extract(gray)
    assert found.kpts.shape == (0, 2) and found.desc.shape == (0, 128)


def test_masked_pixels_have_no_keypoints():
    gray = cv2.resize(RNG.integers(0, 255, (20, 30), dtype=np.uint8), (150, 100), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((100, 150), bool)
    mask[:, 75:] = True
    kpts = rootsift.extract(gray, mask=mask).kpts
    assert len(kpts) > 20 and kpts[:, 0].min() >= 74
