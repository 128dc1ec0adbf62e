"""Labelled image pairs as TFRecord files of tf.Example, written and read without TensorFlow.

One record is one pair: both images as JPEG, their correspondences, and where they come from. The files are
plain uncompressed TFRecords, so `tf.data` reads them, and a folder made by `write_dataset` opens with
`tfds.builder_from_directory`. `TFRecordSource` gives random access to them for grain.

Nothing read from a record is ever used as a path, and every size in it is bounded before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example

from gim_jax import __version__
from gim_jax.data import scenes
from gim_jax.data.headers import jpeg_size, png_size
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import (
    HEADER_BYTES,
    OVERHEAD_BYTES,
    TFRecordSource,
    read_tfrecord,
    write_atomic,
    write_tfrecord,
)

SCHEMA_VERSION = 2  # 1 had no poses; its records are still read
MAX_IMAGE_PIXELS = 1 << 26
MAX_TEXT_BYTES = 4096


@dataclass(frozen=True)
class PairRecord:
    """Two frames and the correspondences between them.

    Attributes:
      image0, image1: colour JPEG bytes.
      size0, size1: (width, height) px of the images.
      correspondences: [M, 4] float32 `(x0, y0, x1, y1)` px, (0, 0) = centre of the top-left pixel.
      confidence: [M] float32 in [0, 1].
      teacher: [M] integer index into `teachers`.
      teachers: names of the matchers that made the correspondences.
      hops: [M] integer: 1 = matched directly, k = propagated through k base labels.
      F: [3, 3] float64 fundamental matrix (x1^T F x0 = 0), or zeros.
      frame0, frame1: frame numbers in the video; `interval` = their distance in frames.
      time0_s, time1_s: presentation times.
      video, video_sha256, licence: the video's file name, the digest of its bytes, and its licence.
      label_config_hash, code_version, schema_version: what made the label.
      T_0to1: [4, 4] float64 pose, X1 = R X0 + t, of a posed pair; zeros for none, and then no depth either.
      K0, K1: [3, 3] float64 intrinsics for pixel centres at whole numbers, or zeros.
      depth0, depth1: PNG bytes of `gim_jax.data.depth`, as large as the images, or empty.
      depth_ranges: [2, 2] float64 (nearest, farthest) of each.
      depth_complete: 1 where unknown depth means that nothing can be matched there (MegaDepth), 0 where a sensor
        just missed it (ScanNet).
      scene: what pairs are balanced by; of a video pair the video. overlap: share in [0, 1], -1 = unknown.
      pair_id: hash of the content (`make_pair_id`); "" lets `encode` fill it in.
    """

    image0: bytes
    image1: bytes
    size0: tuple[int, int]
    size1: tuple[int, int]
    correspondences: np.ndarray
    confidence: np.ndarray
    teacher: np.ndarray
    teachers: tuple[str, ...]
    hops: np.ndarray
    F: np.ndarray
    frame0: int
    frame1: int
    time0_s: float
    time1_s: float
    interval: int
    video: str
    video_sha256: str
    licence: str
    label_config_hash: str
    code_version: str = __version__
    schema_version: int = SCHEMA_VERSION
    T_0to1: np.ndarray = field(default_factory=lambda: np.zeros((4, 4)))
    K0: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    K1: np.ndarray = field(default_factory=lambda: np.zeros((3, 3)))
    depth0: bytes = b""
    depth1: bytes = b""
    depth_ranges: np.ndarray = field(default_factory=lambda: np.ones((2, 2)))
    depth_complete: int = 0
    scene: str = ""
    overlap: float = -1.0
    pair_id: str = ""

    @property
    def posed(self) -> bool:
        """True with pose and depth, False with correspondences alone."""
        return bool(np.any(self.T_0to1))


_ARRAYS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {  # stored as little-endian bytes
    "correspondences": (np.float32, (-1, 4)),
    "confidence": (np.float32, (-1,)),
    "teacher": (np.int32, (-1,)),
    "hops": (np.int32, (-1,)),
    "F": (np.float64, (3, 3)),
    "time0_s": (np.float64, ()),
    "time1_s": (np.float64, ()),
    "T_0to1": (np.float64, (4, 4)),
    "K0": (np.float64, (3, 3)),
    "K1": (np.float64, (3, 3)),
    "depth_ranges": (np.float64, (2, 2)),
    "overlap": (np.float64, ()),
}
_SCALARS = ("time0_s", "time1_s", "overlap")
_INTS = ("frame0", "frame1", "interval", "schema_version", "depth_complete")
_TEXTS = ("pair_id", "video", "video_sha256", "licence", "label_config_hash", "code_version", "scene")
_IMAGES = ("image0", "image1", "depth0", "depth1")
_POSE = ("T_0to1", "K0", "K1", "depth_ranges")
_SINCE_2 = {*_POSE, "depth0", "depth1", "depth_complete", "scene", "overlap"}
_PER_MATCH = ("correspondences", "confidence", "teacher", "hops")


def make_pair_id(record: PairRecord) -> str:
    """Hash what a record teaches (images, correspondences, confidences, teachers, hops, depth, pose): 32 hex digits.

    Equal content gives an equal id whatever video file, configuration or code version it came from.
    """
    digest = hashlib.sha256()
    parts = [
        record.image0,
        record.image1,
        json.dumps([*record.size0, *record.size1, *record.teachers]).encode(),
    ]
    for name in _PER_MATCH:
        parts.append(np.ascontiguousarray(getattr(record, name), _ARRAYS[name][0]).tobytes())
    if record.posed:
        parts += [record.depth0, record.depth1]
        parts += [np.ascontiguousarray(getattr(record, name), np.float64).tobytes() for name in _POSE]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _check(record: PairRecord) -> None:
    """Raise a ValueError naming the first field that is out of its range."""

    def expect(condition: bool, name: str, found: object, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name}: found {found}, expected {expected}")

    expect(
        1 <= record.schema_version <= SCHEMA_VERSION, "schema_version", record.schema_version, f"1 to {SCHEMA_VERSION}"
    )
    num_matches = len(record.correspondences)
    for name, (_, shape) in _ARRAYS.items():
        array = np.asarray(getattr(record, name))
        wanted = tuple(num_matches if n < 0 else n for n in shape)
        expect(array.shape == wanted, name, f"shape {array.shape}", f"shape {wanted}")
        expect(bool(np.isfinite(array).all()), name, "a value that is not finite", "finite values")
    for i in "01":
        width, height = getattr(record, f"size{i}")
        try:
            found = jpeg_size(getattr(record, f"image{i}"))
        except ValueError as error:
            raise ValueError(f"image{i}: {error}") from error
        expect(
            found == (width, height, 3),
            f"image{i}",
            f"(width, height, channels) {found}",
            f"{width, height, 3}",
        )
        expect(
            0 < width * height <= MAX_IMAGE_PIXELS,
            f"size{i}",
            f"{width}x{height}",
            f"1 to {MAX_IMAGE_PIXELS} px",
        )
    teacher, confidence, hops = (np.asarray(getattr(record, n)) for n in ("teacher", "confidence", "hops"))
    if num_matches:
        found = f"{teacher.min()} to {teacher.max()}"
        in_range = 0 <= teacher.min() and teacher.max() < len(record.teachers)
        expect(in_range, "teacher", found, f"indices of {len(record.teachers)} teachers")
        found = f"{confidence.min()} to {confidence.max()}"
        expect(0 <= confidence.min() and confidence.max() <= 1, "confidence", found, "0 to 1")
        expect(hops.min() >= 1, "hops", hops.min(), "1 or more")
    for name in _TEXTS:
        size = len(getattr(record, name).encode("utf-8", "backslashreplace"))
        expect(size <= MAX_TEXT_BYTES, name, f"{size} bytes", f"at most {MAX_TEXT_BYTES}")
    expect(record.overlap == -1 or 0 <= record.overlap <= 1, "overlap", record.overlap, "0 to 1, or -1")
    if not record.posed:
        expect(not (record.depth0 or record.depth1), "T_0to1", "zeros beside depth", "a pose")
        return
    T = np.asarray(record.T_0to1)
    expect(bool(np.abs(T).max() < 1e9), "T_0to1", T.tolist(), "numbers below 1e9")
    rigid = np.allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-3) and np.linalg.det(T[:3, :3]) > 0
    expect(bool(rigid and np.array_equal(T[3], (0, 0, 0, 1))), "T_0to1", T.tolist(), "a rotation and a translation")
    for i in "01":
        K = np.asarray(getattr(record, f"K{i}"))
        good = K[0, 0] > 0 and K[1, 1] > 0 and np.array_equal(K[2], (0, 0, 1))
        expect(bool(good), f"K{i}", K.tolist(), "a camera matrix")
        near, far = np.asarray(record.depth_ranges)[int(i)]
        expect(bool(0 < near <= far), "depth_ranges", f"{near} to {far}", "positive, nearest first")
        try:
            found = png_size(getattr(record, f"depth{i}"))
        except ValueError as error:
            raise ValueError(f"depth{i}: {error}") from error
        expect(found == tuple(getattr(record, f"size{i}")), f"depth{i}", found, f"{getattr(record, f'size{i}')}")


def encode(record: PairRecord) -> bytes:
    """Serialise a record as tf.Example; the same record always gives the same bytes.

    Raises: ValueError naming the field that is out of range, or a `pair_id` that is not the content's.
    """
    _check(record)
    pair_id = make_pair_id(record)
    if record.pair_id not in ("", pair_id):
        raise ValueError(f"pair_id: found {record.pair_id}, expected {pair_id} (the hash of the content)")
    record = replace(record, pair_id=pair_id)
    example = tf_example.Example()
    feature = example.features.feature

    def put_bytes(name: str, values: Iterable[bytes]) -> None:
        feature[name].bytes_list.value.extend(values)

    for name in _IMAGES:
        put_bytes(name, [getattr(record, name)])
    for name in ("size0", "size1"):
        feature[name].int64_list.value.extend(int(v) for v in getattr(record, name))
    for name, (dtype, _) in _ARRAYS.items():
        put_bytes(name, [np.ascontiguousarray(getattr(record, name), np.dtype(dtype).newbyteorder("<")).tobytes()])
    for name in _INTS:
        feature[name].int64_list.value.append(int(getattr(record, name)))
    for name in _TEXTS:
        # A file name that is not UTF-8 reaches Python as lone surrogates, which no reader could decode again.
        put_bytes(name, [getattr(record, name).encode("utf-8", "backslashreplace")])
    put_bytes("teachers", [name.encode() for name in record.teachers])
    return example.SerializeToString(deterministic=True)


def decode(payload: bytes) -> PairRecord:
    """Parse and check one record.

    Raises: ValueError naming the field that is missing, of the wrong kind or out of range.
    """
    try:
        features = tf_example.Example.FromString(payload).features.feature
    except DecodeError as error:
        raise ValueError(f"found {len(payload)} bytes that are not a tf.Example") from error

    def get(name: str, kind: str, count: int | None) -> list:
        if name not in features:
            raise ValueError(f"{name}: missing; expected the fields of schema version {SCHEMA_VERSION}")
        values = getattr(features[name], kind).value
        if count is not None and len(values) != count:
            raise ValueError(f"{name}: found {len(values)} values of kind {kind}, expected {count}")
        return list(values)

    version = get("schema_version", "int64_list", 1)[0]
    if not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"schema_version: found {version}, expected 1 to {SCHEMA_VERSION}; update gim-jax")
    values: dict[str, Any] = {}
    absent = _SINCE_2 if version == 1 else set()
    for name in _IMAGES:
        if name not in absent:
            values[name] = get(name, "bytes_list", 1)[0]
    for name in ("size0", "size1"):
        values[name] = tuple(get(name, "int64_list", 2))
    for name, (dtype, shape) in _ARRAYS.items():
        if name in absent:
            continue
        data = get(name, "bytes_list", 1)[0]
        stride = np.dtype(dtype).itemsize * abs(int(np.prod(shape)))
        if len(data) % stride or (-1 not in shape and len(data) != stride):
            raise ValueError(f"{name}: found {len(data)} bytes, expected {dtype.__name__} of shape {shape}")
        values[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
    for name in (n for n in _SCALARS if n not in absent):
        values[name] = float(values[name])
    for name in (n for n in _INTS if n not in absent):
        values[name] = get(name, "int64_list", 1)[0]
    try:
        for name in (n for n in _TEXTS if n not in absent):
            values[name] = get(name, "bytes_list", 1)[0].decode()
        values["teachers"] = tuple(name.decode() for name in get("teachers", "bytes_list", None))
    except UnicodeDecodeError as error:
        raise ValueError(f"found text that is not UTF-8: {error}") from error
    record = PairRecord(**values)
    _check(record)
    return record


def _summary(payload: bytes) -> tuple[str, str, float]:
    """Read only the pair id, the scene (else the video) and the overlap of a payload."""
    try:
        features = tf_example.Example.FromString(payload).features.feature
    except DecodeError as error:
        raise ValueError(f"found {len(payload)} bytes that are not a tf.Example") from error
    first = {n: next(iter(features[n].bytes_list.value), b"") for n in ("pair_id", "scene", "video", "overlap")}
    if not re.fullmatch(rb"[0-9a-f]{32}", first["pair_id"]):
        raise ValueError("pair_id: expected 32 hex digits")
    scene = (first["scene"] or first["video"]).decode(errors="backslashreplace")
    overlap = struct.unpack("<d", first["overlap"])[0] if len(first["overlap"]) == 8 else scenes.UNKNOWN
    return first["pair_id"].decode(), scene, overlap


def shard_path(folder: str | Path, name: str, split: str, shard: int, num_shards: int) -> Path:
    """Name one shard: `<name>-<split>.tfrecord-00000-of-00064`."""
    return Path(folder) / f"{name}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"


def shard_of(pair_id: str, num_shards: int) -> int:
    """Assign a pair to a shard by the hash of its id."""
    return int(hashlib.sha256(pair_id.encode()).hexdigest()[:16], 16) % num_shards


def write_dataset(
    folder: str | Path, name: str, split: str, num_shards: int, payloads: Iterable[bytes]
) -> dict[str, int | str]:
    """Write a split as hash-assigned shards with the JSON files that TensorFlow Datasets opens it by.

    The bytes written depend only on the set of payloads, not on their order: records are sorted by pair id,
    and of several with one pair id the one with the smallest digest stays.

    Args:
      folder: made if missing; another split of the same name may be there already.
      name, split: lower-case letters, digits and underscores.
      payloads: encoded records. A `TFRecordSource` or list is read twice; anything else is held in memory.

    Returns: dict(num_records=, num_duplicates=, sha256=); the digest, of all records in their order, is also written
      beside them (`dataset_digest`).
    """
    for key, value in (("name", name), ("split", split)):
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", value):
            raise ValueError(f"{key}: found {value!r}, expected lower-case letters, digits and underscores")
    if not 1 <= num_shards <= 99999:
        raise ValueError(f"num_shards: found {num_shards}, expected 1 to 99999")
    records = payloads if isinstance(payloads, TFRecordSource | list | tuple) else list(payloads)
    shards: list[list[tuple[str, bytes, int]]] = [[] for _ in range(num_shards)]
    about = []
    for index in range(len(records)):
        payload = records[index]
        pair_id, *rest = _summary(payload)
        about.append((*rest, len(payload)))
        shards[shard_of(pair_id, num_shards)].append((pair_id, hashlib.sha256(payload).digest(), index))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lengths, num_bytes, written, digest = [], 0, [], hashlib.sha256()
    for shard, entries in enumerate(shards):
        entries.sort()
        entries = [entry for i, entry in enumerate(entries) if i == 0 or entry[0] != entries[i - 1][0]]
        digest.update(b"".join(entry[1] for entry in entries))
        kept = [entry[2] for entry in entries]
        path = shard_path(folder, name, split, shard, num_shards)
        lengths.append(write_tfrecord(path, (records[index] for index in kept)))
        num_bytes += path.stat().st_size
        offsets = np.cumsum([0] + [about[index][2] + OVERHEAD_BYTES for index in kept])[:-1] + HEADER_BYTES
        written += [(*about[index][:2], (shard, int(offset))) for index, offset in zip(kept, offsets)]
    scenes.write_index(scenes.index_path(folder, name, split), *(zip(*written) if written else ((), (), ())))
    _write_tfds_files(folder, name, split, lengths, num_bytes)
    write_atomic(folder / f"{name}-{split}.sha256", lambda file: file.write(f"{digest.hexdigest()}\n".encode()))
    return {
        "num_records": sum(lengths),
        "num_duplicates": len(records) - sum(lengths),
        "sha256": digest.hexdigest(),
    }


def dataset_digest(folder: str | Path, split: str) -> str | None:
    """Read the digest of a packed split's records, None where there is none (not packed, or by an older version)."""
    folder = Path(folder)
    path = folder / f"{split_lengths(folder, split)[0]}-{split}.sha256" if is_packed(folder) else None
    return path.read_text().strip() if path and path.is_file() else None


