"""Labels from COLMAP's tracks: of a made scene they are the projections, and what is not placed has a reason."""

import numpy as np
import pytest

from data_prep import colmap, manifest
from data_prep.fitting import PairLabels
from gim_jax import cli, image

pytest.importorskip("pycolmap", reason="extra sfm is not installed")
SIZE, NUM_FRAMES = (320, 240), 10


def projections() -> np.ndarray:
    """[NUM_FRAMES, 400, 2] px: points before a camera that walks sideways and turns."""
    rng = np.random.default_rng(0)
    X = rng.uniform([-4, -2, 5], [6, 2, 9], (400, 3))
    views = []
    for k in range(NUM_FRAMES):
        c, s = np.cos(0.02 * k), np.sin(0.02 * k)
        seen = (X - [0.25 * k, 0.02 * k, 0.05 * k]) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T
        views.append(seen[:, :2] / seen[:, 2:] * 384 + [159.5, 119.5])
    return np.array(views)


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
    model = colmap.reconstruct(rows, ("rootsift",), lambda frame: blank, tmp_path)
    assert model is not None and not list(tmp_path.iterdir()), "temporary files are gone"
    seen = colmap.observations(model, NUM_FRAMES)
    assert [len(frame["ids"]) > 0 for frame in seen] == [k < last for k in range(NUM_FRAMES)]
    levels = colmap.levels(seen, min_matches=20)
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


def test_nothing_to_match_is_no_model(tmp_path):
    assert colmap.reconstruct(direct_rows(projections(), 0), ("rootsift",), lambda frame: b"", tmp_path) is None


@pytest.mark.parametrize("key, value", [("source", "colmpa"), ("link_rule", "papers")])
def test_a_choice_that_does_not_exist_is_one_line(tmp_path, capsys, key, value):
    assert cli.main(["label", "v.mp4", "--out", str(tmp_path / "o"), f"--config.{key}={value}"]) == 2
    assert f"{key}: found '{value}'" in capsys.readouterr().err
