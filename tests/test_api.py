"""The public API: one call for any kind of input, original pixels out, one compilation per size, clear errors."""

import dataclasses
import hashlib
import json

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import gim_jax
from gim_jax import api, viz
from gim_jax.cli import main
from gim_jax.models import FAMILIES, MODELS
from gim_jax.weights import store

RNG = np.random.default_rng(0)
SCENE = cv2.resize(RNG.integers(0, 255, (60, 80, 3), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
SHIFT = np.array([24, 8])
IMAGE0, IMAGE1 = SCENE[:200, :280], SCENE[SHIFT[1] : SHIFT[1] + 200, SHIFT[0] : SHIFT[0] + 280]


SMALL = {"initial_dim": 16, "block_dims": (16, 24, 32), "num_heads": 2, "coarse_layers": ("self", "cross")}


def random_variables(info, **config):
    """Variables of a network, drawn by NumPy because that needs no compilation."""
    shapes = info.template(dataclasses.replace(info.config, **config))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        if path[-1].key != "kernel":
            return np.zeros(leaf.shape, np.float32)
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def tiny():
    return random_variables(MODELS["loftr_tiny"], **SMALL)


@pytest.fixture(scope="module")
def matcher(tiny):
    return gim_jax.load_matcher("loftr_tiny", tiny, batch_size=2, long_side=128, thr=0.0, border_rm=0, **SMALL)


def same(a, b):
    np.testing.assert_array_equal(a.kpts0, b.kpts0)
    np.testing.assert_array_equal(a.kpts1, b.kpts1)
    np.testing.assert_array_equal(a.conf, b.conf)


def test_rootsift_finds_the_shift():
    matches = gim_jax.match(IMAGE0, IMAGE1)
    assert len(matches) > 100 and matches.size0 == matches.size1 == (280, 200)
    assert matches.kpts0.dtype == matches.kpts1.dtype == matches.conf.dtype == np.float32
    assert np.median(np.abs(matches.kpts0 - matches.kpts1 - SHIFT), axis=0).max() < 0.3
    assert (matches.conf >= 0).all() and (matches.conf <= 1).all()


def test_paths_pil_and_arrays_give_the_same(tmp_path):
    Image.fromarray(IMAGE0).save(tmp_path / "a b.png")
    Image.fromarray(IMAGE1).save(tmp_path / "1.png")
    want = gim_jax.match(IMAGE0, IMAGE1)
    same(gim_jax.match(tmp_path / "a b.png", str(tmp_path / "1.png")), want)
    same(gim_jax.match(Image.fromarray(IMAGE0), Image.fromarray(IMAGE1)), want)


def test_points_come_back_in_original_pixels_whatever_the_resize():
    matches = gim_jax.match(IMAGE0, cv2.resize(IMAGE1, (560, 400)), long_side=280)
    expected = ((matches.kpts0 - SHIFT) + 0.5) * 2 - 0.5
    assert np.median(np.abs(matches.kpts1 - expected), axis=0).max() < 0.6
    assert matches.size1 == (560, 400)


@pytest.mark.parametrize("kind", ["F", "H", "E"])
def test_fit_adds_model_and_inliers(kind):
    matches = gim_jax.match(IMAGE0, IMAGE1)
    K = np.array([[300.0, 0, 140], [0, 300, 100], [0, 0, 1]])
    fitted = matches.fit(kind, K, K)
    same(fitted, matches)
    assert matches.model is None and fitted.inliers.shape == (len(matches),)
    assert fitted.inliers.mean() > 0.8
    if kind == "H":
        np.testing.assert_allclose(fitted.model / fitted.model[2, 2], [[1, 0, -24], [0, 1, -8], [0, 0, 1]], atol=0.2)


def test_fit_of_nothing_says_why():
    fitted = gim_jax.match(np.zeros((80, 80, 3), np.uint8), IMAGE1).fit("F")
    assert fitted.model is None and len(fitted.inliers) == 0 and "0 matches" in fitted.reason


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((20, 2000, 3), np.uint8),
        np.full((200, 280, 3), 128, np.uint8),
        np.zeros((200, 280), np.uint16),
    ],
)
def test_images_without_content_give_no_matches(image):
    matches = gim_jax.match(image, IMAGE1)
    assert len(matches) == 0 and matches.kpts0.shape == (0, 2) and matches.size0 == image.shape[1::-1]


def test_network_returns_points_inside_the_images(matcher):
    matches = matcher(IMAGE0, SCENE)
    assert len(matches) > 5  # no threshold: mutual best cells of random weights
    for kpts, (width, height) in ((matches.kpts0, matches.size0), (matches.kpts1, matches.size1)):
        assert np.isfinite(kpts).all() and (kpts > -8).all() and (kpts < [width + 8, height + 8]).all()
    assert (np.diff(matches.conf) <= 0).all() and matches.size1 == (320, 240)


