"""`gim-jax panorama`: fit a homography to two images and lay one onto the other."""

from __future__ import annotations

import argparse

from gim_jax import api
from gim_jax.cli.match import check_positive, check_writable
from gim_jax.data.tfrecord import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image0", metavar="IMAGE0")
    parser.add_argument("image1", metavar="IMAGE1")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument("--threshold", type=float, default=2.0, metavar="PX", help="inlier distance")
    parser.add_argument("--out", metavar="PNG", required=True, help="both images in the frame of image 1, blended")
    parser.add_argument("--overlay", metavar="PNG", help="image 1 (cyan) and image 0 warped onto it (red)")


def run(args: argparse.Namespace) -> int:
    """Match, fit, write the pictures. Exit code 1 where no homography can be trusted."""
    from gim_jax.image import read_image
    from gim_jax.tasks.panorama import panorama
    from gim_jax.viz import encode_png

    for path in (args.out, args.overlay):
        check_writable(path)
    check_positive(args.threshold)
    if args.model != "rootsift":
        api.enable_compilation_cache()
    images = [read_image(path) for path in (args.image0, args.image1)]
    matches = api.load_matcher(args.model, args.weights)(*images).fit("H", threshold_px=args.threshold)
    if matches.model is None or matches.inliers is None:
        print(f"{len(matches)} matches, no homography: {matches.reason}")
        return 1
    print(f"{len(matches)} matches, {int(matches.inliers.sum())} agree with a homography within {args.threshold:g} px")
    blended, overlay = panorama(images[0], images[1], matches.model)
    for path, picture in ((args.out, blended), (args.overlay, overlay)):
        if path:
            write_atomic(path, lambda file, picture=picture: file.write(encode_png(picture)))
            print(f"drawn in {path}")
    return 0
