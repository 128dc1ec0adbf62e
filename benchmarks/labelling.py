"""Hours of video labelled per day on this machine, and where the time goes.

A rendered 1280x720 walk at 30 frames/s is labelled with RootSIFT alone. The paper needed 16 A100s for 12.5 hours of
video a day with its full set of matchers (section 3.1).

    python benchmarks/labelling.py [--seconds 20] [--config configs/label.py[:NAME]] [--config.networks...]
    python benchmarks/labelling.py --video FILE
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from data_prep import label
from data_prep.manifest import read_manifest
from data_prep.world import WorldConfig, render
from gim_jax.cli.models import format_table
from gim_jax.config import load_config

PAPER_HOURS = 12.5  # a day, on 16 A100s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--video", help="instead of a rendered one")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--config", default="configs/label.py")
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        video = args.video
        if not video:
            video = (
                render(Path(folder) / "town", WorldConfig(seed=1, seconds=args.seconds, size=(1280, 720))) / "video.mp4"
            )
        cpu_s = time.process_time()
        row = label.label_video(video, config, Path(folder) / "labels")
        cpu_s = time.process_time() - cpu_s
        seconds = read_manifest(Path(folder) / "labels" / f"{row['sha256'][:16]}.time.json")
    assert seconds is not None
    total = seconds.pop("total")
    seconds = {name: value for name, value in seconds.items() if name not in ("host", "began")}
    width, height = row["size"]
    print(f"{row['duration_s']:.1f} s of {width}x{height}, {', '.join(row['labellers'])}: {row['pairs']} pairs")
    print(f"{total:.1f} s on {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (nothing else may run)")
    table = [("stage", "seconds", "a second of video")]
    table += [
        (name, f"{s:.1f}", f"{s / row['duration_s']:.3f}") for name, s in sorted(seconds.items(), key=lambda x: -x[1])
    ]
    print(format_table(table))
    duration, cores = row["duration_s"], os.cpu_count() or 1
    print(f"{24 * duration / total:.1f} hours of video a day as measured; the paper {PAPER_HOURS} on 16 A100s")
    print(f"{cpu_s:.1f} s of CPU time: {24 * duration * cores / cpu_s:.1f} hours a day with all cores busy on it")


if __name__ == "__main__":
    main()
