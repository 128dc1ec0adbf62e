"""A matcher leaves as a file that JAX alone runs, with the same matches."""

import json
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest

import gim_jax
from gim_jax import export
from gim_jax.cli import main
from gim_jax.models import MODELS
from gim_jax.weights import store
from tests.networks import random_variables

NAME, SIZE = "loftr_tiny", (192, 128)
RNG = np.random.default_rng(0)
SCENE = cv2.resize(RNG.integers(0, 255, (30, 40), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
PAIRS = [(SCENE[:128, :192], SCENE[8:136, 16:208]), (SCENE[:104, 40:200], SCENE[30:150, 60:236])]  # full, and smaller
ALONE = """
import json, sys
sys.modules["gim_jax"] = None  # importing it fails
import jax, jax.export, numpy as np
artefact, weights, inputs, outputs = sys.argv[1:]
usage = json.load(open(artefact + ".json"))["usage"]
names = np.load(inputs)
image0, image1, size0, size1 = (names[n] for n in ("image0", "image1", "size0", "size1"))
exec(usage)
assert "gim_jax" not in [m for m in sys.modules if sys.modules[m] is not None]
np.savez(outputs, **out)
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the tiny LoFTR; a low threshold lets them match."""
    config = MODELS[NAME].config
    image = np.zeros((1, 64, 64, 1), np.float32)
    path = tmp_path_factory.mktemp("export") / "tiny.safetensors"
    variables = random_variables(MODELS[NAME].network(), image, image)
    store.save(path, variables, {"model": "loftr", "name": NAME, "config": vars(config) | {"thr": 0.0}})
    return path


@pytest.fixture(scope="module")
def artefact(weights):
    out = weights.parent / "tiny.stablehlo"
    arguments = ["--model", NAME, "--weights", str(weights), "--size", "192", "128", "--batch", "2"]
    assert main(["export", *arguments, str(out)]) == 0
    return out


def test_artefact_alone_gives_the_same_matches(weights, artefact, tmp_path):
    matcher = gim_jax.load_matcher(NAME, weights, batch_size=2, long_side=None)
    want = [matcher(*(np.dstack([image] * 3) for image in pair)) for pair in PAIRS]
    inputs = {}
    for side in (0, 1):
        batch = np.zeros((2, SIZE[1], SIZE[0], 1), np.uint8)
        for row, pair in enumerate(PAIRS):
            height, width = pair[side].shape
            batch[row, :height, :width, 0] = pair[side]
        inputs |= {f"image{side}": batch, f"size{side}": np.array([p[side].shape[::-1] for p in PAIRS], np.int32)}
    np.savez(tmp_path / "in.npz", **inputs)
    command = [sys.executable, "-c", ALONE, artefact.name, weights.name, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, check=True, cwd=artefact.parent)
    out = np.load(tmp_path / "out.npz")
    for row, matches in enumerate(want):
        keep = out["mask"][row]
        assert len(matches) == keep.sum() > 20
        np.testing.assert_allclose(out["conf"][row][keep], matches.conf, atol=1e-6)
        for side, kpts in enumerate((matches.kpts0, matches.kpts1)):
            np.testing.assert_allclose(out[f"kpts{side}"][row][keep], kpts, atol=1e-3)


def test_description_says_what_goes_in_and_comes_out(weights, artefact):
    about = json.loads(export.description_of(artefact).read_text())
    exported = jax.export.deserialize(bytearray(artefact.read_bytes()))
    (entries, *images), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    assert set(entries) == set(export.abstract_inputs(MODELS[NAME], store.load(weights)[0], SIZE)[0])
    for name, found in zip(("image0", "image1", "size0", "size1"), images):
        assert about["inputs"][name] == {"shape": list(found.shape), "dtype": str(found.dtype)}
    assert about["inputs"]["image0"] == {"shape": [2, 128, 192, 1], "dtype": "uint8"}
    assert about["outputs"]["kpts1"] == {"shape": [2, 384, 2], "dtype": "float32"}  # 24 x 16 cells
    assert about["platforms"] == list(exported.platforms) == ["cpu", "cuda", "tpu"]
    assert about["weights"]["licence"] == "yours" and len(about["weights"]["sha256"]) == 64
    assert about["weights"]["num_arrays"] == len(entries) and artefact.stat().st_size == about["artefact"]["bytes"]
    assert b"/gim_jax/" not in artefact.read_bytes()  # no paths of the machine that wrote it


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--model": ["nope"]}, "model: found 'nope', expected one of rootsift"),
        ({"--model": ["rootsift"]}, "rootsift runs in OpenCV"),
        ({"--model": ["superglue_rootsift"]}, "superglue_rootsift matches keypoints that come from elsewhere"),
        ({"--model": ["gim_loftr"]}, "tiny.safetensors: weights of 'loftr_tiny', expected gim_loftr"),
        ({"--weights": ["/none.safetensors"]}, "/none.safetensors: no such file"),
        ({"--size": ["100", "128"]}, "size: found 100x128, expected multiples of 64 up to 8192"),
        ({"--size": ["0", "64"]}, "size: found 0x64"),
        ({"--size": ["64000", "64000"]}, "size: found 64000x64000"),
        ({"--batch": ["0"]}, "batch_size: found 0, expected 1 to 1024"),
        ({"--platforms": ["cpu,toaster"]}, "platforms: found cpu, toaster, expected some of cpu, cuda, tpu"),
        ({"--platforms": [","]}, "platforms: found nothing"),
        ({"out": ["/no/such/x.stablehlo"]}, "the folder /no/such does not exist"),
        ({"out": ["/"]}, "is a folder, expected a file"),
    ],
)
def test_bad_input_is_refused_in_one_line(weights, tmp_path, capsys, change, message):
    given = {"--model": [NAME], "--weights": [str(weights)], "--size": ["64", "64"], "out": [str(tmp_path / "x")]}
    words = [word for key, values in (given | change).items() for word in ([] if key == "out" else [key]) + values]
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(weights, tmp_path, monkeypatch):
    """Killed while the artefact is on its way, the old one stays, with its description."""
    out = tmp_path / "x.stablehlo"
    out.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        export.export(NAME, weights, out, (64, 64), platforms=("cpu",))
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]
