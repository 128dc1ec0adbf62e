"""Matchers behind the API: lists of pairs, the two halves of a sparse matcher, features from elsewhere, DKM's warp."""

import dataclasses

import cv2
import numpy as np
import pytest
from PIL import Image

import gim_jax
from gim_jax import api, matchers, viz
from gim_jax.cli.match import parse_settings
from gim_jax.models import MODELS
from gim_jax.types import Features
from gim_jax.weights import store
from tests.test_api import SMALL, random_variables, same

RNG = np.random.default_rng(0)
SCENE = cv2.resize(RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8), (180, 120), interpolation=cv2.INTER_CUBIC)
IMAGES = [SCENE[y : y + 100, x : x + 120] for y, x in ((0, 0), (10, 20), (20, 40), (5, 60))]
FEW_LAYERS = {
    "superglue_rootsift": {"num_layers": 2, "threshold": 0.0},
    "gim_lightglue": {"num_layers": 2, "threshold": 0.0},
    "lightglue_disk": {"num_layers": 2, "threshold": 0.0},
    "lightglue_sift": {"num_layers": 2, "threshold": 0.0},
    "lightglue_doghardnet": {"num_layers": 2, "threshold": 0.0},
}


def load(name, bucket=64, batch_size=1, **settings):
    """A matcher of few layers with random weights."""
    config = FEW_LAYERS[name]
    info = dataclasses.replace(MODELS[name], bucket=bucket)
    few = {"max_keypoints": 50} if info.features in ("sift", "rootsift") else {}
    if not info.features:
        few = {"extractor": {"max_keypoints": 50, "threshold": -1.0} | ({"border": 0} if "disk" not in name else {})}
    settings = {**config, **few, "long_side": 96, **settings}
    return matchers.SparseNetwork(info, random_variables(info, **config), batch_size, settings)


def close(a, b):
    """The same matches but for ties."""
    assert abs(len(a) - len(b)) <= 1 and len(b)
    rows = [np.concatenate([m.kpts0, m.kpts1], 1) for m in (a, b)]
    assert (np.abs(rows[0][:, None] - rows[1][None]).max(-1).min(1) < 0.05).mean() > 0.9


@pytest.fixture
def files(tmp_path):
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(len(IMAGES))]


def test_a_list_of_pairs_decodes_and_detects_once_and_keeps_the_order(files, monkeypatch):
    read = []
    monkeypatch.setattr(matchers, "read_image", lambda path: read.append(path) or np.array(Image.open(path)))
    matcher = gim_jax.load_matcher("rootsift")
    pairs = [(files[i], files[j]) for i in range(4) for j in range(4) if i != j]
    found = matcher.match_batch(pairs)
    assert sorted(read) == sorted(files)
    for matches, pair in zip(found, pairs):
        same(matches, matcher(*pair))


def test_a_bad_image_is_named_when_its_turn_comes(files):
    found = gim_jax.load_matcher("rootsift").match_pairs([(files[0], files[1]), (files[0], "/none.png")])
    assert len(next(found)) >= 0
    with pytest.raises(ValueError, match=r"/none\.png: no such file"):
        next(found)


@pytest.mark.parametrize(
    "name", [pytest.param("lightglue_disk", marks=pytest.mark.slow), "lightglue_sift", "superglue_rootsift"]
)
def test_batches_and_padding_change_no_match(name):
    """Pairs of three sizes in batches of two, in buckets of 64 px, equal single pairs in a bucket of 128 px; one
    program per size of image and one for the matching."""
    pairs = [(IMAGES[0], IMAGES[1]), (IMAGES[2], IMAGES[1][:70]), (IMAGES[1], IMAGES[0]), (IMAGES[3], IMAGES[3])]
    together, alone = load(name, batch_size=2), load(name, bucket=128)
    found = together.match_batch(pairs)
    num = together.num_traces
    for matches, pair in zip(found, pairs):
        close(matches, alone(*pair))
    assert together.match_batch([(SCENE[:90, 10:130], IMAGES[2])] * 2)
    assert together.num_traces == num


def test_extract_and_match_features_are_the_halves_of_a_call():
    matcher = load("gim_lightglue")
    features = [matcher.extract(image) for image in IMAGES[:2]]
    assert features[0].size == (120, 100) and len(features[0]) == 50 and features[0].desc.shape == (50, 256)
    assert (features[0].kpts >= -0.5).all() and (features[0].kpts <= [119.5, 99.5]).all()
    assert (np.diff(features[0].scores) <= 0).all()
    close(matcher.match_features(*features), matcher(*IMAGES[:2]))


