"""One self-contained HTML page about a labelling or a quickstart folder: pictures and figures inside, no network.

Everything shown is read from the files that the stages left: manifests, records and example pairs of the labels,
metrics of the training, results of the evaluation. What is missing is left out.
"""

from __future__ import annotations

import base64
import collections
import io
import re
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from gim_jax import __version__, image, viz
from gim_jax.data import records
from gim_jax.data.json_file import read_json
from gim_jax.data.tfrecord import write_atomic

MAX_PICTURE_WIDTH = 1200
SHEET_HEIGHT = 150  # px of a pair in a contact sheet
MAX_VIDEOS_SHOWN = 12  # with pictures
MAX_VIDEOS_LISTED = 1000
HISTOGRAMS = {  # of the manifest: title, unit, and what the number is
    "interval_s": ("Interval", "s", "Time between the two frames of a saved pair."),
    "overlap": (
        "Overlap", "", "Share of the frame inside the convex hull of the correspondences, the smaller of both frames.",
    ),
    "rotation_deg": (
        "Rotation", "°", "Turn of the camera between the frames, from the fitted geometry. The focal length of a video "
        "is not known; 1.2 times the longer side is assumed, so take the angle as a rough one.",
    ),
    "parallax_deg": (
        "Parallax", "°", "Median angle between the two rays to a point once the turn is taken out: what depth makes. "
        "Near 0 the camera only turned or sees a plane.",
    ),
    "matches": ("Matches", "", "Correspondences of a saved pair."),
}  # fmt: skip
COLORS = ("#d1495b", "#edae49", "#7a5195", "#00798c", "#8d6a4f", "#ef7674", "#5c6b73", "#c08497")  # of reasons
ENDS = "the video ends"


