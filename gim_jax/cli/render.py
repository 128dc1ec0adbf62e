"""`gim-jax render`: a walking-tour video with ground truth, or a set of image pairs with known poses."""

from __future__ import annotations

import argparse
import sys
import time


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="new folder: video.mp4 and truth.npz, or with --pairs the set"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the town, the walk and the light (default 0)")
    parser.add_argument("--seconds", type=float, default=40 / 3, help="length of the video (default 13.33: 400 frames)")
    parser.add_argument("--fps", type=float, default=30.0, help="frames per second (default 30)")
    parser.add_argument("--size", default="640x480", metavar="WxH", help="even numbers (default 640x480)")
    parser.add_argument("--speed", type=float, default=1.3, metavar="M_S", help="walking speed in m/s (default 1.3)")
    parser.add_argument("--fov", type=float, default=65.0, metavar="DEG", help="horizontal field of view (default 65)")
    parser.add_argument(
        "--look", help="family of towns: brick, plaster, stone, modern, harbour, market (default: by the seed)"
    )
    parser.add_argument("--cuts", type=int, default=0, metavar="K", help="cuts to another town (default 0)")
    parser.add_argument("--movers", type=int, default=6, metavar="P", help="people walking about (default 6)")
    parser.add_argument("--overlay", action="store_true", help="draw a caption and a logo over the picture")
    parser.add_argument(
        "--pairs", type=int, metavar="N", help="render an evaluation set of N image pairs instead of a video"
    )
    parser.add_argument("--threads", type=int, default=2, help="frames drawn at a time (default 2)")


def run(args: argparse.Namespace) -> int:
    from data_prep import world

    parts = args.size.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise ValueError(f"--size is {args.size!r}, expected WIDTHxHEIGHT such as 640x480")
    if args.threads < 1:
        raise ValueError(f"--threads is {args.threads}, expected 1 or more")
    size = (int(parts[0]), int(parts[1]))
    begin = time.monotonic()

    def progress(done: int, total: int):
        rate = done / max(time.monotonic() - begin, 1e-9)
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} images, {rate:.1f}/s", end=end, file=sys.stderr, flush=True)

    if args.pairs is not None:
        out = world.render_pairs(args.out, args.seed, args.pairs, size, args.look, args.fov, progress, args.threads)
    else:
        config = world.WorldConfig(
            seed=args.seed,
            seconds=args.seconds,
            fps=args.fps,
            size=size,
            speed_m_s=args.speed,
            fov_deg=args.fov,
            look=args.look,
            num_cuts=args.cuts,
            num_movers=args.movers,
            overlay=args.overlay,
        )
        out = world.render(args.out, config, progress, args.threads)
    print(out)
    return 0
