"""What `gim-jax export` writes is what hloc, COLMAP and a model hub read."""

import inspect
import json
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from gim_jax import cli, load_matcher
from gim_jax.image import encode_jpeg
from gim_jax.models import MODELS
from gim_jax.tasks import colmap_text, hloc
from gim_jax.weights import store
from tests import oracles
from tests.networks import random_variables


def views() -> list[np.ndarray]:
    """Three views of random blocks, each 10 px to the right of the one before."""
    picture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(picture[:, x : x + 280]) for x in (0, 10, 20)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index, view in enumerate(views()):
        (folder / f"{index}.jpg").write_bytes(encode_jpeg(view, 95))
    return folder


def blocks(text: str) -> dict[tuple[str, str], np.ndarray]:
    """Read COLMAP's match list: blocks separated by blank lines, as its documentation has it."""
    found = {}
    for block in text.strip().split("\n\n"):
        heading, *rows = block.splitlines()
        name0, name1 = heading.split()
        found[name0, name1] = np.array([row.split() for row in rows], int)
    return found


def test_colmap_files_hold_the_shift_in_its_pixels(photos, tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed: pip install 'gim-jax[sfm]'")
    words = ["export", "--to", "colmap", "--model", "rootsift", "--images", str(photos), str(tmp_path / "out")]
    assert cli.main(words) == 0
    kpts = {}
    for name in ("0.jpg", "1.jpg", "2.jpg"):
        (num, size), *rows = [line.split() for line in (tmp_path / f"out/features/{name}.txt").read_text().splitlines()]
        assert int(num) == len(rows) and size == "128" and {len(row) for row in rows} == {4 + 128}
        kpts[name] = np.array([row[:2] for row in rows], float)
    with pycolmap.Database.open(str(tmp_path / "out/database.db")) as database:
        stored = np.asarray(database.read_keypoints(database.read_image_with_name("0.jpg").image_id))[:, :2]
    np.testing.assert_allclose(kpts["0.jpg"], stored, atol=1e-4)  # the database has COLMAP's convention, too
    lists = [blocks((tmp_path / f"out/matches_{kind}.txt").read_text()) for kind in ("raw", "inliers")]
    for found in lists:
        assert set(found) == {("0.jpg", "1.jpg"), ("0.jpg", "2.jpg"), ("1.jpg", "2.jpg")}
        index = found["0.jpg", "2.jpg"]
        shift = kpts["0.jpg"][index[:, 0]] - kpts["2.jpg"][index[:, 1]]
        np.testing.assert_allclose(np.median(shift, 0), [20, 0], atol=0.05)
    assert all(len(lists[1][pair]) <= len(lists[0][pair]) for pair in lists[0])
    inliers = lists[1]["0.jpg", "2.jpg"]
    shift = kpts["0.jpg"][inliers[:, 0]] - kpts["2.jpg"][inliers[:, 1]]
    assert np.abs(shift - [20, 0]).max() < 5  # verified: no wrong one is left


def test_first_pixel_is_at_a_half(tmp_path):
    colmap_text.write_features(tmp_path, {"sub/a.jpg": np.array([[0, 0], [2.25, 1]], np.float32)})
    heading, *rows = (tmp_path / "sub/a.jpg.txt").read_text().splitlines()
    assert heading == "2 128" and [row.split()[:4] for row in rows] == [
        ["0.5", "0.5", "1", "0"],
        ["2.75", "1.5", "1", "0"],
    ]


def test_matches_have_a_blank_line_between_pairs(tmp_path):
    index = [np.array([[0, 1], [2, 3]]), np.zeros((0, 2), int), np.array([[4, 5]])]
    colmap_text.write_matches(tmp_path / "m.txt", [("a", "b"), ("a", "c"), ("b", "c")], index)
    assert (tmp_path / "m.txt").read_text() == "a b\n0 1\n2 3\n\nb c\n4 5\n\n"


def test_hloc_files_hold_the_shift(photos, tmp_path):
    pytest.importorskip("h5py", reason="h5py is not installed: pip install 'gim-jax[sfm]'")
    out = tmp_path / "out"
    assert cli.main(["export", "--to", "hloc", "--model", "rootsift", "--images", str(photos), str(out)]) == 0
    kpts = hloc.read_features(out / "features.h5", ["0.jpg", "1.jpg"])
    [index] = hloc.read_matches(out / "matches.h5", [("0.jpg", "1.jpg")])
    shift = kpts["0.jpg"][index[:, 0]] - kpts["1.jpg"][index[:, 1]]
    np.testing.assert_allclose(np.median(shift, 0), [10, 0], atol=0.05)
    assert (out / "pairs.txt").read_text() == "0.jpg 1.jpg\n0.jpg 2.jpg\n1.jpg 2.jpg\n"


class Tensor:
    """What the module uses of a tensor."""

    def __init__(self, array):
        self.array = array

    def __getitem__(self, index):
        return Tensor(self.array[index])

    def cpu(self):
        return self.array

    def new_tensor(self, values):
        return np.asarray(values)


@pytest.fixture
def hloc_package(monkeypatch):
    """A package with hloc's documented base class: conf over default_conf, required_inputs, _init, _forward."""

    class BaseModel(ABC):
        default_conf, required_inputs = {}, []

        def __init__(self, conf):
            self.conf = conf = {**self.default_conf, **conf}
            self._init(conf)

        def __call__(self, data):
            assert set(self.required_inputs) <= set(data)
            return self._forward(data)

        @abstractmethod
        def _init(self, conf): ...

        @abstractmethod
        def _forward(self, data): ...

    for name in ("hloc", "hloc.utils", "hloc.utils.base_model", "hloc.matchers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["hloc.utils.base_model"].BaseModel = BaseModel
    monkeypatch.delitem(sys.modules, "hloc.matchers.gim_jax", raising=False)
    yield BaseModel
    sys.modules.pop("hloc.matchers.gim_jax", None)


def test_hloc_finds_one_class_and_gets_best_matches_first(hloc_package):
    hloc.register()
    module = __import__("hloc.matchers.gim_jax", fromlist=[""])  # as hloc's dynamic_load does
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == "hloc.matchers.gim_jax"]
    assert len(classes) == 1 and issubclass(classes[0], hloc_package)
    model = classes[0](hloc.CONF["model"] | {"settings": {"max_keypoints": 500}, "max_num_matches": 40})
    data = {f"image{side}": Tensor(views()[side].transpose(2, 0, 1)[None] / np.float32(255)) for side in (0, 1)}
    pred = model(data)
    assert set(pred) == {"keypoints0", "keypoints1", "scores"} and len(pred["scores"]) == 40
    assert (np.diff(pred["scores"]) <= 0).all()
    np.testing.assert_allclose(np.median(pred["keypoints0"] - pred["keypoints1"], 0), [10, 0], atol=0.05)


@pytest.fixture
def imcui(tmp_path, monkeypatch):
    """`match_dense` of the hloc that the package imcui, image-matching-webui, carries."""
    monkeypatch.chdir(tmp_path)  # it writes a log where it is imported
    oracles.torch()  # with the operators that its torchvision looks for
    theirs = pytest.importorskip("imcui.hloc.match_dense")  # the reason names the package that is missing
    loader = theirs.torch.utils.data.DataLoader  # it would fork this process, which has threads, sixteen times
    monkeypatch.setattr(theirs.torch.utils.data, "DataLoader", lambda *a, **k: loader(*a, **k | {"num_workers": 0}))
    yield theirs
    sys.modules.pop("imcui.hloc.matchers.gim_jax", None)


@pytest.mark.parametrize("copied", [False, True])
def test_hloc_itself_runs_the_module(imcui, photos, tmp_path, monkeypatch, copied):
    if copied:  # as hloc/matchers/gim_jax.py
        shutil.copy(Path(hloc.__file__).parent / "hloc_matcher.py", tmp_path / "gim_jax.py")
        monkeypatch.setattr(sys.modules["imcui.hloc.matchers"], "__path__", [str(tmp_path)])
    else:
        hloc.register("imcui.hloc")
    hloc.write_pairs(tmp_path / "pairs.txt", [("0.jpg", "1.jpg")])
    (tmp_path / "out").mkdir()
    features, matches = imcui.main(hloc.CONF, tmp_path / "pairs.txt", photos, export_dir=tmp_path / "out")
    kpts = hloc.read_features(features, ["0.jpg", "1.jpg"])
    [index] = hloc.read_matches(matches, [("0.jpg", "1.jpg")])
    shift = kpts["0.jpg"][index[:, 0]] - kpts["1.jpg"][index[:, 1]]
    np.testing.assert_allclose(np.median(shift, 0), [10, 0], atol=0.5)  # hloc rounds to cells of 1 px
    assert len(index) > 100


def test_hloc_itself_reads_our_files(imcui, tmp_path):
    theirs = sys.modules["imcui.hloc.utils.io"]
    kpts = {"a/0.jpg": np.array([[0, 0], [1234.25, 7]], np.float32), "b/1.jpg": np.array([[3, 4.125]], np.float32)}
    sizes, found = dict.fromkeys(kpts, (2000, 10)), [(np.array([[1, 0]]), np.array([0.5], np.float32))]
    hloc.write_features(tmp_path / "features.h5", kpts, sizes)
    hloc.write_matches(tmp_path / "matches.h5", [("a/0.jpg", "b/1.jpg")], found, kpts)
    for name, points in kpts.items():
        stored, uncertainty = theirs.get_keypoints(tmp_path / "features.h5", name, return_uncertainty=True)
        np.testing.assert_array_equal(stored, points)  # to the quarter of a pixel beyond 1024
        assert uncertainty == 1
    for names, want in ((("a/0.jpg", "b/1.jpg"), [[1, 0]]), (("b/1.jpg", "a/0.jpg"), [[0, 1]])):
        index, scores = theirs.get_matches(tmp_path / "matches.h5", *names)
        assert index.tolist() == want and scores.tolist() == [0.5]


def test_missing_hloc_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "hloc", None)
    with pytest.raises(ValueError, match=r"^hloc is not installed"):
        hloc.register()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    info = MODELS["loftr_tiny"]
    image = np.zeros((1, 64, 64, 1), np.float32)
    path = tmp_path_factory.mktemp("hub") / "tiny.safetensors"
    meta = {"model": "loftr", "name": "loftr_tiny", "config": vars(info.config) | {"thr": 0.0}}
    store.save(path, random_variables(info.network(), image, image), meta)
    return path


