"""`gim-jax eval`: evaluate a matcher on a benchmark, aggregate released results, compare results."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gim_jax.cli.match import check_writable, parse_settings, size_settings
from gim_jax.cli.models import format_table
from gim_jax.cli.progress import Progress
from gim_jax.config import load_config
from gim_jax.data.tfrecord import write_atomic
from gim_jax.eval import document, zeb
from gim_jax.eval.benchmarks import PRESETS, Plan, pairs_plan, preset_plan, zeb_plan
from gim_jax.eval.benchmarks import evaluate as run_plan
from gim_jax.eval.compare import one_benchmark, rank_among_published
from gim_jax.robust import HOMOGRAPHY_METHODS, POSE_METHODS

BENCHMARKS = ("pairs", "zeb", *PRESETS)
OWN_OPTIONS = {"pairs": ("pairs", "long_side"), "zeb": ("sets", "overlap", "fraction", "released")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "compare", nargs="*", metavar="compare A.json B.json ...", help="print results beside the published ones"
    )
    parser.add_argument("--config", metavar="FILE", help="what to evaluate, e.g. configs/eval.py:zeb,gim_dkm")
    parser.add_argument("--benchmark", default="pairs", help=", ".join(BENCHMARKS) + " (default: %(default)s)")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="FILE", help="pairs: files of pairs, a set each")
    parser.add_argument("--data", metavar="DIR", help="folder of the benchmark's data")
    parser.add_argument("--model", default="rootsift", help="a name of `gim-jax models` (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="the model's .safetensors file")
    parser.add_argument("--long-side", type=int, metavar="PX", help="pairs: resize images, instead of the preset")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the model, such as gp_solve=released; may be repeated",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per pass through a network")
    parser.add_argument("--threshold", type=float, metavar="PX", help="of the estimator (default: the protocol's)")
    parser.add_argument("--method", default="ransac", help="ransac (published), magsac or poselib")
    parser.add_argument("--protocol", help="dkm, loftr or superglue: the preset (default: that of the model's family)")
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help="zeb: some sets, e.g. KIT NIG")
    parser.add_argument("--overlap", nargs=2, type=float, metavar=("LOW", "HIGH"), help="zeb: pairs in (LOW, HIGH]")
    parser.add_argument("--fraction", type=float, default=1.0, help="zeb: this share of the pairs, chosen by hash")
    parser.add_argument("--released", action="store_true", help="zeb: map points as the released code, without padding")
    parser.add_argument("--out", metavar="DIR", help="keep predictions and go on from them; the results' folder")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that estimate poses (default: one a core)")
    parser.add_argument("--devices", type=int, metavar="N", help="devices that match (default: every accelerator)")
    parser.add_argument("--task_index", type=int, default=0, help="of the tasks that share --out")
    parser.add_argument("--task_count", type=int, default=1)
    parser.add_argument("--distributed", action="store_true", help="one task per host of jax.distributed")
    parser.add_argument("--from-results", metavar="DIR", help="zeb: aggregate released per-pair result files")
    parser.add_argument("--json", metavar="FILE", help="write every setting, version, figure and pair")
    parser.add_argument("--png", metavar="FILE", help="draw the table with intervals")
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print tables. Exit code 1 where pairs were lost or the benchmark is not whole."""
    for path in (args.json, args.png):
        check_writable(path)
    if args.config:
        from_config(args)
    elif args.overrides:
        raise ValueError(f"unknown arguments: {' '.join(args.overrides)}")
    if args.compare:
        return compare(args)
    if args.from_results:
        return from_results(args)
    plan = make_plan(args)
    if args.model != "rootsift":
        from gim_jax import api

        api.enable_compilation_cache()
    if args.out:
        return evaluate(args, plan, Path(args.out))
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(args, plan, Path(folder))


