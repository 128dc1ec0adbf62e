"""Many videos: one after another, in worker processes, or a share of them per task of an array job.

A video is the unit. Its result depends on the video and the configuration alone, appears whole or not at all, and is
not made twice, so any number of workers on any number of machines may be started, killed and started again on one
folder. A worker that dies takes its video with it and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.intake import read_list
from data_prep.label import Progress, label_video
from gim_jax.api import enable_compilation_cache

ATTEMPTS = 2  # of a video whose worker was killed: once more, as it may have been for something else


@dataclass(frozen=True)
class Job:
    """A video, and its licence where a list says so."""

    video: str
    licence: str | None = None


def jobs_of(videos: Sequence[str]) -> list[Job]:
    """The videos of a command line: files, and CSVs as `gim-jax videos` writes them."""
    jobs = []
    for video in videos:
        if not video.lower().endswith(".csv"):
            jobs.append(Job(video))
            continue
        for row in read_list(video):
            jobs.append(Job(str(Path(video).parent / row["video"]), row["licence"]))
    return jobs


def share(jobs: Sequence[Job], task_index: int, task_count: int) -> list[Job]:
    """The jobs of one task of an array job; ValueError for a task that does not exist."""
    if not 0 <= task_index < task_count:
        raise ValueError(
            f"--task-index: found {task_index}, expected 0 to {task_count - 1} (--task-count is {task_count})"
        )
    return list(jobs[task_index::task_count])


def label_here(job: Job, config, out: Path, progress: Progress | None = None) -> dict:
    """Label one video in this process. Raises ValueError or OSError about this video alone."""
    if job.licence is not None:
        config = config.copy_and_resolve_references()
        config.licence = job.licence
    try:
        return label_video(job.video, config, out, progress)
    except MemoryError as error:
        raise ValueError(f"{job.video}: not enough memory {error}") from error


def label_in_workers(
    jobs: Sequence[Job], config, out: Path, num_workers: int
) -> Iterator[tuple[Job, dict | ValueError]]:
    """Label videos in processes of their own, `num_workers` at a time; yields each with its row or what went wrong."""
    config = config.copy_and_resolve_references()
    config.workers = config.workers or max((os.cpu_count() or 1) // num_workers, 1)

    def one(job: Job) -> dict | ValueError:
        for _ in range(ATTEMPTS):
            result = _in_process(job, config, out)
            if not isinstance(result, ChildProcessError):
                return result
        return ValueError(str(result))

    with ThreadPoolExecutor(num_workers) as pool:
        yield from zip(jobs, pool.map(one, jobs))


def _in_process(job: Job, config, out: Path) -> dict | ValueError | ChildProcessError:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which do not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, job, config, out), daemon=True)
    process.start()
    sender.close()
    try:
        result: dict | str | None = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if result is not None:
        return result if isinstance(result, dict) else ValueError(result)
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return ChildProcessError(f"{job.video}: its worker {how}")


def _work(sender, job: Job, config, out: Path) -> None:
    enable_compilation_cache()
    try:
        result: dict | str = label_here(job, config, out)
    except (ValueError, OSError) as error:
        result = str(error)
    sender.send(result)
    sender.close()
