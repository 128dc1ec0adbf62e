"""Registration by bird's-eye views: the motion is found where it is known, and refused where there is none."""

import json

import numpy as np
import pytest

from gim_jax import api, cli
from gim_jax.tasks import bev
from gim_jax.tasks.clouds import Cloud
from gim_jax.types import Matches


def rotation_z(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def town(seed: int = 0) -> np.ndarray:
    """Walls of random houses and a sloping ground: [N, 3]."""
    rng, parts = np.random.default_rng(seed), []
    for _ in range(60):
        middle, size, angle = rng.uniform(-30, 30, 2), rng.uniform(1, 5, 2), rng.uniform(0, 180)
        sides = np.concatenate(
            [np.c_[u := np.linspace(-1, 1, 60), 0 * u - 1], np.c_[0 * u + 1, u], np.c_[u, 0 * u + 1]]
        )
        wall = np.c_[sides * size, np.zeros(len(sides))] @ rotation_z(angle).T + [*middle, 0]
        parts += [wall + [0, 0, height] for height in np.linspace(0, rng.uniform(2, 6), 12)]
    return np.concatenate(parts)


def error(found: bev.Registration, T: np.ndarray, points: np.ndarray) -> float:
    """Median distance of points from where they belong."""
    delta = found.T_0to1 - T
    return float(np.median(np.linalg.norm(points @ delta[:3, :3].T + delta[:3, 3], axis=1)))


def test_motion_is_found_among_outliers():
    rng = np.random.default_rng(0)
    points0 = rng.uniform(0, 100, (300, 2))
    R, t = rotation_z(70)[:2, :2], np.array([12.0, -7.0])
    points1 = points0 @ R.T + t
    points1[90:] = rng.uniform(0, 100, (210, 2))
    turn, shift, inliers = bev.fit_plane_motion(points0, points1, 0.5)
    np.testing.assert_allclose(turn, R, atol=2e-4)
    np.testing.assert_allclose(shift, t, atol=2e-2)
    assert inliers[:90].all() and inliers[90:].sum() < 5


def test_similarity_tells_the_scale():
    points0 = np.random.default_rng(0).uniform(0, 100, (50, 2))
    turn, shift, inliers = bev.fit_plane_motion(points0, 1.5 * points0 + [3, 4], 0.5, with_scale=True)
    np.testing.assert_allclose(turn, 1.5 * np.eye(2), atol=1e-9)
    np.testing.assert_allclose(shift, [3, 4], atol=1e-9)
    assert inliers.all()


@pytest.mark.parametrize("up", [(0, 0, 1), (0, -1, 0), (0, 0, -1), (1, 2, 3)])
def test_rotation_to_z_is_a_rotation_that_lifts(up):
    R = bev.rotation_to_z(up)
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(R) == pytest.approx(1)
    np.testing.assert_allclose(R @ up / np.linalg.norm(up), [0, 0, 1], atol=1e-12)


def test_view_puts_points_where_its_pixels_say():
    points = np.array([[0.0, 0, 1], [10, 0, 2], [10, 20, 3], [10, 20, 5]])
    colors = np.array([[9, 9, 9], [0, 200, 0], [50, 0, 0], [0, 0, 250]], np.uint8)
    view = bev.view_from_above(points, colors, 0.5, "color")
    pixels = view.to_pixel(points[:, :2])
    np.testing.assert_allclose(view.to_metric(pixels), points[:, :2], atol=1e-9)
    x, y = np.rint(pixels).astype(int).T
    assert y[0] > y[2] and x[1] > x[0]  # north up
    np.testing.assert_array_equal(view.image[y[1], x[1]], [1, 200, 1])
    np.testing.assert_array_equal(view.image[y[2], x[2]], [1, 1, 250])  # of the highest point
    assert view.height[y[2], x[2]] == 5 and view.count[y[2], x[2]] == 2


@pytest.mark.parametrize("up", [(0, 0, 1), (0, 1, 0)])
def test_town_is_laid_onto_itself(up):
    points, T = town(), np.eye(4)
    T[:3, :3], T[:3, 3] = rotation_z(130), [500_000.0, 4_000_000.0, 12.0]  # national grids have such offsets
    U = bev.rotation_to_z(up)
    lift = np.eye(4)
    lift[:3, :3] = U
    moved = points @ T[:3, :3].T + T[:3, 3]
    found = bev.register(Cloud(points @ U), Cloud(moved @ U), api.load_matcher("rootsift"), up=up)
    assert found.T_0to1 is not None and found.overlap > 0.95
    assert error(found, lift.T @ T @ lift, points @ U) < found.views[0].resolution
    assert found.yaw_deg == pytest.approx(130, abs=0.2)


def test_other_town_is_refused():
    found = bev.register(Cloud(town(0)), Cloud(town(1)), api.load_matcher("rootsift"))
    assert found.T_0to1 is None and "chance explains" in found.reason and not found.inliers.any()


def test_wrong_scale_is_refused():
    found = bev.register(Cloud(town()), Cloud(town() * 1.3), api.load_matcher("rootsift"), resolution=0.1)
    assert found.T_0to1 is None and "a scale of 1.3" in found.reason


def test_turned_views_give_points_of_the_view():
    points = town()
    moved = points @ rotation_z(180).T

    def matcher(image0, image1):  # knows no rotation: matches equal pixels of equal pictures
        if image0.shape != image1.shape or np.abs(image0.astype(int) - image1).mean() > 3:
            return Matches(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), (1, 1), (1, 1))
        y, x = np.nonzero(image1[::7, ::7, 0])
        kpts = np.stack([x * 7, y * 7], 1).astype(np.float32)
        return Matches(kpts, kpts, np.ones(len(kpts)), (1, 1), (1, 1))

    found = bev.register(Cloud(points), Cloud(moved), matcher, quarter_turns=(0, 1, 2, 3), resolution=0.25)
    assert abs(found.yaw_deg) == pytest.approx(180, abs=0.5)
    assert error(found, np.diag([-1.0, -1, 1, 1]), points) < 0.25


