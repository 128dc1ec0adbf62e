"""TFRecord files: written atomically, read with every CRC checked, and by random access.

The format: length (uint64), masked CRC-32C of the length, payload, its masked CRC-32C; little-endian.
"""

from __future__ import annotations

import copy
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

MAX_RECORD_BYTES = 1 << 28  # a longer length is damage: two 64-megapixel JPEGs and their labels stay below it

_HEADER = struct.Struct("<QI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = _HEADER.size + _CRC.size


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # the TFRecord format's rotation and constant


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: str | Path, write: Callable[[Any], object]) -> None:
    """Call `write(binary file)` on a temporary file of the same folder, then rename it to `path`.

    Killed or failing at any moment this leaves either the old file or the new one, never a part of one.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes files for the owner alone; give this one the usual mode
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_tfrecord(path: str | Path, payloads: Iterable[bytes]) -> int:
    """Write payloads as one TFRecord file, atomically. Returns their number."""
    num_records = 0

    def write(file) -> None:
        nonlocal num_records
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + _CRC.pack(_masked_crc(length)))
            file.write(payload)
            file.write(_CRC.pack(_masked_crc(payload)))
            num_records += 1

    write_atomic(path, write)
    return num_records


def _report(message: str, on_error: str, skipped: list[str] | None) -> None:
    if on_error == "raise":
        raise ValueError(message)
    if skipped is not None:
        skipped.append(message)


def _scan(path: str | Path, on_error: str = "raise", skipped: list[str] | None = None) -> list[tuple[int, int]]:
    """List (payload offset, payload length) of the records of a file by hopping over the headers."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: found {on_error!r}, expected 'raise' or 'skip'")
    spans = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            file.seek(position)
            header = file.read(_HEADER.size)
            problem = ""
            if len(header) < _HEADER.size:
                problem = f"the file ends inside a header of {_HEADER.size} bytes"
            else:
                length, crc = _HEADER.unpack(header)
                end = position + _HEADER.size + length + _CRC.size
                if _masked_crc(header[:8]) != crc:
                    problem = "the length field is damaged (CRC mismatch)"
                elif length > MAX_RECORD_BYTES:
                    problem = f"found a record of {length} bytes, expected at most {MAX_RECORD_BYTES}"
                elif end > size:
                    problem = f"the file ends {end - size} bytes before the record does"
            if not problem:
                spans.append((position + _HEADER.size, length))
                position = end
                continue
            _report(f"{path}: record {len(spans)} at byte {position}: {problem}", on_error, skipped)
            position = _next_header(file, position + 1, size)
    return spans


def _next_header(file, position: int, size: int) -> int:
    """Find the next intact header at or after `position`, or the end of the file."""
    file.seek(position)
    data = file.read()
    # The upper half of every length is zero, so only offsets before four zero bytes need their CRC computed.
    found = data.find(bytes(4), 4)
    while 0 <= found <= len(data) - 8:
        header = data[found - 4 : found + 8]
        length, crc = _HEADER.unpack(header)
        if length and _masked_crc(header[:8]) == crc:
            return position + found - 4
        found = data.find(bytes(4), found + 1)
    return size


def read_tfrecord(path: str | Path, on_error: str = "raise", skipped: list[str] | None = None) -> Iterator[bytes]:
    """Yield the payloads of a file, every CRC verified.

    Args:
      path: the file.
      on_error: "raise" stops at damage with a ValueError naming file, record and byte; "skip" yields what is
        intact.
      skipped: with "skip", the message of every damaged place is appended here.
    """
    spans = _scan(path, on_error, skipped)
    with open(path, "rb") as file:
        for index, (offset, length) in enumerate(spans):
            file.seek(offset)
            try:
                yield _checked(path, index, offset, length, file.read(length + _CRC.size))
            except ValueError as error:
                _report(str(error), on_error, skipped)


def _checked(path: str | Path, index: int, offset: int, length: int, data: bytes) -> bytes:
    """Split payload and CRC as read at `offset` and verify them."""
    start = offset - _HEADER.size
    if len(data) != length + _CRC.size:
        raise ValueError(f"{path}: record {index} at byte {start}: the file is shorter than when it was indexed")
    if _masked_crc(data[:length]) != _CRC.unpack(data[length:])[0]:
        raise ValueError(f"{path}: record {index} at byte {start}: the payload is damaged (CRC mismatch)")
    return data[:length]


class TFRecordSource:
    """Random access to the payloads of TFRecord files, for `grain.MapDataset.source`.

    Opening reads only the headers. Each access opens, reads and closes its file, so that a source can be
    shared by threads and sent to worker processes, and a thousand shards cost no file descriptors.

    Args:
      paths: the files, in order.
      on_error: "raise", or "skip" to leave out what the header scan finds damaged (listed in `skipped`). A
        damaged payload is found on access and raises a ValueError naming file, record and byte.
    """

    def __init__(self, paths: Sequence[str | Path], on_error: str = "raise"):
        self.paths = [str(path) for path in paths]
        self.skipped: list[str] = []
        spans = [_scan(path, on_error, self.skipped) for path in self.paths]
        counts = [len(s) for s in spans]
        self._file = np.repeat(np.arange(len(spans), dtype=np.int32), counts)
        self._index = np.concatenate([np.arange(n, dtype=np.int32) for n in counts] or [np.zeros(0, np.int32)])
        self._span = np.array([span for s in spans for span in s], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, index: int) -> bytes:
        path = self.paths[self._file[index]]
        offset, length = (int(v) for v in self._span[index])
        handle = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(handle, length + _CRC.size, offset)
        finally:
            os.close(handle)
        return _checked(path, int(self._index[index]), offset, length, data)

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def places(self) -> list[tuple[int, int]]:
        """List (number of the file, byte offset of the payload) of every record."""
        return list(zip(self._file.tolist(), self._span[:, 0].tolist()))

    def where(self, index: int) -> str:
        """Name a record by file and number for error messages."""
        return f"{self.paths[self._file[index]]}: record {int(self._index[index])}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> TFRecordSource:
        """Keep the records of these indices, in this order."""
        chosen = copy.copy(self)
        for name in ("_file", "_index", "_span"):
            setattr(chosen, name, getattr(self, name)[np.asarray(indices, np.int64)])
        return chosen

    def __repr__(self) -> str:
        return f"TFRecordSource({len(self.paths)} files, {len(self)} records)"
