"""Two images: the pose and the points of a known world, and honest refusals; a panorama of a known homography."""

import json
from pathlib import Path

import numpy as np
import pytest

from gim_jax import cli, geometry
from gim_jax.eval.pairs import read_pairs
from gim_jax.image import encode_jpeg, read_image, resize
from gim_jax.tasks import two_view
from gim_jax.tasks.clouds import read_cloud
from gim_jax.tasks.panorama import panorama
from gim_jax.types import Matches

SIZE = (640, 480)
K = np.array([[550.0, 0, 319.5], [0, 550, 239.5], [0, 0, 1]])


def world(noise_px: float = 0.3, t=(1.0, 0.1, 0.2), num_wrong: int = 100, seed: int = 0):
    """Matches of random points seen by two cameras, the last ones wrong; the pose and the points."""
    rng = np.random.default_rng(seed)
    points = rng.uniform([-3, -2, 5], [3, 2, 12], (500, 3))
    angle = np.radians(8)
    T = np.eye(4)
    T[:3, :3] = [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
    T[:3, 3] = t
    kpts = [geometry.from_homogeneous(p @ K.T) for p in (points, points @ T[:3, :3].T + T[:3, 3])]
    kpts = [k + rng.normal(0, noise_px, k.shape) for k in kpts]
    wrong = [rng.uniform(0, SIZE, (num_wrong, 2)) for _ in kpts]
    kpts = [np.concatenate([k, w]).astype(np.float32) for k, w in zip(kpts, wrong)]
    return Matches(kpts[0], kpts[1], np.ones(len(kpts[0]), np.float32), SIZE, SIZE), T, points


def angle_deg(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))))


def test_known_cameras_give_pose_and_points():
    matches, T, points = world()
    found = two_view.reconstruct(matches, K, K)
    assert angle_deg(found.T_0to1[:3, 3], T[:3, 3]) < 0.5
    np.testing.assert_allclose(found.T_0to1[:3, :3], T[:3, :3], atol=2e-3)
    assert np.linalg.norm(found.T_0to1[:3, 3]) == pytest.approx(1)
    right = found.index < 500
    assert right.mean() > 0.97 and right.sum() > 450
    true = points[found.index[right]] / np.linalg.norm(T[:3, 3])
    assert np.median(np.linalg.norm(found.points[right] - true, axis=1) / true[:, 2]) < 0.01


def test_exact_points_are_triangulated_exactly():
    _, T, points = world()
    rays = [geometry.from_homogeneous(p) for p in (points, points @ T[:3, :3].T + T[:3, 3])]
    np.testing.assert_allclose(two_view.triangulate(*rays, T), points, rtol=1e-9)


def test_focal_length_is_found():
    matches, T, _ = world()
    found = two_view.reconstruct(matches)
    assert found.K0[0, 0] == pytest.approx(550, rel=0.05)
    assert angle_deg(found.T_0to1[:3, 3], T[:3, 3]) < 2


@pytest.mark.parametrize("t", [(0, 0, 0), (0.001, 0, 0)])
def test_camera_that_only_turned_gives_no_points(t):
    found = two_view.reconstruct(world(t=t)[0], K, K)
    assert (
        found.T_0to1 is None and "fit a homography; the camera only turned" in found.reason and len(found.points) == 0
    )


def test_chance_and_too_few_are_refused():
    rng = np.random.default_rng(0)
    for num, reason in (
        (200, "chance explains"),
        (5, "5 matches, an essential matrix needs more than 5"),
        (0, "0 match"),
    ):
        kpts = rng.uniform(0, SIZE, (2, num, 2)).astype(np.float32)
        found = two_view.reconstruct(Matches(kpts[0], kpts[1], np.ones(num, np.float32), SIZE, SIZE), K, K)
        assert found.T_0to1 is None and reason in found.reason


