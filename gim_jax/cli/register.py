"""`gim-jax register`: lay one point cloud onto another by their bird's-eye views."""

from __future__ import annotations

import argparse

from gim_jax import api
from gim_jax.cli.match import check_positive, check_writable
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic

DIRECTIONS = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1), "-x": (-1, 0, 0), "-y": (0, -1, 0), "-z": (0, 0, -1)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cloud0", metavar="CLOUD0", help="PLY, PCD, LAS, LAZ or NPY")
    parser.add_argument("cloud1", metavar="CLOUD1")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument(
        "--resolution", type=float, metavar="M", help="length of a pixel (default: sides of 640, 320, 160 px)"
    )
    parser.add_argument(
        "--picture",
        default="auto",
        choices=("auto", "color", "density", "height"),
        help="what is seen from above: the clouds' colours, how many points, or how high",
    )
    parser.add_argument("--band", nargs=2, type=float, metavar=("LOW", "HIGH"), help="heights to look at")
    parser.add_argument("--up", default="z", choices=tuple(DIRECTIONS), help="the vertical axis (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=3.0, metavar="PX", help="inlier distance")
    parser.add_argument("--icp", action="store_true", help="refine by generalized ICP (pip install 'gim-jax[clouds]')")
    parser.add_argument("--out", metavar="PNG", help="draw the inliers, and cloud 0 (red) laid onto cloud 1 (cyan)")
    parser.add_argument("--json", metavar="FILE", help="write the pose, the figures and the settings")


def run(args: argparse.Namespace) -> int:
    """Register, print the pose, write what was asked for. Exit code 1 where no motion can be trusted."""
    import numpy as np

    from gim_jax.tasks import bev, load_extra
    from gim_jax.tasks.clouds import read_cloud
    from gim_jax.viz import encode_png

    for path in (args.out, args.json):
        check_writable(path)
    check_positive(args.threshold)
    if args.icp:
        load_extra("small_gicp", "clouds")
    if args.model != "rootsift":
        api.enable_compilation_cache()
    matcher = api.load_matcher(args.model, args.weights)
    clouds = [read_cloud(path) for path in (args.cloud0, args.cloud1)]
    for path, cloud in zip((args.cloud0, args.cloud1), clouds):
        dropped = f", {cloud.num_dropped} not finite" if cloud.num_dropped else ""
        print(f"{path}: {len(cloud)} points{'' if cloud.colors is None else ' with colours'}{dropped}")
    found = bev.register(
        clouds[0],
        clouds[1],
        matcher,
        resolution=args.resolution,
        picture=args.picture,
        band=args.band,
        up=DIRECTIONS[args.up],
        quarter_turns=(0,) if args.model == "rootsift" else (0, 1, 2, 3),
        threshold_px=args.threshold,
        icp=args.icp,
    )
    views = " and ".join(f"{view.image.shape[1]}x{view.image.shape[0]}" for view in found.views)
    print(f"views of {views} px at {found.views[0].resolution:.4g} a pixel: {len(found.kpts0)} matches")
    if found.T_0to1 is None:
        print(f"no motion: {found.reason}")
    else:
        print(f"{int(found.inliers.sum())} inliers, {100 * found.overlap:.0f} % of the cells overlap", end="")
        print(f"; rotation {found.yaw_deg:.2f} deg about the vertical; T_0to1:")
        print("\n".join("  " + " ".join(f"{v: .6f}" for v in row) for row in found.T_0to1))
        if found.icp and not found.icp["converged"]:
            print("ICP did not converge; the pose is that of the matches")
    if args.out:
        picture = bev.draw_registration(found, DIRECTIONS[args.up])
        write_atomic(args.out, lambda file: file.write(encode_png(picture)))
        print(f"drawn in {args.out}")
    if args.json:
        record = {
            "cloud0": args.cloud0,
            "cloud1": args.cloud1,
            "num_points": [len(cloud) for cloud in clouds],
            "T_0to1": None if found.T_0to1 is None else found.T_0to1.tolist(),
            "reason": found.reason,
            "yaw_deg": found.yaw_deg,
            "scale": found.scale,
            "overlap": found.overlap,
            "num_matches": len(found.kpts0),
            "num_inliers": int(np.sum(found.inliers)),
            "inliers0": found.views[0].to_metric(found.kpts0[found.inliers]).tolist(),
            "inliers1": found.views[1].to_metric(found.kpts1[found.inliers]).tolist(),
            "icp": found.icp,
            "resolution": found.views[0].resolution,
            "settings": {"picture": args.picture, "band": args.band, "up": args.up, "threshold_px": args.threshold},
            "matcher": matcher.describe(),
        }
        write_json(args.json, record)
        print(f"written to {args.json}")
    return 0 if found.T_0to1 is not None else 1
