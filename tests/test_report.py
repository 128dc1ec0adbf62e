"""The report of a labelling folder: what it says of pairs, yields, losses and machines."""

import json

import numpy as np
import pytest

from data_prep.manifest import EDGES, FOCAL, histograms, pair_statistics, shown_pairs
from gim_jax import report

SIZE = (640, 480)
K = np.array([[FOCAL * 640, 0, 319.5], [0, FOCAL * 640, 239.5], [0, 0, 1]])


def turned(angle_deg: float) -> np.ndarray:
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def views(R: np.ndarray, t: np.ndarray, depth: tuple[float, float]) -> np.ndarray:
    """Correspondences [300, 4] px of points in front of two cameras, those in both frames."""
    rng = np.random.default_rng(0)
    kpts0 = rng.uniform(0, 1, (600, 2)) * SIZE
    X = np.c_[kpts0, np.ones(600)] @ np.linalg.inv(K).T * rng.uniform(*depth, (600, 1))
    x1 = (X @ R.T + t) @ K.T
    xy = np.c_[kpts0, x1[:, :2] / x1[:, 2:]]
    return xy[((xy[:, 2:] > 0) & (xy[:, 2:] < SIZE)).all(1)]


def test_rotation_and_parallax_of_known_cameras():
    """A turn of 8 degrees with a sideways step of 1 at depth 20: atan(1 / 20) = 2.9 degrees at most."""
    R, t = turned(8.0), np.array([1.0, 0.0, 0.0])
    skew = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    F = np.linalg.inv(K).T @ skew @ R @ np.linalg.inv(K)
    found = pair_statistics(views(R, t, (20, 20.001)), F, SIZE, 1.5)
    assert found.rotation_deg == pytest.approx(8.0, abs=0.1)
    assert 2.3 < found.parallax_deg < 2.9
    only = pair_statistics(views(R, np.zeros(3), (1, 30)), None, SIZE, 1.5)
    assert only.rotation_deg == pytest.approx(8.0, abs=1e-3) and only.parallax_deg < 1e-3


def test_overlap_is_the_smaller_hull():
    """The left half of frame 0 covers all of frame 1: half of one frame, all of the other."""
    x, y = np.meshgrid(np.linspace(0, 320, 20), np.linspace(0, 480, 20))
    xy = np.stack([x, y, 2 * x, y], -1).reshape(-1, 4)
    assert pair_statistics(xy, None, SIZE, 0.0).overlap == pytest.approx(0.5)


def test_histograms_count_every_pair_once_and_the_shown_ones_are_ranked():
    pairs = [
        pair_statistics(views(np.eye(3), np.zeros(3), (1, 2))[:num], None, SIZE, 300.0) for num in (90, 70, 200, 80)
    ]
    for name, one in histograms(pairs).items():
        assert sum(one["counts"]) == 4 and len(one["counts"]) == len(EDGES[name])
    assert histograms(pairs)["interval_s"]["counts"][-1] == 4, "longer than the last edge"
    assert histograms(pairs)["matches"]["counts"][:3] == [0, 3, 1]
    shown = shown_pairs(pairs)
    assert [entry["index"] for entry in shown["best"]] == [2, 0, 3] and shown["worst"][0]["index"] == 1


def test_workers_side_by_side_count_once():
    times = [{"host": "a", "began": 0.0, "total": 10.0}, {"host": "a", "began": 4.0, "total": 10.0},
             {"host": "a", "began": 20.0, "total": 1.0}, {"host": "b", "began": 0.0, "total": 10.0}, {}]  # fmt: skip
    assert report.machine_seconds(times) == 14 + 1 + 10


def test_losses_of_all_videos_are_added_by_kind():
    lost = [{"from_s": 2.0, "to_s": 3.0, "frames": 2, "reason": "12 of 40 matches agree"},
            {"from_s": 9.0, "to_s": 9.0, "frames": 1, "reason": "the video ends"}]  # fmt: skip
    rows = [{"lost": lost, "sampled_frames": 10, "duration_s": 10.0}] * 2
    colors = report.reason_colors(rows)
    first, second = report.lost_reasons(rows, colors)
    assert (first["reason"], first["frames"], first["videos"], first["share"]) == ("n of n matches agree", 4, 2, 0.2)
    assert second["reason"] == "the video ends" and first["color"] != second["color"]
    strip = report.timeline(rows[0], colors)
    assert (strip[0]["left"], strip[0]["width"]) == (20.0, 20.0) and strip[1]["left"] + strip[1]["width"] == 100.0


def test_reach_is_in_seconds_where_a_video_was_sampled_by_time(monkeypatch):
    """Steps of 1 and 8 samples; one in 20 frames at 40 frames/s is half a second, as the other video has it."""
    stages = [
        {"stage": "direct", "step": 1, "correspondences": 9, "median": 9},
        {"stage": "kept", "step": 8, "median": 5},
    ]
    row = {"stages": stages, "saved_by_step": {"8": 3}, "min_matches": 4, "every_frames": 20, "every_seconds": 0.0}
    row |= {"fps": 40.0}
    monkeypatch.setattr(report, "figure_uri", lambda figure: figure)
    for rows, unit, distances in (
        ([row], "frames apart", [20, 160]),
        ([row, row | {"every_seconds": 0.5}], "seconds apart", [0.5, 4.0]),
    ):
        left, right = report.reach_figure(rows).axes
        assert left.get_xlabel() == right.get_xlabel() == unit
        assert left.get_xticks().tolist() == distances
        assert [text.get_text() for text in right.get_xticklabels()] == [f"{distances[1]:g}"]
        assert [bar.get_height() for bar in right.patches] == [3 * len(rows)]
    assert report.apart(row, 8) == "160" and report.apart(row | {"every_seconds": 0.5}, 8) == "4.00 s"


def test_what_a_killed_run_left_is_read_and_what_is_damaged_is_named(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    monkeypatch.setattr(report, "figure_uri", lambda figure: figure)
    assert [line.get_ydata().tolist() for line in report.curves_figure(tmp_path).axes[0].lines] == [[2.0], [2.0]]
    for text in ('{"pairs": ', "{}", "[]"):
        (tmp_path / "0123456789abcdef.json").write_text(text)
        with pytest.raises(ValueError, match=r"0123456789abcdef\.json: "):
            report.read_labels(tmp_path)


def test_a_page_of_a_labelled_video_says_why_frames_were_lost(tmp_path):
    from data_prep import label
    from gim_jax.config import load_config
    from tests.test_label import pan, textured
    from tests.test_video import write_video

    config = load_config("configs/label.py", ["--config.every_frames=2", "--config.min_matches=2000"])
    write_video(tmp_path / "v.mp4", pan(12, 2, 0) + [textured(150, 200, 3)] * 12, options={"crf": "6"})
    row = label.label_video(tmp_path / "v.mp4", config, tmp_path / "out")
    assert row["pairs"] == len(json.loads(json.dumps(row["shown"]))["best"]) + 2 == 5
    page = report.write_report(tmp_path / "out").read_text()
    assert "the camera stands still" in page and "Interval, s" in page and "Most correspondences" in page
