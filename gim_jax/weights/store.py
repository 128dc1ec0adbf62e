"""Weights on disk: one safetensors file, its metadata JSON. Nothing in such a file can be executed."""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as to_bytes

from gim_jax.data.scene_info import BAD_PICKLE
from gim_jax.data.tfrecord import write_atomic

BAD_FILE = (  # what readers of pickles, archives and arrays raise where a file is damaged or hostile
    *BAD_PICKLE,
    NotImplementedError,
    OSError,
    RuntimeError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
META = "gim_jax"  # key of the JSON text in the safetensors header
HUB_FILE = "model.safetensors"  # the weights in a folder of a model hub


def save(path: str | Path, variables: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write variables and metadata atomically.

    Args:
      path: the file; its folder must exist.
      variables: nested dict of arrays, e.g. `{"params": ..., "batch_stats": ...}`; becomes flat keys
        `params/a/b/kernel`.
      meta: JSON values; `{"model": family, "config": {...}}` at least.
    """
    flat: dict[str, np.ndarray] = {}
    _flatten(variables, "", flat)
    data = to_bytes(flat, metadata={META: json.dumps(meta, sort_keys=True)})
    write_atomic(path, lambda file: file.write(data))


def file_of(path: str | Path) -> Path:
    """Return the file of weights: the path itself, or `model.safetensors` in it where it is a folder of a model hub."""
    path = Path(path)
    return path / HUB_FILE if (path / HUB_FILE).is_file() else path


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read variables and metadata; see `read`."""
    return read(path)[:2]


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read variables (nested dict of NumPy arrays), metadata, and the sha256 of the file, in one pass over it.

    Raises:
      ValueError: the file is missing, truncated, no safetensors file, or was not written by `save`.
    """
    path = file_of(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected a .safetensors file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    flat = from_bytes(data, str(path))  # checks the header
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header.get("__metadata__", {}).get(META, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata are not JSON: {error}") from error
    if meta is None:
        raise ValueError(f"{path}: a safetensors file without gim-jax metadata; `gim-jax convert` makes weights of it")
    if not isinstance(meta, dict) or not isinstance(meta.get("config") or {}, dict):
        raise ValueError(f"{path}: found other metadata, expected a dictionary with a dictionary `config`")
    variables: dict[str, Any] = {}
    for key, array in flat.items():
        *parents, leaf = key.split("/")
        node = variables
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: key {key} lies below an array")
        if isinstance(node.get(leaf), dict):
            raise ValueError(f"{path}: key {key} lies above others")
        node[leaf] = array
    return variables, meta, hashlib.sha256(data).hexdigest()


def from_bytes(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file; `name` stands in the error message.

    Raises:
      ValueError: truncated or no safetensors file, or of a type that weights do not have.
    """
    try:
        entries = deserialize(data)
    except SafetensorError as error:
        raise ValueError(f"{name}: not a whole safetensors file: {error}") from error
    unknown = [f"{key} ({entry['dtype']})" for key, entry in entries if entry["dtype"] not in DTYPES]
    if unknown:
        raise ValueError(f"{name}: found {', '.join(unknown[:5])}, expected types among {', '.join(DTYPES)}")
    return {key: np.frombuffer(e["data"], DTYPES[e["dtype"]]).reshape(e["shape"]) for key, e in entries}


def check(variables: Mapping[str, Any], template: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where variables have not exactly the keys and shapes of the template, or are no finite floats.

    Args:
      variables: nested dict of arrays.
      template: nested dict of arrays or `jax.ShapeDtypeStruct`.
      name: of the weights, for the message.
    """
    found: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    _flatten(variables, "", found, as_array=False)
    _flatten(template, "", wanted, as_array=False)
    faults = [f"missing {key}" for key in wanted if key not in found]
    faults += [f"unknown {key}" for key in found if key not in wanted]
    faults += [
        f"{key}: found shape {tuple(found[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and tuple(found[key].shape) != tuple(wanted[key].shape)
    ]
    for key in () if faults else wanted:
        array = np.asarray(found[key])
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            faults.append(f"{key}: found {array.dtype}, expected floating point")
        elif not np.isfinite(array).all():
            faults.append(f"{key}: found NaN or infinity")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{name}: not the weights of this model: {'; '.join(faults[:5])}{more}")


def digest(variables: Mapping[str, Any]) -> str:
    """Hash the names, types, shapes and values of variables: 64 hex digits."""
    flat: dict[str, np.ndarray] = {}
    _flatten(variables, "", flat)
    out = hashlib.sha256()
    for key in sorted(flat):
        out.update(f"{key} {flat[key].dtype} {flat[key].shape}\n".encode() + flat[key].tobytes())
    return out.hexdigest()


def _flatten(node: Mapping[str, Any], prefix: str, out: dict[str, Any], as_array: bool = True) -> None:
    for key, value in node.items():
        if "/" in key:
            raise ValueError(f"variables: found the name {prefix + key!r}, a name may hold no slash")
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{key}/", out, as_array)
        else:
            out[prefix + key] = np.ascontiguousarray(value).reshape(np.shape(value)) if as_array else value