def test_superglue_on_rootsift_matches_opencvs_keypoints():
    matcher = load("superglue_rootsift")
    matches, features = matcher(*IMAGES[:2]), matcher.extract(IMAGES[0])
    assert 5 < len(features) <= 50
    np.testing.assert_allclose(np.linalg.norm(features.desc, axis=1), 1, atol=1e-5)
    assert len(matches) and np.isfinite(matches.conf).all()
    assert np.abs(matches.kpts0[:, None] - features.kpts[None]).max(-1).min(1).max() < 1e-3


def test_features_from_elsewhere():
    matcher = load("lightglue_doghardnet")
    rng = np.random.default_rng(0)
    arrays = [rng.random((n, 2)) * 90 for n in (30, 1100)], [rng.normal(size=(n, 128)) for n in (30, 1100)]
    given = [
        Features(kpts, desc, np.ones(len(kpts)), (100, 90), np.ones(len(kpts)), np.zeros(len(kpts)))
        for kpts, desc in zip(*arrays)
    ]
    matches = matcher.match_features(*given)
    assert len(matches) and matches.size0 == (100, 90)
    assert np.abs(matches.kpts1[:, None] - given[1].kpts[None]).max(-1).min(1).max() < 1e-3
    nothing = dataclasses.replace(
        given[0], **{k: getattr(given[0], k)[:0] for k in ("kpts", "desc", "scores", "scales", "oris")}
    )
    assert len(matcher.match_features(nothing, given[1])) == 0
    with pytest.raises(ValueError, match="lightglue_doghardnet detects no keypoints; use match_features"):
        matcher(*IMAGES[:2])
    for change, message in [
        ({"desc": given[0].desc[:, :64]}, r"features0\.desc: found shape \(30, 64\), expected \(30, 128\)"),
        ({"oris": None}, r"features0\.oris: found shape \(\), expected \(30,\)"),
        ({"kpts": given[0].kpts * np.nan}, r"features0\.kpts: found numbers that are not finite"),
        ({"size": (0, 5)}, r"features0\.size: found \(0, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            matcher.match_features(dataclasses.replace(given[0], **change), given[1])


def test_borders_of_an_aspect_come_off_again():
    """100 x 50 px in a square of 100, seen at 50 px: (0, 12) there is (0.5, 24.5) in the square, (0.5, -0.5) here."""
    matcher = load("gim_lightglue", aspect=(1, 1), long_side=None, exact=(50, 50), multiple=1)
    pixels, frame = matcher._frame(np.full((50, 100, 3), 200, np.uint8))
    assert pixels.shape == (50, 50, 1) and pixels[:12].max() == 0 and pixels[13:37].min() == 200
    np.testing.assert_allclose(frame.to_original(np.array([[0.0, 12], [10, 20]])), [[0.5, -0.5], [20.5, 15.5]])
    np.testing.assert_array_equal(frame.inside(np.array([[0.5, -0.5], [20, 15], [99.1, 3]])), [False, True, False])


@pytest.mark.slow
def test_dense_warp():
    """Matches lie on the warp that comes with them; one direction is half of both; both are drawn."""
    settings = {"size": (64, 48), "num_matches": 40, "long_side": 96}
    variables = random_variables(MODELS["dkm_tiny"])
    one = gim_jax.load_matcher("dkm_tiny", variables, symmetric=False, **settings)
    matches, warp = one.dense(IMAGES[0], IMAGES[1][:80])
    assert warp.kpts1.shape == (48, 64, 2) and warp.kpts0 is None and warp.size1 == (120, 80)
    cell = np.rint((matches.kpts0 + 0.5) * [64 / 120, 48 / 100] - 0.5).astype(int)
    np.testing.assert_allclose(warp.kpts1[cell[:, 1], cell[:, 0]], matches.kpts1, atol=1e-3)
    np.testing.assert_allclose(warp.conf0[cell[:, 1], cell[:, 0]], matches.conf, atol=1e-6)
    both = gim_jax.load_matcher("dkm_tiny", variables, **settings).dense(IMAGES[0], IMAGES[1][:80])[1]
    np.testing.assert_allclose(both.kpts1, warp.kpts1, atol=1e-2)
    assert both.kpts0.shape == (48, 64, 2) and both.conf1.shape == (48, 64)
    assert viz.draw_warp(IMAGES[0], IMAGES[1][:80], both, height=90).shape == (90, 2 * 108 + 8, 3)
    with pytest.raises(ValueError, match="loftr_tiny has no dense warp"):
        small = random_variables(MODELS["loftr_tiny"], **SMALL)
        gim_jax.load_matcher("loftr_tiny", small, **SMALL).dense(*IMAGES[:2])


def test_a_certain_identity_draws_the_same_image_twice():
    x, y = np.meshgrid(np.arange(120), np.arange(100))
    warp = matchers.Warp(
        np.stack([x, y], -1).astype(np.float32), np.ones((100, 120), np.float32), None, None, (120, 100), (120, 100)
    )
    picture = viz.draw_warp(IMAGES[0], IMAGES[0], warp, height=100, gap=0)
    np.testing.assert_array_equal(picture[:, :120], IMAGES[0])
    np.testing.assert_array_equal(picture[:, 120:], IMAGES[0])
    uncertain = dataclasses.replace(warp, conf0=warp.conf0 * 0)
    assert (viz.draw_warp(IMAGES[0], IMAGES[0], uncertain, height=100, gap=0)[:, 120:] == 255).all()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"thr": "high"}, "settings: thr: found 'high', expected float"),
        ({"max_matches": 0}, "settings: max_matches: found 0, expected at least 1"),
        ({"exact": (0, 64)}, "settings: exact: found 0, expected 1 to 16384"),
        ({"exact": "640x480"}, "settings: exact: found '640x480'"),
        ({"long_side": -1}, "settings: long_side: found -1"),
        ({"long_side": 0}, "settings: long_side: found 0, expected 1 to 16384"),
        ({"long_side": 1e9}, "settings: long_side: found 1000000000.0"),
        ({"resampling": "best"}, "settings: resampling: found 'best', expected one of bytes, float, blurred"),
        ({"block_dims": [16, "x"]}, "settings: block_dims: found"),
        ({"dtype": "float8"}, "dtype: found 'float8'"),
        ({"batch_size": 0}, "batch_size: found 0, expected at least 1"),
        ({"thr": -0.5}, "settings: thr: found -0.5, expected 0 to 1"),
        ({"thr": float("nan")}, "settings: thr: found nan"),
        ({"temperature": 0.0}, "settings: temperature: found 0.0"),
        ({"coarse_layers": ["self"] * 257}, "settings: coarse_layers: found 257 values, expected at most 256"),
        ({"initial_dim": 10**9}, "settings: initial_dim: found 1000000000"),
        ({"fine_window_size": -3}, "weights: its configuration with these settings makes no network: "),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        gim_jax.load_matcher("loftr_tiny", {}, **settings)


