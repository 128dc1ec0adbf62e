"""What `gim-jax label` left in a folder, as HTML: videos, their pairs on a time line, chains, reasons of refusal."""

from __future__ import annotations

import html
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import image, report, viz
from gim_jax.data import records
from gim_jax.data.tfrecord import TFRecordSource
from gim_jax.web import pair

WIDTH, ARCS, BAND = 1200, 150, 14  # units of a time line: its width, the height above it, that of the refused stretches
MAX_PAIRS = 4000  # of a video in its list; more are left out, and the page says so
MAX_THUMBNAILS = 24


class LabelSet:
    """A labelling folder.

    Attributes:
      rows: video identity (the stem of its files) -> manifest.
      failed: lines about videos that could not be labelled.

    Raises:
      ValueError: a folder without labelling results.
    """

    def __init__(self, folder: str | Path):
        paths, rows, self.failed = report.read_labels(folder)
        self.folder = report.labels_folder(folder)
        self.rows: dict[str, dict[str, Any]] = {path.stem: row for path, row in zip(paths, rows)}

    def pairs(self, video: str) -> list[dict[str, Any]]:
        """Return what is known of every pair of a video, by start frame."""
        path = self.folder / f"{video}.tfrecord"
        return _read_pairs(path, path.stat().st_mtime_ns) if path.is_file() else []

    def record(self, video: str, index: int) -> records.PairRecord:
        """Return a pair by its place in the file."""
        return records.decode(TFRecordSource([self.folder / f"{video}.tfrecord"])[index])

    def overview(self) -> str:
        """Return the table of videos, and those that failed."""
        rows = []
        for row in self.rows.values():
            farthest = max(map(int, row["saved_by_step"]), default=0)
            lost = sum(stretch["frames"] for stretch in row["lost"])
            size, seconds = "x".join(map(str, row["size"])), f"{row['duration_s']:.1f}"
            rows.append([row["name"], seconds, size, row["sampled_frames"], row["pairs"], row["correspondences"]])
            rows[-1] += [
                report.apart(row, farthest) if farthest else "-",
                f"{100 * lost / max(row['sampled_frames'], 1):.0f} %",
                row["licence"],
            ]
        head = ["video", "seconds", "size", "sampled frames", "pairs", "correspondences", "apart, farthest"]
        text = pair.table([*head, "frames without a pair", "licence"], rows)
        return text + "".join(f'<div class="gim-lost">{html.escape(line)}</div>' for line in self.failed)

    def tables(self, video: str) -> str:
        """Return the reasons of refusal, the stages and the notes of a video."""
        row = self.rows[video]
        stages = [
            [
                stage["stage"],
                report.apart(row, stage["step"]),
                stage["pairs"],
                stage["kept"] if stage["stage"] == "kept" else stage["fitted"],
                stage["correspondences"],
                stage.get("median", ""),
                f"{100 * stage['propagated_share']:.0f} %" if stage["stage"] == "kept" else "",
            ]
            for stage in row["stages"]
        ]
        lost = [[f"{r['from_s']:.1f} to {r['to_s']:.1f}", r["frames"], r["reason"]] for r in row["lost"]]
        return "".join(
            [
                *(f'<div class="gim-lost">{html.escape(note)}</div>' for note in row["notes"]),
                pair.table(["without a pair, seconds", "sampled frames", "reason"], lost, (2,)) if lost else "",
                pair.table(
                    ["labels", "apart", "pairs", "kept", "correspondences", "median of a pair", "propagated"],
                    stages,
                ),
            ]
        )

    def time_line(self, video: str, chosen: int | None = None) -> str:
        """Draw a video as an SVG: an arc for each pair, a bar for each stretch without one; and say so below it."""
        row, found = self.rows[video], self.pairs(video)
        end = max([row["duration_s"], *(p["time1_s"] for p in found), *(r["to_s"] for r in row["lost"])]) or 1.0

        def x(seconds: float) -> float:
            return 10 + (WIDTH - 20) * seconds / end

        longest = max((p["time1_s"] - p["time0_s"] for p in found), default=1.0) or 1.0
        parts = []
        for p in found[:MAX_PAIRS]:
            x0, x1 = x(p["time0_s"]), x(p["time1_s"])
            top = ARCS - 8 - 2 * (ARCS - 16) * (p["time1_s"] - p["time0_s"]) / longest  # a quadratic curve reaches half
            hue = 120 / max(p["max_hops"], 1)
            style = 'stroke="#1d4ed8" stroke-width="4"' if p["index"] == chosen else f'stroke="hsl({hue:.0f} 80% 42%)"'
            curve = f"M{x0:.1f} {ARCS - 8}Q{(x0 + x1) / 2:.1f} {top:.1f} {x1:.1f} {ARCS - 8}"
            tip = f"<title>{html.escape(describe(p))}</title>"
            parts.append(f'<path class="arc" d="{curve}" fill="none" {style}>{tip}</path>')
        step = report.sample_seconds(row) / 2
        for r in row["lost"]:
            x0, x1 = x(max(r["from_s"] - step, 0)), x(min(r["to_s"] + step, end))
            tip = f"<title>{html.escape(r['reason'])}</title>"
            parts.append(
                f'<rect class="lost" x="{x0:.1f}" y="{ARCS}" width="{max(x1 - x0, 2):.1f}" height="{BAND}" '
                f'fill="#ea580c">{tip}</rect>'
            )
        base = f'<line x1="10" x2="{WIDTH - 10}" y1="{ARCS - 8}" y2="{ARCS - 8}" stroke="currentColor"/>'
        ticks = "".join(
            f'<text x="{x(second):.1f}" y="{ARCS + BAND + 14}" font-size="12" text-anchor="middle" '
            f'fill="currentColor">{second:g} s</text>'
            for second in np.linspace(0, end, 9).round(1)
        )
        box = f'viewBox="0 0 {WIDTH} {ARCS + BAND + 20}"'
        words = (
            "Arcs: the saved pairs, from a start frame to its farthest partner, redder the longer the chain, blue the "
            "chosen one. Below: where no pair starts, and why (rest the pointer on it)."
        ) + (f" Of {len(found)} pairs the first {MAX_PAIRS} are shown." if len(found) > MAX_PAIRS else "")
        svg = f'<svg class="gim-time" width="100%" {box}>{base}{"".join(parts)}{ticks}</svg>'
        return f'{svg}<div class="gim-quiet">{words}</div>'

    def choices(self, video: str) -> list[tuple[str, int]]:
        """Return (words, place in the file) of the pairs of a video."""
        return [(describe(p), p["index"]) for p in self.pairs(video)[:MAX_PAIRS]]

    def pair(self, video: str, index: int) -> str:
        """Return a pair: its correspondences over both frames, its chains, and the frames they pass."""
        record = self.record(video, index)
        decoded = image.decode_image(record.image0, "image0"), image.decode_image(record.image1, "image1")
        kpts0, kpts1 = record.correspondences[:, :2], record.correspondences[:, 2:]
        F = record.F if record.F.any() else None
        hops, teachers = Counter(record.hops.tolist()), Counter(record.teacher.tolist())
        chains = [["matched directly" if n == 1 else f"chained over {n} pairs", num] for n, num in sorted(hops.items())]
        made = [[record.teachers[n], num] for n, num in sorted(teachers.items())]
        words = "" if F is not None else '<div class="gim-quiet">A homography binds this pair: no epipolar lines.</div>'
        return (
            pair.draw(*decoded, kpts0, kpts1, 1.0 / record.hops, F)
            + words
            + self.strip(video, record)
            + pair.table(["correspondences", "number"], chains)
            + pair.table(["made by", "number"], made)
        )

    def strip(self, video: str, record: records.PairRecord) -> str:
        """Show the sampled frames from one frame of a pair to the other, as far as other pairs of the set hold them."""
        between = {record.frame0: None}
        for p in self.pairs(video):
            if record.frame0 < p["frame0"] < record.frame1:
                between[p["frame0"]] = p["index"]
        between[record.frame1] = None
        numbers = sorted(between)
        figures = []
        for number in (numbers[i] for i in viz.spread(len(numbers), MAX_THUMBNAILS)):
            index = between[number]
            data = record.image1 if number == record.frame1 else record.image0
            if index is not None:
                data = self.record(video, index).image0
            rgb = image.decode_image(data, f"frame {number}")
            small = image.resize(rgb, (max(round(96 * rgb.shape[1] / rgb.shape[0]), 1), 96))
            figures.append(
                f'<figure><img src="{viz.data_uri(small, 80)}" alt="frame {number}">'
                f"<figcaption>frame {number}</figcaption></figure>"
            )
        return f'<div class="gim-strip">{"".join(figures)}</div>'


def describe(found: dict[str, Any]) -> str:
    """Say in one line what a pair is."""
    longest = found["max_hops"]
    chain = "direct" if longest == 1 else f"chains of up to {longest}"
    return (
        f"frames {found['frame0']} and {found['frame1']}, {found['interval']} apart: "
        f"{found['num']} correspondences, {chain}"
    )


@lru_cache(maxsize=8)
def _read_pairs(path: Path, stamp: int) -> list[dict[str, Any]]:
    """Read the frames and counts of all records of a file; `stamp` makes a changed file a new one."""
    found = []
    for index, payload in enumerate(TFRecordSource([path])):
        record = records.decode(payload)
        fields = ("frame0", "frame1", "time0_s", "time1_s", "interval")
        found.append({name: getattr(record, name) for name in fields})
        found[-1] |= {"index": index, "num": len(record.hops), "max_hops": int(record.hops.max(initial=1))}
    return sorted(found, key=lambda p: p["frame0"])
