"""Weights on disk: one safetensors file, its metadata JSON. Nothing in such a file can be executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from gim_jax.data.tfrecord import write_atomic

META = "gim_jax"  # key of the JSON text in the safetensors header


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


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read variables (nested dict of NumPy arrays) and metadata.

    Raises:
      ValueError: the file is missing, truncated, no safetensors file, or was not written by `save`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if META not in header:
                raise ValueError(
                    f"{path}: a safetensors file without gim-jax metadata; `gim-jax convert` makes weights of it"
                )
            flat = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    try:
        meta = json.loads(header[META])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the metadata are not JSON: {error}") from error
    variables: dict[str, Any] = {}
    for key, array in flat.items():
        *parents, leaf = key.split("/")
        node = variables
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: key {key} lies below an array")
        node[leaf] = array
    return variables, meta


def check(variables: Mapping[str, Any], template: Mapping[str, Any], name: str) -> None:
    """Raise ValueError where variables do not have exactly the keys and shapes of the template.

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
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{name}: not the weights of this model: {'; '.join(faults[:5])}{more}")


def _flatten(node: Mapping[str, Any], prefix: str, out: dict[str, Any], as_array: bool = True) -> None:
    for key, value in node.items():
        if "/" in key:
            raise ValueError(f"variables: found the name {prefix + key!r}, a name may hold no slash")
        if isinstance(value, Mapping):
            _flatten(value, f"{prefix}{key}/", out, as_array)
        else:
            out[prefix + key] = np.ascontiguousarray(value).reshape(np.shape(value)) if as_array else value
