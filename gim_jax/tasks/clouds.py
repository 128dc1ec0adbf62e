"""Point clouds: PLY, PCD, LAS and NPY in, PLY out."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gim_jax.data.tfrecord import write_atomic
from gim_jax.tasks import load_extra
from gim_jax.weights.store import BAD_FILE

MAX_HEADER = 1 << 16  # bytes of a PLY or PCD header; real ones are below a thousand
PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}  # paulbourke.net/dataformats/ply
PLY_FORMATS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
PCD_TYPES = {"F": "f", "U": "u", "I": "i"}  # pointclouds.org, the PCD file format
MAX_LAZ_RATIO = 200  # of points packed; scans shrink five- to twentyfold
PCD_DATA = ("ascii", "binary", "binary_compressed")


@dataclass(frozen=True)
class Cloud:
    """Points of a scan.

    Attributes:
      points: [N, 3] float64, in the units and axes of the file.
      colors: [N, 3] uint8 RGB, or None.
      num_dropped: points of the file with NaN or infinite coordinates, left out here.
    """

    points: np.ndarray
    colors: np.ndarray | None = None
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.points)


def read_cloud(path: str | Path) -> Cloud:
    """Read a point cloud: `.ply`, `.pcd`, `.las`, `.laz` or `.npy` ([N, 3] x y z, or [N, 6] with r g b of 0 to 255).

    Raises:
      ValueError: naming the file: missing, of another kind, damaged, truncated, or without a finite point.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: found the ending {path.suffix!r}, expected one of {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: {'is not a file' if path.exists() else 'no such file'}, expected a point cloud")
    try:
        points, colors = reader(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    finite = np.isfinite(points).all(1)
    if not finite.any():
        raise ValueError(f"{path}: found {len(points)} points, none of them finite")
    if colors is not None:
        colors = np.clip(np.nan_to_num(colors), 0, 255).astype(np.uint8)[finite]
    return Cloud(np.asarray(points[finite], np.float64), colors, int((~finite).sum()))


def write_ply(path: str | Path, points: np.ndarray, colors: np.ndarray | None = None) -> None:
    """Write points [N, 3] as float32 and colours [N, 3] uint8 RGB as a binary PLY file, atomically."""
    kind = [(name, "<f4") for name in "xyz"]
    if colors is not None:
        kind += [(name, "u1") for name in ("red", "green", "blue")]
    rows = np.zeros(len(points), kind)
    for column, (name, _) in enumerate(kind):
        rows[name] = points[:, column] if column < 3 else colors[:, column - 3]  # type: ignore[index]
    types = {"<f4": "float", "u1": "uchar"}
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property {types[code]} {name}" for name, code in kind] + ["end_header", ""]
    write_atomic(path, lambda file: file.write("\n".join(lines).encode() + rows.tobytes()))


def _header(path: Path, last: str) -> tuple[list[list[str]], bytes]:
    """Split a file behind the line that starts with `last`: words of each header line, and the body."""
    data = path.read_bytes()
    lines, start = [], 0
    while True:
        end = data.find(b"\n", start)
        if end < 0 or end > MAX_HEADER:
            raise ValueError(f"found no line {last!r} in the first {MAX_HEADER} bytes")
        words = data[start:end].decode("latin-1").split()
        lines.append(words)
        start = end + 1
        if words and words[0] == last:
            return lines, data[start:]


def _count(text: str, field: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{field}: found {text!r}, expected a number")
    return int(text)


def _table(body: bytes, kind: np.dtype, num: int, text: bool) -> np.ndarray:
    """Read `num` rows of a structured type from text or bytes."""
    if text:
        try:
            rows = np.loadtxt(io.BytesIO(body), max_rows=num, ndmin=2, comments=None) if num else np.zeros((0, 0))
        except ValueError as error:
            raise ValueError(f"found text that is no table of numbers: {error}") from None
        width = sum(int(np.prod(kind[name].shape)) for name in kind.names or ())
        if len(rows) < num or (num and rows.shape[1] < width):
            raise ValueError(f"found {rows.shape} numbers, expected {num} rows of {width}")
        out, column = np.zeros(num, kind), 0
        for name in kind.names or ():
            size = int(np.prod(kind[name].shape))
            out[name] = rows[:, column : column + size].reshape(out[name].shape)
            column += size
        return out
    if len(body) < num * kind.itemsize:
        raise ValueError(f"found {len(body)} bytes of points, expected {num * kind.itemsize}; the file is truncated")
    return np.frombuffer(body, kind, num)


def _xyz(table: dict | np.ndarray, names) -> np.ndarray:
    missing = [name for name in "xyz" if name not in names]
    if missing:
        raise ValueError(f"found the fields {', '.join(names)}, expected x, y and z")
    return np.stack([np.asarray(table[name], np.float64) for name in "xyz"], 1)


def _read_ply(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    lines, body = _header(path, "end_header")
    if lines[0] != ["ply"]:
        raise ValueError("found no 'ply' in the first line")
    form, elements = "", []
    for words in lines[1:-1]:
        if words[:1] == ["format"] and len(words) == 3:
            form = words[1]
        elif words[:1] == ["element"] and len(words) == 3:
            elements.append((words[1], _count(words[2], f"element {words[1]}"), []))
        elif words[:1] == ["property"] and elements:
            elements[-1][2].append(words[1:])
    if form not in PLY_FORMATS:
        raise ValueError(f"format: found {form!r}, expected one of {', '.join(PLY_FORMATS)}")
    for name, num, properties in elements:
        if any(len(words) != 2 or words[0] not in PLY_TYPES for words in properties):
            raise ValueError(f"element {name}: found lists or unknown types before the points, expected plain numbers")
        kind = np.dtype([(words[1], PLY_FORMATS[form] + PLY_TYPES[words[0]]) for words in properties])
        if name == "vertex":
            table, names = _table(body, kind, num, form == "ascii"), kind.names or ()
            colors = [key for key in ("red", "green", "blue") if key in names]
            rgb = np.stack([table[key] for key in colors], 1) if len(colors) == 3 else None
            if rgb is not None and rgb.dtype.kind == "f":
                rgb = rgb * 255  # floating-point colours of a PLY file run from 0 to 1
            return _xyz(table, names), rgb
        body = b"\n".join(body.split(b"\n")[num:]) if form == "ascii" else body[num * kind.itemsize :]
    raise ValueError("found no element 'vertex'")


def _read_pcd(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    lines, body = _header(path, "DATA")
    head = {words[0]: words[1:] for words in lines if words and not words[0].startswith("#")}
    missing = [key for key in ("FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT", "DATA") if not head.get(key)]
    if missing:
        raise ValueError(f"found no {', '.join(missing)} in the header")
    names, data = head["FIELDS"], head["DATA"][0]
    repeats = [_count(text, "COUNT") for text in head.get("COUNT", ["1"] * len(names))]
    sizes, types = [_count(text, "SIZE") for text in head["SIZE"]], head["TYPE"]
    if not len(names) == len(sizes) == len(types) == len(repeats):
        raise ValueError(f"found {len(names)} FIELDS, {len(sizes)} SIZE, {len(types)} TYPE and {len(repeats)} COUNT")
    if data not in PCD_DATA:
        raise ValueError(f"DATA: found {data!r}, expected one of {', '.join(PCD_DATA)}")
    if not set(types) <= set(PCD_TYPES) or not set(sizes) <= {1, 2, 4, 8} or ("F", 1) in zip(types, sizes):
        raise ValueError(f"found TYPE {' '.join(types)} and SIZE {head['SIZE']}, expected F, U, I of 1, 2, 4, 8 bytes")
    num = _count(head["WIDTH"][0], "WIDTH") * _count(head["HEIGHT"][0], "HEIGHT")
    codes = [f"<{PCD_TYPES[kind]}{size}" for kind, size in zip(types, sizes)]
    unique = [name if name != "_" else f"_{index}" for index, name in enumerate(names)]  # _ is padding
    kind = np.dtype([(name, code, (count,)) for name, code, count in zip(unique, codes, repeats)])
    if data == "binary_compressed":
        if len(body) < 8:
            raise ValueError("the file is truncated")
        packed, size = (int(value) for value in np.frombuffer(body, "<u4", 2))
        if len(body) < 8 + packed or size != num * kind.itemsize:
            found = f"{len(body) - 8} of {packed} packed bytes that hold {size}"
            raise ValueError(f"found {found}, expected {num * kind.itemsize}; the file is damaged")
        plain, start, table = decompress_lzf(body[8 : 8 + packed], size), 0, np.zeros(num, kind)
        for name, code, count in zip(unique, codes, repeats):  # one field after the other
            table[name] = np.frombuffer(plain, code, num * count, start).reshape(num, count)
            start += num * count * np.dtype(code).itemsize
    else:
        table = _table(body, kind, num, data == "ascii")
    columns = {name: table[name][:, 0] for name, count in zip(unique, repeats) if count}
    colors = next((columns[name] for name in ("rgb", "rgba") if name in columns), None)
    if colors is not None and colors.dtype.itemsize == 4:  # three bytes in one number, often called a float
        packed_rgb = np.ascontiguousarray(colors).view(np.uint32)
        colors = np.stack([packed_rgb >> shift & 255 for shift in (16, 8, 0)], 1)
    return _xyz(columns, unique), colors if colors is not None and colors.ndim == 2 else None


def decompress_lzf(data: bytes, size: int) -> bytes:
    """Unpack LZF (M. Lehmann's liblzf, the packing of PCD's `binary_compressed`) into exactly `size` bytes."""
    out, at = bytearray(), 0
    try:
        while at < len(data):
            control = data[at]
            at += 1
            if control < 32:  # a run of literal bytes
                out += data[at : at + control + 1]
                at += control + 1
            else:  # a copy of what stands `offset` bytes before
                length = control >> 5
                if length == 7:
                    length += data[at]
                    at += 1
                offset = ((control & 31) << 8 | data[at]) + 1
                at += 1
                start = len(out) - offset
                if start < 0:
                    raise IndexError
                piece = out[start : start + length + 2]
                out += (piece * (-(-(length + 2) // len(piece))))[: length + 2]
            if len(out) > size:
                raise IndexError
    except IndexError:
        raise ValueError(f"the packed points are damaged at byte {at}") from None
    if len(out) != size:
        raise ValueError(f"the packed points hold {len(out)} bytes, expected {size}")
    return bytes(out)


def _check_las(path: Path) -> None:
    """Refuse a LAS header that counts more than the file can hold: laspy takes its word (ASPRS LAS 1.4 R15)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(255)
    if len(head) < 227 or head[:4] != b"LASF":
        raise ValueError("cannot be read as LAS: found no header")
    num_records, kind, length, num = struct.unpack_from("<IBHI", head, 100)
    num_extended = 0
    if head[25] >= 4 and len(head) == 255:
        num_extended, num = struct.unpack_from("<IQ", head, 243)
    growth = MAX_LAZ_RATIO if kind & 0x80 else 1  # the bit that laszip sets
    if num_records * 54 + num_extended * 60 > size or num * length > growth * size:
        found = f"{num_records + num_extended} records and {num} points of {length} bytes"
        raise ValueError(f"cannot be read as LAS: found {found} in a file of {size} bytes")


def _read_las(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    laspy = load_extra("laspy", "clouds")
    _check_las(path)
    try:
        las = laspy.read(path)
        points = np.asarray(las.xyz, np.float64)
        names = set(las.point_format.dimension_names)
    except (*BAD_FILE, laspy.errors.LaspyException) as error:
        raise ValueError(f"cannot be read as LAS: {str(error) or type(error).__name__}") from error
    if not {"red", "green", "blue"} <= names:
        return points, None
    colors = np.stack([las.red, las.green, las.blue], 1)
    return points, colors >> 8 if colors.size and colors.max() > 255 else colors  # 16 bits by the standard, often 8


def _read_npy(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        array = np.load(path, allow_pickle=False)
    except BAD_FILE as error:
        raise ValueError(f"cannot be read as NPY: {str(error) or type(error).__name__}") from error
    if (
        not isinstance(array, np.ndarray)
        or array.ndim != 2
        or array.shape[1] not in (3, 6)
        or array.dtype.kind not in "fiu"
    ):
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"found {found}, expected numbers [N, 3] or [N, 6]")
    return array[:, :3].astype(np.float64), array[:, 3:] if array.shape[1] == 6 else None


READERS = {".ply": _read_ply, ".pcd": _read_pcd, ".las": _read_las, ".laz": _read_las, ".npy": _read_npy}
