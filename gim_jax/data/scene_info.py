"""Read NumPy structures that were pickled, as `scene_info` files of MegaDepth are, without unpickling blindly.

A pickle runs what it asks for. Here it may ask for arrays, dtypes and scalars of numbers and text, and for nothing
else; arrays are made from their bytes, sizes checked, so not even NumPy's own unpickling runs.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 1 << 28  # a released file has at most 20 MB
MAX_DEPTH = 12  # containers in containers
DTYPE = re.compile(r"([biufS]\d{0,4}|U\d{0,4}|\?|O8?)")
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
BAD_PICKLE = (  # what unpickling a damaged or hostile file may raise
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


def load(path: str | Path) -> dict[str, Any]:
    """Read a file: a pickled dictionary, or an npz archive whose arrays may be pickled.

    Returns:
      What it holds: dictionaries, lists, tuples, numbers, text and NumPy arrays; arrays of objects have such in them.

    Raises:
      ValueError: no such file, too large, not whole, asking for more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected an npz file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
    data = path.read_bytes()
    try:
        if data[:2] != b"PK":
            content = _unpickle(io.BytesIO(data), len(data))
            if not isinstance(content, dict):
                raise ValueError(f"found a {type(content).__name__}, expected a dictionary")
            return content
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise ValueError(f"unpacks to more than {MAX_BYTES} bytes")
            return {m.filename.removesuffix(".npy"): _read_npy(archive.read(m)) for m in members}
    except (*BAD_PICKLE, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a whole file of arrays: {str(error) or type(error).__name__}") from error


def _read_npy(data: bytes) -> Any:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"npy version {version}, expected 1.0 or 2.0")
    dtype = readers[version](file)[2]
    if not dtype.hasobject:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    content = _unpickle(file, len(data))
    return content.item() if isinstance(content, np.ndarray) and content.shape == () else content


def _unpickle(file: io.BytesIO, size: int) -> Any:
    return _plain(_Unpickler(file, size).load(), 0, {})


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, size: int):
        super().__init__(file, encoding="latin1")
        self._size = size

    def find_class(self, module: str, name: str) -> Any:
        known = {("numpy", "dtype"): _DType, ("numpy", "ndarray"): None, ("_codecs", "encode"): _encode}
        known |= {(m, "_reconstruct"): lambda *_: _Array(self._size) for m in MULTIARRAY}
        known |= {(m, "scalar"): _scalar for m in MULTIARRAY}
        known |= {(m, "_frombuffer"): _from_buffer for m in NUMERIC}
        known |= {(m, "bytes"): _no_bytes for m in ("builtins", "__builtin__")}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, expected only arrays; nothing of it was executed")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("asks for an object outside the file")


class _DType:
    """A dtype by its text, checked."""

    def __init__(self, text: Any, *_: Any):
        if not isinstance(text, str) or not DTYPE.fullmatch(text):
            raise pickle.UnpicklingError(f"dtype {text!r:.40}, expected numbers, text or objects")
        self.text, self.order = text, "<"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"byte order {order!r:.20}")
        self.order = order

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(object) if self.text[0] == "O" else np.dtype(self.order + self.text)


class _Array:
    """An array whose bytes or objects follow."""

    def __init__(self, size: int):
        self.size, self.array = size, np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not all(isinstance(n, int) and 0 <= n <= self.size for n in shape):
            raise pickle.UnpicklingError("an array of nonsense")
        count = math.prod(shape)
        if dtype.dtype.hasobject:
            if not isinstance(data, list) or len(data) != count:
                raise pickle.UnpicklingError(f"an array of {shape} with other objects")
            self.array = np.empty(count, object)
            self.array[:] = data
        else:
            data = data.encode("latin1") if isinstance(data, str) else data
            if not isinstance(data, bytes) or len(data) != count * dtype.dtype.itemsize:
                raise pickle.UnpicklingError(f"an array of {shape} with other bytes")
            self.array = np.frombuffer(data, dtype.dtype)
        self.array = self.array.reshape(shape, order="F" if fortran else "C")


def _encode(text: Any, coding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or coding != "latin1":
        raise pickle.UnpicklingError("text of another coding")
    return text.encode("latin1")


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _DType) or dtype.dtype.hasobject:
        raise pickle.UnpicklingError("a scalar of nonsense")
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        raise pickle.UnpicklingError("a scalar with other bytes")
    return np.frombuffer(data, dtype.dtype)[0]


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array(MAX_BYTES)
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _no_bytes(*arguments: Any) -> bytes:
    if arguments:
        raise pickle.UnpicklingError("bytes of something")
    return b""


def _plain(node: Any, depth: int, known: dict[int, Any]) -> Any:
    """Replace the stand-ins of arrays by arrays; `known`: what became of containers, by their ids: a pickle may name
    one of them many times."""
    if depth > MAX_DEPTH:
        raise ValueError(f"containers nested more than {MAX_DEPTH} deep")
    if id(node) in known:
        return known[id(node)]
    plain = node
    if isinstance(node, dict):
        plain = {key: _plain(value, depth + 1, known) for key, value in node.items()}
    elif isinstance(node, (list, tuple)):
        plain = type(node)(_plain(value, depth + 1, known) for value in node)
    elif isinstance(node, _Array):
        plain = node.array
        if plain.dtype.hasobject:
            flat = np.empty(plain.size, object)
            flat[:] = [_plain(value, depth + 1, known) for value in plain.ravel()]
            plain = flat.reshape(plain.shape)
    elif isinstance(node, _DType):
        plain = node.dtype
    if plain is not node:
        known[id(node)] = plain
    return plain
