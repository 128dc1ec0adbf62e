"""Labelling of one video (GIM section 3.1): a pure function of the video and the configuration.

Every sampled frame is matched with the ones 1, 2 and 4 samples before it, robust fitting removes outliers, the labels
are propagated to distant frames, and for every start frame the farthest pair is saved. What is not saved has a reason.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

import gim_jax
from data_prep import colmap, masks
from data_prep import manifest as about
from data_prep import propagate as prop
from data_prep import scan as scanning
from data_prep import video as vid
from data_prep.fitting import PairLabels, fit_motion, min_matches_for, pixel_scale
from data_prep.manifest import PairStatistics, Summary, pair_statistics, read_manifest
from data_prep.matchers import load_labellers, weights_digests
from data_prep.matching import DirectLabels, match_video
from gim_jax import image
from gim_jax.config import config_hash
from gim_jax.data import records
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic

WINDOW = 512  # start frames propagated at once, with the `prop.MAX_STEP` after them: bounds the memory of a long video
Progress = Callable[[int, int], None]  # (sampled frames done, expected)


@dataclass
class VideoLabels:
    """The labels of one video in memory.

    Attributes:
      size: (width, height) of its upright frames.
      frames, times_s: number and presentation time of each sampled frame.
      direct: fitted labels by step, before any pair is dropped for having few.
      levels: kept labels by interval, propagated and merged.
      min_matches: a pair needs more correspondences than this.
      reasons: [S] why no pair starts at a sampled frame, "" where one does.
      summary: see there.
    """

    size: tuple[int, int]
    frames: list[int]
    times_s: list[float]
    direct: dict[int, prop.Level]
    levels: list[prop.Level]
    min_matches: int
    reasons: list[str]
    summary: Summary

    @property
    def best(self) -> np.ndarray:
        """[S] step of the farthest kept pair, 0 for none."""
        return self.summary.best


def label_video(path: str | Path, config, out: str | Path, progress: Progress | None = None) -> dict:
    """Label a video and write its results into `out`, each atomically, the manifest last.

    `<sha>.tfrecord` the pairs, `<sha>.examples` those of one start for the report, `<sha>.jpg` frames, `<sha>.json` the
    manifest row, `<sha>.time.json` seconds by stage, and where and when they passed; all but the last depend on the
    video and the configuration alone. Done work is not repeated: where the manifest of the same video and configuration
    exists it is returned, and blocks of frames that an interrupted run finished are read back.

    Returns:
      The manifest row. Raises ValueError for what is not a usable video.
    """
    out = Path(out)
    info = vid.probe(path)
    stem, identity = info.sha256[:16], label_hash(config, path)
    manifest = out / f"{stem}.json"
    done = read_manifest(manifest)
    if done and done["label_config_hash"] == identity and (out / f"{stem}.tfrecord").is_file():
        return done
    if done:  # of other settings: nothing of them may be packed, or speak for what replaces it; the manifest last
        for suffix in (".tfrecord", ".examples", ".json"):
            manifest.with_suffix(suffix).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        row = _label(path, info, config, identity, out, progress)
    except FileNotFoundError:  # another worker finished the same video, and cleaned up after it
        row = read_manifest(manifest)
        if not row or row["label_config_hash"] != identity:
            raise
    except OSError as error:
        if error.errno == errno.ENOSPC:  # what is kept to go on from would leave no room for the next video
            shutil.rmtree(out / f".{stem}-{identity}", ignore_errors=True)
        raise
    for left in (*out.glob(f".{stem}-*"), *out.glob(f".{stem}.*.tmp")):  # of interrupted runs and other settings
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return row


def _label(path, info, config, identity: str, out: Path, progress) -> dict:
    """Write the results of a video; see `label_video`."""
    stem = info.sha256[:16]
    store = out / f".{stem}-{identity}"
    started, began = time.perf_counter(), time.time()
    with tempfile.TemporaryFile(dir=out) as jpegs:
        labels = _direct(path, info, config, jpegs, store, progress)
        direct, clock = labels.direct, time.perf_counter()
        summary, example = _new_summary(len(direct.frames)), _Example()
        pairs = _pairs(labels, config, summary, example)
        to_record = _Recorder(labels, config, identity, jpegs)
        saved: list[PairStatistics] = []

        def payloads() -> Iterator[bytes]:
            for start, step, pair in pairs:
                record = to_record(start, step, pair)
                F, interval_s = record.F if record.F.any() else None, record.time1_s - record.time0_s
                saved.append(pair_statistics(record.correspondences, F, direct.size, interval_s))
                yield records.encode(record)

        records.write_tfrecord(out / f"{stem}.tfrecord", payloads())
        examples = (records.encode(to_record(*pair)) for pair in example.pairs)
        records.write_tfrecord(out / f"{stem}.examples", examples)
        sheet = _contact_sheet(direct, jpegs)
    write_atomic(out / f"{stem}.jpg", lambda file: file.write(sheet))
    seconds = direct.seconds | {"propagate": time.perf_counter() - clock, "total": time.perf_counter() - started}
    seconds |= {"host": platform.node(), "began": began}
    write_json(out / f"{stem}.time.json", seconds)
    row = _manifest_row(labels, summary, saved, config, identity)
    write_json(out / f"{stem}.json", row)
    return row


def label_in_memory(path: str | Path, config, progress: Progress | None = None) -> VideoLabels:
    """`label_video` without writing anything: every label at every interval, for measurements."""
    with tempfile.TemporaryFile() as jpegs:
        labels = _direct(path, vid.probe(path), config, jpegs, None, progress)
        direct = labels.direct
        num, summary = len(direct.frames), _new_summary(len(direct.frames))
        levels = []
        for window in _windows(labels, config, summary):  # a reconstruction reads the frames
            _summarise(window, summary, labels, config)
            levels.append((window.num, window.levels))
    base = {step: prop.make_level(step, [_columns(row) for row in rows], num) for step, rows in direct.rows.items()}
    return VideoLabels(
        direct.size, direct.frames, direct.times_s, base, prop.join_windows(levels), labels.min_matches,
        about.reasons(direct.rows, summary, labels.min_matches), summary,
    )  # fmt: skip


def label_hash(config, video: str | Path) -> str:
    """Hash of what changes a video's labels: the content of weights and masks, not their place; not the threads."""
    settings = config.to_dict()
    settings.pop("workers")
    settings["weights"] = weights_digests(config)
    settings["networks"] = {name: settings["networks"][name] for name in settings["weights"]}  # of those that label
    for network in settings["networks"].values():
        network.pop("weights")
    settings["mask_provider"] = masks.identity(config.mask_provider, video)
    return config_hash(settings)


