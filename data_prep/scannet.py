"""ScanNet as training records: `python -m data_prep.scannet ROOT --index INDEX --out DIR`.

ROOT is the published layout: `sceneXXXX_YY/{color/N.jpg, depth/N.png, pose/N.txt}`, depth in mm, poses from camera to
world. INDEX has `intrinsics.npz` (scene -> 9 or 16 numbers of the depth camera) and `npz/*.npz` or `scene_data/train/
*.npz` with `name` [N, 4] (scene, sub-scene, frame 0, frame 1) and `score`, the overlap, as LoFTR publishes them.

Colour is resized to the depth's 640x480, whose intrinsics hold for both.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import cv2
import numpy as np

from data_prep.posed import Pair, View, draw, make_record, read_bytes, report, run, write_scene
from gim_jax.data import scene_info

LICENCE = "ScanNet Terms of Use (non-commercial research)"
SIZE = (640, 480)  # of the depth camera
FRAME_STEP = 10  # gim: frames whose numbers are multiples of it
JPEG_QUALITY = 95


def read_pose(path: Path) -> np.ndarray:
    """Read [4, 4] from camera to world and turn it round; a ValueError for scans that lost track."""
    try:
        pose = np.array(read_bytes(path).decode().split(), np.float64).reshape(4, 4)
    except ValueError as error:
        raise ValueError(f"{path}: expected 16 numbers ({error})") from error
    if not np.isfinite(pose).all():
        raise ValueError(f"{path}: the scan lost track here (not finite)")
    return np.linalg.inv(pose)


def read_view(folder: Path, K: np.ndarray, frame: int) -> View:
    """Read a frame of a scan."""
    colour, png = (read_bytes(folder / kind) for kind in (f"color/{frame}.jpg", f"depth/{frame}.png"))
    image = cv2.imdecode(np.frombuffer(colour, np.uint8), cv2.IMREAD_COLOR)
    depth = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or depth is None or depth.dtype != np.uint16 or depth.shape != SIZE[::-1]:
        raise ValueError(f"{folder}: frame {frame}: expected a JPEG and a 16-bit PNG of {SIZE[0]}x{SIZE[1]} px")
    image = cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    return View(data, SIZE, depth.astype(np.float32) / 1000, K, read_pose(folder / f"pose/{frame}.txt"))


def pairs_by_scene(info: dict, path: Path, low: float, high: float, step: int) -> dict[str, list[Pair]]:
    """Group the pairs of an index file by scan: those of an overlap in a range, of every `step`-th frame."""
    if "name" not in info or "score" not in info:
        raise ValueError(f"{path}: found {', '.join(info)}, expected name and score")
    names, scores = np.asarray(info["name"]), np.asarray(info["score"], np.float64)
    if names.ndim != 2 or names.shape[1] != 4 or names.dtype.kind not in "iu" or scores.shape != names.shape[:1]:
        raise ValueError(f"{path}: name {names.shape}, score {scores.shape}, expected whole numbers [N, 4] and [N]")
    good = (scores >= low) & (scores <= high) & (names[:, 2:] % step == 0).all(1) & (names >= 0).all(1)
    out: dict[str, list[Pair]] = {}
    for (scene, sub, frame0, frame1), score in zip(names[good].tolist(), scores[good].tolist()):
        out.setdefault(f"scene{scene:04d}_{sub:02d}", []).append(Pair(frame0, frame1, score))
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.scannet", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="folder of the scans sceneXXXX_YY")
    parser.add_argument("--index", type=Path, required=True, help="folder with intrinsics.npz and the pair lists")
    parser.add_argument("--out", type=Path, required=True, help="gets scenes/, one file per scan, and records/")
    parser.add_argument("--pairs-per-scene", type=int, default=200, help="LoFTR draws as many each epoch")
    parser.add_argument("--min-overlap", type=float, default=0.4, help="LoFTR: 0.4; gim: 0")
    parser.add_argument("--max-overlap", type=float, default=0.8)
    parser.add_argument("--frame-step", type=int, default=FRAME_STEP)
    parser.add_argument("--num-shards", type=int, default=64)
    return run(parser, convert, argv)


def convert(args: argparse.Namespace) -> int:
    """Write every scan of the index that is not there yet, then pack."""
    files = sorted(p for p in args.index.rglob("*.npz") if p.name != "intrinsics.npz")
    if not files:
        raise ValueError(f"{args.index}: found no *.npz beside intrinsics.npz, expected lists of pairs")
    cameras = scene_info.load(args.index / "intrinsics.npz")
    (args.out / "scenes").mkdir(parents=True, exist_ok=True)
    scans: dict[str, list[Pair]] = {}
    for path in files:
        found = pairs_by_scene(scene_info.load(path), path, args.min_overlap, args.max_overlap, args.frame_step)
        for scene, pairs in found.items():
            scans.setdefault(scene, []).extend(pairs)
    rows = []
    for number, (scene, pairs) in enumerate(sorted(scans.items())):
        values = np.asarray(cameras.get(scene, ()), np.float64).ravel()
        if values.size not in (9, 16):
            raise ValueError(f"{args.index / 'intrinsics.npz'}: {scene}: found {values.size} numbers, expected 9 or 16")
        K = values.reshape(int(values.size**0.5), -1)[:3, :3]
        chosen = draw(pairs, args.pairs_per_scene, 7, args.min_overlap, args.max_overlap, number)
        read = functools.partial(read_view, args.root / scene, K)
        encode = functools.partial(make_record, scene=scene, licence=LICENCE, complete=False)
        rows.append(write_scene(args.out / "scenes" / f"{scene}.tfrecord", chosen, read, encode))
        print(f"{number + 1} of {len(scans)}: {scene}: {rows[-1]['pairs']} of {len(pairs)} pairs", flush=True)
    return report(rows, args.out, "scannet", args.num_shards)


if __name__ == "__main__":
    sys.exit(main())