def test_command_on_real_images_agrees_with_the_truth(shared, tmp_path):
    pair = read_pairs(shared / "data/strecha_fountain-p11/pairs_with_gt.txt")[8]
    images, half = [str(tmp_path / "0.jpg"), str(tmp_path / "1.jpg")], geometry.scale_K(pair.K0, 0.5)
    for name, path in zip(images, (pair.path0, pair.path1)):
        image = read_image(path)
        Path(name).write_bytes(encode_jpeg(resize(image, (image.shape[1] // 2, image.shape[0] // 2)), 95))
    values = [str(half[i]) for i in ((0, 0), (1, 1), (0, 2), (1, 2))]
    assert cli.main(["reconstruct", *images, "--K0", *values, "--K1", *values, "--out", str(tmp_path / "a")]) == 0
    T = np.array(json.loads((tmp_path / "a/poses.json").read_text())["T_0to1"])
    assert angle_deg(T[:3, 3], pair.T_0to1[:3, 3]) < 0.5
    turn = T[:3, :3] @ pair.T_0to1[:3, :3].T
    assert np.degrees(np.arccos(min((np.trace(turn) - 1) / 2, 1))) < 0.2
    stats = json.loads((tmp_path / "a/statistics.json").read_text())
    cloud = read_cloud(tmp_path / "a/points.ply")
    assert len(cloud) == stats["num_points"] > 1000 and cloud.colors is not None
    assert (tmp_path / "a/picture.png").stat().st_size > 100_000


def test_command_says_that_there_is_nothing(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(encode_jpeg(rng.integers(0, 255, (120, 160, 3), dtype=np.uint8), 90))
    images = [str(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    assert cli.main(["reconstruct", *images, "--out", str(tmp_path / "o")]) == 1
    assert json.loads((tmp_path / "o/poses.json").read_text())["T_0to1"] is None
    assert cli.main(["reconstruct", images[0], str(tmp_path / "c.jpg"), "--out", str(tmp_path / "p")]) == 2
    assert cli.main(["reconstruct", *images, "--K0", "1", "1", "1", "1", "--out", str(tmp_path / "p")]) == 2
    assert not (tmp_path / "p").exists()
    assert "c.jpg: no such file" in capsys.readouterr().err


def test_panorama_puts_both_images_in_their_places():
    scene = np.random.default_rng(0).integers(0, 255, (15, 25, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    image0, image1 = scene[:100, :130], scene[10:110, 60:190]
    blended, overlay = panorama(image0, image1, np.array([[1.0, 0, -60], [0, 1, -10], [0, 0, 1]]))
    assert blended.shape == (110, 190, 3)
    np.testing.assert_array_equal(blended[:100, :60], image0[:, :60])
    np.testing.assert_array_equal(blended[10:, 130:], image1[:, 70:])
    np.testing.assert_array_equal(blended[10:100, 60:130], scene[10:100, 60:130])
    np.testing.assert_array_equal(overlay[50, 30], np.rint(np.full(3, scene[60, 90] @ [0.299, 0.587, 0.114])))


def test_horizon_is_refused():
    image = np.zeros((100, 100, 3), np.uint8)
    with pytest.raises(ValueError, match="reaches the horizon"):
        panorama(image, image, np.array([[1.0, 0, 0], [0, 1, 0], [-0.011, 0, 1]]))


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.eye(3)[:2], np.diag([100, np.nan, 1]), np.diag([100, -100, 1])])
def test_intrinsics_that_are_none_are_named(bad):
    matches, *_ = world()
    with pytest.raises(ValueError, match=r"^K1: found"):
        two_view.reconstruct(matches, K, bad)


def test_panorama_in_strips_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    image0, image1 = (rng.integers(0, 255, (60, 50, 3), np.uint8) for _ in range(2))
    H = np.array([[1.1, 0.05, -20], [0.02, 0.95, 12], [1e-4, -5e-5, 1]])
    whole = panorama(image0, image1, H)[0]
    monkeypatch.setattr("gim_jax.tasks.panorama.ROWS", 7)
    np.testing.assert_array_equal(panorama(image0, image1, H)[0], whole)
