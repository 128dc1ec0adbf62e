"""`gim-jax reconstruct`: cameras and points from two images, from a folder of images, or from a video."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from gim_jax import api
from gim_jax.cli.match import _intrinsics
from gim_jax.data.tfrecord import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="two images; a folder of images; a video")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results, made if it is not there")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    for name in ("--K0", "--K1"):
        parser.add_argument(
            name,
            nargs=4,
            type=float,
            metavar=("FX", "FY", "CX", "CY"),
            help="intrinsics of two images; without them EXIF's focal length, else one found from the matches",
        )
    parser.add_argument("--threshold", type=float, default=1.0, metavar="PX", help="inlier distance, two images")


def run(args: argparse.Namespace) -> int:
    """Reconstruct and write the results. Exit code 1 where there is nothing to be trusted."""
    if len(args.sources) == 2:
        return _two_view(args)
    raise ValueError(f"found {len(args.sources)} sources, expected two images")


def _two_view(args: argparse.Namespace) -> int:
    from gim_jax.image import read_image
    from gim_jax.tasks import two_view
    from gim_jax.tasks.clouds import write_ply
    from gim_jax.viz import encode_png

    if (args.K0 is None) != (args.K1 is None):
        raise ValueError("--K0, --K1: found one of them, expected both or none")
    images = [read_image(path) for path in args.sources]
    Ks, origin = [_intrinsics(args.K0), _intrinsics(args.K1)], "given"
    if args.K0 is None:
        focals = [two_view.exif_focal_px(path) for path in args.sources]
        if all(focals):
            Ks = [two_view.guess_K(image.shape[1::-1], focal) for image, focal in zip(images, focals)]
            origin = "from EXIF"
        else:
            origin = "found from the matches"
    if args.model != "rootsift":
        api.enable_compilation_cache()
    matcher = api.load_matcher(args.model, args.weights)
    matches = matcher(*images)
    found = two_view.reconstruct(matches, *Ks, threshold_px=args.threshold)
    print(", ".join(f"{num} {text}" for text, num in found.counts.items()))
    stats = two_view.statistics(found)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    poses = {
        "image0": args.sources[0],
        "image1": args.sources[1],
        "size0": matches.size0,
        "size1": matches.size1,
        "K0": found.K0.tolist(),
        "K1": found.K1.tolist(),
        "intrinsics": origin,
        "T_0to1": None if found.T_0to1 is None else found.T_0to1.tolist(),
        "unit": "distance between the cameras",
    }
    stats["matcher"] = matcher.describe()
    for name, record in (("poses.json", poses), ("statistics.json", stats)):
        text = json.dumps(record, indent=1, allow_nan=False)
        write_atomic(out / name, lambda file, text=text: file.write(text.encode()))
    picture = two_view.draw_reconstruction(images[0], images[1], matches, found)
    write_atomic(out / "picture.png", lambda file: file.write(encode_png(picture)))
    if found.T_0to1 is None:
        print(f"no reconstruction: {found.reason}")
        return 1
    colors = two_view.sample_colors(images[0], matches.kpts0[found.index])
    write_ply(out / "points.ply", found.points, colors)
    angle, error = stats["rotation_deg"], stats["median_reprojection_px"]
    print(f"{len(found.points)} points, rotation {angle:.2f} deg, median reprojection error {error:.2f} px")
    print(f"focal lengths {found.K0[0, 0]:.0f} and {found.K1[0, 0]:.0f} px, {origin}")
    print(f"points.ply, poses.json, statistics.json and picture.png in {out}")
    return 0 if np.isfinite(found.points).all() else 1