@dataclass
class _Labels:
    """A video after matching: what everything later is made from."""

    info: vid.VideoInfo
    direct: DirectLabels
    min_matches: int
    notes: list[str]
    spool: BinaryIO
    folder: Path | None  # for temporary files; None: the system's


def _direct(path, info, config, jpegs, store, progress) -> _Labels:
    """Scan, decode, match and fit. JPEGs of the sampled frames go to the open file `jpegs`."""
    labellers, clock = load_labellers(config), time.perf_counter()
    provider = masks.load_provider(config.mask_provider, path)
    step_frames = config.every_frames if config.every_seconds <= 0 else max(round(config.every_seconds * info.fps), 1)
    scan = scanning.load(store / "scan.npz") if store else None
    if scan is None:
        scan = scanning.scan(path, step_frames, config.max_seconds)
        if store:
            store.mkdir(exist_ok=True)
            scanning.save(store / "scan.npz", scan)
    seconds = time.perf_counter() - clock
    expected = -(-(int(scan.num_frames) - len(scan.repeats)) // step_frames)
    notes = scan.notes()

    def sampled() -> Iterator[vid.Frame]:
        first = None
        for frame in vid.sample_frames(
            path, config.every_frames, config.every_seconds, notes,
            repeats=scan.repeats, cuts=scan.cuts, crop=tuple(scan.crop.tolist()),
        ):  # fmt: skip
            first = frame.time_s if first is None else first
            if config.max_seconds and frame.time_s - first > config.max_seconds:
                notes.append(f"only the first {config.max_seconds:g} s are labelled, as configured")
                return
            yield replace(frame, rgb=_fit_size(frame.rgb, config.long_side))

    report = (lambda done: progress(done, max(expected, done))) if progress else None
    mask = masks.frame_masks(scan, provider)
    direct = match_video(sampled(), labellers, config, jpegs, store, mask, report)
    if not direct.frames:
        raise ValueError(f"{path}: {'; '.join(notes)}")
    direct.seconds["scan"] = seconds
    return _Labels(info, direct, min_matches_for(direct.size, config), notes, jpegs, store)


def _fit_size(rgb: np.ndarray, long_side: int) -> np.ndarray:
    scale = long_side / max(rgb.shape[:2]) if long_side else 1.0
    if scale >= 1.0:
        return rgb
    width, height = (max(round(n * scale), 1) for n in image.size_of(rgb))
    return image.resize(rgb, (width, height), cv2.INTER_AREA)


@dataclass
class _Window:
    """The kept labels of the start frames `first` to `first + num`: row 0 of the levels is `first`."""

    first: int
    num: int
    levels: list[prop.Level]
    kinds: dict[int, np.ndarray]


def _windows(labels: _Labels, config, summary: Summary) -> Iterator[_Window]:
    """Propagate a part of the video at a time, exactly as all at once; or reconstruct it clip by clip."""
    num, links = len(labels.direct.frames), config.source == "links"
    length, ahead = (WINDOW, prop.MAX_STEP) if links else (config.clip_samples, 0)
    with ThreadPoolExecutor(config.workers or os.cpu_count()) as pool:
        for first in range(0, num, length):
            inside, last = min(length, num - first), min(first + length + ahead, num)
            parts = {
                step: [row if first + k + step < last else None for k, row in enumerate(rows[first:last])]
                for step, rows in labels.direct.rows.items()
            }
            if links:
                base = {s: prop.make_level(s, [_columns(r) for r in part], last - first) for s, part in parts.items()}
                levels = prop.propagate(base, labels.min_matches, config.link_radius_px, config.link_rule)
                levels = [prop.first_starts(level, inside) for level in levels]
                kinds = {step: [row.kind if row else "" for row in part[:inside]] for step, part in parts.items()}
            else:
                levels, kinds = _reconstructed(parts, labels, config, first, summary.unplaced[first:last]), {}
            fitted = [
                refit(level, kinds.get(level.step, []), labels.min_matches, labels.direct.size, config, pool)
                for level in levels
            ]
            fitted = [(level, kind) for level, kind in fitted if level.mask.any()]
            yield _Window(first, inside, [level for level, _ in fitted], {level.step: kind for level, kind in fitted})


def _reconstructed(parts, labels: _Labels, config, first: int, unplaced: np.ndarray) -> list[prop.Level]:
    """The levels of a clip by COLMAP; notes the frames without a pose."""
    jpegs = labels.direct.jpegs
    clip = colmap.reconstruct(
        parts, config.labellers, lambda frame: _unspool(labels.spool, jpegs[first + frame]), labels.folder,
        len(unplaced), dense=config.source == "colmap_dense",
    )  # fmt: skip
    unplaced[:] = True if clip is None else ~clip.placed
    return colmap.levels(clip, labels.min_matches) if clip else []


def _columns(row: PairLabels | None) -> dict[str, np.ndarray] | None:
    return None if row is None or not row.kind else {"xy": row.xy, "conf": row.conf, "teacher": row.teacher}


def refit(level: prop.Level, direct_kinds: list[str], min_matches: int, size, config, pool):
    """Fit each propagated pair again and drop what the chain carried off; a direct pair is fitted already.

    Returns:
      The level and the kind of motion of each start, "" where no pair is left.
    """
    mask, kinds = np.array(level.mask), np.full(len(level.mask), "", "U1")
    kinds[: len(direct_kinds)] = direct_kinds
    chained = np.flatnonzero((level.hops * mask).max(1, initial=0) > 1)
    fits = pool.map(lambda s: fit_motion(level.xy[s][level.mask[s]], size, config, config.refit_px), chained)
    for start, (kind, found) in zip(chained, fits):
        kinds[start] = kind
        if config.refit_px:
            mask[start, np.flatnonzero(level.mask[start])] = found.inliers
    mask &= (mask.sum(1) > min_matches)[:, None]
    return replace(level, mask=mask), np.where(mask.any(1), kinds, "")


def _new_summary(num: int) -> Summary:
    return Summary(best=np.zeros(num, int), still=np.zeros(num, bool), unplaced=np.zeros(num, bool))


def _summarise(window: _Window, summary: Summary, labels: _Labels, config) -> None:
    """Note the counts of a window and choose the farthest moving pair of each of its start frames."""
    num, part = len(labels.direct.frames), slice(window.first, window.first + window.num)
    min_motion_px = config.min_motion_px * pixel_scale(labels.direct.size, config)
    for level in window.levels:
        shift = np.hypot(*np.moveaxis(level.xy[..., 2:] - level.xy[..., :2], -1, 0))
        shift = np.ma.median(np.ma.array(shift, mask=~level.mask), axis=1).filled(0)
        kept = level.counts > 0
        moving = kept & (shift >= min_motion_px)
        summary.still[part] |= kept & ~moving
        summary.best[part][moving] = level.step
        chained = ((level.hops > 1) & level.mask).sum(1)
        for name, values in (("counts", level.counts), ("chained", chained), ("kinds", window.kinds[level.step])):
            whole = getattr(summary, name).setdefault(level.step, np.zeros(num, values.dtype))
            whole[part] = values


@dataclass
class _Example:
    """All pairs of the start frame that reaches farthest (then has most labels): what the report shows."""

    score: tuple[int, int] = (-1, -1)
    pairs: list[tuple[int, int, dict]] = field(default_factory=list)


def _pairs(labels: _Labels, config, summary: Summary, example: _Example) -> Iterator[tuple[int, int, dict]]:
    """Yield the saved pairs (start, step, labels): the farthest kept one of every start frame."""
    nearest = min(labels.direct.rows)
    num_direct = np.zeros(len(labels.direct.frames), int)
    num_direct[: len(labels.direct.rows[nearest])] = [len(row.xy) for row in labels.direct.rows[nearest]]
    for window in _windows(labels, config, summary):
        _summarise(window, summary, labels, config)
        by_step = {level.step: level for level in window.levels}
        scores = [(int(summary.best[s]), int(num_direct[s])) for s in range(window.first, window.first + window.num)]
        top = max(range(window.num), key=lambda k: (scores[k], -k))
        if scores[top] > example.score:
            example.score, start = scores[top], window.first + top
            direct = [(step, rows[start]) for step, rows in labels.direct.rows.items() if start < len(rows)]
            example.pairs = [
                (start, step, {**(_columns(row) or {}), "hops": np.ones(len(row.xy), np.int32)})
                for step, row in direct
                if row.kind
            ]
            example.pairs += [(start, level.step, level.pair(top)) for level in window.levels if level.mask[top].any()]
        for start in range(window.first, window.first + window.num):
            if step := int(summary.best[start]):
                yield start, step, by_step[step].pair(start - window.first)


@dataclass
class _Recorder:
    """Makes the record of a pair."""

    labels: _Labels
    config: object
    identity: str
    jpegs: object

    def __call__(self, start: int, step: int, pair: dict) -> records.PairRecord:
        direct, info, end = self.labels.direct, self.labels.info, start + step
        kind, found = fit_motion(pair["xy"], direct.size, self.config)
        return records.PairRecord(
            image0=_unspool(self.jpegs, direct.jpegs[start]),
            image1=_unspool(self.jpegs, direct.jpegs[end]),
            size0=direct.size,
            size1=direct.size,
            correspondences=pair["xy"],
            confidence=pair["conf"],
            teacher=pair["teacher"],
            teachers=tuple(self.config.labellers),
            hops=pair["hops"],
            F=found.model if kind == "F" and found.model is not None else np.zeros((3, 3)),
            frame0=direct.frames[start],
            frame1=direct.frames[end],
            time0_s=direct.times_s[start],
            time1_s=direct.times_s[end],
            interval=direct.frames[end] - direct.frames[start],
            video=info.name,
            video_sha256=info.sha256,
            licence=self.config.licence,
            label_config_hash=self.identity,
        )


def _contact_sheet(direct: DirectLabels, jpegs, columns: int = 6, max_frames: int = 12) -> bytes:
    """Sampled frames, evenly spread, as one JPEG."""
    num, height = len(direct.jpegs), max(round(200 * direct.size[1] / direct.size[0]), 1)
    shown = np.unique(np.linspace(0, num - 1, min(max_frames, num)).round().astype(int))
    tiles = [image.decode_image(_unspool(jpegs, direct.jpegs[i]), "frame") for i in shown]
    tiles = [image.resize(tile, (200, height)) for tile in tiles]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % min(columns, len(tiles)))
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return image.encode_jpeg(np.concatenate(rows), 88)


def _unspool(file, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _manifest_row(labels: _Labels, summary: Summary, saved: list[PairStatistics], config, identity: str) -> dict:
    direct, best = labels.direct, summary.best
    reasons = about.reasons(direct.rows, summary, labels.min_matches)
    return {
        **asdict(labels.info),
        "size": list(direct.size),
        "sampled_frames": len(direct.frames),
        "every_frames": config.every_frames,
        "every_seconds": config.every_seconds,
        "labellers": list(config.labellers),
        "min_matches": labels.min_matches,
        "pairs": len(saved),
        "correspondences": sum(pair.matches for pair in saved),
        "licence": config.licence,
        "label_config_hash": identity,
        "code_version": gim_jax.__version__,
        "stages": about.stages(direct.rows, summary, config.labellers),
        "saved_by_step": {str(step): int((best == step).sum()) for step in np.unique(best[best > 0])},
        "histograms": about.histograms(saved),
        "shown": about.shown_pairs(saved),
        "lost": about.stretches(direct.times_s, reasons),
        "notes": labels.notes,
    }
