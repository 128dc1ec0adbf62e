"""`gim-jax records`: verify, show or count training records."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from gim_jax.data import records

ACTIONS = ("verify", "show", "stats")


def add_arguments(parser) -> None:
    parser.add_argument("action", choices=ACTIONS, help="verify: check everything; show: print records; stats: count")
    parser.add_argument("path", help="a *.tfrecord file, a labelling folder or a packed folder")
    parser.add_argument("--split", default="train", help="split of a packed folder (default: train)")
    parser.add_argument("--limit", type=int, default=10, help="show: records to print (default: 10)")


def run(args) -> int:
    return {"verify": _verify, "show": _show, "stats": _stats}[args.action](args)


def _verify(args) -> int:
    num_intact, problems = records.verify(args.path)
    for line in problems:
        print(line, file=sys.stderr)
    print(f"{args.path}: {num_intact} intact records, {len(problems)} problems")
    return 1 if problems else 0


def _decoded(args):
    """Yield the records that can be read; name the others on stderr."""
    for path in records.dataset_paths(args.path, args.split):
        skipped: list[str] = []
        for index, payload in enumerate(records.read_tfrecord(path, "skip", skipped)):
            try:
                yield records.decode(payload)
            except ValueError as error:
                print(f"{path}: record {index}: {error}", file=sys.stderr)
        for line in skipped:
            print(line, file=sys.stderr)


def _show(args) -> int:
    for index, record in enumerate(_decoded(args)):
        if index == args.limit:
            break
        print(
            f"{record.pair_id} {record.video!r} frames {record.frame0}-{record.frame1} "
            f"({record.time0_s:.2f}-{record.time1_s:.2f} s), {record.size0[0]}x{record.size0[1]}, "
            f"{len(record.correspondences)} matches, hops {_range(record.hops)}, "
            f"{'+'.join(record.teachers)}, {record.licence}"
        )
    return 0


def _range(values: np.ndarray) -> str:
    return f"{values.min()}-{values.max()}" if len(values) else "none"


def _stats(args) -> int:
    num_matches, num_bytes = [], 0
    intervals: Counter[int] = Counter()
    videos: Counter[str] = Counter()
    hops: Counter[int] = Counter()
    for record in _decoded(args):
        num_matches.append(len(record.correspondences))
        num_bytes += len(record.image0) + len(record.image1)
        intervals[record.interval] += 1
        videos[record.video] += 1
        hops.update(record.hops.tolist())
    if not num_matches:
        raise ValueError(f"{args.path}: found no intact record, expected at least 1")
    total = sum(num_matches)
    print(f"pairs       {len(num_matches)} of {len(videos)} videos, {num_bytes / 1e6:.1f} MB of JPEG")
    print(f"matches     {total}, per pair median {int(np.median(num_matches))}, {_range(np.array(num_matches))}")
    print("interval    " + ", ".join(f"{k} frames: {n}" for k, n in sorted(intervals.items())))
    print("hops        " + ", ".join(f"{k}: {100 * n / max(total, 1):.1f} %" for k, n in sorted(hops.items())))
    for video, count in videos.most_common(20):
        print(f"  {count:6d}  {video!r}")
    return 0