def test_hub_folder_is_the_same_matcher(weights, tmp_path):
    yaml = pytest.importorskip("yaml")
    out = tmp_path / "folder"
    assert cli.main(["export", "--to", "hub", "--model", "loftr_tiny", "--weights", str(weights), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    front, config = yaml.safe_load(front), json.loads((out / "config.json").read_text())
    assert front["library_name"] == "gim-jax" and front["license"] == "other" and front["license_name"] == "yours"
    assert config["config"]["thr"] == 0.0 and config["sha256"] in text and 'load_matcher("loftr_tiny"' in text
    want, found = (load_matcher("loftr_tiny", path) for path in (weights, out))
    assert found.config == want.config and found.config.thr == 0.0
    jax.tree.map(np.testing.assert_array_equal, found.variables, want.variables)


CAMERA = ("--camera-params", "500", "--camera-model")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--to", "hub", "--model", "rootsift"], "rootsift has no weights"),
        (["--to", "hub", "--model", "loftr_tiny", "--weights", "/none"], "/none: no such file"),
        (["--to", "hloc", "--model", "rootsift"], "--to hloc: needs --images"),
        (["--to", "colmap", "--model", "rootsift", "--images", "/none"], "/none: no such folder"),
        (["--to", "colmap", "--model", "rootsift", "--images", "P", "--camera-model", "PINHOLE"], "found one of them"),
        (["--to", "colmap", "--model", "rootsift", "--images", "P", *CAMERA, "NOPE"], "found 'NOPE', expected one of"),
        (["--to", "colmap", "--model", "rootsift", "--images", "P", *CAMERA, "PINHOLE"], "PINHOLE: found 1 parameters"),
        (["--to", "hloc", "--model", "rootsift", "--images", "P", "--pairs", "/none.txt"], "cannot be read as a list"),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, capsys, words, message):
    words = [str(photos) if word == "P" else word for word in words]
    assert cli.main(["export", *words, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