REAL = {"pcd_pcl_room": (0.25, 0.03), "pcd_small_gicp": (0.09, 0.03)}  # median m: a 1.3 degree tilt is left without ICP


@pytest.mark.parametrize("name", REAL)
def test_real_scans_agree_with_the_truth(shared, tmp_path, name):
    folder = shared / "data" / name
    T, points = np.loadtxt(folder / "T_target_source.txt"), np.load(folder / "source.npy").astype(float)
    icp = pytest.importorskip("importlib.util").find_spec("small_gicp") is not None
    command = ["register", str(folder / "source.npy"), str(folder / "target.npy"), "--json", str(tmp_path / "a.json")]
    assert cli.main(command + ["--out", str(tmp_path / "a.png")] + ["--icp"] * icp) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    delta = np.array(record["T_0to1"]) - T
    off = np.median(np.linalg.norm(points @ delta[:3, :3].T + delta[:3, 3], axis=1))
    assert off < REAL[name][icp]
    assert record["num_inliers"] == len(record["inliers0"]) and (tmp_path / "a.png").stat().st_size > 10_000


def test_raster_of_a_scan_is_not_taken_for_the_room(shared):
    """Turned so, the finest views agree on the sensor's raster, 43 degrees off; coarser ones see the walls."""
    folder = shared / "data/pcd_pcl_room"
    source, target = (np.load(folder / f"{name}.npy").astype(float) for name in ("source", "target"))
    move = np.eye(4)
    move[:3, :3], move[:2, 3] = rotation_z(-45), (9.7, 3.6)
    moved = source @ move[:3, :3].T + move[:3, 3]
    found = bev.register(Cloud(moved, None), Cloud(target, None), api.load_matcher("rootsift"))
    wanted = np.loadtxt(folder / "T_target_source.txt") @ np.linalg.inv(move)
    assert error(found, wanted, moved) < 0.3


def test_command_says_that_there_is_no_motion(tmp_path, capsys):
    for seed in (0, 1):
        np.save(tmp_path / f"{seed}.npy", town(seed)[::4])
    files = [str(tmp_path / f"{seed}.npy") for seed in (0, 1)]
    assert cli.main(["register", *files, "--json", str(tmp_path / "a.json")]) == 1
    assert json.loads((tmp_path / "a.json").read_text())["T_0to1"] is None
    assert cli.main(["register", files[0], str(tmp_path / "none.ply")]) == 2
    assert "none.ply: no such file" in capsys.readouterr().err
