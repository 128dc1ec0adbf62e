"""`gim-jax label`: videos to labelled pairs, one output file per video."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gim_jax.cli import one_line
from gim_jax.cli.progress import Progress
from gim_jax.config import load_config
from gim_jax.data.tfrecord import write_atomic

FAILED = "failed.json"  # one line per video that could not be labelled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the per-video results")
    parser.add_argument("--config", default="configs/label.py", help="labelling configuration")
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Label every video; one that fails is named and the others go on. Exit code 1 where any failed."""
    config = load_config(args.config, args.overrides)
    _, failed = label_all(args.videos, config, Path(args.out))
    return 1 if failed else 0


def label_all(videos: list[str], config, out: Path) -> tuple[list[dict], list[str]]:
    """Label videos one after the other. Returns the manifest rows and the lines about those that failed."""
    from data_prep.label import label_video
    from data_prep.matchers import check_labellers
    from gim_jax import api

    check_labellers(config)
    api.enable_compilation_cache()
    out.mkdir(parents=True, exist_ok=True)
    rows, failed = [], []
    (out / FAILED).unlink(missing_ok=True)
    for video in videos:
        name = printable(Path(video).name)
        with Progress(f"label {name}", unit="frames") as progress:
            try:
                row = label_video(video, config, out, progress)
            except (ValueError, OSError) as error:
                line = one_line(error)
                failed.append(printable(line if str(video) in line else f"{video}: {line}"))
                progress.close()
                print(f"gim-jax label: {failed[-1]}", file=sys.stderr)
                continue
        rows.append(row)
        print(f"  {name}: {describe(row)}")
    if failed:
        write_atomic(out / FAILED, lambda file: file.write(json.dumps(failed).encode()))
    print(f"labelled {len(rows)} of {len(videos)} videos, {sum(row['pairs'] for row in rows)} pairs, in {out}")
    return rows, failed


def describe(row: dict) -> str:
    """One line on a labelled video: the pairs and their reach, or why there are none."""
    lost = sorted(row["lost"], key=lambda stretch: -stretch["frames"])
    why = f"; most often lost because: {lost[0]['reason']}" if lost and not row["pairs"] else ""
    reach = [s["step"] for s in row["stages"] if s["stage"] == "kept"]
    far = f", up to {max(reach)} samples apart" if reach else ""
    notes = "".join(f"; {note}" for note in row["notes"])
    return f"{row['pairs']} pairs of {row['correspondences']} correspondences{far}{why}{notes}"


def printable(text: str) -> str:
    """Make a name safe for one line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
