"""Match two images: `gim_jax.match(...)`, or `gim_jax.load_matcher(...)` for many pairs."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import geometry, rootsift
from gim_jax.config import replace
from gim_jax.image import pad_bottom_right, read_image, resize, size_of, to_gray
from gim_jax.models import FAMILIES, MODELS, ModelInfo, get_model, in_dtype
from gim_jax.types import Matches
from gim_jax.weights import store

CELL = 8  # px per entry of the masks that networks take


def match(image0: Any, image1: Any, model: str = "rootsift", weights: str | Path | None = None, **settings) -> Matches:
    """Match two images.

    Args:
      image0, image1: a path, a PIL image or an [H, W, 3] uint8 RGB array, see `gim_jax.image.read_image`.
      model: one of `list_models()`.
      weights: the model's `.safetensors` file; `rootsift` needs none.
      **settings: see `load_matcher`.

    Returns:
      `Matches` in pixels of the original images; possibly empty.
    """
    return _cached_matcher(model, weights, **settings)(image0, image1)


def list_models() -> list[str]:
    """Return the names of all matchers."""
    return list(MODELS)


def load_matcher(name: str, weights: Any = None, batch_size: int = 1, **settings) -> RootSIFT | Network:
    """Load a matcher: call it with two images, or `match_batch` with a list of pairs.

    Args:
      name: one of `list_models()`.
      weights: a `.safetensors` file of `gim-jax convert` or `gim-jax train`, or the variables themselves.
      batch_size: pairs that `match_batch` passes through a network at once, where their sizes agree.
      **settings: change the preset of the model: `long_side`, `exact` (width, height), `multiple`, `upscale` of
        `image.target_size`, or any field of the network's configuration such as `thr` or `dtype`; for `rootsift`
        `max_keypoints`, `contrast_threshold`, `ratio` and `long_side`.

    Raises:
      ValueError: an unknown model or setting, weights that are missing or belong to another model.
    """
    info = get_model(name)
    if info.family == "rootsift":
        if weights is not None:
            raise ValueError(f"weights: found {weights}, but rootsift has none")
        return RootSIFT(info, batch_size, settings)
    return Network(info, weights, batch_size, settings)


@functools.lru_cache(maxsize=4)
def _cached_matcher(name: str, weights: str | Path | None, **settings) -> RootSIFT | Network:
    return load_matcher(name, weights, **settings)


class RootSIFT:
    """RootSIFT with mutual nearest neighbours and the ratio test: the matcher without weights."""

    def __init__(self, info: ModelInfo, batch_size: int = 1, settings: Mapping[str, Any] | None = None):
        self.info, self.batch_size = info, batch_size
        self.settings = {
            "max_keypoints": None,
            "contrast_threshold": rootsift.CONTRAST_THRESHOLD,
            "ratio": rootsift.RATIO,
            "long_side": None,
        }
        _update(self.settings, settings or {}, info.name)

    def __call__(self, image0: Any, image1: Any) -> Matches:
        """Match two images; see `gim_jax.match`."""
        s = self.settings
        images = [read_image(image) for image in (image0, image1)]
        info = dataclasses.replace(self.info, resize={"long_side": s["long_side"]})
        sizes = [info.input_size(size_of(image)) for image in images]
        grays = [resize(to_gray(image), size) for image, size in zip(images, sizes)]
        found = [rootsift.extract(gray, s["max_keypoints"], s["contrast_threshold"]) for gray in grays]
        idx0, idx1, conf = rootsift.match(found[0].desc, found[1].desc, s["ratio"])
        return _to_matches([found[0].kpts[idx0], found[1].kpts[idx1]], conf, images, sizes)

    def match_batch(self, pairs: Sequence[tuple[Any, Any]]) -> list[Matches]:
        """Match a list of pairs, one after the other."""
        return [self(*pair) for pair in pairs]

    def describe(self) -> dict[str, Any]:
        """Return what a result has to say of its matcher."""
        return {"name": self.info.name, "settings": dict(self.settings)}


class Network:
    """A learned matcher: one compiled program per pair of image sizes, which are rounded up to buckets.

    Attributes:
      num_traces: how often the network was traced, so how many programs were compiled.
    """

    def __init__(self, info: ModelInfo, weights: Any, batch_size: int = 1, settings: Mapping[str, Any] | None = None):
        import jax

        if weights is None:
            raise ValueError(f"weights: {info.name} needs some; source: {info.weights_source}")
        if not isinstance(weights, Mapping):
            path = Path(weights)
            variables, meta = store.load(path)
            self.weights = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            if meta.get("model") != info.family or meta.get("name", info.name) != info.name:
                found = meta.get("name") or meta.get("model")
                raise ValueError(f"{path}: weights of {found!r}, expected {info.name} (family {info.family})")
        else:
            variables, meta, self.weights = weights, {}, {"file": None}
        trained = replace(info.config, meta.get("config") or {}, str(weights))
        config = {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}
        preset = {"long_side": None, "exact": None, "multiple": 1, "upscale": True, **info.resize}
        known = {**config, **preset}
        _update(known, settings or {}, info.name)
        self.info = dataclasses.replace(info, resize={key: known[key] for key in preset})
        self.config = replace(trained, {key: known[key] for key in settings or {} if key in config}, "settings")
        self.config = in_dtype(self.config, self.config.dtype)
        self.batch_size, self.settings, self.num_traces = batch_size, dict(settings or {}), 0
        module = info.network(self.config)
        self.channels = getattr(self.config, "in_channels", info.channels)
        self.info = dataclasses.replace(self.info, channels=self.channels)
        store.check(variables, self.info.template(self.config), self.weights["file"] or "weights")
        self.variables = jax.device_put(jax.tree.map(np.asarray, dict(variables)))

        def run(variables, image0, image1, mask0, mask1):
            self.num_traces += 1  # runs while tracing only
            image0, image1 = (image.astype(np.float32) / 255 for image in (image0, image1))
            return info.module.match(module, variables, image0, image1, mask0, mask1)

        self._run = jax.jit(run)

    def __call__(self, image0: Any, image1: Any) -> Matches:
        """Match two images; see `gim_jax.match`."""
        return self.match_batch([(image0, image1)])[0]

    def match_batch(self, pairs: Sequence[tuple[Any, Any]]) -> list[Matches]:
        """Match a list of pairs; those of equal bucket go through the network together, `batch_size` at a time."""
        images = [[read_image(image) for image in pair] for pair in pairs]
        sizes = [[self.info.input_size(size_of(image)) for image in pair] for pair in images]
        groups: dict[Any, list[int]] = {}
        for index, pair in enumerate(sizes):
            groups.setdefault(tuple(self._bucket(size) for size in pair), []).append(index)
        out: list[Matches | None] = [None] * len(pairs)
        for buckets, members in groups.items():
            for start in range(0, len(members), self.batch_size):
                chunk = members[start : start + self.batch_size]
                num = self.batch_size if len(chunk) > 1 else 1
                found = self._run(self.variables, *self._inputs(images, sizes, buckets, chunk, num))
                found = {key: np.asarray(value) for key, value in found.items()}
                for row, index in enumerate(chunk):
                    keep = found["mask"][row]
                    kpts = [found[f"kpts{side}"][row][keep] for side in (0, 1)]
                    out[index] = _to_matches(kpts, found["conf"][row][keep], images[index], sizes[index])
        return out  # type: ignore[return-value]

    def _bucket(self, size: tuple[int, int]) -> tuple[int, int]:
        """Round a size up, so that few programs serve all images."""
        step = self.info.bucket
        return -(-size[0] // step) * step, -(-size[1] // step) * step

    def _inputs(self, images, sizes, buckets, chunk: list[int], num: int) -> list[np.ndarray]:
        """Return image0, image1 uint8 [num, H, W, C] and mask0, mask1 bool [num, H/8, W/8] of a chunk of pairs.

        Families that take sizes get those in place of the masks: [num, 2] int32 (width, height), to the pixel.
        """
        batches, masks = [], []
        for side, (width, height) in enumerate(buckets):
            batch = np.zeros((num, height, width, self.channels), np.uint8)
            mask = np.zeros((num, height // CELL, width // CELL), bool)
            for row, index in enumerate(chunk):
                image, size = images[index][side], sizes[index][side]
                image = to_gray(image)[..., None] if self.channels == 1 else image
                image = resize(image, size).reshape(size[1], size[0], self.channels)
                batch[row] = pad_bottom_right(image, (width, height))
                mask[row, : size[1] // CELL, : size[0] // CELL] = True
            mask[len(chunk) :] = True  # rows that fill up the batch are dropped; nothing in them may be NaN
            batches.append(batch)
            valid = [sizes[index][side] for index in chunk] + [(width, height)] * (num - len(chunk))
            masks.append(np.array(valid, np.int32) if FAMILIES[self.info.family][2] else mask)
        return batches + masks

    def describe(self) -> dict[str, Any]:
        """Return what a result has to say of its matcher."""
        plain = (int, float, str, bool, tuple, type(None))
        config = {key: value if isinstance(value, plain) else str(value) for key, value in vars(self.config).items()}
        return {"name": self.info.name, "settings": {**self.info.resize, **config}, "weights": self.weights}


def _update(known: dict[str, Any], settings: Mapping[str, Any], name: str) -> None:
    """Overwrite known settings, refusing unknown ones."""
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"settings: {name} has no {', '.join(unknown)}; known: {', '.join(known)}")
    known.update(settings)


def _to_matches(kpts: list[np.ndarray], conf: np.ndarray, images: Sequence[np.ndarray], sizes) -> Matches:
    """Map points from the network's frame back to the original images."""
    originals = [size_of(image) for image in images]
    kpts = [
        geometry.scale_points(points, np.divide(original, size, dtype=np.float32)).astype(np.float32)
        for points, original, size in zip(kpts, originals, sizes)
    ]
    return Matches(kpts[0], kpts[1], conf.astype(np.float32), originals[0], originals[1])


def enable_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, by default in `$XDG_CACHE_HOME/gim-jax/xla`; a second process starts at once."""
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder else cache / "gim-jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return path
