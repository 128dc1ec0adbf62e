"""A run over pairs: match on every device, measure in worker processes beside it, keep both, go on where it stopped.

The folder of a run holds `run.json` (what the matches depend on), `matches/*.npz` (the cache of predictions, a chunk of
pairs each) and `measures-<hash of the protocol>/*.npz`. Every file is written atomically and only once, so that a run
that was killed, or that many tasks share, ends with the result of one that was left alone. Matching hands over paths
of files, so neither side waits for the other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax.config import config_hash
from gim_jax.data.tfrecord import write_atomic
from gim_jax.eval import document, metrics, statistics
from gim_jax.eval.chunks import read_chunk, write_chunk
from gim_jax.eval.measure import COLUMNS, Pair, Protocol, frame_scale, measure_chunk, precision
from gim_jax.image import pad_bottom_right, read_image, resize, size_of, target_size

CHUNK = 32  # pairs of a file: what is matched again at worst after a kill
READ_AHEAD = 8  # pairs decoded while the matcher works


@dataclass
class Done:
    """What a run found: by protocol the columns of `measure.COLUMNS`, [pairs, repeats]; None while chunks are missing.

    Attributes:
      tables: one per protocol.
      reasons: why a pair was lost, by its index.
      match_s, measure_s: summed over all chunks, also those of earlier starts.
      num_chunks, num_there: of the run, and how many of them are measured by every protocol.
    """

    tables: list[dict[str, np.ndarray]] | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    match_s: float = 0.0
    measure_s: float = 0.0
    num_chunks: int = 0
    num_there: int = 0


@dataclass(frozen=True)
class Feed:
    """What is done to an image of a set before a matcher gets it.

    Attributes:
      resize: keywords of `image.target_size`; or `short_side`: that many pixels, the ratio kept, rounded.
      canvas: (width, height) to which the image is padded with zeros, None for no padding.
    """

    resize: tuple[tuple[str, Any], ...] = ()
    canvas: tuple[int, int] | None = None

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return the image to match, and the sizes (stored, resized, fed)."""
        stored = size_of(image)
        rule: dict[str, Any] = dict(self.resize)
        if "short_side" in rule:
            rule = {"exact": tuple(np.rint(frame_scale(stored, rule) * stored).astype(int).tolist())}
        size = target_size(stored, **rule)
        image = resize(image, size)
        if self.canvas is not None:
            image = pad_bottom_right(image, tuple(np.maximum(size, self.canvas)))
        return image, [stored, size, size_of(image)]


