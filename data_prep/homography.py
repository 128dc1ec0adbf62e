"""Any folder of images as training records for homographies: `python -m data_prep.homography IMAGES --out DIR`.

A record is one image twice, on a plane, with the identity for a pose: training warps image 1 by another random
homography in every epoch (`data.augment`), and depth and cameras say where every point goes.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from data_prep.posed import Pair, View, make_record, report, run, write_scene
from gim_jax.image import encode_jpeg, read_image, resize

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
JPEG_QUALITY = 95
PART = 1000  # images per file


def read_view(path: object, long_side: int) -> View:
    """Read an image onto the plane z = 1."""
    assert isinstance(path, Path)
    image = read_image(path)
    height, width = image.shape[:2]
    scale = min(long_side / max(width, height), 1)
    if scale < 1:
        width, height = max(round(width * scale), 1), max(round(height * scale), 1)
        image = resize(image, (width, height))
    K = np.array([(float(width), 0, (width - 1) / 2), (0, float(width), (height - 1) / 2), (0, 0, 1)])
    return View(encode_jpeg(image, JPEG_QUALITY), (width, height), np.ones((height, width), np.float32), K, np.eye(4))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.homography", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("images", type=Path, help="folder, searched with all folders in it")
    parser.add_argument("--out", type=Path, required=True, help="gets scenes/ and records/")
    parser.add_argument("--long-side", type=int, default=1024, help="px; larger images are made smaller")
    parser.add_argument("--licence", default="unknown", help="of the images, written into every record")
    parser.add_argument("--num-shards", type=int, default=64)
    return run(parser, convert, argv)


def convert(args: argparse.Namespace) -> int:
    """Write the images in parts of a thousand, then pack; those that do not decode are left out and named."""
    paths = sorted(p for p in args.images.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{args.images}: found no image, expected {', '.join(sorted(SUFFIXES))}")
    (args.out / "scenes").mkdir(parents=True, exist_ok=True)

    encode = functools.partial(make_record, scene="homography", licence=args.licence, complete=True)
    rows = []
    for number, start in enumerate(range(0, len(paths), PART)):
        part = [Pair(path, path, 1.0) for path in paths[start : start + PART]]
        file = args.out / "scenes" / f"part{number:06d}.tfrecord"
        rows.append(write_scene(file, part, functools.partial(read_view, long_side=args.long_side), encode))
        print(f"{min(start + PART, len(paths))} of {len(paths)} images", flush=True)
    return report(rows, args.out, "homography", args.num_shards)


if __name__ == "__main__":
    sys.exit(main())
