"""Hours of video labelled per day on this machine, and where the time goes.

A rendered 1280x720 walk at 30 frames/s is labelled with RootSIFT alone. The paper needed 16 A100s for 12.5 hours of
video a day with its full set of matchers (section 3.1).

The labels are then repeated to an hour and propagated: by rounds of doubling, and by the released code's dictionary of
rounded pixels, which follows a chain of the longest direct labels from every start frame (gim/datasets/walk).

    python benchmarks/labelling.py [--seconds 20] [--config configs/label.py[:NAME]] [--config.networks...]
    python benchmarks/labelling.py --video FILE
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from data_prep import label, propagate
from data_prep.manifest import read_manifest
from data_prep.world import WorldConfig, render
from gim_jax.cli.models import format_table
from gim_jax.config import load_config

PAPER_HOURS = 12.5  # a day, on 16 A100s


def an_hour(direct: dict[int, propagate.Level], num_starts: int) -> dict[int, propagate.Level]:
    """Repeat the direct labels of a short video; no pair reaches from one repetition into the next."""
    num = len(next(iter(direct.values())).mask)
    levels = {}
    for step, level in direct.items():
        rows = [level.pair(start) if level.mask[start].any() else None for start in range(num)]
        rows = [rows[start % num] if start + step < num_starts else None for start in range(num_starts)]
        levels[step] = propagate.make_level(step, rows, num_starts)
    return levels


def released_chain(direct: dict[int, propagate.Level], width: int, min_links: int, starts) -> tuple[int, int]:
    """Propagate by the released rule, without its retreats: number of chains longer than a link, links made.

    From every start the labels of the longest step are linked one after the other; rows that round to the same pixel
    of the middle frame meet, the last of them wins, and at least `min_links` have to (512 at full HD).
    """

    def table(points: np.ndarray) -> dict[int, int]:
        keys = np.round(points).astype(np.int64) @ [1, width]
        return dict(zip(keys.tolist(), range(len(keys))))

    step, chains, links = max(direct), 0, 0
    level = direct[step]
    for start in starts:
        xy, end = level.xy[start][level.mask[start]], start + step
        while end < len(level.mask) and level.mask[end].any():
            following = level.xy[end][level.mask[end]]
            one, two = table(xy[:, 2:]), table(following[:, :2])
            common = list(one.keys() & two.keys())
            if len(common) < min_links:
                break
            first, second = [one[key] for key in common], [two[key] for key in common]
            xy, end, links = np.concatenate([xy[first, :2], following[second, 2:]], 1), end + step, links + 1
        chains += end > start + step
    return chains, links


def propagation(video, config) -> None:
    """Print how long the propagation of an hour takes by both rules."""
    labels = label.label_in_memory(video, config)
    seconds = labels.times_s[1] - labels.times_s[0]
    num = round(3600 / seconds)
    window = min(num, label.WINDOW + propagate.MAX_STEP)
    base = an_hour(labels.direct, window)
    share = num / label.WINDOW
    propagate.propagate(base, labels.min_matches, config.link_radius_px)  # compiles
    wall, cpu_s = time.perf_counter(), time.process_time()
    levels = propagate.propagate(base, labels.min_matches, config.link_radius_px)
    wall, cpu_s = time.perf_counter() - wall, time.process_time() - cpu_s
    other, other_cpu_s = time.perf_counter(), time.process_time()
    chains, links = released_chain(base, labels.size[0], labels.min_matches // 2, range(label.WINDOW))
    other, other_cpu_s = time.perf_counter() - other, time.process_time() - other_cpu_s
    pairs = sum(int((level.counts[: label.WINDOW] > 0).sum()) for level in levels)
    table = [
        ("an hour of video", "seconds", "CPU seconds", "pairs kept"),
        ("rounds of doubling, 1 px", f"{share * wall:.1f}", f"{share * cpu_s:.1f}", f"{share * pairs:.0f}"),
        ("released dictionary, chains", f"{share * other:.1f}", f"{share * other_cpu_s:.1f}", f"{share * chains:.0f}"),
    ]
    print(format_table(table))
    print(
        f"measured on {label.WINDOW} of {num} start frames, {int(np.median(base[min(base)].counts))} labels a pair; "
        f"{links} links of the released rule; the ratio of CPU seconds is {cpu_s / max(other_cpu_s, 1e-9):.2f}"
    )


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
        propagation(video, config)
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
