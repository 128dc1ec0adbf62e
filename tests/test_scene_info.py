"""Pickled NumPy structures are read as data: equal to NumPy's own reading, and nothing in them runs."""

import io
import os
import pickle
import pickletools
import zipfile

import numpy as np
import pytest

from gim_jax.data import scene_info


def info():
    paths = np.empty(3, object)
    paths[:] = ["a/b.jpg", None, "c.jpg"]
    poses = np.empty(2, object)
    poses[:] = [np.eye(4), np.arange(16.0).reshape(4, 4).T]
    infos = [((0, 2), np.float32(0.25), np.ones((4, 2))), (np.array([1, 2]), 0.5, np.zeros((0, 2)))]
    return {
        "image_paths": paths,
        "poses": poses,
        "pair_infos": infos,
        "n": np.int64(7),
        "big": np.arange(3, dtype=">i4"),
    }


def assert_same(a, b):
    if (isinstance(a, np.ndarray) and a.dtype.hasobject) or isinstance(a, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_dictionaries(tmp_path, protocol):
    (tmp_path / "a.npz").write_bytes(pickle.dumps(info(), protocol))
    got = scene_info.load(tmp_path / "a.npz")
    assert got.keys() == info().keys()
    for key, value in info().items():
        assert_same(value, got[key])


def test_archives_with_objects(tmp_path):
    content = info()
    infos = np.empty(2, object)
    infos[:] = content["pair_infos"]
    np.savez(tmp_path / "a.npz", **{**content, "pair_infos": infos}, whole=np.array(content, dtype=object))
    got = scene_info.load(tmp_path / "a.npz")
    assert_same(content["poses"], got["poses"])
    assert_same(infos, got["pair_infos"])
    assert_same(content["image_paths"], got["whole"]["image_paths"])


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "call", [(os.system, "touch HACKED"), (eval, "1"), (np.load, "x"), (getattr, "x", "y"), (np.zeros, 3)]
)
def test_nothing_runs(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npz").write_bytes(pickle.dumps({"x": Runs(*call)}, 4))
    with pytest.raises(ValueError, match=r"a\.npz: .*asks for .*nothing of it was executed"):
        scene_info.load("a.npz")
    array = np.empty(1, object)
    array[0] = Runs(*call)
    np.savez(tmp_path / "b.npz", x=array)
    with pytest.raises(ValueError, match="nothing of it was executed"):
        scene_info.load("b.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_container_that_is_named_many_times_is_read_once(tmp_path):
    node = [0] * 10
    for _ in range(9):
        node = [node] * 10  # 10^10 numbers, written out
    (tmp_path / "a.npz").write_bytes(pickle.dumps({"x": node}, 2))
    assert (tmp_path / "a.npz").stat().st_size < 500
    got = scene_info.load(tmp_path / "a.npz")["x"]
    for _ in range(9):
        assert len(got) == 10 and all(one is got[0] for one in got)
        got = got[0]
    assert got == [0] * 10


def test_damage_is_named(tmp_path):
    whole = pickle.dumps(info(), 4)
    path = tmp_path / "a.npz"
    for data in (b"", b"\x80", whole[: len(whole) // 2], whole.replace(b"f8", b"V8"), pickle.dumps([1]), b"PK\x03\x04"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.npz: not a whole file"):
            scene_info.load(path)
    with pytest.raises(ValueError, match="no such file"):
        scene_info.load(tmp_path / "none.npz")


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    text = pickle.dumps(np.zeros(4), 2)
    assert any(op.name == "BININT1" for op, *_ in pickletools.genops(text))
    path = tmp_path / "a.npz"
    # the shape (4,) becomes (200,) over the same bytes
    path.write_bytes(pickle.dumps({"x": np.zeros(4)}, 2).replace(b"K\x04\x85", b"K\xc8\x85"))
    with pytest.raises(ValueError, match="an array of"):
        scene_info.load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        member.write(b"\x93NUMPY")
        for _ in range(300):
            member.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than"):
        scene_info.load(path)
    deep = []
    for _ in range(40):
        deep = [deep]
    path.write_bytes(pickle.dumps({"x": deep}, 4))
    with pytest.raises(ValueError, match="nested more than"):
        scene_info.load(path)
    buffer = io.BytesIO()
    np.save(buffer, np.arange(5))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", buffer.getvalue()[:-8])
    with pytest.raises(ValueError, match="not a whole file"):
        scene_info.load(path)