@pytest.mark.parametrize(
    "key, value", [("ratio", -1.0), ("ratio", float("nan")), ("contrast_threshold", float("nan")), ("long_side", 0)]
)
def test_thresholds_of_rootsift_that_cannot_be(key, value):
    with pytest.raises(ValueError, match=f"settings: {key}: found {value}"):
        gim_jax.load_matcher("rootsift", **{key: value})


def test_given_variables_are_told_apart(tmp_path):
    """What is kept of one network is not taken for another's."""
    tree, other = (random_variables(MODELS["loftr_tiny"], **SMALL) for _ in range(2))
    other["params"]["backbone"]["conv1"]["kernel"][0, 0, 0, 0] += 1
    store.save(tmp_path / "w.safetensors", tree, {"model": "loftr", "config": SMALL})
    matcher = gim_jax.load_matcher("loftr_tiny", tmp_path / "w.safetensors")
    said = [matcher.describe()["weights"]]
    for variables in (tree, other):
        matcher.set_variables(variables)
        said.append(matcher.describe()["weights"])
    assert len({weights["sha256"] for weights in said}) == 3 and said[1]["file"] is None
    assert gim_jax.load_matcher("loftr_tiny", tree, **SMALL).describe()["weights"] == said[1]


def test_an_image_too_large_for_a_network_is_named(tmp_path):
    Image.fromarray(np.zeros((8, 17000, 3), np.uint8)).save(tmp_path / "wide.png")
    matcher = gim_jax.load_matcher("loftr_tiny", random_variables(MODELS["loftr_tiny"]), long_side=None)
    with pytest.raises(ValueError, match=r"wide\.png: 17000x8 px for the network, expected at most 16384"):
        matcher(tmp_path / "wide.png", IMAGES[0])


