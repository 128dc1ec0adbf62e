"""`gim-jax match`: match two images, print what was found, draw it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from gim_jax import api
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", metavar="IMAGE0")
    parser.add_argument("image1", metavar="IMAGE1")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument("--long-side", type=int, metavar="PX", help="resize images, instead of the model's preset")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the model, such as thr=0.4, extractor.max_keypoints=4096, upsample_size=null or "
        "gp_solve=released; may be repeated",
    )
    parser.add_argument("--fit", choices=("F", "H", "E"), help="fundamental matrix, homography or essential matrix")
    for name in ("--K0", "--K1"):
        parser.add_argument(name, nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"), help="intrinsics for --fit E")
    parser.add_argument("--threshold", type=float, default=1.0, metavar="PX", help="inlier distance of --fit")
    parser.add_argument(
        "--out",
        metavar="PNG",
        help="draw the matches, green sure, red unsure; only inliers with --fit; before them, for DKM, image 0 and "
        "image 1 warped into it",
    )
    parser.add_argument("--json", metavar="FILE", help="write points, confidences, sizes and the fit")


def run(args: argparse.Namespace) -> int:
    """Match, print one line, write what was asked for."""
    from gim_jax.image import read_image
    from gim_jax.viz import draw_matches, draw_warp, encode_png, side_by_side

    for path in (args.out, args.json):
        check_writable(path)
    check_positive(args.threshold)
    if args.fit == "E" and (args.K0 is None or args.K1 is None):
        raise ValueError("--fit E: needs --K0 and --K1")
    if args.model != "rootsift":
        api.enable_compilation_cache()
    settings = size_settings(args.model, args.long_side) | parse_settings(args.set)
    matcher = api.load_matcher(args.model, args.weights, **settings)
    image0, image1 = read_image(args.image0), read_image(args.image1)
    warp = None
    if args.out and matcher.info.family == "dkm" and not settings.get("aspect"):
        matches, warp = matcher.dense(image0, image1)
    else:
        matches = matcher(image0, image1)
    print(f"{args.model}: {len(matches)} matches between {_size(matches.size0)} and {_size(matches.size1)}")
    keep = slice(None)
    if args.fit:
        matches = matches.fit(args.fit, _intrinsics(args.K0), _intrinsics(args.K1), args.threshold)
        if matches.model is None:
            print(f"no {args.fit}: {matches.reason}")
        else:
            keep = np.asarray(matches.inliers)
            print(f"{args.fit} with {int(keep.sum())} inliers within {args.threshold:g} px:")
            print("\n".join("  " + " ".join(f"{v: .6e}" for v in row) for row in matches.model))
    if args.out:
        picture = draw_matches(image0, image1, matches.kpts0[keep], matches.kpts1[keep], matches.conf[keep])
        if warp is not None:
            picture = side_by_side([draw_warp(image0, image1, warp), picture])
        write_atomic(args.out, lambda file: file.write(encode_png(picture)))
        print(f"drawn in {args.out}")
    if args.json:
        write_json(args.json, _to_json(args, matcher, matches))
        print(f"written to {args.json}")
    return 0


def size_settings(model: str, long_side: int | None) -> dict:
    """Return the settings of `gim_jax.load_matcher` that `--long-side` stands for; RootSIFT has no exact size."""
    if long_side is None:
        return {}
    return {"long_side": long_side} if model == "rootsift" else {"long_side": long_side, "exact": None}


def parse_settings(texts: list[str]) -> dict:
    """Turn `key=value` and `part.key=value` into settings of `gim_jax.load_matcher`; values are JSON or plain text."""
    settings: dict = {}
    for text in texts:
        key, equals, value = text.partition("=")
        *parts, leaf = key.split(".")
        if not equals or not all([*parts, leaf]):
            raise ValueError(f"--set: found {text!r}, expected KEY=VALUE")
        node = settings
        for part in parts:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set: {text!r}: {part} has a value already")
        try:
            node[leaf] = json.loads(value)
        except json.JSONDecodeError:
            node[leaf] = value
    return settings


def check_writable(path: str | None) -> None:
    """Refuse an output file whose folder does not exist, or that is a folder, before any work is done."""
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"{path}: the folder {Path(path).parent} does not exist")
    if path and Path(path).is_dir():
        raise ValueError(f"{path}: is a folder, expected a file to write")


def check_positive(threshold: float) -> None:
    """Refuse an inlier distance that is none."""
    if not 0 < threshold < float("inf"):
        raise ValueError(f"--threshold: found {threshold:g}, expected a positive number of px")


def _intrinsics(values: list[float] | None) -> np.ndarray | None:
    if values is None:
        return None
    fx, fy, cx, cy = values
    if not (fx > 0 and fy > 0 and np.isfinite(values).all()):
        raise ValueError(f"--K0, --K1: found {values}, expected positive focal lengths and finite numbers")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _to_json(args: argparse.Namespace, matcher, matches) -> dict:
    out = {
        "image0": args.image0,
        "image1": args.image1,
        "size0": matches.size0,
        "size1": matches.size1,
        "matcher": matcher.describe(),
        "kpts0": matches.kpts0.tolist(),
        "kpts1": matches.kpts1.tolist(),
        "conf": matches.conf.tolist(),
    }
    if args.fit:
        model = None if matches.model is None else matches.model.tolist()
        out["fit"] = {"kind": args.fit, "threshold_px": args.threshold, "model": model, "reason": matches.reason}
        out["inliers"] = matches.inliers.tolist()
    return out
