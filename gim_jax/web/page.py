"""The page itself, made of gradio's parts (extra `web`). It loads nothing from the internet and sends nothing there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax import geometry, viz
from gim_jax.image import read_image, resize, size_of, target_size
from gim_jax.matchers import Matcher
from gim_jax.tasks import load_extra, panorama
from gim_jax.web import pair
from gim_jax.web.labels import LabelSet

FITS = ("F", "H")
PICTURE, MAX_CANVAS = 800, 2400  # px: the longer side of an image in the panorama, and of the panorama
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # gradio's own come from the internet


def look(matcher: Matcher, image0: Any, image1: Any, threshold_px: float) -> tuple[str, str, list]:
    """Match two images and show what came out.

    Args:
      image0, image1: as `gim_jax.match` takes them. threshold_px: inlier distance of F and H.

    Returns:
      the picture as HTML (the inliers of F where there is one, else of H, else all matches); a table of numbers and
      seconds as HTML; pictures [h, w, 3] uint8 with captions: the panorama and the overlay of the homography, and the
      dense warp of matchers that have one.
    """
    images = read_image(image0), read_image(image1)
    warp, rows = None, []
    started = time.perf_counter()
    dense = matcher.info.family == "dkm" and not matcher.info.resize.get("aspect")
    if dense:
        matches, warp = matcher.dense(*images)  # type: ignore[attr-defined]
    else:
        matches = matcher(*images)
    rows.append(["matches", len(matches), f"{time.perf_counter() - started:.3f}"])
    fits = {}
    for kind, words in zip(FITS, ("agree with one epipolar geometry (F)", "agree with one homography (H)")):
        started = time.perf_counter()
        fits[kind] = matches.fit(kind, threshold_px=threshold_px)
        found = fits[kind].reason or int(fits[kind].inliers.sum())
        rows.append([words, found, f"{time.perf_counter() - started:.3f}"])
    F, H = (fits[kind].model for kind in FITS)
    keep = next((fits[kind].inliers for kind in FITS if fits[kind].model is not None), np.ones(len(matches), bool))
    started, pictures = time.perf_counter(), []
    if H is not None:
        try:
            titles = "both images in the frame of image 1", "image 0 (red) laid onto image 1 (cyan)"
            pictures += zip(_panorama(images, H), titles)
        except ValueError as error:
            rows.append(["panorama", str(error), ""])
    if warp is not None:
        pictures.append((viz.draw_warp(*images, warp), "image 0, and image 1 warped into it where it is certain"))
    svg = pair.draw(*images, matches.kpts0[keep], matches.kpts1[keep], matches.conf[keep], F, H)
    rows.append(["pictures", len(pictures) + 1, f"{time.perf_counter() - started:.3f}"])
    return svg, pair.table(["", "number", "seconds"], rows, (1,)), pictures


def _panorama(images: tuple[np.ndarray, ...], H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `panorama.panorama` of the images made smaller, which is what a page has room for."""
    small, scalings = [], []
    for rgb in images:
        size = target_size(size_of(rgb), long_side=PICTURE, upscale=False)
        small.append(resize(rgb, size))
        scalings.append(geometry.scaling_homography(np.divide(size, size_of(rgb))))
    return panorama.panorama(small[0], small[1], scalings[1] @ H @ np.linalg.inv(scalings[0]), MAX_CANVAS)


def build(matchers: Mapping[str, Matcher], labels: LabelSet | None = None) -> Any:
    """Return the page as `gradio.Blocks`; `serve` opens it.

    Args:
      matchers: name -> loaded matcher, the first is chosen at first.
      labels: a second tab browses them.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    gr = load_extra("gradio", "web")

    def match(image0, image1, name, threshold):
        if image0 is None or image1 is None:
            raise gr.Error("Two images are needed.", print_exception=False)
        try:
            svg, numbers, pictures = look(matchers[name], image0, image1, threshold)
        except ValueError as error:
            text = str(error)
            for path in (image0, image1):
                text = text.replace(path, Path(path).name)
            raise gr.Error(text, print_exception=False) from error
        return svg, numbers, pair.figures(pictures)

    with gr.Blocks(title="gim-jax", analytics_enabled=False) as page:
        with gr.Tab("Match"):
            with gr.Row():
                how = {"type": "filepath", "sources": ["upload", "webcam", "clipboard"], "height": 260}
                how["webcam_options"] = gr.WebcamOptions(mirror=False)  # a mirror image matches no picture of the scene
                inputs = [gr.Image(label=f"image {side}", elem_id=f"image{side}", **how) for side in (0, 1)]
                for part in inputs:  # the file as it is: gradio would turn one that is no image into a nameless error
                    part.preprocess = lambda payload: payload and payload.path
            with gr.Row():
                name = gr.Dropdown(list(matchers), value=next(iter(matchers)), label="matcher")
                threshold = gr.Slider(0.5, 10, value=1, step=0.5, label="inlier distance, px")
                button = gr.Button("Match", variant="primary", elem_id="run")
            picture = gr.HTML(elem_id="picture")
            numbers = gr.HTML(elem_id="numbers")
            warps = gr.HTML(elem_id="warps")
            button.click(match, [*inputs, name, threshold], [picture, numbers, warps])
        if labels is not None:
            with gr.Tab("Labels"):
                _browse(gr, page, labels)
    return page


def _browse(gr: Any, page: Any, labels: LabelSet) -> None:
    """Add the browser of a label set."""

    def show_video(name):
        choices = labels.choices(name) if name else []
        first = choices[0][1] if choices else None
        return gr.Dropdown(choices, value=first, label=f"pair ({len(choices)})"), *show_pair(name, first)

    def show_pair(name, index):
        if not name:
            return "", "", ""
        shown = "" if index is None else labels.pair(name, index)
        return labels.time_line(name, index), shown, labels.tables(name)

    names = [(row["name"], stem) for stem, row in labels.rows.items()]
    gr.HTML(labels.overview(), elem_id="overview")
    with gr.Row():
        video = gr.Dropdown(names, value=names[0][1] if names else None, label="video", elem_id="video")
        chosen = gr.Dropdown([], label="pair", elem_id="pair")
    outputs = [chosen, *(gr.HTML(elem_id=name) for name in ("line", "shown", "about"))]
    video.input(show_video, video, outputs)
    chosen.input(show_pair, [video, chosen], outputs[1:])
    page.load(show_video, video, outputs)


def serve(page: Any, host: str, port: int) -> Any:
    """Serve a page of `build` and return at once; `page.block_thread()` waits, `page.close()` ends it."""
    gr = load_extra("gradio", "web")
    head = f"<style>{pair.STYLE}</style><script>{pair.SCRIPT}</script>"
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        head=head,
        theme=gr.themes.Default(**FONTS),
    )
    return page