def test_one_compilation_for_all_pairs_of_a_bucket(matcher):
    matcher(IMAGE0, IMAGE1)
    before = matcher.num_traces
    for height in (200, 210, 240):  # 88, 96 and 108 rows of 128 columns: one bucket of 128x128
        matcher(SCENE[:height, :280], RNG.integers(0, 255, (200, 280, 3), dtype=np.uint8))
    assert matcher.num_traces == before
    matcher(SCENE[:100, :320], SCENE[:100, :320])  # 128x40: a bucket of 128x64
    assert matcher.num_traces == before + 1


def test_a_batch_equals_its_pairs(matcher):
    pairs = [(IMAGE0, IMAGE1), (IMAGE1, IMAGE0), (SCENE, IMAGE0)]
    for got, pair in zip(matcher.match_batch(pairs), pairs):
        want = matcher(*pair)
        assert abs(len(got) - len(want)) <= 1  # ties of random weights may fall either way
        near = np.abs(got.kpts0[:, None] - want.kpts0[None]).sum(-1).min(1) < 0.1
        assert near.mean() > 0.95


def test_weights_come_from_a_file(tiny, tmp_path):
    store.save(tmp_path / "w.safetensors", tiny, {"model": "loftr", "config": {}})
    loaded = gim_jax.load_matcher("loftr_tiny", tmp_path / "w.safetensors", **SMALL)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, tiny)
    assert (
        loaded.describe()["weights"]["sha256"] == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    )
    json.dumps(loaded.describe())


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("nope", {}, "model: found 'nope', expected one of rootsift"),
        ("rootsift", {"weights": "w"}, "rootsift has none"),
        ("rootsift", {"thr": 1}, "rootsift has no thr; known: max_keypoints"),
        ("loftr_tiny", {}, "loftr_tiny needs some; source: gim-jax train"),
        ("loftr_tiny", {"weights": "/none"}, "/none: no such file"),
    ],
)
def test_bad_names_and_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        gim_jax.load_matcher(name, **settings)


def test_weights_of_another_model_are_refused(tiny, tmp_path):
    store.save(tmp_path / "w.safetensors", tiny, {"model": "dkm"})
    with pytest.raises(ValueError, match="weights of 'dkm', expected loftr_tiny"):
        gim_jax.load_matcher("loftr_tiny", tmp_path / "w.safetensors")
    store.save(tmp_path / "w.safetensors", {"params": {"x": np.zeros(3)}}, {"model": "loftr"})
    with pytest.raises(ValueError, match=r"w\.safetensors: not the weights of this model: missing .*more"):
        gim_jax.load_matcher("loftr_tiny", tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="not the weights"):
        gim_jax.load_matcher("loftr_outdoor", tiny)


def test_every_model_has_a_configuration_and_a_family():
    for info in MODELS.values():
        if info.family != "rootsift":
            assert info.family in FAMILIES and callable(info.module.match) and info.config is not None
            assert info.channels == getattr(info.config, "in_channels", info.channels)


@pytest.mark.parametrize("image", [np.zeros((200, 280, 3), np.uint8), IMAGE1])
def test_network_stays_finite_on_black_and_on_identical_images(matcher, image):
    matches = matcher(image, image)
    assert np.isfinite(matches.kpts0).all() and np.isfinite(matches.kpts1).all() and np.isfinite(matches.conf).all()


def test_configuration_comes_with_the_weights(tmp_path):
    """A network trained with other widths than the named model's is built as it was trained."""
    variables = random_variables(MODELS["loftr_tiny"], **SMALL)
    meta = {"model": "loftr", "name": "loftr_tiny", "config": SMALL | {"thr": 0.5}}
    meta["config"] |= {"dtype": "bfloat16", "remat": False}  # of the training, not of the network: left out
    store.save(tmp_path / "w.safetensors", variables, meta)
    loaded = gim_jax.load_matcher("loftr_tiny", tmp_path / "w.safetensors", border_rm=1)
    assert loaded.config == dataclasses.replace(MODELS["loftr_tiny"].config, **SMALL, thr=0.5, border_rm=1)
    store.save(tmp_path / "w.safetensors", variables, meta | {"config": {"depth": 3}})
    with pytest.raises(ValueError, match=r"w\.safetensors: LoFTRConfig has no depth"):
        gim_jax.load_matcher("loftr_tiny", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("loftr_tiny", "temperature", 0.0),
        ("loftr_tiny", "fine_window_size", 0),
        ("loftr_tiny", "fine_window_size", -3),
        ("loftr_tiny", "block_dims", [16, 24, -48]),
        ("loftr_tiny", "initial_dim", 0),
        ("superglue_rootsift", "num_layers", 10**9),
        ("lightglue_sift", "num_layers", 10**9),
        ("dkm_tiny", "blocks", [3, 4, 10**9, 3]),
        ("dkm_tiny", "num_hidden", 10**9),
    ],
)
def test_configurations_of_a_file_that_make_no_network_name_it(tmp_path, name, key, value):
    meta = {"model": MODELS[name].family, "config": {key: value}}
    store.save(tmp_path / "w.safetensors", {"params": {"x": np.zeros(3, np.float32)}}, meta)
    with pytest.raises(ValueError, match=r"w\.safetensors: "):
        gim_jax.load_matcher(name, tmp_path / "w.safetensors")


