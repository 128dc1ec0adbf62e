"""The program `gim-jax`: one command per module of this folder."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {  # command: one line of help; the code is in gim_jax/cli/<command>.py
    "quickstart": "label, pack, train, evaluate, report: the whole chain on the CPU",
    "match": "match two images",
    "models": "list the matchers, their weights, licences and published numbers",
    "convert": "turn official PyTorch weights into safetensors",
    "export": "write a matcher or its matches for other tools: StableHLO, a model hub, hloc, COLMAP",
    "videos": "check, fetch and hash the videos of a list",
    "label": "make labelled pairs from videos",
    "pack": "merge labelled videos into training records",
    "records": "verify, show or count records",
    "report": "write the HTML report of a labelling or quickstart folder",
    "render": "render a walking-tour video with ground truth",
    "panorama": "lay one image onto another by a homography",
    "reconstruct": "cameras and points from two images, a folder of images or a video",
    "localize": "the poses of images in a COLMAP model",
    "register": "lay one point cloud onto another by their views from above",
    "web": "a page on this machine: match two images, browse a label set",
    "train": "train a matcher",
    "plan": "compile a training step for TPU slices without having one: memory, time, days",
    "eval": "evaluate a matcher on a benchmark",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 bad input (one clear line on stderr), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="gim-jax", description="Generalizable image matching in JAX.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {
        name: sub.add_parser(name, help=text, description=text, allow_abbrev=False) for name, text in COMMANDS.items()
    }
    name = next((a for a in argv if not a.startswith("-")), None)
    if name not in COMMANDS:
        if parser.parse_args(argv).version:
            from gim_jax import __version__

            print(__version__)
            return 0
        parser.print_help()
        return 2
    module = importlib.import_module(f"gim_jax.cli.{name}")
    module.add_arguments(parsers[name])
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "accepts_overrides", False):
        parsers[name].error(f"unknown arguments: {' '.join(rest)}")
    args.overrides = rest
    try:
        return int(module.run(args) or 0)
    except (ValueError, OSError) as error:
        print(f"gim-jax {name}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ngim-jax {name}: interrupted; start it again to continue", file=sys.stderr)
        return 130


def one_line(error: Exception) -> str:
    """One line about an error; the system's own ones begin with the file they are about."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
