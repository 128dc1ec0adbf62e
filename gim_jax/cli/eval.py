"""`gim-jax eval`: evaluate a matcher on a benchmark."""

from __future__ import annotations

import argparse
import json
import sys

from gim_jax.cli.match import check_writable
from gim_jax.cli.models import format_table
from gim_jax.cli.progress import Progress
from gim_jax.data.tfrecord import write_atomic

BENCHMARKS = ("pairs",)
PLANNED = ("zeb", "megadepth1500", "scannet1500", "hpatches")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--benchmark", default="pairs", help="pairs: relative pose on text files of pairs")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="FILE", help="pairs files, one table row each")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument("--long-side", type=int, metavar="PX", help="resize images, instead of the model's preset")
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per pass through a network")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="PX", help="RANSAC threshold, stored pixels")
    parser.add_argument("--method", default="ransac", help="ransac (published) or magsac")
    parser.add_argument("--json", metavar="FILE", help="write every setting, version, figure and pair")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table. Exit code 1 where pairs were lost."""
    from gim_jax import api
    from gim_jax.eval.pairs import evaluate_pairs, read_pairs

    if args.benchmark not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        state = "is not implemented yet" if args.benchmark in PLANNED else "is unknown"
        raise ValueError(f"--benchmark: {args.benchmark} {state}; known: {known}")
    if not args.pairs:
        raise ValueError("--pairs: found no file, expected at least one")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: found {args.batch_size}, expected at least 1")
    check_writable(args.json)
    for file in args.pairs:  # all faults before any work
        read_pairs(file)
    settings = {"long_side": args.long_side} if args.long_side else {}
    if args.model != "rootsift":
        api.enable_compilation_cache()
        settings |= {"exact": None} if args.long_side else {}
    matcher = api.load_matcher(args.model, args.weights, batch_size=args.batch_size, **settings)
    results = []
    for file in args.pairs:
        with Progress(f"{args.model} on {file}", unit="pairs") as progress:
            results.append(
                evaluate_pairs(file, matcher, threshold_px=args.threshold, method=args.method, progress=progress)
            )
        for row in results[-1]["rows"]:
            if "lost" in row:
                print(f"gim-jax eval: {file}: lost {row['name0']} {row['name1']}: {row['lost']}", file=sys.stderr)
        if args.json:  # after each set, so that a long run that is interrupted keeps what it has
            text = json.dumps(results, indent=1, allow_nan=False).encode()
            write_atomic(args.json, lambda file, text=text: file.write(text))
    print(table(results))
    lost = sum(result["num_lost"] for result in results)
    if lost:
        print(f"{lost} pairs were lost and count as failures in the AUC", file=sys.stderr)
    return 1 if lost else 0


def table(results: list[dict]) -> str:
    """Format results: one row per set, and their plain mean where there are several."""
    thresholds = list(results[0]["auc"])
    rows = [("set", "pairs", *(f"AUC@{t}" for t in thresholds), "matches", "precision", "no pose", "lost", "s/pair")]
    for result in results:
        rows.append(
            (
                result["set"],
                str(result["num_pairs"]),
                *(f"{100 * result['auc'][t]:.2f}" for t in thresholds),
                f"{result['mean_matches']:.0f}",
                f"{100 * result['precision']:.1f}",
                str(result["num_failures"]),
                str(result["num_lost"]),
                f"{result['seconds']['total'] / result['num_pairs']:.2f}",
            )
        )
    if len(results) > 1:
        mean = lambda figure: sum(map(figure, results)) / len(results)  # noqa: E731
        rows.append(
            (
                "mean of sets",
                str(sum(r["num_pairs"] for r in results)),
                *(f"{100 * mean(lambda r, t=t: r['auc'][t]):.2f}" for t in thresholds),
                f"{mean(lambda r: r['mean_matches']):.0f}",
                f"{100 * mean(lambda r: r['precision']):.1f}",
                str(sum(r["num_failures"] for r in results)),
                str(sum(r["num_lost"] for r in results)),
                "",
            )
        )
    return format_table(rows)
