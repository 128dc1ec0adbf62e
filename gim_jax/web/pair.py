"""Two images side by side as SVG; `pair.js` draws the epipolar line of the point under the pointer."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import image, viz

SCRIPT, STYLE = ((Path(__file__).parent / name).read_text() for name in ("pair.js", "pair.css"))
HEIGHT = 540  # units of the picture; both images are so high
GAP = 8
QUALITY = 88  # of the JPEGs
MAX_POINTS = 5000  # of the matches that the pointer finds


def draw(
    image0: np.ndarray,
    image1: np.ndarray,
    kpts0: np.ndarray,
    kpts1: np.ndarray,
    conf: np.ndarray,
    F: np.ndarray | None = None,
    H: np.ndarray | None = None,
) -> str:
    """Draw two images and the lines between their matches.

    Args:
      image0, image1: [H, W, 3] uint8 RGB. kpts0, kpts1: [M, 2] px in them. conf: [M] in [0, 1], red to green.
      F: [3, 3], x1^T F x0 = 0: the pointer gets its epipolar line. H: [3, 3], 0 -> 1: and the point it is mapped to.

    Returns:
      HTML: the SVG, and a line of text that the script fills.
    """
    views: list[dict[str, Any]] = []
    parts, left = [], 0
    for rgb in (image0, image1):
        picture, factor = viz.fit_height(rgb, HEIGHT)
        width = picture.shape[1]
        views.append({"left": left, "factor": factor.tolist(), "size": list(image.size_of(rgb))})
        parts.append(
            f'<image x="{left}" y="0" width="{width}" height="{HEIGHT}" href="{viz.data_uri(picture, QUALITY)}"/>'
        )
        left += width + GAP
    ends = [to_picture(points, view) for points, view in zip((kpts0, kpts1), views)]
    colors = viz.confidence_colors(np.asarray(conf, np.float64))
    for index in viz.spread(len(kpts0), viz.MAX_LINES):
        (x0, y0), (x1, y1) = ends[0][index], ends[1][index]
        color = "#" + bytes(colors[index]).hex()
        parts.append(f'<line class="match" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{color}"/>')
    parts += [f'<line class="{name}" hidden=""/>' for name in ("epipolar", "nearest")]
    parts += [f'<circle class="{name}" r="6" hidden=""/>' for name in ("cursor", "mark side0", "mark side1")]
    parts.append('<path class="mapped" d="M-8 0H8M0-8V8" hidden=""/>')
    chosen = viz.spread(len(kpts0), MAX_POINTS)
    about = {
        "height": HEIGHT,
        "views": views,
        "points": np.round(np.concatenate([kpts0, kpts1], 1)[chosen].astype(float), 2).tolist(),
        "F": None if F is None else np.asarray(F, float).tolist(),
        "H": None if H is None else np.asarray(H, float).tolist(),
    }
    box = f'viewBox="0 0 {left - GAP} {HEIGHT}"'
    text = html.escape(json.dumps(about, allow_nan=False), quote=True)
    hint = "Move over an image. A click holds the point; another one lets it go."
    return f'<svg class="gim-pair" {box} data-pair="{text}">{"".join(parts)}</svg><div class="gim-read">{hint}</div>'


def to_picture(points: np.ndarray, view: dict[str, Any]) -> np.ndarray:
    """Map [..., 2] px of an image to the units of the picture, where pixels have their corners at whole numbers."""
    return (np.asarray(points, np.float64) + 0.5) * view["factor"] + [view["left"], 0]


def table(heading: list[str], rows: list[list[Any]], text_columns: tuple[int, ...] = ()) -> str:
    """Return an HTML table; cells are escaped, the first column and `text_columns` are aligned left."""

    def line(cells: list[Any], tag: str) -> str:
        marks = [' class="text"' if index in text_columns else "" for index in range(len(cells))]
        inside = "".join(f"<{tag}{mark}>{html.escape(str(cell))}</{tag}>" for cell, mark in zip(cells, marks))
        return f"<tr>{inside}</tr>"

    return f'<table class="gim-table">{line(heading, "th")}{"".join(line(row, "td") for row in rows)}</table>'


def figures(pictures: list[tuple[np.ndarray, str]]) -> str:
    """Return pictures [H, W, 3] uint8 beside each other with their captions below, as HTML."""
    parts = [
        f'<figure><img src="{viz.data_uri(picture, QUALITY)}"/><figcaption>{html.escape(title)}</figcaption></figure>'
        for picture, title in pictures
    ]
    return f'<div class="gim-figures">{"".join(parts)}</div>'
