"""The matchers behind `gim_jax.load_matcher`: RootSIFT, dense networks, networks of keypoints."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gim_jax import geometry, rootsift
from gim_jax.config import replace
from gim_jax.geometry import CELL
from gim_jax.image import (
    pad_bottom_right,
    padding_to_aspect,
    read_image,
    resize,
    shrink_blurred,
    size_of,
    to_gray,
)
from gim_jax.models import ModelInfo, in_dtype, without_how
from gim_jax.prefetch import AHEAD, load_pairs
from gim_jax.types import Features, Matches, Warp
from gim_jax.weights import store

MAX_SIDE = 16384  # px of a network's input
MAX_PIXELS = 2**28  # of an image with its black borders
RESAMPLINGS = {  # of ModelInfo.resampling: how an image gets the network's size
    "bytes": resize,
    "float": lambda image, size: resize(image.astype(np.float32), size),
    "blurred": shrink_blurred,
}
FEATURE_STEP = 1024  # features that come from elsewhere are padded to a multiple of so many
MAX_FEATURES = 2048  # of OpenCV's detectors
MAX_LAYERS = 256  # of a kind; a network of a billion would be built for ever
MAX_COUNT = 10**6  # of other whole numbers in a configuration
RANGES = {  # of settings outside of which there is nothing but nonsense
    "contrast_threshold": (0.0, 1e6),
    "ratio": (0.0, 1.0),
    "temperature": (1e-6, 1e6),
    "thr": (0.0, 1.0),
    **dict.fromkeys(("blocks", "num_hidden", "num_layers"), (1, MAX_LAYERS)),
    **dict.fromkeys(("aspect", "exact", "long_side", "multiple"), (1, MAX_SIDE)),
}


@dataclass(frozen=True)
class Preset:
    """How an image becomes a network's input.

    Attributes:
      long_side, exact, multiple, upscale, floor: see `image.target_size`.
      resampling: "bytes": bilinear, rounded to bytes; "float": not rounded; "blurred": not rounded, and blurred
        before a side shrinks (`image.shrink_blurred`).
      aspect: (width, height): black borders give the image their ratio first, centred, as in GIM's demo, labelling
        and localisation with DKM ((896, 672)); matches in the borders are dropped.
    """

    long_side: int | None = None
    exact: tuple[int, int] | None = None
    multiple: int = 1
    upscale: bool = True
    floor: bool = False
    resampling: str = "bytes"
    aspect: tuple[int, int] | None = None

    def __post_init__(self):
        if self.resampling not in RESAMPLINGS:
            raise ValueError(f"resampling: found {self.resampling!r}, expected one of {', '.join(RESAMPLINGS)}")

    @property
    def resize(self) -> dict[str, Any]:
        """Keywords of `image.target_size`."""
        return {name: getattr(self, name) for name in ("long_side", "exact", "multiple", "upscale", "floor")}


@dataclass(frozen=True)
class RootSIFTSettings:
    """Settings of `RootSIFT`: see `rootsift.extract` and `rootsift.match`; long_side: px to resize to."""

    max_keypoints: int | None = None
    contrast_threshold: float = rootsift.CONTRAST_THRESHOLD
    ratio: float = rootsift.RATIO
    long_side: int | None = None


@dataclass(frozen=True)
class Frame:
    """Where an image lies in a network's input.

    Attributes:
      original: (width, height) px of the image. padded: with its borders. offset: (left, top) border px.
      size: (width, height) px in the network's input, borders included.
    """

    original: tuple[int, int]
    padded: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    def to_original(self, points: np.ndarray) -> np.ndarray:
        """Map [..., 2] px of the network's input to float32 px of the image."""
        scale = np.divide(self.padded, self.size, dtype=np.float32)
        points = geometry.scale_points(points, scale).astype(np.float32)
        return points - np.array(self.offset, np.float32) if any(self.offset) else points

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Tell which points [N, 2] px of the image do not lie in a border; all where there is none."""
        if self.padded == self.original:
            return np.ones(len(points), bool)
        return np.all((points >= 0) & (points <= np.subtract(self.original, 1)), axis=-1)


class Matcher:
    """What all matchers share: calls, and lists of pairs with everything overlapped.

    A subclass gives `_load(source)`, run in threads; `_bucket(pair)`, equal for pairs that one batch may hold;
    `_launch(pairs)`, which starts a batch on the device, and `_finish(...)`, which waits for its `Matches`.
    """

    info: ModelInfo
    batch_size: int
    num_traces = 0

    def __call__(self, image0: Any, image1: Any) -> Matches:
        """Match two images; see `gim_jax.match`."""
        return self._finish(self._launch([(self._load(image0), self._load(image1))]))[0]

    def match_batch(self, pairs: Iterable[tuple[Any, Any]]) -> list[Matches]:
        """Match a list of pairs; see `match_pairs`."""
        return list(self.match_pairs(pairs))

    def match_pairs(self, pairs: Iterable[tuple[Any, Any]], ahead: int = AHEAD) -> Iterator[Matches]:
        """Match a list of pairs, in their order.

        Threads decode `ahead` pairs (and a batch) while the device works. A path that occurs in several pairs is
        decoded once, and its keypoints are detected once, as long as the images between its pairs are few enough to
        be held (`prefetch.load_pairs`). Pairs of equal size bucket go through the network `batch_size` at a time.

        Raises:
          ValueError: an image that cannot be read, after the pairs before it.
        """
        waiting: dict[Any, list[tuple[int, Any]]] = {}
        running: deque[tuple[Any, Any]] = deque()
        done: dict[int, Matches] = {}
        turn = 0

        def launch(bucket):
            indices, chunk = zip(*waiting.pop(bucket))
            running.append((indices, self._launch(list(chunk))))

        def collect():
            indices, handle = running.popleft()
            done.update(zip(indices, self._finish(handle)))

        def load(source):
            try:
                return self._load(source)
            except ValueError as error:  # raised below, after the pairs before it
                return error

        faults: list[ValueError] = []
        for index, pair in enumerate(load_pairs(list(pairs), load, ahead + self.batch_size)):
            faults = [item for item in pair if isinstance(item, ValueError)]
            if faults:
                break
            bucket = self._bucket(pair)
            waiting.setdefault(bucket, []).append((index, pair))
            if len(waiting[bucket]) == self.batch_size:
                launch(bucket)
            if sum(map(len, waiting.values())) > 4 * self.batch_size:  # sizes that nobody shares
                launch(next(iter(waiting)))
            while len(running) > 1:  # one runs while the next is prepared
                collect()
            while turn in done:
                yield done.pop(turn)
                turn += 1
        for bucket in list(waiting):
            launch(bucket)
        while running:
            collect()
        while turn in done:
            yield done.pop(turn)
            turn += 1
        if faults:
            raise faults[0]

    def _load(self, source: Any) -> Any:
        raise NotImplementedError

    def _bucket(self, pair: Any) -> Any:
        raise NotImplementedError

    def _launch(self, pairs: list[tuple[Any, Any]]) -> Any:
        raise NotImplementedError

    def _finish(self, handle: Any) -> list[Matches]:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return what a result has to say of its matcher."""
        raise NotImplementedError


