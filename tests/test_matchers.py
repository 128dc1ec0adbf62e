"""Labellers: what the API's matchers find, each frame's features once, united without a veto."""

import tempfile
from dataclasses import replace

import numpy as np
import pytest

from data_prep import matching
from data_prep.appearance import reduced_gray
from data_prep.fitting import confirm, inside, thin
from data_prep.matchers import DenseNetwork, Found, SparseNetwork, check_labellers
from data_prep.video import Frame
from gim_jax import cli
from gim_jax.api import load_matcher
from gim_jax.config import load_config
from gim_jax.models import lightglue, loftr, superpoint
from tests.networks import random_variables
from tests.test_label import textured

SIZE = (96, 72)
SETTINGS = dict(num_layers=1, threshold=0.0, long_side=80, extractor=superpoint.SuperPointConfig(40, threshold=0.0))


def sparse_matcher():
    config = replace(
        lightglue.CONFIGS["lightglue_superpoint"], **{k: v for k, v in SETTINGS.items() if k != "long_side"}
    )
    frame, size = np.zeros((1, 64, 64, 1), np.float32), np.array([[64, 64]], np.int32)
    variables = random_variables(lightglue.LightGlue(config), frame, frame, size, size)
    return load_matcher("lightglue_superpoint", variables, batch_size=8, **SETTINGS)


def dense_matcher():
    settings = dict(thr=0.0, border_rm=0, coarse_layers=("cross",))
    config = replace(loftr.CONFIGS["loftr_tiny"], **settings)
    frame = np.zeros((1, 64, 64, 1), np.float32)
    variables = random_variables(loftr.LoFTR(config), frame, frame)
    return load_matcher("loftr_tiny", variables, batch_size=8, long_side=80, **settings)


@pytest.mark.parametrize("make, kind", [(sparse_matcher, SparseNetwork), (dense_matcher, DenseNetwork)])
def test_a_labeller_finds_what_the_matcher_of_the_api_finds(make, kind, config):
    """Three frames, three pairs, in batches over eight devices that repetition fills; untrained, so nothing is kept."""
    frames = [textured(SIZE[1], SIZE[0], seed) for seed in range(3)]
    pairs = [(0, 1), (1, 2), (0, 2)]
    matcher = make()
    labeller = kind(matcher, batch_size=2)
    assert labeller.batch_size == 8
    features = labeller.features([labeller.prepare(frame) for frame in frames])
    found = labeller.match([(features[a], features[b]) for a, b in pairs])
    wanted = matcher.match_batch([(frames[a], frames[b]) for a, b in pairs])
    for one, want in zip(found, wanted, strict=True):
        assert len(want)
        np.testing.assert_allclose(one.xy, np.concatenate([want.kpts0, want.kpts1], 1), atol=1e-3)
        np.testing.assert_allclose(one.conf, want.conf, atol=1e-4)
    for one, (a, b) in zip(found, pairs):
        grays = reduced_gray(frames[a], 1.0), reduced_gray(frames[b], 1.0)
        row = confirm(["untrained"], [one], (None, None), grays, SIZE, config)
        assert not row.kind and row.reason and row.matches[0] > 0


def numbered_frames(num: int, scene=lambda k: 0) -> list[Frame]:
    """Frames that carry their number in the first pixel and show a picture that moves to the right by 2 px a frame."""
    picture, frames = textured(SIZE[1], SIZE[0] + 2 * num, 0), []
    for k in range(num):
        rgb = picture[:, 2 * (num - k) :][:, : SIZE[0]].copy()
        rgb[0, 0] = k
        frames.append(Frame(20 * k, k / 1.5, rgb, scene(k)))
    return frames


class Standin:
    """A labeller of frames that carry their number: the scene moves by 2 px a frame; or it guesses."""

    def __init__(self, name: str, on_device: bool, junk: bool = False):
        self.name, self.on_device, self.junk = name, on_device, junk
        self.extracted, self.matched = [], []

    def prepare(self, rgb):
        return int(rgb[0, 0, 0])

    def features(self, prepared):
        self.extracted += prepared
        return list(prepared)

    def match(self, pairs):
        self.matched += pairs
        out = []
        for a, b in pairs:
            rng = np.random.default_rng(a)
            kpts0 = rng.uniform(0, 1, (150, 2)) * SIZE
            kpts1 = rng.uniform(0, 1, (150, 2)) * SIZE if self.junk else kpts0 + [2.0 * (b - a), 0.0]
            out.append(Found(np.concatenate([kpts0, kpts1], 1).astype(np.float32), np.full(150, 0.5, np.float32)))
        return out


@pytest.fixture
def config():
    config = load_config("configs/label.py")
    config.workers = 2
    return config


def run(frames, labellers, config, store=None, mask=None):
    with tempfile.TemporaryFile() as spool:
        return matching.match_video(frames, labellers, config, spool, store, mask)


def test_features_of_a_frame_are_computed_once_and_every_pair_is_matched_once(config):
    labeller = Standin("net", on_device=True)
    found = run(numbered_frames(40), [labeller], config)
    assert labeller.extracted == list(range(40))
    assert sorted(labeller.matched) == sorted((s, s + d) for d in (1, 2, 4) for s in range(40 - d))
    for step, rows in found.rows.items():
        assert len(rows) == 40 - step
        for row in rows:
            np.testing.assert_allclose(row.xy[:, 2] - row.xy[:, 0], 2.0 * step, atol=1e-4)


