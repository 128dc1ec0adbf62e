"""Point cloud files: every format gives the points that were written, and damage is named."""

import io
import struct

import numpy as np
import pytest

from gim_jax.tasks.clouds import decompress_lzf, read_cloud, write_ply

POINTS = np.array([[0.5, -1.25, 2.0], [3.0, 4.5, -0.75], [7.0, 8.0, 9.0]], np.float32)
COLORS = np.array([[255, 0, 1], [2, 3, 4], [250, 128, 7]], np.uint8)


def ply(form: str, code: str) -> bytes:
    head = f"ply\nformat {form} 1.0\ncomment made here\nelement vertex 3\nproperty float x\nproperty float y\n"
    head += "property float z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
    rows = [(*point, *color) for point, color in zip(POINTS.tolist(), COLORS.tolist())]
    if form == "ascii":
        return (head + "\n".join(" ".join(map(str, row)) for row in rows) + "\n").encode()
    kind = [(n, code + "f4") for n in "xyz"] + [(n, "u1") for n in "rgb"]
    return head.encode() + np.array(rows, kind).tobytes()


def pcd(data: str) -> bytes:
    packed = (COLORS.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(1).astype(np.uint32).view(np.float32)
    head = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\nWIDTH 3\nHEIGHT 1\n"
    head += f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS 3\nDATA {data}\n"
    table = np.c_[POINTS, packed].astype("<f4")
    if data == "ascii":
        head = head.replace("TYPE F F F F", "TYPE F F F U")
        rows = [[*point, int(color)] for point, color in zip(POINTS.tolist(), packed.view(np.uint32))]
        return (head + "\n".join(" ".join(map(str, row)) for row in rows)).encode()
    if data == "binary":
        return head.encode() + table.tobytes()
    plain = table.T.tobytes()  # field after field, here in runs of literal bytes
    runs = b"".join(bytes([len(plain[i : i + 32]) - 1]) + plain[i : i + 32] for i in range(0, len(plain), 32))
    return head.encode() + np.array([len(runs), len(plain)], "<u4").tobytes() + runs


FILES = {
    "ascii.ply": ply("ascii", "="),
    "little.ply": ply("binary_little_endian", "<"),
    "big.ply": ply("binary_big_endian", ">"),
    "ascii.pcd": pcd("ascii"),
    "binary.pcd": pcd("binary"),
    "compressed.pcd": pcd("binary_compressed"),
}


@pytest.mark.parametrize("name", FILES)
def test_reads_points_and_colours(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    cloud = read_cloud(tmp_path / name)
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)


def test_reads_las(tmp_path):
    laspy = pytest.importorskip("laspy", reason="laspy is not installed: pip install 'gim-jax[clouds]'")
    las = laspy.create(point_format=2, file_version="1.2")
    las.header.scales, las.header.offsets = np.full(3, 0.25), np.array([500_000.0, 4e6, 0.0])
    las.x, las.y, las.z = (POINTS.astype(float) + [500_000, 4e6, 0]).T
    las.red, las.green, las.blue = (COLORS.astype(np.uint16) * 257).T
    las.write(tmp_path / "a.las")
    cloud = read_cloud(tmp_path / "a.las")
    np.testing.assert_array_equal(cloud.points, POINTS.astype(float) + [500_000, 4e6, 0])
    np.testing.assert_array_equal(cloud.colors, COLORS)


def test_reads_npy_and_counts_points_that_are_not_finite(tmp_path):
    np.save(tmp_path / "a.npy", np.r_[np.c_[POINTS, COLORS], [[np.nan, 0, 0, 0, 0, 0]]])
    cloud = read_cloud(tmp_path / "a.npy")
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)
    assert cloud.num_dropped == 1


def test_writes_what_it_reads(tmp_path):
    write_ply(tmp_path / "a.ply", POINTS, COLORS)
    cloud = read_cloud(tmp_path / "a.ply")
    np.testing.assert_array_equal(cloud.points, POINTS)
    np.testing.assert_array_equal(cloud.colors, COLORS)


def test_lzf_copies_repeat_what_they_just_wrote():
    # liblzf: literal "ab", then a copy of 9 bytes from 2 before: length 7 + 2 needs the extra byte 0
    assert decompress_lzf(bytes([1]) + b"ab" + bytes([7 << 5, 0, 1]), 11) == b"abababababa"


def npy_header(shape) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


BAD = {
    "short.ply": (FILES["little.ply"][:-1], "44 bytes of points, expected 45"),
    "short.pcd": (FILES["binary.pcd"][:-1], "47 bytes of points, expected 48"),
    "packed.pcd": (FILES["compressed.pcd"][:-1], "expected 48; the file is damaged"),
    "noxyz.ply": (FILES["ascii.ply"].replace(b"float z", b"float w"), "expected x, y and z"),
    "list.ply": (
        FILES["ascii.ply"].replace(b"property float z", b"property list uchar int z"),
        "expected plain numbers",
    ),
    "words.ply": (FILES["ascii.ply"].replace(b"0.5", b"abc"), "no table of numbers"),
    "endless.ply": (b"ply\n" + b"x" * 100_000, "found no line 'end_header'"),
    "size.pcd": (FILES["binary.pcd"].replace(b"SIZE 4 4 4 4", b"SIZE 4 4 4 3"), "of 1, 2, 4, 8 bytes"),
    "huge.pcd": (FILES["binary.pcd"].replace(b"WIDTH 3", b"WIDTH 999999999999"), "the file is truncated"),
    "empty.npy": (b"", "cannot be read as NPY"),
    "pickle.npy": (b"\x80\x04K\x01.", "allow_pickle"),
    "zip.npy": (b"PK\x03\x04" + b"x" * 100, "cannot be read as NPY"),
    "huge.npy": (npy_header((10**12, 3)), "cannot be read as NPY"),
    "a.xyz": (b"", "found the ending '.xyz', expected one of .ply, .pcd"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_named(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_cloud(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "offset, value, message",
    [
        (100, struct.pack("<I", 1 << 24), "found 16777216 records and 3 points of 26 bytes"),
        (107, struct.pack("<I", 0x7FFFFFFF), "found 0 records and 2147483647 points of 26 bytes"),
        (24, bytes([9, 9]), "cannot be read as LAS"),  # the version
        (104, bytes([0x82]), "cannot be read as LAS"),  # compressed
        (0, b"LAZF", "found no header"),
    ],
)
def test_a_las_header_is_not_believed(tmp_path, offset, value, message):
    laspy = pytest.importorskip("laspy", reason="laspy is not installed: pip install 'gim-jax[clouds]'")
    las = laspy.create(point_format=2, file_version="1.2")
    las.x, las.y, las.z = POINTS.astype(float).T
    las.write(tmp_path / "a.las")
    data = bytearray((tmp_path / "a.las").read_bytes())
    data[offset : offset + len(value)] = value
    (tmp_path / "a.las").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.las: .*{message}"):
        read_cloud(tmp_path / "a.las")
