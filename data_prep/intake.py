"""Intake of videos: a CSV of files and addresses becomes a checked list with hashes and licences.

Nothing from the list reaches a shell or names a file: what is fetched is named by the hash of its address.
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import cv2
import numpy as np

from data_prep import video as vid
from gim_jax.data.tfrecord import write_atomic

FREE = ("CC0*", "CC-BY-[0-9]*", "CC-BY", "PDM*", "public domain")  # licences that allow training and passing labels on
SITE_LICENCES = {"Creative Commons Attribution license (reuse allowed)": "CC-BY-3.0"}  # YouTube's words
FORMAT = "bv*[height<=?1080]/b[height<=?1080]"  # GIM's videos are full HD; the sound is not needed
NUM_HASHES = 16  # frames compared of each video
MAX_BITS = 8  # of 64 that differ in the median frame of one video encoded twice; of two videos about 32
SAME_LENGTH = 0.02  # share by which durations of one video encoded twice may differ


@dataclass(frozen=True)
class Listed:
    """One usable video of a list; `source` is what the list said, `video` the file."""

    video: str
    licence: str
    sha256: str
    codec: str
    fps: float
    duration_s: float
    source: str


def read_list(path: str | Path) -> list[dict[str, str]]:
    """Read a CSV with the columns video (file or address) and licence; others are left alone.

    Raises ValueError naming the file, the line and the field; also where no video is listed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a text file that can be read ({error})") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    try:
        columns = reader.fieldnames or []
        if not {"video", "licence"} <= {*columns}:
            raise ValueError(f"{path}: found columns {', '.join(columns) or 'none'}, expected video,licence")
        for row in reader:
            for name in ("video", "licence"):
                if not (row[name] or "").strip():
                    raise ValueError(f"{path}: line {reader.line_num}: {name}: found nothing, expected a value")
            rows.append({**row, "video": row["video"].strip(), "licence": row["licence"].strip()})
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num + 1}: {error}; is a quote not closed?") from error
    if not rows:
        raise ValueError(f"{path}: found no video below the heading")
    return rows


def intake(
    path: str | Path, out: str | Path, allowed: Sequence[str] = FREE, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Listed], list[dict[str, str]]]:
    """Check, fetch, hash and probe the videos of a CSV; write `videos.csv` and `refused.csv` into `out`.

    Args:
      path: see `read_list`; files are relative to its folder.
      allowed: licences that may be used, with `*` and `?`; case does not matter.
      progress: called with (done, number of videos).

    Returns:
      The usable videos, and the refused ones as dicts of video, licence and reason. Of equal or nearly equal videos
      the first of the list is used.
    """
    path, out = Path(path), Path(out)
    rows = read_list(path)
    out.mkdir(parents=True, exist_ok=True)
    listed: list[Listed] = []
    prints: list[np.ndarray] = []
    refused: list[dict[str, str]] = []
    for number, row in enumerate(rows):
        try:
            licence = check_licence(row["licence"], allowed)
            file = fetch(row["video"], out / "files", allowed) if "://" in row["video"] else path.parent / row["video"]
            info = vid.probe(file)
            if not info.duration_s and not info.num_frames:
                raise ValueError(f"{file}: no frame can be decoded")
            found = fingerprint(file, info.duration_s)
            for other, one in zip(listed, prints):
                if other.sha256 == info.sha256 or is_same_video(found, info.duration_s, one, other.duration_s):
                    same = "the same file as" if other.sha256 == info.sha256 else "the same video as"
                    raise ValueError(f"{same} {other.source}")
        except (ValueError, OSError) as error:
            refused.append({"video": row["video"], "licence": row["licence"], "reason": " ".join(str(error).split())})
        else:
            place = str(file.resolve())
            listed.append(
                Listed(place, licence, info.sha256, info.codec, info.fps, info.duration_s, row["video"])
            )  # fmt: skip
            prints.append(found)
        if progress:
            progress(number + 1, len(rows))
    _write_csv(out / "videos.csv", list(Listed.__dataclass_fields__), [asdict(one) for one in listed])
    _write_csv(out / "refused.csv", ["video", "licence", "reason"], refused)
    return listed, refused


