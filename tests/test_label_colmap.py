"""Labels from COLMAP's tracks: of a made scene they are the projections, and what is not placed has a reason."""

import numpy as np
import pytest

from data_prep import colmap, label, manifest
from data_prep.fitting import PairLabels
from gim_jax import cli, image
from gim_jax.config import load_config
from tests.test_label import pan
from tests.test_video import write_video

pytest.importorskip("pycolmap", reason="extra sfm is not installed")
SIZE, NUM_FRAMES, FOCAL = (320, 240), 10, 384


def surface_z(x, y):
    return 7 + 0.8 * np.sin(x) + 0.6 * np.cos(1.3 * y)


def pose(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and centre of a camera that walks sideways and turns."""
    c, s = np.cos(0.02 * k), np.sin(0.02 * k)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), np.array([0.25 * k, 0.02 * k, 0.05 * k])


def project(X: np.ndarray, k: int) -> np.ndarray:
    R, centre = pose(k)
    seen = (X - centre) @ R.T
    return seen[:, :2] / seen[:, 2:] * FOCAL + [159.5, 119.5]


def on_surface(k: int, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rays of pixels [N, 2] meet the surface: points [N, 3] and their depths [N] in the camera."""
    R, centre = pose(k)
    rays = np.concatenate([(pixels - [159.5, 119.5]) / FOCAL, np.ones((len(pixels), 1))], 1) @ R
    depth = np.full(len(pixels), 7.0)
    for _ in range(60):
        X = centre + depth[:, None] * rays
        depth += 0.5 * (surface_z(X[:, 0], X[:, 1]) - X[:, 2]) / rays[:, 2]
    return centre + depth[:, None] * rays, depth


def projections() -> np.ndarray:
    """[NUM_FRAMES, 400, 2] px: points of the surface before the camera."""
    x, y = np.random.default_rng(0).uniform([-4, -2], [6, 2], (400, 2)).T
    X = np.stack([x, y, surface_z(x, y)], 1)
    return np.array([project(X, k) for k in range(NUM_FRAMES)])


def direct_rows(views: np.ndarray, last: int) -> dict[int, list[PairLabels]]:
    """Exact matches 1, 2 and 4 frames apart, none of frames from `last` on."""
    rows = {}
    for step in (1, 2, 4):
        rows[step] = []
        for start in range(NUM_FRAMES - step):
            one, two = views[start], views[start + step]
            both = ((one > 0) & (one < SIZE) & (two > 0) & (two < SIZE)).all(1)
            if start + step >= last:
                rows[step].append(PairLabels.none("dark", 1))
                continue
            xy = np.concatenate([one, two], 1)[both].astype(np.float32)
            num = len(xy)
            counts = np.array([num], np.int32)
            rows[step].append(PairLabels(xy, np.ones(num), np.zeros(num, int), "F", "", counts, counts))
    return rows


def test_tracks_are_the_projections_and_reach_beyond_the_matches(tmp_path):
    views, last = projections(), 9
    blank = image.encode_jpeg(np.zeros((SIZE[1], SIZE[0], 3), np.uint8), 90)
    rows = direct_rows(views, last)
    clip = colmap.reconstruct(rows, ("rootsift",), lambda frame: blank, tmp_path, NUM_FRAMES)
    assert clip is not None and not list(tmp_path.iterdir()), "temporary files are gone"
    assert clip.placed.tolist() == [k < last for k in range(NUM_FRAMES)]
    levels = colmap.levels(clip, min_matches=20)
    assert [level.step for level in levels] == [1, 2, 4, 8], "matched at 4 at most"
    for level in levels:
        for start in np.flatnonzero(level.counts):
            pair = level.pair(start)
            nearest = np.linalg.norm(views[start][None] - pair["xy"][:, None, :2], axis=2)
            point = nearest.argmin(1)
            assert nearest.min(1).max() < 0.01, "COLMAP's half pixel is taken off again"
            np.testing.assert_allclose(pair["xy"][:, 2:], views[start + level.step][point], atol=0.01)
            assert (pair["hops"] > 1).all()
    summary = manifest.Summary(
        best=np.zeros(NUM_FRAMES, int), still=np.zeros(NUM_FRAMES, bool), unplaced=np.arange(NUM_FRAMES) == 3
    )
    reasons = manifest.reasons(rows, summary, 20)
    assert "reconstruction" in reasons[3] and reasons[8] == "dark" and reasons[9] == "the video ends"


def true_stereo(folder, hole: slice) -> None:
    """What COLMAP's stereo would write, without its GPU: depths of the surface, none in the rows of a hole."""
    import pycolmap

    images = pycolmap.Reconstruction(folder / "sparse").images.values()
    centres = {int(picture.name.split(".")[0]): picture.projection_center() for picture in images}
    ends = min(centres), max(centres)
    scale = np.linalg.norm(np.subtract(*(centres[k] for k in ends))) / np.linalg.norm(
        np.subtract(*(pose(k)[1] for k in ends))
    )
    (folder / "stereo" / "depth_maps").mkdir(parents=True, exist_ok=True)
    for picture in images:
        width, height = picture.camera.width, picture.camera.height
        pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2) + 0.5
        rays = (pixels - picture.camera.calibration_matrix()[:2, 2]) / picture.camera.focal_length_x
        depth = on_surface(int(picture.name.split(".")[0]), rays * FOCAL + [159.5, 119.5])[1].reshape(height, width)
        depth[hole] = 0
        depth_map = pycolmap.DepthMap.from_array((scale * depth).astype(np.float32), 0.1, 100)
        depth_map.write(folder / "stereo" / "depth_maps" / f"{picture.name}.geometric.bin")