def _write_tfds_files(folder: Path, name: str, split: str, lengths: list[int], num_bytes: int) -> None:
    """Write `features.json` and `dataset_info.json` in TensorFlow Datasets' format."""
    from tensorflow_datasets import features as tfds  # a second of imports that reading does not need

    kinds: dict[str, Any] = {key: tfds.Text() for key in _TEXTS} | {
        key: tfds.Tensor(shape=tuple(n if n >= 0 else None for n in shape), dtype=dtype, encoding=tfds.Encoding.BYTES)
        for key, (dtype, shape) in _ARRAYS.items()
    }
    kinds |= {key: tfds.Scalar(dtype=np.int64) for key in _INTS}
    kinds |= {f"size{i}": tfds.Tensor(shape=(2,), dtype=np.int64) for i in "01"}
    kinds |= {f"image{i}": tfds.Image(shape=(None, None, 3), encoding_format="jpeg") for i in "01"}
    kinds |= {f"depth{i}": tfds.Text() for i in "01"}  # PNG bytes as they are
    kinds["teachers"] = tfds.Sequence(tfds.Text())
    assert set(kinds) == {f.name for f in fields(PairRecord)}
    text = json.dumps(tfds.FeaturesDict(kinds).to_json(), indent=1, sort_keys=True)
    write_atomic(folder / "features.json", lambda file: file.write(text.encode()))

    path = folder / "dataset_info.json"
    splits = json.loads(path.read_text())["splits"] if path.exists() else []
    entry = {
        "name": split,
        "shardLengths": [str(n) for n in lengths],
        "numBytes": str(num_bytes),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {
        "name": name,
        "version": f"{SCHEMA_VERSION}.0.0",
        "description": "Image pairs with correspondences, labelled from video (gim-jax).",
        "fileFormat": "tfrecord",
        "moduleName": "gim_jax.data.records",
        "splits": sorted([s for s in splits if s["name"] != split] + [entry], key=lambda s: s["name"]),
    }
    write_json(path, info)


def dataset_paths(path: str | Path, split: str = "train") -> list[Path]:
    """List the record files of `path`: one file, the split of a packed folder, or a folder of `*.tfrecord`.

    Raises: ValueError where there are none, or where shards of a packed folder are missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; expected records")
    if is_packed(path):
        name, lengths = split_lengths(path, split)
        paths = [shard_path(path, name, split, i, len(lengths)) for i in range(len(lengths))]
        if missing := [p.name for p in paths if not p.is_file()]:
            raise ValueError(f"{path}: {len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}")
        return paths
    paths = sorted(p for p in path.glob("*.tfrecord") if not p.name.startswith(".") and p.is_file())
    if not paths:
        raise ValueError(f"{path}: found no dataset_info.json and no *.tfrecord, expected a folder of records")
    return paths


def is_packed(path: str | Path) -> bool:
    """True for a folder of shards with an index, as `write_dataset` makes it."""
    return (Path(path) / "dataset_info.json").is_file()


def _read_info(folder: Path) -> tuple[str, dict[str, list[int]]]:
    """Read the data set's name and, of every split, the records per shard from `dataset_info.json`."""
    path = folder / "dataset_info.json"
    try:
        info = json.loads(path.read_text())
        name, splits = info["name"], {str(s["name"]): [int(n) for n in s["shardLengths"]] for s in info["splits"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the JSON of a record folder ({type(error).__name__}: {error})") from error
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise ValueError(f"{path}: name: found {name!r}, expected lower-case letters, digits and underscores")
    return name, splits


def split_lengths(folder: Path, split: str) -> tuple[str, list[int]]:
    """Read the data set's name and the records per shard of a split."""
    name, splits = _read_info(folder)
    if split not in splits:
        there = ", ".join(sorted(splits)) or "none"
        raise ValueError(f"{folder / 'dataset_info.json'}: no split {split!r}; there are: {there}")
    return name, splits[split]


def dataset_splits(path: str | Path) -> list[str]:
    """Name the splits of a packed folder; a file or a plain folder of records is one split, "train"."""
    return list(_read_info(Path(path))[1]) if is_packed(path) else ["train"]


def verify(path: str | Path) -> tuple[int, list[str]]:
    """Check a file or folder of records: CRCs, fields, pair ids, pixels, shard names and lengths.

    Returns: (number of intact records, one line per problem).
    """
    import cv2

    from gim_jax.data.depth import decode_depth

    num_intact, problems = 0, []
    for split in dataset_splits(path):
        paths = dataset_paths(path, split)
        lengths = split_lengths(Path(path), split)[1] if is_packed(path) else None
        seen: dict[str, str] = {}
        for shard, file in enumerate(paths):
            skipped: list[str] = []
            num_read = 0
            for index, payload in enumerate(read_tfrecord(file, "skip", skipped)):
                num_read += 1
                where = f"{file}: record {index}"
                try:
                    record = decode(payload)
                except ValueError as error:
                    problems.append(f"{where}: {error}")
                    continue
                found = []
                if record.pair_id != make_pair_id(record):
                    found.append(f"pair_id {record.pair_id} is not the hash of the content")
                if record.pair_id in seen:
                    found.append(f"pair {record.pair_id} is also in {seen[record.pair_id]}")
                if lengths and shard_of(record.pair_id, len(paths)) != shard:
                    found.append(f"belongs in shard {shard_of(record.pair_id, len(paths))}")
                for name in ("image0", "image1"):
                    if cv2.imdecode(np.frombuffer(getattr(record, name), np.uint8), cv2.IMREAD_COLOR) is None:
                        found.append(f"{name} cannot be decoded")
                for i in (0, 1) if record.posed else ():
                    try:
                        decode_depth((record.depth0, record.depth1)[i], *record.depth_ranges[i])
                    except ValueError:
                        found.append(f"depth{i} cannot be decoded")
                seen.setdefault(record.pair_id, where)
                problems += [f"{where}: {text}" for text in found]
                num_intact += not found
            problems += skipped
            if lengths and num_read != lengths[shard]:
                problems.append(f"{file}: found {num_read} records, expected {lengths[shard]} by dataset_info.json")
    return num_intact, problems
