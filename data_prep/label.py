"""Labelling of one video (GIM section 3.1): a pure function of the video and the configuration.

Every sampled frame is matched with the ones 1, 2 and 4 samples before it, robust fitting removes outliers, the labels
are propagated to distant frames, and for every start frame the farthest pair is saved. What is not saved has a reason.
"""

from __future__ import annotations

import collections
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

import gim_jax
from data_prep import propagate as prop
from data_prep import video as vid
from data_prep.fitting import fit_motion, min_matches_for, one_to_one, pixel_scale
from gim_jax import image, rootsift
from gim_jax.config import config_hash
from gim_jax.data import records
from gim_jax.data.tfrecord import write_atomic

TEACHERS = ("rootsift",)
Progress = Callable[[int, int], None]  # (sampled frames done, expected)


@dataclass
class VideoLabels:
    """The labels of one video in memory.

    Attributes:
      info: the video.
      size: (width, height) of its upright frames.
      frames, times_s: number and presentation time of each sampled frame.
      direct: fitted labels by step, before any pair is dropped for having few.
      levels: kept labels by interval, propagated and merged.
      geometry: by step, what binds each kept pair: "F" epipolar lines, "H" a homography (the camera only turns, or
        sees one plane), "" where there is no pair.
      min_matches: a pair needs more correspondences than this.
      reasons: [S] why no pair starts at a sampled frame, "" where one does.
      best: [S] step of the farthest kept pair, 0 for none.
      stats: counts of every stage, for the manifest.
    """

    info: vid.VideoInfo
    size: tuple[int, int]
    frames: list[int]
    times_s: list[float]
    direct: dict[int, prop.Level]
    levels: list[prop.Level]
    geometry: dict[int, np.ndarray]
    min_matches: int
    reasons: list[str]
    best: np.ndarray
    stats: dict = field(default_factory=dict)


def label_video(path: str | Path, config, out: str | Path, progress: Progress | None = None) -> dict:
    """Label a video and write `<sha>.tfrecord` and its manifest row `<sha>.json` into `out`, atomically.

    Done work is not repeated: where the manifest of the same video and configuration exists it is returned.

    Returns:
      The manifest row. Raises ValueError for what is not a usable video.
    """
    out = Path(out)
    info = vid.probe(path)
    stem = info.sha256[:16]
    manifest = out / f"{stem}.json"
    done = read_manifest(manifest)
    if done and done["label_config_hash"] == label_hash(config) and (out / f"{stem}.tfrecord").is_file():
        return done
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=out) as jpegs:
        labels, offsets = _label(path, info, config, jpegs, progress)
        for name, pairs in ((f"{stem}.tfrecord", _farthest(labels)), (f"{stem}.examples", _examples(labels))):
            payloads = (records.encode(_record(labels, *pair, offsets, jpegs, config)) for pair in pairs)
            records.write_tfrecord(out / name, payloads)
        sheet = _contact_sheet(labels, offsets, jpegs)
    write_atomic(out / f"{stem}.jpg", lambda file: file.write(sheet))
    row = _manifest_row(labels, config, time.perf_counter() - started)
    write_atomic(manifest, lambda file: file.write(json.dumps(row, indent=1).encode()))
    return row


def label_in_memory(path: str | Path, config, progress: Progress | None = None) -> VideoLabels:
    """`label_video` without writing anything: every label at every interval, for measurements."""
    with tempfile.TemporaryFile() as jpegs:
        return _label(path, vid.probe(path), config, jpegs, progress)[0]


def label_hash(config) -> str:
    """Hash of what changes the labels; the number of threads does not."""
    settings = config.to_dict()
    settings.pop("workers")
    return config_hash(settings)


