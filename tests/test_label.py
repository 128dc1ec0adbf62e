"""Labelling of whole videos: right labels, honest reasons, atomic and repeatable output."""

import json

import numpy as np
import pytest

from data_prep import fitting, label
from data_prep import propagate as prop
from data_prep.matchers import load_labellers
from data_prep.truth import Truth
from data_prep.world import WorldConfig, overlay_boxes, render
from gim_jax import cli
from gim_jax.config import load_config
from gim_jax.data import records
from tests.test_video import write_video


def textured(height: int, width: int, seed: int) -> np.ndarray:
    """Blurred noise of several scales: distinct everywhere."""
    import cv2

    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for scale in (2, 5, 12):
        small = rng.uniform(0, 255, (height // scale + 2, width // scale + 2, 3)).astype(np.float32)
        image += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image / 3, 0, 255).astype(np.uint8)


def pan(num: int, step_px: int, seed: int, size=(200, 150)) -> list[np.ndarray]:
    """A camera that slides over a picture by whole pixels."""
    canvas = textured(size[1], size[0] + num * step_px, seed)
    return [canvas[:, k * step_px : k * step_px + size[0]] for k in range(num)]


@pytest.fixture
def config():
    config = load_config("configs/label.py", ["--config.every_frames=2", "--config.min_matches=2000"])
    config.workers = 2
    return config


def test_a_pan_is_labelled_to_the_pixel_and_propagated(tmp_path, config):
    """Two pixels a frame, so 4 px per sampled frame; every label at every interval has to say so."""
    write_video(tmp_path / "pan.mp4", pan(40, 2, 0), options={"crf": "6"})
    labels = label.label_in_memory(tmp_path / "pan.mp4", config)
    assert [level.step for level in labels.levels] == [1, 2, 4, 8, 16]
    for level in labels.levels:
        start = int(np.flatnonzero(level.counts)[0])
        xy = level.pair(start)["xy"]
        shift = xy[:, 2:] - xy[:, :2]
        off = np.hypot(shift[:, 0] + 4 * level.step, shift[:, 1])
        assert np.percentile(off, 95) < 1.0, level.step


def test_nothing_is_labelled_across_a_cut(tmp_path, config):
    """Frames 0-19 show one picture, 20-39 another: samples 0-9 and 10-19."""
    write_video(tmp_path / "cut.mp4", pan(20, 2, 1) + pan(20, 2, 2), options={"crf": "6"})
    labels = label.label_in_memory(tmp_path / "cut.mp4", config)
    for level in [*labels.direct.values(), *labels.levels]:
        starts = np.flatnonzero(level.counts)
        assert len(starts), level.step
        assert not ((starts < 10) & (starts + level.step >= 10)).any(), level.step
    assert "matches" in labels.reasons[9] and not labels.best[9]


FLAT = {
    "black": ([np.zeros((150, 200, 3), np.uint8)] * 12, "no texture"),
    "frozen": ([textured(150, 200, 3)] * 12, "stands still"),
    "one frame": ([textured(150, 200, 3)], "the video ends"),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_video_without_labels_says_why(tmp_path, config, name):
    frames, reason = FLAT[name]
    write_video(tmp_path / "v.mp4", frames, options={"crf": "6"})
    row = label.label_video(tmp_path / "v.mp4", config, tmp_path / "out")
    assert row["pairs"] == 0
    assert sum(stretch["frames"] for stretch in row["lost"]) == row["sampled_frames"]
    assert reason in row["lost"][0]["reason"]


def test_output_is_repeatable_complete_and_done_once(tmp_path, config):
    write_video(tmp_path / "pan.mp4", pan(30, 2, 0), options={"crf": "6"})
    first = label.label_video(tmp_path / "pan.mp4", config, tmp_path / "a")
    config.workers = 1
    label.label_video(tmp_path / "pan.mp4", config, tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 5 and names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        if not name.endswith(".time.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    stamp = (tmp_path / "a" / names[0]).stat().st_mtime_ns
    assert label.label_video(tmp_path / "pan.mp4", config, tmp_path / "a") == first
    assert (tmp_path / "a" / names[0]).stat().st_mtime_ns == stamp


def test_a_long_video_is_propagated_in_parts_as_it_would_be_whole(tmp_path, config, monkeypatch):
    """40 frames, 20 samples, in parts of 6 starts that look 8 ahead."""
    write_video(tmp_path / "pan.mp4", pan(40, 2, 0), options={"crf": "6"})
    monkeypatch.setattr(prop, "MAX_STEP", 8)
    whole = label.label_in_memory(tmp_path / "pan.mp4", config)
    monkeypatch.setattr(label, "WINDOW", 6)
    parts = label.label_in_memory(tmp_path / "pan.mp4", config)
    assert [level.step for level in parts.levels] == [level.step for level in whole.levels] == [1, 2, 4, 8]
    assert parts.reasons == whole.reasons and parts.best.tolist() == whole.best.tolist()
    for one, two in zip(whole.levels, parts.levels):
        assert one.counts.tolist() == two.counts.tolist()
        for start in np.flatnonzero(one.counts):
            for name, value in one.pair(start).items():
                np.testing.assert_array_equal(value, two.pair(start)[name])


def test_saved_pairs_are_the_farthest_of_each_start(tmp_path, config):
    write_video(tmp_path / "pan.mp4", pan(30, 2, 0), options={"crf": "6"})
    row = label.label_video(tmp_path / "pan.mp4", config, tmp_path / "out")
    pairs = [records.decode(data) for data in records.read_tfrecord(next((tmp_path / "out").glob("*.tfrecord")))]
    assert len(pairs) == row["pairs"] == 14, "15 samples; the last has no successor"
    assert len({pair.frame0 for pair in pairs}) == len(pairs)
    by_start = {pair.frame0: pair.interval for pair in pairs}
    assert by_start == {2 * s: 2 * max(d for d in (1, 2, 4, 8) if s + d < 15) for s in range(14)}


def test_what_only_a_homography_binds_is_kept_and_named(tmp_path, config):
    """The pan shows one plane: every pair is a homography, no record claims a fundamental matrix."""
    write_video(tmp_path / "pan.mp4", pan(20, 2, 0), options={"crf": "6"})
    row = label.label_video(tmp_path / "pan.mp4", config, tmp_path / "out")
    assert row["pairs"] == 9
    for stage in row["stages"]:
        assert stage["homographies"] == stage["kept" if stage["stage"] == "kept" else "fitted"] > 0
    for data in records.read_tfrecord(next((tmp_path / "out").glob("*.tfrecord"))):
        assert not records.decode(data).F.any()


def test_an_enlarged_video_is_labelled_like_the_original(tmp_path, config):
    """Twice as wide: the same points within twice the threshold, where a fixed one would drop some."""
    import cv2

    config.threshold_size = (200, 150)
    frames = pan(6, 2, 0)
    write_video(tmp_path / "a.mp4", frames, options={"crf": "6"})
    write_video(tmp_path / "b.mp4", [cv2.resize(f, (400, 300), interpolation=cv2.INTER_CUBIC) for f in frames])
    small, large = (
        label.label_in_memory(tmp_path / name, config).direct[1].pair(0)["xy"] for name in ("a.mp4", "b.mp4")
    )
    assert len(large) > 0.9 * len(small)
    off = np.hypot(large[:, 2] - large[:, 0] + 8, large[:, 3] - large[:, 1])
    assert 0.7 < off.max() <= 1.5, "wider than the threshold of the small one"


def test_minimum_scales_with_the_image_area(config):
    config.min_matches = 1024
    assert fitting.min_matches_for((1920, 1080), config) == 1024
    assert fitting.min_matches_for((960, 540), config) == 256
    config.scale_min_matches = False
    assert fitting.min_matches_for((960, 540), config) == 1024


def test_bad_videos_are_named_and_the_others_go_on(tmp_path, capsys):
    (tmp_path / "empty.mp4").touch()
    write_video(tmp_path / "-odd name\n.mp4", pan(24, 2, 0), options={"crf": "6"})
    videos = [str(tmp_path / name) for name in ("empty.mp4", "missing.mp4", "-odd name\n.mp4")]
    code = cli.main(["label", *videos, "--out", str(tmp_path / "out"), "--config.every_frames=4"])
    errors = capsys.readouterr().err.strip().splitlines()
    assert code == 1
    assert len(errors) == 2 and "empty.mp4" in errors[0] and "missing.mp4" in errors[1]
    assert len(list((tmp_path / "out").glob("*.tfrecord"))) == 1
    assert len(json.loads((tmp_path / "out" / "failed.json").read_text())) == 2
    assert not list((tmp_path / "out").glob(".*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write_video(tmp_path / "v.mp4", pan(4, 2, 0))
    (tmp_path / "file").touch()
    assert cli.main(["label", str(tmp_path / "v.mp4"), "--out", str(tmp_path / "file" / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_unknown_settings_are_refused(tmp_path, capsys):
    assert cli.main(["label", "v.mp4", "--out", str(tmp_path / "o"), "--config.every_frame=4"]) == 2
    assert "every_frame" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    ["every_frames=0", "every_seconds=nan", "max_seconds=nan", "long_side=-3", "base_steps=()", "base_steps=(0,1)",
     "base_steps=(1,1)", "threshold_size=(0,0)", "threshold_size=(640,)", "threshold_px=nan", "threshold_px=0.0",
     "networks.loftr_outdoor.long_side=-1", "confidence=1.0", "workers=-1", "batch_size=0", "clip_samples=0",
     "jpeg_quality=500", "min_matches=-5"],
)  # fmt: skip
def test_settings_out_of_range_are_named_before_any_video(tmp_path, capsys, setting):
    argument = ":loftr_outdoor" if "networks" in setting else ""
    command = ["label", "v.mp4", "--out", str(tmp_path / "o"), f"--config=configs/label.py{argument}"]
    assert cli.main([*command, f"--config.{setting}"]) == 2
    error = capsys.readouterr().err
    assert setting.split("=")[0] + ": found" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_licences_share_the_loaded_labellers():
    config = load_config("configs/label.py", ["--config.ratio=0.75"])
    first = load_labellers(config)
    for licence in ("CC0-1.0", "CC-BY-4.0", "PDM-1.0", "CC-BY-3.0"):
        config.licence = licence
        assert load_labellers(config) is first


def test_a_network_that_does_not_label_needs_no_weights_and_changes_nothing():
    plain = load_config("configs/label.py")
    other = load_config("configs/label.py:loftr", ["--config.labellers=('rootsift',)"])
    assert label.label_hash(other, "v.mp4") == label.label_hash(plain, "v.mp4")


@pytest.mark.slow
def test_labels_of_a_rendered_walk_are_right(tmp_path):
    """At least 95 % of the labels at the farthest kept interval lie within 2 px of the true point, none on a logo."""
    from data_prep.accuracy import label_accuracy

    render(tmp_path / "w", WorldConfig(seed=5, seconds=8.0, num_cuts=1, overlay=True))
    truth = Truth.load(tmp_path / "w")
    labels = label.label_in_memory(tmp_path / "w" / "video.mp4", load_config("configs/label.py"))
    rows = label_accuracy(labels, truth)
    farthest = max((row for row in rows if row["labels"] == "kept"), key=lambda row: row["frames_apart"])
    assert farthest["frames_apart"] >= 80 and farthest["judged"] > 200
    assert farthest["within"][1] >= 0.95
    for level in labels.levels:
        for start in np.flatnonzero(level.counts):
            assert truth.shot[labels.frames[start]] == truth.shot[labels.frames[start + level.step]]
            xy = level.pair(start)["xy"]
            over = [((xy[:, :2] > box[:2]) & (xy[:, :2] < box[2:])).all(1) for box in overlay_boxes(labels.size)]
            assert not (np.any(over, 0) & (np.hypot(*(xy[:, 2:] - xy[:, :2]).T) < 1)).any(), "where nothing moves"
