"""A matcher as a StableHLO artefact that any JAX program runs without this package, and a JSON that describes it.

The weights are an argument of the artefact, by the keys of their `.safetensors` file, and not in it: it stays below a
megabyte instead of hundreds, XLA has no constants to fold, retrained weights need no new one, a caller may shard them,
and no weights travel under another licence than their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export
from jax import numpy as jnp

from gim_jax import __version__
from gim_jax.api import load_matcher
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic
from gim_jax.geometry import CELL
from gim_jax.models import FAMILIES, ModelInfo, get_model

PLATFORMS = ("cpu", "cuda", "tpu")
MAX_SIDE = 8192  # px
MAX_BATCH = 1024
INPUTS = ("weights", "image0", "image1", "size0", "size1")
USAGE = """import jax, jax.export
from safetensors.numpy import load_file
exported = jax.export.deserialize(bytearray(open({artefact!r}, "rb").read()))
weights = jax.device_put(load_file({weights!r}))
out = jax.jit(exported.call)(weights, image0, image1, size0, size1)"""
CONVENTIONS = {
    "weights": "a dict of the arrays in the .safetensors file, by their names there",
    "images": "{colours} from 0 to 255, [batch, height, width, channels], resized by the caller to what the network is "
    "to see, in the top left corner; what lies right of and below its size has no influence",
    "sizes": "(width, height) px of the image in its corner{cells}",
    "points": "(x, y) px of these images, (0, 0) = centre of the top left pixel; in an image that was resized by s "
    "they are at (x + 0.5) / s - 0.5 of the original",
    "outputs": "row k of kpts0 and kpts1 match with confidence conf[k] in [0, 1] where mask[k]; elsewhere ignore them",
}


def program(info: ModelInfo, config: Any) -> Callable:
    """Return the matcher as one pure function `(weights, image0, image1, size0, size1) -> dict`.

    Args:
      info, config: of a network; arguments of the function are those of `abstract_inputs`.

    Returns:
      a function that gives kpts0, kpts1 [B, K, 2] float32 px, conf [B, K] float32 and mask [B, K] bool.
    """
    module = info.network(config)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(info.template(config))
    names = [_name(path) for path, _ in leaves]

    def run(weights, image0, image1, size0, size1):
        variables = treedef.unflatten([weights[name] for name in names])
        valid = (size0, size1) if FAMILIES[info.family][2] else (_cells(image0, size0), _cells(image1, size1))
        image0, image1 = (image.astype(jnp.float32) / 255 for image in (image0, image1))
        return info.module.match(module, variables, image0, image1, *valid)

    return run


def abstract_inputs(info: ModelInfo, variables: Any, size: tuple[int, int], batch_size: int = 1) -> tuple:
    """Describe the arguments of `program`.

    Args:
      variables: nested dict of arrays or `jax.ShapeDtypeStruct`. size: (width, height) px.

    Returns:
      `jax.ShapeDtypeStruct`s: weights as a flat dict; image0, image1 [B, H, W, C] from 0 to 255, uint8, or float32 of
      models whose images are resized without rounding; size0, size1 int32 [B, 2], (width, height) px of the valid top
      left part.
    """
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    weights = {_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}
    kind = np.uint8 if info.resampling == "bytes" else np.float32
    image = jax.ShapeDtypeStruct((batch_size, size[1], size[0], info.channels), kind)
    valid = jax.ShapeDtypeStruct((batch_size, 2), np.int32)
    return weights, image, image, valid, valid


def export(
    name: str,
    weights: Any,
    out: str | Path,
    size: tuple[int, int] | None = None,
    batch_size: int = 1,
    platforms: tuple[str, ...] = PLATFORMS,
    **settings,
) -> dict[str, Any]:
    """Write the artefact `out` and its description `out` + ".json", each atomically, the description last.

    Args:
      name, weights, settings: see `gim_jax.load_matcher`.
      size: (width, height) px of both images, multiples of the model's bucket; None: what holds any image of the
        model's preset.
      batch_size: pairs per call.
      platforms: of PLATFORMS.

    Returns:
      the description.

    Raises:
      ValueError: what `load_matcher` refuses, a model without a network or without its keypoints' detector, a size,
        batch or platform that cannot be, a missing folder.
    """
    out = Path(out)
    info = get_model(name)
    if info.family == "rootsift":
        raise ValueError("model: rootsift runs in OpenCV and has no network to export")
    if getattr(info.config, "extractor", info) is None:
        raise ValueError(f"model: {name} matches keypoints that come from elsewhere; an artefact takes images alone")
    width, height = size = size or _preset_size(info)
    if any(n % info.bucket or not 0 < n <= MAX_SIDE for n in size):
        expected = f"multiples of {info.bucket} up to {MAX_SIDE} (the size bucket of {name})"
        raise ValueError(f"size: found {width}x{height}, expected {expected}")
    if not 0 < batch_size <= MAX_BATCH:
        raise ValueError(f"batch_size: found {batch_size}, expected 1 to {MAX_BATCH}")
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(
            f"platforms: found {', '.join(platforms) or 'nothing'}, expected some of {', '.join(PLATFORMS)}"
        )
    if not out.parent.is_dir() or out.is_dir():
        what = "is a folder" if out.is_dir() else f"the folder {out.parent} does not exist"
        raise ValueError(f"{out}: {what}, expected a file to write")
    matcher = load_matcher(name, weights, **settings)
    inputs = abstract_inputs(matcher.info, matcher.variables, size, batch_size)
    run = jax.jit(program(matcher.info, matcher.config))
    frames = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no paths of this machine in the artefact
    try:
        exported = jax_export.export(run, platforms=platforms)(*inputs)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)
    data = bytes(exported.serialize())
    text = describe(matcher, exported, inputs, out.name, data)
    write_atomic(out, lambda file: file.write(data))
    write_json(description_of(out), text)
    return text


def description_of(out: str | Path) -> Path:
    """Name the JSON file beside an artefact."""
    return Path(f"{out}.json")


def describe(matcher: Any, exported: jax_export.Exported, inputs: tuple, file: str, data: bytes) -> dict[str, Any]:
    """Say in JSON values what an artefact is and how to call it."""
    info, entries = matcher.info, inputs[0].values()
    by_size = FAMILIES[info.family][2]
    words = {
        "colours": "gray (0.299 R + 0.587 G + 0.114 B)" if info.channels == 1 else "RGB",
        "cells": "" if by_size else f", rounded down to multiples of {CELL}",
    }
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "model": info.name,
        "artefact": {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "platforms": list(exported.platforms),
        "weights": {
            **matcher.weights,
            "licence": info.licence,
            "source": info.weights_source,
            "num_arrays": len(entries),
            "num_elements": sum(int(np.prod(entry.shape)) for entry in entries),
        },
        "inputs": {"weights": "see conventions"} | {name: _array(value) for name, value in zip(INPUTS[1:], inputs[1:])},
        "outputs": {name: _array(value) for name, value in outputs.items()},
        "conventions": {name: text.format(**words) for name, text in CONVENTIONS.items()},
        "settings": matcher.describe()["settings"],
        "versions": {
            "gim_jax": __version__,
            "jax": jax.__version__,
            "calling_convention": exported.calling_convention_version,
        },
        "usage": USAGE.format(artefact=file, weights=Path(matcher.weights["file"] or "weights.safetensors").name),
    }


def _name(path: tuple) -> str:
    """Name an entry as `gim_jax.weights.store` does: `params/a/b/kernel`."""
    return "/".join(str(part.key) for part in path)


def _array(value: Any) -> dict[str, Any]:
    return {"shape": list(value.shape), "dtype": str(value.dtype)}


def _cells(image: jax.Array, size: jax.Array) -> jax.Array:
    """Mark the whole cells [B, H / 8, W / 8] of the valid part of images [B, H, W, C]."""
    rows, columns = (jnp.arange(n // CELL) for n in image.shape[1:3])
    return (rows[:, None] < size[:, 1, None, None] // CELL) & (columns < size[:, 0, None, None] // CELL)


def _preset_size(info: ModelInfo) -> tuple[int, int]:
    """Round the model's preset, or the square of its longer side, up to the bucket."""
    side = info.resize.get("long_side")
    width, height = info.resize.get("exact") or (side, side)
    return tuple(-(-n // info.bucket) * info.bucket for n in (width, height))  # type: ignore[return-value]
