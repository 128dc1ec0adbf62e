"""`gim-jax export`: a matcher as a StableHLO artefact that JAX runs without this package."""

from __future__ import annotations

import argparse

HELP = """Writes OUT, what jax.export.deserialize reads (StableHLO for every platform asked for), and OUT.json, which
says what it is and how to call it: names, shapes and types of inputs and outputs, conventions, licence, hash of the
weights, and five lines of Python that run it with jax and safetensors alone. The weights are not in OUT: they are its
first argument, the arrays of the same .safetensors file as --weights, so OUT stays below a megabyte, serves retrained
weights of the same network, and carries no licence but this package's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}. {HELP}"
    parser.add_argument("--model", required=True, help="a name of `gim-jax models` that takes images")
    parser.add_argument("--weights", required=True, metavar="FILE", help="the model's .safetensors file")
    parser.add_argument("out", metavar="OUT", help="where to write, e.g. loftr.stablehlo; OUT.json stands beside it")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("WIDTH", "HEIGHT"),
        help="px of both images, multiples of 64; smaller images are padded (default: what the model's preset needs)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pairs per call (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="what the network computes in; scores and geometry are float32 (default: as trained, float32)",
    )
    parser.add_argument(
        "--platforms",
        default="cpu,cuda,tpu",
        help="where it is to run, separated by commas (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Export, then say what was written."""
    from gim_jax import export

    settings = {"dtype": args.dtype} if args.dtype else {}
    size = tuple(args.size) if args.size else None
    platforms = tuple(name for name in args.platforms.split(",") if name)
    about = export.export(args.model, args.weights, args.out, size, args.batch, platforms, **settings)
    batch, height, width, _ = about["inputs"]["image0"]["shape"]
    print(
        f"{args.out}: {args.model}, {batch} pair{'s' * (batch > 1)} of {width}x{height} px, "
        f"{about['artefact']['bytes'] / 1e6:.1f} MB for {', '.join(about['platforms'])}\n"
        f"{export.description_of(args.out)}: how to call it; licence of the weights: {about['weights']['licence']}"
    )
    return 0
