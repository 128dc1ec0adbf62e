"""Direct labels of a whole video: decode, match neighbouring frames with every labeller, fit.

Sampled frames go through in blocks. The main thread decodes a block while threads prepare frames, match on the CPU
and fit, and one thread feeds the devices, so that neither waits for the other. Batches never cross a block: one that
was kept on disk before an interruption equals the one that would be computed again.
"""

from __future__ import annotations

import collections
import itertools
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from threadpoolctl import threadpool_limits

from data_prep import appearance
from data_prep.fitting import PairLabels, confirm, pixel_scale
from data_prep.matchers import Found
from data_prep.video import Frame
from gim_jax import image
from gim_jax.data.tfrecord import write_atomic

BLOCK = 16  # sampled frames; at least the largest base step


@dataclass
class DirectLabels:
    """Sampled frames of a video and the direct labels between them.

    Attributes:
      size: (width, height) of the frames.
      frames, times_s: [S] number and presentation time of each sampled frame.
      jpegs: [S] (offset, length) in the spool file.
      rows: by step, the labels of the pairs (s, s + step), s = 0, 1, ...
      seconds: by stage; of threads their CPU time, of the devices and the decoder the time passed.
    """

    size: tuple[int, int] = (0, 0)
    frames: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    jpegs: list[tuple[int, int]] = field(default_factory=list)
    rows: dict[int, list[PairLabels]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class _Block:
    """Up to `BLOCK` sampled frames, the pairs that end in them, and the jobs about both."""

    def __init__(self, first: int, frames: list[Frame], run: _Runner, config, mask, store, previous: _Block | None):
        self.first, self.frames, self.run, self.previous = first, frames, run, previous
        self.pairs = [
            (step, n - step, n) for step in config.base_steps for n in range(max(first, step), first + len(frames))
        ]
        self.path = None if store is None else store / f"{first // BLOCK:05d}.npz"
        self.known = None if self.path is None else read_block(self.path, len(self.pairs))
        self.jpegs = [run.thread("jpeg", image.encode_jpeg, f.rgb, config.jpeg_quality) for f in frames]
        self.size = image.size_of(frames[0].rgb)
        scale = pixel_scale(self.size, config)
        self.grays = [run.thread("gray", appearance.reduced_gray, f.rgb, scale) for f in frames]
        self.masks = [run.thread("mask", mask, f) for f in frames] if mask else None
        self._features: dict[str, Callable[[int], Any]] = {}
        self._found: list[list[Callable[[], Found]]] = []
        self._fits: list[Future] = []

    def features(self, labeller) -> Callable[[int], Any]:
        """A function from the number of a sampled frame to its features, which waits for them; computed once."""
        if labeller.name not in self._features:
            stage = f"{labeller.name}: features"
            prepared = [self.run.thread(stage, labeller.prepare, f.rgb) for f in self.frames]
            if labeller.on_device:
                job = self.run.device(stage, lambda: labeller.features([p.result() for p in prepared]))
                self._features[labeller.name] = lambda n: job.result()[n - self.first]
            else:
                self._features[labeller.name] = lambda n: prepared[n - self.first].result()
        return self._features[labeller.name]

    def of(self, n: int) -> _Block:
        """The block of a sampled frame of this block or of the one before."""
        if n >= self.first:
            return self
        assert self.previous is not None
        return self.previous

    def scene(self, n: int) -> int:
        return self.of(n).frames[n - self.of(n).first].scene

    def mask(self, n: int) -> np.ndarray | None:
        masks = self.of(n).masks
        return None if masks is None else masks[n - self.of(n).first].result()

    def gray(self, n: int) -> np.ndarray:
        return self.of(n).grays[n - self.of(n).first].result()

    def match(self, labellers: Sequence) -> None:
        """Start to match the pairs of one scene, unless the labels are known."""
        if self.known is not None:
            return
        pairs = [(n0, n1) for _, n0, n1 in self.pairs if self.scene(n0) == self.scene(n1)]
        for labeller in labellers:
            stage, of = f"{labeller.name}: match", {n: self.of(n).features(labeller) for pair in pairs for n in pair}
            if labeller.on_device:
                job = self.run.device(
                    stage, lambda one=labeller, of=of: one.match([(of[a](a), of[b](b)) for a, b in pairs])
                )
                self._found.append([lambda k=k, job=job: job.result()[k] for k in range(len(pairs))])
            else:
                jobs = [
                    self.run.thread(stage, lambda a, b, one=labeller, of=of: one.match([(of[a](a), of[b](b))])[0], a, b)
                    for a, b in pairs
                ]
                self._found.append([job.result for job in jobs])

    def fit(self, labellers: Sequence, config) -> None:
        """Wait for the matches and start to fit them; the block before is not needed after that."""
        if self.known is None:
            self._start_fits(labellers, config)
        self.previous = None

    def _start_fits(self, labellers: Sequence, config) -> None:
        names, position = [one.name for one in labellers], 0
        for _, n0, n1 in self.pairs:
            if self.scene(n0) != self.scene(n1):
                self._fits.append(self.run.thread("fit", PairLabels.none, "a scene cut", len(names)))
                continue
            found = [answers[position]() for answers in self._found]
            masks, grays = (self.mask(n0), self.mask(n1)), (self.gray(n0), self.gray(n1))
            self._fits.append(self.run.thread("fit", confirm, names, found, masks, grays, self.size, config))
            position += 1
        self._found.clear()

    def rows(self) -> list[PairLabels]:
        """Wait for the labels of the pairs and keep them on disk."""
        if self.known is None:
            self.known = [job.result() for job in self._fits]
            if self.path is not None and self.known:
                write_block(self.path, self.known)
        return self.known


class _Runner:
    """Threads for the CPU, one for the devices, and how long each stage took."""

    def __init__(self, num_threads: int, seconds: dict[str, float]):
        self.threads, self.devices = ThreadPoolExecutor(num_threads), ThreadPoolExecutor(1)
        self.blas = threadpool_limits(1, user_api="blas")  # its threads and ours would wait for each other
        self.seconds, self._lock = seconds, threading.Lock()

    def thread(self, stage: str, function: Callable, *args) -> Future:
        return self.threads.submit(self._timed, stage, time.thread_time, function, *args)

    def device(self, stage: str, function: Callable, *args) -> Future:
        return self.devices.submit(self._timed, stage, time.perf_counter, function, *args)

    def _timed(self, stage: str, clock: Callable[[], float], function: Callable, *args):
        started = clock()
        try:
            return function(*args)
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + clock() - started

    def here(self, stage: str, function: Callable, *args):
        return self._timed(stage, time.perf_counter, function, *args)

    def close(self) -> None:
        for pool in (self.threads, self.devices):
            pool.shutdown(cancel_futures=True)
        self.blas.restore_original_limits()


def match_video(
    frames: Iterable[Frame],
    labellers: Sequence,
    config,
    spool: BinaryIO,
    store: Path | None = None,
    mask: Callable[[Frame], np.ndarray | None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> DirectLabels:
    """Label all pairs of sampled frames that are `config.base_steps` apart and of one scene.

    Args:
      frames: the sampled ones, all of one size.
      labellers: see `data_prep.matchers`.
      spool: takes the JPEGs of the frames.
      store: folder that keeps finished blocks; those found there are not computed again.
      mask: gives [h, w] bool of a frame, True where labels may lie, None for everywhere.
      progress: called with the number of frames done.
    """
    if max(config.base_steps) > BLOCK:
        raise ValueError(f"base_steps: found {max(config.base_steps)}, expected at most {BLOCK}")
    out = DirectLabels(rows={step: [] for step in config.base_steps})
    run = _Runner(config.workers or os.cpu_count() or 1, out.seconds)
    source = iter(frames)
    matching, fitting = collections.deque[_Block](), collections.deque[_Block]()
    previous = None
    try:
        for first in itertools.count(0, BLOCK):
            members = run.here("decode", lambda: list(itertools.islice(source, BLOCK)))
            if members:
                previous = _Block(first, members, run, config, mask, store, previous)
                previous.match(labellers)
                matching.append(previous)
            while len(matching) > bool(members):
                fitting.append(matching.popleft())
                fitting[-1].fit(labellers, config)
            while len(fitting) > bool(members):
                _collect(fitting.popleft(), out, spool)
                if progress:
                    progress(len(out.frames))
            if not members:
                break
    finally:
        run.close()
    return out


def _collect(block: _Block, out: DirectLabels, spool: BinaryIO) -> None:
    """Wait for a block and append it to the labels of the video."""
    for (step, _, _), row in zip(block.pairs, block.rows()):
        out.rows[step].append(row)
    out.size = block.size
    for frame, jpeg in zip(block.frames, block.jpegs):
        out.jpegs.append((spool.seek(0, os.SEEK_END), spool.write(jpeg.result())))
        out.frames.append(frame.index)
        out.times_s.append(frame.time_s)


def write_block(path: Path, rows: list[PairLabels]) -> None:
    """Write the labels of a block of pairs as one NPZ file, atomically."""
    arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in ("xy", "conf", "teacher")}
    arrays |= {name: np.stack([getattr(row, name) for row in rows]) for name in ("matches", "confirmed")}
    arrays |= {name: np.array([getattr(row, name) for row in rows]) for name in ("kind", "reason")}
    arrays["counts"] = np.array([len(row.xy) for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read_block(path: Path, num_pairs: int) -> list[PairLabels] | None:
    """Read what `write_block` wrote; None where there is nothing whole, or of another number of pairs."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        ends = np.cumsum(arrays["counts"])[:-1]
        columns = [np.split(arrays[name], ends) for name in ("xy", "conf", "teacher")]
        columns += [[str(text) for text in arrays[name]] for name in ("kind", "reason")]
        columns += [list(arrays[name]) for name in ("matches", "confirmed")]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return [PairLabels(*row) for row in zip(*columns, strict=True)] if len(columns[3]) == num_pairs else None