def test_a_matcher_that_fails_does_not_veto_another(config):
    found = run(numbered_frames(6), [Standin("junk", True, junk=True), Standin("good", False)], config)
    for rows in found.rows.values():
        for row in rows:
            assert row.matches.tolist() == [150, 150] and row.confirmed[0] == 0 and row.confirmed[1] == 150
            assert row.kind and set(row.teacher.tolist()) == {1}


def test_nothing_is_matched_across_a_cut(config):
    labeller = Standin("net", on_device=True)
    found = run(numbered_frames(20, scene=lambda k: k // 7), [labeller], config)
    assert labeller.matched and all(a // 7 == b // 7 for a, b in labeller.matched)
    for step, rows in found.rows.items():
        for start, row in enumerate(rows):
            assert (row.reason == "a scene cut") == (start // 7 != (start + step) // 7)


def test_blocks_on_disk_are_not_computed_again(config, tmp_path):
    whole = run(numbered_frames(40), [Standin("net", True)], config)
    run(numbered_frames(40), [Standin("net", True)], config, tmp_path)
    (tmp_path / "00002.npz").unlink()
    (tmp_path / "00000.npz").write_bytes((tmp_path / "00000.npz").read_bytes()[:100])
    labeller = Standin("net", True)
    again = run(numbered_frames(40), [labeller], config, tmp_path)
    assert {b // matching.BLOCK for _, b in labeller.matched} == {0, 2}
    for step in whole.rows:
        for one, two in zip(whole.rows[step], again.rows[step], strict=True):
            assert (one.kind, one.reason) == (two.kind, two.reason)
            for name in ("xy", "conf", "teacher", "matches", "confirmed"):
                np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_masked_parts_of_a_frame_carry_no_label(config):
    def mask(frame):
        return np.arange(48)[None] * 2 >= 10 * frame.index / 20 + np.zeros((36, 1))  # half size; 10 px more a frame

    found = run(numbered_frames(4), [Standin("net", True)], config, mask=mask)
    for step, rows in found.rows.items():
        for start, row in enumerate(rows):
            assert (
                len(row.xy) and row.xy[:, 0].min() >= 10 * start - 1 and row.xy[:, 2].min() >= 10 * (start + step) - 1
            )


def test_inside_takes_the_entry_a_point_falls_into():
    mask = np.array([[True, False], [False, True]])
    kpts = np.array([[0, 0], [9.4, 0], [9.6, 0], [0, 9.6], [19, 19], [-3, -3], [30, 30]])
    assert inside(mask, kpts, (20, 20)).tolist() == [True, True, False, False, True, True, True]


def test_of_near_duplicates_the_more_confident_stays():
    """In a chain a - b - c of falling confidence b goes and c, no longer near anything, stays."""
    xy = np.array([[0, 0, 50, 0], [0.4, 0, 60, 0], [0.8, 0, 70, 0], [5, 5, 70.3, 0], [9, 9, 90, 9], [9.2, 9, 90, 9]])
    conf, teacher = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), np.array([0, 1, 0, 1, 0, 0])
    assert thin(xy, conf, teacher, 0.5).tolist() == [0, 2, 4, 5], "one labeller's own are left alone"


def test_reasons_name_the_labeller(config):
    found = [Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), "no texture: 3 keypoints")] * 2
    row = confirm(["a", "b"], found, (None, None), (np.zeros((72, 96), np.uint8),) * 2, SIZE, config)
    assert row.reason == "a: no texture: 3 keypoints; b: no texture: 3 keypoints" and row.kind == ""


PRESETS = {  # GIM section 4
    "": ["rootsift"],
    "rootsift": ["rootsift"],
    "superglue": ["superglue_outdoor", "rootsift"],
    "loftr": ["loftr_outdoor", "rootsift", "superglue_outdoor"],
    "dkm": ["dkm_outdoor", "rootsift", "superglue_outdoor", "loftr_outdoor"],
    "rootsift+lightglue_disk": ["rootsift", "lightglue_disk"],
}


@pytest.mark.parametrize("argument", PRESETS)
def test_presets_are_the_papers(argument):
    config = load_config(f"configs/label.py:{argument}")
    assert list(config.labellers) == PRESETS[argument]
    assert set(config.networks) == set(PRESETS[argument]) - {"rootsift"}


@pytest.mark.parametrize(
    "argument, text",
    [("loftr", "networks.loftr_outdoor.weights"), ("sift", "'sift'"), ("rootsift+rootsift", "each once")],
)
def test_labellers_that_cannot_be_used_are_named(argument, text):
    with pytest.raises(ValueError, match=text):
        check_labellers(load_config(f"configs/label.py:{argument}"))


def test_weights_that_are_missing_are_one_line_before_any_video_is_read(tmp_path, capsys):
    assert cli.main(["label", "none.mp4", "--out", str(tmp_path / "o"), "--config=configs/label.py:dkm"]) != 0
    assert "dkm_outdoor" in capsys.readouterr().err