def write_report(folder: str | Path) -> Path:
    """Write `<folder>/report.html` and return its path.

    Args:
      folder: a labelling folder (`*.json` manifests) or a quickstart folder (`labels/`, `train/`, `eval/`).

    Raises:
      ValueError where the folder holds neither.
    """
    folder = Path(folder)
    paths, rows, failed = read_labels(folder)
    times = [read_json(path.with_suffix(".time.json")) or {} for path in paths]
    colors = reason_colors(rows)
    summary = read_json(folder / "quickstart.json") or {}
    results = {name: read_json(folder / "eval" / f"{name}.json") for name in ("untrained", "trained", "rootsift")}
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("gim_jax", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
    text = page.render(
        title="quickstart" if summary else "labels",
        version=__version__,
        summary=summary,
        totals=totals(rows, times),
        rows=[row | {"timeline": timeline(row, colors)} for row in rows[:MAX_VIDEOS_LISTED]],
        videos=[
            video_section(path, row, time, colors)
            for path, row, time in list(zip(paths, rows, times))[:MAX_VIDEOS_SHOWN]
        ],
        failed=failed,
        lost=lost_reasons(rows, colors),
        histograms=histogram_bars(rows),
        sheets=contact_sheets(paths, rows),
        stages=stage_seconds(times),
        reach=reach_figure(rows),
        accuracy=read_json(folder / "accuracy.json"),
        curves=curves_figure(folder / "train"),
        results={name: result for name, result in results.items() if result},
        matched=[picture_uri(path) for path in sorted((folder / "eval").glob("*.jpg"))],
    )
    write_atomic(folder / "report.html", lambda file: file.write(text.encode()))
    return folder / "report.html"


def labels_folder(folder: str | Path) -> Path:
    """The labelling folder itself, or that in a quickstart folder."""
    return Path(folder) / "labels" if (Path(folder) / "labels").is_dir() else Path(folder)


def read_labels(folder: str | Path) -> tuple[list[Path], list[dict], list[str]]:
    """Read the paths and rows of the manifests of a folder (`write_report`), and the lines about failed videos.

    Raises:
      ValueError where there is neither, and naming a damaged file.
    """
    labels = labels_folder(folder)
    paths = sorted(path for path in labels.glob("*.json") if len(path.stem) == 16)
    failed = [line for path in sorted(labels.glob("failed*.json")) for line in read_json(path) or []]
    if not paths and not failed:
        raise ValueError(f"{folder}: no labelling results in it, expected <video>.json manifests")
    rows = [read_json(path) for path in paths]
    for path, row in zip(paths, rows):
        if not isinstance(row, dict) or "stages" not in row:
            raise ValueError(f"{path}: not the manifest of a labelled video")
    return paths, rows, failed


def totals(rows: list[dict], times: list[dict]) -> dict:
    """What all videos together hold, and the yield from stage to stage: (what, number, share of the one before)."""
    hours = sum(row["duration_s"] for row in rows) / 3600
    machine_s = machine_seconds(times)
    timed_s = sum(row["duration_s"] for row, time in zip(rows, times) if "began" in time)
    direct = [stage for row in rows for stage in row["stages"] if stage["stage"] == "direct"]
    nearest = [min((s for s in row["stages"] if s["stage"] == "direct"), key=lambda s: s["step"]) for row in rows]
    steps = [
        ("frames sampled", sum(row["sampled_frames"] for row in rows)),
        ("with a next frame to match", sum(stage["pairs"] for stage in nearest)),
        ("that robust fitting confirms a motion to", sum(stage["fitted"] for stage in nearest)),
        ("that start a training pair", sum(row["pairs"] for row in rows)),
    ]
    matches = [stage["labellers"].values() for stage in direct]
    labels = [
        ("matches of neighbouring frames", sum(one["matches"] for stage in matches for one in stage)),
        ("confirmed by robust fitting", sum(one["confirmed"] for stage in matches for one in stage)),
        (
            "left when near-duplicates of labellers are thinned",
            sum(one["labels"] for stage in matches for one in stage),
        ),
    ]
    return {
        "videos": len(rows),
        "hours": hours,
        "pairs": steps[-1][1],
        "correspondences": sum(row["correspondences"] for row in rows),
        "speed": timed_s / machine_s if machine_s else None,
        "yields": [
            [(what, num, num / before if before else None) for (what, num), (_, before) in zip(part, part[:1] + part)]
            for part in (steps, labels)
        ],
    }


def machine_seconds(times: list[dict]) -> float:
    """Time during which machines labelled: workers side by side on one machine count once."""
    spans = collections.defaultdict(list)
    for time in times:
        if "began" in time:
            spans[time["host"]].append((time["began"], time["began"] + time["total"]))
    total = 0.0
    for host in spans.values():
        reached = float("-inf")
        for began, ended in sorted(host):
            total += max(ended - max(began, reached), 0.0)
            reached = max(reached, ended)
    return total


def stage_seconds(times: list[dict]) -> list[tuple[str, float, float]]:
    """(stage, seconds, share of all) over all videos, the longest first."""
    seconds: collections.Counter[str] = collections.Counter()
    for time in times:
        seconds.update({name: value for name, value in time.items() if name not in ("total", "host", "began")})
    whole = sum(seconds.values())
    return [(name, value, value / whole) for name, value in seconds.most_common() if whole]


def reason_kind(reason: str) -> str:
    """A reason without its numbers, which are other ones in every stretch."""
    return re.sub(r"\d[\d.]*", "n", reason)


def lost_reasons(rows: list[dict], colors: dict[str, str]) -> list[dict]:
    """Why sampled frames start no pair: each kind of reason with its frames, videos, share and color."""
    videos = collections.Counter(kind for row in rows for kind in {reason_kind(s["reason"]) for s in row["lost"]})
    whole = sum(row["sampled_frames"] for row in rows)
    return [
        {"reason": kind, "frames": num, "videos": videos[kind], "share": num / whole, "color": colors[kind]}
        for kind, num in frames_lost(rows).most_common()
    ]


def frames_lost(rows: list[dict]) -> collections.Counter[str]:
    """Sampled frames that start no pair, by the kind of reason."""
    frames: collections.Counter[str] = collections.Counter()
    for row in rows:
        for stretch in row["lost"]:
            frames[reason_kind(stretch["reason"])] += stretch["frames"]
    return frames


def reason_colors(rows: list[dict]) -> dict[str, str]:
    """A color for each kind of reason, the last one for all that are rare."""
    ranked = [kind for kind, _ in frames_lost(rows).most_common() if kind != ENDS]
    return {kind: COLORS[min(k, len(COLORS) - 1)] for k, kind in enumerate(ranked)} | {ENDS: "#b8bec4"}


def timeline(row: dict, colors: dict[str, str]) -> list[dict]:
    """Stretches of a video that start no pair: left end and width in percent of its length, color, words."""
    step_s = row["duration_s"] / max(row["sampled_frames"], 1)
    scale = 100 / max([row["duration_s"], *(stretch["to_s"] + step_s for stretch in row["lost"])], default=1)
    return [
        {
            "left": scale * stretch["from_s"],
            "width": scale * (stretch["to_s"] - stretch["from_s"] + step_s),
            "color": colors[reason_kind(stretch["reason"])],
            "text": f"{stretch['from_s']:.1f} to {stretch['to_s']:.1f} s: {stretch['reason']}",
        }
        for stretch in row["lost"]
    ]


def histogram_bars(rows: list[dict]) -> list[dict]:
    """The histograms of all rows together: title, text, and bars of (label, range, pairs, height in percent)."""
    out = []
    for name, (title, unit, text) in HISTOGRAMS.items():
        parts = [row["histograms"][name] for row in rows if row["pairs"]]
        if not parts:
            continue
        edges, counts = parts[0]["edges"], np.sum([part["counts"] for part in parts], 0).tolist()
        ends = [*(f"{edge:g}" for edge in edges[1:]), ""]
        ranges = [f"{low:g} to {high}{unit}" if high else f"{low:g}{unit} and more" for low, high in zip(edges, ends)]
        top = max(counts)
        short = [f"{edge / 1024:g}k" if edge >= 1024 else f"{edge:g}" for edge in edges]
        bars = [(label, text, num, 100 * num / top) for label, text, num in zip(short, ranges, counts)]
        out.append({"title": f"{title}{f', {unit}' if unit else ''}", "text": text, "bars": bars})
    return out


def video_section(manifest: Path, row: dict, seconds: dict, colors: dict[str, str]) -> dict:
    """The manifest row of one video and its pictures."""
    examples = manifest.with_suffix(".examples")
    pairs = [records.decode(data) for data in records.read_tfrecord(examples)] if examples.is_file() else []
    frames = manifest.with_suffix(".jpg")
    return {
        "row": row,
        "seconds": seconds,
        "frames": picture_uri(frames) if frames.is_file() else None,
        "pairs": [example_picture(pair) for pair in pairs],
        "timeline": timeline(row, colors),
        "histograms": histogram_bars([row]),
        "sheets": contact_sheets([manifest], [row]),
    }


def contact_sheets(paths: list[Path], rows: list[dict], num: int = 3) -> dict[str, list[dict]]:
    """Pictures of the pairs with most, middling and fewest correspondences of the rows: kind -> (caption, uri)."""
    entries = {kind: [(e, path, row) for path, row in zip(paths, rows) for e in row["shown"][kind]]
               for kind in ("best", "median", "worst")}  # fmt: skip
    middle = np.median([entry["matches"] for entry, _, _ in entries["median"]]) if entries["median"] else 0
    ranks = {
        "best": lambda entry: -entry["matches"],
        "median": lambda entry: abs(entry["matches"] - middle),
        "worst": lambda entry: entry["matches"],
    }
    sheets = {}
    for kind, rank in ranks.items():
        chosen = sorted(entries[kind], key=lambda item: rank(item[0]))[:num]
        sheets[kind] = [picture for item in chosen if (picture := _sheet_picture(*item)) is not None]
    return {kind: pictures for kind, pictures in sheets.items() if pictures}


def _sheet_picture(entry: dict, manifest: Path, row: dict) -> dict | None:
    """One pair of a contact sheet, None where the records are no longer there."""
    path = manifest.with_suffix(".tfrecord")
    if not path.is_file():
        return None
    pair = records.decode(records.TFRecordSource([path])[entry["index"]])
    caption = (
        f"{row['name']}, {pair.time0_s:.1f} and {pair.time1_s:.1f} s: {entry['matches']} matches, "
        f"overlap {100 * entry['overlap']:.0f} %, turn {entry['rotation_deg']:.1f}°, "
        f"parallax {entry['parallax_deg']:.1f}°"
    )
    return {"caption": caption, "uri": array_uri(_drawn(pair, SHEET_HEIGHT, 60))}


def example_picture(pair: records.PairRecord) -> dict:
    """Matches over the two frames; green are direct ones, from yellow to red the longer chains."""
    chained = int((pair.hops > 1).sum())
    kind = "direct" if not chained else f"{chained} of them propagated"
    caption = f"{pair.interval} frames apart: {len(pair.hops)} correspondences, {kind}"
    return {"caption": caption, "uri": array_uri(_drawn(pair, 540, viz.MAX_LINES))}


def _drawn(pair: records.PairRecord, height: int, max_lines: int) -> np.ndarray:
    return viz.draw_matches(
        image.decode_image(pair.image0, "image0"),
        image.decode_image(pair.image1, "image1"),
        pair.correspondences[:, :2],
        pair.correspondences[:, 2:],
        conf=1.0 / pair.hops,
        height=height,
        max_lines=max_lines,
    )


def sample_seconds(row: dict) -> float:
    """Seconds from a sampled frame of a video to the next."""
    return row["every_seconds"] or row["every_frames"] / (row["fps"] or 25)


def apart(row: dict, step: int) -> str:
    """How far frames `step` samples apart are, in frames, or in seconds where the video was sampled by time."""
    return f"{step * row['every_seconds']:.2f} s" if row["every_seconds"] else str(step * row["every_frames"])


def reach_figure(rows: list[dict]) -> str | None:
    """Two panels: correspondences per pair, and saved pairs, against the distance.

    It is in frames, or in seconds where a video was sampled by time.
    """
    timed = any(row["every_seconds"] for row in rows)
    unit = "seconds apart" if timed else "frames apart"

    def distance(row: dict, step: int | str) -> float:
        return round(int(step) * sample_seconds(row), 2) if timed else int(step) * row["every_frames"]

    kept = [(distance(row, s["step"]), s["median"]) for row in rows for s in row["stages"] if s["stage"] == "kept"]
    if not kept:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    direct = [
        (distance(row, stage["step"]), stage["median"])
        for row in rows
        for stage in row["stages"]
        if stage["stage"] == "direct" and stage["correspondences"]
    ]
    left.plot(*zip(*direct), "o", color="tab:gray", label="direct", alpha=0.6) if direct else None
    left.plot(*zip(*kept), "o", color="tab:blue", label="kept, propagated and merged", alpha=0.8)
    left.set(xscale="log", yscale="log", xlabel=unit, ylabel="correspondences, median of the pairs")
    for minimum in sorted({row["min_matches"] for row in rows}):
        left.axhline(minimum, color="tab:red", lw=0.8, ls="--")
    left.legend(fontsize=8)
    saved: collections.Counter[float] = collections.Counter()
    for row in rows:
        saved.update({distance(row, step): number for step, number in row["saved_by_step"].items()})
    right.bar([f"{x:g}" for x in sorted(saved)], [saved[x] for x in sorted(saved)], color="tab:green")
    right.set(xlabel=unit, ylabel="pairs saved (farthest of each start)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    ticks = sorted({x for x, _ in kept + direct})
    left.set_xticks(ticks, [f"{x:g}" for x in ticks])
    left.minorticks_off()
    return figure_uri(figure)


def curves_figure(workdir: Path) -> str | None:
    """Every scalar whose name begins with `loss`, against the step, thin as logged and thick as a running mean."""
    from gim_jax.train.writers import read_metrics  # brings TensorBoard

    lines = read_metrics(workdir)
    names = sorted({name for line in lines for name in line if name.startswith("loss")})
    if not names:
        return None
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names):
        steps, values = zip(*[(line["step"], line[name]) for line in lines if name in line])
        width = max(len(values) // 30, 1)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps, values, lw=0.5, color="tab:blue", alpha=0.4)
        axes.plot(steps[width - 1 :], smooth, lw=1.6, color="tab:blue")
        axes.set(title=name, xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure_uri(figure)


def figure_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def array_uri(rgb: np.ndarray) -> str:
    if rgb.shape[1] > MAX_PICTURE_WIDTH:
        scale = MAX_PICTURE_WIDTH / rgb.shape[1]
        rgb = image.resize(rgb, (MAX_PICTURE_WIDTH, max(round(rgb.shape[0] * scale), 1)))
    return viz.data_uri(rgb, 85)


def picture_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