def test_settings_reach_parts_of_the_network_and_come_from_the_command_line():
    texts = ["extractor.max_keypoints=50", "threshold=0.3", "exact=[96, 64]", "long_side=null", "resampling=float"]
    settings = parse_settings(texts)
    matcher = matchers.SparseNetwork(MODELS["gim_lightglue"], random_variables(MODELS["gim_lightglue"]), 1, settings)
    assert matcher.config.extractor.max_keypoints == 50 and matcher.config.threshold == 0.3
    assert matcher.preset.exact == (96, 64) and matcher.describe()["settings"]["resampling"] == "float"
    dkm = api.load_matcher("dkm_tiny", random_variables(MODELS["dkm_tiny"]), **parse_settings(["gp_solve=released"]))
    assert dkm.config.gp_solve == "released"
    for text in ("x", "=3", "a..b=1"):
        with pytest.raises(ValueError, match="--set: found"):
            parse_settings([text])


def test_match_keeps_a_matcher_until_its_weights_change(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(api, "load_matcher", lambda *a, **k: loaded.append(a) or (lambda image0, image1: None))
    file = tmp_path / "w.safetensors"
    for content in (b"1", b"1", b"22"):
        if not file.exists() or file.read_bytes() != content:
            file.write_bytes(content)
        api.match(None, None, "loftr_tiny", file, exact=[64, 64])
    assert len(loaded) == 2


KINDS = {
    "gray.png": lambda path: Image.fromarray(IMAGES[0][..., 0]).save(path),
    "deep.png": lambda path: cv2.imwrite(str(path), IMAGES[0].astype(np.uint16) * 256),
    "alpha.png": lambda path: Image.fromarray(np.dstack([IMAGES[0], IMAGES[0][..., :1]])).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(IMAGES[0]).convert("CMYK").save(path),
    "turned.jpg": lambda path: Image.fromarray(IMAGES[0]).save(path, exif=_turned()),
    "point.png": lambda path: Image.fromarray(IMAGES[0][:1, :1]).save(path),
    "line.png": lambda path: Image.fromarray(np.resize(IMAGES[0], (20, 20000, 3))).save(path),
    "flat.png": lambda path: Image.fromarray(np.full((100, 120, 3), 77, np.uint8)).save(path),
}


def _turned():
    exif = Image.Exif()
    exif[274] = 6
    return exif


@pytest.fixture(scope="module")
def some_of_each_kind():
    """Buckets of 128 px hold all images of these tests: one program each."""
    info = dataclasses.replace(MODELS["loftr_tiny"], bucket=128)
    settings = {"long_side": 96, "thr": 0.0, "border_rm": 0, **SMALL}
    return [
        gim_jax.load_matcher("rootsift"),
        matchers.Network(info, random_variables(info, **SMALL), 1, settings),
        load("gim_lightglue", bucket=128),
        load("lightglue_disk", bucket=128),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_finite_points_inside_or_none(some_of_each_kind, tmp_path, kind):
    KINDS[kind](tmp_path / kind)
    for matcher in some_of_each_kind:
        for pair in ((tmp_path / kind, IMAGES[1]), (IMAGES[1], tmp_path / kind), (tmp_path / kind, tmp_path / kind)):
            matches = matcher(*pair)
            for kpts, (width, height) in ((matches.kpts0, matches.size0), (matches.kpts1, matches.size1)):
                assert np.isfinite(kpts).all() and (kpts >= -8).all() and (kpts <= [width + 8, height + 8]).all()
            assert ((matches.conf >= 0) & (matches.conf <= 1)).all()
            assert matches.fit("F").inliers.shape == (len(matches),)
        if kind == "turned.jpg":
            assert matches.size0 == (100, 120)


def test_an_image_of_one_line_makes_no_picture_of_a_mile():
    line = np.zeros((20, 20000, 3), np.uint8)
    picture = viz.draw_matches(line, IMAGES[0], np.array([[10000, 10]]), np.array([[60, 50]]), height=100, gap=0)
    assert picture.shape == (100, 400 + 120, 3) and (picture[1:90, :150] == 255).all()
    assert (picture[:5, 195:205] < 255).any()  # the line starts in the middle of the strip at the top
