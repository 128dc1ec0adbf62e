"""Every kind of image file becomes the same RGB array; what is no image is a clear error; sizes follow the
protocols."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from gim_jax import image as im

RNG = np.random.default_rng(0)
RGB = cv2.resize(RNG.integers(0, 255, (6, 9, 3), dtype=np.uint8), (90, 60), interpolation=cv2.INTER_CUBIC)


def save(tmp_path, picture, name, **settings):
    path = tmp_path / name
    picture.save(path, **settings)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a b'\"-.png"])
def test_lossless_files_are_exact(tmp_path, name):
    np.testing.assert_array_equal(im.read_image(save(tmp_path, Image.fromarray(RGB), name)), RGB)


def test_string_path(tmp_path):
    np.testing.assert_array_equal(im.read_image(str(save(tmp_path, Image.fromarray(RGB), "a.png"))), RGB)


def test_grayscale(tmp_path):
    got = im.read_image(save(tmp_path, Image.fromarray(RGB[..., 0]), "g.png"))
    np.testing.assert_array_equal(got, np.stack([RGB[..., 0]] * 3, -1))


def test_sixteen_bit(tmp_path):
    deep = RNG.integers(0, 2**16, (60, 90), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / "d.png"), deep)
    want = np.stack([deep // 256] * 3, -1)
    np.testing.assert_array_equal(im.read_image(tmp_path / "d.png"), want)
    np.testing.assert_array_equal(im.read_image(deep), want)
    np.testing.assert_array_equal(im.read_image(Image.open(tmp_path / "d.png")), want)


def test_alpha_is_dropped(tmp_path):
    rgba = np.dstack([RGB, np.full((60, 90), 7, np.uint8)])
    np.testing.assert_array_equal(im.read_image(save(tmp_path, Image.fromarray(rgba), "a.png")), RGB)
    np.testing.assert_array_equal(im.read_image(rgba), RGB)


def test_palette(tmp_path):
    palette = Image.fromarray(RGB).quantize(64)
    np.testing.assert_array_equal(im.read_image(save(tmp_path, palette, "p.png")), np.asarray(palette.convert("RGB")))


def test_cmyk_jpeg(tmp_path):
    path = save(tmp_path, Image.fromarray(RGB).convert("CMYK"), "c.jpg", quality=97)
    want = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(im.read_image(path) - want).mean() < 2  # two libraries, two roundings


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(RGB), "e.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(im.read_image(path), upright)
    np.testing.assert_array_equal(im.read_image(Image.open(path)), upright)
    np.testing.assert_array_equal(im.read_image(path, exif=False), RGB)


def test_arrays_and_pil():
    np.testing.assert_array_equal(im.read_image(RGB), RGB)
    np.testing.assert_array_equal(im.read_image(RGB[..., :1]), np.repeat(RGB[..., :1], 3, -1))
    np.testing.assert_array_equal(im.read_image(Image.fromarray(RGB)), RGB)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pil_images_without_a_white_are_refused(kind):
    with pytest.raises(ValueError, match=r"PIL image: found mode [IF], expected 8 or 16 bits"):
        im.read_image(Image.fromarray(np.full((4, 5), 1000, kind)))


@pytest.mark.parametrize("shape", [(1, 1, 3), (20, 20000, 3)])
def test_extreme_sizes_are_images(shape):
    assert im.read_image(np.zeros(shape, np.uint8)).shape == shape


@pytest.mark.parametrize(
    "array, found",
    [
        (np.zeros((0, 0, 3), np.uint8), "without pixels"),
        (np.zeros((4, 5, 3), np.float32), "float32"),
        (np.zeros((4, 5, 2), np.uint8), r"\(4, 5, 2\)"),
        (np.zeros(7, np.uint8), r"\(7,\)"),
    ],
)
def test_bad_arrays(array, found):
    with pytest.raises(ValueError, match=found):
        im.read_image(array)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files(tmp_path, suffix, share, capfd):
    path = save(tmp_path, Image.fromarray(RGB), f"t.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"t\.{suffix}: .*truncated"):
        im.read_image(path)


def test_libpng_is_not_asked_about_a_cut_or_empty_picture(tmp_path, capfd):
    """It would print to the terminal."""
    path = save(tmp_path, Image.fromarray(RGB), "t.png")
    cut = path.read_bytes()[:-20]
    header = b"IHDR" + struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)
    none = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    for data, message in ((cut, "bytes without an end"), (none, "found 0x0 px")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            im.read_image(path)
    assert capfd.readouterr().err == ""


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is not an image")
    cases = {
        "empty.png": "empty",
        "text.png": "not an image",
        "missing.png": "no such file",
        ".": "is not a file",
    }
    for name, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as error:
            im.read_image(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def png(width, height):
    """A valid PNG of zeros, small however large its image is."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(width + 1)) for _ in range(height)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(0, 0), (20000, 20000)])
def test_empty_and_enormous_files(size):
    with pytest.raises(ValueError, match=r"^bomb\.png: .*decoded"):
        im.decode_image(png(*size), "bomb.png")


def test_gray_weights():
    pure = np.eye(3, dtype=np.uint8)[None] * 255
    np.testing.assert_allclose(im.to_gray(pure)[0], 255 * np.array([0.299, 0.587, 0.114]), atol=0.5)
    assert im.to_gray(im.read_image(np.zeros((5, 7), np.uint8))).shape == (5, 7)


@pytest.mark.parametrize(
    "size, settings, want",
    [
        ((1600, 1063), {"long_side": 840, "multiple": 8}, (840, 552)),  # 558 floored
        ((1063, 1600), {"long_side": 840, "multiple": 8}, (552, 840)),
        ((640, 480), {"long_side": 1600}, (1600, 1200)),
        ((640, 480), {"long_side": 1600, "upscale": False}, (640, 480)),
        ((1296, 968), {"exact": (640, 480)}, (640, 480)),
        ((20000, 20), {"long_side": 840, "multiple": 8}, (840, 8)),
        ((1, 1), {"multiple": 8}, (8, 8)),
        ((645, 487), {"multiple": 8}, (640, 480)),
    ],
)
def test_target_size(size, settings, want):
    assert im.target_size(size, **settings) == want


def test_resize_is_opencv_bilinear():
    np.testing.assert_array_equal(im.resize(RGB, (33, 47)), cv2.resize(RGB, (33, 47)))
    assert im.resize(RGB, (90, 60)) is RGB


def test_padding_keeps_the_pixels():
    padded = im.pad_bottom_right(RGB, (96, 64))
    np.testing.assert_array_equal(padded[:60, :90], RGB)
    assert padded.shape == (64, 96, 3) and not padded[60:].any() and not padded[:, 90:].any()
    with pytest.raises(ValueError, match="smaller"):
        im.pad_bottom_right(RGB, (80, 64))


def test_padding_to_aspect_reaches_the_ratio():
    left, right, top, bottom = im.padding_to_aspect((640, 640), (896, 672))
    assert (left, right, top, bottom) == (106, 107, 0, 0)  # 640 * 4 / 3 = 853
    assert im.padding_to_aspect((1600, 900), (896, 672)) == (0, 0, 150, 150)
