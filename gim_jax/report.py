"""One self-contained HTML page about a labelling or a quickstart folder: pictures and figures inside, no network.

Everything shown is read from the files that the stages left: manifests and example pairs of the labels, metrics of
the training, results of the evaluation. What is missing is left out.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure

from gim_jax import __version__, image, viz
from gim_jax.data import records
from gim_jax.data.tfrecord import write_atomic

MAX_PICTURE_WIDTH = 1200
MAX_VIDEOS_SHOWN = 12


def write_report(folder: str | Path) -> Path:
    """Write `<folder>/report.html` and return its path.

    Args:
      folder: a labelling folder (`*.json` manifests) or a quickstart folder (`labels/`, `train/`, `eval/`).

    Raises:
      ValueError where the folder holds neither.
    """
    folder = Path(folder)
    labels = folder / "labels" if (folder / "labels").is_dir() else folder
    videos = [video_section(manifest) for manifest in manifests(labels)]
    failed = [line for path in sorted(labels.glob("failed*.json")) for line in read_json(path)]
    if not videos and not failed:
        raise ValueError(f"{folder}: no labelling results in it, expected <video>.json manifests")
    summary = read_json(folder / "quickstart.json") or {}
    results = {name: read_json(folder / "eval" / f"{name}.json") for name in ("untrained", "trained", "rootsift")}
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("gim_jax", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
    text = page.render(
        title="quickstart" if summary else "labels",
        version=__version__,
        summary=summary,
        videos=videos[:MAX_VIDEOS_SHOWN],
        num_videos=len(videos),
        num_pairs=sum(video["row"]["pairs"] for video in videos),
        failed=failed,
        reach=reach_figure([video["row"] for video in videos]),
        accuracy=read_json(folder / "accuracy.json"),
        curves=curves_figure(folder / "train" / "metrics.jsonl"),
        results={name: result for name, result in results.items() if result},
        matched=[picture_uri(path) for path in sorted((folder / "eval").glob("*.jpg"))],
    )
    write_atomic(folder / "report.html", lambda file: file.write(text.encode()))
    return folder / "report.html"


def manifests(labels: Path) -> list[Path]:
    return sorted(path for path in labels.glob("*.json") if len(path.stem) == 16)


def video_section(manifest: Path) -> dict:
    """The manifest row of one video and its pictures."""
    row = json.loads(manifest.read_text())
    examples = manifest.with_suffix(".examples")
    pairs = [records.decode(data) for data in records.read_tfrecord(examples)] if examples.is_file() else []
    frames = manifest.with_suffix(".jpg")
    return {
        "row": row,
        "seconds": read_json(manifest.with_suffix(".time.json")) or {},
        "frames": picture_uri(frames) if frames.is_file() else None,
        "pairs": [example_picture(pair) for pair in pairs],
        "lost": sorted(row["lost"], key=lambda stretch: -stretch["frames"])[:8],
    }


def example_picture(pair: records.PairRecord) -> dict:
    """Matches over the two frames; green are direct ones, from yellow to red the longer chains."""
    drawn = viz.draw_matches(
        image.decode_image(pair.image0, "image0"),
        image.decode_image(pair.image1, "image1"),
        pair.correspondences[:, :2],
        pair.correspondences[:, 2:],
        conf=1.0 / pair.hops,
    )
    chained = int((pair.hops > 1).sum())
    kind = "direct" if not chained else f"{chained} of them propagated"
    caption = f"{pair.interval} frames apart: {len(pair.hops)} correspondences, {kind}"
    return {"caption": caption, "uri": array_uri(drawn)}


def reach_figure(rows: list[dict]) -> str | None:
    """Two panels: correspondences per pair, and saved pairs, against the distance in frames."""
    kept = [(stage, row["every_frames"]) for row in rows for stage in row["stages"] if stage["stage"] == "kept"]
    if not kept:
        return None
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    direct = [
        (stage["step"] * row["every_frames"], stage["median"])
        for row in rows
        for stage in row["stages"]
        if stage["stage"] == "direct" and stage["correspondences"]
    ]
    left.plot(*zip(*direct), "o", color="tab:gray", label="direct", alpha=0.6) if direct else None
    left.plot(*zip(*[(stage["step"] * n, stage["median"]) for stage, n in kept]), "o", color="tab:blue",
              label="kept, propagated and merged", alpha=0.8)  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="frames apart", ylabel="correspondences, median of the pairs")
    for minimum in sorted({row["min_matches"] for row in rows}):
        left.axhline(minimum, color="tab:red", lw=0.8, ls="--")
    left.legend(fontsize=8)
    saved: dict[int, int] = {}
    for row in rows:
        for step, number in row["saved_by_step"].items():
            saved[int(step) * row["every_frames"]] = saved.get(int(step) * row["every_frames"], 0) + number
    frames = sorted(saved)
    right.bar([str(f) for f in frames], [saved[f] for f in frames], color="tab:green")
    right.set(xlabel="frames apart", ylabel="pairs saved (farthest of each start)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    ticks = sorted({stage["step"] * n for stage, n in kept} | {x for x, _ in direct})
    left.set_xticks(ticks, [str(t) for t in ticks])
    left.minorticks_off()
    return figure_uri(figure)


def curves_figure(path: Path) -> str | None:
    """Every scalar whose name begins with `loss`, against the step, thin as logged and thick as a running mean."""
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
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
    return "data:image/jpeg;base64," + base64.b64encode(image.encode_jpeg(rgb, 85)).decode()


def picture_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


def read_json(path: Path):
    """The content of a JSON file, None where there is none."""
    return json.loads(path.read_text()) if path.is_file() else None
