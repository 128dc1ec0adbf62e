"""`gim-jax videos`: check, fetch, hash and probe the videos of a CSV; its output is what `gim-jax label` takes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gim_jax.cli.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", metavar="CSV", help="columns: video (a file or an http address), licence")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of videos.csv, refused.csv and what is fetched"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="LICENCE",
        help="also use videos of this licence, with * and ? (default: CC0, CC-BY, public domain)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from data_prep.intake import FREE, intake

    with Progress("videos", unit="videos") as progress:
        listed, refused = intake(args.list, args.out, (*FREE, *args.allow), progress)
    for row in refused:
        line = f"gim-jax videos: refused: {row['video']}: {row['reason'].removeprefix(row['video'] + ': ')}"
        print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    hours = sum(one.duration_s for one in listed) / 3600
    print(f"{len(listed)} videos of {hours:.2f} hours in {Path(args.out) / 'videos.csv'}, {len(refused)} refused")
    return 0 if listed else 1
