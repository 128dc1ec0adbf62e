"""Render an evaluation set: image pairs of towns with known poses, in the text form of SuperGlue and ZEB."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from data_prep import render, town
from data_prep.folder import write_folder
from data_prep.ordered import ordered
from data_prep.truth import Truth

SCHEMA_VERSION = 1
FIRST_TOWN = 1000  # towns of an evaluation set are (seed, 1000), ...: never those of a video, (seed, 0), ...
NUM_VIEWS = 60  # views drawn of one walk, one every metre
OVERLAP_BINS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
MAX_ROTATION_DEG = 42.0
BASELINE_M = (0.4, 10.0)


def render_pairs(
    out_folder: str | Path,
    seed: int = 0,
    num_pairs: int = 100,
    size: tuple[int, int] = (640, 480),
    look: str | None = None,
    fov_deg: float = 65.0,
    progress: Callable[[int, int], None] | None = None,
    num_threads: int = 2,
) -> Path:
    """Write image pairs with ground truth: `images/*.jpg` and `pairs_with_gt.txt`.

    One line a pair: `name0 name1 rot0 rot1 K0(9) K1(9) T_0to1(16)`, names relative to the folder, rot 0, row-major,
    X1 = R X0 + t, OpenCV axes, metres, pixel centres at integers. Overlaps (the share of the surfaces of one image
    that the other sees, the smaller of both) are spread evenly over 0.2 to 0.8.

    Args:
      out_folder: a folder that does not exist, is empty, or holds the same set (then it is left as it is).
      seed: decides everything; no video shows these towns. num_pairs: one town per 25 pairs, at least two.
      size: (width, height). look: one of `data_prep.town.LOOKS`, or None = by the seed.
      progress: called with (images done, images in all).

    Returns:
      The folder. Raises ValueError for bad values and for a folder that holds something else.
    """
    width, height = size
    for name, value, good, wanted in (
        ("seed", seed, seed >= 0, "0 or more"),
        ("num_pairs", num_pairs, 1 <= num_pairs <= 10000, "1 to 10000"),
        ("size", size, 64 <= min(width, height) and max(width, height) <= 4096, "64 to 4096 px a side"),
        ("look", look, look is None or look in town.LOOKS, f"one of {', '.join(town.LOOKS)}"),
        ("fov_deg", fov_deg, 20 <= fov_deg <= 110, "20 to 110"),
    ):
        if not good:
            raise ValueError(f"render pairs: {name} is {value}, expected {wanted}")
    settings = {"schema_version": SCHEMA_VERSION, "seed": seed, "num_pairs": num_pairs, "size": [width, height]}
    settings |= {"look": look, "fov_deg": fov_deg}
    return write_folder(
        out_folder, settings, partial(write_pairs, settings=settings, progress=progress, num_threads=num_threads)
    )


def write_pairs(folder: Path, settings: dict, progress, num_threads: int):
    """Write the files of `render_pairs` into an existing folder."""
    (folder / "images").mkdir()
    num_towns = max(math.ceil(settings["num_pairs"] / 25), min(2, settings["num_pairs"]))
    share = np.diff(np.linspace(0, settings["num_pairs"], num_towns + 1).round().astype(int))
    shots = [views(settings, FIRST_TOWN + k) for k in range(num_towns)]
    chosen = [choose_pairs(shot, int(n), np.random.default_rng([*shot.town.seed, 8])) for shot, n in zip(shots, share)]
    images = sorted({(k, frame) for k, pairs in enumerate(chosen) for pair in pairs for frame in pair})
    names = {key: f"images/town{key[0]:03d}_{key[1]:03d}.jpg" for key in images}

    def draw(number: int):
        k, frame = images[number]
        picture = cv2.cvtColor(render.draw(shots[k], frame)[0], cv2.COLOR_RGB2BGR)
        return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    for number, jpeg in enumerate(ordered(draw, len(images), num_threads)):
        (folder / names[images[number]]).write_bytes(jpeg)
        if progress:
            progress(number + 1, len(images))
    lines = []
    for k, pairs in enumerate(chosen):
        T, K = shots[k].T_world_to_camera, " ".join(f"{v:.17g}" for v in shots[k].K.ravel())
        for a, b in pairs:
            T_0to1 = " ".join(f"{v:.17g}" for v in (T[b] @ np.linalg.inv(T[a])).ravel())
            lines.append(f"{names[k, a]} {names[k, b]} 0 0 {K} {K} {T_0to1}\n")
    (folder / "pairs_with_gt.txt").write_text("".join(lines))


def views(settings: dict, number: int) -> render.Shot:
    """Plan one town's views: a walk, the head turned anew at every metre, each picture with a light of its
    own.
    """
    seed = (settings["seed"], number)
    size = (settings["size"][0], settings["size"][1])
    shot = render.plan_shot(seed, settings["look"], size, settings["fov_deg"], NUM_VIEWS, 1.0, 1.0, 5)
    rng = np.random.default_rng([*seed, 7])
    turn = np.deg2rad(rng.uniform(-1, 1, (NUM_VIEWS, 3)) * (7, 20, 4))  # about the camera's x, y and z axes
    rotation = np.stack([cv2.Rodrigues(vector)[0] for vector in turn])
    shot.T_world_to_camera[:, :3] = rotation @ shot.T_world_to_camera[:, :3]
    shot.T_world_to_camera[:, :3, 3] += rng.uniform(-1, 1, (NUM_VIEWS, 3)) * (0.3, 0.25, 0.3)
    shot.gain[:] = np.exp2(rng.normal(0, 0.3, (NUM_VIEWS, 1))) * (1 + 0.04 * rng.standard_normal((NUM_VIEWS, 3)))
    return shot


def small_truth(shot: render.Shot) -> Truth:
    """Return the truth of pictures 160 px wide of a shot, walkers left out: overlaps are measured on it."""
    scale = 160 / shot.size[0]
    size = (160, max(int(round(shot.size[1] * scale)), 1))
    K = shot.K.copy()
    K[:2] *= scale
    K[:2, 2] += (scale - 1) / 2  # the image's corner stays where it is: (x + 0.5) scale - 0.5
    T, quads = shot.T_world_to_camera, shot.town.quads

    def ids(frame: int) -> np.ndarray:
        return render.surface_ids(quads, T[frame], K, size) + 1

    return Truth(np.repeat(K[None], len(T), 0), T, np.zeros(len(T), int), size, 1.0, {}, quads, ids)


def mutual_overlap(small: Truth, frame0: int, frame1: int) -> float:
    """Return the share of the surfaces of one view that the other sees, the smaller of both: 0 to 1."""
    return min(small.overlap(frame0, frame1, 6), small.overlap(frame1, frame0, 6))


def choose_pairs(shot: render.Shot, number: int, rng) -> list[tuple[int, int]]:
    """Choose pairs of views whose overlaps fill OVERLAP_BINS evenly, as far as this walk has them."""
    T = shot.T_world_to_camera
    num, small = len(T), small_truth(shot)
    wanted = [len(part) for part in np.array_split(np.arange(number), len(OVERLAP_BINS) - 1)]
    chosen, spare = [], []
    centres = -np.einsum("nji,nj->ni", T[:, :3, :3], T[:, :3, 3])
    every = np.array([(a, b) for a in range(num) for b in range(num) if a != b])
    baseline = np.linalg.norm(centres[every[:, 0]] - centres[every[:, 1]], axis=1)
    trace = np.einsum("nij,nij->n", T[every[:, 0], :3, :3], T[every[:, 1], :3, :3])
    rotation = np.rad2deg(np.arccos(np.clip((trace - 1) / 2, -1, 1)))
    fit = (baseline > BASELINE_M[0]) & (baseline < BASELINE_M[1]) & (rotation < MAX_ROTATION_DEG)
    for a, b in rng.permutation(every[fit]).tolist():
        place = int(np.searchsorted(OVERLAP_BINS, mutual_overlap(small, a, b), side="right")) - 1
        if 0 <= place < len(wanted) and (b, a) not in chosen:
            if wanted[place]:
                wanted[place] -= 1
                chosen.append((a, b))
            else:
                spare.append((a, b))
        if not sum(wanted):
            break
    chosen += spare[: number - len(chosen)]  # where this walk lacks pairs of some overlap, others stand in
    if len(chosen) < number:
        raise ValueError(
            f"render pairs: only {len(chosen)} of {number} pairs found in town {shot.town.seed}; take another seed"
        )
    seen = sorted({frame for pair in chosen for frame in pair})
    shot.ppm[:] = render.texture_scales(shot.town.quads, centres[seen], shot.K[0, 0])
    return sorted(chosen)