def option_defaults() -> dict[str, Any]:
    """Return the value of every option that is not given."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args([]))


def check_options(args: argparse.Namespace) -> None:
    """Refuse an option of another benchmark, which would be left out of account."""
    defaults = option_defaults()
    for benchmark, names in OWN_OPTIONS.items():
        for name in names if benchmark != args.benchmark else ():
            if (getattr(args, name) or None) != (defaults[name] or None):
                raise ValueError(f"--{name.replace('_', '-')}: is of {benchmark}, found --benchmark={args.benchmark}")


def from_config(args: argparse.Namespace) -> None:
    """Take what is evaluated from a configuration file; an option that says it as well is refused."""
    defaults = option_defaults()
    for name, value in load_config(args.config, args.overrides).items():
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"--{name.replace('_', '-')}: given beside --config, expected --config.{name}=...")
        setattr(args, name, value)


def make_plan(args: argparse.Namespace) -> Plan:
    """Read the benchmark's data and say how it is matched and measured; all faults are found here."""
    if args.benchmark not in BENCHMARKS:
        raise ValueError(f"--benchmark: {args.benchmark} is unknown; known: {', '.join(BENCHMARKS)}")
    check_options(args)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: found {args.batch_size}, expected at least 1")
    if args.threshold is not None and not args.threshold > 0:
        raise ValueError(f"--threshold: found {args.threshold:g}, expected more than 0")
    if not 0 <= args.task_index < args.task_count:
        raise ValueError(
            f"--task_index: found {args.task_index} of {args.task_count}, expected 0 to the count less one"
        )
    if args.benchmark == "pairs":
        if not args.pairs:
            raise ValueError("--pairs: found no file, expected at least one")
        plan = pairs_plan(args.pairs, size_settings(args.model, args.long_side))
    elif not args.data:
        raise ValueError(f"--data: found none, expected the folder of {args.benchmark}")
    elif args.benchmark in PRESETS:
        plan = preset_plan(args.benchmark, args.data, args.model, args.protocol)
    else:
        mapping = "released" if args.released else "corrected"
        plan = zeb_plan(args.data, args.model, args.sets, args.overlap, args.fraction, mapping)
    methods = HOMOGRAPHY_METHODS if plan.protocols[0].kind == "homography" else POSE_METHODS
    if args.method not in methods:
        raise ValueError(f"--method: found {args.method!r}, expected one of {', '.join(methods)}")
    changes = {"method": args.method} | ({"threshold_px": args.threshold} if args.threshold else {})
    matcher = {**plan.matcher, **parse_settings(list(args.set))}
    return replace(plan, matcher=matcher, protocols=[replace(protocol, **changes) for protocol in plan.protocols])


def evaluate(args: argparse.Namespace, plan: Plan, out: Path) -> int:
    """Run a plan, or a task's share of it, in a folder; write and print its results."""
    task = (args.task_index, args.task_count)
    if args.distributed:
        import jax

        jax.distributed.initialize()
        task = (jax.process_index(), jax.process_count())
    with Progress(f"{args.model} on {plan.benchmark}", unit="pairs") as progress:
        content, done = run_plan(
            plan,
            args.model,
            args.weights or None,
            folder=out,
            batch_size=args.batch_size,
            num_devices=args.devices,
            num_workers=args.workers,
            task=task,
            progress=progress,
        )
    if content is None:
        print(f"task {task[0]} of {task[1]} is done; {done.num_there} of {done.num_chunks} parts are there")
        print("the task that ends last, or one started again, writes the results")
        return 0
    for index, reason in done.reasons.items():
        pair = plan.pairs[index]
        print(f"gim-jax eval: {pair.set}: lost {pair.name0} {pair.name1}: {reason}", file=sys.stderr)
    results = content["results"]
    if plan.benchmark == "zeb":
        for result in results:
            result["mean_rank"] = rank_among_published(result)
        version = plan.protocols[0].mapping
        files = zeb.write_released(out, results[0], args.model, version) if args.out else []
        print(f"{len(files)} files of results in {out}" if files else "", end="\n" if files else "")
    for path in filter(None, (args.json, args.out and out / "results.json")):
        document.save(path, content)
    return print_results(plan.benchmark, results, args.png)


def compare(args: argparse.Namespace) -> int:
    """Print results of JSON files beside the published ones. Exit code 1 where pairs are lost or missing."""
    word, *files = args.compare
    if word != "compare" or not files:
        raise ValueError(f"arguments: found {' '.join(args.compare)!r}, expected `compare` and JSON files")
    return print_results(*one_benchmark([document.load(file) for file in files]), args.png)


def from_results(args: argparse.Namespace) -> int:
    """Aggregate the released result files of a folder. Exit code 1 where pairs are missing."""
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
    more = (compare.residual_rows, compare.threshold_means, compare.baseline_rows)
    tables += [rows(results) for rows in more] if zeb else []
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
