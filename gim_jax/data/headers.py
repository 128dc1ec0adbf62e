"""Sizes of images from their headers, without decoding them."""

from __future__ import annotations

import struct


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


def png_size(data: bytes) -> tuple[int, int]:
    """Read (width, height) from the header of a 16-bit gray PNG; a ValueError for anything else."""
    header = struct.unpack(">8s4x4sIIBB", data[:26]) if len(data) >= 26 else (b"", b"", 0, 0, 0, 0)
    if header[:2] != (b"\x89PNG\r\n\x1a\n", b"IHDR") or header[4:] != (16, 0):
        raise ValueError(f"found {len(data)} bytes starting with {data[:4].hex() or 'nothing'}, expected a 16-bit PNG")
    return header[2], header[3]
