"""The labellers: every matcher of `gim_jax.api` behind one interface, a frame's features computed once.

A labeller prepares a frame on the CPU (in threads), computes features of a batch of frames, and matches a batch of
pairs of features. For networks that match images as a whole (LoFTR, DKM) the features are the prepared images. Device
batches have one shape, are split over all local devices, and are filled by repetition.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_prep.cells import MIN_DESCRIPTORS, Cells, into_cells, match_in_cells
from data_prep.fitting import pixel_scale
from gim_jax import geometry, image, rootsift
from gim_jax.api import load_matcher
from gim_jax.geometry import CELL
from gim_jax.matchers import RESAMPLINGS, Network
from gim_jax.models import FAMILIES, MODELS
from gim_jax.tasks import load_extra


class Found(NamedTuple):
    """What a labeller says of a pair: xy [M, 4] float32 px, conf [M] float32, and why there is nothing to match."""

    xy: np.ndarray
    conf: np.ndarray
    reason: str = ""


def nothing(reason: str) -> Found:
    return Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), reason)


CHOICES = {  # of the configuration
    "source": ("links", "colmap", "colmap_dense"),
    "link_rule": ("paper", "local", "released"),
}


COUNT, MANY = (1, 2**31 - 1), (0, 2**31 - 1)
RANGES = {  # of the configuration: lowest and highest value; not a number is in none
    "batch_size": COUNT,
    "every_frames": COUNT,
    "every_seconds": (0, 1e9),
    "max_seconds": (0, 1e9),
    "long_side": MANY,
    "ratio": (0, 1),
    "probes": MANY,
    "max_keypoints": MANY,
    "contrast_threshold": (0, 1e6),
    "max_diameter_px": (0, np.inf),
    "threshold_px": (1e-6, 1e6),
    "confidence": (0, 1 - 1e-12),
    "max_iters": COUNT,
    "min_agreement": (0, 1),
    "thin_px": (0, 1e6),
    "clip_samples": COUNT,
    "link_radius_px": (0, 1e6),  # 0: nothing is propagated
    "min_matches": MANY,
    "min_motion_px": (0, 1e6),
    "refit_px": (0, 1e6),
    "jpeg_quality": (1, 100),
    "workers": MANY,
}
NUMBERS = {"base_steps": "one or more, each once", "threshold_size": "two", "min_matches_size": "two"}  # of 1 or more


def check_settings(config) -> None:
    """Raise a ValueError naming a setting that is out of range, or a choice that does not exist."""
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise ValueError(f"{key}: found {config[key]!r}, expected one of {', '.join(known)}")
    for key, (low, high) in RANGES.items():
        if not low <= config[key] <= high:
            wanted = f"{low:g} to {high:g}" if high < 1e6 else f"{low:g} or more"
            raise ValueError(f"{key}: found {config[key]}, expected {wanted}")
    for key, words in NUMBERS.items():
        values = tuple(config[key])
        num = len(values) == 2 if words == "two" else len(values) == len({*values}) > 0
        if not num or not all(isinstance(value, int) and value >= 1 for value in values):
            raise ValueError(f"{key}: found {values}, expected whole numbers from 1 on, {words}")


def check_labellers(config) -> None:
    """Raise a ValueError naming the labeller: none, one twice, an unknown one, weights that are missing.

    Also where `check_settings` does, or where the configuration needs an extra that is not installed.
    """
    check_settings(config)
    if config.source != "links":
        pycolmap = load_extra("pycolmap", "sfm")
        if config.source == "colmap_dense" and not pycolmap.has_cuda:
            raise ValueError("source: colmap_dense needs an NVIDIA GPU and pycolmap-cuda12 in place of pycolmap")
    names = list(config.labellers)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"labellers: found {', '.join(names) or 'none'}, expected one or more, each once")
    for name in names:
        if name not in MODELS:
            raise ValueError(f"labellers: found {name!r}, expected some of {', '.join(MODELS)}")
        if name == "rootsift":
            continue
        if MODELS[name].features:
            raise ValueError(f"labellers: {name} has no detector in its network")
        if name not in config.networks:
            raise ValueError(
                f"labellers: {name} has no networks.{name}; name it as in --config=configs/label.py:{name}"
            )
        weights, long_side = config.networks[name].weights, config.networks[name].long_side
        if long_side < 0:
            raise ValueError(f"networks.{name}.long_side: found {long_side}, expected 0 px or more")
        if not weights:
            source = MODELS[name].weights_source
            raise ValueError(f"labellers: {name} needs --config.networks.{name}.weights=FILE; source: {source}")
        if not Path(weights).is_file():
            raise ValueError(f"networks.{name}.weights: {weights}: no such file")


def load_labellers(config) -> tuple[RootSIFT | SparseNetwork | DenseNetwork, ...]:
    """Load the labellers that a configuration names, in its order; the position is the teacher id.

    One process loads and compiles a configuration once. Raises ValueError as `check_labellers`, and for weights of
    another model.
    """
    check_labellers(config)
    settings = config.to_dict()
    settings.pop("licence")  # a list has many; they change no label
    return _load_all(ml_collections.FrozenConfigDict(settings))


@functools.lru_cache(maxsize=2)
def _load_all(config) -> tuple[RootSIFT | SparseNetwork | DenseNetwork, ...]:
    return tuple(_load(name, config) for name in config.labellers)


def _load(name: str, config) -> RootSIFT | SparseNetwork | DenseNetwork:
    if name == "rootsift":
        return RootSIFT(config)
    own = config.networks[name]
    matcher = load_matcher(name, own.weights, **({"long_side": own.long_side} if own.long_side else {}))
    assert isinstance(matcher, Network)
    kind = SparseNetwork if MODELS[name].family in SPARSE else DenseNetwork
    return kind(matcher, config.batch_size)


SPARSE = ("superglue", "lightglue")  # families whose features belong to a frame, not to a pair


def weights_digests(config) -> dict[str, str]:
    """SHA-256 of the weights of every labeller: what changes the labels, unlike the path. See `check_labellers`."""
    check_labellers(config)
    paths = {name: config.networks[name].weights for name in config.labellers if name != "rootsift"}
    return {name: _digest(path, Path(path).stat().st_mtime_ns) for name, path in paths.items()}


@functools.lru_cache(maxsize=16)
def _digest(path: str, _stamp: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Described(NamedTuple):
    """Keypoints [N, 2] px, descriptors [N, 128] of unit length, and the cells that they are sorted by, if any."""

    kpts: np.ndarray
    desc: np.ndarray
    cells: Cells | None


class RootSIFT:
    """RootSIFT: everything on the CPU, a pair at a time, in the threads that call it."""

    name, on_device = "rootsift", False

    def __init__(self, config):
        self.config = config

    def prepare(self, rgb: np.ndarray) -> Described:
        """Features of an [H, W, 3] uint8 RGB frame."""
        config = self.config
        found = rootsift.extract(
            image.to_gray(rgb),
            config.max_keypoints or None,
            config.contrast_threshold,
            max_diameter_px=config.max_diameter_px * pixel_scale(image.size_of(rgb), config),
        )
        if not config.probes or len(found.desc) < MIN_DESCRIPTORS:
            return Described(found.kpts, found.desc, None)
        order, sorted_into = into_cells(found.desc)
        return Described(found.kpts[order], found.desc[order], sorted_into)

    def features(self, prepared: Sequence[Described]) -> list[Described]:
        return list(prepared)

    def match(self, pairs: Sequence[tuple[Described, Described]]) -> list[Found]:
        """Match pairs of features."""
        return [self._match(*pair) for pair in pairs]

    def _match(self, one: Described, two: Described) -> Found:
        if (fewest := min(len(one.kpts), len(two.kpts))) < 8:
            return nothing(f"no texture: {fewest} keypoints")
        if two.cells is None:
            idx0, idx1, conf = rootsift.match(one.desc, two.desc, self.config.ratio)
        else:
            idx0, idx1, conf = match_in_cells(one.desc, two.desc, two.cells, self.config.ratio, self.config.probes)
        return Found(np.concatenate([one.kpts[idx0], two.kpts[idx1]], 1), conf)


class _Network:
    """What networks share: preparation of frames, batches over devices, points in pixels of the frame."""

    on_device = True

    def __init__(self, matcher: Network, batch_size: int):
        self.name, self.info = matcher.info.name, matcher.info
        self.module = matcher.info.network(matcher.config)
        devices = jax.local_devices()
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self.variables = jax.device_put(matcher.variables, NamedSharding(mesh, PartitionSpec()))

    def prepare(self, rgb: np.ndarray) -> dict[str, np.ndarray]:
        """The network's input of an [H, W, 3] uint8 RGB frame: image [H', W', C] in [0, 255], size [2] int32, ..."""
        size = self.info.input_size(image.size_of(rgb))
        frame = image.to_gray(rgb)[..., None] if self.info.channels == 1 else rgb
        frame = RESAMPLINGS[self.info.resampling](frame, size).reshape(size[1], size[0], self.info.channels)
        width, height = (-(-n // self.info.bucket) * self.info.bucket for n in size)
        mask = np.zeros((height // CELL, width // CELL), bool)
        mask[: size[1] // CELL, : size[0] // CELL] = True
        return {
            "image": image.pad_bottom_right(frame, (width, height)),
            "size": np.array(size, np.int32),
            "mask": mask,
            "frame_size": np.array(image.size_of(rgb), np.int32),
        }

    def _batched(self, function, items: Sequence[Any]) -> list[Any]:
        """Apply a jitted function of stacked items, a full batch at a time; items are pytrees of one shape."""
        out: list[Any] = []
        for start in range(0, len(items), self.batch_size):
            chunk = list(items[start : start + self.batch_size])
            full = chunk + chunk[:1] * (self.batch_size - len(chunk))
            stacked = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *full), self._split)
            result = jax.device_get(function(self.variables, stacked))
            out += [jax.tree.map(lambda leaf, k=k: leaf[k], result) for k in range(len(chunk))]
        return out

    def _found(self, pair, kpts0, kpts1, conf, mask) -> Found:
        scales = [(inputs["frame_size"] / inputs["size"]).astype(np.float32) for inputs in pair]
        places = [geometry.scale_points(kpts[mask], scale) for kpts, scale in zip((kpts0, kpts1), scales)]
        return Found(np.concatenate(places, 1).astype(np.float32), conf[mask].astype(np.float32))


class SparseNetwork(_Network):
    """SuperGlue, LightGlue: keypoints and descriptors of a frame are computed once."""

    def __init__(self, matcher: Network, batch_size: int):
        super().__init__(matcher, batch_size)
        module = self.module

        @jax.jit
        def extract(variables, batch):
            frames = batch["image"].astype(np.float32) / 255
            return module.apply(variables, frames, batch["size"], method=lambda m, *a: m.extractor(*a))

        @jax.jit
        def match(variables, batch):
            one, two = batch
            sizes = one.pop("size"), two.pop("size")
            return module.apply(variables, one, two, *sizes, method="match_features")

        self._extract, self._match = extract, match

    def features(self, prepared: Sequence[dict]) -> list[dict]:
        """Keypoints and descriptors of frames: dicts of kpts, desc, mask, ... and what `prepare` says of sizes."""
        found = self._batched(self._extract, [{k: p[k] for k in ("image", "size")} for p in prepared])
        return [{"found": f, "size": p["size"], "frame_size": p["frame_size"]} for f, p in zip(found, prepared)]

    def match(self, pairs: Sequence[tuple[dict, dict]]) -> list[Found]:
        """Match pairs of features."""
        fewest = [min(int(f["found"]["mask"].sum()) for f in pair) for pair in pairs]
        good = [pair for pair, few in zip(pairs, fewest) if few >= 8]
        inputs = [tuple({**f["found"], "size": f["size"]} for f in pair) for pair in good]
        answers = iter(zip(good, self._batched(self._match, inputs)))
        out = []
        for few in fewest:
            if few < 8:
                out.append(nothing(f"no texture: {few} keypoints"))
                continue
            pair, answer = next(answers)
            partner = np.asarray(answer["matches0"])
            kpts0, kpts1 = (f["found"]["kpts"] for f in pair)
            conf = np.asarray(answer["scores0"])
            out.append(self._found(pair, kpts0, kpts1[np.maximum(partner, 0)], conf, partner >= 0))
        return out


class DenseNetwork(_Network):
    """LoFTR, DKM: a pair of images goes through the network as a whole."""

    def __init__(self, matcher: Network, batch_size: int):
        super().__init__(matcher, batch_size)
        info, module, takes_sizes = self.info, self.module, FAMILIES[self.info.family][2]

        @jax.jit
        def match(variables, batch):
            images = [inputs["image"].astype(np.float32) / 255 for inputs in batch]
            valid = [inputs["size" if takes_sizes else "mask"] for inputs in batch]
            return info.module.match(module, variables, *images, *valid)

        self._match = match

    def features(self, prepared: Sequence[dict]) -> list[dict]:
        return list(prepared)

    def match(self, pairs: Sequence[tuple[dict, dict]]) -> list[Found]:
        """Match pairs of prepared frames."""
        inputs = [tuple({k: p[k] for k in ("image", "size", "mask")} for p in pair) for pair in pairs]
        answers = self._batched(self._match, inputs)
        return [
            self._found(pair, *(a[k] for k in ("kpts0", "kpts1", "conf", "mask"))) for pair, a in zip(pairs, answers)
        ]
