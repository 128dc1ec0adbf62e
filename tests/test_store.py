"""Weights survive the trip to disk; files that are not ours are refused in one line."""

import os
import pickle

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gim_jax.weights import store

VARIABLES = {
    "params": {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": np.zeros(2, np.float32)}},
    "batch_stats": {"bn": {"mean": np.float32(3).reshape(())}},
}
META = {"model": "loftr", "config": {"thr": 0.2, "dims": [1, 2]}, "note": "größer"}


@pytest.fixture
def path(tmp_path):
    store.save(tmp_path / "w.safetensors", VARIABLES, META)
    return tmp_path / "w.safetensors"


def test_round_trip(path):
    variables, meta = store.load(path)
    assert meta == META
    assert variables["params"]["a"]["kernel"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert variables["params"]["a"]["bias"].shape == (2,)
    assert variables["batch_stats"]["bn"]["mean"].shape == () and variables["batch_stats"]["bn"]["mean"] == 3
    assert set(variables) == {"params", "batch_stats"} and set(variables["params"]["a"]) == {"kernel", "bias"}


def test_jax_arrays_and_low_precision(tmp_path):
    store.save(tmp_path / "b", {"params": {"w": jnp.full((2, 2), 1.5, jnp.bfloat16)}}, {})
    loaded = store.load(tmp_path / "b")[0]["params"]["w"]
    assert loaded.dtype == jnp.bfloat16 and (np.asarray(loaded, np.float32) == 1.5).all()


def test_saving_is_atomic(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store.save(path, {"params": {"w": np.zeros(100)}}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.99])
def test_truncated_file(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"w\.safetensors: not a whole safetensors file"):
        store.load(path)


def test_a_pickle_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="not a whole safetensors"):
        store.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


def test_foreign_safetensors(tmp_path):
    save_file({"conv.weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: .*convert"):
        store.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", '{"config": [1]}', "{"])
def test_metadata_of_another_kind(tmp_path, text):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "w.safetensors", metadata={store.META: text})
    with pytest.raises(ValueError, match=r"w\.safetensors: .*metadata"):
        store.load(tmp_path / "w.safetensors")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        store.load(tmp_path / "none")
    with pytest.raises(ValueError, match="a folder"):
        store.load(tmp_path)


def test_names_with_slashes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="slash"):
        store.save(tmp_path / "w", {"params": {"a/b": np.zeros(1)}}, {})
    assert not os.listdir(tmp_path)


def test_check_lists_missing_unknown_and_misshapen():
    template = {"params": {"a": {"kernel": np.zeros((3, 2)), "scale": np.zeros(1)}}}
    found = {"params": {"a": {"kernel": np.zeros((3, 4))}, "b": np.zeros(1)}}
    with pytest.raises(ValueError) as error:
        store.check(found, template, "w.safetensors")
    text = str(error.value)
    assert text.startswith("w.safetensors: ")
    assert "missing params/a/scale" in text and "unknown params/b" in text
    assert "params/a/kernel: found shape (3, 4), expected (3, 2)" in text
    store.check(template, template, "same")


@pytest.mark.parametrize(
    "value, message",
    [
        (np.full(2, np.nan, np.float32), "found NaN or infinity"),
        (np.array([0, np.inf], np.float16), "found NaN or infinity"),
        (np.full(2, np.nan, ml_dtypes.bfloat16), "found NaN or infinity"),
        (np.zeros(2, np.int64), "found int64, expected floating point"),
        (np.zeros(2, bool), "found bool, expected floating point"),
    ],
)
def test_weights_are_finite_and_floating(value, message):
    template = {"params": {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}}
    for kind in (np.float32, np.float64, ml_dtypes.bfloat16):
        store.check({"params": {"a": np.ones(2, kind), "b": np.zeros(1, kind)}}, template, "w")
    with pytest.raises(ValueError, match=f"w: not the weights of this model: params/a: {message}"):
        store.check({"params": {"a": value, "b": np.zeros(1, np.float32)}}, template, "w")
