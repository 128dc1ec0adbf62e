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
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example

from gim_jax import __version__
from gim_jax.data.tfrecord import TFRecordSource, read_tfrecord, write_atomic, write_tfrecord

SCHEMA_VERSION = 1
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
    pair_id: str = ""


_ARRAYS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {  # stored as little-endian bytes
    "correspondences": (np.float32, (-1, 4)),
    "confidence": (np.float32, (-1,)),
    "teacher": (np.int32, (-1,)),
    "hops": (np.int32, (-1,)),
    "F": (np.float64, (3, 3)),
    "time0_s": (np.float64, ()),
    "time1_s": (np.float64, ()),
}
_INTS = ("frame0", "frame1", "interval", "schema_version")
_TEXTS = ("pair_id", "video", "video_sha256", "licence", "label_config_hash", "code_version")
_PER_MATCH = ("correspondences", "confidence", "teacher", "hops")


def jpeg_size(data: bytes) -> tuple[int, int, int]:
    """Read (width, height, channels) from the header of a JPEG without decoding it.

    Raises: ValueError if the bytes are not a JPEG or carry no frame header.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError(f"found {len(data)} bytes starting with {data[:4].hex() or 'nothing'}, expected a JPEG")
    position = 2
    while position + 9 < len(data):
        if data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height, data[position + 9]
        elif marker == 0xDA:  # the pixels begin
            break
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise ValueError("found a JPEG without a frame header")


def make_pair_id(record: PairRecord) -> str:
    """Hash what a record teaches (images, correspondences, confidences, teachers, hops): 32 hex digits.

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
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _check(record: PairRecord) -> None:
    """Raise a ValueError naming the first field that is out of its range."""

    def expect(condition: bool, field: str, found: object, expected: str) -> None:
        if not condition:
            raise ValueError(f"{field}: found {found}, expected {expected}")

    expect(record.schema_version == SCHEMA_VERSION, "schema_version", record.schema_version, str(SCHEMA_VERSION))
    num_matches = len(record.correspondences)
    for field, (_, shape) in _ARRAYS.items():
        array = np.asarray(getattr(record, field))
        wanted = tuple(num_matches if n < 0 else n for n in shape)
        expect(array.shape == wanted, field, f"shape {array.shape}", f"shape {wanted}")
        expect(bool(np.isfinite(array).all()), field, "a value that is not finite", "finite values")
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
    for field in _TEXTS:
        size = len(getattr(record, field).encode("utf-8", "backslashreplace"))
        expect(size <= MAX_TEXT_BYTES, field, f"{size} bytes", f"at most {MAX_TEXT_BYTES}")


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

    for name in ("image0", "image1"):
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
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version: found {version}, expected {SCHEMA_VERSION}; update gim-jax or label again")
    values: dict[str, Any] = {}
    for name in ("image0", "image1"):
        values[name] = get(name, "bytes_list", 1)[0]
    for name in ("size0", "size1"):
        values[name] = tuple(get(name, "int64_list", 2))
    for name, (dtype, shape) in _ARRAYS.items():
        data = get(name, "bytes_list", 1)[0]
        stride = np.dtype(dtype).itemsize * abs(int(np.prod(shape)))
        if len(data) % stride or (-1 not in shape and len(data) != stride):
            raise ValueError(f"{name}: found {len(data)} bytes, expected {dtype.__name__} of shape {shape}")
        values[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
    for name in ("time0_s", "time1_s"):
        values[name] = float(values[name])
    for name in _INTS:
        values[name] = get(name, "int64_list", 1)[0]
    try:
        for name in _TEXTS:
            values[name] = get(name, "bytes_list", 1)[0].decode()
        values["teachers"] = tuple(name.decode() for name in get("teachers", "bytes_list", None))
    except UnicodeDecodeError as error:
        raise ValueError(f"found text that is not UTF-8: {error}") from error
    record = PairRecord(**values)
    _check(record)
    return record


def _pair_id(payload: bytes) -> str:
    """Read only the pair id of a payload."""
    try:
        values = tf_example.Example.FromString(payload).features.feature["pair_id"].bytes_list.value
    except DecodeError as error:
        raise ValueError(f"found {len(payload)} bytes that are not a tf.Example") from error
    if len(values) != 1 or not re.fullmatch(rb"[0-9a-f]{32}", values[0]):
        raise ValueError("pair_id: expected 32 hex digits")
    return values[0].decode()


def shard_path(folder: str | Path, name: str, split: str, shard: int, num_shards: int) -> Path:
    """Name one shard: `<name>-<split>.tfrecord-00000-of-00064`."""
    return Path(folder) / f"{name}-{split}.tfrecord-{shard:05d}-of-{num_shards:05d}"


def shard_of(pair_id: str, num_shards: int) -> int:
    """Assign a pair to a shard by the hash of its id."""
    return int(hashlib.sha256(pair_id.encode()).hexdigest()[:16], 16) % num_shards


def write_dataset(
    folder: str | Path, name: str, split: str, num_shards: int, payloads: Iterable[bytes]
) -> dict[str, int]:
    """Write a split as hash-assigned shards with the JSON files that TensorFlow Datasets opens it by.

    The bytes written depend only on the set of payloads, not on their order: records are sorted by pair id,
    and of several with one pair id the one with the smallest digest stays.

    Args:
      folder: made if missing; another split of the same name may be there already.
      name, split: lower-case letters, digits and underscores.
      payloads: encoded records. A `TFRecordSource` or list is read twice; anything else is held in memory.

    Returns: dict(num_records=, num_duplicates=).
    """
    for field, value in (("name", name), ("split", split)):
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", value):
            raise ValueError(f"{field}: found {value!r}, expected lower-case letters, digits and underscores")
    if not 1 <= num_shards <= 99999:
        raise ValueError(f"num_shards: found {num_shards}, expected 1 to 99999")
    records = payloads if isinstance(payloads, TFRecordSource | list | tuple) else list(payloads)
    shards: list[list[tuple[str, bytes, int]]] = [[] for _ in range(num_shards)]
    for index in range(len(records)):
        payload = records[index]
        pair_id = _pair_id(payload)
        shards[shard_of(pair_id, num_shards)].append((pair_id, hashlib.sha256(payload).digest()[:8], index))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lengths, num_bytes = [], 0
    for shard, entries in enumerate(shards):
        entries.sort()
        kept = [e[2] for i, e in enumerate(entries) if i == 0 or e[0] != entries[i - 1][0]]
        path = shard_path(folder, name, split, shard, num_shards)
        lengths.append(write_tfrecord(path, (records[index] for index in kept)))
        num_bytes += path.stat().st_size
    _write_tfds_files(folder, name, split, lengths, num_bytes)
    return {"num_records": sum(lengths), "num_duplicates": len(records) - sum(lengths)}


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
    write_atomic(path, lambda file: file.write(json.dumps(info, indent=1).encode()))


def dataset_paths(path: str | Path, split: str = "train") -> list[Path]:
    """List the record files of `path`: one file, the split of a packed folder, or a folder of `*.tfrecord`.

    Raises: ValueError where there are none, or where shards of a packed folder are missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; expected records")
    if (path / "dataset_info.json").is_file():
        name, lengths = _split_lengths(path, split)
        paths = [shard_path(path, name, split, i, len(lengths)) for i in range(len(lengths))]
        if missing := [p.name for p in paths if not p.is_file()]:
            raise ValueError(f"{path}: {len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}")
        return paths
    paths = sorted(p for p in path.glob("*.tfrecord") if not p.name.startswith(".") and p.is_file())
    if not paths:
        raise ValueError(f"{path}: found no dataset_info.json and no *.tfrecord, expected a folder of records")
    return paths


def _split_lengths(folder: Path, split: str) -> tuple[str, list[int]]:
    """Read the data set's name and the records per shard of a split from `dataset_info.json`."""
    path = folder / "dataset_info.json"
    try:
        info = json.loads(path.read_text())
        name, splits = info["name"], {s["name"]: [int(n) for n in s["shardLengths"]] for s in info["splits"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the JSON of a record folder ({type(error).__name__}: {error})") from error
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise ValueError(f"{path}: name: found {name!r}, expected lower-case letters, digits and underscores")
    if split not in splits:
        raise ValueError(f"{path}: no split {split!r}; there are: {', '.join(sorted(splits)) or 'none'}")
    return name, splits[split]


def dataset_splits(path: str | Path) -> list[str]:
    """Name the splits of a packed folder; a file or a plain folder of records is one split, "train"."""
    info = Path(path) / "dataset_info.json"
    if not info.is_file():
        return ["train"]
    try:
        return [str(s["name"]) for s in json.loads(info.read_text())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{info}: not the JSON of a record folder ({type(error).__name__}: {error})") from error


def verify(path: str | Path) -> tuple[int, list[str]]:
    """Check a file or folder of records: CRCs, fields, pair ids, pixels, shard names and lengths.

    Returns: (number of intact records, one line per problem).
    """
    import cv2

    num_intact, problems = 0, []
    for split in dataset_splits(path):
        paths = dataset_paths(path, split)
        lengths = _split_lengths(Path(path), split)[1] if (Path(path) / "dataset_info.json").is_file() else None
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
                seen.setdefault(record.pair_id, where)
                problems += [f"{where}: {text}" for text in found]
                num_intact += not found
            problems += skipped
            if lengths and num_read != lengths[shard]:
                problems.append(f"{file}: found {num_read} records, expected {lengths[shard]} by dataset_info.json")
    return num_intact, problems
