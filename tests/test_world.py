"""The rendered world: exact truth, pictures that agree with it, deterministic and whole output."""

import dataclasses
import json
import os

import av
import cv2
import numpy as np
import pytest

from data_prep import raster, render, world
from data_prep.folder import write_folder
from data_prep.truth import Truth
from data_prep.world import WorldConfig, correspondence_error

SIZE = (160, 120)
SMALL = WorldConfig(seed=3, seconds=1, fps=20, size=SIZE, num_movers=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A video of 20 frames with one cut."""
    return world.render(tmp_path_factory.mktemp("world") / "out", dataclasses.replace(SMALL, num_cuts=1))


@pytest.fixture(scope="module")
def shot():
    """A walk of 30 frames at a size where texture can be compared."""
    return render.plan_shot((7, 0), "brick", (320, 240), 65.0, 30, 30.0, 1.3, 8)


def shot_truth(shot, size):
    num = len(shot.T_world_to_camera)
    drawn = [render.draw(shot, frame) if frame in (0, 10) else None for frame in range(num)]
    truth = Truth(
        np.repeat(shot.K[None], num, 0), shot.T_world_to_camera, np.zeros(num, int), size, 30.0, {}, shot.town.quads,
        lambda frame: drawn[frame][1] + 1,
    )  # fmt: skip
    return truth, drawn


def plane_truth(ids1):
    """One square of 4 m, 5 m before camera 0 (world axes = its axes); camera 1 is moved and turned."""
    K = np.array([[100.0, 0, 79.5], [0, 110.0, 59.5], [0, 0, 1]])
    T1 = np.eye(4)
    T1[:3, :3] = cv2.Rodrigues(np.array([0.05, -0.2, 0.1]))[0]
    T1[:3, 3] = (0.4, -0.1, -0.6)
    quads = np.array([[[-2, -2, 5], [4, 0, 0], [0, 4, 0]], [[-2, -2, 2], [4, 0, 0], [0, 4, 0]]], float)
    ids = [np.ones((120, 160), int), ids1]
    return Truth(np.stack([K, K]), np.stack([np.eye(4), T1]), np.zeros(2, int), SIZE, 1.0, {}, quads, ids.__getitem__)


def test_correspondences_on_a_plane_equal_opencv_projection():
    truth = plane_truth(np.ones((120, 160), int))
    kpts0 = np.random.default_rng(0).uniform((50, 30), (110, 90), (200, 2))
    K = truth.K[0]
    points = np.stack([(kpts0[:, 0] - 79.5) / 100 * 5, (kpts0[:, 1] - 59.5) / 110 * 5, np.full(200, 5.0)], 1)
    rvec = np.array([0.05, -0.2, 0.1])
    expected = cv2.projectPoints(points, rvec, np.array([0.4, -0.1, -0.6]), K, None)[0][:, 0]
    kpts1, valid = truth.correspond(0, kpts0, 1)
    inside = ((expected > -0.5) & (expected < (159.5, 119.5))).all(1)
    np.testing.assert_array_equal(valid, inside)
    assert valid.sum() > 100
    np.testing.assert_allclose(kpts1[valid], expected[valid], atol=1e-8)
    error, known = correspondence_error(truth, 0, 1, kpts0, expected + (3.0, 4.0))
    np.testing.assert_allclose(error[known], 5.0, atol=1e-8)
    assert np.isinf(error[~known]).all()


def test_points_behind_another_surface_are_valid_but_not_visible():
    ids1 = np.ones((120, 160), int)
    ids1[:, 90:] = 2  # something nearer fills the right of image 1
    truth = plane_truth(ids1)
    kpts0 = np.random.default_rng(1).uniform((50, 30), (110, 90), (300, 2))
    kpts1, valid, visible = truth.correspond_visible(0, kpts0, 1)
    left, right = valid & (kpts1[:, 0] < 88), valid & (kpts1[:, 0] > 92)
    assert left.sum() > 50 and right.sum() > 20
    assert visible[left].all() and not visible[right].any()


def test_every_pixel_shows_the_nearest_surface_its_ray_meets():
    rng, size, num = np.random.default_rng(3), (64, 48), 900
    K = np.array([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]])
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = cv2.Rodrigues(np.array([0.3, -0.5, 0.2]))[0], (0.5, -1.0, 2.0)
    z = rng.uniform(3, 12, num)
    middle = np.stack([rng.uniform(-0.7, 0.7, num) * z, rng.uniform(-0.6, 0.6, num) * z, z], 1)
    edges = rng.normal(0, 1, (2, num, 3)) * rng.uniform(0.1, 0.5, (num, 1))
    middle[:2], edges[:, :2] = [[0, 0, 9], [0, 0.5, 0.5]], [[[30, 0, 12], [1, 0, 0.2]], [[0, 20, 0], [0, 0.1, -3]]]
    # The first is a slanted wall that hides many others, the second reaches behind the camera.
    in_camera = np.stack([middle - edges.sum(0) / 2, *edges], 1)
    quads = in_camera @ T[:3, :3]  # from camera to world axes
    quads[:, 0] -= T[:3, 3] @ T[:3, :3]
    y, x = np.mgrid[0:48, 0:64]
    rays = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1) @ np.linalg.inv(K).T @ T[:3, :3]
    centre = -T[:3, :3].T @ T[:3, 3]
    best, expected = np.full(x.size, np.inf), np.full(x.size, -1)
    for k, (origin, right, down) in enumerate(quads):
        normal = np.cross(down, right)
        height = normal @ (centre - origin)
        if height <= 0:  # seen from behind
            continue
        depth = -height / (rays @ normal)
        hit = centre + rays * depth[:, None] - origin
        s, t = np.linalg.lstsq(np.stack([right, down], 1), hit.T, rcond=None)[0]
        seen = (depth > 0) & (depth < best) & (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)
        best[seen], expected[seen] = depth[seen], k
    found = render.surface_ids(quads, T, K, size).ravel()
    assert (found != expected).mean() < 2e-3  # pixel centres on an edge may fall either way
    assert len(np.unique(expected)) > 50


def test_a_texture_lies_where_its_surface_is():
    ramp = np.linspace(20, 235, 64)
    texture = np.dstack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64))])
    ripmap = raster.build_ripmap(np.rint(texture).astype(np.uint8))
    K = np.array([[100.0, 0, 79.5], [0, 110.0, 59.5], [0, 0, 1]])
    origin, right, down = np.array([-1.5, -1.0, 4.0]), np.array([3.0, 0.2, 2.0]), np.array([0.1, 2.0, 0.3])
    s, t = np.random.default_rng(2).uniform(0.05, 0.95, (2, 500))
    points = origin + s[:, None] * right + t[:, None] * down
    x, y = (points @ K.T)[:, :2].T / points[:, 2]
    M = raster.pixel_maps(np.stack([right, down, origin], 1)[None], K)[0]
    colour = raster.sample(ripmap, M, x.astype(np.float32), y.astype(np.float32))
    # Texel i spans i/64 to (i + 1)/64, so place s is texel 64 s - 0.5; a texel is 3.4 levels of the ramp.
    np.testing.assert_allclose(colour[:, 0], np.interp(64 * s - 0.5, np.arange(64), ramp), atol=1.3)
    np.testing.assert_allclose(colour[:, 1], np.interp(64 * t - 0.5, np.arange(64), ramp), atol=1.3)


def test_pictures_agree_with_the_truth(shot):
    truth, drawn = shot_truth(shot, (320, 240))
    grey = [cv2.cvtColor(drawn[f][0], cv2.COLOR_RGB2GRAY).astype(np.float32) for f in (0, 10)]
    centres = np.stack(np.meshgrid(np.arange(12, 308, 8), np.arange(12, 228, 8)), -1).reshape(-1, 2)
    offsets = np.stack(np.meshgrid(np.arange(-4, 5), np.arange(-4, 5)), -1).reshape(-1, 2)
    kpts0 = (centres[:, None] + offsets).reshape(-1, 2)
    kpts1, _, visible = truth.correspond_visible(0, kpts0, 10)
    whole = visible.reshape(-1, 81).all(1)
    first = grey[0][kpts0[:, 1], kpts0[:, 0]].reshape(-1, 81)
    textured = whole & (first.std(1) > 12)
    assert textured.sum() > 100

    def similarity(shift):
        xy = (kpts1 + shift).astype(np.float32)
        rows = [cv2.remap(grey[1], part[:, :1], part[:, 1:], cv2.INTER_LINEAR) for part in np.array_split(xy, 8)]
        second = np.concatenate(rows).reshape(-1, 81)
        a, b = (v[textured] - v[textured].mean(1, keepdims=True) for v in (first, second))
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1) + 1e-6)

    right, half, wrong = np.median(similarity((0, 0))), np.median(similarity((0.7, 0.7))), np.median(similarity((5, 0)))
    assert right > 0.9
    assert half < right - 0.02  # truth is not off by a fraction of a pixel
    assert wrong < 0.5


def test_walkers_have_no_truth(shot):
    frame = next(f for f in range(0, 30, 3) if (render.draw(shot, f)[1] != empty_draw(shot, f)[1]).sum() > 200)
    (image, surface), (empty, static) = render.draw(shot, frame), empty_draw(shot, frame)
    changed = np.abs(image.astype(int) - empty.astype(int)).max(2) > 30
    # Silhouettes are softened, so a change may reach one pixel beyond the walker.
    walker = cv2.dilate((surface != static).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    assert changed.sum() > 100 and not (changed & ~walker).any()
    assert (surface[surface != static] == -1).all()


def empty_draw(shot, frame):
    return render.draw(dataclasses.replace(shot, feet=shot.feet[:, :0]), frame)


def test_nothing_is_valid_across_a_cut(folder):
    truth = Truth.load(folder)
    cut = int(np.flatnonzero(np.diff(truth.shot))[0])
    kpts = np.stack(np.meshgrid(np.arange(0, 160, 4), np.arange(0, 120, 4)), -1).reshape(-1, 2)
    assert truth.correspond(cut - 1, kpts, cut)[1].mean() > 0.5
    for result in truth.correspond_visible(cut, kpts, cut + 1)[1:]:
        assert not result.any()


def test_the_same_seed_gives_the_same_frames():
    config = dataclasses.replace(SMALL, seconds=0.2)
    first, again = list(world.frames(config, 1)), list(world.frames(config, 3))
    assert len(first) == 4
    for (image0, ids0), (image1, ids1) in zip(first, again):
        np.testing.assert_array_equal(image0, image1)
        np.testing.assert_array_equal(ids0, ids1)
    other = next(world.frames(dataclasses.replace(config, seed=4), 1))[0]
    assert np.abs(other.astype(int) - first[0][0]).mean() > 10


def test_the_folder_is_whole_and_is_not_written_twice(folder):
    truth = Truth.load(folder)
    with av.open(str(folder / "video.mp4")) as video:
        decoded = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    drawn = list(world.frames(dataclasses.replace(SMALL, num_cuts=1)))
    assert len(decoded) == len(truth) == len(drawn) == 20
    for k in (0, 19):
        assert np.abs(decoded[k].astype(int) - drawn[k][0]).mean() < 8  # what H.264 and its half-size colour change
        np.testing.assert_array_equal(truth.ids(k), drawn[k][1])
    before = (folder / "video.mp4").stat().st_mtime_ns
    world.render(folder, dataclasses.replace(SMALL, num_cuts=1))
    assert (folder / "video.mp4").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another seed"):
        world.render(folder, dataclasses.replace(SMALL, num_cuts=1, seed=8))
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


def test_depth_map_equals_the_depth_of_its_pixels(folder):
    truth = Truth.load(folder)
    kpts = np.stack(np.meshgrid(np.arange(160), np.arange(120)), -1).reshape(-1, 2)
    ids, depth = truth.surface(4, kpts)
    inner = ids > 0
    # At a pixel centre the nearest covering surface is the one that was drawn, but for centres on an edge.
    same = np.isclose(depth[inner], truth.depth(4).ravel()[inner], rtol=1e-9)
    assert inner.mean() > 0.4 and same.mean() > 0.999
    assert (truth.depth(4)[truth.ids(4) == 0] == 0).all()


def test_the_overlay_has_no_truth():
    config = dataclasses.replace(SMALL, seconds=0.1, overlay=True)
    plain = next(world.frames(dataclasses.replace(config, overlay=False)))
    image, ids = next(world.frames(config))
    changed = (image != plain[0]).any(2)
    assert changed.sum() > 100 and (ids[changed] == 0).all()


def test_poses_of_a_pair_file_agree_with_its_pictures(tmp_path):
    out = world.render_pairs(tmp_path / "pairs", seed=6, num_pairs=4, size=(320, 240))
    lines = (out / "pairs_with_gt.txt").read_text().splitlines()
    assert len(lines) == 4
    right, wrong = [], []
    for line in lines:
        tokens = line.split()
        assert len(tokens) == 38
        K0, K1, T = (np.array(tokens[a:b], float) for a, b in ((4, 13), (13, 22), (22, 38)))
        T = T.reshape(4, 4)
        np.testing.assert_allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.linalg.norm(T[:3, 3]) > 0.3
        kpts = sift_matches(*(cv2.imread(str(out / name), 0) for name in tokens[:2]))
        right.append(epipolar_share(kpts, K0.reshape(3, 3), K1.reshape(3, 3), T))
        wrong.append(epipolar_share(kpts, K0.reshape(3, 3), K1.reshape(3, 3), np.linalg.inv(T)))
    assert np.median(right) > 0.7 and np.median(wrong) < 0.4


def sift_matches(image0, image1):
    sift = cv2.SIFT_create(nfeatures=2000, contrastThreshold=1e-3)
    (kpts0, desc0), (kpts1, desc1) = (sift.detectAndCompute(image, None) for image in (image0, image1))
    pairs = [m for m, n in cv2.BFMatcher().knnMatch(desc0, desc1, k=2) if m.distance < 0.75 * n.distance]
    assert len(pairs) > 20
    return np.array([[*kpts0[m.queryIdx].pt, *kpts1[m.trainIdx].pt] for m in pairs])


def epipolar_share(kpts, K0, K1, T):
    """Share of matches within 2 px of the epipolar line of X1 = T X0."""
    tx, ty, tz = T[:3, 3]
    E = np.array([[0, -tz, ty], [tz, 0, -tx], [-ty, tx, 0]]) @ T[:3, :3]
    F = np.linalg.inv(K1).T @ E @ np.linalg.inv(K0)
    lines = cv2.computeCorrespondEpilines(kpts[:, None, :2], 1, F)[:, 0]
    return (np.abs((lines[:, :2] * kpts[:, 2:]).sum(1) + lines[:, 2]) < 2).mean()


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", (161, 120)), ("size", (32, 32)), ("seconds", 0.0), ("fps", 0.0), ("seed", -1), ("look", "moon"),
     ("num_cuts", 99), ("num_movers", -1), ("speed_m_s", 0.0), ("fov_deg", 5.0), ("crf", 99),
     ("seconds", float("nan"))],
)  # fmt: skip
def test_bad_values_are_named_and_nothing_is_written(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        world.render(tmp_path / "out", dataclasses.replace(SMALL, **{field: value}))
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        world.render(tmp_path, SMALL)
    with pytest.raises(ValueError, match="num_pairs"):
        world.render_pairs(tmp_path / "pairs", num_pairs=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_what_a_killed_run_left_does_not_stand_in_the_way(tmp_path):
    """Of the same process number, as in containers."""
    left = tmp_path / f".town.tmp-{os.getpid()}"
    left.mkdir()
    (left / "part").touch()
    out = write_folder(tmp_path / "town", {"seed": 1}, lambda folder: (folder / "whole").touch())
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "whole"] and not left.exists()
    for text, words in (('{"seed": ', "not a whole JSON file"), ("[1]", "was not written by this program")):
        (out / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"town.*: .*{words}"):
            write_folder(out, {"seed": 1}, lambda folder: None)


def test_a_damaged_truth_is_one_clear_error(folder, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Truth.load(tmp_path)
    (tmp_path / "truth.npz").write_bytes((folder / "truth.npz").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        Truth.load(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    assert Truth.load(folder).config == settings
