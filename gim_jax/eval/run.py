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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import geometry
from gim_jax.config import config_hash
from gim_jax.data.tfrecord import write_atomic
from gim_jax.eval import document, metrics, statistics
from gim_jax.eval.chunks import read_chunk, write_chunk
from gim_jax.eval.measure import COLUMNS, Pair, Protocol, frame_scale, measure_chunk, precision
from gim_jax.image import pad_bottom_right, read_image, resize, size_of, target_size, to_gray

CHUNK = 16  # pairs of a file: what is matched again at worst after a kill; images are decoded a chunk ahead
DECODERS = 2  # threads, of each matcher


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
      gray: resize luma, as the protocols of networks that take gray images do, not colours.
      inside: the matcher resizes by the same rule, so the image goes to it as it is.
    """

    resize: tuple[tuple[str, Any], ...] = ()
    canvas: tuple[int, int] | None = None
    gray: bool = False
    inside: bool = False

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Return the image to match, and the sizes (stored, resized, fed)."""
        stored = size_of(image)
        rule: dict[str, Any] = dict(self.resize)
        if "short_side" in rule:
            rule = {"exact": tuple(np.rint(frame_scale(stored, rule) * stored).astype(int).tolist())}
        size = target_size(stored, **rule)
        if self.inside:
            return image, [stored, size, size]
        image = resize(to_gray(image) if self.gray else image, size)
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
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found no settings of a run")
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

        def start(pool: ThreadPoolExecutor) -> tuple[int, dict | None] | None:
            """Take a chunk and begin to decode its images, None of them where its matches are there."""
            index = state.take()
            if index is None:
                return None
            path, _ = files[index]
            if path.exists() and not _lost_some(path):
                return index, None
            return index, _decode(pool, pairs[slice(*spans[index])], feeds)

        def work(make: Callable[[], Any]) -> None:
            matcher = None
            with ThreadPoolExecutor(DECODERS) as decoders:
                ahead = start(decoders)
                while ahead is not None:
                    (index, images), ahead = ahead, start(decoders)
                    if images is not None:
                        for out in folder.glob(f"measures-*/{files[index][0].name}"):  # those of other protocols, too
                            out.unlink()
                        matcher = matcher or make()
                        _match_chunk(pairs[slice(*spans[index])], feeds, images, matcher, files[index][0])
                    measure(index)

        try:
            _in_threads(work, matchers, state)
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


def _key(pair: Pair, side: int) -> tuple:
    return (pair.path0, pair.turns0, pair.set) if side == 0 else (pair.path1, pair.turns1, pair.set)


def _decode(pool: ThreadPoolExecutor, pairs: Sequence[Pair], feeds: Mapping[str, Feed]) -> dict[tuple, Future]:
    """Begin to decode the images of a chunk, each once: a matcher then detects keypoints once, too."""
    keys = dict.fromkeys(_key(pair, side) for pair in pairs for side in (0, 1))
    return {key: pool.submit(_read, key[0], key[1], feeds.get(key[2], Feed())) for key in keys}


def _read(path: Path, turns: int, feed: Feed):
    """Decode, turn upright and feed: the image and its sizes; a ValueError instead of one that cannot be read."""
    try:
        image = read_image(path, exif=False)
    except ValueError as error:
        return error
    return feed(np.ascontiguousarray(np.rot90(image, turns)))


def _match(matcher: Any, images: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Match pairs of images; a ValueError stands for a pair that the matcher refuses, such as one of a huge image."""
    try:
        return matcher.match_batch(images) if images else []
    except ValueError as error:
        return [error] if len(images) == 1 else [found for pair in images for found in _match(matcher, [pair])]


def _match_chunk(
    pairs: Sequence[Pair], feeds: Mapping[str, Feed], images: Mapping[tuple, Future], matcher: Any, path: Path
) -> None:
    """Match a chunk of pairs and write the file of it."""
    begin = time.monotonic()
    fed = [[images[_key(pair, side)].result() for side in (0, 1)] for pair in pairs]
    faults = [next((item for item in both if isinstance(item, ValueError)), None) for both in fed]
    there = [(both[0][0], both[1][0]) for both, fault in zip(fed, faults) if fault is None]
    found = iter(_match(matcher, there))
    sizes = np.zeros((len(pairs), 2, 3, 2), np.int32)
    kpts: tuple[list, list] = ([], [])
    conf = []
    for index, (pair, both, fault) in enumerate(zip(pairs, fed, faults)):
        if fault is None and isinstance(matches := next(found), ValueError):
            fault = faults[index] = matches
        if fault is not None:
            points, conf_here = [np.zeros((0, 2), np.float32)] * 2, np.zeros(0, np.float32)
        else:
            points, conf_here = [matches.kpts0, matches.kpts1], matches.conf
            sizes[index] = both[0][1], both[1][1]
            if feeds.get(pair.set, Feed()).inside:  # into the pixels in which the matcher worked
                ratios = [np.divide(s[1], s[0]) for s in sizes[index]]
                points = [geometry.scale_points(p, r).astype(np.float32) for p, r in zip(points, ratios)]
        for side in (0, 1):
            kpts[side].append(points[side])
        conf.append(conf_here)
    arrays = {"kpts0": np.concatenate(kpts[0]), "kpts1": np.concatenate(kpts[1]), "conf": np.concatenate(conf)}
    arrays |= {"num_matches": np.array([len(c) for c in conf]), "sizes": sizes}
    arrays |= {"reasons": np.array([str(fault or "") for fault in faults])}
    arrays |= {"lost": np.array([fault is not None for fault in faults])}
    write_chunk(path, {**arrays, "seconds": np.float64(time.monotonic() - begin)})


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