def test_dense_labels_lie_on_a_grid_and_follow_the_surface(tmp_path, monkeypatch):
    import pycolmap

    views, hole = projections(), slice(100, 140)
    blank = image.encode_jpeg(np.zeros((SIZE[1], SIZE[0], 3), np.uint8), 90)
    monkeypatch.setattr(pycolmap, "patch_match_stereo", lambda folder: true_stereo(folder, hole))
    clip = colmap.reconstruct(
        direct_rows(views, 9), ("rootsift",), lambda frame: blank, tmp_path, NUM_FRAMES, dense=True
    )
    assert clip is not None and clip.placed.tolist() == [k < 9 for k in range(NUM_FRAMES)]
    assert len(clip.pair(0, 9)["xy"]) == 0
    xy = clip.pair(0, 8)["xy"]
    X, _ = on_surface(0, xy[:, :2])
    np.testing.assert_allclose(xy[:, 2:], project(X, 8), atol=0.1)
    assert len(xy) > 300, "of 1200 points of the grid, half of them outside the other frame, a sixth in the hole"
    assert not ((xy[:, 1] > 101) & (xy[:, 1] < 138)).any() and not ((xy[:, 3] > 101) & (xy[:, 3] < 138)).any()


def test_dense_labels_without_a_gpu_are_refused(tmp_path, capsys):
    import pycolmap

    if pycolmap.has_cuda:
        pytest.skip("pycolmap has CUDA")
    command = ["label", "v.mp4", "--out", str(tmp_path / "o"), "--config=configs/label.py:colmap_dense"]
    assert cli.main(command) == 2
    assert "pycolmap-cuda12" in capsys.readouterr().err


def test_nothing_to_match_is_no_model(tmp_path):
    rows = direct_rows(projections(), 0)
    assert colmap.reconstruct(rows, ("rootsift",), lambda frame: b"", tmp_path, NUM_FRAMES) is None


def test_a_video_is_reconstructed_clip_by_clip_from_its_frames(tmp_path, monkeypatch):
    """12 sampled frames in clips of 5: 5, 5 and 2 frames; each clip reads its own frames, and places the first."""
    clips = []

    def reconstruct(rows, labellers, picture, folder, num_frames, dense=False):
        shown = [image.decode_image(picture(k), "frame").mean() for k in range(num_frames)]
        clips.append((num_frames, shown))
        return colmap.Clip(np.arange(num_frames) == 0, lambda start, end: {"xy": np.zeros((0, 4)), "conf": np.zeros(0)})

    frames = [np.clip(f // 2 + 10 * k, 0, 255).astype(np.uint8) for k, f in enumerate(pan(12, 2, 0))]
    write_video(tmp_path / "v.mp4", frames, options={"crf": "6"})
    monkeypatch.setattr(colmap, "reconstruct", reconstruct)
    settings = ["every_frames=1", "clip_samples=5", "workers=1", "min_matches=2000"]
    config = load_config("configs/label.py:colmap", [f"--config.{text}" for text in settings])
    labels = label.label_in_memory(tmp_path / "v.mp4", config)
    assert [num for num, _ in clips] == [5, 5, 2]
    levels = np.concatenate([shown for _, shown in clips])
    np.testing.assert_allclose(np.diff(levels), 10, atol=3)  # every frame once, each lighter than the one before
    lost = [k for k, why in enumerate(labels.reasons) if "does not place" in why]
    assert lost == [k for k in range(11) if k % 5], "the last frame has no next one"


@pytest.mark.parametrize("key, value", [("source", "colmpa"), ("link_rule", "papers")])
def test_a_choice_that_does_not_exist_is_one_line(tmp_path, capsys, key, value):
    assert cli.main(["label", "v.mp4", "--out", str(tmp_path / "o"), f"--config.{key}={value}"]) == 2
    assert f"{key}: found '{value}'" in capsys.readouterr().err
