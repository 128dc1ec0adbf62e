"""Many videos: one after another, in worker processes, on a Ray cluster, or a share of them per task of an array job.

A video is the unit. Its result depends on the video and the configuration alone, appears whole or not at all, and is
not made twice, so any number of workers on any number of machines may be started, killed and started again on one
folder. A worker that dies takes its video with it and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2

from data_prep.intake import read_list
from data_prep.label import Progress, label_video
from gim_jax.api import enable_compilation_cache
from gim_jax.cli import one_line

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Insufficient memory", "can't start new thread")  # of XLA, OpenCV, Python
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


def label_here(job: Job, config, out: Path, progress: Progress | None = None) -> dict | str:
    """Label one video in this process: its manifest row, or one line about what is wrong with this video alone."""
    if job.licence is not None:
        config = config.copy_and_resolve_references()
        config.licence = job.licence
    try:
        return label_video(job.video, config, out, progress)
    except (ValueError, OSError) as error:
        line = one_line(error)
        return line if line.startswith(job.video) else f"{job.video}: {line}"
    except (MemoryError, RuntimeError, cv2.error) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        return f"{job.video}: not enough memory {' '.join(str(error).split())[:200]}"


def label_in_workers(jobs: Sequence[Job], config, out: Path, num_workers: int) -> Iterator[tuple[Job, dict | str]]:
    """Label videos in processes of their own, `num_workers` at a time; yields each as `label_here` does.

    An interrupt, and closing the generator, ends the workers.
    """
    config = config.copy_and_resolve_references()
    config.workers = config.workers or max((os.cpu_count() or 1) // num_workers, 1)
    stopped = threading.Event()

    def one(job: Job) -> dict | str:
        for _ in range(ATTEMPTS):
            result = _in_process(job, config, out, stopped)
            if stopped.is_set() or not isinstance(result, ChildProcessError):
                break
        return str(result) if isinstance(result, ChildProcessError) else result

    with ThreadPoolExecutor(num_workers) as pool:
        try:
            yield from zip(jobs, pool.map(one, jobs))
        except BaseException:
            stopped.set()
            raise


def _in_process(job: Job, config, out: Path, stopped: threading.Event) -> dict | str | ChildProcessError:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which do not survive a fork
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, job, config, out), daemon=True)
    process.start()
    sender.close()
    while not receiver.poll(0.2):
        if stopped.is_set():
            process.terminate()
    try:
        result: dict | str | None = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if result is not None:
        return result
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return ChildProcessError(f"{job.video}: its worker {how}")


def _work(sender, job: Job, config, out: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    enable_compilation_cache()
    sender.send(label_here(job, config, out))
    sender.close()


def label_on_ray(jobs: Sequence[Job], config, out: Path, address: str = "") -> Iterator[tuple[Job, dict | str]]:
    """Label videos on a Ray cluster (extra `ray`), in the order in which they are done; yields as `label_here` does.

    A video is a task of `config.workers` cores (1 where that is 0), and of a GPU where networks label and the cluster
    has some. Ray starts the task of a worker that died again, elsewhere. Videos and `out` have to be on storage that
    all machines share.

    Args:
      address: of a cluster; "": that of RAY_ADDRESS or of this machine, or else a new one on this machine alone.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(ATTEMPTS - 1))  # of a cluster that is started here; else for ever
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("--ray: Ray is not installed, pip install 'gim-jax[ray]'") from error
    config = config.copy_and_resolve_references()
    config.workers = config.workers or 1
    try:
        ray.init(address or None, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ValueError(f"--ray: {address or 'a new cluster'}: {' '.join(str(error).split())[:300]}") from error
    try:
        needs = {"num_cpus": config.workers}
        if config.networks and ray.cluster_resources().get("GPU"):
            needs["num_gpus"] = 1
        task = ray.remote(max_retries=ATTEMPTS, **needs)(_on_ray)
        waiting = {task.remote(Job(str(Path(j.video).resolve()), j.licence), config, out.resolve()): j for j in jobs}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                yield job, ray.get(done)
            except ray.exceptions.RayError as error:
                yield job, f"{job.video}: its worker failed: {' '.join(str(error).split())[:300]}"
    finally:
        ray.shutdown()


def _on_ray(job: Job, config, out: Path) -> dict | str:
    enable_compilation_cache()
    return label_here(job, config, out)
