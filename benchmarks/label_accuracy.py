"""Accuracy, number and reach of labels on rendered towns, by interval: the paper's link rule against the released one.

Both rules run on the same fitted matches. The released code links points of the middle frame that round to the same
pixel; the paper links those less than one pixel apart. Nobody else reports how many labels are right, because nobody
else labels a world with ground truth.

    python benchmarks/label_accuracy.py [--seeds 1 2] [--seconds 14] [--json FILE]
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from data_prep import label, propagate
from data_prep.accuracy import label_accuracy
from data_prep.truth import Truth
from data_prep.world import WorldConfig, render
from gim_jax.cli.models import format_table
from gim_jax.config import load_config


def counts(levels: list[propagate.Level]) -> dict[int, tuple[int, int]]:
    """By step: (pairs kept, correspondences)."""
    return {level.step: (int((level.counts > 0).sum()), int(level.counts.sum())) for level in levels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=14.0)
    parser.add_argument("--cuts", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    config = load_config("configs/label.py")
    results = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            out = render(Path(folder) / "town", WorldConfig(seed=seed, seconds=args.seconds, num_cuts=args.cuts))
            truth = Truth.load(out)
            labels = label.label_in_memory(out / "video.mp4", config)
            unfitted = propagate.propagate(labels.direct, labels.min_matches, config.link_radius_px)
            levels = {
                "direct": list(labels.direct.values()),
                "paper rule": unfitted,
                "paper rule, fitted again": labels.levels,
            }
            rows = label_accuracy(labels, truth, levels)
        across = sum(
            truth.shot[labels.frames[start]] != truth.shot[labels.frames[start + level.step]]
            for level in labels.levels
            for start in np.flatnonzero(level.counts)
        )
        released = counts(propagate.propagate(labels.direct, labels.min_matches, config.link_radius_px, "released"))
        paper = counts(unfitted)
        results.append({"seed": seed, "rows": rows, "across_cuts": int(across), "paper": paper, "released": released})
        print(
            f"town {seed}: {len(labels.frames)} sampled frames, more than {labels.min_matches} correspondences a pair"
        )
        table = [("labels", "frames apart", "pairs", "correspondences", "judged", "1 px", "2 px", "3 px")]
        for row in rows:
            shares = ("" if share is None else f"{100 * share:.1f} %" for share in row["within"])
            table.append(
                tuple(str(row[k]) for k in ("labels", "frames_apart", "pairs", "correspondences", "judged"))
                + (*shares,)
            )
        print(format_table(table))
        table = [("frames apart", "pairs paper", "pairs released", "links paper", "links released", "ratio")]
        for step in sorted(set(paper) | set(released)):
            (p, n), (q, m) = paper.get(step, (0, 0)), released.get(step, (0, 0))
            apart = step * config.every_frames
            table.append((str(apart), str(p), str(q), str(n), str(m), f"{n / m:.3f}" if m else "inf"))
        print(format_table(table))
        print(f"pairs kept across a cut: {across}\n")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