class RootSIFT(Matcher):
    """RootSIFT with mutual nearest neighbours and the ratio test: the matcher without weights."""

    def __init__(self, info: ModelInfo, batch_size: int = 1, settings: Mapping[str, Any] | None = None):
        self.batch_size = batch_size
        self.settings = _settings(settings or {}, {"rootsift": RootSIFTSettings()}, info.name)[0]
        self.info = dataclasses.replace(info, resize={"long_side": self.settings.long_side})

    def _load(self, source):
        image = read_image(source)
        frame = Frame(size_of(image), size_of(image), (0, 0), self.info.input_size(size_of(image)))
        gray = resize(to_gray(image), frame.size)
        return frame, rootsift.extract(gray, self.settings.max_keypoints, self.settings.contrast_threshold)

    def _bucket(self, pair):
        return None

    def _launch(self, pairs):
        out = []
        for (frame0, found0), (frame1, found1) in pairs:
            idx0, idx1, conf = rootsift.match(found0.desc, found1.desc, self.settings.ratio)
            out.append(_to_matches([found0.kpts[idx0], found1.kpts[idx1]], conf, (frame0, frame1)))
        return out

    def _finish(self, handle):
        return handle

    def describe(self) -> dict[str, Any]:
        return {"name": self.info.name, "settings": dataclasses.asdict(self.settings)}


