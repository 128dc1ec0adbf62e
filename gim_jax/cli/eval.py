"""`gim-jax eval`: evaluate a matcher on a benchmark, aggregate released results, compare results."""

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
    parser.add_argument(
        "compare", nargs="*", metavar="compare A.json B.json ...", help="print results beside the published ones"
    )
    parser.add_argument("--benchmark", default="pairs", help="pairs: relative pose on text files of pairs")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="FILE", help="pairs files, one table row each")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument("--long-side", type=int, metavar="PX", help="resize images, instead of the model's preset")
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per pass through a network")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="PX", help="RANSAC threshold, stored pixels")
    parser.add_argument("--method", default="ransac", help="ransac (published) or magsac")
    parser.add_argument("--from-results", metavar="DIR", help="zeb: aggregate released per-pair result files")
    parser.add_argument("--json", metavar="FILE", help="write every setting, version, figure and pair")
    parser.add_argument("--png", metavar="FILE", help="draw the table with intervals")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table. Exit code 1 where pairs were lost."""
    for path in (args.json, args.png):
        check_writable(path)
    if args.compare:
        return compare(args)
    if args.from_results:
        return from_results(args)
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


def compare(args: argparse.Namespace) -> int:
    """Print results of JSON files beside the published ones. Exit code 1 where pairs are lost or missing."""
    from gim_jax.eval.compare import one_benchmark
    from gim_jax.eval.document import load

    word, *files = args.compare
    if word != "compare" or not files:
        raise ValueError(f"arguments: found {' '.join(args.compare)!r}, expected `compare` and JSON files")
    return print_results(*one_benchmark([load(file) for file in files]), args.png)


def from_results(args: argparse.Namespace) -> int:
    """Aggregate the released result files of a folder. Exit code 1 where pairs are missing."""
    from gim_jax.eval import document
    from gim_jax.eval.compare import rank_among_published

    if args.benchmark not in ("zeb", "pairs"):
        raise ValueError(f"--from-results: found --benchmark={args.benchmark}, expected zeb")
    content, skipped = document.from_released(args.from_results)
    for result in content["results"]:
        result["mean_rank"] = rank_among_published(result)
    for reason in skipped:
        print(f"gim-jax eval: left out {reason}", file=sys.stderr)
    if args.json:
        document.save(args.json, content)
    return print_results("zeb", content["results"], args.png)


def print_results(benchmark: str, results: list[dict], png: str | None) -> int:
    """Print the tables of results, draw them where asked for. Exit code 1 where a result is not whole."""
    from gim_jax.eval import compare

    zeb = benchmark == "zeb"
    tables = [compare.table_one(results) if zeb else compare.threshold_rows(benchmark, results)]
    tables += [compare.residual_rows(results), compare.threshold_means(results)] if zeb else []
    tables += [compare.overlap_rows(results), compare.interval_rows(results), compare.difference_rows(results)]
    print("\n\n".join(format_table(rows) for rows in tables if len(rows) > 1))
    if png:
        picture = compare.draw(benchmark, results)
        write_atomic(png, lambda file: file.write(picture))
    notes = [f"{result['method']}: {note}" for result in results for note in result["notes"]]
    print("\n".join(["", *notes]) if notes else "", end="\n" if notes else "")
    whole = all(result["mean"]["complete"] for result in results)
    if not whole:
        print("* not the mean of the whole benchmark: pairs or sets are missing or lost, see above")
    return 0 if whole else 1


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