def test_picture_is_as_wide_as_both_images():
    picture = viz.draw_matches(IMAGE0, IMAGE1, np.zeros((0, 2)), np.zeros((0, 2)), height=100, gap=10)
    assert picture.shape == (100, 140 + 10 + 140, 3)


def test_lines_join_the_points_in_the_colour_of_their_confidence():
    black = np.zeros((100, 100, 3), np.uint8)
    kpts0, kpts1 = [[10, 20], [10, 70]], [[90, 20], [90, 70]]
    picture = viz.draw_matches(black, black, kpts0, kpts1, np.array([1.0, 0.0]), height=100, gap=0)
    assert picture[20, 60, 1] > 200 and not picture[20, 60, [0, 2]].any()  # anti-aliased green
    assert picture[70, 60, 0] > 200 and not picture[70, 60, 1:].any()  # red
    assert not picture[45].any() and not picture[20, :5].any() and not picture[20, 195:].any()
    picture = viz.draw_matches(black, black, kpts0, kpts1, error=np.array([0, np.inf]), height=100, gap=0)
    assert picture[20, 60, 1] > 200 > picture[20, 60, 0] and picture[70, 60, 0] > 200 > picture[70, 60, 1]


def test_crowds_are_thinned():
    black = np.zeros((400, 100, 3), np.uint8)
    kpts = np.stack([np.full(400, 50), np.arange(400)], -1)
    picture = viz.draw_matches(black, black, kpts, kpts, height=400, max_lines=20)
    assert 20 <= picture[:, 75].any(-1).sum() <= 20 * 3  # an anti-aliased line may touch three rows


@pytest.fixture
def files(tmp_path):
    Image.fromarray(IMAGE0).save(tmp_path / "0.png")
    Image.fromarray(IMAGE1).save(tmp_path / "1.png")
    return [str(tmp_path / "0.png"), str(tmp_path / "1.png")]


def test_match_command_writes_picture_and_json(files, tmp_path, capsys):
    out, file = tmp_path / "out.png", tmp_path / "out.json"
    assert main(["match", *files, "--fit", "H", "--out", str(out), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    want = gim_jax.match(*files)
    np.testing.assert_allclose(result["kpts1"], want.kpts1)
    assert result["size0"] == [280, 200] and len(result["inliers"]) == len(want)
    assert cv2.imread(str(out)).shape == (540, 2 * 756 + 8, 3)
    assert f"{len(want)} matches between 280x200 and 280x200" in capsys.readouterr().out


def test_match_command_fits_an_essential_matrix(files, tmp_path):
    K = ["300", "300", "140", "100"]
    file = str(tmp_path / "e.json")
    assert main(["match", *files, "--fit", "E", "--K0", *K, "--K1", *K, "--json", file]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["fit"]["kind"] == "E"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/none.png", "IMAGE"], "/none.png: no such file"),
        (["IMAGE", "/"], "/: is not a file"),
        (["IMAGE", "IMAGE", "--model", "nope"], "model: found 'nope'"),
        (["IMAGE", "IMAGE", "--fit", "E"], "--fit E: needs --K0 and --K1"),
        (["IMAGE", "IMAGE", "--out", "/no/such/x.png"], "the folder /no/such does not exist"),
        (["IMAGE", "IMAGE", "--fit", "F", "--threshold", "nan"], "--threshold: found nan, expected a positive number"),
        (["IMAGE", "IMAGE", "--weights", "w"], "rootsift has none"),
    ],
)
def test_match_command_refuses_in_one_line(files, capsys, arguments, message):
    assert main(["match", *[files[0] if a == "IMAGE" else a for a in arguments]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_models_command_lists_all(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in api.list_models())
    assert main(["models", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(api.list_models())


def test_compilation_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        assert api.enable_compilation_cache() == tmp_path / "gim-jax" / "xla"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "gim-jax" / "xla")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://pod/xla")  # a user's own goes before
        api.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "gs://pod/xla"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
