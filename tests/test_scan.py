"""What one pass over a video finds: cuts, repeated frames, bars, overlays; and where labels may lie."""

import sys
import types

import cv2
import numpy as np
import pytest

from data_prep import label, masks, scan, video
from data_prep.video import Frame
from gim_jax.config import load_config
from tests.test_label import pan, textured
from tests.test_video import write_video


def test_cuts_are_found_to_the_frame_and_flashes_are_not_cuts(tmp_path):
    frames = pan(30, 1, 1) + [f // 2 for f in pan(25, 1, 2)] + pan(30, 1, 3)
    frames[70] = np.full_like(frames[70], 250)  # a flash
    write_video(tmp_path / "v.mp4", frames)
    cuts = scan.scan(tmp_path / "v.mp4", 20).cuts.tolist()
    assert {30, 55} <= set(cuts) <= {30, 55, 70, 71}
    frames = list(video.sample_frames(tmp_path / "v.mp4", 10, cuts=[30, 55]))
    assert [f.scene for f in frames] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_pulldown_is_undone_and_a_picture_that_stands_still_is_not(tmp_path):
    """Every fourth frame is shown twice, as film at 30 frames/s: 24 frames, 6 of them repeats; then 10 of one."""
    moving = pan(24, 3, 1)
    frames = [f for k, f in enumerate(moving) for f in [f] * (2 if k % 4 == 3 else 1)] + [textured(150, 200, 9)] * 10
    write_video(tmp_path / "v.mp4", frames)
    found = scan.scan(tmp_path / "v.mp4", 20)
    assert found.repeats.tolist() == [4, 9, 14, 19, 24, 29]
    kept = [f.index for f in video.sample_frames(tmp_path / "v.mp4", 6, repeats=found.repeats)]
    assert kept[:4] == [0, 7, 15, 22], "every sixth of 0 1 2 3 5 6 7 8 10 ..."


@pytest.mark.parametrize("bars", [(20, 0), (0, 30), (12, 16), (0, 0)])
def test_black_bars_are_cut_off(tmp_path, bars):
    y, x = bars
    frames = [np.pad(f, [(y, y), (x, x), (0, 0)]) for f in pan(12, 3, 1)]
    write_video(tmp_path / "v.mp4", frames)
    found = scan.scan(tmp_path / "v.mp4", 2)
    assert np.abs(found.crop - [x, y, x + 200, y + 150]).max() <= 1
    rgb = next(video.sample_frames(tmp_path / "v.mp4", crop=tuple(found.crop.tolist()))).rgb
    assert rgb.shape[:2] == (found.crop[3] - found.crop[1], found.crop[2] - found.crop[0])
    assert len(found.notes()) == (1 if x or y else 0)


def test_a_dark_video_is_not_cut_off(tmp_path):
    write_video(tmp_path / "v.mp4", [np.zeros((60, 80, 3), np.uint8)] * 4)
    assert scan.scan(tmp_path / "v.mp4", 2).crop.tolist() == [0, 0, 80, 60]


def captioned(frames):
    out = []
    for frame in frames:
        frame = frame.copy()
        cv2.putText(frame, "CAPTION", (20, 40), 0, 1.0, (255, 255, 255), 2, cv2.LINE_AA)
        out.append(frame)
    return out


def test_a_caption_is_masked_and_a_camera_that_stands_still_is_not(tmp_path):
    write_video(tmp_path / "moves.mp4", captioned(pan(30, 5, 1)))
    found = scan.scan(tmp_path / "moves.mp4", 2)
    valid = found.valid(20)
    letters = captioned([np.zeros((150, 200, 3), np.uint8)])[0][..., 0] > 0
    assert valid.shape == letters.shape and valid[letters].mean() < 0.01
    assert valid[70:].all() and valid[:, 180:].all()
    still = captioned([textured(150, 200, 1)])[0]
    noise = np.random.default_rng(0)
    frames = [np.clip(still + noise.normal(0, 4, still.shape), 0, 255).astype(np.uint8) for _ in range(30)]
    write_video(tmp_path / "still.mp4", frames)
    assert scan.scan(tmp_path / "still.mp4", 2).valid(20) is None


def test_a_caption_of_a_part_is_masked_there_and_little_is_kept_of_long_videos():
    """100 samples: parts of 32, 32 and 36, as 4 are too few for one; the caption is in the second."""
    overlay, frames = scan._Overlay(), pan(100, 5, 1)
    frames[32:64] = captioned(frames[32:64])
    for index, frame in enumerate(frames):
        overlay.add(20 * index, cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
        assert len(overlay.parts) <= 2
    masked, starts = overlay.masks((200, 150), (0, 0, 200, 150))
    letters = captioned([np.zeros((150, 200, 3), np.uint8)])[0][..., 0] > 0
    assert starts.tolist() == [0, 640, 1280] and masked.shape == (3, 150, 200)
    assert masked[1][letters].mean() > 0.99 and not masked[[0, 2]].any()


def test_a_scan_survives_an_interruption_and_damage_is_seen(tmp_path):
    write_video(tmp_path / "v.mp4", pan(30, 3, 1) + pan(20, 3, 2))
    found = scan.scan(tmp_path / "v.mp4", 5)
    scan.save(tmp_path / "scan.npz", found)
    again = scan.load(tmp_path / "scan.npz")
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    (tmp_path / "scan.npz").write_bytes((tmp_path / "scan.npz").read_bytes()[:200])
    assert scan.load(tmp_path / "scan.npz") is None and scan.load(tmp_path / "none.npz") is None


def test_masks_come_from_a_function_or_a_folder(tmp_path, monkeypatch):
    module = types.ModuleType("my_masks")
    module.no_sky = lambda rgb: rgb[..., 2] < 128
    module.wrong = lambda rgb: rgb
    monkeypatch.setitem(sys.modules, "my_masks", module)
    frame = Frame(40, 1.0, np.zeros((4, 6, 3), np.uint8))
    frame.rgb[:2] = 200
    want = np.repeat([[False]] * 2 + [[True]] * 2, 6, axis=1)
    assert (masks.load_provider("my_masks:no_sky", "v.mp4")(frame, None) == want).all()
    (tmp_path / "v").mkdir()
    cv2.imwrite(str(tmp_path / "v" / "40.png"), want.astype(np.uint8) * 255)
    provider = masks.load_provider(str(tmp_path), "/videos/v.mp4")
    assert (masks.frame_masks(None, provider)(frame) == want).all()
    assert masks.load_provider("", "v.mp4") is None
    with pytest.raises(ValueError, match=r"41\.png"):
        provider(Frame(41, 1.0, frame.rgb), None)
    with pytest.raises(ValueError, match="found uint8 of shape"):
        masks.load_provider("my_masks:wrong", "v.mp4")(frame, None)
    for spec in ("my_masks:none", "not_a_module:f", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="mask_provider"):
            masks.load_provider(spec, "v.mp4")
    with pytest.raises(ValueError, match="no such folder"):
        masks.load_provider(str(tmp_path / "v"), "..")


@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_of_the_frame_as_filmed_is_cut_like_the_frame(tmp_path, scale):
    """20 px of 40 are bars, 12 above and 8 below: of rows 12 to 31 the upper ten may have labels."""
    full, crop = np.array([60, 40]), np.array([0, 12, 60, 32])
    found = scan.Scan(np.array(9), *[np.zeros(0, int)] * 2, full, crop, np.zeros((0, 1, 1), bool), np.zeros(0, int))
    filmed = np.zeros((40 // scale, 60 // scale), np.uint8)
    filmed[: 22 // scale] = 255
    picture = np.zeros((20 // scale, 60 // scale), np.uint8)
    picture[: 10 // scale] = 255
    (tmp_path / "v").mkdir()
    for index, mask in enumerate((filmed, picture)):
        cv2.imwrite(str(tmp_path / "v" / f"{index}.png"), mask)
        mask = masks.frame_masks(found, masks.load_provider(str(tmp_path), "v.mp4"))
        given = mask(Frame(index, 0.0, np.zeros((20, 60, 3), np.uint8)))
        np.testing.assert_array_equal(given, picture > 0)


def test_other_masks_are_other_labels(tmp_path, monkeypatch):
    (tmp_path / "v").mkdir()
    cv2.imwrite(str(tmp_path / "v" / "0.png"), np.ones((4, 6), np.uint8))
    config = load_config("configs/label.py", [f"--config.mask_provider={tmp_path}"])
    first = label.label_hash(config, "v.mp4")
    (tmp_path / "moved").mkdir()
    (tmp_path / "v").rename(tmp_path / "moved" / "v")
    config.mask_provider = str(tmp_path / "moved")
    assert label.label_hash(config, "v.mp4") == first, "where they lie does not matter"
    cv2.imwrite(str(tmp_path / "moved" / "v" / "0.png"), np.zeros((4, 6), np.uint8))
    assert label.label_hash(config, "v.mp4") != first
    config.mask_provider = "made_up_masks:f"
    monkeypatch.syspath_prepend(tmp_path)
    hashes = set()
    for text in ("f = None", "f = 1"):
        (tmp_path / "made_up_masks.py").write_text(text)
        hashes |= {label.label_hash(config, "v.mp4")}
    assert len(hashes) == 2