def claim(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a run, or check that its matches were made with the same settings.

    Raises:
      ValueError: the folder holds something else, or a run with other settings, which are named.
    """
    folder = Path(folder)
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(settings, sort_keys=True))
    if not path.exists():
        if any(entry for entry in folder.iterdir() if not entry.name.startswith(".")):
            raise ValueError(f"{folder}: the folder holds something else, expected an empty or a new one")
        write_atomic(path, lambda file: file.write(json.dumps(wanted, indent=1, sort_keys=True).encode()))
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if found != wanted:
        other = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        changes = "; ".join(f"{key}: found {found.get(key)!r}, expected {wanted.get(key)!r}"[:300] for key in other)
        raise ValueError(f"{folder}: holds matches made with other settings ({changes}); choose another folder")


def run(
    pairs: Sequence[Pair],
    feeds: Mapping[str, Feed],
    matchers: Sequence[Callable[[], Any]],
    folder: str | Path,
    settings: Mapping[str, Any],
    protocols: Sequence[Protocol],
    *,
    num_workers: int | None = None,
    task: tuple[int, int] = (0, 1),
    dense: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Done:
    """Match and measure the pairs, or those of this task.

    Args:
      pairs: in an order that does not change between starts.
      feeds: by set; sets that are not named are fed as they are.
      matchers: one per device: functions that make a matcher, called in the thread that uses it.
      folder: of the run, see the head of this file.
      settings: all that the matches depend on.
      protocols: how to measure.
      num_workers: processes that measure; 0: two threads of this process; None: one per core.
      task: (index, count): chunks index, index + count, ... are this task's.
      dense: see `measure.to_stored`.
      progress: called with (pairs measured, of how many).

    Returns:
      `Done`, with tables once the chunks of all tasks are there.
    """
    folder = Path(folder)
    claim(folder, settings)
    spans = [(start, min(start + CHUNK, len(pairs))) for start in range(0, len(pairs), CHUNK)]
    files = [_files(folder, index, protocols) for index in range(len(spans))]
    for path in (folder / "matches", *{p.parent for p in files[0][1]}):
        path.mkdir(exist_ok=True)
    mine = range(task[0], len(spans), task[1])
    total = sum(spans[index][1] - spans[index][0] for index in mine)
    state = _State(deque(mine), total, progress)
    with _executor(num_workers) as pool:

        def measure(index: int) -> None:
            chunk = list(pairs[slice(*spans[index])])
            for protocol, out in zip(protocols, files[index][1]):
                if not out.exists():
                    future = pool.submit(measure_chunk, str(files[index][0]), chunk, protocol, dense, str(out))
                    state.add(future)
            state.count(len(chunk))

        def work(make: Callable[[], Any]) -> None:
            matcher = None
            while (index := state.take()) is not None:
                path, outs = files[index]
                if not path.exists() or _lost_some(path):
                    for out in outs:
                        out.unlink(missing_ok=True)
                    matcher = matcher or make()
                    _match_chunk(pairs[slice(*spans[index])], feeds, matcher, path)
                measure(index)

        _in_threads(work, matchers, state)
        try:
            for future in state.futures:
                future.result()
        except BrokenProcessPool as error:
            raise ValueError(f"{folder}: a measuring process was killed (memory?); start again to go on") from error
    return _collect(files, len(pairs))


class _State:
    """What the threads of a run share."""

    def __init__(self, chunks: deque, total: int, progress: Callable[[int, int], None] | None):
        self.chunks, self.total, self.progress = chunks, total, progress
        self.done, self.lock, self.futures, self.error = 0, threading.Lock(), [], None

    def take(self) -> int | None:
        with self.lock:
            return self.chunks.popleft() if self.chunks and self.error is None else None

    def add(self, future: Future) -> None:
        with self.lock:
            self.futures.append(future)

    def count(self, num: int) -> None:
        with self.lock:
            self.done += num
            if self.progress:
                self.progress(self.done, self.total)


def _in_threads(work: Callable, matchers: Sequence[Callable], state: _State) -> None:
    """Run `work` with every matcher; with one of them in this thread, where Ctrl-C arrives."""
    if len(matchers) == 1:
        return work(matchers[0])

    def guarded(make):
        try:
            work(make)
        except BaseException as error:
            state.error = state.error or error

    threads = [threading.Thread(target=guarded, args=(make,), daemon=True) for make in matchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if state.error is not None:
        raise state.error


def _executor(num_workers: int | None) -> Executor:
    if num_workers == 0:
        return ThreadPoolExecutor(2)
    # forked processes would inherit the locks of JAX's threads
    return ProcessPoolExecutor(num_workers or os.cpu_count(), multiprocessing.get_context("spawn"))


def _files(folder: Path, index: int, protocols: Sequence[Protocol]) -> tuple[Path, list[Path]]:
    name = f"{index:05d}.npz"
    return folder / "matches" / name, [folder / f"measures-{config_hash(asdict(p))}" / name for p in protocols]


def _lost_some(path: Path) -> bool:
    return bool(read_chunk(path)["lost"].any())


def _match_chunk(pairs: Sequence[Pair], feeds: Mapping[str, Feed], matcher: Any, path: Path) -> None:
    """Match a chunk of pairs and write the file of it."""
    begin = time.monotonic()
    kpts: tuple[list, list] = ([], [])
    conf, sizes, reasons = [], np.zeros((len(pairs), 2, 3, 2), np.int32), []
    with ThreadPoolExecutor(2) as pool:
        decoded = _prefetch(pool, lambda pair: _read(pair, feeds.get(pair.set, Feed())), pairs, READ_AHEAD)
        for batch in _batches(decoded, matcher.batch_size):
            there = [item for item in batch if not isinstance(item, ValueError)]
            found = iter(matcher.match_batch([images for images, _ in there]) if there else ())
            for item in batch:
                index = len(reasons)
                if isinstance(item, ValueError):
                    reasons.append(str(item))
                    found_here = [np.zeros((0, 2), np.float32)] * 2, np.zeros(0, np.float32)
                else:
                    reasons.append("")
                    matches = next(found)
                    sizes[index] = item[1]
                    found_here = (matches.kpts0, matches.kpts1), matches.conf
                for side in (0, 1):
                    kpts[side].append(found_here[0][side])
                conf.append(found_here[1])
    arrays = {"kpts0": np.concatenate(kpts[0]), "kpts1": np.concatenate(kpts[1]), "conf": np.concatenate(conf)}
    arrays |= {"num_matches": np.array([len(c) for c in conf]), "sizes": sizes, "reasons": np.array(reasons)}
    arrays |= {"lost": np.array([bool(r) for r in reasons]), "seconds": np.float64(time.monotonic() - begin)}
    write_chunk(path, arrays)


def _read(pair: Pair, feed: Feed):
    """Decode, turn upright and feed: the two images and their sizes; a ValueError instead of a pair that is lost."""
    try:
        images = [read_image(path, exif=False) for path in (pair.path0, pair.path1)]
    except ValueError as error:
        return error
    turned = [np.ascontiguousarray(np.rot90(i, turns)) for i, turns in zip(images, (pair.turns0, pair.turns1))]
    fed = [feed(image) for image in turned]
    return tuple(image for image, _ in fed), [sizes for _, sizes in fed]


def _prefetch(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yield function(item) in order, computed up to `ahead` items early by the pool."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(items: Iterator, size: int) -> Iterator[list]:
    batch: list = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _collect(files: Sequence[tuple[Path, list[Path]]], num_pairs: int) -> Done:
    there = [path.exists() and all(out.exists() for out in outs) for path, outs in files]
    done = Done(num_chunks=len(files), num_there=sum(there))
    if not all(there):
        return done
    for index, (path, _) in enumerate(files):
        data = read_chunk(path)
        done.match_s += float(data["seconds"])
        for place in np.flatnonzero(data["lost"]):
            done.reasons[CHUNK * index + int(place)] = str(data["reasons"][place])
    done.tables = []
    for column in range(len(files[0][1])):
        chunks = [read_chunk(outs[column]) for _, outs in files]
        done.measure_s += sum(float(chunk["seconds"]) for chunk in chunks)
        done.tables.append({name: np.concatenate([chunk[name] for chunk in chunks]) for name in COLUMNS})
        if len(done.tables[-1]["error"]) != num_pairs:
            raise ValueError(
                f"{files[0][1][column].parent}: found {len(done.tables[-1]['error'])} pairs of {num_pairs}"
            )
    return done


def records(
    pairs: Sequence[Pair],
    done: Done,
    protocol: Protocol,
    index: int = 0,
    thresholds: Sequence[float] = metrics.AUC_THRESHOLDS_DEG,
) -> list[dict[str, Any]]:
    """Summarise the table of a protocol by set, in the form of `document`.

    Args:
      pairs, done: of `run`.
      protocol: the one that the table belongs to; index: its place.
      thresholds: of the AUC.
    """
    assert done.tables is not None
    table, out = done.tables[index], []
    names = np.array([pair.set for pair in pairs])
    for name in dict.fromkeys(names.tolist()):
        chosen = np.flatnonzero(names == name).tolist()
        columns = {key: values[chosen] for key, values in table.items()}
        lost = columns["lost"].any(1)
        errors = np.where(np.isfinite(columns["error"]), columns["error"], np.inf).ravel()
        overlaps = [pairs[i].overlap for i in chosen for _ in range(protocol.repeats)]
        known = all(overlap is not None for overlap in overlaps)
        kept = {key: values[~lost] for key, values in columns.items()}
        mean = lambda values: float(np.mean(values)) if values.size else 0.0  # noqa: E731
        out.append(
            {
                "set": name,
                "num_pairs": len(chosen),
                "num_repeats": protocol.repeats,
                "num_failures": int((~np.isfinite(kept["error"])).all(1).sum()),
                "num_lost": int(lost.sum()),
                "auc": document.auc_by_threshold(errors, thresholds),
                "auc_by_overlap": statistics.overlap_auc(errors, overlaps) if known else None,
                "mean_matches": mean(kept["num_matches"]),
                "mean_inliers": mean(kept["num_inliers"]),
                "precision": mean(precision(kept)),
                "precision_inliers": mean(precision(kept, inliers=True)),
                "pairs": {
                    "identifier": [pairs[i].identifier for i in chosen for _ in range(protocol.repeats)],
                    "overlap": overlaps if known else None,
                    "error": document.plain(errors),
                    "R_error_deg": document.plain(columns["R_error_deg"].ravel()),
                    "t_error_deg": document.plain(columns["t_error_deg"].ravel()),
                    "t_error": document.plain(columns["t_error"].ravel()),
                    "baseline": document.plain(columns["baseline"].ravel()),
                    "num_matches": columns["num_matches"].ravel().tolist(),
                    "num_inliers": columns["num_inliers"].ravel().tolist(),
                    "precision": document.plain(precision(columns).ravel()),
                    "precision_inliers": document.plain(precision(columns, inliers=True).ravel()),
                    "lost": columns["lost"].ravel().tolist(),
                },
            }
        )
    return out


ROW = ("R_error_deg", "t_error_deg", "num_matches", "num_inliers", "precision", "precision_inliers")


def rows(record: Mapping[str, Any], reasons: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the pairs of a set as a list of rows; lost ones have the reason under `lost`."""
    columns, out = record["pairs"], []
    for index, error in enumerate(columns["error"]):
        if index in reasons:
            out.append({"error_deg": None, "lost": reasons[index]})
            continue
        row = {"error_deg": error, **{name: columns[name][index] for name in ROW}}
        out.append(row | ({"overlap": columns["overlap"][index]} if columns["overlap"] else {}))
    return out
