"""`gim-jax label`: videos to labelled pairs, one output file per video."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gim_jax.cli.progress import Progress
from gim_jax.config import load_config
from gim_jax.data.json_file import read_json, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="video files, or videos.csv of `gim-jax videos`")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the per-video results")
    parser.add_argument("--config", default="configs/label.py", help="labelling configuration, configs/label.py[:dkm]")
    parser.add_argument("--processes", type=int, default=1, help="videos labelled at once on this machine (default: 1)")
    parser.add_argument(
        "--task-index", "--task_index", type=int, default=0, help="of an array job: which share of the videos, from 0"
    )
    parser.add_argument(
        "--task-count", "--task_count", type=int, default=1, help="of an array job: number of shares (default: 1)"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="label on a Ray cluster; without an address on a local one",
    )
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Label every video; one that fails is named and the others go on. Exit code 1 where any failed."""
    config = load_config(args.config, args.overrides)
    if args.processes < 1:
        raise ValueError(f"--processes: found {args.processes}, expected 1 or more")
    if args.ray is not None and args.processes > 1:
        raise ValueError("--processes, --ray: found both, expected one of them")
    _, failed = label_all(
        args.videos, config, Path(args.out), args.processes, args.task_index, args.task_count, args.ray
    )
    return 1 if failed else 0


def label_all(
    videos: Sequence[str],
    config,
    out: Path,
    processes: int = 1,
    task_index: int = 0,
    task_count: int = 1,
    ray: str | None = None,
) -> tuple[list[dict], list[str]]:
    """Label videos. Returns the manifest rows and the lines about those that failed."""
    from data_prep import fleet
    from data_prep.matchers import check_labellers
    from gim_jax import api

    check_labellers(config)
    api.enable_compilation_cache()
    jobs = fleet.share(fleet.jobs_of([str(video) for video in videos]), task_index, task_count)
    out.mkdir(parents=True, exist_ok=True)
    part = f"-{task_index:05d}-of-{task_count:05d}" if task_count > 1 else ""
    failures = out / f"failed{part}.json"  # one line per video of this task that could not be labelled
    failures.unlink(missing_ok=True)
    rows: list[dict] = []
    failed: list[str] = []
    done: list[str] = []
    if ray is not None:
        results = fleet.label_on_ray(jobs, config, out, ray)
    elif processes > 1:
        results = fleet.label_in_workers(jobs, config, out, processes)
    else:
        results = _here(jobs, config, out)
    for job, result in results:
        if isinstance(result, dict):
            rows.append(result)
            done += [job.video, str(Path(job.video).resolve())]
            print(f"  {printable(Path(job.video).name)}: {describe(result)}", flush=True)
            continue
        failed.append(printable(result))
        print(f"gim-jax label: {failed[-1]}", file=sys.stderr)
    if failed:
        write_json(failures, failed)
    _forget_failures(out, done)
    print(f"labelled {len(rows)} of {len(jobs)} videos, {sum(row['pairs'] for row in rows)} pairs, in {out}")
    return rows, failed


def _forget_failures(out: Path, done: list[str]) -> None:
    """Take videos that are labelled now off the lists that runs of other shares left."""
    named = tuple(f"{printable(video)}: " for video in done)
    for path in out.glob("failed*.json"):
        lines = read_json(path) or []
        left = [line for line in lines if not line.startswith(named)]
        if not left:
            path.unlink(missing_ok=True)
        elif left != lines:
            write_json(path, left)


def _here(jobs, config, out: Path):
    """Label videos one after the other in this process, with a line of progress."""
    from data_prep.fleet import label_here

    for job in jobs:
        with Progress(f"label {printable(Path(job.video).name)}", unit="frames") as progress:
            result = label_here(job, config, out, progress)
        yield job, result


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