def check_licence(licence: str, allowed: Sequence[str]) -> str:
    """Return the licence in its short form; ValueError where it is not among the allowed ones."""
    licence = SITE_LICENCES.get(licence, licence)
    if not any(fnmatch.fnmatchcase(licence.lower(), pattern.lower()) for pattern in allowed):
        raise ValueError(f"licence: found {licence!r}, allowed are {', '.join(allowed)}")
    return licence


def fetch(address: str, folder: Path, allowed: Sequence[str]) -> Path:
    """Fetch a video by yt-dlp into `<folder>/<hash of the address>.<ending>`; what is there already is used.

    Raises ValueError for what is no http address, cannot be had, or stands on its page under another licence.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{address}: found an address of kind {parts.scheme!r}, expected http or https")
    key = hashlib.sha256(address.encode()).hexdigest()[:16]
    if there := _fetched(folder, key):
        return there[0]
    try:
        import yt_dlp
    except ImportError as error:
        raise ValueError(f"{address}: fetching needs yt-dlp, pip install 'gim-jax[videos]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    options: Any = {
        "outtmpl": {"default": str(folder.resolve()).replace("%", "%%") + f"/{key}.%(ext)s"},
        "format": FORMAT,
        "noplaylist": True,
        "quiet": True,
        "noprogress": True,
        "no_warnings": True,
        "enable_file_urls": False,
        "logger": _Silence(),
    }
    try:
        with yt_dlp.YoutubeDL(options) as downloader:
            info: Any = downloader.extract_info(address, download=False)
            if info.get("_type", "video") != "video":
                raise ValueError(f"{address}: found a {info['_type']}, expected one video")
            if info.get("license"):
                check_licence(str(info["license"]), allowed)
            downloader.process_ie_result(info, download=True)
    except yt_dlp.utils.YoutubeDLError as error:
        raise ValueError(f"{address}: cannot be fetched: {error}") from error
    there = _fetched(folder, key)
    if not there:
        raise ValueError(f"{address}: nothing was fetched")
    return there[0]


def _fetched(folder: Path, key: str) -> list[Path]:
    """Finished files of a key; yt-dlp's unfinished ones have these in their names."""
    unfinished = (".part", ".temp.", ".ytdl")
    return [file for file in sorted(folder.glob(f"{key}.*")) if not any(mark in file.name for mark in unfinished)]


class _Silence:
    """A log for yt-dlp: its errors come as exceptions."""

    def debug(self, _text: str) -> None: ...
    def warning(self, _text: str) -> None: ...
    def error(self, _text: str) -> None: ...


def fingerprint(path: str | Path, duration_s: float) -> np.ndarray:
    """Difference hashes of frames spread evenly over a video: [NUM_HASHES, 64] bool, fewer where frames are missing."""
    hashes = []
    with vid.open_video(path) as container:
        stream = container.streams.video[0]
        try:
            for k in range(NUM_HASHES):
                target = (k + 0.5) / NUM_HASHES * duration_s
                container.seek(int(target * av.time_base))
                frame = None
                for frame in container.decode(stream):
                    if frame.time is None or frame.time >= target:
                        break
                if frame is None:
                    break
                small = cv2.resize(vid.upright(frame, "gray"), (9, 8), interpolation=cv2.INTER_AREA).astype(int)
                hashes.append((small[:, 1:] > small[:, :-1]).ravel())
        except av.error.FFmpegError:
            pass  # damaged or not seekable: what there is has to do
    return np.array(hashes, bool).reshape(-1, 64)


def is_same_video(one: np.ndarray, duration_s: float, two: np.ndarray, other_s: float) -> bool:
    """Do two fingerprints show one video, encoded or scaled twice?"""
    if len(one) < NUM_HASHES or len(two) < NUM_HASHES:
        return False
    if abs(duration_s - other_s) > SAME_LENGTH * max(duration_s, other_s):
        return False
    return bool(np.median((one != two).sum(1)) <= MAX_BITS)


def _write_csv(path: Path, columns: list[str], rows: Sequence[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, lambda file: file.write(text.getvalue().encode("utf-8", "backslashreplace")))