def read_manifest(path: Path) -> dict | None:
    """The manifest row of a video, None where there is none or an unreadable one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _label(path, info, config, jpegs, progress) -> tuple[VideoLabels, list[tuple[int, int]]]:
    """Decode, match, fit and propagate. JPEGs of the sampled frames go to the open file `jpegs`."""
    seconds: dict[str, float] = {}
    notes: list[str] = []
    frames, times_s, offsets, size = [], [], [], (0, 0)
    features: collections.deque[Future] = collections.deque(maxlen=max(config.base_steps) + 1)
    fits: dict[int, list[Future]] = {step: [] for step in config.base_steps}
    waiting: collections.deque[Future] = collections.deque()
    step_frames = config.every_frames if config.every_seconds <= 0 else max(config.every_seconds * info.fps, 1)
    length = min(info.num_frames, config.max_seconds * info.fps or info.num_frames)
    expected = int(np.ceil(length / step_frames))
    clock = time.perf_counter()
    with ThreadPoolExecutor(config.workers or os.cpu_count()) as pool:
        for frame in vid.sample_frames(path, config.every_frames, config.every_seconds, notes):
            if config.max_seconds and times_s and frame.time_s - times_s[0] > config.max_seconds:
                notes.append(f"only the first {config.max_seconds:g} s are labelled, as configured")
                break
            rgb = _fit_size(frame.rgb, config.long_side)
            size = image.size_of(rgb)
            frames.append(frame.index)
            times_s.append(frame.time_s)
            features.append(pool.submit(_extract, rgb, config))
            offsets.append(_spool(jpegs, rgb, config.jpeg_quality))
            for step in config.base_steps:
                if len(features) > step:
                    job = pool.submit(_fit_pair, features[-1 - step], features[-1], size, config)
                    fits[step].append(job)
                    waiting.append(job)
            while len(waiting) > 16:  # let decoding wait for matching, so that memory stays bounded
                waiting.popleft().result()
            if progress:
                progress(len(frames), max(expected, len(frames)))
        for job in waiting:
            job.result()
    seconds["decode_match_fit"] = time.perf_counter() - clock
    if not frames:
        raise ValueError(f"{path}: {'; '.join(notes)}")

    clock = time.perf_counter()
    direct, refusals, geometry = {}, {}, {}
    for step, jobs in fits.items():
        results = [job.result() for job in jobs]
        refusals[step] = [reason for _, _, reason in results]
        geometry[step] = [kind for _, kind, _ in results]
        direct[step] = prop.make_level(step, [labels for labels, _, _ in results], len(frames))
    min_matches = min_matches_for(size, config)
    levels = prop.propagate(direct, min_matches, config.link_radius_px, config.link_rule)
    refitted = [_refit(level, geometry.get(level.step, []), min_matches, size, config) for level in levels]
    levels = [level for level, _ in refitted if level.mask.any()]
    seconds["propagate"] = time.perf_counter() - clock

    best, reasons = _choose(levels, direct, refusals, min_matches, config.min_motion_px * pixel_scale(size, config))
    kinds = {level.step: kinds for level, kinds in refitted}
    labels = VideoLabels(info, size, frames, times_s, direct, levels, kinds, min_matches, reasons, best)
    labels.stats = _stats(labels, refusals, geometry) | {"seconds": dict(seconds), "notes": notes}
    return labels, offsets


def _fit_size(rgb: np.ndarray, long_side: int) -> np.ndarray:
    scale = long_side / max(rgb.shape[:2]) if long_side else 1.0
    if scale >= 1.0:
        return rgb
    width, height = (max(round(n * scale), 1) for n in image.size_of(rgb))
    return image.resize(rgb, (width, height), cv2.INTER_AREA)


def _extract(rgb: np.ndarray, config) -> rootsift.Features:
    return rootsift.extract(
        image.to_gray(rgb),
        config.max_keypoints or None,
        config.contrast_threshold,
        max_diameter_px=config.max_diameter_px * pixel_scale(image.size_of(rgb), config),
    )


def _fit_pair(features0: Future, features1: Future, size, config) -> tuple[dict | None, str, str]:
    """Match two frames and keep what robust fitting confirms: (labels or None, kind of motion, reason)."""
    one, two = features0.result(), features1.result()
    if min(len(one.kpts), len(two.kpts)) < 8:
        return None, "", f"no texture: {min(len(one.kpts), len(two.kpts))} keypoints"
    idx0, idx1, conf = rootsift.match(one.desc, two.desc, config.ratio)
    xy = np.concatenate([one.kpts[idx0], two.kpts[idx1]], 1)
    keep = one_to_one(xy, conf)
    xy, conf = xy[keep], conf[keep]
    kind, found = fit_motion(xy, size, config)
    if not kind:
        return None, "", found.reason
    xy, conf = xy[found.inliers], conf[found.inliers]
    return {"xy": xy, "conf": conf, "teacher": np.zeros(len(xy), np.int32)}, kind, ""


def _refit(level: prop.Level, direct_kinds: list[str], min_matches: int, size, config) -> tuple[prop.Level, np.ndarray]:
    """Fit each propagated pair again and drop what the chain carried off; a direct pair is fitted already.

    Returns:
      The level and the kind of motion of each start, "" where no pair is left.
    """
    mask, kinds = np.array(level.mask), np.full(len(level.mask), "", "U1")
    kinds[: len(direct_kinds)] = direct_kinds
    for start in np.flatnonzero((level.hops * mask).max(1) > 1):
        rows = np.flatnonzero(mask[start])
        kinds[start], found = fit_motion(level.xy[start][rows], size, config)
        if config.refit:
            mask[start, rows] = found.inliers
    mask &= (mask.sum(1) > min_matches)[:, None]
    return replace(level, mask=mask), np.where(mask.any(1), kinds, "")


def _choose(levels, direct, refusals, min_matches, min_motion_px) -> tuple[np.ndarray, list[str]]:
    """The farthest kept pair of each start frame, or why there is none."""
    first = min(direct)
    num = len(direct[first].mask)
    best, still = np.zeros(num, int), np.zeros(num, bool)
    for level in levels:
        shift = np.hypot(*np.moveaxis(level.xy[..., 2:] - level.xy[..., :2], -1, 0))
        shift = np.ma.median(np.ma.array(shift, mask=~level.mask), axis=1).filled(0)
        kept = level.counts > 0
        moving = kept & (shift >= min_motion_px)
        still |= kept & ~moving
        best[moving] = level.step
    reasons = []
    for start in range(num):
        if best[start]:
            reasons.append("")
        elif start >= len(refusals[first]):
            reasons.append("the video ends")
        elif still[start]:
            reasons.append("the camera stands still")
        elif refusals[first][start]:
            reasons.append(refusals[first][start])
        else:
            count = int(direct[first].counts[start])
            reasons.append(f"{count} correspondences to the next sampled frame, {min_matches} are not enough")
    return best, reasons


def _farthest(labels: VideoLabels) -> list[tuple[prop.Level, int]]:
    """The saved pairs: the farthest kept one of every start frame, as (level, start)."""
    by_step = {level.step: level for level in labels.levels}
    return [(by_step[labels.best[start]], int(start)) for start in np.flatnonzero(labels.best)]


def _examples(labels: VideoLabels) -> list[tuple[prop.Level, int]]:
    """For the report: all direct and all kept pairs of one start frame, the one that reaches farthest."""
    reach = labels.best * 1_000_000 + labels.direct[min(labels.direct)].counts
    start = int(reach.argmax())
    levels = [*labels.direct.values(), *labels.levels]
    return [(level, start) for level in levels if level.mask[start].any()]


def _record(labels: VideoLabels, level: prop.Level, start: int, offsets, jpegs, config) -> records.PairRecord:
    end, pair = start + level.step, level.pair(start)
    kind, found = fit_motion(pair["xy"], labels.size, config)
    return records.PairRecord(
        image0=_unspool(jpegs, offsets[start]),
        image1=_unspool(jpegs, offsets[end]),
        size0=labels.size,
        size1=labels.size,
        correspondences=pair["xy"],
        confidence=pair["conf"],
        teacher=pair["teacher"],
        teachers=TEACHERS,
        hops=pair["hops"],
        F=found.model if kind == "F" and found.model is not None else np.zeros((3, 3)),
        frame0=labels.frames[start],
        frame1=labels.frames[end],
        time0_s=labels.times_s[start],
        time1_s=labels.times_s[end],
        interval=labels.frames[end] - labels.frames[start],
        video=labels.info.name,
        video_sha256=labels.info.sha256,
        licence=config.licence,
        label_config_hash=label_hash(config),
    )


def _contact_sheet(labels: VideoLabels, offsets, jpegs, columns: int = 6, max_frames: int = 12) -> bytes:
    """Sampled frames, evenly spread, as one JPEG."""
    height = round(200 * labels.size[1] / labels.size[0])
    shown = np.unique(np.linspace(0, len(offsets) - 1, min(max_frames, len(offsets))).round().astype(int))
    tiles = [image.resize(image.decode_image(_unspool(jpegs, offsets[i]), "frame"), (200, height)) for i in shown]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % min(columns, len(tiles)))
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    return image.encode_jpeg(np.concatenate(rows), 88)


def _stats(labels: VideoLabels, refusals: dict[int, list[str]], geometry: dict[int, list[str]]) -> dict:
    """Counts of every stage by interval, and the stretches without labels with their reasons."""
    stages = []
    for step, level in labels.direct.items():
        counts = level.counts[: len(refusals[step])]
        stages.append({"stage": "direct", "step": step, "pairs": len(counts), "fitted": int((counts > 0).sum()),
                       "homographies": geometry[step].count("H"), **_spread(counts[counts > 0])})  # fmt: skip
    for level in labels.levels:
        counts = level.counts
        chained = (level.hops > 1) & level.mask
        stages.append({"stage": "kept", "step": level.step, "pairs": max(len(counts) - level.step, 0),
                       "kept": int((counts > 0).sum()),
                       "homographies": int((labels.geometry[level.step] == "H").sum()),
                       "propagated_share": float(chained.sum() / counts.sum()),
                       **_spread(counts[counts > 0])})  # fmt: skip
    saved = {str(step): int((labels.best == step).sum()) for step in np.unique(labels.best[labels.best > 0])}
    return {"stages": stages, "saved_by_step": saved, "lost": _stretches(labels)}


def _spread(counts: np.ndarray) -> dict:
    if not len(counts):
        return {"correspondences": 0}
    low, median, high = np.percentile(counts, [5, 50, 95]).round().astype(int).tolist()
    return {"correspondences": int(counts.sum()), "p5": low, "median": median, "p95": high}


def _stretches(labels: VideoLabels) -> list[dict]:
    """Runs of sampled frames lost for the same kind of reason (numbers aside)."""
    runs: list[dict] = []
    for time_s, reason in zip(labels.times_s, labels.reasons):
        kind = "".join(c for c in reason if not c.isdigit())
        if runs and runs[-1]["kind"] == kind:
            runs[-1] |= {"to_s": time_s, "frames": runs[-1]["frames"] + 1}
        else:
            runs.append({"kind": kind, "from_s": time_s, "to_s": time_s, "frames": 1, "reason": reason})
    return [{k: v for k, v in run.items() if k != "kind"} for run in runs if run["reason"]]


def _manifest_row(labels: VideoLabels, config, seconds: float) -> dict:
    pairs = _farthest(labels)
    return {
        **{k: v for k, v in asdict(labels.info).items()},
        "size": list(labels.size),
        "sampled_frames": len(labels.frames),
        "every_frames": config.every_frames,
        "every_seconds": config.every_seconds,
        "min_matches": labels.min_matches,
        "pairs": len(pairs),
        "correspondences": int(sum(level.counts[start] for level, start in pairs)),
        "licence": config.licence,
        "label_config_hash": label_hash(config),
        "code_version": gim_jax.__version__,
        **labels.stats,
        "total_seconds": seconds,
    }


def _spool(file, rgb: np.ndarray, quality: int) -> tuple[int, int]:
    start = file.seek(0, os.SEEK_END)
    return start, file.write(image.encode_jpeg(rgb, quality))


def _unspool(file, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])
