"""MegaDepth as training records: `python -m data_prep.megadepth ROOT --index INDEX --out DIR`.

ROOT is the published layout (D2-Net's undistorted images, MegaDepth_v1's depth): `Undistorted_SfM/SCENE/images/*.jpg`
and `phoenix/S6/zl548/MegaDepth_v1/SCENE/dense*/depths/*.h5`, whatever the index names. INDEX is a folder of
`scene_info` files, either D2-Net's (`overlap_matrix`, as GIM and glue-factory use it) or LoFTR's (`pair_infos`).

Intrinsics there count from the image's corner (COLMAP); records count from the centre of the first pixel.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np

from data_prep.posed import Pair, View, draw, inside, make_record, read_bytes, report, resized, run, write_scene
from gim_jax.data import scene_info
from gim_jax.data.headers import jpeg_size
from gim_jax.tasks import load_extra

LICENCE = "MegaDepth (CC BY 4.0; images by their Flickr authors)"
TEST_SCENES = ("0015", "0022")  # of MegaDepth-1500
MAX_DEPTH_PIXELS = 1 << 26


def read_depth(path: Path) -> np.ndarray:
    """Read `depth` [H, W] float32 of an h5 file; a ValueError for anything else, links to other files included."""
    h5py, what = load_extra("h5py", "prep"), f"{path}: not a depth map"
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but the index names it")
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("depth", getlink=True), h5py.HardLink):
                raise ValueError(f"{what}: found no data set 'depth' of its own")
            data = file["depth"]
            if not isinstance(data, h5py.Dataset) or data.ndim != 2 or data.dtype.kind != "f" or data.external:
                raise ValueError(f"{what}: 'depth': expected a matrix of floating-point numbers")
            if int(np.prod(data.shape)) > MAX_DEPTH_PIXELS:
                raise ValueError(f"{what}: {data.shape}, expected at most {MAX_DEPTH_PIXELS} px")
            return np.asarray(data, np.float32)
    except OSError as error:
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error


def pairs_of(info: dict, path: Path, low: float, high: float) -> list[Pair]:
    """List the pairs of a scene whose overlap lies in a range.

    In a matrix both directed overlaps have to lie there (GIM); a list has one overlap each (LoFTR).
    """
    if "overlap_matrix" in info:
        matrix = np.asarray(info["overlap_matrix"], np.float32)
        size = len(info["image_paths"])
        if matrix.shape != (size, size):
            raise ValueError(f"{path}: overlap_matrix: found {matrix.shape}, expected {size, size}")
        known = np.array([isinstance(name, str) and bool(name) for name in info["image_paths"]])
        good = (matrix >= low) & (matrix <= high) & (matrix.T >= low) & (matrix.T <= high)
        rows, columns = np.nonzero(np.triu(good & known[:, None] & known, 1))
        return [Pair(int(i), int(j), float(min(matrix[i, j], matrix[j, i]))) for i, j in zip(rows, columns)]
    if "pair_infos" in info:
        try:
            rows = [((int(i), int(j)), float(overlap)) for (i, j), overlap, *_ in info["pair_infos"]]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: pair_infos: expected rows of two numbers and an overlap ({error})") from error
        return [Pair(i, j, overlap) for (i, j), overlap in rows if low <= overlap <= high]
    raise ValueError(f"{path}: found {', '.join(info)}, expected overlap_matrix or pair_infos")


def read_view(root: Path, info: dict, long_side: int, number: int) -> View:
    """Read image, depth and camera `number` of a scene."""
    image_path = inside(root, info["image_paths"][number])
    image = read_bytes(image_path)
    try:
        size = jpeg_size(image)[:2]
    except ValueError as error:
        raise ValueError(f"{image_path}: {error}") from error
    depth = read_depth(inside(root, info["depth_paths"][number]))
    if depth.shape != size[::-1]:
        raise ValueError(f"{image_path}: {size}, but its depth is {depth.shape[::-1]} px")
    K, pose = (np.asarray(info[name][number], np.float64) for name in ("intrinsics", "poses"))
    if K.shape != (3, 3) or pose.shape != (4, 4):
        raise ValueError(f"{image_path}: camera of shapes {K.shape}, {pose.shape}, expected (3, 3), (4, 4)")
    K = K - np.array([(0, 0, 0.5), (0, 0, 0.5), (0, 0, 0)])  # COLMAP: the corner is (0, 0)
    return resized(View(image, size, depth, K, pose), long_side)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.megadepth", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--index", type=Path, required=True, help="folder of scene_info *.npz or *.npy")
    parser.add_argument("--out", type=Path, required=True, help="gets scenes/, one file per scene, and records/")
    parser.add_argument("--pairs-per-scene", type=int, default=2000)
    parser.add_argument("--min-overlap", type=float, default=0.01, help="gim: 0.01; LoFTR's index has 0.1 to 0.7")
    parser.add_argument("--max-overlap", type=float, default=0.7)
    parser.add_argument("--long-side", type=int, default=1600, help="px; larger images are made smaller")
    parser.add_argument("--test-scenes", action="store_true", help="also 0015 and 0022, the test scenes")
    parser.add_argument("--num-shards", type=int, default=64)
    return run(parser, convert, argv)


def convert(args: argparse.Namespace) -> int:
    """Write every scene of the index that is not there yet, then pack."""
    load_extra("h5py", "prep")  # or every pair would be left out for it
    files = sorted(p for p in args.index.glob("*.np[yz]"))
    if not args.test_scenes:
        files = [p for p in files if not p.stem.startswith(TEST_SCENES)]
    if not files:
        raise ValueError(f"{args.index}: found no scene_info file, expected *.npz or *.npy")
    (args.out / "scenes").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, path in enumerate(files):
        info = scene_info.load(path)
        for name in ("image_paths", "depth_paths", "intrinsics", "poses"):
            if name not in info:
                raise ValueError(f"{path}: found {', '.join(info)}, expected {name}")
        pairs = pairs_of(info, path, args.min_overlap, args.max_overlap)
        chosen = draw(pairs, args.pairs_per_scene, 7, args.min_overlap, args.max_overlap, number)
        read = functools.partial(read_view, args.root, info, args.long_side)
        encode = functools.partial(make_record, scene=path.stem, licence=LICENCE, complete=True)
        rows.append(write_scene(args.out / "scenes" / f"{path.stem}.tfrecord", chosen, read, encode))
        print(f"{number + 1} of {len(files)}: scene {path.stem}: {rows[-1]['pairs']} of {len(pairs)} pairs", flush=True)
    return report(rows, args.out, "megadepth", args.num_shards)


if __name__ == "__main__":
    sys.exit(main())