class Network(Matcher):
    """A learned matcher: one compiled program per pair of image sizes, which are rounded up to buckets.

    Attributes:
      num_traces: how often the network was traced, so how many programs were compiled.
    """

    def __init__(self, info: ModelInfo, weights: Any, batch_size: int = 1, settings: Mapping[str, Any] | None = None):
        if weights is None:
            raise ValueError(f"weights: {info.name} needs some; source: {info.weights_source}")
        if isinstance(weights, Mapping):
            variables, meta, self._weights = weights, {}, {"file": None}
        else:
            variables, meta, sha256 = store.read(weights)
            self._weights = {"file": str(weights), "sha256": sha256}
            if meta.get("model") != info.family or meta.get("name", info.name) != info.name:
                found = meta.get("name") or meta.get("model")
                raise ValueError(f"{weights}: weights of {found!r}, expected {info.name} (family {info.family})")
            if meta.get("untrained"):
                raise ValueError(f"{weights}: a start for gim-jax train: its {meta['untrained']} is not trained")
        name, described = self._weights["file"] or "weights", self._weights
        trained = replace(info.config, without_how(meta.get("config") or {}), name)
        _check_ranges(trained, name)
        preset = Preset(resampling=info.resampling, **info.resize)
        parts = {"preset": preset, "config": trained, **self._own_settings(info)}
        preset, config, *own = _settings(settings or {}, parts, info.name)
        self.config = in_dtype(config, config.dtype)
        self.preset, self.own = preset, own
        self.batch_size, self.settings, self.num_traces = batch_size, dict(settings or {}), 0
        self.channels = getattr(self.config, "in_channels", info.channels)
        self.info = dataclasses.replace(info, resize=preset.resize, channels=self.channels)
        try:
            template = self.info.template(self.config)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            given = " with these settings" if settings else ""
            raise ValueError(f"{name}: its configuration{given} makes no network: {error}") from error
        store.check(variables, template, name)
        self.set_variables(variables)
        self._weights = described
        self._lock = threading.Lock()  # programs are traced once, whichever thread comes first
        self._compile(info.network(self.config))

    def _own_settings(self, info: ModelInfo) -> dict[str, Any]:
        """Return settings beside the preset and the network's."""
        return {}

    def set_variables(self, variables: Mapping[str, Any]) -> None:
        """Match with other variables of the same shapes from now on; nothing is compiled anew."""
        import jax

        device = jax.config.jax_default_device or jax.local_devices()[0]  # the caller's, for the threads as well
        self.variables = jax.device_put(jax.tree.map(np.asarray, dict(variables)), device)
        self._weights: dict[str, Any] = {"file": None}

    @property
    def weights(self) -> dict[str, Any]:
        """What the variables are: `file`, None where they were given; `sha256` of the file or of the arrays."""
        if "sha256" not in self._weights:
            self._weights["sha256"] = store.digest(self.variables)
        return self._weights

    def _compile(self, module: Any) -> None:
        """Make the programs."""
        import jax

        def run(variables, image0, image1, mask0, mask1, **dense):
            self.num_traces += 1  # runs while tracing only
            image0, image1 = (image.astype(np.float32) / 255 for image in (image0, image1))
            return self.info.module.match(module, variables, image0, image1, mask0, mask1, **dense)

        self._run = jax.jit(run, static_argnames="dense")

    def dense(self, image0: Any, image1: Any) -> tuple[Matches, Warp]:
        """Match two images and return the dense warp beside the matches that are drawn from it (DKM only).

        Raises:
          ValueError: a model without a warp, or a preset with borders (`aspect`).
        """
        if self.info.family != "dkm":
            raise ValueError(f"model: {self.info.name} has no dense warp, the family dkm has")
        if self.preset.aspect:
            raise ValueError(f"aspect: found {self.preset.aspect}, expected None for a warp")
        pair = self._load(image0), self._load(image1)
        frames, found = self._launch([pair], dense=True)
        (matches,), (frame0, frame1) = self._finish((frames, found)), frames[0]
        warp, conf = (np.asarray(found[key][0], np.float32) for key in ("warp", "certainty"))
        kpts0, kpts1 = (
            frame.to_original(geometry.normalized_to_pixel(end, np.array(frame.size) // CELL * CELL, False))
            for end, frame in ((warp[..., :2], frame0), (warp[..., 2:], frame1))
        )
        width = conf.shape[1] // 2 if self.config.symmetric else conf.shape[1]
        back = (kpts0[:, width:], conf[:, width:]) if self.config.symmetric else (None, None)
        return matches, Warp(kpts1[:, :width], conf[:, :width], *back, frame0.original, frame1.original)

    def _frame(self, source: Any) -> tuple[np.ndarray, Frame]:
        """Read an image, give it its borders, colours and size."""
        image, name = read_image(source), source if isinstance(source, str | os.PathLike) else "image"
        original, offset = size_of(image), (0, 0)
        if self.preset.aspect:
            left, right, top, bottom = padding_to_aspect(original, self.preset.aspect)
            width, height = original[0] + left + right, original[1] + top + bottom
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f"{name}: aspect: {original[0]}x{original[1]} px become {width}x{height}, more than {MAX_PIXELS}"
                )
            image, offset = np.pad(image, ((top, bottom), (left, right), (0, 0))), (left, top)
        frame = Frame(original, size_of(image), offset, self.info.input_size(size_of(image)))
        if max(frame.size) > MAX_SIDE:
            raise ValueError(f"{name}: {frame.size[0]}x{frame.size[1]} px for the network, expected at most {MAX_SIDE}")
        image = to_gray(image)[..., None] if self.channels == 1 else image
        pixels = RESAMPLINGS[self.preset.resampling](image, frame.size)
        return pixels.reshape(frame.size[1], frame.size[0], self.channels), frame

    def _load(self, source):
        return self._frame(source)

    def _bucket(self, pair):
        return tuple(self._round_up(frame.size) for _, frame in pair)

    def _round_up(self, size: tuple[int, int]) -> tuple[int, int]:
        """Round a size up, so that few programs serve all images."""
        step = self.info.bucket
        return -(-size[0] // step) * step, -(-size[1] // step) * step

    def _launch(self, pairs, **dense):
        num = self.batch_size if len(pairs) > 1 else 1
        inputs, masks = [], []
        for (width, height), images in zip(self._bucket(pairs[0]), zip(*pairs)):
            batch = np.zeros((num, height, width, self.channels), images[0][0].dtype)
            mask = np.zeros((num, height // CELL, width // CELL), bool)
            for row, (pixels, frame) in enumerate(images):
                batch[row] = pad_bottom_right(pixels, (width, height))
                mask[row, : frame.size[1] // CELL, : frame.size[0] // CELL] = True
            mask[len(pairs) :] = True  # rows that fill up the batch are dropped; nothing in them may be NaN
            inputs.append(batch)
            masks.append(mask)
        frames = [tuple(frame for _, frame in pair) for pair in pairs]
        with self._lock:
            return frames, self._run(self.variables, *inputs, *masks, **dense)

    def _finish(self, handle):
        frames, found = handle
        found = {key: np.asarray(found[key]) for key in ("kpts0", "kpts1", "conf", "mask")}
        out = []
        for row, pair in enumerate(frames):
            keep = found["mask"][row]
            out.append(_to_matches([found[f"kpts{i}"][row][keep] for i in (0, 1)], found["conf"][row][keep], pair))
        return out

    def describe(self) -> dict[str, Any]:
        plain = (int, float, str, bool, tuple, type(None))
        entries = {**vars(self.preset), **vars(self.config)}
        for part in self.own:
            entries |= vars(part)
        entries = {key: value if isinstance(value, plain) else str(value) for key, value in entries.items()}
        return {"name": self.info.name, "settings": entries, "weights": self.weights}


@dataclass(frozen=True)
class DetectorSettings:
    """Settings of a detector that is not part of the network. max_keypoints: strongest kept."""

    max_keypoints: int = MAX_FEATURES


class SparseNetwork(Network):
    """A matcher of keypoints: one program per image size detects, one matches.

    `extract` and `match_features` are its two halves, for features that are kept or come from elsewhere.
    """

    def _own_settings(self, info):
        return {"detector": DetectorSettings()} if info.features else {}

    def _compile(self, module):
        import jax

        def extract(variables, image, size):
            self.num_traces += 1  # runs while tracing only
            return module.apply(variables, image.astype(np.float32) / 255, size, method="extract")

        def run(variables, *features_and_sizes):
            self.num_traces += 1
            return self.info.module.match_features(module, variables, *features_and_sizes)

        self._extract, self._run = jax.jit(extract), jax.jit(run)

    def extract(self, image: Any) -> Features:
        """Detect and describe keypoints: `Features` in pixels of the original image, best first."""
        frame, found = self._load(image)
        keep = np.asarray(found["mask"][0])
        arrays = {key: np.asarray(found[key][0])[keep] for key in found if key != "mask"}
        kpts = frame.to_original(arrays["kpts"])
        arrays = {key: value[frame.inside(kpts)] for key, value in (arrays | {"kpts": kpts}).items()}
        return Features(**arrays, size=frame.original)

    def match_features(self, features0: Features, features1: Features) -> Matches:
        """Match what `extract` gave, or any features of the kind the weights were trained with.

        Raises:
          ValueError: arrays of other shapes, numbers that are not finite, scales or angles that are missing.
        """
        pair = self._from_features(features0, "features0"), self._from_features(features1, "features1")
        return self._finish(self._launch([pair]))[0]

    def _load(self, source):
        """Return the frame and the features as [1, K, ...] arrays, in the network's frame."""
        if self.info.features == "given":
            raise ValueError(f"model: {self.info.name} detects no keypoints; use match_features")
        pixels, frame = self._frame(source)
        if self.info.features:
            gray = to_gray(pixels) if self.channels == 3 else pixels[..., 0]
            gray = np.clip(gray, 0, 255).astype(np.uint8)
            num = self.own[0].max_keypoints
            found = rootsift.detect(gray, num, self.info.features)
            return frame, _pad(found, num)
        with self._lock:
            image = pad_bottom_right(pixels, self._round_up(frame.size))[None]
            return frame, self._extract(self.variables, image, np.array([frame.size], np.int32))

    def _from_features(self, features: Features, name: str):
        dim = getattr(self.config, "input_dim", self.config.dim)
        num = len(features.kpts)
        wanted = {"kpts": (num, 2), "desc": (num, dim), "scores": (num,)}
        if getattr(self.config, "add_scale_ori", False):
            wanted |= {"scales": (num,), "oris": (num,)}
        for key, shape in wanted.items():
            value = np.asarray(getattr(features, key))
            if value.shape != shape:
                raise ValueError(f"{name}.{key}: found shape {value.shape}, expected {shape}")
            if not np.isfinite(value).all():
                raise ValueError(f"{name}.{key}: found numbers that are not finite")
        width, height = features.size
        if width < 1 or height < 1:
            raise ValueError(f"{name}.size: found {features.size}, expected a width and a height in px")
        frame = Frame((width, height), (width, height), (0, 0), (width, height))
        return frame, _pad(features, -(-max(num, 1) // FEATURE_STEP) * FEATURE_STEP)

    def _bucket(self, pair):
        return tuple(found["kpts"].shape for _, found in pair)

    def _launch(self, pairs):
        import jax

        num = self.batch_size if len(pairs) > 1 else 1
        pairs = pairs + pairs[-1:] * (num - len(pairs))  # rows that fill up the batch are dropped
        features, sizes = [], []
        for images in zip(*pairs):
            names = set(images[0][1]) & {"kpts", "desc", "scores", "scales", "oris", "mask"}
            features.append({key: jax.numpy.concatenate([found[key] for _, found in images]) for key in names})
            sizes.append(np.array([frame.size for frame, _ in images], np.int32))
        frames = [tuple(frame for frame, _ in pair) for pair in pairs]
        with self._lock:
            return frames, self._run(self.variables, *features, *sizes)


def _pad(features: Features, num: int) -> dict[str, np.ndarray]:
    """Turn features into [1, num, ...] float32 arrays and their mask, the rest zeros."""
    arrays = {key: value for key, value in vars(features).items() if isinstance(value, np.ndarray)}
    found = len(features)
    out: dict[str, np.ndarray] = {"mask": np.arange(num)[None] < found}
    for key, value in arrays.items():
        out[key] = np.zeros((1, num, *value.shape[1:]), np.float32)
        out[key][0, :found] = value
    return out


def _settings(settings: Mapping[str, Any], parts: Mapping[str, Any], name: str) -> list[Any]:
    """Return the parts (dataclasses) with the settings that are fields of theirs; unknown ones are an error."""
    known = {field.name: part for part, values in parts.items() for field in dataclasses.fields(values)}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"settings: {name} has no {', '.join(unknown)}; known: {', '.join(known)}")
    out = [
        replace(values, {key: value for key, value in settings.items() if known[key] == part}, "settings")
        for part, values in parts.items()
    ]
    for values in out:
        _check_ranges(values, "settings")
    return out


def _check_ranges(config: Any, name: str) -> None:
    """Refuse numbers of a dataclass, and of dataclasses in it, that no matcher can mean; `name` begins the message."""
    for key, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{name}: {key}")
            continue
        values = value if isinstance(value, tuple) else (value,)
        if len(values) > MAX_LAYERS:
            raise ValueError(f"{name}: {key}: found {len(values)} values, expected at most {MAX_LAYERS}")
        for number in values:
            most = MAX_COUNT if isinstance(number, int) else np.inf
            low, high = RANGES.get(key, (-most, most))
            if isinstance(number, int | float) and not low <= number <= high:
                raise ValueError(f"{name}: {key}: found {number}, expected {low:g} to {high:g}")


def _to_matches(kpts: Sequence[np.ndarray], conf: np.ndarray, frames: Sequence[Frame]) -> Matches:
    """Map points from the network's frames back to the original images."""
    kpts = [frame.to_original(points) for points, frame in zip(kpts, frames)]
    keep = frames[0].inside(kpts[0]) & frames[1].inside(kpts[1])
    return Matches(kpts[0][keep], kpts[1][keep], conf.astype(np.float32)[keep], frames[0].original, frames[1].original)
